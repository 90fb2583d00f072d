"""Import and export: what goes in comes out again, and what can't go in is named and can be continued."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from pathlib import Path

import pytest
from harness import Process, Processes, complaint, wait_until
from hypothesis import given
from hypothesis import strategies as st

from understudy.cli import pairs, sinks
from understudy.cli.json_lines import decode_pair, encode_pair
from understudy.cli.pairs import Pair
from understudy.common.batches import BATCH_BYTES, in_batches
from understudy.common.errors import (
    BadImport,
    DiskFull,
    ExitCode,
    PeerUnreachable,
    UnderstudyError,
    UsageError,
)
from understudy.common.types import KEY_BYTES_MAX, TRANSACTION_BYTES_MAX

AWKWARD = {
    b"plain": b"text",
    "ümlaut €".encode(): "💾 \u2028 \x00 \x7f".encode(),
    b"empty": b"",
    b"\xff\xfe": b"\x80" * 10,
    b"text key": b"\x00\xff",
    b"\x00": b"value of a zero byte",
    b'"quoted\\"': b'{"key": "not a line"}\n\r\n',
    b"k" * KEY_BYTES_MAX: b"longest key",
}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Processes that live as long as this module's tests."""
    started = Processes(tmp_path_factory.mktemp("running"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def server(running: Processes, tmp_path_factory: pytest.TempPathFactory) -> Process:
    """A primary that tests share; each uses realms of its own."""
    return running.primary(tmp_path_factory.mktemp("server") / "data")


def lines_of(content: dict[bytes, bytes]) -> bytes:
    """JSON lines."""
    return b"".join(encode_pair(key, value) + b"\n" for key, value in content.items())


def read_lines(data: bytes) -> dict[bytes, bytes]:
    """The inverse of :func:`lines_of`."""
    return dict(decode_pair(line) for line in data.splitlines())


def content_of(processes: Processes, server: Process, realm: str) -> dict[bytes, bytes]:
    """All that a realm holds."""
    return read_lines(processes.run("export", "--server", server.address, realm).stdout)


# -- lines -----------------------------------------------------------------------------------------------------


@given(st.binary(min_size=1), st.binary())
def test_a_line_holds_any_pair(key: bytes, value: bytes) -> None:
    """A pair comes back from its line as it was, and the line is one line of JSON in UTF-8."""
    line = encode_pair(key, value)
    assert b"\n" not in line
    assert set(json.loads(line)) <= {"key", "key_base64", "value", "value_base64"}
    assert decode_pair(line) == (key, value)


def test_text_stays_readable() -> None:
    """What is UTF-8 is written as text, what is not as base64, each of the two by itself."""
    assert encode_pair("ä".encode(), b"\xff") == '{"key": "ä", "value_base64": "/w=="}'.encode()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"not json", "not JSON"),
        (b'{"key": "a", "value": ', "not JSON"),
        (b'["a", "b"]', "not a JSON object"),
        (b'"a"', "not a JSON object"),
        (b"{}", "'key' or 'key_base64'"),
        (b'{"key": "a"}', "'value' or 'value_base64'"),
        (b'{"value": "a"}', "'key' or 'key_base64'"),
        (b'{"key": "a", "key_base64": "YQ==", "value": ""}', "either 'key'"),
        (b'{"key": 1, "value": ""}', "'key' is not a string"),
        (b'{"key": null, "value": ""}', "'key' is not a string"),
        (b'{"key": "a", "value_base64": 1}', "'value' is not a string"),
        (b'{"key": "a", "value_base64": "?"}', "not base64"),
        (b'{"key": "a", "value_base64": "YQ"}', "not base64"),
        (b'{"key": "a", "value": "b", "vlaue": "c"}', "'vlaue'"),
        (b'{"key": "\\ud800", "value": ""}', "surrogate"),
        (b'{"key": "\xff", "value": ""}', "not UTF-8"),
        (b"[" * 100_000, "not"),
    ],
)
def test_a_broken_line_says_what_is_wrong(line: bytes, said: str) -> None:
    """Every way for a line to be no pair is put into words."""
    with pytest.raises(ValueError, match=said):
        decode_pair(line)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (encode_pair(b"k" * (KEY_BYTES_MAX + 1), b""), "481 bytes"),
        (encode_pair(b"", b""), "0 bytes"),
        (encode_pair(b"k", b"v" * TRANSACTION_BYTES_MAX), "16,777,216 bytes"),
        (b" " * (pairs.LINE_BYTES_MAX + 1), "more than"),
    ],
    ids=["long key", "empty key", "large value", "long line"],
)
def test_what_a_transaction_can_not_hold_is_named_by_its_line(line: bytes, said: str) -> None:
    """A key or value beyond the limits, and a line without end, are errors with the line's number."""
    file = BytesIO(encode_pair(b"a", b"1") + b"\n" + line)
    with pytest.raises(BadImport, match=rf"^some file, line 2: .*{said}") as raised:
        list(pairs.lines(file, "some file", from_line=1))
    assert "--from-line 2" in raised.value.remedy


def test_blank_lines_count_and_hold_nothing() -> None:
    """Empty lines are passed over, are counted, and the last line needs no end."""
    file = BytesIO(b'\n{"key": "a", "value": "1"}\r\n  \n{"key": "b", "value": "2"}')
    assert [(pair.key, pair.line) for pair in pairs.lines(file, "f", from_line=1)] == [(b"a", 2), (b"b", 4)]


def test_lines_before_the_first_wanted_are_not_even_parsed() -> None:
    """``--from-line`` skips what is broken too."""
    file = BytesIO(b'broken\n{"key": "b", "value": "2"}\n')
    assert [pair.key for pair in pairs.lines(file, "f", from_line=2)] == [b"b"]


# -- batches ---------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, BATCH_BYTES + 10), max_size=20), st.integers(1, 5))
def test_batches_are_bounded_and_in_order(sizes: list[int], pairs_max: int) -> None:
    """Batches hold all pairs in order, and none is larger than allowed but for a single large pair."""
    made = [Pair(b"%d" % number, bytes(size), number) for number, size in enumerate(sizes)]
    found = list(in_batches(made, lambda pair: pair.size, count_max=pairs_max))
    assert [pair for batch in found for pair in batch] == made
    assert all(1 <= len(batch) <= pairs_max for batch in found)
    assert all(len(batch) == 1 or sum(pair.size for pair in batch) <= BATCH_BYTES for batch in found)


def test_what_came_before_an_error_is_a_batch_first() -> None:
    """A broken line does not take the lines before it with it."""

    def broken() -> Iterator[Pair]:
        yield Pair(b"a", b"", 1)
        raise BadImport("line 2")

    found = in_batches(broken(), lambda pair: pair.size, count_max=10)
    assert [pair.key for pair in next(found)] == [b"a"]
    with pytest.raises(BadImport):
        next(found)


# -- files -----------------------------------------------------------------------------------------------------


def test_a_file_comes_back_as_it_was(processes: Processes, server: Process, tmp_path: Path) -> None:
    """All pairs of a file are in its realm, and an export of it, imported elsewhere, is equal."""
    (tmp_path / "in.jsonl").write_bytes(lines_of(AWKWARD))
    at = ("--server", server.address)
    shown = processes.run("import", *at, "/file", tmp_path / "in.jsonl").stdout.decode()
    assert shown == "imported 8 keys in 1 transaction\n"
    processes.run("export", *at, "/file", tmp_path / "out.jsonl")
    assert read_lines((tmp_path / "out.jsonl").read_bytes()) == AWKWARD
    processes.run("import", *at, "/elsewhere", "-", stdin=(tmp_path / "out.jsonl").read_bytes())
    assert processes.run("export", *at, "/elsewhere").stdout == (tmp_path / "out.jsonl").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_an_import_may_be_repeated(processes: Processes, server: Process) -> None:
    """A second import of the same lines changes nothing; of two lines with one key the later one wins."""
    lines = lines_of({b"a": b"1", b"b": b"2"}) + lines_of({b"a": b"3"})
    for _ in range(2):
        processes.run("import", "--server", server.address, "/repeated", "--batch", "1", "-", stdin=lines)
        assert content_of(processes, server, "/repeated") == {b"a": b"3", b"b": b"2"}


def test_many_pairs_go_in_few_transactions(processes: Processes, server: Process) -> None:
    """Thousands of small pairs are batched by number, large ones by bytes; JSON says how many and where."""
    small = {b"%05d" % number: b"v" for number in range(5_000)}
    large = {b"%05d" % number: bytes(300_000) for number in range(10)}
    at = ("import", "--server", server.address)
    shown = json.loads(processes.run(*at, "/small", "--json", "-", stdin=lines_of(small)).stdout)
    assert (shown["keys"], shown["transactions"]) == (5_000, 5)
    shown = processes.run(*at, "/large", "-", stdin=lines_of(large)).stdout
    assert shown == b"imported 10 keys in 4 transactions\n"
    shown = processes.run(*at, "/small", "--batch", "100", "-", stdin=lines_of(small)).stdout
    assert shown == b"imported 5,000 keys in 50 transactions\n"
    assert content_of(processes, server, "/small") == small
    assert content_of(processes, server, "/large") == large


def test_a_broken_line_stops_the_import_and_it_goes_on_from_there(
    processes: Processes, server: Process, tmp_path: Path
) -> None:
    """Everything before a broken line is committed; mended, the import goes on with that line."""
    content = {b"%04d" % number: b"v" for number in range(1, 3_001)}
    lines = lines_of(content).splitlines(keepends=True)
    good, lines[2_499] = lines[2_499], b'{"key": "2500", "value": }\n'
    file = tmp_path / "in.jsonl"
    file.write_bytes(b"".join(lines))
    at = ("import", "--server", server.address, "/broken", file)
    said = complaint(processes.run(*at, code=ExitCode.USAGE))
    assert f"{file}, line 2500: it is not JSON" in said
    assert "--from-line 2500" in said
    assert content_of(processes, server, "/broken") == {key: b"v" for key in content if key < b"2500"}
    lines[2_499] = good
    file.write_bytes(b"".join(lines))
    assert processes.run(*at, "--from-line", "2500").stdout == b"imported 501 keys in 1 transaction\n"
    assert content_of(processes, server, "/broken") == content


def test_nothing_to_import_is_no_error(processes: Processes, server: Process, tmp_path: Path) -> None:
    """An empty file and an empty directory give no transaction, and so no realm."""
    (tmp_path / "empty").mkdir()
    at = ("import", "--server", server.address, "/nothing")
    for source in ("-", tmp_path / "empty"):
        assert processes.run(*at, source).stdout == b"imported 0 keys in 0 transactions\n"
    processes.run("export", "--server", server.address, "/nothing", code=ExitCode.FAILED)


@pytest.mark.parametrize("source", ["{tmp}/absent.jsonl", "{tmp}/secret.jsonl"])
def test_a_file_that_can_not_be_read_is_named(
    processes: Processes, server: Process, tmp_path: Path, source: str
) -> None:
    """A source that is not there, or not ours to read, is named."""
    (tmp_path / "secret.jsonl").touch(0)
    if "secret" in source and os.geteuid() == 0:
        pytest.skip("root may read everything")
    done = processes.run(
        "import", "--server", server.address, "/a", source.format(tmp=tmp_path), code=ExitCode.USAGE
    )
    assert "can't read" in complaint(done)


def test_an_import_outlives_its_server(processes: Processes, tmp_path: Path) -> None:
    """G1, G6: the server is killed in the middle of an import and started again; it goes on, nothing is lost."""
    primary = processes.primary(tmp_path / "data")
    address = primary.address
    content = {b"%04d" % number: b"v" * 100 for number in range(4_000)}
    lines = lines_of(content).splitlines(keepends=True)
    command = [sys.executable, "-m", "understudy.cli", "import", "--server", address, "/outlived", "-"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.writelines(lines[:2_500])
        process.stdin.flush()
        wait_until(
            lambda: processes.start("scan", "--server", address, "/outlived", "--limit", "1").wait() == 0
        )
        primary.kill()
        process.stdin.writelines(lines[2_500:])
        process.stdin.flush()
        primary = processes.primary(tmp_path / "data", "--listen", address)
        shown, _ = process.communicate(timeout=60)
    assert shown == b"imported 4,000 keys in 4 transactions\n"
    assert content_of(processes, primary, "/outlived") == content
    (row,) = json.loads(processes.run("realms", "--server", address, "--json").stdout)
    assert row["version"] == 4


# -- trees -----------------------------------------------------------------------------------------------------


def make_tree(root: Path, content: dict[bytes, bytes]) -> None:
    """Files below ``root``."""
    for key, value in content.items():
        path = root / os.fsdecode(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(value)


def read_tree(root: Path) -> dict[bytes, bytes]:
    """The inverse of :func:`make_tree`."""
    return {
        os.fsencode(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


TREE = {
    b"readme": b"at the top",
    b"deep/er/and/deeper": bytes(range(256)),
    b"empty file": b"",
    "schön/größe".encode(): b"not ASCII",
    b"not utf-8 \xff/\xfe": b"\xff",
    b".hidden/..almost": b"dots are fine inside of names",
}


def test_a_tree_comes_back_as_it_was(processes: Processes, server: Process, tmp_path: Path) -> None:
    """Each file is a pair of its path and its bytes, and an export as a tree is equal to what was imported."""
    make_tree(tmp_path / "in", TREE)
    (tmp_path / "in" / "empty directory").mkdir()
    at = ("--server", server.address)
    assert processes.run("import", *at, "/tree", tmp_path / "in").stdout.startswith(b"imported 6 keys")
    assert content_of(processes, server, "/tree") == TREE
    processes.run("export", *at, "/tree", "--directory", tmp_path / "out")
    assert read_tree(tmp_path / "out") == TREE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_links_and_special_files_stay_out(processes: Processes, server: Process, tmp_path: Path) -> None:
    """A tree's links are not followed, wherever they lead, and it is said how many were left out."""
    make_tree(tmp_path / "in", {b"file": b"1"})
    (tmp_path / "in" / "link").symlink_to("/etc/passwd")
    (tmp_path / "in" / "up").symlink_to("..")
    os.mkfifo(tmp_path / "in" / "pipe")
    done = processes.run("import", "--server", server.address, "/links", tmp_path / "in")
    assert b"3 symbolic links and special files left out" in done.stderr
    assert content_of(processes, server, "/links") == {b"file": b"1"}


def test_a_file_that_is_too_large_is_named(processes: Processes, server: Process, tmp_path: Path) -> None:
    """A file beyond a transaction's limit ends the import with its path; the files before it are in."""
    make_tree(tmp_path / "in", {b"a": b"1", b"c": b"3"})
    with (tmp_path / "in" / "b").open("wb") as file:
        file.truncate(TRANSACTION_BYTES_MAX + 1)
    done = processes.run(
        "import", "--server", server.address, "/toolarge", tmp_path / "in", code=ExitCode.USAGE
    )
    assert f"{tmp_path / 'in' / 'b'}: a value of 16,777,217 bytes" in complaint(done)
    assert content_of(processes, server, "/toolarge") == {b"a": b"1"}


def test_a_path_that_is_too_long_is_named(tmp_path: Path) -> None:
    """A path of more than 480 bytes can't be a key."""
    fits, too_long = b"/".join([b"d" * 200] * 3)[:KEY_BYTES_MAX], b"/".join([b"e" * 200] * 3)
    make_tree(tmp_path, {fits: b"fits", too_long: b"too long"})
    found = pairs.tree(tmp_path)
    assert next(found).value == b"fits"
    with pytest.raises(BadImport, match="602 bytes"):
        next(found)


def test_a_directory_has_no_lines(processes: Processes, server: Process, tmp_path: Path) -> None:
    """``--from-line`` makes no sense for a tree, and is refused instead of ignored."""
    at = ("import", "--server", server.address, "/a", tmp_path)
    assert "--from-line" in complaint(processes.run(*at, "--from-line", "2", code=ExitCode.USAGE))


UNSAFE = [
    *(
        b"../up",
        b"a/../../up",
        b"/etc/passwd",
        b"a//b",
        b"a/",
        b".",
        b"a/.",
        b"./a",
        b"..",
        b"zero\0byte",
        b"a/..",
    ),
]


def write_all(sink: sinks.Sink, content: Iterable[tuple[bytes, bytes]]) -> None:
    """Exports these pairs."""
    with sink:
        for key, value in content:
            sink.write(key, value)


@pytest.mark.parametrize("key", UNSAFE)
def test_a_key_that_leads_elsewhere_is_not_written(key: bytes, tmp_path: Path) -> None:
    """Nothing is written for a key that is no safe relative path, and nothing is left of the export."""
    (tmp_path / "in").mkdir()
    with pytest.raises(UnderstudyError, match="safe relative path") as raised:
        write_all(sinks.TreeSink(tmp_path / "in" / "out"), [(b"good", b"1"), (key, b"bad")])
    assert "JSON lines" in raised.value.remedy
    assert list(tmp_path.rglob("*")) == [tmp_path / "in"]


@pytest.mark.parametrize("keys", [(b"a", b"a/b"), (b"a/b", b"a"), (b"a/b", b"a/b/c")])
def test_keys_that_can_not_both_be_files_are_named(keys: tuple[bytes, ...], tmp_path: Path) -> None:
    """A key that is a directory of another key can't be exported as a tree, and is not written over it."""
    with pytest.raises(UnderstudyError, match="above or below"):
        write_all(sinks.TreeSink(tmp_path / "out"), [(key, b"") for key in keys])
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_no_file_can_have_is_named(tmp_path: Path) -> None:
    """A part of a key that is longer than file names can be is an error with the key."""
    with pytest.raises(UnderstudyError, match="can't be written"):
        write_all(sinks.TreeSink(tmp_path / "out"), [(b"k" * 300, b"")])


def test_a_tree_is_not_exported_over_something_else(
    processes: Processes, server: Process, tmp_path: Path
) -> None:
    """A directory that holds anything, a file, or a link to elsewhere is refused and left as it is."""
    make_tree(tmp_path / "full", {b"mine": b"1"})
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    processes.run("import", "--server", server.address, "/over", tmp_path / "full")
    at = ("export", "--server", server.address, "/over", "--directory")
    for name, said in (("full", "not empty"), ("full/mine", "not a directory"), ("link", "not a directory")):
        assert said in complaint(processes.run(*at, tmp_path / name, code=ExitCode.USAGE))
    assert read_tree(tmp_path / "full") == {b"mine": b"1"}
    processes.run(*at, tmp_path / "empty")
    assert read_tree(tmp_path / "empty") == {b"mine": b"1"}


# -- unfinished exports ----------------------------------------------------------------------------------------


def cut_off() -> Iterator[tuple[bytes, bytes]]:
    """A scan whose server goes away."""
    yield b"a", b"1"
    raise PeerUnreachable("gone")


@pytest.mark.parametrize("kind", [lambda path: sinks.FileSink(path, replace=True), sinks.TreeSink])
def test_an_export_that_fails_leaves_what_was_there(
    kind: Callable[[Path], sinks.Sink], tmp_path: Path
) -> None:
    """G8: what is exported appears under its name whole or not at all."""
    if kind is not sinks.TreeSink:
        (tmp_path / "out").write_text("the last export")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(PeerUnreachable):
        write_all(kind(tmp_path / "out"), cut_off())
    assert sorted(tmp_path.iterdir()) == before
    if before:
        assert before[0].read_text() == "the last export"


def test_a_file_that_is_there_is_replaced_only_by_force(
    processes: Processes, server: Process, tmp_path: Path
) -> None:
    """G4: an export does not take the place of another file unless told to, and then with the usual permissions."""
    processes.run("import", "--server", server.address, "/force", "-", stdin=lines_of({b"a": b"1"}))
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    at = ("export", "--server", server.address, "/force", out)
    assert "--force" in complaint(processes.run(*at, code=ExitCode.USAGE))
    assert out.read_text() == "mine"
    assert processes.run(*at, "--force").stderr == b"exported 1 key\n"
    assert out.read_bytes() == lines_of({b"a": b"1"})
    out.unlink()
    processes.run(*at)
    (tmp_path / "other").touch()
    assert out.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_g9_an_export_to_a_full_disk_is_told_as_that(tmp_path: Path) -> None:
    """G9: an export that finds no space with its last lines only ends as ``DiskFull``, with nothing left."""
    sink = sinks.FileSink(tmp_path / "out")

    def scan() -> Iterator[tuple[bytes, bytes]]:
        yield b"a", b"1"
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, sink._file.fileno())
        os.close(full)

    with pytest.raises(DiskFull, match="no space left"):
        write_all(sink, scan())
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    """G4: a file that someone made while the export ran stays, and nothing is left of the export."""

    def scan() -> Iterator[tuple[bytes, bytes]]:
        yield b"a", b"1"
        (tmp_path / "out").write_text("mine")

    with pytest.raises(UsageError, match="there already"):
        write_all(sinks.FileSink(tmp_path / "out"), scan())
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("replace", [False, True])
def test_what_is_no_file_is_never_replaced(tmp_path: Path, replace: bool) -> None:
    """A directory, a pipe or a device is not renamed over, by force either."""
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "directory", tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(UsageError, match="not a file"), sinks.FileSink(path, replace=replace):
            pass


def test_an_export_that_is_killed_leaves_nothing_under_its_name(tmp_path: Path) -> None:
    """G8: until the block ends, what was written so far is under another name."""
    with sinks.FileSink(tmp_path / "out") as sink:
        sink.write(b"a", b"1")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out").read_bytes() == lines_of({b"a": b"1"})


def test_a_place_that_can_not_be_written_is_named(
    processes: Processes, server: Process, tmp_path: Path
) -> None:
    """An export to a directory that is not there fails with the path."""
    processes.run("import", "--server", server.address, "/place", "-", stdin=lines_of({b"a": b"1"}))
    done = processes.run(
        "export",
        "--server",
        server.address,
        "/place",
        tmp_path / "absent" / "out.jsonl",
        code=ExitCode.FAILED,
    )
    assert str(tmp_path / "absent") in complaint(done)


def test_base64_in_lines_is_the_usual_one() -> None:
    """Keys and values that are no text are standard base64 with padding, as every tool makes it."""
    row = json.loads(encode_pair(b"\xff\xfb\xf0!", b"\xff"))
    assert row == {"key_base64": base64.b64encode(b"\xff\xfb\xf0!").decode(), "value_base64": "/w=="}
