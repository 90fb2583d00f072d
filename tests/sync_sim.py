"""A world of synced realms in memory: one primary after another, replicas, clients, and the lines between them.

Real are the machines of both sides, the committer, the states over their stores, and the clients' directories.
Simulated are clock, network, servers' disks, and chance: nothing happens unless somebody calls for it, step by step.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from local_helpers import check_sound
from state_helpers import CLUSTER, KEY, NODE
from sync_devices import Device, Killed
from sync_labels import LABEL, Label, labels_of
from sync_nodes import Node, Replica

from understudy.client.local_file import LocalFile, Writing
from understudy.common import entries
from understudy.common.records import Record, encode_record
from understudy.common.types import START, Durability, Epoch, Lsn
from understudy.v1 import log_pb2, sync_pb2

START_US = 1_700_000_000_000_000
ROUNDS_MAX = 300  # of a settling: each is a second


class World:
    """Everything, and what must not get lost."""

    def __init__(
        self, folder: Path, *, level: Durability, replicas: int = 1, paths: Sequence[str] = ("/notes",)
    ) -> None:
        self.folder = folder
        self.level = level
        self.paths = paths
        self.now_s = 1_000.0
        self.must: set[Label] = set()  # what the server holds, or somebody can still give it
        # Nobody can tell them apart. What they make under the same numbers may be taken for one when a state is loaded.
        self.twins: set[Device] = set()
        self.overtaken: set[Label] = set()  # see Node._note_overtaking
        self.homecomings: list[sync_pb2.Homecoming] = []
        self.devices: list[Device] = []
        self.is_replicating = True
        self.may_refuse = False
        self.replicas = [Replica(1) for _ in range(replicas)]
        self.lossy_failovers = 0
        self.failovers = 0
        self._epoch = 0
        self._labels = self._folders = 0
        self.node = Node(self, [self._epoch_start([])])

    def close(self) -> None:
        for device in self.devices:
            if device.is_running:
                device.stop()
        self.node.end()

    @property
    def clock_us(self) -> int:
        return START_US + int(self.now_s * 1_000_000)

    def new_folder(self, name: str) -> Path:
        self._folders += 1
        folder = self.folder / f"{name}{self._folders}"
        folder.mkdir()
        return folder

    def new_label(self) -> bytes:
        self._labels += 1
        return LABEL + b"%04d" % self._labels

    # -- clients -----------------------------------------------------------------------------------------------------

    def device(self, mode: str = "recover") -> Device:
        """A new client."""
        name = f"device{len(self.devices) + 1}"
        device = Device(self, name, self.new_folder(name) / "local", mode=mode)
        self.devices.append(device)
        return device

    def copied(self, device: Device) -> Device:
        """A copy of a directory that nobody has open, in use from now on as well."""
        assert not device.is_running
        name = f"device{len(self.devices) + 1} (of {device.name})"
        directory = self.new_folder("copy") / "local"
        shutil.copytree(device.directory, directory)
        self.may_refuse = True
        copy = Device(self, name, directory, mode=device.mode)
        self.devices.append(copy)
        if not copy.store.was_copied:
            self.twins |= {device, copy}
        return copy

    # -- servers -----------------------------------------------------------------------------------------------------

    @property
    def reached_lsn(self) -> int:
        """Up to where others may see the log at this world's level, whether a replica has applied it yet or not."""
        durable = self.node.durable_lsn
        if self.level is Durability.LOCAL:
            return durable
        return min(durable, max(one.durable for one in self.replicas))

    def report(self) -> None:
        """The primary hears how far its replicas are."""
        self.node.server.replicas(*((one.durable, one.applied) for one in self.replicas))

    def replicate(self) -> None:
        """All that is durable reaches all replicas, and the primary hears of it."""
        for replica in self.replicas:
            replica.durable = replica.applied = self.node.durable_lsn
        self.report()

    def pass_time(self, seconds: float) -> None:
        """The clock goes on; servers poll, clients tick."""
        self.now_s += seconds
        self.node.server.clock_us = self.clock_us
        self.node.server.tick(seconds)
        for line in self.node.lines:
            line.session.poll()
        for device in self.devices:
            if device.is_running and device.line is not None:
                device.guarded(lambda it=device: it.do(it.session.tick(now_s=self.now_s)))  # type: ignore[misc]

    def restart_primary(self, kept_lsn: int | None = None) -> None:
        """The primary starts again, with what was durable on its disk and perhaps more."""
        kept = self.node.durable_lsn if kept_lsn is None else kept_lsn
        log = self.node.server.log[:kept]
        self.node.end()
        self._lose([log])
        self.node = Node(self, log)

    def fail_over(self, replica: Replica | None = None, *, heal_s: float = 0.0) -> None:
        """The primary is gone, and a replica takes over: the one that is farthest, or this one."""
        if replica is None:
            replica = max(self.replicas, key=lambda one: one.durable)
        old = self.node
        kept = old.server.log[: replica.durable]
        reached = self.reached_lsn
        self.failovers += 1
        self.lossy_failovers += replica.durable < reached
        log = [*kept, self._epoch_start(kept)]
        old.end()
        self._lose([kept])
        # The old primary comes back as a replica, rewound; others that had more are, too.
        replica.durable = old.durable_lsn
        for one in self.replicas:
            one.durable = min(one.durable, len(kept))
            one.applied = min(one.applied, one.durable)
        self.node = Node(self, log, heal_s=heal_s)

    def _lose(self, logs: Iterable[Sequence[Record]]) -> None:
        """What is in none of these logs, and with no client, is gone."""
        left = {label for log in logs for label in self._labels_in(log)}
        for device in self.devices:
            left |= self._held_by(device)
        self.must &= left

    def _held_by(self, device: Device) -> set[Label]:
        if device.is_running:
            return device.held()
        device.start()
        try:
            return device.held()
        finally:
            device.stop()

    def _labels_in(self, log: Sequence[Record]) -> Iterator[Label]:
        for record in log:
            raw = entries.parse_entry(record.payload, record.lsn).change
            if raw:
                change = log_pb2.Change.FromString(raw)
                yield from labels_of(change.realm, change.operations)

    def _epoch_start(self, log: Sequence[Record]) -> Record:
        self._epoch += 1
        after = log[-1].position if log else START
        payload = entries.epoch_entry(
            time_us=self.clock_us, cluster=CLUSTER, epoch=Epoch(self._epoch), after=after, node=NODE, key=KEY
        )
        lsn = Lsn(after.lsn + 1)
        return Record(lsn, encode_record(after.digest, lsn, payload)[1], payload)

    # -- letting it settle -------------------------------------------------------------------------------------------

    def deliver(self) -> None:
        """Everything that is on its way arrives, with all that follows from it, at once.

        All of it becomes durable, and reaches replicas where ``is_replicating``.
        """
        is_moving = True
        while is_moving:
            is_moving = False
            for device in self.devices:
                line = device.line if device.is_running else None
                if line is None:
                    continue
                while line.is_held_above and line.up:
                    device.written()
                    line.take()
                    is_moving = True
                while line.is_held_above and line.give():
                    is_moving = True
                while device.line is line and line.down:
                    device.take()
                    is_moving = True
            self.node.bring_home()
            self.node.make_durable()
            if self.is_replicating:
                self.replicate()

    def run(self, seconds: int = 3) -> None:
        """Some time in which nothing goes wrong for those who are connected."""
        for _ in range(seconds):
            self.deliver()
            self.pass_time(1.0)
        self.deliver()

    def settle(self) -> None:
        """Everybody comes online and nothing goes wrong any more: in the end all must be equal."""
        self.is_replicating = True
        for device in self.devices:
            device.steps_to_live = None
            if not device.is_running:
                device.start()
            device.is_online = True
        for line in [line for line in self.node.lines if line.device.line is not line]:
            line.cancel()
        for _ in range(ROUNDS_MAX):
            for device in self.devices:
                if device.line is not None and not device.line.is_held_above:
                    device.lose()
                if device.line is None:
                    device.connect()
            self.deliver()
            self.pass_time(1.0)
            self._decide()
            if all(self.is_settled(device, path) for device in self.devices for path in self.paths):
                return
        raise AssertionError("does not settle:\n" + "\n".join(self.report_of(one) for one in self.devices))

    def _decide(self) -> None:
        """Users say what to do with copies that wait for that, and open anew what does not go on."""
        for device in self.devices:
            for path in self.paths:
                if device.reset_error(path) is not None:
                    device.realms[path].realm.set_reset(None)
                    device.reopen(path, "recover")
                elif device.realms[path].error is not None:
                    device.reopen(path, device.mode)

    def is_settled(self, device: Device, path: str) -> bool:
        """Whether this client is where the server is, with nothing left to do."""
        row = device.realms[path].realm.row
        return (
            device.session.is_up_to_date(path)
            and not row.queue_count
            and not row.HasField("reset")
            and (row.copy.version, row.copy.head) == self.node.server.committer.head(path)
        )

    def report_of(self, device: Device) -> str:
        """For people."""
        rows = [device.realms[path].realm.row for path in self.paths]
        return f"{device.name} ({device.mode}): " + "; ".join(
            f"{path} {row.copy.version} queue {row.queue_count} reset {row.reset.attempted}/{row.reset.swapped}"
            f" tail {row.tail_first}"
            for path, row in zip(self.paths, rows, strict=True)
        )

    # -- checking ----------------------------------------------------------------------------------------------------

    def server_pairs(self, path: str) -> dict[bytes, bytes]:
        """What the server holds."""
        state = self.node.server.state
        if state.realm(path) is None:
            return {}
        with state.scan(path) as scan:
            keys, values, _ = scan.page(bytes_max=1 << 60, pairs_max=1 << 30)
        return dict(zip(keys, values, strict=True))

    def labels(self, path: str) -> set[Label]:
        """What the server holds, by its labels."""
        return {(path, key) for key in self.server_pairs(path) if key.startswith(LABEL)}

    def origins(self, path: str) -> list[tuple[bytes, int]]:
        """Client and number of every change of a realm, in order."""
        log = self.node.server.log
        raws = (entries.parse_entry(record.payload, record.lsn).change for record in log)
        changes = (log_pb2.Change.FromString(raw) for raw in raws if raw)
        return [(change.client, change.number) for change in changes if change.realm == path]

    def check(self) -> None:
        """After settling: all are equal, nothing is lost, and nothing was done twice."""
        for path in self.paths:
            pairs = self.server_pairs(path)
            counts = {(path, key): value for key, value in pairs.items() if key.startswith(LABEL)}
            twice = {key: value for key, value in counts.items() if value != b"1"}
            # A known limit: of what a directory and its copy both queue, one may be done again under another id, after
            # a load or a reset that has left a part of it out.
            has_copies = any(" (of " in device.name for device in self.devices)
            assert not twice or has_copies, f"done more than once: {twice}"  # G6
            lost = {label for label in self.must if label[0] == path} - counts.keys()
            assert not lost, f"lost though somebody held it: {sorted(lost)}"
            origins = self.origins(path)
            assert len(set(origins)) == len(origins)  # G6
            for device in self.devices:
                assert device.pairs(path) == pairs, f"{device.name} differs"
                check_sound(device.store, device.realms[path].realm)
        for device in self.devices:
            assert len(device.resets) <= self.lossy_failovers * len(self.paths), f"{device.name} loops"


def dying(world: World) -> Callable[[Writing], Writing]:
    """What replaces ``Writing.__enter__``: a process may end before any of its local transactions."""
    enter = Writing.__enter__

    def entered(writing: Writing) -> Writing:
        file: LocalFile = writing._file
        for device in world.devices:
            if device.directory == file.path and device.steps_to_live is not None:
                device.steps_to_live -= 1
                if device.steps_to_live < 0:
                    device.steps_to_live = None
                    raise Killed
        return enter(writing)

    return entered
