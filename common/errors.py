"""All errors of Understudy, one tree, split by who can mend what and whether trying again helps.

::

    UnderstudyError
    ├── UsageError                 the caller's mistake; trying again does not help
    │   ├── BadRealmPath, BadKey, BadOperation, TransactionTooLarge
    │   ├── UnknownRealm
    │   └── BadImport
    ├── ResetNeeded                this copy's history is not the peer's; an operator decides
    │   ├── Diverged, ForeignCluster, AheadOfPrimary, Fenced
    │   └── ClientReset            a synced realm's local copy must be given up
    ├── CorruptionError            bytes on disk or wire are not what was written
    ├── DirectoryError             the data directory can't be used
    │   ├── DirectoryInUse, WrongRole, NotADataDirectory, NewerFormat, UnfinishedBackup
    ├── PeerError                  the other side
    │   ├── PeerUnreachable        try again later
    │   ├── ProtocolError          it speaks something else
    │   └── NotPrimary             ask another server
    ├── RepositoryError            where backups are kept: not reachable, or throttles for too long
    │   ├── AlreadyStored, NotStored
    │   ├── RepositoryRefused      it answers, and won't until somebody has changed something
    │   └── RepositoryBusy         another run has its lock
    ├── Unavailable                this side, for now
    │   ├── DiskFull, Overloaded
    ├── OutcomeUnknown             the deadline passed; the transaction may or may not have been applied
    ├── ReceiptExpired             applied so long ago that its receipt is gone
    ├── NotPermitted
    │   └── NotAuthenticated       who asks has not shown who it is, or is that no more
    ├── HookFailed                 a program of the operator's own, run after a backup, did not do its work
    └── StorageFailed              write or fsync failed: the process must end

``code`` names the class on the wire, ``exit_code`` is what the command line ends with, and ``is_lasting`` says that
trying again does not help until somebody has changed something.
"""

from __future__ import annotations

import enum

# What mends a copy that is damaged.
RESTORE = (
    "keep this directory for examination under another name, and make the copy anew from its peer: "
    "`understudy replica` on an empty directory bootstraps"
)

# What gets around a backup that is damaged.
OTHER_BACKUP = "use another backup"


class ExitCode(enum.IntEnum):
    """What a command ends with; the same table stands in every ``--help``."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    RESET_NEEDED = 3
    CORRUPT = 4
    UNREACHABLE = 5
    DIRECTORY = 6
    NOT_PERMITTED = 7


class UnderstudyError(Exception):
    """Base of all errors.

    Args:
        message: what happened and where.
        remedy: what mends it, if possible a command.
    """

    exit_code = ExitCode.FAILED
    is_lasting = False

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} ({self.remedy})" if self.remedy else self.message

    @property
    def code(self) -> str:
        """The name that stands for this class on the wire."""
        return type(self).__name__


class UsageError(UnderstudyError):
    """The caller asked for something that can't be."""

    exit_code = ExitCode.USAGE
    is_lasting = True


class BadRealmPath(UsageError):
    """A realm path is not of the form ``/segment/segment``."""


class BadKey(UsageError):
    """A key is empty or too long."""


class BadOperation(UsageError):
    """An operation or a transaction is malformed."""


class TransactionTooLarge(UsageError):
    """A transaction, a value or a message is beyond its limit."""


class UnknownRealm(UsageError):
    """No realm of that path exists."""

    exit_code = ExitCode.FAILED


class BadImport(UsageError):
    """A line of an import file can't be read."""


class ResetNeeded(UnderstudyError):
    """This copy's history is not on the peer's."""

    exit_code = ExitCode.RESET_NEEDED
    is_lasting = True


class Diverged(ResetNeeded):
    """Both sides hold entries that the other lacks."""


class ForeignCluster(ResetNeeded):
    """The peer belongs to another cluster."""


class AheadOfPrimary(ResetNeeded):
    """This replica holds entries that its primary has lost."""


class Fenced(ResetNeeded):
    """This primary has learned of a higher epoch and accepts no more writes."""


class ClientReset(ResetNeeded):
    """A synced realm's local copy is not on the server's history; until it is given up, nothing is synced.

    Nothing is lost: copy and queue are as they were. ``reason`` is the name of a ``ResetReason``, ``common_version``
    the last version that both sides share where there is one, ``path`` the directory that holds the copy.
    """

    def __init__(
        self,
        message: str,
        *,
        remedy: str = "",
        reason: str = "RESET_UNSPECIFIED",
        realm: str = "",
        common_version: int | None = None,
        path: str | None = None,
    ) -> None:
        super().__init__(message, remedy=remedy)
        self.reason = reason
        self.realm = realm
        self.common_version = common_version
        self.path = path


class CorruptionError(UnderstudyError):
    """Bytes on disk or wire are not what was written."""

    exit_code = ExitCode.CORRUPT
    is_lasting = True


class DirectoryError(UnderstudyError):
    """The data directory can't be used as asked."""

    exit_code = ExitCode.DIRECTORY


class DirectoryInUse(DirectoryError):
    """Another process has the data directory open."""


class WrongRole(DirectoryError):
    """The data directory's role does not allow this command."""


class NotADataDirectory(DirectoryError):
    """The directory holds something else than Understudy's data."""


class NewerFormat(DirectoryError):
    """The directory was written by a newer version."""

    is_lasting = True


class UnfinishedBackup(DirectoryError):
    """The directory holds a backup that is being made, or was cut off."""


class PeerError(UnderstudyError):
    """The other side of a connection is at fault."""

    exit_code = ExitCode.UNREACHABLE


class PeerUnreachable(PeerError):
    """No connection, or it was lost; trying again later can help."""


class ProtocolError(PeerError):
    """The peer sent what this protocol version does not allow."""

    exit_code = ExitCode.FAILED


class NotPrimary(PeerError):
    """The server asked is not the primary."""

    exit_code = ExitCode.DIRECTORY


class RepositoryError(UnderstudyError):
    """The place where backups are kept is not reachable, or throttles for too long."""

    exit_code = ExitCode.UNREACHABLE


class AlreadyStored(RepositoryError):
    """There is an object of that name already; it was not touched."""


class NotStored(RepositoryError):
    """There is no object of that name."""


class RepositoryRefused(RepositoryError):
    """Where backups are to be kept there is no such bucket, or no permission, or what is stored is not safe there."""

    is_lasting = True


class RepositoryBusy(RepositoryError):
    """Another run holds the repository's lock."""


class Unavailable(UnderstudyError):
    """This side can't do it now; nothing was done; trying again later can help."""


class DiskFull(Unavailable):
    """No space left where the data lives."""


class Overloaded(Unavailable):
    """A limit on what is in flight was reached."""


class OutcomeUnknown(UnderstudyError):
    """A deadline passed before the answer came.

    ``number`` identifies the transaction; a client goes on trying until it is closed, and its ``wait`` with this
    number gives the receipt once there is one. 0 where nothing can be waited for.
    """

    exit_code = ExitCode.UNREACHABLE

    def __init__(self, message: str, *, remedy: str = "", number: int = 0) -> None:
        super().__init__(message, remedy=remedy)
        self.number = number


class ReceiptExpired(UnderstudyError):
    """A retried transaction was answered so long ago that its receipt is no longer kept; it was not applied again."""


class NotPermitted(UnderstudyError):
    """Refused by policy."""

    exit_code = ExitCode.NOT_PERMITTED
    is_lasting = True


class NotAuthenticated(NotPermitted):
    """No token or certificate, or one that is worth nothing: wrong, expired or revoked."""


class HookFailed(UnderstudyError):
    """A program of the operator's own, run after a backup, could not be started, failed, or took too long."""


class StorageFailed(UnderstudyError):
    """A write or fsync failed. The kernel may have dropped the pages, so nothing after it can be trusted."""


def _subclasses(cls: type[UnderstudyError]) -> dict[str, type[UnderstudyError]]:
    found = {cls.__name__: cls}
    for sub in cls.__subclasses__():
        found.update(_subclasses(sub))
    return found


def from_code(code: str, message: str, remedy: str) -> UnderstudyError:
    """The error that ``code`` names; an unknown code gives the base class."""
    return _subclasses(UnderstudyError).get(code, UnderstudyError)(message, remedy=remedy)
