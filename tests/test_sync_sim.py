"""Clients of synced realms through failovers: by hand for stories that can be told, and by chance for all others."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random

import pytest
from sync_chaos import Chaos
from sync_devices import Device
from sync_labels import Label
from sync_sim import World, dying

from understudy.client import local_file, local_layout, local_owner, local_store, uploading
from understudy.common import checkpoint
from understudy.common.operations import Put
from understudy.common.types import ID_BYTES, Durability
from understudy.primary import sync_load, sync_session
from understudy.v1 import log_pb2, sync_pb2

LOCAL, REPLICA, APPLIED = Durability
PATH = "/notes"
# Seeds that have failed, each for a reason of its own.
SEEDS = {
    3022: "a copied machine gave all of its queue another name when one change of it was somebody else's",
    5008: "a load that was cut off went on at a server where the realm had come home, under another id",
    5088: "a copied machine gave what it had sent another name, though it had been taken",
    5515: "a load of nothing, cut off before it took its place, was described by no digest",
    30040: "a change that a reset had left in part was not recognised when it came home whole",
}
SCHEDULES = 300
STEPS = 250


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory, where the machine has such a place: nothing here is about disks."""
    memory = Path("/dev/shm")
    made = Path(tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else None))
    yield made
    shutil.rmtree(made)


@pytest.fixture(autouse=True)
def small_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that few changes and keys are many messages, and a load takes several scans."""
    monkeypatch.setattr(sync_load, "PAGE_PAIRS", 3)
    monkeypatch.setattr(sync_load, "PAGES_A_SCAN", 2)
    monkeypatch.setattr(sync_session, "CHANGES_MAX", 4)
    monkeypatch.setattr(uploading, "MESSAGE_CHANGES_MAX", 3)
    monkeypatch.setattr(uploading, "WINDOW_CHANGES", 5)
    monkeypatch.setattr(uploading, "TAIL_PIECE_BYTES", 300)


# -- stories -------------------------------------------------------------------------------------------------------


@pytest.fixture
def worlds(folder: Path) -> Iterator[Callable[..., World]]:
    """Makes a world in which two changes of a first client have reached everybody: a second client, and a replica."""
    made: list[World] = []

    def make(level: Durability = LOCAL, *, modes: Sequence[str] = ("recover", "recover")) -> World:
        world = World(folder, level=level, paths=[PATH])
        made.append(world)
        for mode in modes:
            world.device(mode).connect()
        world.deliver()
        commit(world.devices[0], 2)
        world.run()
        return world

    yield make
    for world in made:
        world.close()


def commit(device: Device, count: int) -> list[Label]:
    return [
        device.commit(PATH, Put(b"k%d" % number, b"of " + device.name.encode())) for number in range(count)
    ]


def commit_unreplicated(world: World, count: int) -> list[Label]:
    """Changes of the first client that all clients get, and no replica."""
    world.is_replicating = False
    labels = commit(world.devices[0], count)
    world.run()
    return labels


def fail_over(world: World, *, heal_s: float = 0.0) -> None:
    """The replica takes over, and all clients notice; none is connected then."""
    world.fail_over(heal_s=heal_s)
    world.is_replicating = True
    for device in world.devices:
        if device.line is not None:
            device.lose()


def connect(*devices: Device) -> None:
    """These clients connect, and all that follows from it happens."""
    for device in devices:
        device.connect()
    devices[0].world.run()


def head(world: World) -> tuple[int, bytes]:
    return world.node.server.committer.head(PATH)


def resets(world: World) -> list[int]:
    """How many each client has begun."""
    return [len(device.resets) for device in world.devices]


def total(world: World) -> tuple[int, int, int, int]:
    """What came home: appended, renewed, known, refused."""
    homes = world.homecomings
    return (
        sum(home.appended for home in homes),
        sum(home.renewed for home in homes),
        sum(home.known for home in homes),
        sum(home.refused for home in homes),
    )


def finish(world: World) -> None:
    world.settle()
    world.check()


@pytest.mark.parametrize("level", [REPLICA, APPLIED])
def test_g5_a_failover_to_a_replica_that_has_caught_up_is_no_matter_to_clients(
    worlds: Callable[..., World], level: Durability
) -> None:
    """G5: where a replica has all that was shown, what was not is still queued, and nobody has to give up anything."""
    world = worlds(level)
    unshown = commit_unreplicated(world, 3)
    assert world.devices[0].queued(PATH) == set(unshown)
    fail_over(world)
    finish(world)
    assert resets(world) == [0, 0]
    assert not world.homecomings


def test_g5_nothing_is_shown_again_before_it_is_safe_again(worlds: Callable[..., World]) -> None:
    """G5: a primary that was started anew does not know how far its replicas are, so it shows nothing."""
    world = worlds(REPLICA)
    commit_unreplicated(world, 2)
    assert len(world.node.server.log) > max(replica.durable for replica in world.replicas)
    world.restart_primary()
    newcomer = world.device()
    for device in world.devices:
        if device.line is not None:
            device.lose()
    connect(*world.devices)
    copies = [device.realms[PATH].realm.row.copy.version for device in world.devices]
    assert (copies, head(world)[0]) == ([2, 2, 0], 4)
    world.is_replicating = True
    world.run()
    assert newcomer.realms[PATH].realm.row.copy.version == 4
    finish(world)


def test_what_a_server_has_lost_comes_home_as_it_was(worlds: Callable[..., World]) -> None:
    """Where nobody has gone on, versions and digests are what they were, and nobody has to give up anything."""
    world = worlds()
    commit_unreplicated(world, 3)
    before = head(world)
    fail_over(world)
    assert head(world)[0] == 2
    connect(*world.devices)
    assert head(world) == before
    assert total(world) == (3, 0, 3, 0)  # of two clients at the same time
    finish(world)
    assert resets(world) == [0, 0]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_longest_tail_wins(worlds: Callable[..., World], order: tuple[int, int]) -> None:
    """Whoever comes first: one client brings home what another one had not got, and no more."""
    world = worlds()
    commit_unreplicated(world, 1)
    world.devices[1].lose()
    commit_unreplicated(world, 2)
    before = head(world)
    fail_over(world)
    for number in order:
        connect(world.devices[number])
    assert head(world) == before
    assert total(world)[:2] == (3, 0)
    finish(world)
    assert resets(world) == [0, 0]


def test_what_a_server_has_lost_comes_home_from_one_who_has_only_loaded_it(
    worlds: Callable[..., World],
) -> None:
    """The changes that no replica had came with the state: versions and digests are what they were."""
    world = worlds()
    commit_unreplicated(world, 5)
    before = head(world)
    newcomer = world.device()
    connect(newcomer)
    row = newcomer.realms[PATH].realm.row
    assert (row.copy.version, row.tail_first) == (7, 3)
    fail_over(world)
    assert head(world)[0] == 2
    connect(newcomer)
    assert head(world) == before
    assert total(world) == (5, 0, 0, 0)
    finish(world)
    assert resets(world) == [0, 0, 0]


def _loaded_tail(world: World) -> int:
    """From which version on a newcomer has the changes."""
    newcomer = world.device()
    connect(newcomer)
    row = newcomer.realms[PATH].realm.row
    assert row.copy.version == head(world)[0]
    return row.tail_first


def test_what_is_safe_does_not_come_with_a_state(worlds: Callable[..., World]) -> None:
    """Only changes that no replica has are for clients to keep."""
    world = worlds()
    assert _loaded_tail(world) == 0
    commit_unreplicated(world, 1)
    assert _loaded_tail(world) == 3


def test_of_a_pruned_history_what_is_left_comes_with_a_state(
    worlds: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leads up to the state in any case."""
    world = worlds()
    commit_unreplicated(world, 6)
    monkeypatch.setattr(checkpoint, "HISTORY_VERSIONS_MAX", 3)
    world.node.server.committer.freeze()
    world.node.make_durable()
    world.node.checkpoint()
    assert world.node.server.state.history_first(PATH) == 6
    assert _loaded_tail(world) == 6


@pytest.mark.parametrize("limit", ["TAIL_CHANGES_MAX", "TAIL_BYTES_MAX"])
def test_changes_that_are_too_many_for_a_tail_do_not_come_with_a_state(
    worlds: Callable[..., World], monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    """G9: neither in number nor in size."""
    world = worlds()
    commit_unreplicated(world, 4)
    monkeypatch.setattr(sync_load, limit, {"TAIL_CHANGES_MAX": 3, "TAIL_BYTES_MAX": 300}[limit])
    assert _loaded_tail(world) == 0
    monkeypatch.setattr(sync_load, limit, {"TAIL_CHANGES_MAX": 4, "TAIL_BYTES_MAX": 2_000}[limit])
    assert _loaded_tail(world) == 3


def test_a_realm_that_a_server_has_lost_altogether_comes_home(folder: Path) -> None:
    """Also to clients that had bound it before there was one, and so were never told its id with a bind."""
    world = World(folder, level=LOCAL)
    world.is_replicating = False
    first, second = world.device(), world.device()
    connect(first, second)
    commit(first, 3)
    world.run()
    before = head(world)
    fail_over(world)
    finish(world)
    assert head(world) == before
    assert resets(world) == [0, 0]
    world.close()


def test_where_the_server_has_gone_on_tails_become_new_changes_and_queues_are_recovered(
    worlds: Callable[..., World],
) -> None:
    """G6: what two clients had confirmed is made anew once; each is reset once, and what was queued is kept."""
    world = worlds(modes=["recover", "recover", "recover"])
    first, second, third = world.devices
    third.lose()
    lost = commit_unreplicated(world, 3)
    fail_over(world)
    queued = commit(first, 2)
    commit(third, 1)
    connect(third)
    connect(first)
    connect(second)
    finish(world)
    assert [one.resets for one in world.devices] == [[(PATH, "OTHER_HISTORY")], [(PATH, "OTHER_HISTORY")], []]
    assert total(world)[:2] == (0, 3)
    assert {*lost, *queued} <= world.labels(PATH)


def test_a_change_of_a_client_that_has_gone_on_comes_home_once(worlds: Callable[..., World]) -> None:
    """G6: under another name, as its number is past; and whoever brings it next finds it there."""
    world = worlds(modes=["recover", "recover", "recover"])
    first, second, third = world.devices
    lost = commit_unreplicated(world, 2)
    fail_over(world)
    first.forget(PATH)
    commit(first, 1)
    connect(first)
    connect(second)
    connect(third)
    finish(world)
    assert total(world) == (0, 2, 2, 0)
    assert world.labels(PATH) >= set(lost)


def test_discarding_gives_up_only_what_was_never_confirmed(worlds: Callable[..., World]) -> None:
    """What the old server had confirmed is offered to the new one in every mode."""
    world = worlds(modes=["discard", "recover"])
    first, second = world.devices
    second.lose()
    lost = commit_unreplicated(world, 2)
    fail_over(world)
    queued = commit(first, 2)
    commit(second, 1)
    connect(second)
    connect(first)
    finish(world)
    assert resets(world) == [1, 0]
    assert world.labels(PATH) >= set(lost)
    assert not world.labels(PATH) & set(queued)


def test_what_a_reset_is_left_to_the_user_for_is_offered_before(worlds: Callable[..., World]) -> None:
    """In mode manual nothing of the copy is touched until somebody decides, and confirmed changes are safe by then."""
    world = worlds(modes=["manual", "recover"])
    first, second = world.devices
    second.lose()
    lost = commit_unreplicated(world, 2)
    fail_over(world)
    queued = commit(first, 1)
    commit(second, 1)
    connect(second)
    connect(first)
    assert first.reset_error(PATH) is not None
    assert world.labels(PATH) >= set(lost)
    assert first.queued(PATH) == set(queued)
    finish(world)


def test_a_failover_while_a_tail_is_being_sent_costs_nothing(worlds: Callable[..., World]) -> None:
    """A tail that was cut off is asked for again by the next server."""
    world = worlds()
    commit_unreplicated(world, 4)
    before = head(world)
    fail_over(world)
    first = world.devices[0]
    first.connect()
    assert first.line is not None
    first.take()
    first.line.take()
    first.line.give()
    first.take()
    assert len(first.line.up) > 1  # pieces of its tail
    first.line.take()
    fail_over(world)
    finish(world)
    assert head(world) == before
    assert resets(world) == [0, 0]


def test_a_forged_tail_is_refused(worlds: Callable[..., World]) -> None:
    """What no server has signed does not come home, and who sends it has to give its copy up."""
    world = worlds()
    first, second = world.devices
    lost = commit_unreplicated(world, 1)
    fail_over(world)
    first.connect()
    assert first.line is not None
    first.take()
    first.line.take()
    first.line.give()
    first.take()
    request = sync_pb2.SyncRequest.FromString(first.line.up.pop())
    forged = log_pb2.Change.FromString(request.tail.changes[0])
    forged.operations[0].value = b"forged"
    request.tail.changes[0] = forged.SerializeToString()
    first.line.up.append(request.SerializeToString())
    connect(second)
    finish(world)
    assert total(world)[3] == 1
    assert resets(world) == [1, 0]
    assert world.labels(PATH) >= set(lost)
    assert b"forged" not in world.server_pairs(PATH).values()


def test_in_the_heal_window_tails_come_home_before_anybody_goes_on(worlds: Callable[..., World]) -> None:
    """New changes wait while the window is open, so that there is no other history, and nobody is reset."""
    world = worlds(modes=["recover", "recover", "recover"])
    first, second, third = world.devices
    third.lose()
    commit_unreplicated(world, 3)
    before = head(world)
    fail_over(world, heal_s=20.0)
    waiting = commit(third, 1)
    connect(third)
    assert head(world)[0] == 2
    connect(first, second)
    assert head(world) == before
    finish(world)
    assert resets(world) == [0, 0, 0]
    assert world.labels(PATH) >= set(waiting)


def test_a_change_that_was_refused_and_came_home_from_somebody_else_holds_nothing_up(
    worlds: Callable[..., World],
) -> None:
    """What its client sends behind it is taken, though that one is never sent again."""
    world = worlds()
    first, second = world.devices
    world.is_replicating = False
    commit(first, 1)
    assert first.line is not None
    while first.line.up:
        first.line.take()
    first.lose()
    world.run()  # the other one gets it
    fail_over(world, heal_s=5.0)
    connect(first)  # its window is open: refused
    commit(first, 1)
    connect(second)
    finish(world)
    assert resets(world) == [0, 0]


def test_a_machine_that_was_copied_makes_nothing_twice(
    worlds: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """G6: what both have queued since before is applied once, what each has made since then as well."""
    monkeypatch.setattr(local_owner, "place", lambda _: "the same")
    world = worlds()
    first = world.devices[0]
    first.stop()
    first.start()  # it lies where it lay
    commit(first, 1)
    first.stop()
    copy = world.copied(first)
    first.start()
    commit(first, 1)
    commit(copy, 2)
    connect(first)
    first.lose()
    first.stop()
    connect(copy)
    assert not copy.queued(PATH)
    finish(world)
    assert len(world.labels(PATH)) == 6


# -- by chance -----------------------------------------------------------------------------------------------------


def run_schedule(folder: Path, seed: int) -> None:
    """Runs one schedule; a failure says how to run it again."""
    place = folder / f"{seed}"
    place.mkdir()
    chaos = Chaos(place, seed)
    ids = Random(seed)
    with pytest.MonkeyPatch.context() as patch:
        for module in (local_layout, local_store):  # of clients and runs: some things are done in their order
            patch.setattr(module, "new_id", lambda: ids.randbytes(ID_BYTES))
        patch.setattr(local_file.Writing, "__enter__", dying(chaos.world))
        patch.setattr(checkpoint, "HISTORY_VERSIONS_MAX", chaos.history_versions)
        if chaos.are_copies_alike:
            patch.setattr(local_owner, "place", lambda _: "here")
        try:
            chaos.run(STEPS)
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
        finally:
            patch.undo()
            chaos.world.close()
    shutil.rmtree(place)


@pytest.mark.parametrize("known", SEEDS)
def test_nothing_is_lost_or_done_twice_any_more(folder: Path, known: int) -> None:
    """G6: what once went wrong does not."""
    run_schedule(folder, known)


def test_nothing_is_lost_or_done_twice_by_any_schedule(folder: Path, seed: int) -> None:
    """G5, G6: whatever fails in whatever order, in the end all are equal, with all that somebody still held."""
    random = Random(seed)
    for number in range(SCHEDULES):
        run_schedule(folder, seed if not number else random.getrandbits(32))
