"""Which tokens are taken, and every way to forge one that is not."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from understudy.common.errors import NotAuthenticated
from understudy.common.tokens import (
    LEEWAY_S,
    Claims,
    Lasting,
    LastingToken,
    new_signing_key,
    read_token,
    sign_token,
)

NOW_S = 1_800_000_000
PRIVATE, PUBLIC = new_signing_key()
CLAIMS = Claims(
    user="ann", user_id="a1", session="5e", issuer="cluster", issued_s=NOW_S, expires_s=NOW_S + 900, id="1"
)
TOKEN = sign_token(CLAIMS, key_id="k1", private=PRIVATE)


def _read(token: str, *, now_s: float = NOW_S, issuer: str = "cluster") -> Claims:
    return read_token(token, public_key={"k1": PUBLIC}.get, issuer=issuer, now_s=now_s)


def _encoded(value: Any) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _forged(*, header: Any = None, claims: Any = None, signature: bytes | None = None) -> str:
    """A token that is genuine but for what is given, signed with the right key all the same."""
    genuine = json.loads(base64.urlsafe_b64decode(TOKEN.split(".")[1] + "=="))
    parts = [
        _encoded(header if header is not None else {"alg": "EdDSA", "typ": "JWT", "kid": "k1"}),
        _encoded(claims(genuine) if claims else genuine),
    ]
    signed = ".".join(parts)
    made = Ed25519PrivateKey.from_private_bytes(PRIVATE).sign(signed.encode())
    return f"{signed}.{_encoded(made if signature is None else signature)}"


def test_a_genuine_token_is_taken() -> None:
    """What was signed comes out again, and so does a token that the tests make by hand."""
    assert _read(TOKEN) == CLAIMS
    assert _read(_forged()) == CLAIMS


@pytest.mark.parametrize(
    "token",
    [
        "",
        "a.b",
        "a.b.c.d",
        TOKEN + "=",
        TOKEN.replace(".", "..", 1),
        TOKEN + "A" * 5_000,
        "\n" + TOKEN,
        _forged(header={"alg": "none", "typ": "JWT", "kid": "k1"}, signature=b""),
        _forged(header={"alg": "none", "typ": "JWT", "kid": "k1"}),
        _forged(header={"alg": "HS256", "typ": "JWT", "kid": "k1"}),
        _forged(header={"alg": "EdDSA", "typ": "JWT", "kid": "k2"}),
        _forged(header={"alg": "EdDSA", "typ": "JWT", "kid": 1}),
        _forged(header={"alg": "EdDSA", "typ": "JWT", "kid": ["k1"]}),
        _forged(header={"alg": "EdDSA", "typ": "JWT"}),
        _forged(header={"alg": "EdDSA", "typ": "JWT", "kid": "k1", "crit": ["b64"], "b64": False}),
        _forged(header={"alg": "EdDSA", "typ": "JWT", "kid": "k1", "jwk": {"x": "mine"}}),
        _forged(header=[]),
        _forged(header=b"["),
        _forged(header=b"[" * 2_000),
        _forged(claims=lambda claims: {**claims, "adm": True}),
        _forged(claims=lambda claims: {name: claims[name] for name in claims if name != "exp"}),
        _forged(claims=lambda claims: {**claims, "exp": "9999999999"}),
        _forged(claims=lambda claims: {**claims, "exp": 1e12}),
        _forged(claims=lambda claims: {**claims, "exp": True}),
        _forged(claims=lambda claims: {**claims, "sub": None}),
        _forged(claims=lambda claims: [claims]),
        _forged(signature=bytes(64)),
        _forged(signature=b""),
        sign_token(CLAIMS, key_id="k1", private=new_signing_key()[0]),
        sign_token(replace(CLAIMS, issuer="other"), key_id="k1", private=PRIVATE),
    ],
)
def test_g10_what_is_not_genuine_is_worth_nothing(token: str) -> None:
    """G10: no algorithm but ours, no key but those known, no claim more or less, no other cluster."""
    with pytest.raises(NotAuthenticated):
        _read(token)


@pytest.mark.parametrize("character", "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")
def test_g10_a_token_has_one_spelling(character: str) -> None:
    """G10: the last character has bits that say nothing; a token with others there is another token."""
    changed = TOKEN[:-1] + character
    if changed != TOKEN:
        with pytest.raises(NotAuthenticated):
            _read(changed)


@given(st.integers(0, len(TOKEN) - 1), st.sampled_from("ABCxyz019-_."))
def test_g10_every_character_counts(at: int, character: str) -> None:
    """G10: a token that differs in any character is another one."""
    changed = TOKEN[:at] + character + TOKEN[at + 1 :]
    if changed != TOKEN:
        with pytest.raises(NotAuthenticated):
            _read(changed)


def test_a_token_is_good_for_its_time() -> None:
    """It is taken until it expires, and a little longer for clocks that differ; and not before it was issued."""
    assert _read(TOKEN, now_s=CLAIMS.expires_s + LEEWAY_S - 1)
    assert _read(TOKEN, now_s=CLAIMS.issued_s - LEEWAY_S)
    for now_s in (CLAIMS.expires_s + LEEWAY_S, CLAIMS.issued_s - LEEWAY_S - 1):
        with pytest.raises(NotAuthenticated):
            _read(TOKEN, now_s=now_s)


@pytest.mark.parametrize("kind", Lasting)
def test_a_lasting_token_is_read_as_it_was_made(kind: Lasting) -> None:
    """Its text names its kind and id, and its hash is that of its secret alone."""
    token = LastingToken.new(kind)
    assert LastingToken.read(str(token)) == token
    assert token.is_of(token.hash)
    assert not LastingToken.new(kind, token.id).is_of(token.hash)
    assert token.secret.encode() not in token.hash


@pytest.mark.parametrize(
    "text",
    [
        "",
        TOKEN,
        "understudy-root-ab-" + "x" * 43,
        "understudy-admin-a/b-" + "x" * 43,
        "understudy-admin-ab-x",
    ],
)
def test_what_is_no_lasting_token(text: str) -> None:
    """Another kind, an id that could be another key, or too short a secret is none."""
    assert LastingToken.read(text) is None
    assert LastingToken.read(str(LastingToken.new(Lasting.ADMIN)) + "\n") is None


def test_a_key_id_is_not_looked_up_whatever_it_is() -> None:
    """What an unsigned header says is no text of any length and kind to search for."""
    asked: list[str] = []
    for key_id in ("\ud800", "k" * 600, "a/b", ""):
        token = _forged(header={"alg": "EdDSA", "typ": "JWT", "kid": key_id})
        with pytest.raises(NotAuthenticated):
            read_token(token, public_key=asked.append, issuer="cluster", now_s=NOW_S)  # type: ignore[func-returns-value]
    assert not asked


def test_g10_a_token_is_good_for_minutes_whoever_signed_it() -> None:
    """G10: who has come by a signing key can't make a token that outlives the key."""
    lasting = replace(CLAIMS, expires_s=CLAIMS.issued_s + 10 * 365 * 86_400)
    with pytest.raises(NotAuthenticated):
        _read(sign_token(lasting, key_id="k1", private=PRIVATE))


def test_a_secret_is_not_in_what_a_trace_shows() -> None:
    """The text for debugging names a token without telling it."""
    token = LastingToken.new(Lasting.ADMIN)
    assert token.secret not in repr(token)
