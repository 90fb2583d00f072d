"""A backup as one file or stream: ``tar``, compressed with zstd, encrypted with age; each opens with its own tool.

The tar file is the directory that a backup into a directory would be. Its manifest comes last, since only then are all
digests known.
"""

from __future__ import annotations

import contextlib
import io
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

import xxhash
import zstandard

from understudy.backup.archive_options import ArchiveOptions
from understudy.backup.contents import Member, copy_members, describe, metering, node_member, token_member
from understudy.backup.encryption import Unlocking, is_encrypted, peekable
from understudy.backup.make import BackupReport
from understudy.backup.manifest import FILE_NAMES, MANIFEST_BYTES_MAX, FileEntry, Manifest
from understudy.backup.places import check_apart
from understudy.backup.progress import Meter, OnProgress
from understudy.backup.records import Records
from understudy.backup.sinks import Sink, Stream
from understudy.backup.source import Source, open_source
from understudy.common.directory import MANIFEST_FILE, NODE_FILE
from understudy.common.errors import OTHER_BACKUP, CorruptionError, UsageError
from understudy.common.files import publishing

_THREADS = 2
_BLOCK_BYTES = 512  # tar's
_PIECE_BYTES = 1 << 20
# zstd passes it over behind a whole frame (RFC 8878, 3.1.2), and takes it for the rest of one that was cut off, which
# it never fits. Its reader alone does not tell the end of a frame from that of the file: cut checksums went unnoticed.
_EMPTY_FRAME = bytes.fromhex("502a4d1800000000")

_PLAIN = ArchiveOptions()  # of everything, not encrypted


def write_archive(
    source: Path, target: Path, options: ArchiveOptions = _PLAIN, *, progress: OnProgress | None = None
) -> BackupReport:
    """Backs the data directory ``source`` up into the file ``target``, which appears when it is whole.

    Args:
        target: ends in the options' suffix; must not be there yet.
        progress: told of bytes done and in all.

    Raises:
        UsageError: the name does not say what the file would be, it would lie within the source, or it is there.
        and what :func:`understudy.backup.make.make_backup` raises of the source.
    """
    _check_name(target, options)
    check_apart(source, target)
    if target.exists():
        raise UsageError(f"{target} is there already", remedy="give another name, or remove it")
    with open_source(source) as pinned, publishing(target) as file:
        return stream_archive(pinned, file, options, progress=progress)


def _check_name(target: Path, options: ArchiveOptions) -> None:
    if not target.name.endswith(options.suffix):
        is_encrypted = options.encryption is not None
        what = "an encrypted archive" if is_encrypted else "an archive that is not encrypted"
        remedy = f"end the name in {options.suffix}"
        if not is_encrypted:
            remedy += ", or say what to encrypt it with: --recipient or --passphrase-file"
        raise UsageError(f"{target} is no name for {what}", remedy=remedy)


def stream_archive(
    source: Source, out: Sink, options: ArchiveOptions, *, progress: OnProgress | None = None
) -> BackupReport:
    """Writes a pinned source as an archive, from its beginning to its end.

    Raises:
        OSError: ``out`` can't be written.
        CorruptionError, StorageFailed, UsageError.
    """
    selection, encryption = options.selection, options.encryption
    started_s = time.monotonic()
    meter = metering(source, None, rate=options.rate, progress=progress)
    contents = Records(source, selection, meter) if selection.needs_records else _Pages(source, meter)
    compressor = zstandard.ZstdCompressor(level=options.level, threads=_THREADS, write_checksum=True)
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

    def __init__(self, source: Source, meter: Meter) -> None:
        self._source = source
        self._members = copy_members(source)
        meter.total = sum(member.size for member in self._members)

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
        self._out.write(info.tobuf(tarfile.GNU_FORMAT))
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
        ended: Any = _Ended(source)
        decompressor = zstandard.ZstdDecompressor()
        yield _Plain(decompressor.stream_reader(ended, read_size=_PIECE_BYTES, closefd=False), name)


class _Ended:
    """A compressed file with :data:`_EMPTY_FRAME` behind it."""

    def __init__(self, source: Stream) -> None:
        self._source = source
        self._end = io.BytesIO(_EMPTY_FRAME)

    def read(self, count: int) -> bytes:
        return self._source.read(count) or self._end.read(count)


class _Plain:
    """What is in a compressed file. Damage is told where it is met: what was read before counts in a log."""

    def __init__(self, source: Stream, name: str) -> None:
        self._source = source
        self._name = name

    def read(self, count: int) -> bytes:
        with _damage(self._name):
            return self._source.read(count)


@contextlib.contextmanager
def _damage(name: str) -> Iterator[None]:
    try:
        yield
    except (zstandard.ZstdError, tarfile.TarError, EOFError) as error:
        raise CorruptionError(f"{name} is damaged: {error}", remedy=OTHER_BACKUP) from error


def unpack(file: IO[bytes], name: str, unlocking: Unlocking, take: Callable[[Member], FileEntry]) -> Manifest:
    """Reads an archive to its end, and compares each of its files with what the manifest says.

    Args:
        file, name, unlocking: see :func:`opening`.
        take: reads all of a file, and says what it was; all but ``node.json``, which the manifest says nothing of.

    Raises:
        CorruptionError: it is damaged, cut off, or something else than a backup.
        NotPermitted, NewerFormat, and what ``take`` raises.
    """
    found: dict[str, FileEntry] = {}
    manifest = None
    with opening(file, name, unlocking) as plain:
        for member in _members(plain, name):
            if member.name == MANIFEST_FILE:
                manifest = _decode_manifest(member, name)
            elif member.name == NODE_FILE:
                for _ in member.pieces:  # what is restored gets one of its own
                    pass
            else:
                found[member.name] = take(member)
    if manifest is None:
        raise CorruptionError(f"{name} has no manifest: it was cut off", remedy=OTHER_BACKUP)
    for entry in manifest.files:
        check_entry(found.pop(entry.path, None), entry, name)
    if found:
        raise CorruptionError(
            f"{name} holds {min(found)}, which its manifest does not name", remedy=OTHER_BACKUP
        )
    return manifest


def check_entry(found: FileEntry | None, expected: FileEntry, name: str) -> None:
    """Compares a file of the backup ``name`` with what the manifest says.

    Raises:
        CorruptionError.
    """
    if found != expected:
        raise CorruptionError(
            f"{expected.path} of {name} is not what its manifest says: "
            + ("it is missing" if found is None else f"{found.bytes:,} bytes, XXH3 {found.xxh3}"),
            remedy=OTHER_BACKUP,
        )


def _members(plain: Stream, name: str) -> Iterator[Member]:
    """The files, in their order; what is not read of one before the next is asked for is skipped.

    tarfile itself would take in whatever long names and attributes a header announces.
    """
    while True:
        block = read_exactly(plain, _BLOCK_BYTES, name)
        if not any(block):
            break
        with _damage(name):
            info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        if info.type != tarfile.REGTYPE or info.size < 0 or not FILE_NAMES.match(info.name):
            raise CorruptionError(f"{name} holds {info.name!r}, which no backup does", remedy=OTHER_BACKUP)
        pieces = _pieces(plain, info.size, name)
        yield Member(info.name, info.size, pieces)
        for _ in pieces:
            pass
        read_exactly(plain, -info.size % _BLOCK_BYTES, name)
    while rest := plain.read(_PIECE_BYTES):
        if any(rest):
            raise CorruptionError(f"{name} goes on behind its end", remedy=OTHER_BACKUP)


def _pieces(plain: Stream, size: int, name: str) -> Iterator[bytes]:
    while size:
        piece = plain.read(min(_PIECE_BYTES, size))
        if not piece:
            raise CorruptionError(f"{name} was cut off", remedy=OTHER_BACKUP)
        size -= len(piece)
        yield piece


def read_exactly(plain: Stream, count: int, name: str) -> bytes:
    """So many bytes of what :func:`opening` gives.

    Raises:
        CorruptionError: it ends before.
    """
    return b"".join(_pieces(plain, count, name))


def _decode_manifest(member: Member, name: str) -> Manifest:
    if member.size > MANIFEST_BYTES_MAX:
        raise CorruptionError(f"the manifest in {name} has {member.size:,} bytes", remedy=OTHER_BACKUP)
    return Manifest.decode(b"".join(member.pieces), f"{MANIFEST_FILE} in {name}")
