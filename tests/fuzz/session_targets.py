"""What peers say: to the pure sessions on both sides, and in raw bytes to every call of a primary that serves."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import grpc
from committers import ANN, Server, policy
from faulty_files import FaultyFiles
from google.protobuf.message import DecodeError
from log_helpers import CLUSTER as LOG_CLUSTER
from log_helpers import new_log, write
from state_helpers import KEY, Author
from store_helpers import make_store, open_both
from sync_helpers import CLUSTER, Device, History
from test_sync_host_session import CID, ServerHost

from fuzz.target import Decode, Target, kept_folder, pure
from understudy.common import entries
from understudy.common.access import REQUIRES
from understudy.common.entries import with_hmacs
from understudy.common.follow_table import PROTOCOL_VERSION
from understudy.common.locator import EpochSpan, fork_position, last_common, lookup_in, relate, span_of
from understudy.common.locator import History as LogHistory
from understudy.common.operations import Add, Delete, DeleteRange, Put, Update, to_protos
from understudy.common.records import Record
from understudy.common.rpc import CODE_METADATA, short_socket_path
from understudy.common.types import START, Digest, Durability, Epoch, Lsn, Position
from understudy.primary import Primary, replication_service
from understudy.primary.homecoming import runs_of, take_home
from understudy.primary.sync_session import SyncSession, TailHome
from understudy.replica import bootstrap
from understudy.replica.asking import ask
from understudy.replica.follow_session import on_answer
from understudy.v1 import accounts_pb2, admin_pb2, data_pb2, replication_pb2, sync_pb2

_MESSAGES_MAX = 20
_OPERATIONS = to_protos(
    (Put(b"key", b"value"), Update(b"key", b""), Delete(b"k"), DeleteRange(b"a", b""), Add(b"n", 5))
)


def _framed(messages: Iterable[Any]) -> bytes:
    """Messages behind each other, each behind its length in two bytes."""
    raw = [message.SerializeToString() for message in messages]
    return b"".join(len(one).to_bytes(2, "little") + one for one in raw)


def _frames(data: bytes) -> Iterator[bytes]:
    at = 0
    for _ in range(_MESSAGES_MAX):
        if at >= len(data):
            return
        length = int.from_bytes(data[at : at + 2], "little")
        yield data[at + 2 : at + 2 + length]
        at += 2 + length


def _parsed(kind: Any, data: bytes) -> Iterator[Any]:
    """Messages as gRPC hands them out, which ends a call where one is none."""
    with contextlib.suppress(DecodeError):
        for frame in _frames(data):
            yield kind.FromString(frame)


# -- a client syncs: the server's side ---------------------------------------------------------------------------


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
            for message in _parsed(sync_pb2.SyncRequest, data):
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
    for _ in range(_MESSAGES_MAX):
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
        ref=1, client=CID, transactions=[data_pb2.Transaction(number=1, operations=_OPERATIONS)]
    )
    tail = sync_pb2.Tail(ref=1, changes=changes[1:], hmacs=bytes(32 * 5), last=True)
    request = sync_pb2.SyncRequest
    return [
        _framed([request(bind=bind), request(upload=upload), request(unbind=sync_pb2.UnbindRealm(ref=1))]),
        _framed([request(bind=empty), request(upload=upload), request(bind=loading)]),
        _framed([request(bind=ahead), request(tail=tail)]),
        _framed([request(hello=sync_pb2.SyncHello(protocol_version=1, client=CID))]),
    ]


@contextlib.contextmanager
def _salvage_server(folder: Path) -> Iterator[Decode]:
    _, store = open_both(make_store(folder))
    log = _log()
    with store:
        yield lambda data: _salvage(Server(store, policy(Durability.LOCAL), log=list(log)), data)


def _salvage(server: Server, data: bytes) -> None:
    """Has a server take in changes from an export, signed anew."""
    for request in _parsed(sync_pb2.SalvageRequest, data):
        for path, run in runs_of(with_hmacs(request.changes, request.hmacs)):
            taking = take_home(
                path, _signed(run), state=server.state, taker=server.committer, history_key=KEY, may_renew=True,
                on_taken=lambda result: None,
            )  # fmt: skip
            for _ in taking:
                pass


def _salvage_requests() -> list[bytes]:
    changes = _changes()
    return [_framed([sync_pb2.SalvageRequest(protocol_version=1, changes=changes, hmacs=bytes(32 * 6))])]


# -- and the client's ----------------------------------------------------------------------------------------------


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
            for message in _parsed(sync_pb2.SyncResponse, data):
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
        _framed([streams, more, safe, refusals]),
        _framed([load, *pages, more, safe]),
        _framed([heal, taken, streams]),
        _framed([reset, taken]),
        _framed([streams, failed]),
    ]


# -- a replica follows ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _hello(_: Path) -> Iterator[Decode]:
    """What the primary makes of a hello, over a log."""
    with new_log(FaultyFiles()) as log:
        made = write(log, *(b"payload %d" % number for number in range(20)))
        spans = [
            EpochSpan(epoch=Epoch(epoch), first_lsn=Lsn(lsn), previous=Digest(bytes(32)))
            for epoch, lsn in ((1, 1), (3, 9))
        ]
        lookup = lookup_in(log.position_at, {Lsn(3): made[2][1].digest})
        ours = LogHistory(head=log.end, epochs=spans, first_held=log.first_lsn, lookup=lookup)

        def decode(data: bytes) -> None:
            with contextlib.suppress(DecodeError):
                hello = replication_service._checked(replication_pb2.Hello.FromString(data))
                locator = [Position(Lsn(one.lsn), Digest(one.digest)) for one in hello.locator]
                entries.proves_epoch(
                    hello.proof.entry, epoch=Epoch(hello.epoch), cluster=LOG_CLUSTER, keys=[KEY]
                )
                if locator:
                    relate(locator, Epoch(hello.epoch), ours)
                    last_common(locator, lookup)
                    log.offset_behind(locator[0].lsn)
                    list(log.records(locator[0].lsn, Lsn(hello.damaged_lsn)))

        yield decode


def _hellos() -> list[bytes]:
    with new_log(FaultyFiles()) as log:
        made = write(log, *(b"payload %d" % number for number in range(20)))
    locator = [
        replication_pb2.Position(lsn=made[at][1].lsn, digest=made[at][1].digest) for at in (19, 18, 10, 2)
    ]
    locator.append(replication_pb2.Position(digest=START.digest))
    proof = replication_pb2.EpochProof(entry=_log()[0].payload)
    hello = replication_pb2.Hello(
        protocol_version=PROTOCOL_VERSION, cluster=LOG_CLUSTER, node=bytes(16), run=bytes(16), replica_id="r",
        epoch=3, locator=locator, proof=proof, damaged_lsn=20,
    )  # fmt: skip
    empty = replication_pb2.Hello(
        protocol_version=PROTOCOL_VERSION, node=bytes(16), run=bytes(16), replica_id="r"
    )
    return [hello.SerializeToString(), empty.SerializeToString()]


class _Call:
    """A call that is answered at once."""

    def __init__(self, answer: object) -> None:
        self._answer = answer

    async def write(self, message: object) -> None: ...

    async def read(self) -> object:
        return self._answer


def _answer(data: bytes) -> None:
    """What a replica, and a rewind, make of an answer."""
    with contextlib.suppress(DecodeError):
        response = replication_pb2.FollowResponse.FromString(data)
        answer = asyncio.run(ask(cast(Any, _Call(response)), "a:1", replication_pb2.Hello()))
        on_answer(answer.decision, directory="d", address="a:1")
        own = LogHistory(head=START, epochs=[], first_held=Lsn(1), lookup=lambda lsn: None)
        told = Position(Lsn(answer.common.lsn), Digest(answer.common.digest))
        fork_position(own, [span_of(info) for info in answer.epochs], told)


def _answers() -> list[bytes]:
    position = replication_pb2.Position(lsn=4, digest=bytes(32))
    info = replication_pb2.EpochInfo(epoch=2, first_lsn=3, previous=bytes(32))
    answer = replication_pb2.Answer(
        decision=replication_pb2.DIVERGED,
        cluster=LOG_CLUSTER,
        epoch=2,
        common=position,
        epochs=[info],
        head=position,
    )
    return [replication_pb2.FollowResponse(answer=answer).SerializeToString()]


@contextlib.contextmanager
def _snapshot_info(folder: Path) -> Iterator[Decode]:
    def decode(data: bytes) -> None:
        with contextlib.suppress(DecodeError):
            info = replication_pb2.SnapshotInfo.FromString(data)
            bootstrap._check_info(info, folder)
            bootstrap._make_log(folder, info)

    yield decode


def _snapshot_infos() -> list[bytes]:
    position = replication_pb2.Position(lsn=4, digest=bytes(32))
    info = replication_pb2.SnapshotInfo(
        snapshot=bytes(16), position=position, log_offset=400, cluster=LOG_CLUSTER, epoch=2, file_bytes=40_960,
        range_bytes=bootstrap.RANGE_BYTES,
    )  # fmt: skip
    return [info.SerializeToString()]


# -- a primary that serves -----------------------------------------------------------------------------------------

_STREAMS = frozenset(("Commit", "Sync", "Salvage", "Follow"))
_CALL_S_MAX = 5.0


_HOLDING_UP = ("/Fence", "/Freeze")


def _methods(service: str) -> list[str]:
    """All but those after which nothing is written any more, or not for minutes."""
    return sorted(name for name in REQUIRES if f".{service}/" in name and not name.endswith(_HOLDING_UP))


def _is_ours(error: grpc.RpcError) -> bool:
    """Whether a status is one that we, or gRPC before us, have given on purpose."""
    if any(name == CODE_METADATA for name, _ in error.trailing_metadata() or ()):
        return True
    return error.code() is not grpc.StatusCode.UNKNOWN


def _serving(service: str) -> Any:
    """Input: a byte for the method, then its messages."""

    @contextlib.contextmanager
    def opened(folder: Path) -> Iterator[Decode]:
        methods = _methods(service)
        with Primary.open(folder / "a", listen="127.0.0.1:0") as primary:
            primary.commit("/realm", [Put(b"key", b"value")])
            # The Unix socket: its callers may do everything, also once there are users.
            with (
                short_socket_path(folder / "a" / "control.sock") as path,
                grpc.insecure_channel(f"unix:{path}") as channel,
            ):

                def decode(data: bytes) -> None:
                    _call(channel, methods[data[0] % len(methods)] if data else methods[0], data[1:])

                yield decode

    return opened


def _call(channel: grpc.Channel, method: str, data: bytes) -> None:
    messages = list(_frames(data)) if method.rpartition("/")[2] in _STREAMS else [data]
    call = channel.stream_stream(method)(iter(messages), timeout=_CALL_S_MAX)
    try:
        for _ in zip(range(_MESSAGES_MAX), call, strict=False):
            pass
    except grpc.RpcError as error:
        if not _is_ours(error):
            raise AssertionError(f"{method}: {error.code().name}: {error.details()}") from error
    finally:
        call.cancel()


def _requests(service: str) -> list[bytes]:
    """For each method a message that fits."""
    found = []
    for number, method in enumerate(_methods(service)):
        name = method.rpartition("/")[2]
        messages = _SERVICE_MESSAGES[name]
        body = _framed(messages) if name in _STREAMS else messages[0].SerializeToString()
        found.append(bytes([number]) + body)
    return found


def _transaction() -> data_pb2.Transaction:
    return data_pb2.Transaction(number=1, realm="/realm", operations=_OPERATIONS)


_SERVICE_MESSAGES: dict[str, list[Any]] = {
    "Commit": [
        data_pb2.CommitRequest(bind=data_pb2.Bind(protocol_version=PROTOCOL_VERSION, client=CID)),
        data_pb2.CommitRequest(transactions=data_pb2.Transactions(transactions=[_transaction()])),
    ],
    "Thaw": [admin_pb2.ThawRequest()],
    "Get": [data_pb2.GetRequest(realm="/realm", keys=[b"key", b"none"])],
    "Scan": [data_pb2.ScanRequest(realm="/realm", start=b"a", end=b"z", limit=5, reverse=True)],
    "Count": [data_pb2.CountRequest(realm="/realm", start=b"a", end=b"z")],
    "Realms": [data_pb2.RealmsRequest()],
    "DropRealm": [data_pb2.DropRealmRequest(realm="/other")],
    "Sync": [
        sync_pb2.SyncRequest(
            hello=sync_pb2.SyncHello(protocol_version=PROTOCOL_VERSION, client=CID, run=CID, cluster=CLUSTER)
        ),
        sync_pb2.SyncRequest(bind=sync_pb2.BindRealm(ref=1, path="/realm", clients=[CID])),
    ],
    "Salvage": [sync_pb2.SalvageRequest(protocol_version=PROTOCOL_VERSION, changes=[b""], hmacs=bytes(32))],
    "Follow": [
        replication_pb2.FollowRequest(
            hello=replication_pb2.Hello(
                protocol_version=PROTOCOL_VERSION, node=bytes(16), run=bytes(16), replica_id="r"
            )
        ),
        replication_pb2.FollowRequest(progress=replication_pb2.Progress(durable_lsn=1)),
    ],
    "PinSnapshot": [replication_pb2.PinSnapshotRequest(replica_id="r", node=bytes(16))],
    "DigestSnapshot": [replication_pb2.DigestSnapshotRequest(snapshot=bytes(16))],
    "ReadSnapshot": [replication_pb2.ReadSnapshotRequest(snapshot=bytes(16), ranges=[0, 1])],
    "ReleaseSnapshot": [replication_pb2.ReleaseSnapshotRequest(snapshot=bytes(16))],
    "Status": [admin_pb2.StatusRequest()],
    "Promote": [admin_pb2.PromoteRequest()],
    "Forget": [admin_pb2.ForgetRequest(replica_id="r")],
    "StateDigests": [admin_pb2.StateDigestsRequest()],
    "StartBackup": [admin_pb2.StartBackupRequest(policy="nightly")],
    "CancelBackup": [admin_pb2.CancelBackupRequest(id="0a1b2c3d")],
    "WatchBackup": [admin_pb2.WatchBackupRequest(id="0a1b2c3d")],
    "Login": [accounts_pb2.LoginRequest(user="ann", password="a long password")],
    "Refresh": [accounts_pb2.RefreshRequest(refresh="understudy-refresh-0a-" + "s" * 43)],
    "PutUser": [accounts_pb2.PutUserRequest(name="ann", password="a long password", groups=["g"])],
    "RemoveUser": [accounts_pb2.RemoveUserRequest(name="bob")],
    "ListUsers": [accounts_pb2.ListUsersRequest()],
    "SetPassword": [accounts_pb2.SetPasswordRequest(name="ann", password="a long password")],
    "Grant": [
        accounts_pb2.GrantRequest(
            subject=accounts_pb2.Subject(user="ann"), pattern="/a/**", level=accounts_pb2.LEVEL_WRITE
        )
    ],
    "RevokeGrant": [accounts_pb2.RevokeGrantRequest(id="user/ann/0a")],
    "ListGrants": [accounts_pb2.ListGrantsRequest()],
    "IssueToken": [accounts_pb2.IssueTokenRequest(kind=accounts_pb2.TOKEN_APP, user="ann", lifetime_s=60.0)],
    "RevokeToken": [accounts_pb2.RevokeTokenRequest(id="0a")],
    "ListTokens": [accounts_pb2.ListTokensRequest()],
    "RotateKeys": [accounts_pb2.RotateKeysRequest()],
    "SetPolicy": [accounts_pb2.SetPolicyRequest(realm="/realm", recovery_forbidden=True)],
    "Logout": [accounts_pb2.LogoutRequest(refresh="understudy-refresh-0a-" + "s" * 43)],
}


def targets() -> Sequence[Target]:
    """All that peers say."""
    services = sorted(
        {method.partition("/understudy.v1.")[2].partition("/")[0] for method in REQUIRES} - {""}
    )
    return (
        Target(name="sync request", opened=_sync_server, samples=_sync_requests, is_slow=True),
        Target(name="salvage request", opened=_salvage_server, samples=_salvage_requests, is_slow=True),
        Target(name="sync response", opened=_sync_client, samples=_sync_responses, is_slow=True),
        Target(name="hello", opened=_hello, samples=_hellos),
        Target(name="answer", opened=pure(_answer), samples=_answers, is_slow=True),
        Target(name="snapshot info", opened=_snapshot_info, samples=_snapshot_infos, is_slow=True),
        *(
            Target(
                name=f"service {name}",
                opened=_serving(name),
                samples=functools.partial(_requests, name),
                is_slow=True,
            )
            for name in services
        ),
    )
