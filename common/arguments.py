"""What a caller may pass: checked before anything is sent, so that a mistake is told in words and at once."""

from __future__ import annotations

from collections.abc import Sequence

from understudy.common.addresses import split_address
from understudy.common.errors import BadKey, UsageError
from understudy.common.types import Durability, check_key
from understudy.v1 import data_pb2

TIMEOUT_S_MAX = 1e9  # 31 years; gRPC takes much larger ones for ones that have passed
_LIMIT_MAX = (1 << 63) - 1


def parse_addresses(text: str) -> list[str]:
    """The addresses of ``"a:7850,b:7850"``.

    Raises:
        UsageError: one of them is not ``HOST:PORT``.
    """
    remedy = 'give HOST:PORT as text, or several with commas between them: "a:7850,b:7850"'
    if not isinstance(text, str):
        raise UsageError(f"bad addresses {text!r:.200}: no text", remedy=remedy)
    addresses = [part.strip() for part in text.split(",")]
    for address in addresses:
        _, port = split_address(address)
        if port == 0:
            raise UsageError(f"bad address {address!r}: nobody listens on port 0", remedy=remedy)
    return addresses


def check_timeout(timeout_s: float) -> None:
    """Refuses what is no time to wait; 0 means at once.

    Raises:
        UsageError: not a number, or negative, or without end.
    """
    is_number = isinstance(timeout_s, int | float) and not isinstance(timeout_s, bool)
    if not is_number or not 0 <= timeout_s <= TIMEOUT_S_MAX:  # NaN compares with nothing
        raise UsageError(
            f"bad timeout_s {timeout_s!r:.200}",
            remedy=f"give seconds, a number from 0 to {TIMEOUT_S_MAX:,.0f}",
        )


def check_timeout_or_none(timeout_s: float | None) -> None:
    """The same where None waits as long as it takes.

    Raises:
        UsageError: as above.
    """
    if timeout_s is not None:
        check_timeout(timeout_s)


def checked_keys(keys: Sequence[bytes]) -> list[bytes]:
    """The keys, each of a key's length.

    Raises:
        BadKey: one is not, or these are not several keys.
    """
    if isinstance(keys, bytes | str) or not hasattr(keys, "__iter__"):
        raise BadKey(f"not a list of keys: {keys!r:.200}", remedy="give a list of bytes")
    found = list(keys)
    for key in found:
        check_key(key)
    return found


def check_bounds(start: bytes, end: bytes) -> None:
    """Refuses bounds of a range that are not bytes.

    Raises:
        UsageError: naming which.
    """
    for name, bound in (("start", start), ("end", end)):
        if not isinstance(bound, bytes):
            raise UsageError(f"bad {name} {bound!r:.200}: not bytes", remedy='b"" means without bound')


def check_limit(limit: int | None) -> None:
    """Refuses what is no number of pairs.

    Raises:
        UsageError: it is negative, or no whole number.
    """
    if limit is None:
        return
    if isinstance(limit, bool) or not isinstance(limit, int) or not 0 <= limit <= _LIMIT_MAX:
        raise UsageError(f"bad limit {limit!r:.200}", remedy="give a whole number, or None for all pairs")


def parse_durability(name: str | None) -> data_pb2.Durability.ValueType:
    """The level of that name as it goes over the wire; None leaves it to the server.

    Raises:
        UsageError: there is none.
    """
    if name is None:
        return data_pb2.DURABILITY_UNSPECIFIED
    return data_pb2.Durability.ValueType(Durability.parse(name).value)
