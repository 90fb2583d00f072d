"""What a repository holds: backups in folders by date, and what has been found out about each.

::

    understudy.json                          whose repository it is
    lock.json                                who is at work there
    backups/2026/11/21/20261121T182719Z-00000000000000048213-3fa9c1/
        backup.tar.zst.age                   the archive, or .tar.zst
        manifest.json                        written last: without it there is no backup
        checks/20261122T020000Z-1f2e3d.json  what a check of it has found
    log/…                                    see :mod:`understudy.backup.log_archive`

Nothing is ever overwritten; of checks that found the same, the newest stays. A backup is there once its manifest
is, and gone once that is deleted, which happens before anything else of it is.
"""

from __future__ import annotations

import contextlib
import datetime
import enum
import json
import re
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace

from understudy.backup.manifest import Manifest, sealed, unsealed, utc_seconds, utc_text
from understudy.backup.repository import Repository
from understudy.common.errors import (
    OTHER_BACKUP,
    CorruptionError,
    NewerFormat,
    NotStored,
    RepositoryError,
    StorageFailed,
    UsageError,
)
from understudy.common.types import LSN_DIGITS, Lsn, format_lsn

FORMAT_VERSION = 1
BACKUPS = "backups/"
_MANIFEST = "manifest.json"
_CHECKS = "checks/"
_LISTINGS_MAX = 10  # a check takes far longer than reading what others have found
_ID = re.compile(rf"[0-9]{{8}}T[0-9]{{6}}Z-[0-9]{{{LSN_DIGITS}}}-[0-9a-f]{{6}}\Z")


class Finding(enum.StrEnum):
    """What a check of a backup has found."""

    INTACT = "intact"  # its archive has the digest that the manifest says
    PROVEN = "proven"  # it was restored, verified and read
    DAMAGED = "damaged"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One check of a backup."""

    finding: Finding
    at: str  # UTC
    detail: str = ""

    @property
    def kind(self) -> tuple[Finding, bool]:
        """What it can be replaced by a newer one of: a drill that finds the log behind it damaged says so in detail."""
        return self.finding, bool(self.detail)


_DIGEST_FITS = Check(finding=Finding.INTACT, at="").kind


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBackup:
    """A backup in a repository."""

    id: str
    run: int  # the number of the run that made it
    policy: str
    archive: str  # its name in the backup's folder
    size: int  # of the archive, bytes
    sha256: str  # of the archive
    manifest: Manifest
    format: int = FORMAT_VERSION
    checks: tuple[Check, ...] = field(default=(), compare=False)  # oldest first

    @property
    def folder(self) -> str:
        """Where it lies, with a slash behind it."""
        return folder_of(self.id)

    @property
    def archive_name(self) -> str:
        """The archive's object."""
        return self.folder + self.archive

    @property
    def made_s(self) -> float:
        """When it was made, seconds since 1970."""
        return utc_seconds(self.manifest.made)

    @property
    def last_check(self) -> Check | None:
        """The latest, if it was ever checked."""
        return self.checks[-1] if self.checks else None

    @property
    def is_damaged(self) -> bool:
        """Whether the last check found it damaged."""
        return self.last_check is not None and self.last_check.finding is Finding.DAMAGED

    @property
    def is_restorable(self) -> bool:
        """Whether it holds all that it was to hold, and is not known to be damaged."""
        return not self.is_damaged and not self.manifest.failed

    @property
    def state(self) -> str:
        """In a word: ``proven``, ``intact``, ``damaged`` or ``unchecked``.

        The last check decides; only that the digest still fits takes nothing from a proof before it.
        """
        if self.last_check is None:
            return "unchecked"
        others = [check for check in self.checks if check.kind != _DIGEST_FITS]
        if self.last_check.kind == _DIGEST_FITS and others and others[-1].finding is Finding.PROVEN:
            return Finding.PROVEN.value
        return self.last_check.finding.value

    def encode(self) -> bytes:
        """``manifest.json``."""
        facts = asdict(self)
        del facts["checks"]
        return sealed(facts)


def new_backup_id(made_s: float, lsn: Lsn) -> str:
    """A name that sorts by time and that no other backup has."""
    stamp = datetime.datetime.fromtimestamp(made_s, datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    return f"{stamp}-{format_lsn(lsn)}-{secrets.token_hex(3)}"


def folder_of(backup_id: str) -> str:
    """The folder of a backup, by its day.

    Raises:
        UsageError: that is no backup's id.
    """
    if not _ID.match(backup_id):
        raise UsageError(f"{backup_id!r} is no backup's id", remedy="`understudy backups list` shows them")
    return f"{BACKUPS}{backup_id[:4]}/{backup_id[4:6]}/{backup_id[6:8]}/{backup_id}/"


def manifest_name(folder: str) -> str:
    """The manifest's object of the backup in a folder."""
    return folder + _MANIFEST


def publish_backup(repository: Repository, backup: StoredBackup) -> None:
    """Makes a backup whose archive is complete visible.

    Raises:
        RepositoryError, AlreadyStored.
    """
    repository.put(manifest_name(backup.folder), backup.encode())


def note_check(
    repository: Repository, backup: StoredBackup, finding: Finding, detail: str, at_s: float
) -> None:
    """Remembers what a check of a backup has found, in the place of older ones of its kind.

    Raises:
        RepositoryError.
    """
    check = Check(finding=finding, at=utc_text(at_s), detail=detail)
    stamp = datetime.datetime.fromtimestamp(at_s, datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    name = f"{backup.folder}{_CHECKS}{stamp}-{secrets.token_hex(3)}.json"
    repository.put(name, sealed(asdict(check)))
    # An old check that stays does no harm, and some storages let nobody remove anything.
    with contextlib.suppress(RepositoryError, StorageFailed):
        _forget_superseded(repository, backup.folder)


def _forget_superseded(repository: Repository, folder: str) -> None:
    newer: set[tuple[Finding, bool]] = set()
    names = [stored.name for stored in repository.list(folder + _CHECKS)]
    for name in sorted(names, reverse=True):
        kind = decode_check(repository.read(name), name).kind
        if kind in newer:
            repository.delete(name)
        newer.add(kind)


@dataclass(frozen=True, slots=True)
class Catalog:
    """The backups that could be read, oldest first, and what is wrong with the others."""

    backups: list[StoredBackup]
    problems: list[str]
    orphans: list[str]  # folders without a manifest: cut off, or being made

    def find(self, backup_id: str) -> StoredBackup:
        """The backup of that id.

        Raises:
            UsageError: there is none.
        """
        for backup in self.backups:
            if backup.id == backup_id:
                return backup
        folder_of(backup_id)
        raise UsageError(f"there is no backup {backup_id}", remedy="`understudy backups list` shows them")


def read_catalog(repository: Repository) -> Catalog:
    """All backups of a repository.

    Raises:
        RepositoryError.
    """
    folders: dict[str, list[str]] = {}
    for stored in repository.list(BACKUPS):
        folder, name = _split(stored.name)
        if folder:
            folders.setdefault(folder, []).append(name)
    catalog = Catalog([], [], [])
    for folder, names in sorted(folders.items(), key=lambda item: item[0].rsplit("/", 2)[-2]):
        if _MANIFEST not in names:
            catalog.orphans.append(folder)
            continue
        try:
            catalog.backups.append(_read_backup(repository, folder, names))
        except (CorruptionError, NewerFormat) as error:
            catalog.problems.append(str(error))
    # Ids of one second sort by chance.
    catalog.backups.sort(key=lambda backup: (backup.manifest.made, backup.run))
    return catalog


def last_proven_s(catalog: Catalog, policy: str) -> float:
    """When a drill last proved a backup of a policy, seconds since 1970; 0 for never."""
    proofs = (
        utc_seconds(check.at)
        for backup in catalog.backups
        if backup.policy == policy
        for check in backup.checks
        if check.finding is Finding.PROVEN
    )
    return max(proofs, default=0.0)


def _split(name: str) -> tuple[str, str]:
    """A backup's folder and the rest of an object's name; empty where it is none of a backup's."""
    parts = name.split("/", 5)
    if len(parts) < 6 or not _ID.match(parts[4]):
        return "", ""
    return name[: -len(parts[5])], parts[5]


def _read_backup(repository: Repository, folder: str, names: Iterable[str]) -> StoredBackup:
    backup = decode_backup(repository.read(folder + _MANIFEST), f"{folder}{_MANIFEST} in {repository.url}")
    if backup.folder != folder:
        raise CorruptionError(f"{folder}{_MANIFEST} in {repository.url} is of another backup, {backup.id}")
    checks = [folder + name for name in names if name.startswith(_CHECKS)]
    return replace(backup, checks=_read_checks(repository, folder, checks))


def _read_checks(repository: Repository, folder: str, names: list[str]) -> tuple[Check, ...]:
    """All of a backup, oldest first; where one has been superseded meanwhile, what is there then."""
    for _ in range(_LISTINGS_MAX):
        try:
            return tuple(
                decode_check(repository.read(name), f"{name} in {repository.url}") for name in sorted(names)
            )
        except NotStored:
            names = [stored.name for stored in repository.list(folder + _CHECKS)]
    raise RepositoryError(f"the checks in {folder} of {repository.url} go on changing", remedy="try again")


def decode_backup(data: bytes, name: str) -> StoredBackup:
    """The inverse of :meth:`StoredBackup.encode`.

    Args:
        name: what error messages call it.

    Raises:
        CorruptionError: it is none.
        NewerFormat: it is one of a later version.
    """
    try:
        raw = unsealed(data)
        if raw["format"] > FORMAT_VERSION:
            raise NewerFormat(
                f"{name} was written by a newer version of Understudy (format {raw['format']})",
                remedy=f"this version reads format {FORMAT_VERSION}; upgrade it",
            )
        manifest = Manifest.decode(json.dumps(raw.pop("manifest")).encode(), name)
        backup = StoredBackup(**raw, manifest=manifest)
        folder_of(backup.id)
        numbers = (backup.size, backup.run)
        if (
            "/" in backup.archive
            or not all(type(number) is int and number >= 0 for number in numbers)
            or not isinstance(backup.policy, str)
        ):
            raise ValueError("a value is of another kind")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, UsageError) as error:
        raise CorruptionError(f"{name} can't be read: {error}", remedy=OTHER_BACKUP) from error
    return backup


def decode_check(data: bytes, name: str) -> Check:
    """What a check has found. One that can't be read counts as damage: nobody knows what it said.

    Args:
        name: what a message calls it.
    """
    try:
        raw = unsealed(data)
        utc_seconds(raw["at"])
        return Check(finding=Finding(raw["finding"]), at=raw["at"], detail=str(raw["detail"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return Check(finding=Finding.DAMAGED, at="", detail=f"{name} can't be read: {error}")
