"""What the two sides of syncing say to each other's pure session."""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from committers import ANN, Server, policy
from state_helpers import KEY, Author
from store_helpers import make_store, open_both
from sync_helpers import Device, History
from test_sync_host_session import CID, ServerHost

from fuzz.messages import MESSAGES_MAX, OPERATIONS, framed, parsed
from fuzz.target import Decode, Target, kept_folder
from understudy.common import entries
from understudy.common.entries import with_hmacs
from understudy.common.operations import DeleteRange, Put
from understudy.common.records import Record
from understudy.common.types import Durability
from understudy.primary.homecoming import runs_of, take_home
from understudy.primary.sync_session import SyncSession, TailHome
from understudy.v1 import data_pb2, sync_pb2

_KNOWN = 4  # changes that the server has; those behind them come home


def _log(changes: int = _KNOWN) -> list[Record]:
    author = Author()
    made = [author.epoch_start()]
    made += [
        author.change("/realm", [Put(b"key %d" % number, b"v")], client=ANN) for number in range(changes)
    ]
    return made


def _changes() -> list[bytes]:
    """Those that the server knows, and two more."""
    return [entries.parse_entry(record.payload, record.lsn).change for record in _log(_KNOWN + 2)[1:]]


@contextlib.contextmanager
def _sync_server(folder: Path) -> Iterator[Decode]:
    _, store = open_both(make_store(folder))
    log = _log()

    def decode(data: bytes) -> None:
        server = Server(store, policy(Durability.LOCAL), log=list(log))
        session = SyncSession(ServerHost(server))
        try:
            for message in parsed(sync_pb2.SyncRequest, data):
                home = session.receive(message)
                if home is not None:
                    _take(server, session, home)
                server.durable()
                session.poll()
                _hear(session)
        finally:
            session.close()

    with store:
        yield decode


def _take(server: Server, session: SyncSession, home: TailHome) -> None:
    taking = take_home(
        home.path,
        _signed(home.changes),
        state=server.state,
        taker=server.committer,
        history_key=KEY,
        may_renew=home.may_renew,
        on_taken=lambda result: session.on_tail_taken(home.ref, result),
    )
    for _ in taking:
        pass


def _signed(changes: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """As if a server of the cluster had made them: a bad HMAC would end it all too soon."""
    return [(raw, entries.sign(KEY, entries.change_digest(raw))) for raw, _ in changes]


def _hear(session: SyncSession) -> None:
    for _ in range(MESSAGES_MAX):
        if session.next_message() is None:
            return


def _sync_requests() -> list[bytes]:
    changes = _changes()
    position = sync_pb2.RealmPosition(version=4, digest=entries.change_digest(changes[3]))
    older = sync_pb2.RealmPosition(version=2, digest=entries.change_digest(changes[1]))
    bind = sync_pb2.BindRealm(
        ref=1, path="/realm", cluster=ServerHost(cast(Any, None)).cluster, realm_id=2, locator=[position, older],
        epoch=1, lsn=5, clients=[CID], confirmed=1, sent=2, contact_us=1, tail_first=2,
    )  # fmt: skip
    empty = sync_pb2.BindRealm(ref=1, path="/new", clients=[CID, ANN])
    ahead = sync_pb2.BindRealm()
    ahead.CopyFrom(bind)
    ahead.locator.insert(0, sync_pb2.RealmPosition(version=6, digest=entries.change_digest(changes[5])))
    loading = sync_pb2.BindRealm(ref=3, path="/realm", clients=[ANN], incoming=older, frontier=b"key 1")
    upload = sync_pb2.Upload(
        ref=1, client=CID, transactions=[data_pb2.Transaction(number=1, operations=OPERATIONS)]
    )
    tail = sync_pb2.Tail(ref=1, changes=changes[1:], hmacs=bytes(32 * 5), last=True)
    request = sync_pb2.SyncRequest
    return [
        framed([request(bind=bind), request(upload=upload), request(unbind=sync_pb2.UnbindRealm(ref=1))]),
        framed([request(bind=empty), request(upload=upload), request(bind=loading)]),
        framed([request(bind=ahead), request(tail=tail)]),
        framed([request(hello=sync_pb2.SyncHello(protocol_version=1, client=CID))]),
    ]


@contextlib.contextmanager
def _salvage_server(folder: Path) -> Iterator[Decode]:
    _, store = open_both(make_store(folder))
    log = _log()
    with store:
        yield lambda data: _salvage(Server(store, policy(Durability.LOCAL), log=list(log)), data)


def _salvage(server: Server, data: bytes) -> None:
    """Has a server take in changes from an export, signed anew."""
    for request in parsed(sync_pb2.SalvageRequest, data):
        for path, run in runs_of(with_hmacs(request.changes, request.hmacs)):
            taking = take_home(
                path, _signed(run), state=server.state, taker=server.committer, history_key=KEY, may_renew=True,
                on_taken=lambda result: None,
            )  # fmt: skip
            for _ in taking:
                pass


def _salvage_requests() -> list[bytes]:
    changes = _changes()
    return [framed([sync_pb2.SalvageRequest(protocol_version=1, changes=changes, hmacs=bytes(32 * 6))])]


# -- the client's side ----------------------------------------------------------------------------------------------


@functools.cache
def _device() -> Path:
    """A directory with a copy and a queue, which may be copied without its noticing."""
    from fuzz.store_targets import forget_place

    folder = kept_folder() / "device"
    device = Device(folder)
    history = _history()
    device.stream(history)
    device.put(b"mine", b"1")
    device.put(b"mine", b"2")
    device.close()
    forget_place(folder)
    return folder


def _history() -> History:
    history = History()
    for number in range(4):
        history.write(Put(b"key %d" % number, b"v"))
    return history


@contextlib.contextmanager
def _sync_client(folder: Path) -> Iterator[Decode]:
    here = folder / "device"

    def decode(data: bytes) -> None:
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(_device(), here)
        device = Device(here)
        try:
            device.bind()
            for message in parsed(sync_pb2.SyncResponse, data):
                device.receive(message)
                device.session.local_change("/realm")
                device.session.written(100)
                device.session.tick(now_s=1e9)
        finally:
            device.session.lost()
            device.connect()
            device.put(b"mine", b"3")
            device.close()

    yield decode


def _sync_responses() -> list[bytes]:
    history = _history()
    bind = sync_pb2.BindRealm(ref=1, path="/realm", clients=[bytes(16)])
    streams = history.bound(bind)
    history.write(Put(b"key 5", b"v"), DeleteRange(b"key 0", b"key 2"))
    more = history.changes(1, 5)
    load = history.bound(bind, sync_pb2.SYNC_LOAD)
    pages = [
        history.page(bind, [(b"a", b"1"), (b"b", b"2")], 5),
        history.page(bind, [(b"c", b"3")], 5, last=True),
    ]
    heal = history.bound(bind, sync_pb2.SYNC_HEAL, tail_from=3)
    reset = history.bound(bind, sync_pb2.SYNC_RESET, tail_from=3, reason=sync_pb2.SERVER_BEHIND)
    response = sync_pb2.SyncResponse
    safe = response(safe=sync_pb2.Safe(ref=1, safe_version=4))
    refusal = data_pb2.Refusal(number=1, code="BadOperation", message="no")
    refusals = response(refusals=sync_pb2.Refusals(ref=1, client=bytes(16), refusals=[refusal]))
    taken = response(tail_taken=sync_pb2.TailTaken(ref=1, homecoming=sync_pb2.Homecoming(appended=1)))
    failed = response(failed=sync_pb2.RealmFailed(ref=1, code="Overloaded", message="later"))
    return [
        framed([streams, more, safe, refusals]),
        framed([load, *pages, more, safe]),
        framed([heal, taken, streams]),
        framed([reset, taken]),
        framed([streams, failed]),
    ]


def targets() -> Sequence[Target]:
    """What a server reads, and what a client does."""
    return (
        Target(name="sync request", opened=_sync_server, samples=_sync_requests, is_slow=True),
        Target(name="salvage request", opened=_salvage_server, samples=_salvage_requests, is_slow=True),
        Target(name="sync response", opened=_sync_client, samples=_sync_responses, is_slow=True),
    )
