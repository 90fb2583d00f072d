"""One history from a seed: a cluster under load, what befalls it, the operator, and what must be true in the end."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from sim.cluster import BrokenPromise, Cluster, Node, check_epochs, epochs_of
from sim.devices import Device
from sim.faults import Nemesis, planned
from sim.lab import Lab
from sim.readers import Reader, Views
from sim.universe import Universe
from sim.writers import REALM, Writer, check

from understudy.common.directory import Role
from understudy.common.errors import CorruptionError, UnderstudyError
from understudy.common.state import State
from understudy.common.types import Durability

LENGTH_S = (8.0, 30.0)
SETTLE_S = 300.0
RESTART_S = (0.2, 8.0)
LOOK_S = 0.5


@dataclass
class Outcome:
    """Of a story."""

    seed: int
    simulated_s: float = 0.0
    steps: int = 0
    crashes: int = 0
    promotions: int = 0
    acknowledged: int = 0
    reads: int = 0
    problem: str = ""
    trace: list[str] = field(default_factory=list)
    fingerprint: str = ""  # of the whole history


class Story:
    """Everything that a seed decides, but for the faults that are left out."""

    def __init__(self, seed: int, root: Path, without: frozenset[int] = frozenset()) -> None:
        plan = Random(seed)
        self.outcome = Outcome(seed)
        self.universe = Universe(seed)
        self.lab = Lab(self.universe, root)
        self.length_s = plan.uniform(*LENGTH_S)
        count = plan.choice((2, 2, 3))
        durability = plan.choice(
            (Durability.REPLICA, Durability.REPLICA, Durability.APPLIED, Durability.LOCAL)
        )
        floor_bytes = plan.choice((0, 32 << 10, 64 << 20))
        self.cluster = Cluster(self.lab, count, durability, floor_bytes)
        self.faults = [one for at, one in enumerate(planned(plan, self.length_s, count)) if at not in without]
        self.writers = [Writer(self.cluster, f"w{index}") for index in range(plan.choice((1, 2, 3)))]
        for writer in self.writers:
            self.lab.machine(writer.name)
            writer.pause_s = plan.choice((0.02, 0.1, 0.3))
            writer.size = plan.choice((20, 200, 1_500))
        self.devices = [Device(self.cluster, f"d{index}") for index in range(plan.choice((0, 1, 2)))]
        for device in self.devices:
            device.pause_s = plan.choice((0.05, 0.2, 1.0))
        self.views = Views(self.cluster, self.writers, self.devices)
        self.readers = [
            Reader(self.cluster, f"r{index}", self.views) for index in range(plan.choice((0, 1, 1, 2)))
        ]
        for reader in self.readers:
            self.lab.machine(reader.name)
            reader.pause_s = plan.choice((0.3, 1.0))
        self.cluster.heal_window_s = plan.choice((0.0, 0.0, 2.0, 6.0))
        clients = [one.name for one in (*self.writers, *self.readers, *self.devices)]
        self._nemesis = Nemesis(self.cluster, clients, self.devices)

    # -- telling ---------------------------------------------------------------------------------------------

    def tell(self) -> Outcome:
        """Plays it; what was broken is in the outcome."""
        outcome, universe = self.outcome, self.universe
        try:
            self._begin()
            for fault in self.faults:
                self._pass(fault.at_s - universe.now_s)
                universe.trace("fault", fault.what, fault.node, fault.other, f"{fault.amount:.3f}")
                self._nemesis.strike(fault)
                self._look()
            self._pass(self.length_s - universe.now_s)
            self._settle()
        except BrokenPromise as problem:
            outcome.problem = str(problem)
        outcome.problem = next(iter(universe.problems), outcome.problem)
        outcome.crashes = universe.crashes
        outcome.simulated_s, outcome.steps = universe.now_s, universe.steps
        outcome.promotions = self.cluster.promotions
        outcome.acknowledged = sum(len(one.acknowledged) for one in self.writers)
        outcome.reads = self.views.count
        # Where it was told is no part of it.
        outcome.trace = [line.replace(str(self.lab.root), "…") for line in universe.lines]
        told = "\n".join([*outcome.trace, repr(universe.now_s), str(universe.steps)])
        outcome.fingerprint = hashlib.sha256(told.encode()).hexdigest()[:16]
        return outcome

    def _begin(self) -> None:
        first, *others = self.cluster.nodes
        first.start()
        self.universe.run(lambda: first.server is not None, for_s=10)
        for node in others:
            node.start(as_replica=True)
        for writer in self.writers:
            writer.start()
        for device in self.devices:
            device.start()
        for reader in self.readers:
            reader.start()
        self._tend()

    def _pass(self, seconds: float) -> None:
        """Lets time pass, and looks every now and then."""
        end_s = self.universe.now_s + seconds
        while (left_s := end_s - self.universe.now_s) > 0:
            self.universe.run(lambda: False, for_s=min(left_s, LOOK_S))
            self._look()

    def _look(self) -> None:
        """What must never be seen, looked at often."""
        for node in self.cluster.nodes:
            engine = node.engine
            if engine is not None and engine.mismatches and not self._nemesis.rotten:
                raise BrokenPromise(f"G11: {node}: {engine.mismatches}")
            if isinstance(node.why, CorruptionError) and not self._nemesis.rotten:
                raise BrokenPromise(f"G2: {node} says that it is damaged: {node.why}")
        self.cluster.look()
        if self.universe.problems:
            raise BrokenPromise(self.universe.problems[0])

    # -- the operator ------------------------------------------------------------------------------------------

    def _tend(self) -> None:
        """Starts what is down, rewinds what is fenced, promotes where nobody reigns; now and then, and hastily."""
        if self.universe.now_s >= self.length_s:
            return
        rng = self.universe.rng
        for node in self.cluster.nodes:
            if node.is_up or node.is_busy or rng.random() < 0.3:
                continue
            self._raise_up(node)
        for device in self.devices:
            device.start()
        self.universe.at(rng.uniform(*RESTART_S), self._tend)

    def _raise_up(self, node: Node) -> None:
        role, reigning = node.role, self.cluster.primaries()
        if role is None:
            node.start(as_replica=node is not self.cluster.nodes[0])
        elif role is Role.FENCED:
            if reigning:
                node.rewind(reigning[0])
        elif role is Role.PROMOTING or (
            role is Role.REPLICA and not reigning and self.universe.rng.random() < 0.2
        ):
            node.promote()
        else:
            node.start()

    # -- the end -----------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """All is mended; one history is taken for the right one, and everybody joins it."""
        universe, cluster = self.universe, self.cluster
        self.lab.network.heal()
        for writer in self.writers:
            writer.stopped = True
        universe.run(lambda: not any(node.is_busy for node in cluster.nodes), for_s=200)
        self._pass(10)
        for node in cluster.nodes:
            node.kill()
            node.disk.mend()
        for node in cluster.nodes:
            if node.role is Role.PROMOTING:  # what was begun is finished first: its epoch may have begun
                node.promote()
                self._wait(lambda node=node: not node.is_busy, lambda: "a promotion does not end")  # type: ignore[misc]
        chief = self._crown()
        if chief is None:
            return
        for node in cluster.nodes:
            if node is not chief:
                self._join(node, chief)
        universe.run(lambda: self._agree(chief), for_s=20)
        for node in cluster.nodes:
            if node.name in self._nemesis.rotten and node is not chief and not self._agrees(node, chief):
                node.kill()  # it says in its status that its log is damaged, and what to do
                node.wipe()
                node.start(as_replica=True)
        for device in self.devices:
            device.stopped = True
            device.start()
        self._wait(
            lambda: all(device.is_synced for device in self.devices),
            lambda: f"devices do not come up to date: {[(one.name, one.why) for one in self.devices]}",
        )
        self._wait(lambda: self._agree(chief), lambda: f"{self._heads()} do not come together")
        self._pass(10)  # for devices to see what others of them have sent last
        self._compare(chief)

    def _crown(self) -> Node | None:
        """The node that knows most is made the primary, as an operator would."""
        found = []
        for node in self.cluster.nodes:
            if node.role is None:
                continue
            try:
                epoch, head = node.examine()
            except UnderstudyError as error:
                if node.name not in self._nemesis.rotten:
                    raise BrokenPromise(f"G2: {node} can't be opened: {error!r}") from error
                continue
            if epoch:
                found.append((epoch, head.lsn, node))
        if not found:
            raise BrokenPromise("nobody has a copy")
        if self.cluster.is_tampered_with:  # who has fenced one may be gone; only the others can reign
            found = [one for one in found if one[2].role is not Role.FENCED]
            if not found:
                return None  # only a backup helps
        _, _, chief = max(found, key=lambda one: (one[0], one[1], one[2].role is Role.PRIMARY))
        if chief.role in (Role.REPLICA, Role.PROMOTING):
            chief.promote()
            self._wait(lambda: not chief.is_busy, lambda: f"{chief} is not promoted: {chief.why!r}")
        if chief.role is not Role.PRIMARY:
            raise BrokenPromise(f"G7: {chief} knows most and is {chief.role}")
        chief.server = None
        chief.start()
        self._wait(lambda: chief.server is not None, lambda: f"{chief} does not serve: {chief.why!r}")
        return chief

    def _join(self, node: Node, chief: Node) -> None:
        """A replica goes on where it can; all others do what they are told: rewind, or begin anew."""
        if node.role is Role.REPLICA:
            node.start()
            self.universe.run(lambda: False, for_s=5)
        if not node.is_up and node.role is not None and not isinstance(node.why, CorruptionError):
            node.rewind(chief)
            self._wait(lambda: not node.is_busy, lambda: f"{node} is not rewound: {node.why!r}")
        if isinstance(node.why, CorruptionError):
            node.wipe()
        node.start(as_replica=True)

    def _wait(self, until: Callable[[], bool], problem: Callable[[], str]) -> None:
        if not self.universe.run(until, for_s=SETTLE_S):
            raise BrokenPromise(problem())

    def _heads(self) -> str:
        return ", ".join(
            f"{node} ({node.role}, {node.engine and node.engine.durable.lsn}, {node.why!r})"
            for node in self.cluster.nodes
        )

    def _agree(self, chief: Node) -> bool:
        return all(self._agrees(node, chief) for node in self.cluster.nodes)

    @staticmethod
    def _agrees(node: Node, chief: Node) -> bool:
        engine, head = node.engine, chief.engine and chief.engine.durable
        return engine is not None and engine.durable == engine.state.applied == head

    def _compare(self, chief: Node) -> None:
        states = []
        assert chief.engine is not None
        for node in self.cluster.nodes:
            assert node.engine is not None
            state = node.engine.state
            realm = state.realm(REALM)
            pairs = {} if realm is None else _pairs(state)
            states.append(pairs)
            view = self.views.note(self.views.begin(node), pairs)
            if realm is not None and realm.version != view.version:
                raise BrokenPromise(
                    f"G6: {node} is at version {realm.version}, and has counted {view.version}"
                )
            check_epochs(node, node.engine)
            if epochs_of(node.engine) != epochs_of(chief.engine):
                raise BrokenPromise(f"G3, G7: {node} knows of other epochs than {chief}")
            if pairs != states[0]:
                raise BrokenPromise(f"G3, G11: {node} holds something else than {self.cluster.nodes[0]}")
        check(self.writers, states[0])
        for device in self.devices:
            device.check(states[0])


def _pairs(state: State) -> dict[bytes, bytes]:
    with state.scan(REALM) as scan:
        keys, values, is_over = scan.page(bytes_max=1 << 30, pairs_max=1 << 30)
    assert is_over
    return dict(zip(keys, values, strict=True))
