"""Tokens, as they travel. Two kinds, both shown as ``authorization: Bearer TOKEN``:

* **Access tokens**: JSON Web Tokens (RFC 7519) signed with Ed25519 (``alg: EdDSA``, RFC 8037), good for minutes. Only
  what this module writes is read: one algorithm, exactly these claims, a key that is known by its id.
* **Lasting tokens**: ``understudy-KIND-ID-SECRET``. Their 256 random bits are kept as a SHA-256, and looked up by ID.
  Refresh tokens are such, too; they are good for nothing but new tokens.
"""

from __future__ import annotations

import base64
import binascii
import enum
import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from understudy.common.errors import NotAuthenticated

ACCESS_S = 15 * 60.0
REFRESH_S = 30 * 86400.0
LEEWAY_S = 30.0  # between the clocks of an old primary and the one that was promoted
RETIRED_KEY_S = (
    ACCESS_S + 2 * LEEWAY_S
)  # what a key has signed has expired so long after the next one took over
TOKEN_BYTES_MAX = 4096
LOGIN_AGAIN = "log in again: `understudy token login`"

_TIME_S_MAX = 1 << 53  # beyond it, seconds are no float any more
_SEGMENT = re.compile(r"[A-Za-z0-9_-]+\Z")
_KEY_ID = re.compile(r"[A-Za-z0-9]{1,64}\Z")
_LASTING = re.compile(r"understudy-([a-z]+)-([0-9a-f.]{1,80})-([A-Za-z0-9_-]{43})\Z")


# -- access tokens ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Claims:
    """What an access token says."""

    user: str  # "sub": the name
    user_id: str  # "uid"
    session: str  # "sid": the login it belongs to
    issuer: str  # "iss": the cluster
    issued_s: int  # "iat": seconds since 1970
    expires_s: int  # "exp"
    id: str  # "jti"


_NAMES = {
    "sub": "user",
    "uid": "user_id",
    "sid": "session",
    "iss": "issuer",
    "iat": "issued_s",
    "exp": "expires_s",
    "jti": "id",
}


def sign_token(claims: Claims, *, key_id: str, private: bytes) -> str:
    """An access token; ``private`` is the key's 32 bytes."""
    header = {"alg": "EdDSA", "typ": "JWT", "kid": key_id}
    body = {name: getattr(claims, field) for name, field in _NAMES.items()}
    signed = f"{_encoded_json(header)}.{_encoded_json(body)}"
    signature = Ed25519PrivateKey.from_private_bytes(private).sign(signed.encode())
    return f"{signed}.{_encoded(signature)}"


def read_token(token: str, *, public_key: Callable[[str], bytes | None], issuer: str, now_s: float) -> Claims:
    """What a token says that is genuine and good now.

    Args:
        token: as it was shown.
        public_key: gives the 32 bytes of the key of an id, or None.
        issuer: the only one whose tokens are taken.
        now_s: seconds since 1970.

    Raises:
        NotAuthenticated: it is not.
    """
    parts = token.split(".")
    if len(token) > TOKEN_BYTES_MAX or len(parts) != 3 or not all(map(_SEGMENT.match, parts)):
        raise _bad("it is none")
    header, claims = _decoded_json(parts[0]), _decoded_json(parts[1])
    if header.get("alg") != "EdDSA" or header.get("typ") != "JWT" or set(header) != {"alg", "typ", "kid"}:
        raise _bad("its algorithm is not EdDSA")
    key_id = header["kid"]
    # Nobody has vouched for it yet: it must not be looked up whatever it is.
    key = public_key(key_id) if isinstance(key_id, str) and _KEY_ID.match(key_id) else None
    if key is None:
        raise _bad("its key is not known here")
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(_decoded(parts[2]), f"{parts[0]}.{parts[1]}".encode())
    except InvalidSignature:
        raise _bad("its signature is wrong") from None
    return _checked(_claims(claims), issuer=issuer, now_s=now_s)


def _checked(claims: Claims, *, issuer: str, now_s: float) -> Claims:
    if claims.issuer != issuer:
        raise _bad("another cluster has issued it")
    if claims.expires_s > claims.issued_s + ACCESS_S:  # whoever has stolen a key must not make one that lasts
        raise _bad("it is good for longer than those of this server")
    check_time(claims, now_s=now_s)
    return claims


def check_time(claims: Claims, *, now_s: float) -> None:
    """Refuses what is not good yet, or no more.

    Raises:
        NotAuthenticated.
    """
    if now_s >= claims.expires_s + LEEWAY_S:
        raise _bad("it has expired")
    if claims.issued_s > now_s + LEEWAY_S:
        raise _bad("it was issued in the future: compare the clocks of the servers")


def _claims(claims: dict[str, object]) -> Claims:
    if set(claims) != set(_NAMES):
        raise _bad("it says something else than tokens of this server")
    for name, value in claims.items():
        if type(value) is not (int if name in ("iat", "exp") else str):
            raise _bad(f"bad claim {name}")
        if isinstance(value, int) and not 0 <= value < _TIME_S_MAX:
            raise _bad(f"bad claim {name}")
    return Claims(**{_NAMES[name]: value for name, value in claims.items()})  # type: ignore[arg-type]


def _bad(why: str) -> NotAuthenticated:
    return NotAuthenticated(f"the token is worth nothing: {why}", remedy=LOGIN_AGAIN)


def _encoded_json(value: Mapping[str, object]) -> str:
    return _encoded(json.dumps(value, separators=(",", ":")).encode())


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decoded(text: str) -> bytes:
    try:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except (ValueError, binascii.Error):
        raise _bad("it is none") from None
    if _encoded(data) != text:  # the last character has bits to spare: one token must not have two spellings
        raise _bad("it is none")
    return data


def _decoded_json(text: str) -> dict[str, object]:
    try:
        value = json.loads(_decoded(text))
    except (ValueError, RecursionError):
        raise _bad("it is none") from None
    if not isinstance(value, dict):
        raise _bad("it is none")
    return value


def new_signing_key() -> tuple[bytes, bytes]:
    """A new key: its private and its public 32 bytes."""
    key = Ed25519PrivateKey.generate()
    return key.private_bytes_raw(), key.public_key().public_bytes_raw()


# -- lasting tokens --------------------------------------------------------------------------------------------


class Lasting(enum.StrEnum):
    """The kinds of lasting tokens, as their text names them."""

    ADMIN = "admin"
    REPLICA = "replica"
    APP = "app"
    REFRESH = "refresh"


@dataclass(frozen=True, slots=True)
class LastingToken:
    """A lasting token, taken apart; ``secret`` is never kept."""

    kind: Lasting
    id: str
    secret: str = field(repr=False)

    def __str__(self) -> str:
        return f"understudy-{self.kind}-{self.id}-{self.secret}"

    @property
    def hash(self) -> bytes:
        """What is kept of it. Its secret is random, so that no slow function is needed."""
        return hashlib.sha256(self.secret.encode()).digest()

    def is_of(self, kept: bytes) -> bool:
        """Whether ``kept`` is its hash."""
        return hmac.compare_digest(self.hash, kept)

    @classmethod
    def new(cls, kind: Lasting, token_id: str = "") -> LastingToken:
        """A new secret, under a new id if none is given."""
        return cls(kind, token_id or new_token_id(), secrets.token_urlsafe(32))

    @classmethod
    def read(cls, text: str) -> LastingToken | None:
        """The token that ``text`` is, or None where it is of another kind, or of none."""
        found = _LASTING.match(text)
        kind = Lasting.__members__.get(found[1].upper()) if found else None
        return cls(kind, found[2], found[3]) if found and kind else None


def new_token_id() -> str:
    """A new id for a token, a login or a key: 16 hexadecimal digits."""
    return secrets.token_hex(8)
