"""What befalls a cluster and its clients: which faults there are, when each of them strikes, and what it does."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from sim.cluster import Cluster, Node
from sim.devices import Device

from understudy.common.directory import Role

# How often each thing happens, among all that happens.
FAULTS = {
    "kill": 10,
    "kill in the file layer": 8,
    "lose power": 8,
    "lose all power": 1,
    "partition": 6,
    "partition one way": 4,
    "cut": 6,
    "sync fails": 2,
    "write fails": 2,
    "disk full": 3,
    "slow disk": 3,
    "slow network": 2,
    "promote": 5,
    "rewind": 2,
    "copy": 2,
    "restore": 1,
    "clock jumps": 2,
    "rot": 1,
    "kill a device": 4,
    "device offline": 3,
}


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that happens at a time, to whom the numbers point."""

    at_s: float
    what: str
    node: int
    other: int
    amount: float

    def __str__(self) -> str:
        return f"{self.at_s:8.3f} {self.what} node {self.node} other {self.other} amount {self.amount:.3f}"


def planned(plan: Random, length_s: float, nodes: int) -> list[Fault]:
    """What happens when; some stories have little of it, and some of one kind only."""
    kinds = dict(FAULTS)
    if plan.random() < 0.3:
        kinds = {kind: FAULTS[kind] for kind in plan.sample(sorted(FAULTS), 3)}
    count = int(length_s * plan.choice((0.1, 0.3, 1.0)))
    moments = sorted(plan.uniform(0.5, length_s) for _ in range(count))
    names, weights = list(kinds), list(kinds.values())
    return [
        Fault(
            at, plan.choices(names, weights)[0], plan.randrange(nodes), plan.randrange(nodes), plan.random()
        )
        for at in moments
    ]


class Nemesis:
    """Has faults happen to a cluster and its clients.

    Attributes:
        rotten: the nodes whose disks have decayed, by name.
    """

    def __init__(self, cluster: Cluster, clients: Sequence[str], devices: Sequence[Device]) -> None:
        self.rotten: set[str] = set()
        self._cluster = cluster
        self._lab = cluster.lab
        self._universe = cluster.lab.universe
        self._clients = clients  # devices included
        self._devices = devices
        self._copies: dict[int, Path] = {}

    def strike(self, fault: Fault) -> None:
        """It happens now."""
        node = self._cluster.nodes[fault.node]
        other = self._cluster.nodes[fault.other]
        getattr(self, "_" + fault.what.replace(" ", "_"))(node, other, fault.amount)

    def _later(self, delay_s: float, what: Callable[[], None]) -> None:
        self._universe.at(delay_s, what)

    def _kill(self, node: Node, other: Node, amount: float) -> None:
        self._universe.crashes += node.is_up
        node.kill()

    def _kill_in_the_file_layer(self, node: Node, other: Node, amount: float) -> None:
        action = self._universe.rng.choice(
            ("write", "sync", "sync directory", "create", "remove", "truncate")
        )
        node.disk.fail(action, 1 + int(amount * 10), 0)

    def _lose_power(self, node: Node, other: Node, amount: float) -> None:
        self._universe.crashes += node.is_up
        node.lose_power()

    def _lose_all_power(self, node: Node, other: Node, amount: float) -> None:
        for one in self._cluster.nodes:
            self._lose_power(one, one, amount)

    def _partition(self, node: Node, other: Node, amount: float) -> None:
        ways = self._ways(node, other)
        self._block([*ways, *((target, source) for source, target in ways)], amount * 30)

    def _partition_one_way(self, node: Node, other: Node, amount: float) -> None:
        self._block(self._ways(node, other), amount * 30)

    def _ways(self, node: Node, other: Node) -> list[tuple[str, str]]:
        if node is not other:
            return [(node.name, other.name)]
        return [(client, node.name) for client in self._clients]  # from these, then

    def _block(self, ways: list[tuple[str, str]], seconds: float) -> None:
        self._lab.network.block(ways)
        self._later(seconds, lambda: self._lab.network.unblock(ways))

    def _cut(self, node: Node, other: Node, amount: float) -> None:
        connections = self._lab.network.connections
        if connections:
            self._lab.network.cut(connections[int(amount * len(connections))])

    def _sync_fails(self, node: Node, other: Node, amount: float) -> None:
        node.disk.fail("sync", 1 + int(amount * 10), errno.EIO)

    def _write_fails(self, node: Node, other: Node, amount: float) -> None:
        node.disk.fail("write", 1 + int(amount * 10), errno.EIO)

    def _disk_full(self, node: Node, other: Node, amount: float) -> None:
        node.disk.space = 0

        def free() -> None:
            node.disk.space = None

        self._later(amount * 5, free)

    def _slow_disk(self, node: Node, other: Node, amount: float) -> None:
        before = node.disk.sync_s
        node.disk.sync_s = (0.01, 0.3)
        if node.process is not None:
            node.process.wake_s = node.disk.sync_s

        def recover() -> None:
            node.disk.sync_s = before
            if node.process is not None:
                node.process.wake_s = before

        self._later(amount * 10, recover)

    def _slow_network(self, node: Node, other: Node, amount: float) -> None:
        network = self._lab.network
        before, network.latency_s = network.latency_s, (0.01, 0.5)

        def recover() -> None:
            network.latency_s = before

        self._later(amount * 10, recover)

    def _promote(self, node: Node, other: Node, amount: float) -> None:
        if not node.is_busy and node.role in (Role.REPLICA, Role.PROMOTING):
            node.promote(serve=node.is_up and amount < 0.5)

    def _rewind(self, node: Node, other: Node, amount: float) -> None:
        if node is not other and not node.is_busy and not node.is_up and node.role is not None:
            node.rewind(other)

    def _copy(self, node: Node, other: Node, amount: float) -> None:
        if node.role is None or node.is_busy:
            return
        node.kill()
        copy = self._lab.root / f"copy-of-{node.name}"
        node.copy_to(copy)
        self._copies[int(node.name[1:])] = copy

    def _restore(self, node: Node, other: Node, amount: float) -> None:
        copy = self._copies.get(int(node.name[1:]))
        if copy is not None and not node.is_busy:
            self._cluster.is_tampered_with = True
            node.kill()
            node.restore(copy)

    def _clock_jumps(self, node: Node, other: Node, amount: float) -> None:
        self._lab.skew_us[node.name] += int((amount - 0.5) * 20e6)

    def _rot(self, node: Node, other: Node, amount: float) -> None:
        # Always the same: sound copies are left, or nothing could be asked for.
        node = self._cluster.nodes[-1]
        if not node.is_busy:
            path = node.disk.rot()
            if path is not None:
                self.rotten.add(node.name)
                self._cluster.is_tampered_with = True

    def _kill_a_device(self, node: Node, other: Node, amount: float) -> None:
        if self._devices:
            device = self._devices[int(amount * len(self._devices))]
            if device.process is not None:
                self._universe.crashes += device.process.is_alive
                device.process.kill()

    def _device_offline(self, node: Node, other: Node, amount: float) -> None:
        ways = [(device.name, one.name) for device in self._devices[:1] for one in self._cluster.nodes]
        self._block([*ways, *((target, source) for source, target in ways)], amount * 20)
