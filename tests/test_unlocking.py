"""What opens encrypted archives: passphrases as they were given, and sources that fail while they are read."""

from __future__ import annotations

import io
from pathlib import Path

import pyrage
import pytest

from understudy.backup.encryption import Encryption, Unlocking, peekable
from understudy.backup.policy import read_passphrase
from understudy.common.errors import CorruptionError, RepositoryError, UsageError

SIZE = 3 << 20
SECRET_KEY = "AGE-SECRET-KEY-1" + 10 * "HIDDEN"


class FailingSource(io.BytesIO):
    """A download that breaks off."""

    def __init__(self, data: bytes, room: int, error: Exception) -> None:
        super().__init__(data)
        self._room = room
        self._error = error

    def read(self, count: int | None = -1, /) -> bytes:
        """Fails behind so many bytes."""
        if self.tell() >= self._room:
            raise self._error
        return super().read(count)


def read_all(stream: object, expected: int) -> None:
    """As a restore does: what ends early is damaged."""
    found = 0
    while piece := stream.read(1 << 16):  # type: ignore[attr-defined]
        found += len(piece)
    if found < expected:
        raise CorruptionError("it was cut off")


@pytest.mark.parametrize("error", [RepositoryError("timed out"), OSError("timed out")], ids=["ours", "os"])
@pytest.mark.parametrize("share", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("is_cut_noticed", [True, False])
def test_a_source_that_can_not_be_read_is_not_damaged(
    error: Exception, share: float, is_cut_noticed: bool
) -> None:
    """G11: of an archive for recipients that breaks off while it is read, nobody says that it is damaged."""
    key = pyrage.x25519.Identity.generate()
    whole = io.BytesIO()
    with Encryption("", (str(key.to_public()),)).encrypting(whole) as out:
        out.write(bytes(SIZE))
    source = FailingSource(whole.getvalue(), int(SIZE * share), error)
    unlocking = Unlocking(identities=(key,))
    with pytest.raises(type(error)) as raised, unlocking.decrypting(peekable(source), "it") as stream:
        read_all(stream, SIZE if is_cut_noticed else 0)
    assert raised.value is error


@pytest.mark.parametrize(
    "given",
    [
        SECRET_KEY,
        f" {SECRET_KEY.lower()}",
        f"age1 {SECRET_KEY}",
        "-----BEGIN OPENSSH PRIVATE KEY-----\nhidden",
    ],
)
def test_a_secret_key_in_a_recipients_place_is_not_shown(given: str) -> None:
    """G10: however it was pasted, with what to give instead."""
    with pytest.raises(UsageError, match=r"is a secret key .*age-keygen -y") as caught:
        Encryption("", (given,)).check()
    assert "hidden" not in str(caught.value).lower()


def test_what_does_not_begin_as_a_public_key_is_not_shown() -> None:
    """G10: it may be a passphrase; a public key with a mistake in it is."""
    with pytest.raises(UsageError, match="is no recipient") as caught:
        Encryption("", ("correct horse",)).check()
    assert "horse" not in str(caught.value)
    for given in ("age1nobody", "ssh-nothing"):
        with pytest.raises(UsageError, match=f"'{given}' is no recipient"):
            Encryption("", (given,)).check()


def private(path: Path, data: bytes) -> Path:
    """A file that nobody else may read."""
    path.touch(mode=0o600)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "passphrase", ["correct horse\x0bbattery", "a\x1cb", "a\x85b", "a\u2028b", " a b ", "a\rb"]
)
@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\nmore"])
def test_a_passphrase_is_the_whole_first_line(tmp_path: Path, passphrase: str, end: str) -> None:
    """G10: nothing of it is left out, so that other tools open the archive with the same line."""
    assert read_passphrase(private(tmp_path / "file", (passphrase + end).encode())) == passphrase


@pytest.mark.parametrize("data", [b"\xff\xfe\x00key", b"correct \x85 horse\n"])
def test_a_passphrase_that_is_no_text_is_refused(tmp_path: Path, data: bytes) -> None:
    """G10: a file of random bytes is not taken for a passphrase of fewer ones."""
    with pytest.raises(UsageError, match="no text"):
        read_passphrase(private(tmp_path / "file", data))
