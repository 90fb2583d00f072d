"""The command line's view of synced realms: local copies looked at and reset, and what was lost brought home."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from harness import Processes, complaint, wait_until
from nodes import Pair, pairs, put
from reset_helpers import (
    BASE,
    QUEUED,
    READ_HERE,
    RECOVERED,
    THEIRS,
    kept_in,
    needs_reset,
    queue,
    read_kept,
    read_local,
    recreate,
    row_of,
    seed,
)

from understudy.cli.salvage import salvage
from understudy.client import ClientReset, Put, Realm
from understudy.client.local_store import LocalStore
from understudy.common.entry_json import LINE_BYTES_MAX
from understudy.common.errors import ExitCode
from understudy.v1 import log_pb2


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    started = Processes(Path(tmp_path_factory.mktemp("shared")))
    yield started
    started.close()


@pytest.fixture(scope="module")
def address(shared: Processes, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a primary that the tests share, each with a realm of its own."""
    return shared.primary(tmp_path_factory.mktemp("shared-primary") / "data").address


@pytest.fixture
def local(tmp_path: Path) -> Path:
    return tmp_path / "local"


def _status(processes: Processes, local: Path) -> dict[str, Any]:
    shown: dict[str, Any] = json.loads(processes.run("client", "status", local, "--json").stdout)
    return shown


def _reset(
    processes: Processes, local: Path, path: str, mode: str, address: str, *more: str, code: int = 0
) -> subprocess.CompletedProcess[bytes]:
    return processes.run(
        "client", "reset", local, path, "--mode", mode, "--server", address, *more, code=code
    )


# -- status ----------------------------------------------------------------------------------------------------


def test_status_shows_what_stands_in_a_directory(processes: Processes, address: str, local: Path) -> None:
    """Versions, queues and who has it open; also while somebody does, and without changing anything."""
    seed(address, local, "/status/one")
    with Realm.open("/status/two", server=None, directory=local) as realm:
        realm.commit([Put(b"key", b"value")])
    row = row_of(local, "/status/one")
    before = (local / "data.mdb").read_bytes()
    shown = _status(processes, local)
    assert list(shown) == ["client", "cluster", "epoch", "in_use_by", "realms"]
    assert shown["in_use_by"] is None
    assert shown["epoch"] == 1
    one, two = shown["realms"]
    assert one == {
        "realm": "/status/one",
        "version": 1,
        "entries": len(BASE),
        "bytes": row.copy.bytes,
        "safe_version": 0,
        "tail_dropped": 0,
        "pending_changes": 0,
        "pending_bytes": 0,
        "loading": None,
        "reset": None,
    }
    assert (two["realm"], two["version"], two["pending_changes"]) == ("/status/two", 0, 1)
    words = processes.run("client", "status", local).stdout.decode()
    assert "/status/one" in words
    assert "in use" in words
    assert (local / "data.mdb").read_bytes() == before
    with LocalStore.open(local):
        assert _status(processes, local)["in_use_by"] is not None


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["status", "{tmp}/none"], ExitCode.DIRECTORY, "none"),
        (["status", "{tmp}/file"], ExitCode.DIRECTORY, "file"),
        (["status", "{tmp}/foreign"], ExitCode.DIRECTORY, "foreign"),
        (["status", "{tmp}/damaged"], ExitCode.CORRUPT, "damaged"),
        (["reset", "{tmp}/none", "/a", "--mode", "discard"], ExitCode.FAILED, "no local copies"),
        (["reset", "{tmp}/foreign", "/a", "--mode", "discard"], ExitCode.FAILED, "no local copies"),
        (["reset", "{tmp}/damaged", "/a", "--mode", "discard"], ExitCode.CORRUPT, "damaged"),
        (["reset", "{tmp}/good", "/other", "--mode", "discard"], ExitCode.FAILED, "no local copy of /other"),
        (["reset", "{tmp}/good", "/good", "--mode", "discard"], ExitCode.UNREACHABLE, "127.0.0.1:1"),
    ],
)
def test_a_mistake_is_one_line_with_its_code(
    processes: Processes, tmp_path: Path, arguments: list[str], code: ExitCode, said: str
) -> None:
    """What can't be looked at or reset is named, and nothing is made or changed."""
    (tmp_path / "file").touch()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "holiday.jpg").touch()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "data.mdb").write_bytes(b"garbage" * 10_000)
    with Realm.open("/good", server=None, directory=tmp_path / "good") as realm:
        realm.commit([Put(b"key", b"value")])
    words = [word.format(tmp=tmp_path) for word in arguments]
    if "reset" in words:
        words += ["--server", "127.0.0.1:1", "--timeout", "1"]
    done = processes.run("client", *words, code=code)
    assert said in complaint(done)
    assert done.stdout == b""
    assert not (tmp_path / "none").exists()
    with LocalStore.open(tmp_path / "good") as store:
        assert store.paths() == ["/good"]


# -- reset -----------------------------------------------------------------------------------------------------


def test_a_copy_that_is_on_the_history_is_left_alone(processes: Processes, address: str, local: Path) -> None:
    """Where there is nothing to reset nothing is, and what was queued is uploaded."""
    seed(address, local, "/fine")
    queue(local, "/fine")
    done = _reset(processes, local, "/fine", "discard", address)
    assert b"nothing was reset" in done.stdout
    assert pairs(address, "/fine") == READ_HERE
    assert not kept_in(local)


def test_reset_recovers(processes: Processes, address: str, local: Path) -> None:
    """It says what was made again, what was not and why; and status shows it before, but not after."""
    needs_reset(address, local, "/recover")
    with Realm.open("/recover", server=address, directory=local, on_reset="manual") as realm:
        with pytest.raises(ClientReset) as raised:
            realm.wait_for_download(60)
        assert f"understudy client reset {local} /recover --mode" in raised.value.remedy
    [shown] = _status(processes, local)["realms"]
    assert shown["reset"] == {
        "reason": "REALM_RECREATED",
        "common_version": None,
        "attempted": None,
        "kept": None,
        "stopped": "that is left to the application",
    }
    said = processes.run("client", "status", local).stdout
    assert b"reset: REALM_RECREATED, that is left to the application" in said
    done = _reset(processes, local, "/recover", "recover", address)
    assert done.stdout.decode().splitlines() == [
        f"/recover was reset: 3 own operations made again, 1 dropped; the old copy is in {local / 'recovered'}",
        "  1 dropped: the server has deleted the key that it would update",
    ]
    assert pairs(address, "/recover") == read_local(local, "/recover") == RECOVERED
    [shown] = _status(processes, local)["realms"]
    assert shown["reset"] is None
    [kept] = kept_in(local)
    assert read_kept(kept, "/recover") == (READ_HERE, len(QUEUED))
    [shown] = _status(processes, kept)["realms"]
    assert shown["pending_changes"] == len(QUEUED)


def test_reset_discards(processes: Processes, address: str, local: Path) -> None:
    """As JSON, too."""
    needs_reset(address, local, "/discard")
    done = _reset(processes, local, "/discard", "discard", address, "--json")
    assert json.loads(done.stdout) == {"reset": True, "applied": 0, "dropped": 4, "why": {"DISCARDED": 4}}
    assert read_local(local, "/discard") == THEIRS
    assert len(kept_in(local)) == 1


def test_reset_waits_for_no_application(processes: Processes, address: str, local: Path) -> None:
    """A directory that is open is refused, and nothing is done to it."""
    needs_reset(address, local, "/open")
    with Realm.open("/open", server=None, directory=local) as realm:
        done = _reset(processes, local, "/open", "discard", address, code=ExitCode.DIRECTORY)
        assert "in use by process" in complaint(done)
        assert dict(realm.scan()) == READ_HERE


def test_reset_is_refused_where_recovery_is_forbidden(
    processes: Processes, address: str, local: Path
) -> None:
    """With the code for what an operator must decide; another mode goes on from there."""
    needs_reset(address, local, "/forbidden")
    processes.run("grant", "policy", "/forbidden", "--recovery", "forbidden", "--server", address)
    done = _reset(processes, local, "/forbidden", "recover", address, code=ExitCode.RESET_NEEDED)
    assert "forbids" in complaint(done)
    said = processes.run("client", "status", local).stdout.decode()
    assert "reset: REALM_RECREATED, the server forbids that changes are recovered" in said
    assert read_local(local, "/forbidden") == READ_HERE
    _reset(processes, local, "/forbidden", "recover_or_discard", address)
    assert read_local(local, "/forbidden") == THEIRS


def test_status_tells_what_an_application_s_callback_has_stopped(
    processes: Processes, address: str, local: Path
) -> None:
    """Until a reset is begun again: what its error was, and not that nothing was tried."""
    needs_reset(address, local, "/callback")

    def fail(_: object) -> None:
        raise OSError("no space left")

    with Realm.open("/callback", server=address, directory=local, before_reset=fail) as realm:
        wait_until(lambda: isinstance(realm.state.error, ClientReset))
    said = processes.run("client", "status", local).stdout.decode()
    assert "reset: REALM_RECREATED, before_reset failed: OSError('no space left')" in said
    with Realm.open("/callback", server=address, directory=local, on_reset="recover") as realm:
        realm.wait_for_upload(60)
    [shown] = _status(processes, local)["realms"]
    assert shown["reset"] is None


def test_reset_gets_a_realm_out_of_what_would_be_a_loop(
    processes: Processes, address: str, local: Path
) -> None:
    """Where an application's resets led to one another and were stopped, asking for one by hand begins anew."""
    needs_reset(address, local, "/loop")
    with Realm.open(
        "/loop",
        server=address,
        directory=local,
        on_reset="discard",
        after_reset=lambda *_: recreate(address, "/loop"),
    ) as realm:
        wait_until(lambda: isinstance(realm.state.error, ClientReset))
        with pytest.raises(ClientReset, match="has just led to this one"):
            realm.wait_for_download(60)
        realm.commit([Put(b"later", b"1")])
    [shown] = _status(processes, local)["realms"]
    assert shown["reset"]["attempted"] == "discard"
    assert "has just led to this one" in shown["reset"]["stopped"]
    _reset(processes, local, "/loop", "recover", address)
    assert pairs(address, "/loop") == read_local(local, "/loop") == THEIRS | {b"later": b"1"}
    [shown] = _status(processes, local)["realms"]
    assert shown["reset"] is None


# -- salvage ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lost:
    """What an old primary had and the new one lacks."""

    address: str  # the new one's
    file: Path
    pairs: dict[bytes, bytes]


@pytest.fixture(scope="module")
def lost(shared: Processes, tmp_path_factory: pytest.TempPathFactory) -> Lost:
    pair = Pair(shared, tmp_path_factory.mktemp("lost"))
    put(pair.primary.address, "/lost", (b"before", b"1"), durability="replica")
    pair.replica.kill()
    for number in range(3):
        put(pair.primary.address, "/lost", (b"key/%d" % number, b"1"))
    pair.primary.kill()
    shared.run("promote", pair.b)
    new = shared.primary(pair.b)
    shared.run("rewind", pair.a, "--to", new.address, "--id", "a")
    [file] = (pair.a / "set-aside").glob("entries-*.jsonl")
    return Lost(new.address, file, {b"before": b"1"} | {b"key/%d" % number: b"1" for number in range(3)})


def test_the_example_of_salvage_is_a_file_as_rewind_writes_it(lost: Lost) -> None:
    """Its name in ``--help`` has the same form."""
    name = r"entries-\d+-\d+-[0-9a-f]{12}\.jsonl"
    assert re.fullmatch(name, lost.file.name)
    assert re.search(rf"set-aside/{name} ", salvage.get_help(click.Context(salvage)))


def _salvage(
    processes: Processes, file: Path, address: str, *more: str, code: int = 0
) -> subprocess.CompletedProcess[bytes]:
    return processes.run("salvage", file, "--server", address, *more, code=code)


def _counts(done: subprocess.CompletedProcess[bytes]) -> tuple[int, ...]:
    shown = json.loads(done.stdout)
    assert list(shown) == ["appended", "renewed", "known", "refused", "problems", "left_out"]
    return tuple(shown[name] for name in ("appended", "renewed", "known", "refused"))


def _changed(line: bytes, **fields: object) -> bytes:
    return json.dumps(json.loads(line) | fields).encode() + b"\n"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda lines: [*lines, b"no line of an export\n"],
        lambda lines: [*lines[:-1], lines[-1][:40]],
        lambda lines: [*lines, b"[]\n"],
        lambda lines: [*lines, b"\xff\xfe\n"],
        lambda lines: [*lines, _changed(lines[-1], entry_base64="&&&")],
        lambda lines: [*lines, _changed(lines[-1], entry_base64=7)],
    ],
    ids=["words", "cut off", "no object", "no text", "no base64", "a number"],
)
def test_a_file_that_is_no_export_is_refused_before_anything_of_it_is_sent(
    processes: Processes, lost: Lost, tmp_path: Path, spoil: Any
) -> None:
    """The line is named, and the server has nothing of those before it either."""
    lines = lost.file.read_bytes().splitlines(keepends=True)
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_bytes(b"".join(spoil(lines)))
    before = pairs(lost.address, "/lost")
    done = _salvage(processes, wrong, lost.address, code=ExitCode.USAGE)
    assert f"wrong.jsonl, line {len(spoil(lines))}: " in complaint(done)
    assert pairs(lost.address, "/lost") == before


def test_g9_a_line_without_end_is_not_read_whole(
    processes: Processes, lost: Lost, address: str, tmp_path: Path
) -> None:
    """G9: of a file that is no export, no more is held than a line may have; it is named, with what to do."""
    endless = tmp_path / "endless.jsonl"
    endless.write_bytes(lost.file.read_bytes().splitlines(keepends=True)[0])
    os.truncate(endless, 2 * LINE_BYTES_MAX)  # without taking up space
    said = complaint(_salvage(processes, endless, address, code=ExitCode.USAGE))
    assert f"endless.jsonl, line 2: it has more than {LINE_BYTES_MAX:,} bytes" in said
    assert "as `understudy rewind` left it" in said


def test_g10_forged_lines_are_refused(processes: Processes, lost: Lost, address: str, tmp_path: Path) -> None:
    """G10: what this cluster has not signed is counted and named, and does not come home; nor to another cluster."""
    forged = tmp_path / "forged.jsonl"
    lines = lost.file.read_bytes()
    rows = [json.loads(line) for line in lines.splitlines()]
    row = next(row for row in rows if row["kind"] == "change")
    entry = log_pb2.Entry.FromString(base64.b64decode(row["entry_base64"]))
    entry.change = entry.change.replace(b"key/0", b"key/X")
    row["entry_base64"] = base64.b64encode(entry.SerializeToString()).decode()
    forged.write_text(json.dumps(row))
    before = pairs(lost.address, "/lost")
    done = _salvage(processes, forged, lost.address, "--json", code=ExitCode.FAILED)
    assert _counts(done) == (0, 0, 0, 1)
    assert "not made by a server of this cluster" in json.loads(done.stdout)["problems"][0]
    assert pairs(lost.address, "/lost") == before
    done = _salvage(processes, lost.file, address, code=ExitCode.FAILED)
    assert b"were refused" in done.stderr
    assert b"not made by a server of this cluster" in done.stderr


def test_g6_what_an_old_primary_had_comes_home_once(processes: Processes, lost: Lost, tmp_path: Path) -> None:
    """G6: as it was; a second time, and half of it a third time, nothing happens."""
    done = _salvage(processes, lost.file, lost.address, "--json")
    assert _counts(done) == (3, 0, 0, 0)
    assert pairs(lost.address, "/lost") == lost.pairs
    done = _salvage(processes, lost.file, lost.address)
    assert done.stdout.decode().splitlines() == [
        "0 changes came home as they were, 0 as new ones; the server had 3"
    ]
    half = tmp_path / "half.jsonl"
    half.write_bytes(b"".join(lost.file.read_bytes().splitlines(keepends=True)[-1:]))
    assert _counts(_salvage(processes, half, lost.address, "--json")) == (0, 0, 1, 0)
    assert pairs(lost.address, "/lost") == lost.pairs


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("none.jsonl", ExitCode.FAILED, "No such file"),
        ("folder", ExitCode.USAGE, "directory"),
        ("pipe", ExitCode.USAGE, "no regular file"),
    ],
)
def test_a_file_that_is_none_is_named(
    processes: Processes, tmp_path: Path, name: str, code: ExitCode, said: str
) -> None:
    """Before any server is asked for anything."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    done = _salvage(processes, tmp_path / name, "127.0.0.1:1", code=code)
    assert said in done.stderr.decode()
    assert b"Traceback" not in done.stderr


def test_an_empty_file_brings_nothing(processes: Processes, lost: Lost, tmp_path: Path) -> None:
    """Nothing to bring home is no error."""
    (tmp_path / "empty.jsonl").touch()
    assert _counts(_salvage(processes, tmp_path / "empty.jsonl", lost.address, "--json")) == (0, 0, 0, 0)


def test_salvage_to_nobody(processes: Processes, lost: Lost) -> None:
    """A server that does not answer is named."""
    done = _salvage(processes, lost.file, "127.0.0.1:1", code=ExitCode.UNREACHABLE)
    assert "127.0.0.1:1" in complaint(done)
