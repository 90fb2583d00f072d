"""Backups as one file, compressed and encrypted, and what `restore` makes of them."""

from __future__ import annotations

import datetime
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pyrage
import pytest
import zstandard
from harness import Processes, complaint
from killing import KILLED, Nursery
from nodes import DIRECTORY, assert_sound, checkpoint, copy_node, offline_status, pairs, put, status

from understudy.backup import unpacking
from understudy.backup.age_passphrase import PassphraseReader, PassphraseWriter
from understudy.backup.archive import opening, write_archive
from understudy.backup.archive_options import ArchiveOptions
from understudy.backup.encryption import Encryption, Unlocking
from understudy.backup.make import make_backup
from understudy.backup.manifest import Manifest, read_manifest
from understudy.backup.restore import restore_backup
from understudy.backup.selection import Selection
from understudy.backup.verify_archive import verify_archive
from understudy.common.directory import IN_PROGRESS_FILE, MANIFEST_FILE
from understudy.common.errors import CorruptionError, DirectoryInUse, DiskFull, NotPermitted, UsageError

FAILED, CORRUPT, USAGE, NOT_PERMITTED = 1, 4, 2, 7


@pytest.fixture(scope="module")
def server_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a stopped server with some keys, half of them in its store."""
    folder = tmp_path_factory.mktemp("server")
    processes = Processes(tmp_path_factory.mktemp("processes"))
    try:
        primary = processes.primary(folder / "a")
        put(primary.address, "/realm", *((b"%06d" % number, os.urandom(60)) for number in range(300)))
        checkpoint(primary.address)
        for number in range(10):
            put(primary.address, "/realm", (b"counted", b"%d" % number))
        primary.terminate()
    finally:
        processes.close()
    return folder / "a"


@pytest.fixture
def key() -> pyrage.x25519.Identity:
    return pyrage.x25519.Identity.generate()


def private(path: Path, text: str) -> None:
    """A file that nobody else may read."""
    path.touch(mode=0o600)
    path.write_text(text)


def key_file(folder: Path, key: pyrage.x25519.Identity) -> Path:
    path = folder / "key.txt"
    path.write_text(f"# a comment, as age-keygen makes\n{key}\n")
    return path


def restored_pairs(processes: Processes, directory: Path) -> dict[bytes, bytes]:
    """What a server started on a restored directory holds."""
    assert_sound(directory)
    return pairs(processes.primary(directory).address, "/realm")


def original_pairs(processes: Processes, server_files: Path, tmp_path: Path) -> dict[bytes, bytes]:
    return pairs(processes.primary(copy_node(server_files, tmp_path / "original")).address, "/realm")


# -- archives --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "recipients", "passphrase"])
def test_what_an_archive_holds_comes_back(
    processes: Processes, tmp_path: Path, server_files: Path, key: pyrage.x25519.Identity, kind: str
) -> None:
    """G8: backup into an archive and restore give the same pairs, encrypted or not, for one of several recipients."""
    other = pyrage.x25519.Identity.generate()
    private(tmp_path / "secret", "correct horse\n")
    suffix, lock, unlock = {
        "plain": (".tar.zst", (), ()),
        "recipients": (
            ".tar.zst.age",
            ("--recipient", str(other.to_public()), "--recipient", str(key.to_public())),
            ("--identity", key_file(tmp_path, key)),
        ),
        "passphrase": (".tar.zst.age",) + (("--passphrase-file", tmp_path / "secret"),) * 2,
    }[kind]
    archive = tmp_path / f"a{suffix}"
    said = processes.run("backup", "-f", server_files, "-t", archive, *lock).stdout.decode()
    assert said.startswith("1 realm, ")
    processes.run("restore", archive, "--to", tmp_path / "b", *unlock)
    assert read_manifest(tmp_path / "b").lsn == offline_status(server_files).lsn
    assert restored_pairs(processes, tmp_path / "b") == original_pairs(processes, server_files, tmp_path)


def test_standard_output_takes_an_archive(processes: Processes, tmp_path: Path, server_files: Path) -> None:
    """`-t -` writes the same stream, and nothing else, to standard output."""
    done = processes.run("backup", "-f", server_files, "-t", "-")
    assert b"1 realm, " in done.stderr
    (tmp_path / "piped.tar.zst").write_bytes(done.stdout)
    processes.run("restore", tmp_path / "piped.tar.zst", "--to", tmp_path / "b")
    assert_sound(tmp_path / "b")


def test_no_archive_is_written_to_a_terminal(processes: Processes, server_files: Path) -> None:
    """Whoever forgets to redirect `-t -` is told so, and does not get their terminal upset."""
    screen, terminal = os.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "understudy.cli", "backup", "-f", server_files, "-t", "-"],
            stdout=terminal,
            stderr=subprocess.PIPE,
            timeout=20,
            env=processes.environment,
        )
        os.set_blocking(screen, False)
        with pytest.raises(BlockingIOError):
            os.read(screen, 1)
    finally:
        os.close(terminal)
        os.close(screen)
    assert done.returncode == USAGE
    assert (
        complaint(done)
        == "understudy: an archive is not for a terminal (redirect standard output, or pipe it)"
    )


def test_an_archive_opens_without_understudy(
    tmp_path: Path, server_files: Path, key: pyrage.x25519.Identity
) -> None:
    """The layers are age, zstd and tar as their own libraries read them; the files are the data directory's."""
    archive = tmp_path / "a.tar.zst.age"
    write_archive(server_files, archive, ArchiveOptions(encryption=Encryption("", (str(key.to_public()),))))
    compressed = pyrage.decrypt(archive.read_bytes(), [key])
    plain = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(compressed)).read()
    with tarfile.open(fileobj=io.BytesIO(plain)) as tar:
        names = tar.getnames()
        tar.extractall(tmp_path / "b", filter="data")
    assert names[0] == "node.json"
    assert names[-1] == "backup.json"
    assert_sound(tmp_path / "b")


@pytest.mark.skipif(not all(map(shutil.which, ("zstd", "tar"))), reason="needs zstd and tar")
def test_the_usual_tools_open_an_archive(tmp_path: Path, server_files: Path) -> None:
    """`zstd -d | tar -x` gives a data directory."""
    write_archive(server_files, tmp_path / "a.tar.zst")
    (tmp_path / "b").mkdir()
    plain = subprocess.run(["zstd", "-dc", tmp_path / "a.tar.zst"], capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", tmp_path / "b"], input=plain, check=True)
    assert_sound(tmp_path / "b")


@pytest.mark.parametrize(
    ("target", "flags", "says"),
    [
        ("a.tar.zst.age", (), "not encrypted"),
        ("a.tar.zst", ("--recipient", "KEY"), "encrypted archive"),
        ("a.tar.zst.age", ("--recipient", "age1nonsense"), "no recipient"),
        ("a", ("--recipient", "KEY"), "Only an archive"),
        ("a.tar.zst", ("--update",), "made anew"),
        ("a.tgz", (), "would be a directory"),
    ],
)
def test_encryption_asked_for_and_not_possible_is_no_backup(
    processes: Processes,
    tmp_path: Path,
    server_files: Path,
    key: pyrage.x25519.Identity,
    target: str,
    flags: tuple[str, ...],
    says: str,
) -> None:
    """G10: a name that promises encryption without a key, or a key for what can't be encrypted, is refused."""
    given = [str(key.to_public()) if flag == "KEY" else flag for flag in flags]
    done = processes.run("backup", "-f", server_files, "-t", tmp_path / target, *given, code=USAGE)
    assert says in done.stderr.decode()
    assert list(tmp_path.iterdir()) == []


def test_an_archive_that_is_there_is_not_overwritten(
    processes: Processes, tmp_path: Path, server_files: Path
) -> None:
    """G4: an older archive of that name is kept."""
    (tmp_path / "a.tar.zst").write_text("older")
    processes.run("backup", "-f", server_files, "-t", tmp_path / "a.tar.zst", code=USAGE)
    assert (tmp_path / "a.tar.zst").read_text() == "older"


def test_an_archive_killed_at_any_step_is_whole_or_not_there(
    processes: Processes, tmp_path: Path, server_files: Path
) -> None:
    """G8: nothing appears under the archive's name before all of it is durable."""
    with Nursery(processes.environment) as nursery:
        for step in itertools.count(1):
            archive = tmp_path / f"a{step}.tar.zst"
            process = processes.start(
                "backup", "-f", server_files, "-t", archive, launch=nursery.dying_at(step)
            )
            ended = process.wait()
            assert ended in (0, KILLED)
            if archive.exists():
                restore_backup(archive, tmp_path / f"b{step}")
            if ended == 0:
                assert archive.exists()
                break


@pytest.mark.parametrize("kind", ["plain", "passphrase", "recipients"])
def test_a_flipped_bit_anywhere_in_an_archive_is_found(
    tmp_path: Path, server_files: Path, key: pyrage.x25519.Identity, kind: str
) -> None:
    """G8, G11: wherever a bit was flipped or the file cut off, restore says that it is damaged, and leaves a mark."""
    suffix = ".tar.zst" if kind == "plain" else ".tar.zst.age"
    encryption = {
        "plain": None,
        "passphrase": Encryption("correct horse"),
        "recipients": Encryption("", (str(key.to_public()),)),
    }[kind]
    unlocking = Unlocking(("correct horse",), (key,))
    good = tmp_path / f"good{suffix}"
    write_archive(server_files, good, ArchiveOptions(encryption=encryption))
    data = good.read_bytes()
    steps = len(data) // 12
    for number, at in enumerate(range(200, len(data), steps)):
        bad = tmp_path / f"bad{number}{suffix}"
        changed = bytearray(data)
        changed[at] ^= 1
        for content in (changed, data[:at]):
            bad.write_bytes(content)
            with pytest.raises(CorruptionError):
                restore_backup(bad, tmp_path / "b", unlocking=unlocking)
            assert not (tmp_path / "b").exists()
    restore_backup(good, tmp_path / "b", unlocking=unlocking)
    assert_sound(tmp_path / "b")


def test_an_archive_that_lacks_its_last_bytes_is_damaged(tmp_path: Path, server_files: Path) -> None:
    """G8, G11: verify and restore refuse what ends within zstd's own checksum, though all of the files are there."""
    write_archive(server_files, tmp_path / "good.tar.zst")
    data = (tmp_path / "good.tar.zst").read_bytes()
    for missing in range(1, 9):
        bad = tmp_path / f"bad{missing}.tar.zst"
        bad.write_bytes(data[:-missing])
        assert verify_archive(bad, Unlocking()).problems
        with pytest.raises(CorruptionError):
            restore_backup(bad, tmp_path / "b")


@pytest.mark.parametrize("size", [0, 131_072, 1_000_000])
def test_a_compressed_stream_that_was_cut_off_is_damaged_wherever_it_was(size: int) -> None:
    """G8: what is opened, an archive or a stretch of the log, ends without an error only if its last byte was there."""
    out = io.BytesIO()
    with zstandard.ZstdCompressor(write_checksum=True).stream_writer(out, closefd=False) as compressed:
        compressed.write(bytes(size))
        compressed.flush()  # so that the last block is an empty one
    whole = out.getvalue()
    assert opened(whole) == size
    for missing in range(1, 8):
        with pytest.raises(CorruptionError):
            opened(whole[:-missing])


def opened(data: bytes) -> int:
    """How many bytes a compressed stream holds."""
    with opening(io.BytesIO(data), "it", Unlocking()) as plain:
        return sum(map(len, iter(lambda: plain.read(70_000), b"")))


def test_a_wrong_passphrase_or_key_is_told_from_damage(
    processes: Processes, tmp_path: Path, server_files: Path, key: pyrage.x25519.Identity
) -> None:
    """Exit code 7, and a line that says what to give."""
    private(tmp_path / "secret", "correct horse")
    private(tmp_path / "wrong", "battery staple")
    processes.run(
        "backup",
        "-f",
        server_files,
        "-t",
        tmp_path / "a.tar.zst.age",
        "--passphrase-file",
        tmp_path / "secret",
    )
    for_key = tmp_path / "k.tar.zst.age"
    processes.run("backup", "-f", server_files, "-t", for_key, "--recipient", str(key.to_public()))
    other = key_file(tmp_path, pyrage.x25519.Identity.generate())
    for archive, flags, says in (
        (tmp_path / "a.tar.zst.age", ("--passphrase-file", tmp_path / "wrong"), "this passphrase"),
        (tmp_path / "a.tar.zst.age", (), "--passphrase-file"),
        (for_key, ("--identity", other), "these keys"),
        (for_key, (), "--identity"),
    ):
        done = processes.run("restore", archive, "--to", tmp_path / "b", *flags, code=NOT_PERMITTED)
        assert says in complaint(done)


def test_an_archive_with_a_name_of_its_own_choice_writes_nowhere(tmp_path: Path) -> None:
    """A hostile archive can't put a file outside of the directory, or one that no backup has."""
    for name in ("../evil", "/tmp/evil", "store/../../evil", "lock"):
        plain = io.BytesIO()
        with tarfile.open(fileobj=plain, mode="w") as tar:
            info = tarfile.TarInfo(name)
            info.size = 4
            tar.addfile(info, io.BytesIO(b"evil"))
        archive = tmp_path / "a.tar.zst"
        archive.write_bytes(zstandard.ZstdCompressor().compress(plain.getvalue()))
        with pytest.raises(CorruptionError, match="which no backup does"):
            restore_backup(archive, tmp_path / "b")
        assert {path.name for path in (tmp_path / "b").rglob("*")} <= {"lock", IN_PROGRESS_FILE}
        assert not (tmp_path / "evil").exists()


# -- verifying -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "passphrase", "recipients"])
def test_verify_tells_an_archive_as_it_was_written_from_a_damaged_one(
    processes: Processes, tmp_path: Path, server_files: Path, key: pyrage.x25519.Identity, kind: str
) -> None:
    """G11: an archive's position is told where every digest fits; a flipped bit is a problem and exit code 4."""
    private(tmp_path / "secret", "correct horse\n")
    encryption, flags = {
        "plain": (None, ()),
        "passphrase": (Encryption("correct horse"), ("--passphrase-file", tmp_path / "secret")),
        "recipients": (Encryption("", (str(key.to_public()),)), ("--identity", key_file(tmp_path, key))),
    }[kind]
    options = ArchiveOptions(encryption=encryption)
    archive = tmp_path / f"a{options.suffix}"
    manifest = write_archive(server_files, archive, options).manifest
    said = json.loads(processes.run("verify", archive, *flags, "--json").stdout)
    assert said == {
        "ok": True,
        "lsn": manifest.lsn,
        "digest": manifest.digest,
        "realms": 1,
        "bytes": manifest.total_bytes,
        "problems": [],
    }
    assert b"as it was written" in processes.run("verify", archive, *flags).stdout
    data = bytearray(archive.read_bytes())
    data[len(data) // 2] ^= 1
    archive.write_bytes(data)
    said = json.loads(processes.run("verify", archive, *flags, "--json", code=CORRUPT).stdout)
    assert (said["ok"], said["lsn"]) == (False, None)
    shown = processes.run("verify", archive, *flags, code=CORRUPT).stdout.decode()
    assert shown.startswith(f"problem: {said['problems'][0]}\n{archive}: 1 problem")


@pytest.mark.parametrize("selection", [Selection(), Selection(portable=True)])
def test_verify_compares_every_file_with_the_manifest(
    tmp_path: Path, server_files: Path, selection: Selection
) -> None:
    """G11: a file that is changed, missing or too many is named, though tar and zstd are fine with it."""
    archive = tmp_path / "a.tar.zst"
    manifest = write_archive(server_files, archive, ArchiveOptions(selection=selection)).manifest
    files = unpacked(archive)
    assert verify_archive(archive, Unlocking()).manifest == manifest
    for entry in manifest.files:
        content = files[entry.path]
        for changed in (
            files | {entry.path: bytes([content[0] ^ 1]) + content[1:]},
            {name: data for name, data in files.items() if name != entry.path},
        ):
            pack(archive, changed)
            (problem,) = verify_archive(archive, Unlocking()).problems
            assert f"{entry.path} of {archive}" in problem
    added = "log/99999999999999999999.seg"
    pack(archive, {added: b"more", **files})
    assert added in verify_archive(archive, Unlocking()).problems[0]
    pack(archive, {name: data for name, data in files.items() if name != MANIFEST_FILE})
    assert "no manifest" in verify_archive(archive, Unlocking()).problems[0]


def unpacked(archive: Path) -> dict[str, bytes]:
    """The files of an archive that is not encrypted."""
    plain = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(archive.read_bytes())).read()
    with tarfile.open(fileobj=io.BytesIO(plain)) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]


def pack(archive: Path, files: dict[str, bytes]) -> None:
    """The inverse of :func:`unpacked`."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    archive.write_bytes(zstandard.ZstdCompressor().compress(plain.getvalue()))


def test_verify_of_an_archive_that_does_not_open_or_is_not_there_says_so(
    processes: Processes, tmp_path: Path, server_files: Path
) -> None:
    """What can't be checked is no damage."""
    archive = tmp_path / "a.tar.zst.age"
    write_archive(server_files, archive, ArchiveOptions(encryption=Encryption("secret")))
    assert "--passphrase-file" in complaint(processes.run("verify", archive, code=NOT_PERMITTED))
    done = processes.run("verify", tmp_path / "absent.tar.zst", code=DIRECTORY)
    assert "there is no backup" in complaint(done)


def test_a_pipe_in_a_backups_directory_is_not_waited_for(processes: Processes, tmp_path: Path) -> None:
    """What has a manifest's name and is no file is refused at once, though nobody writes to it."""
    (tmp_path / "b").mkdir()
    os.mkfifo(tmp_path / "b" / MANIFEST_FILE)
    processes.run("restore", tmp_path / "b", "--to", tmp_path / "c", code=DIRECTORY)


# -- age with a passphrase -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 65535, 65536, 65537, 300_000])
def test_our_passphrase_stream_is_ages(size: int) -> None:
    """What is written here opens with age's own implementation, and the other way round, at each chunk's edge."""
    data = os.urandom(size)
    out = io.BytesIO()
    writer = PassphraseWriter(out, "geheim: ä")
    for start in range(0, size, 50_000):
        writer.write(data[start : start + 50_000])
    writer.finish()
    assert pyrage.passphrase.decrypt(out.getvalue(), "geheim: ä") == data
    theirs = io.BytesIO(pyrage.passphrase.encrypt(data, "geheim: ä"))
    reader = PassphraseReader(theirs, ("geheim: ä",), "theirs")
    assert b"".join(iter(lambda: reader.read(10_000), b"")) == data


def test_chunks_of_a_passphrase_stream_can_not_be_moved() -> None:
    """Chunks left out, exchanged or cut off at their edge are found."""
    out = io.BytesIO()
    writer = PassphraseWriter(out, "secret")
    writer.write(os.urandom(200_000))
    writer.finish()
    data = out.getvalue()
    start = len(data) - (200_000 + 4 * 16)
    size = 65_536 + 16
    chunks = [data[at : at + size] for at in range(start, len(data), size)]
    for order in ([0, 2, 3], [1, 0, 2, 3], [0, 1, 2], [0, 1, 2, 3, 3]):
        moved = io.BytesIO(data[:start] + b"".join(chunks[number] for number in order))
        with pytest.raises(CorruptionError):
            read_all(moved)


def read_all(source: io.BytesIO) -> None:
    reader = PassphraseReader(source, ("another", "secret"), "moved")
    while reader.read(1 << 20):
        pass


# -- restoring -------------------------------------------------------------------------------------------------


def test_a_directory_is_restored_with_every_file_checked(
    processes: Processes, tmp_path: Path, server_files: Path
) -> None:
    """G8: a copy of a backup directory holds what it held; a flipped bit in any of its files is named."""
    make_backup(server_files, tmp_path / "a")
    for number, entry in enumerate(read_manifest(tmp_path / "a").files):
        bad = copy_node(tmp_path / "a", tmp_path / f"bad{number}")
        data = bytearray((bad / entry.path).read_bytes())
        data[len(data) // 2] ^= 1
        (bad / entry.path).write_bytes(data)
        with pytest.raises(CorruptionError, match=entry.path):
            restore_backup(bad, tmp_path / "b")
    restore_backup(tmp_path / "a", tmp_path / "b")
    assert restored_pairs(processes, tmp_path / "b") == original_pairs(processes, server_files, tmp_path)


def test_a_backup_that_is_updated_while_it_is_restored_is_not_damaged(
    processes: Processes, tmp_path: Path, server_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G11: whose files change under a restore is told to give the command again, which then does it."""
    make_backup(server_files, tmp_path / "a")
    primary = processes.primary(copy_node(server_files, tmp_path / "server"))
    put(primary.address, "/realm", (b"late", b"1"))
    primary.terminate()
    read_blocks, updates = unpacking.read_blocks, iter([True])

    def overtaken(path: Path) -> Iterator[bytes]:
        if next(updates, False):
            make_backup(tmp_path / "server", tmp_path / "a", update=True)
        return read_blocks(path)

    monkeypatch.setattr(unpacking, "read_blocks", overtaken)
    with pytest.raises(DirectoryInUse, match="was changed meanwhile"):
        restore_backup(tmp_path / "a", tmp_path / "b")
    restore_backup(tmp_path / "a", tmp_path / "b")
    assert restored_pairs(processes, tmp_path / "b")[b"late"] == b"1"


def test_a_restore_goes_as_far_as_it_is_told(
    processes: Processes, tmp_path: Path, server_files: Path
) -> None:
    """G2: with --lsn or --at, the state is the one after that entry, and no entry behind it is there."""
    make_backup(server_files, tmp_path / "a")
    last = read_manifest(tmp_path / "a").lsn
    manifest = restore_backup_at(processes, tmp_path / "a", tmp_path / "b", "--lsn", str(last - 4))
    assert manifest.lsn == last - 4
    assert restored_pairs(processes, tmp_path / "b")[b"counted"] == b"5"
    moment = datetime.datetime.fromisoformat(manifest.time) + datetime.timedelta(milliseconds=1)
    by_time = restore_backup_at(processes, tmp_path / "a", tmp_path / "c", "--at", moment.isoformat())
    assert last - 4 <= by_time.lsn <= last
    server = processes.primary(tmp_path / "c")
    assert status(server.address).lsn >= by_time.lsn + 1
    assert status(server.address).epoch == 2


def restore_backup_at(processes: Processes, backup: Path, target: Path, *flags: str) -> Manifest:
    processes.run("restore", backup, "--to", target, *flags)
    assert_sound(target)
    return read_manifest(target)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--lsn", "2"), "older backup"),
        (("--lsn", "1000000"), "reaches up to LSN"),
        (("--at", "2001-01-01T00:00:00Z"), "older backup"),
        (("--at", "yesterday"), "no date and time"),
        (("--at", "2001-01-01", "--lsn", "2"), "not both"),
    ],
)
def test_a_point_that_the_backup_does_not_hold_is_refused(
    processes: Processes, tmp_path: Path, server_files: Path, flags: tuple[str, ...], says: str
) -> None:
    """What the backup can't be brought back to is said, with the way out."""
    make_backup(server_files, tmp_path / "a")
    done = processes.run("restore", tmp_path / "a", "--to", tmp_path / "b", *flags, code=USAGE)
    assert says in done.stderr.decode()


def test_a_restore_killed_at_any_step_is_refused_until_it_is_finished(
    processes: Processes, tmp_path: Path, server_files: Path
) -> None:
    """G8: cut off anywhere, a restore is marked, and the same command finishes it."""
    write_archive(server_files, tmp_path / "a.tar.zst")
    with Nursery(processes.environment) as nursery:
        for step in itertools.count(1):
            target = tmp_path / f"b{step}"
            process = processes.start(
                "restore", tmp_path / "a.tar.zst", "--to", target, launch=nursery.dying_at(step)
            )
            ended = process.wait()
            assert ended in (0, KILLED)
            if (target / "node.json").exists() and not (target / IN_PROGRESS_FILE).exists():
                assert_sound(target)
                break
            if (target / IN_PROGRESS_FILE).exists():
                processes.run("primary", "--data-dir", target, "--listen", "127.0.0.1:0", code=DIRECTORY)
            if not (target / "node.json").exists():
                restore_backup(tmp_path / "a.tar.zst", target)
                assert_sound(target)
            shutil.rmtree(target, ignore_errors=True)
    assert step > 5


def test_a_data_directory_is_not_restored_over(
    processes: Processes, tmp_path: Path, server_files: Path
) -> None:
    """G4: a server's directory, or a backup, is not replaced by a restore."""
    make_backup(server_files, tmp_path / "a")
    for target in (copy_node(server_files, tmp_path / "b"), copy_node(tmp_path / "a", tmp_path / "c")):
        done = processes.run("restore", tmp_path / "a", "--to", target, code=DIRECTORY)
        assert "absent or empty" in complaint(done)
    assert offline_status(tmp_path / "b").role == "primary"


def test_a_key_file_without_keys_and_a_passphrase_file_without_a_passphrase_are_refused(
    processes: Processes, tmp_path: Path, server_files: Path
) -> None:
    """G10: what holds no secret is said by name."""
    private(tmp_path / "empty", "")
    for flags in (("--identity", tmp_path / "empty"), ("--passphrase-file", tmp_path / "empty")):
        done = processes.run("restore", server_files, "--to", tmp_path / "b", *flags, code=USAGE)
        assert str(tmp_path / "empty") in done.stderr.decode()
    with pytest.raises(UsageError, match="can't mix"):
        Encryption("secret", ("age1abc",)).check()
    write_archive(server_files, tmp_path / "a.tar.zst.age", ArchiveOptions(encryption=Encryption("secret")))
    with pytest.raises(NotPermitted):
        restore_backup(tmp_path / "a.tar.zst.age", tmp_path / "b")


def test_a_passphrase_that_others_may_read_is_refused(
    processes: Processes, tmp_path: Path, server_files: Path
) -> None:
    """G10: as with tokens, a file that is not private is no secret."""
    (tmp_path / "secret").write_text("correct horse")
    (tmp_path / "secret").chmod(0o644)
    backup = ("backup", "-f", server_files, "-t", tmp_path / "a.tar.zst.age")
    done = processes.run(*backup, "--passphrase-file", tmp_path / "secret", code=NOT_PERMITTED)
    assert "chmod 600" in complaint(done)


class FullSink:
    """Takes so many bytes, and no more."""

    def __init__(self, room: int) -> None:
        self._room = room

    def write(self, data: bytes) -> int:
        self._room -= len(data)
        if self._room < 0:
            raise DiskFull("no space left to write the archive")
        return len(data)

    def flush(self) -> None:
        pass


@pytest.mark.parametrize("room", [0, 150_000, 200_100])
def test_a_full_disk_is_told_through_encryption(key: pyrage.x25519.Identity, room: int) -> None:
    """G8: whatever byte finds no room, the last ones included, the archive is not said to be made."""
    encryption = Encryption("", (str(key.to_public()),))
    with pytest.raises(DiskFull), encryption.encrypting(FullSink(room)) as sink:
        sink.write(bytes(200_000))  # which takes a header and a few tags more
