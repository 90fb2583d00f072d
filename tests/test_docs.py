"""The examples of the documents do what the text around them says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from harness import DEADLINE_S, Processes, wait_until
from nodes import Pair, checkpoint, pairs, put
from reset_helpers import (
    QUEUED,
    READ_HERE,
    RECOVERED,
    THEIRS,
    kept_in,
    needs_reset,
    read_local,
    row_of,
)

from understudy.client import Add, OutcomeUnknown, Realm, Server, connect
from understudy.client.reset_table import MODES
from understudy.v1 import sync_pb2

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("deploy/*.md")]
_HEADING = re.compile(r"^#+ (.*)$")


class Example(NamedTuple):
    """A block of Python in a document."""

    document: str
    heading: str
    at: int  # from 0, below that heading


def _examples() -> dict[Example, str]:
    found: dict[Example, str] = {}
    for document in DOCUMENTS:
        heading, at, block = "", 0, None
        for number, line in enumerate(document.read_text().splitlines(), 1):
            if block is None and (match := _HEADING.match(line)):
                heading, at = match[1], 0
            elif block is None and line == "```python":
                block = "\n" * number  # so that a traceback names the document's line
            elif block is not None and line == "```":
                found[Example(str(document.relative_to(ROOT)), heading, at)] = block
                at, block = at + 1, None
            elif block is not None:
                block += line + "\n"
    return found


EXAMPLES = _examples()
RESET, README = "docs/client-reset.md", "README.md"
TEN_LINES = Example(RESET, "The ten lines", 0)
CALLBACKS = Example(RESET, "Callbacks", 0)
DECIDING = Example(RESET, "Deciding yourself", 0)
KEPT = Example(RESET, "Looking into what was kept", 0)
SYNCED = Example(README, "Synced realms", 0)
FROM_PYTHON = Example(README, "From Python", 0)
EMBEDDED = Example(README, "From Python", 1)
UNKNOWN = Example(README, "From Python", 2)
READ_STORE = Example("docs/recovery-without-understudy.md", "Read the store", 0)
RUN = {TEN_LINES, CALLBACKS, DECIDING, KEPT, SYNCED, FROM_PYTHON, EMBEDDED, UNKNOWN, READ_STORE}
NOT_RUN: dict[Example, str] = {}  # and why


def test_every_example_is_run() -> None:
    """No example was added to a document without saying here what becomes of it."""
    assert EXAMPLES.keys() == RUN | NOT_RUN.keys()


def _run(example: Example, replaced: dict[str, str] | None = None, **names: object) -> dict[str, Any]:
    """Runs an example with these names and, where it names places that are not here, with others."""
    code = EXAMPLES[example]
    for old, new in (replaced or {}).items():
        assert old in code
        code = code.replace(old, new)
    space: dict[str, Any] = {"__name__": "example", **names}
    exec(compile(code, str(ROOT / example.document), "exec"), space)
    return space


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    started = Processes(Path(tmp_path_factory.mktemp("shared")))
    yield started
    started.close()


@pytest.fixture(scope="module")
def pair(shared: Processes, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(shared, tmp_path_factory.mktemp("pair"))


@pytest.fixture
def server(pair: Pair) -> Iterator[str]:
    """An address, without any of the examples' realms."""
    yield pair.primary.address
    with connect(pair.primary.address) as connected:
        for found in connected.realms():
            connected.drop_realm(found.path)


@pytest.fixture
def local(tmp_path: Path) -> Path:
    return tmp_path / "local"


# -- client reset ----------------------------------------------------------------------------------------------


def test_the_ten_lines(server: str, local: Path) -> None:
    """What was written locally is on the server when they end."""
    _run(TEN_LINES, server=server, directory=local)
    assert pairs(server, "/notes") == read_local(local, "/notes") == {b"todo/1": b"milk", b"count": b"1"}


def test_callbacks(server: str, local: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are called with what the text says, and the copy is the server's when the block ends."""
    needs_reset(server, local, "/notes")
    _run(CALLBACKS, server=server, directory=local)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["giving up version 1 with 4 keys", "somebody has deleted b'doomed'"]
    assert read_local(local, "/notes") == RECOVERED


def test_deciding_yourself(server: str, local: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Why, and where the data are; and nothing is touched."""
    needs_reset(server, local, "/notes")
    space = _run(DECIDING, server=server, directory=local)
    assert capsys.readouterr().out == f"REALM_RECREATED None {local}\n"
    assert space["unsent"] == READ_HERE
    assert read_local(local, "/notes") == READ_HERE
    assert not kept_in(local)
    assert row_of(local, "/notes").reset.attempted == ""


def test_looking_into_what_was_kept(server: str, local: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each kept copy is opened and shown with its queue."""
    needs_reset(server, local, "/notes")
    with Realm.open("/notes", server=server, directory=local, on_reset="discard") as realm:
        realm.wait_for_download(DEADLINE_S)
        wait_until(lambda: realm.state.reset is None)
        assert dict(realm.scan()) == THEIRS
    _run(KEPT, directory=local)
    [kept] = kept_in(local)
    assert capsys.readouterr().out == f"{kept.name} 1 {len(QUEUED)} {dict(sorted(READ_HERE.items()))}\n"


def test_the_document_names_what_the_code_has() -> None:
    """Modes and reasons are those of the code, all of them."""
    text = (ROOT / RESET).read_text()
    assert all(f"`{mode}`" in text for mode in MODES)
    reasons = set(re.findall(r"^\| `([A-Z_]+)` \|", text, re.MULTILINE))
    assert reasons == set(sync_pb2.ResetReason.keys()) - {"RESET_UNSPECIFIED"}


# -- the README ------------------------------------------------------------------------------------------------

_BOTH = "10.0.0.1:7850,10.0.0.2:7850"


def test_a_synced_realm(pair: Pair, server: str, local: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is read at once, and how far it is safe is told."""
    _run(SYNCED, {_BOTH: pair.addresses, 'directory="local"': f'directory="{local}"'})
    assert capsys.readouterr().out.splitlines()[-1].startswith("b'milk' ")
    assert pairs(server, "/notes")[b"count"] == b"1"


def test_from_python(pair: Pair, server: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Blocking and not."""
    _run(FROM_PYTHON, {_BOTH: pair.addresses, "127.0.0.1:7850": server})
    assert capsys.readouterr().out.endswith(" b'3'\n")
    assert pairs(server, "/inventory") == {b"apple": b"3", b"sold": b"2"}


def test_an_application_that_is_the_server(tmp_path: Path) -> None:
    """A primary within the process."""
    space = _run(EMBEDDED, {'"data"': f'"{tmp_path / "data"}"', "127.0.0.1:7850": "127.0.0.1:0"})
    assert space["tx"].receipt.version == 1


def test_what_no_answer_means(server: str) -> None:
    """The client goes on trying, and tells: here, with an answer that comes too late."""

    class Late:
        """A server whose answers come when the waiting is over."""

        def __init__(self, connected: Server) -> None:
            self._connected = connected

        def commit(self, *arguments: Any, timeout_s: float) -> object:
            return self._connected.commit(*arguments, timeout_s=timeout_s / 1e9)

        def __getattr__(self, name: str) -> object:
            return getattr(self._connected, name)

    with connect(server) as connected:
        space = _run(UNKNOWN, server=Late(connected), Add=Add, OutcomeUnknown=OutcomeUnknown)
        assert space["receipt"].version == 1
    assert pairs(server, "/inventory") == {b"sold": b"1"}


# -- recovery without Understudy -------------------------------------------------------------------------------


def test_a_store_is_read_with_lmdb_alone(
    processes: Processes, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The example prints each pair with its realm, as it was put."""
    primary = processes.primary(tmp_path / "a")
    put(primary.address, "/inventory", (b"apple", b"3"), (b"pear", b"4"))
    checkpoint(primary.address)
    primary.terminate()
    processes.run("backup", "-f", tmp_path / "a", "-t", tmp_path / "b")
    monkeypatch.chdir(tmp_path / "b")
    _run(READ_STORE)
    found = [line for line in capsys.readouterr().out.splitlines() if line.startswith("/inventory")]
    assert found == ["/inventory b'apple' b'3'", "/inventory b'pear' b'4'"]
