"""A client's side of a sync stream: what it says of its copies, what it does with what comes, what it sends when."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from sync_helpers import (
    HMAC,
    Device,
    History,
    bind_of,
    numbers_of,
    refused,
    requests,
    tails_of,
    uploads_of,
)

from understudy.client import realm_binding, sync_messages, uploading
from understudy.client.local_file import Writing
from understudy.client.local_load import is_complete
from understudy.client.sync_port import (
    Action,
    CaughtUp,
    HeadKnown,
    Loaded,
    NewId,
    RealmChanged,
    RealmError,
    ResetRequired,
    Send,
    Uploaded,
)
from understudy.common.errors import NotPermitted, Overloaded, ProtocolError, UsageError
from understudy.common.operations import Add, DeleteRange, Put
from understudy.v1 import local_pb2, sync_pb2


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    opened = Device(tmp_path / "device")
    yield opened
    opened.close()


@pytest.fixture
def history() -> History:
    """Three changes of somebody else."""
    made = History()
    for number in range(3):
        made.write(Put(b"theirs%d" % number, b"value"))
    return made


THEIRS = {b"theirs%d" % number: b"value" for number in range(3)}


def _kinds(actions: list[Action]) -> list[str]:
    return [type(action).__name__ for action in actions]


# -- following -------------------------------------------------------------------------------------------------


def test_a_copy_is_described_by_its_position_and_goes_on_from_there(device: Device, history: History) -> None:
    """G3: the bind names cluster, realm, version and digest, and changes follow from exactly there."""
    first = device.stream(history)
    assert not first.locator
    assert not first.cluster
    device.session.lost()
    history.write(Put(b"theirs0", b"new"))
    bind = bind_of(device.connect())
    assert bind.locator[0] == history.position(3)
    assert len(bind.cluster) == 16
    assert (bind.lsn, bind.epoch) == (3, 1)
    device.receive(history.bound(bind))
    actions = device.receive(history.changes(bind.ref, 4))
    assert _kinds(actions) == ["RealmChanged", "CaughtUp"]
    assert device.pairs() == THEIRS | {b"theirs0": b"new"}


def test_changes_are_applied_in_the_batches_in_which_they_come(device: Device, history: History) -> None:
    """Each message is one notice, and only the last one brings the copy up to the server."""
    bind = device.bind()
    device.receive(history.bound(bind))
    assert _kinds(device.receive(history.changes(bind.ref, 1, 2))) == ["RealmChanged"]
    (changed, caught_up) = device.receive(history.changes(bind.ref, 3, 3))
    assert isinstance(changed, RealmChanged)
    assert [one.version for one in changed.applied] == [3]
    assert isinstance(caught_up, CaughtUp)
    assert device.session.is_up_to_date("/realm")
    assert device.session.server_version("/realm") == 3


def test_several_realms_share_one_stream(device: Device, history: History) -> None:
    """Each binding has a ref of its own, and a realm's trouble is no other's."""
    other = History("/other")
    other.write(Put(b"key", b"value"))
    device.session.opened("/realm")
    device.session.opened("/other")
    first, second = (request.bind for request in requests(device.connect(), "bind"))
    reset = history.bound(first, sync_pb2.SYNC_RESET, reason=sync_pb2.OTHER_HISTORY)
    assert _kinds(device.receive(reset)) == ["ResetRequired"]
    device.receive(other.bound(second))
    device.receive(other.changes(second.ref, 1))
    assert device.pairs("/other") == {b"key": b"value"}
    assert not device.pairs()


def test_what_is_closed_is_unbound_and_what_still_comes_for_it_is_passed_over(
    device: Device, history: History
) -> None:
    """Messages that were on their way when a realm was closed change nothing."""
    bind = device.bind()
    (unbind,) = requests(device.session.closed("/realm"), "unbind")
    assert unbind.unbind.ref == bind.ref
    assert not device.receive(history.bound(bind))
    assert not device.receive(history.changes(bind.ref, 1))
    assert not device.pairs()


def test_a_lost_connection_loses_nothing_but_the_connection(device: Device, history: History) -> None:
    """G6: what was sent and not confirmed is sent again on the next stream, under the same numbers."""
    bind = device.stream(history)
    sent = [device.put(b"a"), device.put(b"b")]
    uploads = uploads_of(device.session.local_change("/realm"))
    assert numbers_of(uploads) == sent
    device.session.lost()
    assert not device.session.is_up_to_date("/realm")
    assert not device.session.local_change("/realm")
    bind = bind_of(device.connect())
    assert bind.ref == 1
    assert bind.sent == sent[-1]
    again = uploads_of(device.receive(history.bound(bind)))
    assert numbers_of(again) == sent
    assert again[0].client == uploads[0].client


def test_what_was_applied_before_the_connection_was_lost_is_not_sent_again(
    device: Device, history: History
) -> None:
    """G6: numbers that the server has are left to come back; only what is behind them is sent."""
    device.stream(history)
    sent = [device.put(b"a"), device.put(b"b")]
    (upload,) = uploads_of(device.session.local_change("/realm"))
    del upload.transactions[1:]
    history.take_upload(upload)  # the first was applied, and nobody heard of it
    device.session.lost()
    bind = bind_of(device.connect())
    assert not uploads_of(device.receive(history.bound(bind)))
    assert numbers_of(uploads_of(device.receive(history.changes(bind.ref, 4)))) == sent[1:]


# -- loading ---------------------------------------------------------------------------------------------------


def test_a_state_is_loaded_in_pages_and_takes_the_copys_place(device: Device, history: History) -> None:
    """Reads see the old copy until the last page has come; then changes follow."""
    bind = device.bind()
    device.receive(history.bound(bind, sync_pb2.SYNC_LOAD))
    device.receive(history.page(bind, [(b"theirs0", b"value")], 3))
    assert not device.pairs()
    actions = device.receive(
        history.page(bind, [(b"theirs1", b"value"), (b"theirs2", b"value")], 3, last=True)
    )
    assert _kinds(actions) == ["Progress", "Loaded", "CaughtUp"]
    history.write(Put(b"more", b""))
    device.receive(history.changes(bind.ref, 4))
    assert device.pairs() == THEIRS | {b"more": b""}


def test_changes_between_pages_count_for_what_has_come_and_not_for_what_will(
    device: Device, history: History
) -> None:
    """A change that reaches beyond the frontier is in the next page already, and is not applied twice."""
    history.write(Put(b"a", b"1"), Put(b"z", b"1"))
    bind = device.bind()
    device.receive(history.bound(bind, sync_pb2.SYNC_LOAD))
    device.receive(history.page(bind, [(b"a", b"1")], 4))
    history.write(Add(b"a", 1), Add(b"z", 1), DeleteRange(b"theirs0", b"theirs2"))
    device.receive(history.changes(bind.ref, 5))
    device.receive(history.page(bind, [(b"theirs2", b"value"), (b"z", b"2")], 5, last=True))
    assert device.pairs() == {b"a": b"2", b"theirs2": b"value", b"z": b"2"}


def test_a_load_that_was_cut_off_goes_on_where_it_was(device: Device, history: History) -> None:
    """The next bind names position and last key of what has come; the server's pages go on behind it."""
    bind = device.bind()
    device.receive(history.bound(bind, sync_pb2.SYNC_LOAD))
    device.receive(history.page(bind, [(b"theirs0", b"value")], 3))
    device.session.lost()
    bind = bind_of(device.connect())
    assert bind.incoming == history.position(3)
    assert bind.frontier == b"theirs0"
    device.receive(history.bound(bind, sync_pb2.SYNC_LOAD, resumed=True))
    device.receive(history.page(bind, [(b"theirs1", b"value"), (b"theirs2", b"value")], 3, last=True))
    assert device.pairs() == THEIRS


def test_a_load_that_the_server_begins_anew_begins_anew(device: Device, history: History) -> None:
    """What had come before is not mixed with what comes now."""
    bind = device.bind()
    device.receive(history.bound(bind, sync_pb2.SYNC_LOAD))
    device.receive(history.page(bind, [(b"gone", b"")], 2))
    device.session.lost()
    bind = bind_of(device.connect())
    device.receive(history.bound(bind, sync_pb2.SYNC_LOAD))
    device.receive(history.page(bind, sorted(THEIRS.items()), 3, last=True))
    assert device.pairs() == THEIRS


def test_a_client_that_falls_behind_is_loaded_anew_on_the_same_binding(
    device: Device, history: History
) -> None:
    """An answer of LOAD in the middle of the changes is as good as one to a bind; the queue stays on top."""
    bind = device.stream(history)
    device.put(b"mine")
    device.receive(history.bound(bind, sync_pb2.SYNC_LOAD))
    actions = device.receive(history.page(bind, [(b"only", b"")], 3, last=True))
    assert device.pairs() == {b"only": b"", b"mine": b""}
    assert len(uploads_of(actions)) == 1


def test_own_changes_that_are_in_a_loaded_state_leave_the_queue(device: Device, history: History) -> None:
    """G6: a state says up to which number it holds our changes; those are not sent again."""
    device.stream(history)
    device.put(b"mine", b"1")
    (upload,) = uploads_of(device.session.local_change("/realm"))
    history.take_upload(upload)
    device.session.lost()
    bind = bind_of(device.connect())
    device.receive(history.bound(bind, sync_pb2.SYNC_LOAD))
    actions = device.receive(history.page(bind, [(b"mine", b"1")], 4, last=True))
    assert any(isinstance(action, Uploaded) for action in actions)
    assert not uploads_of(actions)
    assert device.pairs() == {b"mine": b"1"}


# -- uploading -------------------------------------------------------------------------------------------------


def test_nothing_is_uploaded_before_the_copy_is_where_the_server_was(
    device: Device, history: History
) -> None:
    """Uploads begin once every own change that the server had can have come back; and are noted as sent first."""
    number = device.put(b"mine")
    bind = device.bind()
    assert not uploads_of(device.receive(history.bound(bind)))
    assert not uploads_of(device.receive(history.changes(bind.ref, 1, 2)))
    actions = device.receive(history.changes(bind.ref, 3))
    assert numbers_of(uploads_of(actions)) == [number]
    assert device.realm().row.sent == number


def test_while_all_that_is_queued_was_sent_what_is_committed_is_noted_as_sent(
    device: Device, history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as it goes out at once: not before the copy has come up, nor beyond the window, nor without a server."""
    monkeypatch.setattr(uploading, "WINDOW_CHANGES", 2)
    realm = device.realm()
    bind = device.bind()
    device.receive(history.bound(bind))
    assert not realm.is_sending
    device.receive(history.changes(bind.ref, 1))
    assert realm.is_sending
    for key, is_room_left in ((b"one", True), (b"two", False)):
        device.put(key)
        (upload,) = uploads_of(device.session.local_change("/realm"))
        assert realm.is_sending is is_room_left
        history.take_upload(upload)
    device.receive(history.changes(bind.ref, 4))
    assert realm.is_sending
    number = device.put(b"three")
    device.session.local_change("/realm")
    device.receive(refused(bind.ref, device.store.client, number, Overloaded.__name__))
    assert not realm.is_sending
    device.session.tick(now_s=100.0)
    assert realm.is_sending
    device.session.lost()
    assert not realm.is_sending


def test_what_the_window_has_room_for_is_noted_as_sent_at_one_time(
    device: Device, history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many messages it takes: each note is a transaction that is waited for."""
    monkeypatch.setattr(uploading, "MESSAGE_CHANGES_MAX", 2)
    numbers = [device.put(b"%d" % number) for number in range(7)]
    bind = device.bind()
    device.receive(history.bound(bind))
    before = _writes(monkeypatch)
    uploads = uploads_of(device.receive(history.changes(bind.ref, 1)))
    assert [len(upload.transactions) for upload in uploads] == [2, 2, 2, 1]
    assert device.realm().row.sent == numbers[-1]
    assert len(before) == 2  # with the changes that were applied


def _writes(monkeypatch: pytest.MonkeyPatch) -> list[Writing]:
    """Local transactions from now on."""
    writes: list[Writing] = []
    enter = Writing.__enter__

    def entered(writing: Writing) -> Writing:
        writes.append(writing)
        return enter(writing)

    monkeypatch.setattr(Writing, "__enter__", entered)
    return writes


def test_a_realm_of_one_page_is_loaded_in_few_transactions(
    device: Device, history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory may have thousands of them."""
    bind = device.bind()
    writes = _writes(monkeypatch)
    device.receive(history.bound(bind, sync_pb2.SYNC_LOAD))
    device.receive(history.page(bind, [(b"key", b"")], 3, last=True))
    assert not device.store.sweep()
    assert device.pairs() == {b"key": b""}
    assert len(writes) == 2


def test_own_changes_leave_the_queue_when_they_come_back(device: Device, history: History) -> None:
    """Whatever the server's order, reads see every change exactly once, before and after."""
    bind = device.stream(history)
    device.put(b"mine", b"1")
    (upload,) = uploads_of(device.session.local_change("/realm"))
    history.write(Put(b"other", b""))
    history.take_upload(upload)
    seen = device.pairs() | {b"other": b""}
    (changed, uploaded, *_) = device.receive(history.changes(bind.ref, 4))
    assert isinstance(changed, RealmChanged)
    assert [one.own for one in changed.applied] == [False, True]
    assert isinstance(uploaded, Uploaded)
    assert device.pairs() == seen
    assert device.realm().row.queue_count == 0


def test_no_more_is_on_its_way_than_the_window_allows(
    device: Device, history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G9: what is confirmed makes room for as much again, in order."""
    monkeypatch.setattr(uploading, "WINDOW_CHANGES", 10)
    monkeypatch.setattr(uploading, "MESSAGE_CHANGES_MAX", 4)
    bind = device.stream(history)
    numbers = [device.put(b"%d" % number) for number in range(25)]
    uploads = uploads_of(device.session.local_change("/realm"))
    assert [len(upload.transactions) for upload in uploads] == [4, 4, 2]
    sent = numbers_of(uploads)
    while sent != numbers:
        assert not device.session.local_change("/realm")
        first = history.version + 1
        for upload in uploads:
            history.take_upload(upload)
        uploads = uploads_of(device.receive(history.changes(bind.ref, first)))
        sent += numbers_of(uploads)
        assert sent == numbers[: len(sent)]


def test_the_window_is_one_of_bytes_too(
    device: Device, history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G9: large changes fill it sooner; a change larger than the window goes alone."""
    monkeypatch.setattr(uploading, "WINDOW_BYTES", 10_000)
    bind = device.stream(history)
    sizes = [4_000, 4_000, 4_000, 20_000, 10]
    numbers = [device.put(b"%d" % size, bytes(size)) for size in sizes]
    uploads = uploads_of(device.session.local_change("/realm"))
    rounds = []
    while uploads:
        rounds.append(numbers_of(uploads))
        first = history.version + 1
        for upload in uploads:
            history.take_upload(upload)
        uploads = uploads_of(device.receive(history.changes(bind.ref, first)))
    assert [number for one in rounds for number in one] == numbers
    assert rounds[0] == numbers[:3]
    assert rounds[-1] == numbers[4:]


def test_what_is_handed_out_and_not_written_is_bounded_over_all_realms(
    device: Device, history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G9: uploads wait until the connection has taken what came before them."""
    monkeypatch.setattr(sync_messages, "UNWRITTEN_BYTES_MAX", 10_000)
    monkeypatch.setattr(uploading, "MESSAGE_BYTES_TARGET", 4_000)
    device.stream(history)
    numbers = [device.put(b"%d" % number, bytes(1_000)) for number in range(30)]
    waiting = [action for action in device.session.local_change("/realm") if isinstance(action, Send)]
    sent = numbers_of(uploads_of(waiting))
    assert len(sent) < 15
    while waiting:
        actions = device.session.written(waiting.pop(0).size)
        waiting += [action for action in actions if isinstance(action, Send)]
        assert sum(send.size for send in waiting) < 15_000
        sent += numbers_of(uploads_of(actions))
    assert sent == numbers


def test_what_was_refused_for_now_is_sent_again_in_order(device: Device, history: History) -> None:
    """G6: from the first one refused on; late refusals of those behind it change nothing."""
    bind = device.stream(history)
    numbers = [device.put(b"%d" % number) for number in range(3)]
    (upload,) = uploads_of(device.session.local_change("/realm"))
    assert not device.receive(refused(bind.ref, upload.client, numbers[1], Overloaded.__name__))
    assert not device.receive(refused(bind.ref, upload.client, numbers[2], Overloaded.__name__))
    assert not device.session.local_change("/realm")
    retry_s = device.session.next_tick_s
    assert retry_s is not None
    again = uploads_of(device.session.tick(now_s=retry_s))
    assert numbers_of(again) == numbers[1:]


def test_what_is_refused_for_good_stops_the_uploads_and_stays(device: Device, history: History) -> None:
    """Nothing is dropped, and changes still come."""
    bind = device.stream(history)
    number = device.put(b"mine")
    (upload,) = uploads_of(device.session.local_change("/realm"))
    (told,) = device.receive(refused(bind.ref, upload.client, number, UsageError.__name__))
    assert isinstance(told, RealmError)
    assert isinstance(told.error, UsageError)
    device.put(b"another")
    assert not device.session.local_change("/realm")
    history.write(Put(b"theirs", b""))
    device.receive(history.changes(bind.ref, 4))
    assert device.pairs().keys() == {*THEIRS, b"mine", b"another", b"theirs"}


def test_what_was_applied_under_another_name_leaves_the_queue(device: Device, history: History) -> None:
    """G6: what came home from somebody else, or was applied long ago, is not sent again, and others are."""
    bind = device.stream(history)
    number = device.put(b"mine")
    (upload,) = uploads_of(device.session.local_change("/realm"))
    assert device.receive(refused(bind.ref, upload.client, number, "ReceiptExpired")) == [
        Uploaded(path="/realm")
    ]
    assert device.realm().row.queue_count == 0
    later = device.put(b"another")
    (upload,) = uploads_of(device.session.local_change("/realm"))
    assert [one.number for one in upload.transactions] == [later]


def test_where_nothing_may_be_written_changes_stay_in_the_queue(device: Device, history: History) -> None:
    """Whoever may only read is told so once, and the server is not bothered."""
    device.put(b"mine")
    bind = device.bind()
    device.receive(history.bound(bind, may_write=False))
    actions = device.receive(history.changes(bind.ref, 1))
    (error,) = [action.error for action in actions if isinstance(action, RealmError)]
    assert isinstance(error, NotPermitted)
    assert not uploads_of(actions)
    assert not device.session.local_change("/realm")


# -- who we are ------------------------------------------------------------------------------------------------


def test_a_change_that_somebody_else_made_under_our_id_gives_us_another(
    device: Device, history: History
) -> None:
    """G6: a copied directory takes a new id, for what is queued, too, and binds anew with it."""
    bind = device.stream(history)
    number = device.put(b"mine")
    old = device.store.client
    history.write(Put(b"not mine", b""), client=old, number=number)
    actions = device.receive(history.changes(bind.ref, 4))
    assert isinstance(actions[0], NewId)
    assert actions[0].client == device.store.client != old
    assert len(requests(actions, "unbind")) == 1
    again = bind_of(actions)
    assert list(again.clients) == [device.store.client]
    (upload,) = uploads_of(device.receive(history.bound(again)))
    assert upload.client == device.store.client
    assert device.pairs() == THEIRS | {b"mine": b"", b"not mine": b""}


def test_a_server_that_knows_more_of_our_changes_than_we_do_gives_us_another_id(
    device: Device, history: History
) -> None:
    """G6: a directory that was restored from an old copy never uses a number again."""
    history.write(Put(b"later", b""), client=device.store.client, number=5)
    old = device.store.client
    actions = device.receive(history.bound(device.bind(), sync_pb2.SYNC_LOAD))
    assert isinstance(actions[0], NewId)
    assert bind_of(actions).clients[0] != old


def test_an_id_in_use_elsewhere_is_used_no_longer_and_what_is_queued_keeps_it(
    device: Device, history: History
) -> None:
    """G6: whoever shares the id may hold the same queue, and each change in it must be applied once."""
    device.put(b"mine")
    old = device.store.client
    device.session.opened("/realm")
    (new_id, *rest) = device.connect(new_id=True)
    assert isinstance(new_id, NewId)
    bind = bind_of(rest)
    assert list(bind.clients) == [device.store.client, old]
    device.receive(history.bound(bind))
    device.put(b"newer")
    uploads = uploads_of(device.receive(history.changes(bind.ref, 1)))
    assert [upload.client for upload in uploads] == [old, device.store.client]


def test_changes_of_an_id_that_the_server_was_not_told_of_are_sent_on_a_new_binding(
    device: Device, history: History
) -> None:
    """A new id that one realm takes is told for the others before they use it."""
    bind = device.stream(history)
    device.store.new_client()
    device.put(b"mine")
    actions = device.session.local_change("/realm")
    again = bind_of(actions)
    assert not uploads_of(actions)
    assert again.ref > bind.ref
    (upload,) = uploads_of(device.receive(history.bound(again)))
    assert upload.client == device.store.client == again.clients[0]


# -- healing and reset -----------------------------------------------------------------------------------------


def test_a_server_that_knows_less_is_sent_the_tail_and_then_streams(
    device: Device, history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The raw changes from the version asked for on, in pieces, the last marked; then another answer counts."""
    monkeypatch.setattr(uploading, "TAIL_PIECE_BYTES", 1)
    device.stream(history)
    device.session.lost()
    bind = bind_of(device.connect())
    assert bind.tail_first == 1
    behind = History()
    behind.raws = history.raws[:1]
    tails = tails_of(device.receive(behind.bound(bind, sync_pb2.SYNC_HEAL, tail_from=2)))
    assert [raw for tail in tails for raw in tail.changes] == history.raws[1:]
    assert b"".join(tail.hmacs for tail in tails) == HMAC * 2
    assert [tail.last for tail in tails] == [False, True]
    taken = sync_pb2.TailTaken(ref=bind.ref, homecoming=sync_pb2.Homecoming(appended=2))
    assert not device.receive(sync_pb2.SyncResponse(tail_taken=taken))
    assert "CaughtUp" in _kinds(device.receive(history.bound(bind)))


def test_a_copy_that_must_be_given_up_stops_once_the_server_has_its_tail(
    device: Device, history: History
) -> None:
    """What came of the tail is told with the reset; until then nothing is."""
    device.stream(history)
    device.session.lost()
    bind = bind_of(device.connect())
    other = History()
    other.write(Put(b"fork", b""))
    reset = other.bound(bind, sync_pb2.SYNC_RESET, reason=sync_pb2.OTHER_HISTORY, tail_from=1)
    actions = device.receive(reset)
    assert len(tails_of(actions)) == 1
    assert "ResetRequired" not in _kinds(actions)
    taken = sync_pb2.TailTaken(ref=bind.ref, homecoming=sync_pb2.Homecoming(renewed=3))
    (required,) = device.receive(sync_pb2.SyncResponse(tail_taken=taken))
    assert isinstance(required, ResetRequired)
    assert required.bound.reason == sync_pb2.OTHER_HISTORY
    assert required.tail_taken is not None
    assert required.tail_taken.renewed == 3
    assert device.pairs() == THEIRS


def test_a_realm_that_is_dropped_while_it_is_followed_must_be_given_up(
    device: Device, history: History
) -> None:
    """The answer to a bind may change at any time."""
    bind = device.stream(history)
    actions = device.receive(history.bound(bind, sync_pb2.SYNC_RESET, reason=sync_pb2.REALM_GONE))
    assert _kinds(actions) == ["ResetRequired"]
    device.put(b"mine")
    assert not device.session.local_change("/realm")


def test_for_a_reset_the_state_is_loaded_beside_the_copy_and_waits(device: Device, history: History) -> None:
    """The bind shows nothing, since nothing counts any more; the copy stays until the reset has put it away."""
    bind = device.stream(history)
    device.put(b"mine")
    record = local_pb2.ResetRecord(reason=sync_pb2.OTHER_HISTORY, attempted="recover")
    device.realm().set_reset(record)
    device.receive(history.bound(bind, sync_pb2.SYNC_RESET, reason=sync_pb2.OTHER_HISTORY))
    bind = bind_of(device.session.load_fresh("/realm"))
    assert not (bind.locator)
    assert not (bind.cluster)
    assert not (bind.sent)
    assert not (bind.confirmed)
    assert not (bind.tail_first)
    device.receive(history.bound(bind, sync_pb2.SYNC_LOAD))
    actions = device.receive(history.page(bind, [(b"fresh", b"")], 3, last=True))
    (loaded,) = [action for action in actions if isinstance(action, Loaded)]
    assert loaded.fresh
    assert not uploads_of(actions)
    assert device.pairs() == THEIRS | {b"mine": b""}
    with device.realm().incoming_view() as fresh:
        assert dict(fresh.scan()) == {b"fresh": b""}


def test_for_a_reset_the_state_of_a_realm_that_is_gone_is_empty(device: Device, history: History) -> None:
    """A realm that does not exist has nothing to load, and that is whole at once."""
    device.stream(history)
    device.session.lost()
    nothing = History()
    bind = bind_of(device.connect())
    device.receive(nothing.bound(bind, sync_pb2.SYNC_RESET, reason=sync_pb2.REALM_GONE))
    actions = device.receive(nothing.bound(bind_of(device.session.load_fresh("/realm"))))
    assert [action.fresh for action in actions if isinstance(action, Loaded)] == [True]
    assert is_complete(device.realm().row.incoming)


def test_a_reset_that_nobody_began_is_forgotten_when_the_server_takes_the_copy_again(
    device: Device, history: History
) -> None:
    """An operator may have put things right."""
    device.realm().set_reset(local_pb2.ResetRecord(reason=sync_pb2.SERVER_BEHIND))
    device.stream(history)
    assert not device.realm().row.HasField("reset")


# -- what is asked ---------------------------------------------------------------------------------------------


def test_the_servers_head_as_of_now_is_what_it_answers_a_bind_that_was_asked_for(
    device: Device, history: History
) -> None:
    """A head that was told before the question does not answer it."""
    first = device.bind()
    ticket, actions = device.session.refresh("/realm")
    assert not actions  # an answer is on its way, and may be too old
    answered = device.receive(history.bound(first))
    (early,) = [action for action in answered if isinstance(action, HeadKnown)]
    assert early.ticket < ticket
    history.write(Put(b"new", b""))
    second = bind_of(answered)
    (known, *_) = device.receive(history.bound(second))
    assert isinstance(known, HeadKnown)
    assert (known.ticket, known.version) == (ticket, 4)


def test_a_realm_that_the_server_can_not_give_for_now_is_asked_for_again_later(
    device: Device, history: History
) -> None:
    """Longer and longer pauses lie between the tries."""
    bind = device.bind()
    pauses = []
    for _ in range(3):
        failed = sync_pb2.RealmFailed(ref=bind.ref, code=Overloaded.__name__, message="full")
        (told,) = device.receive(sync_pb2.SyncResponse(failed=failed))
        assert isinstance(told, RealmError)
        assert isinstance(told.error, Overloaded)
        retry_s = device.session.next_tick_s
        assert retry_s is not None
        assert not device.session.tick(now_s=retry_s - 0.01)
        pauses.append(retry_s - device.now_s)
        device.now_s = retry_s
        bind = bind_of(device.session.tick(now_s=retry_s))
    device.session.lost()
    assert device.session.next_tick_s is None
    assert pauses == [realm_binding.REBIND_S[0] * 2**number for number in range(3)]


def test_a_realm_that_is_refused_is_not_asked_for_again_on_that_connection(device: Device) -> None:
    """The next connection may be somebody else's, or to a server that knows more."""
    bind = device.bind()
    failed = sync_pb2.RealmFailed(ref=bind.ref, code=NotPermitted.__name__, message="not yours")
    (told,) = device.receive(sync_pb2.SyncResponse(failed=failed))
    assert isinstance(told, RealmError)
    assert isinstance(told.error, NotPermitted)
    assert device.session.next_tick_s is None
    device.session.lost()
    assert bind_of(device.connect())


# -- what a server must not say --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Case:
    """What a server says to a device that streams, or loads, or has only bound, or has nothing yet of what follows."""

    phase: str
    says: Callable[[History, sync_pb2.BindRealm], sync_pb2.SyncResponse]


def _altered(response: sync_pb2.SyncResponse, **fields: object) -> sync_pb2.SyncResponse:
    message = getattr(response, str(response.WhichOneof("message")))
    for name, value in fields.items():
        setattr(message, name, value)
    return response


def _forked(history: History, bind: sync_pb2.BindRealm) -> sync_pb2.SyncResponse:
    other = History()
    for _ in range(4):
        other.write(Put(b"other", b""))
    return other.changes(bind.ref, 4)


_CASES = {
    "a binding that never was": _Case(
        "streams", lambda history, bind: _altered(history.changes(bind.ref, 1), ref=bind.ref + 1)
    ),
    "nothing": _Case("streams", lambda history, bind: sync_pb2.SyncResponse()),
    "another welcome": _Case(
        "streams", lambda history, bind: sync_pb2.SyncResponse(welcome=sync_pb2.SyncWelcome())
    ),
    "an unknown decision": _Case(
        "binds", lambda history, bind: history.bound(bind, sync_pb2.SyncDecision.ValueType(0))
    ),
    "fewer numbers than clients": _Case(
        "binds",
        lambda history, bind: history.bound(sync_pb2.BindRealm(ref=bind.ref), sync_pb2.SYNC_STREAM),
    ),
    "changes before an answer": _Case("binds", lambda history, bind: history.changes(bind.ref, 1)),
    "a second answer": _Case("streams", lambda history, bind: history.bound(bind)),
    "a stream from beyond its head": _Case("binds again", lambda history, bind: History().bound(bind)),
    "a tail that is not kept": _Case(
        "binds", lambda history, bind: history.bound(bind, sync_pb2.SYNC_HEAL, tail_from=1)
    ),
    "a load that was never begun": _Case(
        "binds", lambda history, bind: history.bound(bind, sync_pb2.SYNC_LOAD, resumed=True)
    ),
    "fewer HMACs than changes": _Case(
        "follows", lambda history, bind: _altered(history.changes(bind.ref, 1), hmacs=HMAC)
    ),
    "changes that do not follow": _Case("streams", _forked),
    "changes again": _Case("streams", lambda history, bind: history.changes(bind.ref, 3)),
    "a page that nobody asked for": _Case(
        "streams", lambda history, bind: history.page(bind, [(b"key", b"")], 3)
    ),
    "keys out of order": _Case(
        "loads", lambda history, bind: history.page(bind, [(b"n", b""), (b"n", b"")], 3)
    ),
    "keys again": _Case("loads", lambda history, bind: history.page(bind, [(b"m", b"")], 3)),
    "a page of another version": _Case("loads", lambda history, bind: history.page(bind, [(b"n", b"")], 2)),
    "fewer values than keys": _Case(
        "loads",
        lambda history, bind: sync_pb2.SyncResponse(
            page=sync_pb2.StatePage(ref=bind.ref, position=history.position(3), keys=[b"n"])
        ),
    ),
    "word of a tail that was not sent": _Case(
        "streams", lambda history, bind: sync_pb2.SyncResponse(tail_taken=sync_pb2.TailTaken(ref=bind.ref))
    ),
}


@pytest.mark.parametrize("name", _CASES)
def test_what_a_server_must_not_say_changes_nothing(device: Device, history: History, name: str) -> None:
    """G3: whatever does not follow ends the connection, and copy and queue are as they were."""
    case = _CASES[name]
    bind = device.bind() if case.phase in ("binds", "loads", "follows") else device.stream(history)
    device.put(b"mine")
    if case.phase == "loads":
        device.receive(history.bound(bind, sync_pb2.SYNC_LOAD))
        device.receive(history.page(bind, [(b"m", b"")], 3))
    elif case.phase == "follows":
        device.receive(history.bound(bind))
    elif case.phase == "binds again":
        device.session.lost()
        bind = bind_of(device.connect())
    before = device.pairs(), device.realm().row.copy, device.realm().row.incoming
    with pytest.raises(ProtocolError):
        device.receive(case.says(history, bind))
    device.session.lost()
    assert (device.pairs(), device.realm().row.copy, device.realm().row.incoming) == before
    assert device.realm().row.queue_count == 1
    assert bind_of(device.connect())
