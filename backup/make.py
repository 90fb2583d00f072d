"""A backup into a directory, which is a data directory itself: made anew, or brought up to date.

Made anew, it is the source's snapshot and the log behind it. Brought up to date, it gets the log that has come since,
as a replica would. Where that is more than a server should have to replay, or the source no longer has it, all is
copied again, beside what is there, which stays a backup until the new copy is whole and takes its place. Nobody else
writes to a backup's store: to apply the log there would take several times as long as to copy it, since what it
holds has to be read anew for its digest.

Of chosen realms it is a data directory, too, made of records; a portable one is the records themselves. Neither can be
brought up to date.

While it is no whole backup the directory holds the file ``BACKUP_IN_PROGRESS``, and nobody else opens it. What was cut
off is taken up by the next ``--update``.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from understudy.backup.chosen import check_chosen
from understudy.backup.contents import STORE_FILE, copy_members, describe, metering, origin_of, token_member
from understudy.backup.in_progress import begun_from, in_progress, is_in_progress
from understudy.backup.manifest import FileEntry, Form, Manifest, read_manifest, write_manifest
from understudy.backup.places import check_apart
from understudy.backup.progress import Meter, OnProgress
from understudy.backup.selection import EVERYTHING, Selection
from understudy.backup.source import Source, open_source
from understudy.backup.target_log import append_records, log_files, open_log, read_head
from understudy.backup.writing import describe_file, write_member
from understudy.common.backup_end import check_end
from understudy.common.directory import ADMIN_TOKEN_FILE, MANIFEST_FILE, DataDirectory, Role, must_begin_anew
from understudy.common.errors import (
    AheadOfPrimary,
    CorruptionError,
    DiskFull,
    Diverged,
    ForeignCluster,
    UnfinishedBackup,
    UsageError,
    WrongRole,
)
from understudy.common.files import publish, storage_errors, sync_tree
from understudy.common.follow_table import Relation
from understudy.common.locator import relate
from understudy.common.log_reader import LogPlace
from understudy.common.store import Store
from understudy.common.types import Digest, Epoch, Lsn, Position
from understudy.v1.store_pb2 import CheckpointRow

# So much log behind its store is replayed in a few seconds when a server starts on the backup; or else in less time
# than its store takes to be restored from where backups lie as a rule.
REPLAYED_BYTES = 64 << 20
_REPLAYED_SHARE = 1 / 16  # of the store
_ANEW = "make it anew: give an absent or empty directory"


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupReport:
    """What was made."""

    manifest: Manifest
    bytes_copied: int
    seconds: float


def make_backup(
    source: Path,
    target: Path,
    *,
    update: bool = False,
    selection: Selection = EVERYTHING,
    rate: int | None = None,
    progress: OnProgress | None = None,
) -> BackupReport:
    """Copies the data directory ``source``, whose server may go on, to the directory ``target``.

    Args:
        source: a primary's, a replica's, or a backup.
        target: absent or empty; with ``update``, also a backup of the same cluster, finished or not.
        update: bring it up to date.
        selection: what of the source, and in which form.
        rate: bytes a second at the most that are read.
        progress: told of bytes done and in all.

    Raises:
        NotADataDirectory, UnfinishedBackup, WrongRole, DirectoryInUse: of one or the other.
        ForeignCluster, Diverged, AheadOfPrimary: ``target`` holds what ``source`` does not know; it was not touched.
        CorruptionError, DiskFull, StorageFailed, UsageError.
    """
    check_apart(source, target)
    _check_form(target, selection, update=update)
    started_s = time.monotonic()
    with _opened(source, selection) as pinned, DataDirectory.open_unfinished(target) as directory:
        making = _Making(pinned, directory, rate, progress)
        if selection.needs_records:
            making.run_selected(selection)
        else:
            making.run(update=update)
        return BackupReport(
            manifest=read_manifest(target),
            bytes_copied=making.bytes_copied,
            seconds=time.monotonic() - started_s,
        )


@contextlib.contextmanager
def _opened(source: Path, selection: Selection) -> Iterator[Source]:
    """The source, before anything is made; one of which nothing is chosen is refused."""
    with open_source(source) as pinned:
        check_chosen(pinned, selection)
        yield pinned


def _check_form(target: Path, selection: Selection, *, update: bool) -> None:
    """Records are not brought up to date, neither by records nor by anything else."""
    if update and selection.needs_records:
        raise UsageError(f"a backup with {selection} is always made anew", remedy="leave --update out")
    is_finished = (target / MANIFEST_FILE).exists() and not is_in_progress(target)
    if is_finished and read_manifest(target).form is Form.RECORDS:
        raise WrongRole(f"{target} holds a backup of records already", remedy=_ANEW)


class _Making:
    """One backup being made."""

    def __init__(
        self, source: Source, target: DataDirectory, rate: int | None, progress: OnProgress | None
    ) -> None:
        self.bytes_copied = 0
        self._source = source
        self._target = target
        self._root = target.path
        self._was_cut_off = is_in_progress(self._root)
        self._rate = rate
        self._progress = progress

    def run(self, *, update: bool) -> None:
        if self._was_cut_off and not update:
            raise UnfinishedBackup(
                f"{self._root} holds a backup that is not finished",
                remedy="go on with --update, or give an absent or empty directory",
            )
        if must_begin_anew(self._root):
            raise UnfinishedBackup(
                f"{self._root} holds a backup of chosen realms or of records that is not finished",
                remedy="give the command again that has begun it, or remove it",
            )
        if self._target.is_new:
            with in_progress(self._root, str(self._source.path)):
                self._describe(self._root, self._copy_all(self._root))
                self._target.begin(Role.BACKUP, self._source.cluster)
            return
        self._check_updatable(update=update)
        self._check_whole()
        head, epoch = self._head()
        relation = self._relation(head.position, epoch)
        self._check_one_history(relation, head.position.lsn)
        if relation is Relation.ON_LOG and self._is_log_kept() and self._is_store_kept():
            shutil.rmtree(self._target.incoming, ignore_errors=True)  # of an attempt that was cut off
            with in_progress(self._root, str(self._source.path)):
                self._describe(self._root, self._append(head))
        else:
            self._replace()

    def _check_updatable(self, *, update: bool) -> None:
        if self._target.role is not Role.BACKUP:
            raise WrongRole(
                f"{self._root} is no backup, its role is {self._target.role.value}",
                remedy="back up to an absent or empty directory",
            )
        if not update:
            raise WrongRole(
                f"{self._root} holds a backup already",
                remedy="bring it up to date with --update, or give an absent or empty directory",
            )
        if self._target.cluster != self._source.cluster:
            raise ForeignCluster(
                f"{self._root} is a backup of another cluster than {self._source.path}",
                remedy="back up to another directory",
            )

    def _check_whole(self) -> None:
        """What lacks realms can't be gone on with, and never takes the place of what has them."""
        origin = origin_of(self._source)
        if origin is not None and not origin.is_whole:
            raise UsageError(f"{self._source.path} does not hold all realms", remedy=_ANEW)
        if not read_manifest(self._root).is_whole:
            raise UsageError(
                f"{self._root} does not hold all realms, so it can't be brought up to date", remedy=_ANEW
            )

    def _head(self) -> tuple[LogPlace, Epoch]:
        """How far the target reaches, and the epoch of its last entry."""
        if self._was_cut_off:
            return read_head(self._target)
        known = read_manifest(self._root)
        position = Position(Lsn(known.lsn), Digest(bytes.fromhex(known.digest)))
        return LogPlace(position, known.log_offset), Epoch(known.epoch)

    def _relation(self, head: Position, epoch: Epoch) -> Relation:
        """Where the target's last entry is in relation to the source's history."""
        if epoch > self._source.epoch:
            return Relation.FORKED  # it has that epoch's first entry
        return relate([head], epoch, self._source.history())

    def _check_one_history(self, relation: Relation, lsn: Lsn) -> None:
        source, remedy = self._source, "keep this backup, and back up to another directory"
        if relation is Relation.BEYOND:
            raise AheadOfPrimary(
                f"{self._root} reaches up to LSN {lsn}, {source.path} only up to {source.end.position.lsn}",
                remedy=remedy,
            )
        if relation is Relation.FORKED:
            raise Diverged(
                f"{self._root} holds entries up to LSN {lsn} that {source.path} does not have", remedy=remedy
            )

    # -- chosen realms, and records -------------------------------------------------------------------------

    def run_selected(self, selection: Selection) -> None:
        # What makes and loads records takes longer to load than a small backup of pages to make.
        from understudy.backup.load_records import load_selected

        origin = f"{self._source.path} {selection}"
        if self._was_cut_off and begun_from(self._root) != origin:
            raise UnfinishedBackup(f"{self._root} holds another backup that is not finished", remedy=_ANEW)
        if not self._was_cut_off and not self._target.is_new:
            raise WrongRole(
                f"{self._root} holds data already, its role is {self._target.role.value}", remedy=_ANEW
            )
        meter = self._meter(None)
        with in_progress(self._root, origin, anew=True):
            if selection.portable:
                manifest = self._write_records(selection, meter)
            else:
                manifest = load_selected(self._target, self._source, selection, meter)
            sync_tree(self._root)
            write_manifest(self._root, manifest)
        self.bytes_copied = meter.done

    def _write_records(self, selection: Selection, meter: Meter) -> Manifest:
        from understudy.backup.records import Records
        from understudy.backup.rows import FOLDER

        records = Records(self._source, selection, meter)
        shutil.rmtree(self._root / FOLDER, ignore_errors=True)
        secrets = () if selection.is_filtered else token_member(self._source)
        members = chain(records.members(), secrets)
        return records.describe([write_member(self._root, member, meter) for member in members])

    # -- all anew ------------------------------------------------------------------------------------------

    def _replace(self) -> None:
        """A new copy in the place of what is there."""
        try:
            self._describe(self._target.incoming, self._copy_all(self._target.incoming))
        except DiskFull as error:
            shutil.rmtree(self._target.incoming, ignore_errors=True)
            raise DiskFull(
                f"{error.message}: a new copy beside the one in {self._root} has no room, which stays as it was",
                remedy="make room for a second copy, or remove this one and make it anew",
            ) from error
        with in_progress(self._root, str(self._source.path)):
            self._target.install(self._source.cluster, keep_old=False, role=Role.BACKUP)

    def _copy_all(self, root: Path) -> list[FileEntry]:
        """Store and log into ``root``, durably."""
        members = copy_members(self._source)
        meter = self._meter(sum(member.size for member in members))
        # A cut-off attempt's may begin elsewhere, or be of another source.
        shutil.rmtree(root / "log", ignore_errors=True)
        with storage_errors("remove", root / ADMIN_TOKEN_FILE):
            (root / ADMIN_TOKEN_FILE).unlink(missing_ok=True)
        entries = [write_member(root, member, meter) for member in members]
        sync_tree(root)
        self.bytes_copied = meter.done
        return entries

    def _meter(self, total: int | None) -> Meter:
        return metering(self._source, total, rate=self._rate, progress=self._progress)

    # -- what has come since -------------------------------------------------------------------------------

    def _is_log_kept(self) -> bool:
        """Whether the log still ends where its manifest says, so that more can come behind it."""
        try:
            check_end(self._root, self._source.cluster)
        except CorruptionError:
            return False
        return True

    def _is_store_kept(self) -> bool:
        """Whether the store is what its manifest describes, and recent enough for a server that starts on it."""
        if self._was_cut_off and describe_file(self._root, STORE_FILE) not in read_manifest(self._root).files:
            return False  # `--finish` was cut off
        row = self._checkpoint(self._target.store)
        kept_bytes = max(REPLAYED_BYTES, int((self._root / STORE_FILE).stat().st_size * _REPLAYED_SHARE))
        is_recent = self._source.end.offset - row.log_offset <= kept_bytes
        return is_recent or row.lsn >= self._source.checkpoint.lsn

    def _append(self, head: LogPlace) -> list[FileEntry]:
        """The log behind ``head``."""
        parts = self._source.parts(head)
        meter = self._meter(sum(part.record_bytes for part in parts))
        with open_log(self._target) as log:
            for part in parts:
                append_records(log, meter.metered(part.records()), part.header.epoch)
        self.bytes_copied = meter.done
        known = read_manifest(self._root).files
        # All but the last segment are as they were; to read the store would take longer than all else.
        unchanged = {STORE_FILE, *sorted(entry.path for entry in known if entry.path.startswith("log/"))[:-1]}
        names = [name for name in log_files(self._root) if name not in unchanged]
        return [
            *(entry for entry in known if entry.path in unchanged),
            *(describe_file(self._root, name) for name in names),
        ]

    # -- what it says of itself ----------------------------------------------------------------------------

    def _describe(self, root: Path, entries: list[FileEntry]) -> None:
        """Writes the manifest of the copy in ``root``, whose files but for the operators' token are there."""
        for member in token_member(self._source):
            data = b"".join(member.pieces)
            publish(root / member.name, data)
            entries.append(describe_file(root, member.name))
        row = self._checkpoint(root / "store")
        write_manifest(root, describe(self._source, entries, checkpoint=row))

    def _checkpoint(self, path: Path) -> CheckpointRow:
        with Store.open(path, cluster=self._source.cluster) as store:
            return store.current.checkpoint
