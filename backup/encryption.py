"""What a backup is encrypted with, and what opens it: passphrases, age's keys, SSH keys.

Asked for and not possible is an error, never plaintext (G10).
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import pyrage

from understudy.backup.age_passphrase import INTRO, PassphraseReader, PassphraseWriter
from understudy.backup.sinks import Sink, Stream
from understudy.common.errors import (
    OTHER_BACKUP,
    CorruptionError,
    NotPermitted,
    StorageFailed,
    UnderstudyError,
    UsageError,
)
from understudy.common.files import storage_errors

_PIECE_BYTES = 1 << 20
_SCRYPT_STANZA = b"-> scrypt "
_KEY_FILE_BYTES_MAX = 1 << 20
_SECRET_KEY_MARKS = ("AGE-SECRET-KEY", "PRIVATE KEY")  # age's, and those of SSH in PEM
_PUBLIC_KEY_STARTS = ("age1", "ssh-")

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Encryption:
    """Either a passphrase or recipients, any of whom can open what is encrypted."""

    passphrase: str = field(default="", repr=False)
    recipients: tuple[str, ...] = ()  # ``age1…`` or ``ssh-…``

    def check(self) -> None:
        """Refuses what can't encrypt.

        Raises:
            UsageError: neither or both are given, or a recipient is none.
        """
        if bool(self.passphrase) == bool(self.recipients):
            raise UsageError("give either a passphrase or recipients", remedy="age can't mix them")
        for recipient in self.recipients:
            _parse_recipient(recipient)

    @contextlib.contextmanager
    def encrypting(self, out: Sink) -> Iterator[Sink]:
        """A file to write plaintext to, which comes out at ``out`` encrypted; whole when the block has ended.

        Raises:
            UsageError: see :meth:`check`.
            OSError: ``out`` can't be written.
        """
        self.check()
        if self.passphrase:
            writer = PassphraseWriter(out, self.passphrase)
            yield writer
            writer.finish()
            return
        recipients = [_parse_recipient(recipient) for recipient in self.recipients]
        sink: Any = _Remembering(out)
        try:
            with _pumped_out(lambda source: pyrage.encrypt_io(source, sink, recipients)) as file:
                yield file
        except pyrage.EncryptError as error:
            raise sink.error or StorageFailed(f"can't encrypt: {error}") from error
        # What went wrong when the last bytes were handed on is not always told.
        if sink.error is not None:
            raise sink.error


@dataclass(frozen=True, slots=True)
class Unlocking:
    """What may open an encrypted backup."""

    passphrases: tuple[str, ...] = field(default=(), repr=False)
    identities: tuple[Any, ...] = field(default=(), repr=False)  # of pyrage

    @classmethod
    def given(cls, *, passphrases: Sequence[str], identity_files: Sequence[Path]) -> Unlocking:
        """Reads the files of keys, age's or SSH's.

        Raises:
            UsageError: a file holds none.
            StorageFailed: it can't be read.
        """
        identities = tuple(identity for path in identity_files for identity in _read_identities(path))
        return cls(tuple(passphrases), identities)

    @contextlib.contextmanager
    def decrypting(self, source: io.BufferedReader, name: object) -> Iterator[Stream]:
        """A file to read the plaintext of ``source`` from.

        What was read counts only when the block ends without an error: only then was all of it authenticated.

        Args:
            source: at its beginning.
            name: what error messages call it.

        Raises:
            NotPermitted: it does not open with what is given.
            CorruptionError: it was changed or cut off.
            and what ``source`` raises when it is read.
        """
        if _is_for_passphrase(source):
            if not self.passphrases:
                raise NotPermitted(f"{name} needs a passphrase", remedy="give it with --passphrase-file")
            yield PassphraseReader(source, self.passphrases, name)
            return
        if not self.identities:
            raise NotPermitted(f"{name} is encrypted for recipients", remedy="give a key with --identity")
        encrypted: Any = _Remembering(source)
        try:
            with _pumped_in(lambda out: pyrage.decrypt_io(encrypted, out, list(self.identities))) as file:
                yield file
        except Exception as error:
            # Where reading fails, the stream ends early, and whoever reads it takes it for damaged.
            if encrypted.error is not None:
                raise encrypted.error from error
            if isinstance(error, pyrage.DecryptError | _PumpFailed):
                raise _unopened(error, name) from error
            raise


def _unopened(error: Exception, name: object) -> UnderstudyError:
    if isinstance(error, _PumpFailed):
        return CorruptionError(f"{name} is damaged: {error.__cause__}", remedy=OTHER_BACKUP)
    if "No matching keys" in str(error):
        return NotPermitted(f"{name} does not open with these keys")
    return CorruptionError(f"{name} is damaged: {error}", remedy=OTHER_BACKUP)


def is_encrypted(source: io.BufferedReader) -> bool:
    """Whether what begins at the present place of ``source`` is a file of age's; it stays there."""
    return _begins_with(source, INTRO)


def _is_for_passphrase(source: io.BufferedReader) -> bool:
    return _begins_with(source, INTRO + _SCRYPT_STANZA)


def _begins_with(source: io.BufferedReader, wanted: bytes) -> bool:
    return source.peek(len(wanted))[: len(wanted)] == wanted


def peekable(source: IO[bytes]) -> io.BufferedReader:
    """The same file, of which the beginning can be looked at."""
    return source if isinstance(source, io.BufferedReader) else io.BufferedReader(_Raw(source), _PIECE_BYTES)


class _Raw(io.RawIOBase):
    """What :class:`io.BufferedReader` reads from, over any file."""

    def __init__(self, source: IO[bytes]) -> None:
        self._source = source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._source.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def holds_secret_key(text: str) -> bool:
    """Whether a text is a secret key, or has one in it: errors and logs must not."""
    return any(mark in text.upper() for mark in _SECRET_KEY_MARKS)


def _parse_recipient(text: str) -> Any:
    try:
        if text.startswith("ssh-"):
            return pyrage.ssh.Recipient.from_str(text)
        return pyrage.x25519.Recipient.from_str(text)
    except pyrage.RecipientError as error:
        if holds_secret_key(text):
            raise UsageError(
                "a recipient is a secret key", remedy="give its public key; `age-keygen -y FILE` shows that"
            ) from None
        # What does not begin as a key does may be a passphrase.
        shown = repr(text) if text.startswith(_PUBLIC_KEY_STARTS) else "what is given as one"
        raise UsageError(
            f"{shown} is no recipient: {error}",
            remedy="give an age public key (age1…) or an SSH one (ssh-…)",
        ) from error


def _read_identities(path: Path) -> list[Any]:
    with storage_errors("read", path), path.open("rb") as file:
        data = file.read(_KEY_FILE_BYTES_MAX)
    try:
        if data.startswith(b"-----BEGIN"):
            return [pyrage.ssh.Identity.from_buffer(data)]
        lines = [line.strip() for line in data.decode("ascii").splitlines()]
        found = [pyrage.x25519.Identity.from_str(line) for line in lines if line and not line.startswith("#")]
    except (pyrage.IdentityError, ValueError) as error:
        raise UsageError(f"{path} holds no key of age's or SSH's: {error}") from error
    if not found:
        raise UsageError(f"{path} holds no key")
    return found


# -- pyrage reads from one file and writes to another, to the end; a pipe and a thread make either one of ours ---


@contextlib.contextmanager
def _pumped_out(pump: Callable[[Any], object]) -> Iterator[IO[bytes]]:
    """A file whose content ``pump`` reads, in a thread, while it is being written."""
    read_fd, write_fd = os.pipe()
    thread = _Pump(pump, os.fdopen(read_fd, "rb", buffering=_PIECE_BYTES))
    thread.start()
    try:
        with os.fdopen(write_fd, "wb", buffering=0) as file:
            yield file
    except BrokenPipeError:
        pass  # the thread has failed, and says why
    finally:
        thread.join()
    thread.check()


@contextlib.contextmanager
def _pumped_in(pump: Callable[[Any], object]) -> Iterator[IO[bytes]]:
    """A file with what ``pump`` writes, in a thread, while it is being read.

    Raises:
        pyrage.DecryptError: whatever the block makes of what it could read until then.
        _PumpFailed: the block ended well, but not all of it was read and authenticated.
    """
    read_fd, write_fd = os.pipe()
    thread = _Pump(pump, os.fdopen(write_fd, "wb", buffering=_PIECE_BYTES))
    thread.start()
    try:
        with os.fdopen(read_fd, "rb", buffering=_PIECE_BYTES) as file:
            yield file
            while file.read(_PIECE_BYTES):
                pass  # so that all of it is authenticated
    except BaseException:
        thread.join()
        if isinstance(thread.error, pyrage.DecryptError):
            raise thread.error from None
        raise
    thread.join()
    if isinstance(thread.error, pyrage.DecryptError):
        raise thread.error
    if thread.error is not None:
        raise _PumpFailed from thread.error


class _PumpFailed(Exception):
    """Its cause says why."""


class _Remembering:
    """A file that knows its first error: pyrage makes one of its own of it, or none."""

    def __init__(self, file: Any) -> None:
        self.error: BaseException | None = None
        self._file = file

    def read(self, count: int) -> bytes:
        return self._noting(lambda: cast(bytes, self._file.read(count)))

    def write(self, data: bytes) -> int:
        return self._noting(lambda: cast(int, self._file.write(data)))

    def flush(self) -> None:
        self._noting(self._file.flush)

    def _noting(self, step: Callable[[], _T]) -> _T:
        try:
            return step()
        except BaseException as error:
            self.error = self.error or error
            raise


class _Pump(threading.Thread):
    """Runs ``pump`` on one end of a pipe, and closes it."""

    def __init__(self, pump: Callable[[Any], object], end: IO[bytes]) -> None:
        super().__init__(name="backup-age", daemon=True)
        self._pump = pump
        self._end = end
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            with self._end:
                self._pump(self._end)
        except BaseException as error:
            self.error = error

    def check(self) -> None:
        """Raises what went wrong."""
        if self.error is not None:
            raise self.error
