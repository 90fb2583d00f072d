"""The data directory: who owns it, what role it has, and how a new copy takes the old one's place.

::

    DIR/node.json     format, role, cluster, node; published whole
    DIR/lock          flock'ed by the process that has DIR open, and by its checkpoint process
    DIR/log/          change-log segments
    DIR/store/        the LMDB environment
    DIR/incoming/     a copy being made (bootstrap, rewind); nothing here is trusted until it is complete
    DIR/set-aside/    what was replaced, and exports of entries that only this node had
    DIR/control.sock  where the owning process listens for `status` and `promote`
    DIR/backup.json   of a backup: what it holds
    DIR/BACKUP_IN_PROGRESS  of a backup that is not finished: nobody but its maker opens DIR

Roles and what follows them::

    creating ──> primary ──> fenced ──┐
    replica ──> promoting ──> primary │ rewind
       ^─────────── installing <──────┘<── bootstrap of a replica
    backup ──> promoting ──> primary

``creating`` and ``installing`` are intentions: whoever opens the directory next finishes or restarts the step.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import itertools
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from understudy.common.errors import (
    RESTORE,
    CorruptionError,
    DirectoryError,
    DirectoryInUse,
    DiskFull,
    NewerFormat,
    NotADataDirectory,
    UnfinishedBackup,
)
from understudy.common.files import NO_SPACE, publish, storage_errors, sync_directory
from understudy.common.types import ClusterId, NodeId, new_id

if TYPE_CHECKING:
    from understudy.common.backup_worker import BackupWorker

FORMAT_VERSION = 1
NODE_FILE = "node.json"
CONTROL_SOCKET = "control.sock"
MANIFEST_FILE = "backup.json"
# A secret of the operators. Nobody but the owner can read it, there or in a copy.
ADMIN_TOKEN_FILE = "admin-token"
IN_PROGRESS_FILE = "BACKUP_IN_PROGRESS"
# A killed process's checkpoint process ends once its LMDB commit is through; on a slow disk that takes a while.
LOCK_WAIT_S = 10.0
_LOCK_POLL_S = 0.02
_OLD_COPY_NOTE = "old-copy-to"
_ROLE_NOTE = "role"


class Role(enum.StrEnum):
    """What a data directory is for."""

    CREATING = "creating"  # a primary whose first files are not all there yet
    PRIMARY = "primary"
    REPLICA = "replica"
    PROMOTING = "promoting"  # a replica that was told to become primary and may have begun its epoch
    FENCED = "fenced"  # a primary that has learned of a higher epoch
    INSTALLING = "installing"  # a complete copy in incoming/ is taking the old one's place
    BACKUP = "backup"  # a copy at rest; whoever starts on it begins a new epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFile:
    """What ``node.json`` says. ``cluster`` is empty while a replica has no copy yet."""

    format: int = FORMAT_VERSION
    role: Role
    cluster: str
    node: str
    epoch_floor: int = 0  # of a restored copy: the highest epoch known of its cluster; the next one is higher

    @classmethod
    def read(cls, path: Path) -> NodeFile:
        """Reads and checks ``node.json``.

        Raises:
            NewerFormat, CorruptionError.
        """
        try:
            raw = json.loads(path.read_bytes())
            if raw["format"] > FORMAT_VERSION:
                raise NewerFormat(
                    f"{path.parent} was written by a newer version of Understudy (format {raw['format']})",
                    remedy=f"this version reads format {FORMAT_VERSION}; upgrade it",
                )
            cluster = str(uuid.UUID(raw["cluster"])) if raw["cluster"] else ""
            return cls(
                role=Role(raw["role"]),
                cluster=cluster,
                node=str(uuid.UUID(raw["node"])),
                epoch_floor=int(raw.get("epoch_floor", 0)),
            )
        # Attributes are missed by UUID, of what is no text.
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CorruptionError(f"{path} can't be read: {error}", remedy=RESTORE) from error


class DataDirectory:
    """A data directory that this process owns until :meth:`close`."""

    def __init__(self, path: Path, lock_fd: int, node: NodeFile | None) -> None:
        self.path = path
        self.lock_fd = lock_fd
        self.backup_worker: BackupWorker | None = None  # set by who starts one
        self._node = node

    # -- opening -------------------------------------------------------------------------------------------

    @classmethod
    def open(cls, path: Path) -> DataDirectory:
        """Takes the directory; an absent one is made, an empty one is fine, anything else must be ours.

        Raises:
            UnfinishedBackup, DirectoryInUse, NotADataDirectory, NewerFormat, DirectoryError, CorruptionError.
        """
        check_finished(path)
        return cls.open_unfinished(path)

    @classmethod
    def open_unfinished(cls, path: Path) -> DataDirectory:
        """As :meth:`open`, for who makes a backup there and may find one that is not finished."""
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            node_file = path / NODE_FILE
            known = node_file.exists() or (path / IN_PROGRESS_FILE).exists()
            if not known and _foreign(path):
                check_restored(path)
                raise NotADataDirectory(
                    f"{path} is not empty and not a data directory of Understudy",
                    remedy="give an empty or absent directory",
                )
            lock_fd = _lock(path)
        except FileExistsError as error:
            raise NotADataDirectory(f"{path} is not a directory") from error
        except OSError as error:
            if error.errno in NO_SPACE:
                raise DiskFull(
                    f"no space left to create {path}", remedy="free some space, then try again"
                ) from error
            raise DirectoryError(f"can't use {path} as data directory: {error.strerror}") from error
        try:
            directory = cls(path, lock_fd, NodeFile.read(node_file) if node_file.exists() else None)
            directory._finish_interrupted()
        except BaseException:
            os.close(lock_fd)
            raise
        return directory

    @classmethod
    def open_existing(cls, path: Path) -> DataDirectory:
        """As :meth:`open`, but the directory must hold data.

        Raises:
            NotADataDirectory: it holds none.
        """
        check_data_directory(path)
        return cls.open(path)

    def close(self) -> None:
        """Gives the directory up."""
        os.close(self.lock_fd)

    def __enter__(self) -> DataDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- what it is ----------------------------------------------------------------------------------------

    @property
    def is_new(self) -> bool:
        """Whether nothing was ever made here."""
        return self._node is None

    @property
    def role(self) -> Role:
        """Its role; only of a directory that is not new."""
        return self._known.role

    @property
    def cluster(self) -> ClusterId:
        """The cluster's id; empty while there is no copy."""
        return ClusterId(uuid.UUID(self._known.cluster).bytes if self._known.cluster else b"")

    @property
    def node(self) -> NodeId:
        """This copy's id."""
        return NodeId(uuid.UUID(self._known.node).bytes)

    @property
    def has_copy(self) -> bool:
        """Whether there are a log and a store to open."""
        return self._node is not None and bool(self._node.cluster) and self.role is not Role.CREATING

    @property
    def _known(self) -> NodeFile:
        if self._node is None:
            raise NotADataDirectory(f"{self.path} is empty")
        return self._node

    @property
    def log(self) -> Path:
        """Where the segments are."""
        return self.path / "log"

    @property
    def store(self) -> Path:
        """Where the LMDB environment is."""
        return self.path / "store"

    @property
    def incoming(self) -> Path:
        """Where a copy is being made."""
        return self.path / "incoming"

    @property
    def control(self) -> Path:
        """The Unix socket of the owning process."""
        return self.path / CONTROL_SOCKET

    @property
    def set_aside(self) -> Path:
        """Where replaced copies and exports go."""
        return self.path / "set-aside"

    # -- changing it ---------------------------------------------------------------------------------------

    def begin(self, role: Role, cluster: ClusterId) -> None:
        """Makes a new directory ours, as ``creating`` or as a replica without a copy."""
        self._publish(
            NodeFile(
                role=role,
                cluster=str(uuid.UUID(bytes=cluster)) if cluster else "",
                node=str(uuid.UUID(bytes=new_id())),
            )
        )

    def set_role(self, role: Role) -> None:
        """Changes the role, durably."""
        self._publish(replace(self._known, role=role))

    @property
    def epoch_floor(self) -> int:
        """An epoch that begins here must be higher: others of this cluster's have been."""
        return self._known.epoch_floor

    def raise_epoch_floor(self, epoch: int) -> None:
        """Notes an epoch that there has been, durably."""
        if epoch > self._known.epoch_floor:
            self._publish(replace(self._known, epoch_floor=epoch))

    def leave_backup(self) -> None:
        """Makes a backup the directory of a node of its own, which is about to begin a new epoch.

        Its id is new: several servers may be started on copies of one backup.
        """
        self._publish(replace(self._known, role=Role.PROMOTING, node=str(uuid.UUID(bytes=new_id()))))
        # What it says will not be true for long.
        with storage_errors("remove", self.path / MANIFEST_FILE):
            (self.path / MANIFEST_FILE).unlink(missing_ok=True)
        shutil.rmtree(self.incoming, ignore_errors=True)  # of an update that was cut off

    def install(self, cluster: ClusterId, *, keep_old: bool, role: Role = Role.REPLICA) -> Path | None:
        """Puts ``incoming/store`` and ``incoming/log``, complete and synced, in the old copy's place.

        Of a backup, the files that go with them, too.

        A crash on the way is made good by the next :meth:`open`.

        Args:
            cluster: the new copy's.
            keep_old: move the old copy to ``set-aside/`` instead of removing it.
            role: the directory's afterwards.

        Returns:
            Where the old copy was set aside, if it was.
        """
        kept = None
        # One that a crash left behind is of an earlier copy.
        (self.incoming / _OLD_COPY_NOTE).unlink(missing_ok=True)
        if keep_old and self.store.exists():
            kept = _new_folder(self.set_aside, time.strftime("copy-%Y%m%dT%H%M%SZ", time.gmtime()))
            # Its place is noted in incoming/ so that a crash in between does not lose it.
            publish(self.incoming / _OLD_COPY_NOTE, os.fsencode(kept.name))
        (self.incoming / _ROLE_NOTE).unlink(missing_ok=True)
        if role is not Role.REPLICA:
            publish(self.incoming / _ROLE_NOTE, role.value.encode())
        self._publish(replace(self._known, role=Role.INSTALLING, cluster=str(uuid.UUID(bytes=cluster))))
        self._finish_interrupted()
        return kept

    def _finish_interrupted(self) -> None:
        if self._node is None:
            return
        if self._node.role is Role.INSTALLING:
            self._finish_install()
        elif self._node.role is Role.CREATING:
            for part in (self.log, self.store):
                shutil.rmtree(part, ignore_errors=True)

    def _finish_install(self) -> None:
        note = self.incoming / _OLD_COPY_NOTE
        old_to = self.set_aside / os.fsdecode(note.read_bytes()) if note.exists() else None
        if old_to is not None:
            # A power loss may have kept the note and not the folder.
            with storage_errors("create", old_to):
                old_to.mkdir(parents=True, exist_ok=True)
        for current in (self.store, self.log):
            with storage_errors("replace", current):
                self._replace(current, self.incoming / current.name, old_to)
        for name in (ADMIN_TOKEN_FILE, MANIFEST_FILE):
            with storage_errors("replace", self.path / name), contextlib.suppress(FileNotFoundError):
                os.replace(self.incoming / name, self.path / name)
        sync_directory(self.path)
        if old_to is not None:
            sync_directory(old_to)
            sync_directory(self.set_aside)
        role_note = self.incoming / _ROLE_NOTE
        self.set_role(Role(role_note.read_text()) if role_note.exists() else Role.REPLICA)
        shutil.rmtree(self.incoming, ignore_errors=True)

    @staticmethod
    def _replace(current: Path, new: Path, old_to: Path | None) -> None:
        if not new.exists():
            return  # moved before the crash
        if current.exists():
            if old_to is not None and not (old_to / current.name).exists():
                os.rename(current, old_to / current.name)
            else:
                shutil.rmtree(current)
        os.rename(new, current)

    def _publish(self, node: NodeFile) -> None:
        publish(self.path / NODE_FILE, json.dumps(asdict(node), indent=2).encode() + b"\n")
        self._node = node


def check_data_directory(path: Path) -> None:
    """Refuses what no node's data is in, without touching it; a server may run on it.

    Raises:
        NotADataDirectory, UnfinishedBackup.
    """
    check_finished(path)
    check_restored(path)
    if not (path / NODE_FILE).is_file():
        raise NotADataDirectory(
            f"{path} is not a data directory of Understudy: it has no {NODE_FILE}",
            remedy="give the directory that `understudy primary` or `understudy replica` was started with",
        )


def check_finished(path: Path) -> None:
    """Refuses a backup that is being made, or was cut off.

    Raises:
        UnfinishedBackup.
    """
    if not (path / IN_PROGRESS_FILE).exists():
        return
    raise UnfinishedBackup(
        f"{path} is not finished: there is a file {IN_PROGRESS_FILE}",
        remedy="give the command that began it once more, or remove the directory"
        if must_begin_anew(path)
        else "finish it with the command that began it, and --update if that was a backup of all realms; where its "
        "source is lost, `understudy backup --finish` saves what was whole before; or use another backup",
    )


def must_begin_anew(path: Path) -> bool:
    """Whether the mark of a directory that is not finished says that it can't be brought up to date."""
    try:
        note = json.loads((path / IN_PROGRESS_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(note, dict) and note.get("anew") is True


def check_restored(path: Path) -> None:
    """Refuses a backup that is no data directory yet.

    Raises:
        NotADataDirectory.
    """
    if (path / MANIFEST_FILE).is_file() and not (path / NODE_FILE).exists():
        raise NotADataDirectory(
            f"{path} is a portable backup, which no server runs on",
            remedy=f"make a data directory of it: understudy restore {path} --to DIR",
        )


def _new_folder(parent: Path, name: str) -> Path:
    """A folder of that name, or with a number behind it where the name is taken: another copy may be in there."""
    with storage_errors("create", parent / name):
        parent.mkdir(exist_ok=True)
        for number in itertools.count(1):
            path = parent / (name if number == 1 else f"{name}-{number}")
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                return path
    raise AssertionError("there is always a next number")


def _foreign(path: Path) -> bool:
    ours = {"lock", NODE_FILE + ".new", IN_PROGRESS_FILE + ".new"}  # left by a first step that was cut off
    return any(entry.name not in ours and entry.name != "lost+found" for entry in path.iterdir())


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps everybody else out of a directory that can't be opened as it is.

    Raises:
        DirectoryInUse, DiskFull, StorageFailed.
    """
    with storage_errors("lock", path):
        lock_fd = _lock(path)
    try:
        yield
    finally:
        os.close(lock_fd)


def _lock(path: Path) -> int:
    fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
            if _is_running(owner) or time.monotonic() > deadline:
                os.close(fd)
                raise DirectoryInUse(
                    f"{path} is in use by process {owner or '?'}",
                    remedy="stop that process, or work through it with --server",
                ) from None
            time.sleep(_LOCK_POLL_S)
        else:
            os.ftruncate(fd, 0)
            os.pwrite(fd, str(os.getpid()).encode(), 0)
            return fd


def _is_running(pid: str) -> bool:
    if not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    # A zombie answers to signal 0 but holds nothing any more.
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
