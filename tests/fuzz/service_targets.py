"""Raw bytes to every call of a primary that serves."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
from sync_helpers import CLUSTER
from test_sync_host_session import CID

from fuzz.messages import MESSAGES_MAX, OPERATIONS, framed, frames
from fuzz.target import Decode, Target
from understudy.common.access import REQUIRES
from understudy.common.follow_table import PROTOCOL_VERSION
from understudy.common.operations import Put
from understudy.common.rpc import CODE_METADATA, short_socket_path
from understudy.primary import Primary
from understudy.v1 import accounts_pb2, admin_pb2, data_pb2, replication_pb2, sync_pb2

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
    messages = list(frames(data)) if method.rpartition("/")[2] in _STREAMS else [data]
    call = channel.stream_stream(method)(iter(messages), timeout=_CALL_S_MAX)
    try:
        for _ in zip(range(MESSAGES_MAX), call, strict=False):
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
        body = framed(messages) if name in _STREAMS else messages[0].SerializeToString()
        found.append(bytes([number]) + body)
    return found


def _transaction() -> data_pb2.Transaction:
    return data_pb2.Transaction(number=1, realm="/realm", operations=OPERATIONS)


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
    """Every service, with all its methods."""
    services = sorted(
        {method.partition("/understudy.v1.")[2].partition("/")[0] for method in REQUIRES} - {""}
    )
    return tuple(
        Target(
            name=f"service {name}",
            opened=_serving(name),
            samples=functools.partial(_requests, name),
            is_slow=True,
        )
        for name in services
    )
