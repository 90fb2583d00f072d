"""age's format with a passphrase, as a stream: pyrage does that only for what fits into memory.

The format is that of https://age-encryption.org/v1 (C2SP's specification ``age``): a header whose one stanza wraps a
random file key with a key that scrypt makes of the passphrase, an HMAC of the header, then the payload in chunks of
64 KiB, each encrypted and authenticated by ChaCha20-Poly1305 under a counter, the last one marked as such. Every
``age -d`` opens it.
"""

from __future__ import annotations

import base64
import contextlib
import hmac
import os
from collections.abc import Iterable, Sequence
from hashlib import sha256
from typing import IO

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from understudy.backup.sinks import Sink
from understudy.common.errors import OTHER_BACKUP, CorruptionError, NotPermitted

INTRO = b"age-encryption.org/v1\n"
_SCRYPT_LABEL = b"age-encryption.org/v1/scrypt"
_WORK_FACTOR = 18  # what age takes: a second and 256 MiB
_WORK_FACTOR_MAX = 22
_FILE_KEY_BYTES = _SALT_BYTES = _NONCE_BYTES = 16
_TAG_BYTES = 16
_CHUNK_BYTES = 64 << 10
_HEADER_BYTES_MAX = 64 << 10
_NO_NONCE = bytes(12)


def _encode(data: bytes) -> bytes:
    return base64.b64encode(data).rstrip(b"=")


def _decode(text: bytes) -> bytes:
    return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)


def _derive(key: bytes, salt: bytes, info: bytes) -> bytes:
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=salt, info=info).derive(key)


def _wrapping_key(passphrase: str, salt: bytes, work_factor: int) -> bytes:
    scrypt = Scrypt(salt=_SCRYPT_LABEL + salt, length=32, n=1 << work_factor, r=8, p=1)
    return scrypt.derive(passphrase.encode())


def _mac(file_key: bytes, header: bytes) -> bytes:
    return hmac.digest(_derive(file_key, b"", b"header"), header, sha256)


def _chunk_nonce(number: int, *, is_last: bool) -> bytes:
    return number.to_bytes(11, "big") + bytes([is_last])


class PassphraseWriter:
    """Encrypts what is written to it; nothing is whole before :meth:`finish`."""

    def __init__(self, out: Sink, passphrase: str) -> None:
        file_key, salt, nonce = os.urandom(_FILE_KEY_BYTES), os.urandom(_SALT_BYTES), os.urandom(_NONCE_BYTES)
        wrapping = ChaCha20Poly1305(_wrapping_key(passphrase, salt, _WORK_FACTOR))
        wrapped = wrapping.encrypt(_NO_NONCE, file_key, None)
        header = INTRO + b"-> scrypt %s %d\n%s\n---" % (_encode(salt), _WORK_FACTOR, _encode(wrapped))
        self._out = out
        self._cipher = ChaCha20Poly1305(_derive(file_key, nonce, b"payload"))
        self._number = 0
        self._pending = bytearray()
        out.write(header + b" " + _encode(_mac(file_key, header)) + b"\n" + nonce)

    def write(self, data: bytes) -> int:
        """Takes all of ``data``."""
        self._pending += data
        # The last chunk must be known to be the last: a full one waits for what follows.
        while len(self._pending) > _CHUNK_BYTES:
            self._put(bytes(self._pending[:_CHUNK_BYTES]), is_last=False)
            del self._pending[:_CHUNK_BYTES]
        return len(data)

    def flush(self) -> None:
        """Nothing can be handed on before its chunk is full."""

    def finish(self) -> None:
        """Writes what is left, and the end."""
        self._put(bytes(self._pending), is_last=True)

    def _put(self, chunk: bytes, *, is_last: bool) -> None:
        self._out.write(self._cipher.encrypt(_chunk_nonce(self._number, is_last=is_last), chunk, None))
        self._number += 1


class PassphraseReader:
    """Decrypts a file made by age with a passphrase.

    Args:
        source: at its beginning.
        name: what error messages call it.

        passphrases: those that it may be.

    Raises:
        NotPermitted: the passphrase is another one.
        CorruptionError: it is no such file, or damaged.
    """

    def __init__(self, source: IO[bytes], passphrases: Sequence[str], name: object) -> None:
        self._source = source
        self._name = name
        file_key = self._open_header(passphrases)
        self._cipher = ChaCha20Poly1305(_derive(file_key, self._exactly(_NONCE_BYTES), b"payload"))
        self._number = 0
        self._next = self._chunk()
        self._plain = b""
        self._ended = False

    def _open_header(self, passphrases: Sequence[str]) -> bytes:
        """The file key."""
        header, mac = self._read_header()
        try:
            intro, stanza, body, _ = header.split(b"\n")
            _, kind, salt, work_factor = stanza.split(b" ")
            if intro + b"\n" != INTRO or kind != b"scrypt" or not 1 <= int(work_factor) <= _WORK_FACTOR_MAX:
                raise ValueError("it is not encrypted with a passphrase")
            keys = (_wrapping_key(one, _decode(salt), int(work_factor)) for one in passphrases)
            file_key = self._unwrap(_decode(body), keys)
        except ValueError as error:
            raise self._damaged(f"its header can't be read: {error}") from error
        if not hmac.compare_digest(_encode(_mac(file_key, header)), mac):
            raise self._damaged("its header was changed")
        return file_key

    def _unwrap(self, wrapped: bytes, keys: Iterable[bytes]) -> bytes:
        for key in keys:
            with contextlib.suppress(InvalidTag):
                return ChaCha20Poly1305(key).decrypt(_NO_NONCE, wrapped, None)
        raise NotPermitted(
            f"{self._name} does not open with this passphrase",
            remedy="if it was changed, give both: --passphrase-file once for each",
        )

    def _read_header(self) -> tuple[bytes, bytes]:
        """All up to the three dashes, and the HMAC behind them."""
        header = b""
        while len(header) < _HEADER_BYTES_MAX:
            line = self._source.readline(_HEADER_BYTES_MAX)
            if line.startswith(b"--- "):
                return header + b"---", line[4:].rstrip(b"\n")
            if not line:
                break
            header += line
        raise self._damaged("its header has no end")

    def read(self, count: int) -> bytes:
        """Up to ``count`` bytes; none at the end.

        Raises:
            CorruptionError: it was changed, or cut off.
        """
        while not self._plain and not self._ended:
            chunk, self._next = self._next, b""
            if len(chunk) == _CHUNK_BYTES + _TAG_BYTES:
                self._next = self._chunk()
            self._ended = not self._next
            self._plain = self._open(chunk)
        data, self._plain = self._plain[:count], self._plain[count:]
        return data

    def _open(self, chunk: bytes) -> bytes:
        try:
            nonce = _chunk_nonce(self._number, is_last=self._ended)
            plain = self._cipher.decrypt(nonce, chunk, None)
        except (InvalidTag, ValueError):
            raise self._damaged(f"chunk {self._number} of it was changed, or it was cut off there") from None
        self._number += 1
        return plain

    def _chunk(self) -> bytes:
        return _read_up_to(self._source, _CHUNK_BYTES + _TAG_BYTES)

    def _exactly(self, count: int) -> bytes:
        data = _read_up_to(self._source, count)
        if len(data) < count:
            raise self._damaged("it was cut off")
        return data

    def _damaged(self, why: str) -> CorruptionError:
        return CorruptionError(f"{self._name} is damaged: {why}", remedy=OTHER_BACKUP)


def _read_up_to(source: IO[bytes], count: int) -> bytes:
    data = source.read(count)
    while len(data) < count and (more := source.read(count - len(data))):
        data += more
    return data
