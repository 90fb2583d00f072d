"""How passwords are kept, and that checking them can't be used to stop a server."""

from __future__ import annotations

import asyncio

import pytest

from understudy.common import passwords
from understudy.common.errors import CorruptionError, Overloaded, UsageError
from understudy.common.passwords import Hasher, hash_password, is_outdated, is_password
from understudy.v1 import accounts_pb2


@pytest.fixture(autouse=True)
def _cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashes in a millisecond."""
    monkeypatch.setattr(passwords, "N", 16)


def test_a_password_is_told_from_others() -> None:
    """Only the password itself is taken, and what is kept of it never holds it."""
    row = hash_password("correct horse")
    assert is_password("correct horse", row)
    assert not is_password("correct horsE", row)
    assert not is_password("", row)
    assert b"correct horse" not in row.SerializeToString()


def test_two_users_with_one_password_have_nothing_in_common() -> None:
    """A hash is salted, so that it tells nothing about others."""
    one, other = hash_password("same password"), hash_password("same password")
    assert one.salt != other.salt
    assert one.hash != other.hash


def test_parameters_are_those_of_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A password is checked with the parameters that it was hashed with, and known to be outdated by new ones."""
    row = hash_password("correct horse")
    assert not is_outdated(row)
    monkeypatch.setattr(passwords, "N", 32)
    assert is_password("correct horse", row)
    assert is_outdated(row)


def test_g10_nobody_s_password_is_never_right() -> None:
    """G10: where there is no user, the answer is no, whatever is tried."""
    assert not is_password("", None)
    assert not is_password("correct horse", None)


@pytest.mark.parametrize("row", [{"kdf": "md5"}, {"kdf": "scrypt", "n": 3, "r": 8, "p": 1}, {}])
def test_g10_a_row_that_can_t_be_used_lets_nobody_in(row: dict[str, object]) -> None:
    """G10: unknown functions and parameters are an error, never a yes."""
    with pytest.raises(CorruptionError):
        is_password("", accounts_pb2.Password(**row))  # type: ignore[arg-type]


@pytest.mark.parametrize("password", ["", "short", "x" * 1025, "é" * 513])
def test_new_passwords_have_a_length(password: str) -> None:
    """Nobody can choose a password that is guessed at once, or one that takes long to read."""
    with pytest.raises(UsageError):
        asyncio.run(Hasher().hash(password))


@pytest.mark.parametrize("longest", ["x" * 1024, "é" * 512])
def test_g10_a_longer_password_is_another_one(longest: str) -> None:
    """G10: one that goes on behind the longest that can be chosen is wrong, and is not cut to be right."""

    async def story() -> tuple[bool, bool]:
        hasher = Hasher()
        row = await hasher.hash(longest)
        return await hasher.check(longest, row), await hasher.check(longest + "y", row)

    assert asyncio.run(story()) == (True, False)


def test_g9_few_passwords_are_hashed_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """G9: each takes memory, so that only so many run and wait; the next are refused, and the rest goes on."""
    monkeypatch.setattr(passwords, "WAITING_MAX", 3)
    running, most = 0, 0

    async def slow(function: object, *arguments: object) -> bool:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await started.wait()
        running -= 1
        return True

    monkeypatch.setattr(passwords.asyncio, "to_thread", slow)

    async def story() -> list[object]:
        hasher = Hasher()
        attempts = [asyncio.create_task(hasher.check("x", None)) for _ in range(10)]
        await asyncio.wait(attempts, return_when=asyncio.FIRST_EXCEPTION)
        started.set()
        return await asyncio.gather(*attempts, return_exceptions=True)

    started = asyncio.Event()
    answers = asyncio.run(story())
    assert most == passwords.HASHING_MAX
    assert sum(answer is True for answer in answers) == passwords.HASHING_MAX + 3
    assert sum(isinstance(answer, Overloaded) for answer in answers) == 5
