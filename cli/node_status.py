"""Where a node stands: asked of the node itself, or read from its directory while nobody has that open."""

from __future__ import annotations

import importlib.metadata
import time
from pathlib import Path

from understudy.backup.books import FOLDER, Books
from understudy.common.addresses import split_address
from understudy.common.backup_worker import failure_warnings
from understudy.common.credentials import ANONYMOUS, Credentials
from understudy.common.directory import CONTROL_SOCKET, DataDirectory, Role
from understudy.common.errors import DirectoryInUse, PeerUnreachable, UnderstudyError
from understudy.common.log_reader import read_records
from understudy.common.rpc import open_channel, peer_errors, short_socket_path
from understudy.common.state import State
from understudy.common.store import Store
from understudy.primary.slots import SLOTS_FILE, Slot, SlotTable
from understudy.v1 import admin_pb2, admin_pb2_grpc


async def server_status(
    address: str, credentials: Credentials = ANONYMOUS, *, timeout_s: float
) -> admin_pb2.StatusResponse:
    """What the node at ``address`` says of itself.

    Raises:
        UsageError: a bad address.
        PeerUnreachable, ProtocolError, NotPermitted.
    """
    split_address(address)
    return await _ask(address, address, timeout_s, credentials)


async def directory_status(path: Path, *, timeout_s: float) -> tuple[admin_pb2.StatusResponse, bool]:
    """Where the node in ``path`` stands, and whether it runs.

    Raises:
        NotADataDirectory, NewerFormat, CorruptionError.
        DirectoryInUse: a process has it open and does not answer.
    """
    try:
        directory = DataDirectory.open_existing(path)
    except DirectoryInUse as in_use:
        try:
            with short_socket_path(path / CONTROL_SOCKET) as socket:
                return await _ask(f"unix:{socket}", str(path), timeout_s), True
        except (PeerUnreachable, OSError) as error:
            raise DirectoryInUse(
                f"{in_use.message}, which does not answer: {error}",
                remedy="it may be starting; try again, or look at its log",
            ) from error
    with directory:
        return _offline_status(directory), False


async def _ask(
    target: str, name: str, timeout_s: float, credentials: Credentials = ANONYMOUS
) -> admin_pb2.StatusResponse:
    async with open_channel(target, credentials) as channel:
        with peer_errors(name):
            return await admin_pb2_grpc.AdminStub(channel).Status(
                admin_pb2.StatusRequest(), timeout=timeout_s
            )


def _offline_status(directory: DataDirectory) -> admin_pb2.StatusResponse:
    status = admin_pb2.StatusResponse(
        role=directory.role.value,
        cluster=directory.cluster,
        node=directory.node,
        version=importlib.metadata.version("understudy"),
        warnings=_role_warnings(directory),
    )
    if directory.has_copy:
        end_offset = _fill_position(directory, status)
        if directory.role is Role.PRIMARY:
            slots = SlotTable(directory.path / SLOTS_FILE)
            status.replicas.extend(_replica(slot, status.lsn, end_offset) for slot in slots)
    _fill_backups(directory.path, status)
    return status


def _role_warnings(directory: DataDirectory) -> list[str]:
    path = directory.path
    if not directory.has_copy:
        return ["there is no copy here yet"]
    if directory.role is Role.FENCED:
        return [f"fenced: another primary reigns; join it with `understudy rewind {path} --to HOST:PORT`"]
    if directory.role is Role.BACKUP:
        return [f"a backup: `understudy primary --data-dir {path}` starts a server on it, with a new epoch"]
    if directory.role is Role.PROMOTING:
        return [f"a promotion was cut off: finish it with `understudy promote {path}`"]
    return []


def _fill_position(directory: DataDirectory, status: admin_pb2.StatusResponse) -> int:
    """As opening would find it: the store's checkpoint, and what the log has behind it; returns the log's end."""
    with Store.open(directory.store, cluster=directory.cluster) as store:
        state = State(store)
        checkpoint = state.applied.lsn
        for record in read_records(directory.log, directory.cluster, checkpoint):
            state.apply(record)
        status.epoch = state.epochs[-1].info.epoch if state.epochs else 0
        status.lsn = status.durable_lsn = status.committed_lsn = state.applied.lsn
        status.checkpoint_lsn = checkpoint
        status.digest = state.applied.digest
        status.realms = state.user_realm_count
        return state.offset


def _fill_backups(path: Path, status: admin_pb2.StatusResponse) -> None:
    """What the directory remembers of policies' runs; that it can't be read is a warning, since all else is known."""
    if not (path / FOLDER).is_dir():
        return
    try:
        status.backups.extend(Books.of(path).statuses())
    except UnderstudyError as error:
        status.warnings.append(str(error))
    for policy in status.backups:
        status.warnings.extend(failure_warnings(policy))


def _replica(slot: Slot, lsn: int, end_offset: int) -> admin_pb2.ReplicaStatus:
    """As the primary shows a replica that is away: since when, if something was written that it does not have."""
    lag_entries = max(lsn - slot.durable_lsn, 0)
    return admin_pb2.ReplicaStatus(
        id=slot.id,
        state="lost" if slot.lost else "disconnected",
        durable_lsn=slot.durable_lsn,
        applied_lsn=slot.applied_lsn,
        lag_entries=lag_entries,
        lag_bytes=max(end_offset - slot.durable_offset, 0),
        lag_seconds=max(time.time() - slot.seen_us / 1e6, 0.0) if lag_entries else 0.0,
    )
