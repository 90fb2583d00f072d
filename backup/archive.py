"""A backup as one file or stream: ``tar``, compressed with zstd, encrypted with age; each opens with its own tool.

The tar file is the directory that a backup into a directory would be. Its manifest comes last, since only then are all
digests known.
"""

from __future__ import annotations

import contextlib
import re
import tarfile
import time
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

import xxhash
import zstandard

from understudy.backup.archive_names import ENCRYPTED_SUFFIX, SUFFIX
from understudy.backup.contents import Member, copy_members, describe, node_member, token_member
from understudy.backup.encryption import Encryption, Unlocking, is_encrypted, peekable
from understudy.backup.make import BackupReport
from understudy.backup.manifest import FileEntry, Manifest
from understudy.backup.progress import Meter, OnProgress
from understudy.backup.records import Records
from understudy.backup.selection import EVERYTHING, Selection
from understudy.backup.sinks import Sink, Stream
from understudy.backup.source import Source, open_source
from understudy.common.directory import MANIFEST_FILE
from understudy.common.errors import CorruptionError, UsageError
from understudy.common.files import publishing

DEFAULT_LEVEL = 3
_THREADS = 2
_BLOCK_BYTES = 512  # tar's
_PIECE_BYTES = 1 << 20
_MANIFEST_BYTES_MAX = 64 << 20
# Anything else has no business in a data directory, and is not written anywhere.
_KNOWN_NAMES = re.compile(
    r"(node\.json|backup\.json|admin-token|store/data\.mdb|log/[0-9]{20}\.seg|records/[a-z]+-[0-9]{6}\.rows)\Z"
)
_OTHER_BACKUP = "use another backup"


def write_archive(
    source: Path,
    target: Path,
    *,
    selection: Selection = EVERYTHING,
    encryption: Encryption | None = None,
    level: int = DEFAULT_LEVEL,
    rate: int | None = None,
    progress: OnProgress | None = None,
) -> BackupReport:
    """Backs the data directory ``source`` up into the file ``target``, which appears when it is whole.

    Args:
        target: ends in ``.tar.zst.age`` with ``encryption``, else in ``.tar.zst``; must not be there yet.
        selection: what of the source, and in which form.
        level: of zstd.
        rate: bytes a second at the most that are read.
        progress: told of bytes done and in all.

    Raises:
        UsageError: the name does not say what the file would be, or it is there already.
        and what :func:`understudy.backup.make.make_backup` raises of the source.
    """
    _check_name(target, encryption)
    if target.exists():
        raise UsageError(f"{target} is there already", remedy="give another name, or remove it")
    with open_source(source) as pinned, publishing(target) as file:
        return stream_archive(
            pinned,
            file,
            selection=selection,
            encryption=encryption,
            level=level,
            rate=rate,
            progress=progress,
        )


def _check_name(target: Path, encryption: Encryption | None) -> None:
    wanted = ENCRYPTED_SUFFIX if encryption is not None else SUFFIX
    if not target.name.endswith(wanted):
        what = "an encrypted archive" if encryption is not None else "an archive that is not encrypted"
        remedy = f"end the name in {wanted}"
        if encryption is None:
            remedy += ", or say what to encrypt it with: --recipient or --passphrase-file"
        raise UsageError(f"{target} is no name for {what}", remedy=remedy)


def stream_archive(
    source: Source,
    out: Sink,
    *,
    selection: Selection = EVERYTHING,
    encryption: Encryption | None,
    level: int = DEFAULT_LEVEL,
    rate: int | None = None,
    progress: OnProgress | None = None,
) -> BackupReport:
    """Writes a pinned source as an archive, from its beginning to its end.

    Raises:
        OSError: ``out`` can't be written.
        CorruptionError, StorageFailed, UsageError.
    """
    started_s = time.monotonic()
    contents = Records(source, selection) if selection.needs_records else _Pages(source)
    meter = Meter(contents.total_bytes, rate=rate, progress=progress)
    compressor = zstandard.ZstdCompressor(level=level, threads=_THREADS, write_checksum=True)
    with (
        encryption.encrypting(out) if encryption is not None else contextlib.nullcontext(out) as encrypted,
        compressor.stream_writer(cast(IO[bytes], encrypted), closefd=False) as compressed,
    ):
        tar = _TarWriter(compressed)
        if isinstance(contents, _Pages):  # only they are a directory that a server starts on
            tar.add(node_member(source), meter=None)
        secrets = token_member(source) if encryption is not None and not selection.is_filtered else ()
        members = chain(contents.members(), secrets)
        manifest = contents.describe([tar.add(member, meter=meter) for member in members])
        data = manifest.encode()
        tar.add(Member(MANIFEST_FILE, len(data), [data]), meter=None)
        tar.finish()
    return BackupReport(manifest=manifest, bytes_copied=meter.done, seconds=time.monotonic() - started_s)


class _Pages:
    """What a backup of pages consists of."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._members = copy_members(source)
        self.total_bytes = sum(member.size for member in self._members)

    def members(self) -> Iterable[Member]:
        """The files."""
        return self._members

    def describe(self, entries: Iterable[FileEntry]) -> Manifest:
        """The manifest."""
        return describe(self._source, entries, checkpoint=self._source.checkpoint)


class _TarWriter:
    """Writes a tar file of members whose sizes are known; tarfile would copy each in pieces of 16 KiB."""

    def __init__(self, out: zstandard.ZstdCompressionWriter) -> None:
        self._out = out
        self._made_s = int(time.time())

    def add(self, member: Member, *, meter: Meter | None) -> FileEntry:
        """One file; says what it was."""
        info = tarfile.TarInfo(member.name)
        info.size, info.mode, info.mtime = member.size, 0o600, self._made_s
        self._out.write(info.tobuf(tarfile.PAX_FORMAT))
        digest = xxhash.xxh3_128()
        for piece in member.pieces if meter is None else meter.metered(member.pieces):
            digest.update(piece)
            self._out.write(piece)
        self._out.write(bytes(-member.size % _BLOCK_BYTES))
        return FileEntry(path=member.name, bytes=member.size, xxh3=digest.hexdigest())

    def finish(self) -> None:
        """The end that tar looks for."""
        self._out.write(bytes(2 * _BLOCK_BYTES))


# -- reading ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opening(file: IO[bytes], name: str, unlocking: Unlocking) -> Iterator[Stream]:
    """What is in a compressed and perhaps encrypted file.

    What was read counts only when the block ends without an error.

    Args:
        file: at its beginning.
        name: what error messages call it.

    Raises:
        NotPermitted: it is encrypted, and does not open with what is given.
        CorruptionError: it is damaged or cut off.
    """
    with contextlib.ExitStack() as opened:
        begun = peekable(file)
        source: Any = begun
        if is_encrypted(begun):
            source = opened.enter_context(unlocking.decrypting(begun, name))
        with _damage(name):
            yield zstandard.ZstdDecompressor().stream_reader(source, read_size=_PIECE_BYTES, closefd=False)


@contextlib.contextmanager
def _damage(name: str) -> Iterator[None]:
    try:
        yield
    except (zstandard.ZstdError, tarfile.TarError, EOFError) as error:
        raise CorruptionError(f"{name} is damaged: {error}", remedy=_OTHER_BACKUP) from error


@contextlib.contextmanager
def reading_archive(file: IO[bytes], name: str, unlocking: Unlocking) -> Iterator[Iterator[Member]]:
    """The files of an archive, in their order, each to be read before the next is taken; see :func:`opening`.

    Raises:
        CorruptionError: it holds something else than a backup.
        and what :func:`opening` raises.
    """
    with opening(file, name, unlocking) as plain:
        yield _members(plain, name)


def _members(plain: Any, name: str) -> Iterator[Member]:
    with tarfile.open(fileobj=plain, mode="r|", bufsize=_PIECE_BYTES) as tar:
        for info in tar:
            if not info.isreg() or not _KNOWN_NAMES.match(info.name):
                raise CorruptionError(
                    f"{name} holds {info.name!r}, which no backup does", remedy=_OTHER_BACKUP
                )
            content = tar.extractfile(info)
            assert content is not None, "a regular file has content"
            yield Member(info.name, info.size, _pieces(content, info, name))


def _pieces(content: IO[bytes], info: tarfile.TarInfo, name: str) -> Iterator[bytes]:
    left = info.size
    while left:
        piece = content.read(min(_PIECE_BYTES, left))
        if not piece:
            raise CorruptionError(f"{name} ends within {info.name}", remedy=_OTHER_BACKUP)
        left -= len(piece)
        yield piece


def decode_manifest(member: Member, name: str) -> Manifest:
    """The manifest of an archive.

    Raises:
        CorruptionError, NewerFormat.
    """
    if member.size > _MANIFEST_BYTES_MAX:
        raise CorruptionError(f"the manifest in {name} has {member.size:,} bytes", remedy=_OTHER_BACKUP)
    return Manifest.decode(b"".join(member.pieces), f"{MANIFEST_FILE} in {name}")
