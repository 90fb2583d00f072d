"""Schedules of a simulated world: whatever can happen to servers and clients, in an order that a seed decides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

from sync_devices import Device
from sync_nodes import Line
from sync_sim import World

from understudy.common.operations import Add, Delete, DeleteRange, Operation, Put, Update
from understudy.common.types import Durability

PATHS = ["/notes", "/other"]


class Chaos:
    """One schedule: all that can happen, in an order that a seed decides."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.random = random = Random(seed)
        level = random.choice([Durability.LOCAL, Durability.LOCAL, Durability.REPLICA, Durability.APPLIED])
        paths = PATHS[: random.choice([1, 1, 2])]
        self.world = World(folder, level=level, replicas=random.choice([1, 1, 2]), paths=paths)
        # Whether failovers are to a replica that holds all that was shown.
        self.is_careful = level is not Durability.LOCAL and random.random() < 0.7
        modes = random.choice([["recover"], ["recover_or_discard"], ["recover", "discard", "manual"]])
        for _ in range(random.randint(2, 4)):
            self.world.device(random.choice(modes))
        self.history_versions = random.choice([100_000, 100_000, 15])
        # Whether a copy of a directory looks like the directory itself: that of a whole machine does.
        self.are_copies_alike = random.random() < 0.3
        self.steps: list[tuple[Callable[[], None], float]] = [
            (self.commit, 12),
            (self.connect, 8),
            (self.client_takes, 20),
            (self.server_takes, 15),
            (self.server_gives, 20),
            (self.talk, 20),
            (self.make_durable, 10),
            (self.replicate, random.choice([1, 10])),
            (self.report, 8),
            (self.bring_home, 6),
            (self.pass_time, 5),
            (self.lose, 2),
            (self.server_notices, 2),
            (self.go_off_or_on, 2),
            (self.restart, 1),
            (self.kill, 1),
            (self.restart_primary, 0.5),
            (self.fail_over, 1.5),
            (self.checkpoint, 1),
            (self.look, 3),
            (self.sweep, 1),
            (self.copy, 0.2),
            (self.settle, 0.2),
        ]
        # No two schedules are of the same kind.
        self.weights = [weight * random.choice([0.3, 1, 1, 2]) for _, weight in self.steps]

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.random.choices([step for step, _ in self.steps], self.weights)[0]()
        self.settle()

    # -- who and what ----------------------------------------------------------------------------------------------

    def running(self) -> Device | None:
        running = [device for device in self.world.devices if device.is_running]
        return self.random.choice(running) if running else None

    def line(self, is_wanted: Callable[[Line], object]) -> Line | None:
        """A connection of a client that knows of it."""
        lines = [one.line for one in self.world.devices if one.is_running and one.line is not None]
        wanted = [line for line in lines if is_wanted(line)]
        return self.random.choice(wanted) if wanted else None

    def operations(self) -> list[Operation]:
        return [self.operation() for _ in range(self.random.randint(0, 3))]

    def operation(self) -> Operation:
        key = b"k%d" % self.random.randrange(6)
        value = b"%d" % self.random.randrange(100)
        end = b"k9" if self.random.random() < 0.5 else key + b"\xff"
        kinds: list[Operation] = [
            Put(key, value),
            Put(key, value),
            Update(key, value),
            Delete(key),
            Add(key, 1),
            DeleteRange(key, end),
        ]
        return self.random.choice(kinds)

    # -- clients ---------------------------------------------------------------------------------------------------

    def commit(self) -> None:
        device = self.running()
        if device is not None:
            path = self.random.choice(self.world.paths)
            for _ in range(self.random.choice([1, 1, 1, 2, 6])):
                if device.is_running:
                    device.guarded(lambda: self.commit_to(device, path))

    def commit_to(self, device: Device, path: str) -> None:
        device.commit(path, *self.operations())

    def connect(self) -> None:
        device = self.running()
        if device is not None and device.is_online and device.line is None:
            device.connect()

    def client_takes(self) -> None:
        line = self.line(lambda line: line.down)
        if line is not None:
            line.device.guarded(line.device.take)

    def talk(self) -> None:
        """All goes well for one client, for a moment."""
        node = self.world.node
        line = self.line(lambda line: line.is_held_above)
        if line is None:
            return
        for _ in range(self.random.randint(1, 6)):
            while line.up:
                line.take()
            node.bring_home()
            node.make_durable()
            while line.give():
                pass
            while line.down and line.device.line is line:
                line.device.guarded(line.device.take)

    def lose(self) -> None:
        line = self.line(lambda _: True)
        if line is not None:
            line.device.lose()
            if self.random.random() < 0.5:
                line.cancel()

    def go_off_or_on(self) -> None:
        device = self.running()
        if device is not None:
            device.is_online = not device.is_online
            if device.line is not None:
                device.lose()

    def restart(self) -> None:
        device = self.random.choice(self.world.devices)
        if device.is_running:
            device.stop()
        else:
            device.start()

    def kill(self) -> None:
        device = self.running()
        if device is not None:
            device.steps_to_live = self.random.randrange(12)

    def copy(self) -> None:
        device = self.random.choice(self.world.devices)
        if not device.is_running and len(self.world.devices) < 5:
            self.world.copied(device)

    def look(self) -> None:
        device = self.running()
        if device is not None:
            device.check_view(self.random.choice(self.world.paths))

    def sweep(self) -> None:
        device = self.running()
        if device is not None:
            device.guarded(lambda: self.sweep_some(device))

    def sweep_some(self, device: Device) -> None:
        device.store.sweep(5)

    # -- servers ---------------------------------------------------------------------------------------------------

    def server_takes(self) -> None:
        lines = [line for line in self.world.node.lines if line.up]
        if lines:
            line = self.random.choice(lines)
            if line.device.line is line:
                line.device.guarded(line.device.written)
            if line.up:
                line.take()

    def server_gives(self) -> None:
        lines = self.world.node.lines
        if lines:
            self.random.choice(lines).give()

    def server_notices(self) -> None:
        """That a client is gone; and a client that the server is."""
        for line in [line for line in self.world.node.lines if line.device.line is not line]:
            line.cancel()
        dead = self.line(lambda line: not line.is_held_above)
        if dead is not None:
            dead.device.lose()

    def make_durable(self) -> None:
        node = self.world.node
        node.server.write()
        if len(node.server.log) > node.durable_lsn:
            node.make_durable(self.random.randint(node.durable_lsn + 1, len(node.server.log)))

    def replicate(self) -> None:
        replica = self.random.choice(self.world.replicas)
        replica.durable = self.random.randint(replica.durable, self.world.node.durable_lsn)
        replica.applied = self.random.randint(replica.applied, replica.durable)

    def report(self) -> None:
        self.world.report()

    def bring_home(self) -> None:
        self.world.node.bring_home()

    def pass_time(self) -> None:
        self.world.pass_time(self.random.choice([0.1, 1.0, 1.0, 10.0]))

    def restart_primary(self) -> None:
        node = self.world.node
        node.server.write()
        self.world.restart_primary(self.random.randint(node.durable_lsn, len(node.server.log)))

    def fail_over(self) -> None:
        heal_s = self.random.choice([0.0, 0.0, 15.0])
        replica = None if self.is_careful else self.random.choice(self.world.replicas)
        self.world.fail_over(replica, heal_s=heal_s)
        if self.random.random() < 0.5:
            self.kill()

    def checkpoint(self) -> None:
        if self.random.random() < 0.5:
            self.world.node.server.committer.freeze()
        self.world.node.checkpoint()

    # -- and then --------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        self.world.settle()
        # Refused is only what nobody can tell of any more whether it was applied.
        problems = [problem for home in self.world.homecomings for problem in home.problems]
        assert all("older than" in problem or "too old" in problem for problem in problems), problems
        self.world.check()
        if not self.world.lossy_failovers:
            assert not any(device.required for device in self.world.devices)
            assert not self.world.homecomings  # nobody even had to bring anything home
