"""Who asks, what each call requires, and what patterns of permissions mean. No I/O, no accounts: only the rules.

A caller is found by :mod:`understudy.common.access_interceptor`; what it may do is known to
:mod:`understudy.common.authority`. :data:`REQUIRES` has one row for each RPC, with a test that fails where one is
missing; a call that has none is refused.
"""

from __future__ import annotations

import enum
import math
import re
import urllib.parse
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass

from understudy.common.errors import UsageError
from understudy.common.types import REALM_PATH_BYTES_MAX, RealmPath

PATTERN_REMEDY = (
    "a pattern is a realm path in which * stands for any one segment, and ** at the end for any rest, "
    "such as /inventory/**"
)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]{0,99}\Z")
_PATTERN_SEGMENT = re.compile(r"(?:\*|[A-Za-z0-9_-][A-Za-z0-9_.-]*)\Z")


# -- who asks --------------------------------------------------------------------------------------------------


class Kind(enum.Enum):
    """What a caller has proved to be."""

    LOCAL = "local"  # on the data directory's Unix socket: whoever may open that may do everything
    OPEN = "open"  # in protected mode, where nothing is asked for
    ADMIN = "admin"  # an operator
    REPLICA = "replica"
    USER = "user"
    ANONYMOUS = "anonymous"


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """A caller. Its groups are looked up when they count, so that they count as they are then."""

    kind: Kind
    token: str = ""  # the id of the lasting token that was shown
    user: str = ""  # of a USER: its name
    user_id: str = ""  # the segment that `~` stands for
    session: str = ""  # the login that it rests on
    expires_s: float = math.inf  # seconds since 1970

    @property
    def is_operator(self) -> bool:
        """Whether it may do everything."""
        return self.kind in _OPERATORS

    def __str__(self) -> str:
        return f"user {self.user}" if self.kind is Kind.USER else self.kind.value


_OPERATORS = frozenset((Kind.LOCAL, Kind.OPEN, Kind.ADMIN))

ANONYMOUS = Principal(kind=Kind.ANONYMOUS)
LOCAL = Principal(kind=Kind.LOCAL)
OPEN = Principal(kind=Kind.OPEN)

_caller: ContextVar[Principal] = ContextVar("caller", default=ANONYMOUS)


def caller() -> Principal:
    """Who makes the call that is being answered; who has shown nothing, where nobody has looked."""
    return _caller.get()


def set_caller(principal: Principal) -> None:
    """For the rest of the call that is being answered; each has a context of its own."""
    _caller.set(principal)


# -- the door --------------------------------------------------------------------------------------------------


def peer_host(peer: str) -> str:
    """The address in gRPC's ``ipv4:127.0.0.1:1234`` or ``ipv6:[::1]:1234``; the whole where it is neither."""
    text = urllib.parse.unquote(peer)
    family, _, rest = text.partition(":")
    return rest.rpartition(":")[0].strip("[]") if family in ("ipv4", "ipv6") else text


class Door(enum.Enum):
    """What is asked of a peer before anything else."""

    LOCAL = "local"  # nothing, it may do everything
    OPEN = "open"  # nothing: protected mode
    PROOF = "proof"  # a token or a certificate
    CLOSED = "closed"


def door(*, unix: bool, loopback: bool, tls: bool, accounts: bool) -> Door:
    """What is asked of a peer (G10).

    Args:
        unix: it comes by the data directory's Unix socket.
        loopback: it comes from this machine.
        tls: the server speaks TLS.
        accounts: somebody has made a user, a permission or a token here.
    """
    if unix:
        return Door.LOCAL
    if tls or accounts:
        return Door.PROOF
    return Door.OPEN if loopback else Door.CLOSED


# -- what calls require ----------------------------------------------------------------------------------------


class Requires(enum.Enum):
    """What a caller must have proved. Behind READ, WRITE, MANAGE and SELF the service looks at what is asked for."""

    NOTHING = "nothing"
    ANY = "any principal"
    READ = "permission to read the realm"
    WRITE = "permission to write the realm"
    MANAGE = "permission to manage the realm"
    SELF = "to be that user, or an operator"
    REPLICA = "a replica's token or certificate"
    ADMIN = "an operator's token"


# What whoever calls can do about it.
REMEDIES: Mapping[Requires, str] = {
    Requires.REPLICA: "give --token @FILE with a token of `understudy token issue --replica`, or a replica's "
    "certificate with --cert and --cert-key",
    Requires.ADMIN: "give --token @FILE with an operator's token: admin-token in the data directory holds one, and "
    "`understudy token issue --admin` makes more",
}
USER_REMEDY = "give --token @FILE with a user's token, of `understudy token login`, or an operator's"

_OF_USERS = frozenset((Requires.READ, Requires.WRITE, Requires.MANAGE, Requires.SELF))

REQUIRES: Mapping[str, Requires] = {
    "/understudy.v1.Data/Commit": Requires.WRITE,
    "/understudy.v1.Data/Get": Requires.READ,
    "/understudy.v1.Data/Scan": Requires.READ,
    "/understudy.v1.Data/Count": Requires.READ,
    "/understudy.v1.Data/Realms": Requires.READ,
    "/understudy.v1.Data/DropRealm": Requires.MANAGE,
    "/understudy.v1.Sync/Sync": Requires.READ,
    "/understudy.v1.Sync/Salvage": Requires.ADMIN,
    "/understudy.v1.Replication/Follow": Requires.REPLICA,
    "/understudy.v1.Replication/PinSnapshot": Requires.REPLICA,
    "/understudy.v1.Replication/DigestSnapshot": Requires.REPLICA,
    "/understudy.v1.Replication/ReadSnapshot": Requires.REPLICA,
    "/understudy.v1.Replication/ReleaseSnapshot": Requires.REPLICA,
    "/understudy.v1.Admin/Status": Requires.ANY,
    "/understudy.v1.Admin/Promote": Requires.ADMIN,
    "/understudy.v1.Admin/Fence": Requires.ADMIN,
    "/understudy.v1.Admin/Freeze": Requires.ADMIN,
    "/understudy.v1.Admin/Thaw": Requires.ADMIN,
    "/understudy.v1.Admin/StartBackup": Requires.ADMIN,
    "/understudy.v1.Admin/CancelBackup": Requires.ADMIN,
    "/understudy.v1.Admin/WatchBackup": Requires.ADMIN,
    "/understudy.v1.Admin/Forget": Requires.ADMIN,
    "/understudy.v1.Admin/StateDigests": Requires.ADMIN,
    "/understudy.v1.Accounts/Login": Requires.NOTHING,
    "/understudy.v1.Accounts/Refresh": Requires.NOTHING,
    "/understudy.v1.Accounts/Logout": Requires.NOTHING,
    "/understudy.v1.Accounts/PutUser": Requires.ADMIN,
    "/understudy.v1.Accounts/RemoveUser": Requires.ADMIN,
    "/understudy.v1.Accounts/ListUsers": Requires.ADMIN,
    "/understudy.v1.Accounts/SetPassword": Requires.SELF,
    "/understudy.v1.Accounts/Grant": Requires.ADMIN,
    "/understudy.v1.Accounts/RevokeGrant": Requires.ADMIN,
    "/understudy.v1.Accounts/ListGrants": Requires.ADMIN,
    "/understudy.v1.Accounts/IssueToken": Requires.ADMIN,
    "/understudy.v1.Accounts/RevokeToken": Requires.ADMIN,
    "/understudy.v1.Accounts/ListTokens": Requires.ADMIN,
    "/understudy.v1.Accounts/RotateKeys": Requires.ADMIN,
    "/understudy.v1.Accounts/SetPolicy": Requires.ADMIN,
    # What orchestrators ask without a word; and what tools ask who want to know what can be asked.
    "/grpc.health.v1.Health/Check": Requires.NOTHING,
    "/grpc.health.v1.Health/List": Requires.NOTHING,
    "/grpc.health.v1.Health/Watch": Requires.NOTHING,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Requires.ANY,
}


def meets(principal: Principal, requires: Requires) -> bool:
    """Whether a caller may make a call at all."""
    if requires is Requires.NOTHING or principal.is_operator:
        return True
    if requires is Requires.ANY:
        return principal.kind is not Kind.ANONYMOUS
    if requires is Requires.REPLICA:
        return principal.kind is Kind.REPLICA
    return requires in _OF_USERS and principal.kind is Kind.USER


# -- permissions -----------------------------------------------------------------------------------------------


class Level(enum.IntEnum):
    """What may be done with a realm, each with all that comes before it; the numbers are those of the wire."""

    NONE = 0
    READ = 1
    WRITE = 2
    MANAGE = 3

    @classmethod
    def parse(cls, name: str) -> Level:
        """The level of that name in lower case; not ``none``.

        Raises:
            UsageError: there is none.
        """
        level = cls.__members__.get(name.upper(), cls.NONE)
        if level is cls.NONE:
            raise UsageError(f"no level {name!r}", remedy="choose read, write or manage")
        return level


def is_name(name: str) -> bool:
    """Whether this can name a user or a group."""
    return _NAME.match(name) is not None


def check_name(name: str, what: str) -> None:
    """Refuses what can't name a user or a group.

    Raises:
        UsageError.
    """
    if not is_name(name):
        raise UsageError(
            f"bad {what} name {name!r:.120}",
            remedy="give 1 to 100 of A-Z a-z 0-9 _ . @ + - that begin with a letter, a digit or _",
        )


def check_pattern(pattern: str) -> None:
    """Refuses what is no pattern of realm paths.

    Raises:
        UsageError.
    """
    if not pattern.startswith("/") or len(pattern.encode("utf-8", "surrogatepass")) > REALM_PATH_BYTES_MAX:
        raise UsageError(f"bad pattern {pattern!r:.300}", remedy=PATTERN_REMEDY)
    *segments, last = pattern[1:].split("/")
    bad = [one for one in segments if not _PATTERN_SEGMENT.match(one)]
    if bad or not (last == "**" or _PATTERN_SEGMENT.match(last)):
        raise UsageError(
            f"bad pattern {pattern!r}: bad segment {(bad or [last])[0]!r}", remedy=PATTERN_REMEDY
        )
    if "/__" in pattern:
        raise UsageError(f"bad pattern {pattern!r}: realms with __ are the system's own")


def matches(pattern: str, path: str) -> bool:
    """Whether ``pattern`` holds ``path``: ``*`` is any one segment, ``**`` any rest, also none."""
    wanted, found = pattern[1:].split("/"), path[1:].split("/")
    if wanted[-1] == "**":
        wanted.pop()
        found = found[: len(wanted)]
    return len(wanted) == len(found) and all(
        one in ("*", other) for one, other in zip(wanted, found, strict=True)
    )


def resolve_path(principal: Principal, path: str) -> RealmPath:
    """``path`` as the log has it: ``~`` is the caller's own id, and stays where the caller has none."""
    if not principal.user_id or "/~" not in path:
        return RealmPath(path)
    return RealmPath("/".join(principal.user_id if one == "~" else one for one in path.split("/")))
