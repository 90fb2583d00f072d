"""The small values that everything speaks in: LSN, epoch, digest, position, realm path, limits."""

from __future__ import annotations

import enum
import re
import uuid
from dataclasses import dataclass
from typing import NamedTuple, NewType

from understudy.common.errors import BadKey, BadRealmPath, UsageError

Lsn = NewType("Lsn", int)
Epoch = NewType("Epoch", int)
Digest = NewType("Digest", bytes)
NodeId = NewType("NodeId", bytes)
ClusterId = NewType("ClusterId", bytes)
ClientId = NewType("ClientId", bytes)
RealmPath = NewType("RealmPath", str)

DIGEST_BYTES = 32
ID_BYTES = 16
ZERO_DIGEST = Digest(bytes(DIGEST_BYTES))  # what the first entry of a cluster chains to
NO_LSN = Lsn(0)  # before the first entry
LSN_DIGITS = 20  # of 2^64

KEY_BYTES_MAX = 480  # LMDB allows 511 with its default build; the realm id and room for later take the rest
TRANSACTION_BYTES_MAX = 16 << 20  # one transaction must fit into one message and one memtable
OPERATIONS_MAX = 100_000  # per transaction, so that applying one never holds up the others for long
REALM_PATH_BYTES_MAX = 255
MESSAGE_BYTES_MAX = 20 << 20  # a gRPC message: the largest transaction and its envelope

SYSTEM_REALM = RealmPath("/__system")  # the history key, users, permissions, tokens, signing keys
SESSIONS_REALM = RealmPath("/__sessions")  # logins, apart because they change all the time
SYSTEM_REALMS = (SYSTEM_REALM, SESSIONS_REALM)

_KEY_REMEDY = f"a key has 1 to {KEY_BYTES_MAX} bytes"
_SEGMENT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*\Z")


class Durability(enum.IntEnum):
    """When a transaction is acknowledged; the numbers are those of ``data.proto``."""

    LOCAL = 1  # durable on the primary
    REPLICA = 2  # durable on the primary and on at least `sync_replicas` replicas
    APPLIED = 3  # as REPLICA, and visible to reads there

    @classmethod
    def parse(cls, name: str) -> Durability:
        """The level of that name in lower case.

        Raises:
            UsageError: there is none.
        """
        try:
            return cls[name.upper()]
        except (KeyError, AttributeError, TypeError):  # no such name, or no text
            raise UsageError(f"no durability {name!r}", remedy="choose local, replica or applied") from None


class Position(NamedTuple):
    """An LSN with the log's digest at it; two nodes that agree on a position agree on all history up to it.

    A tuple, as are records and receipts: made for every entry, and three times as fast as a frozen dataclass.
    """

    lsn: Lsn
    digest: Digest

    def __str__(self) -> str:
        return f"{self.lsn}:{self.digest.hex()[:12]}"


START = Position(NO_LSN, ZERO_DIGEST)


def format_lsn(lsn: Lsn) -> str:
    """20 digits, so that names sort as numbers do."""
    return f"{lsn:0{LSN_DIGITS}d}"


def parse_lsn(text: str) -> Lsn:
    """The inverse of :func:`format_lsn`.

    Raises:
        ValueError: not 20 digits.
    """
    if len(text) != LSN_DIGITS or not (text.isascii() and text.isdigit()):
        raise ValueError(f"not an LSN of {LSN_DIGITS} digits: {text!r}")
    return Lsn(int(text))


def new_id() -> bytes:
    """16 random bytes (UUID version 4)."""
    return uuid.uuid4().bytes


def format_id(raw: bytes) -> str:
    """An id as people read it: a UUID, or ``-`` where there is none."""
    return str(uuid.UUID(bytes=raw)) if len(raw) == ID_BYTES else "-"


@dataclass(frozen=True, slots=True, kw_only=True)
class RealmInfo:
    """A realm as a server lists it; ``entries`` and ``bytes`` are as of its last checkpoint."""

    path: str
    version: int
    entries: int
    bytes: int


def check_realm_path(path: str) -> RealmPath:
    """``path`` if it is a well-formed realm path.

    Raises:
        BadRealmPath: with what is wrong with it.
    """
    remedy = "a realm path is / and segments of A-Z a-z 0-9 _ . - without a leading dot, such as /inventory"
    if not isinstance(path, str):
        raise BadRealmPath(f"bad realm path {path!r:.200}: it is no text", remedy=remedy)
    if len(path.encode("utf-8", "surrogatepass")) > REALM_PATH_BYTES_MAX:
        raise BadRealmPath(f"bad realm path: longer than {REALM_PATH_BYTES_MAX} bytes", remedy=remedy)
    if not path.startswith("/"):
        raise BadRealmPath(f"bad realm path {path!r}: it does not begin with /", remedy=remedy)
    for segment in path[1:].split("/"):
        # `~` stands alone as a segment: the user's own id.
        if segment != "~" and not _SEGMENT.match(segment):
            raise BadRealmPath(f"bad realm path {path!r}: bad segment {segment!r}", remedy=remedy)
    return RealmPath(path)


def is_system_realm(path: str) -> bool:
    """Whether a realm is the system's own: any segment begins with two underscores."""
    return "/__" in path


def check_key(key: bytes) -> None:
    """Refuses a key that is empty or too long, or not of bytes.

    Raises:
        BadKey: with the key's length.
    """
    if not isinstance(key, bytes):
        raise BadKey(f"bad key {key!r:.200}: it is {type(key).__name__}, not bytes", remedy=_KEY_REMEDY)
    if not 1 <= len(key) <= KEY_BYTES_MAX:
        raise BadKey(f"bad key of {len(key)} bytes: {key[:40]!r}", remedy=_KEY_REMEDY)
