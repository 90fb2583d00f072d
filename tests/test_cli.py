"""The command line: what it prints, what it ends with, and what it says where something is wrong."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from harness import DEADLINE_S, Process, Processes, complaint, wait_until

from understudy.cli.main import cli
from understudy.cli.options import byte_size
from understudy.common.errors import ExitCode
from understudy.common.operations import TRANSACTION_BYTES_MAX
from understudy.common.types import KEY_BYTES_MAX

COMMANDS = {
    *("primary", "replica", "promote", "fence", "rewind", "forget"),
    *("status", "verify", "log", "realms"),
    *("get", "put", "delete", "scan", "import", "export"),
}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Processes that live as long as this module's tests."""
    started = Processes(tmp_path_factory.mktemp("running"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def server(running: Processes, tmp_path_factory: pytest.TempPathFactory) -> Process:
    """A primary that tests share; each uses a realm of its own."""
    return running.primary(tmp_path_factory.mktemp("server") / "data")


# -- help ------------------------------------------------------------------------------------------------------


def test_help_lists_every_command() -> None:
    """``understudy --help`` names every command, and the exit codes."""
    shown = CliRunner().invoke(cli, ["--help"]).output
    listed = re.findall(
        r"^  (\w+)  ", shown.partition("Commands:")[2].partition("Exit codes:")[0], re.MULTILINE
    )
    assert set(listed) >= COMMANDS
    assert "..." not in shown.partition("Commands:")[2]  # nothing is cut off


@pytest.mark.parametrize("name", [*sorted(cli.list_commands(click.Context(cli))), ""])
def test_help_has_an_example_and_the_exit_codes(name: str) -> None:
    """Every command's help has an example that calls it, and the one table of exit codes."""
    shown = CliRunner().invoke(cli, [name, "--help"] if name else ["--help"]).output
    assert f"understudy {name}" in shown.partition("Example")[2]
    table = shown.partition("Exit codes:")[2]
    assert [int(code) for code in re.findall(r"^ +(\d)  ", table, re.MULTILINE)] == [
        code.value for code in ExitCode
    ]


def test_help_does_not_wait_for_what_only_commands_need() -> None:
    """Help and completion come at once, since nothing heavy is imported before a command runs."""
    heavy = [
        "grpc",
        "google.protobuf",
        "lmdb",
        "rich",
        "asyncio",
        "structlog",
        "uvloop",
        "cryptography",
        "prometheus_client",
    ]
    script = (
        "import sys, click; from understudy.cli.main import cli; context = click.Context(cli); "
        "[cli.get_command(context, name) for name in cli.list_commands(context)]; "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_version(processes: Processes) -> None:
    """``--version`` prints the version of the installed package."""
    assert re.fullmatch(rb"understudy, version \d+\.\d+\.\d+\n", processes.run("--version").stdout)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("65536", 65536),
        ("256MB", 256_000_000),
        ("1.5GiB", 3 << 29),
        ("1 kib", 1024),
        ("2tb", 2 * 10**12),
    ],
)
def test_sizes_are_given_as_people_write_them(text: str, size: int) -> None:
    """Decimal and binary units, in either case."""
    assert byte_size(text) == size


@pytest.mark.parametrize("text", ["", "-1", "MB", "1.5", "1XB", "1MBs", "1e6", "0x10"])
def test_what_is_no_size_is_refused(text: str) -> None:
    """Half a byte and unknown units are usage errors."""
    with pytest.raises(click.BadParameter):
        byte_size(text)


# -- running ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_says_one_line_and_ends_cleanly(
    processes: Processes, tmp_path: Path, number: signal.Signals
) -> None:
    """A primary prints where it serves, nothing else, and ends with 0 at SIGTERM or Ctrl-C."""
    primary = processes.primary(tmp_path / "data")
    assert primary.stdout == f"primary ready on {primary.address}\n"
    assert not primary.address.endswith(":0")
    primary.send(number)
    assert primary.wait() == ExitCode.DONE
    assert primary.stdout == f"primary ready on {primary.address}\n"


SLOW_SERVER = """
import asyncio, contextlib, sys
from understudy.cli.serve import serve

class Server:
    address = "nowhere"

@contextlib.asynccontextmanager
async def serving():
    if "slow-start" in sys.argv:
        print("starting", flush=True)
        try:
            await asyncio.Event().wait()
        finally:
            print("given up", flush=True)
    yield Server()
    print("stopping", flush=True)
    await asyncio.Event().wait()

serve("server", serving, lambda _: asyncio.get_running_loop().create_future(), log_format="console")
print("ended", flush=True)
"""


@contextlib.contextmanager
def slow_server(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A server that never comes to its end, or to its start, by itself."""
    command = [sys.executable, "-c", SLOW_SERVER, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        deadline = threading.Timer(DEADLINE_S, process.kill)  # or a test that fails would read for ever
        deadline.start()
        try:
            yield process
        finally:
            deadline.cancel()
            process.kill()


def next_line(process: subprocess.Popen[str]) -> str:
    """What it prints next."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(number: signal.Signals) -> None:
    """A server that hangs while it ends is ended by a second signal, with a shell's code for that signal."""
    with slow_server() as process:
        assert next_line(process) == "server ready on nowhere"
        process.send_signal(number)
        assert next_line(process) == "stopping"
        process.send_signal(number)
        assert process.wait(60) == 128 + number


def test_a_server_that_still_starts_can_be_stopped() -> None:
    """A signal before a server is ready ends it cleanly too."""
    with slow_server("slow-start") as process:
        assert next_line(process) == "starting"
        process.send_signal(signal.SIGTERM)
        assert [next_line(process), next_line(process)] == ["given up", "ended"]
        assert process.wait(60) == 0


def test_the_service_manager_is_told(processes: Processes, tmp_path: Path) -> None:
    """$NOTIFY_SOCKET gets READY=1 once the server serves, and STOPPING=1 when it ends."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(60)
        processes.environment["NOTIFY_SOCKET"] = str(tmp_path / "notify")
        primary = processes.primary(tmp_path / "data")
        assert manager.recv(100) == b"READY=1"
        assert primary.terminate() == 0
        assert manager.recv(100) == b"STOPPING=1"


def test_logs_are_lines_of_json_where_asked(processes: Processes, tmp_path: Path) -> None:
    """With ``--log-format json`` every line on standard error is an object with event, level and time."""
    primary = processes.primary(tmp_path / "data", "--log-format", "json")
    processes.run("put", "--server", primary.address, "/a", "k", "v")
    assert primary.terminate() == 0
    rows = [json.loads(line) for line in primary.stderr.splitlines()]
    assert {"serving", "stopping"} <= {row["event"] for row in rows}
    assert all({"level", "timestamp"} <= set(row) for row in rows)


def test_settings_come_from_the_environment_too(processes: Processes, tmp_path: Path) -> None:
    """A server starts from variables alone."""
    processes.environment |= {
        "UNDERSTUDY_DATA_DIR": str(tmp_path / "data"),
        "UNDERSTUDY_LISTEN": "127.0.0.1:0",
        "UNDERSTUDY_DURABILITY": "replica",
    }
    primary = processes.start("primary")
    status = json.loads(processes.run("status", "--server", primary.address, "--json").stdout)
    assert status["durability"] == "replica"


def test_a_server_ends_with_the_code_of_what_ended_it() -> None:
    """When a running server has to end because of an error, that error comes out of ``serve``."""
    script = (
        SLOW_SERVER.replace("serve(", "def run():\n    serve(")
        .replace("asyncio.get_running_loop().create_future()", "failed()")
        .replace('    print("stopping", flush=True)\n    await asyncio.Event().wait()\n', "")
        + """
def failed():
    from understudy.common.errors import StorageFailed
    future = asyncio.get_running_loop().create_future()
    future.set_result(StorageFailed("the disk is gone"))
    return future

from understudy.common.errors import StorageFailed
try:
    run()
except StorageFailed as error:
    print(error)
"""
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["ended", "server ready on nowhere", "the disk is gone"], done.stderr


# -- mistakes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["nonsense"], ExitCode.USAGE),
        (["get", "/a", "k"], ExitCode.USAGE),
        (["primary", "--log-floor", "much"], ExitCode.USAGE),
        (["status"], ExitCode.USAGE),
        (["status", "dir", "--server", "127.0.0.1:1"], ExitCode.USAGE),
        (["verify", "--server", "127.0.0.1:1"], ExitCode.USAGE),
        (["delete", "--server", "127.0.0.1:1", "/a"], ExitCode.USAGE),
        (["log", "dir", "--from", "0"], ExitCode.USAGE),
    ],
)
def test_wrong_usage_is_explained(processes: Processes, arguments: list[str], code: ExitCode) -> None:
    """A mistyped command gets its usage and exit code 2."""
    done = processes.run(*arguments, code=code)
    assert done.stderr.startswith(b"Usage: understudy")
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["primary"], ExitCode.USAGE, "--data-dir"),
        (["replica", "--data-dir", "{tmp}/new"], ExitCode.USAGE, "--primary"),
        (
            ["primary", "--data-dir", "{tmp}/new", "--listen", "0.0.0.0:0"],
            ExitCode.NOT_PERMITTED,
            "--tls-cert",
        ),
        (["primary", "--data-dir", "{tmp}/new", "--listen", "nowhere"], ExitCode.USAGE, "HOST:PORT"),
        (["primary", "--data-dir", "{tmp}/new", "--config", "{tmp}/none.toml"], ExitCode.USAGE, "none.toml"),
        (["primary", "--data-dir", "{tmp}/file"], ExitCode.DIRECTORY, "not a directory"),
        (["primary", "--data-dir", "{tmp}/foreign"], ExitCode.DIRECTORY, "not a data directory"),
        (["primary", "--data-dir", "{tmp}/newer"], ExitCode.DIRECTORY, "newer version"),
        (["primary", "--data-dir", "{tmp}/damaged"], ExitCode.CORRUPT, "node.json"),
        (["promote", "{tmp}/none"], ExitCode.DIRECTORY, "node.json"),
        (["rewind", "{tmp}/none", "--to", "127.0.0.1:1"], ExitCode.DIRECTORY, "node.json"),
        (["rewind", "{tmp}/none", "--to", "somewhere"], ExitCode.USAGE, "HOST:PORT"),
        (["status", "{tmp}/foreign"], ExitCode.DIRECTORY, "node.json"),
        (["verify", "{tmp}/none"], ExitCode.DIRECTORY, "node.json"),
        (["log", "{tmp}/foreign"], ExitCode.DIRECTORY, "node.json"),
        (["status", "--server", "127.0.0.1:1"], ExitCode.UNREACHABLE, "127.0.0.1:1"),
        (["forget", "b", "--server", "127.0.0.1:1"], ExitCode.UNREACHABLE, "127.0.0.1:1"),
        (["forget", "b", "--server", "nowhere"], ExitCode.USAGE, "HOST:PORT"),
        (
            ["forget", "b\udcff", "--server", "127.0.0.1:1"],
            ExitCode.USAGE,
            r"bad id 'b\udcff': it is not UTF-8",
        ),
        (["fence", "--server", "127.0.0.1:1"], ExitCode.UNREACHABLE, "127.0.0.1:1"),
        (["fence", "--server", "nowhere"], ExitCode.USAGE, "HOST:PORT"),
        (["get", "--server", "127.0.0.1:1", "/a", "k"], ExitCode.UNREACHABLE, "127.0.0.1:1"),
        (["put", "--server", "127.0.0.1:1", "/a", "k", "v"], ExitCode.UNREACHABLE, "127.0.0.1:1"),
        (["import", "--server", "127.0.0.1:1", "/a", "-"], ExitCode.UNREACHABLE, "127.0.0.1:1"),
        (["export", "--server", "127.0.0.1:1", "/a"], ExitCode.UNREACHABLE, "127.0.0.1:1"),
        (["realms", "--server", "somewhere"], ExitCode.USAGE, "HOST:PORT"),
        (
            ["verify", "--server", "127.0.0.1:1", "--against", "127.0.0.1:1"],
            ExitCode.UNREACHABLE,
            "127.0.0.1:1",
        ),
    ],
)
def test_a_mistake_is_one_line_with_its_remedy(
    processes: Processes, tmp_path: Path, arguments: list[str], code: ExitCode, said: str
) -> None:
    """What a person got wrong is one line on standard error and the exit code of its kind, never a traceback."""
    (tmp_path / "file").touch()
    for name, node in (
        ("foreign", None),
        ("newer", '{"format": 2, "role": "primary", "cluster": "", "node": ""}'),
        ("damaged", '{"format": 1, "ro'),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / ("node.json" if node else "holiday.jpg")).write_text(node or "")
    done = processes.run(*(argument.format(tmp=tmp_path) for argument in arguments), code=code)
    assert said in complaint(done)
    assert done.stdout == b""


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_is_not_ours_to_write_is_refused(processes: Processes, tmp_path: Path) -> None:
    """A data directory without write permission is named."""
    tmp_path.chmod(0o500)
    done = processes.run("primary", "--data-dir", tmp_path / "data", code=ExitCode.DIRECTORY)
    assert "Permission denied" in complaint(done)


def test_a_port_in_use_is_named(processes: Processes, server: Process, tmp_path: Path) -> None:
    """A second server on one port is refused, with the address, and its directory is free again."""
    arguments = ("primary", "--data-dir", tmp_path / "data", "--listen")
    done = processes.run(*arguments, server.address, code=ExitCode.USAGE)
    (said,) = [line for line in done.stderr.decode().splitlines() if line.startswith("understudy: ")]
    assert server.address in said
    assert processes.primary(tmp_path / "data").address


def test_a_directory_in_use_is_refused(processes: Processes, tmp_path: Path) -> None:
    """G4: a second process on one directory is refused, with the first one's process id."""
    primary = processes.primary(tmp_path / "data")
    for arguments in (
        ("primary", "--data-dir", tmp_path / "data", "--listen", "127.0.0.1:0"),
        ("verify", tmp_path / "data"),
        ("rewind", tmp_path / "data", "--to", "127.0.0.1:1"),
    ):
        assert str(primary.pid) in complaint(processes.run(*arguments, code=ExitCode.DIRECTORY))


class Garbage:
    """A listener that answers everything with what no gRPC server says."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

    def __enter__(self) -> Garbage:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


def test_a_peer_that_speaks_something_else_is_named(processes: Processes) -> None:
    """An address where no Understudy listens gives an error with that address, not a traceback."""
    with Garbage() as garbage:
        done = processes.run("status", "--server", garbage.address, code=ExitCode.UNREACHABLE)
    assert garbage.address in complaint(done)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["get", "no-slash", "k"], ExitCode.USAGE, "no-slash"),
        (["get", "/a//b", "k"], ExitCode.USAGE, "/a//b"),
        (["get", "/.hidden", "k"], ExitCode.USAGE, ".hidden"),
        (["put", "/a b", "k", "v"], ExitCode.USAGE, "/a b"),
        (["put", "/ä", "k", "v"], ExitCode.USAGE, "bad realm path"),
        (["put", "/" + "a" * 300, "k", "v"], ExitCode.USAGE, "255"),
        (["put", "/mistakes", "", "v"], ExitCode.USAGE, "1 to 480"),
        (["put", "/mistakes", "k" * (KEY_BYTES_MAX + 1), "v"], ExitCode.USAGE, "481 bytes"),
        (["put", "/mistakes", b"\xff", "v"], ExitCode.USAGE, "--base64"),
        (["put", "/mistakes", "k", b"\xff"], ExitCode.USAGE, "--base64"),
        (["put", "/mistakes", "--base64", "not base64", "v"], ExitCode.USAGE, "base64"),
        (["delete", "/mistakes", "--range", "b", "a"], ExitCode.USAGE, "empty range"),
        (["get", "/absent", "k"], ExitCode.FAILED, "/absent"),
        (["scan", "/absent"], ExitCode.FAILED, "/absent"),
        (["realms", "--drop", "/absent", "--yes"], ExitCode.FAILED, "/absent"),
        (["get", "/__system", "history-key"], ExitCode.NOT_PERMITTED, "/__system"),
        (["put", "/__system", "history-key", "mine"], ExitCode.NOT_PERMITTED, "/__system"),
        (["realms", "--drop", "/__system", "--yes"], ExitCode.NOT_PERMITTED, "/__system"),
    ],
)
def test_bad_requests_are_refused(
    processes: Processes, server: Process, arguments: list[str], code: ExitCode, said: str
) -> None:
    """Bad realm paths and keys, unknown realms and the system's own realms are refused with the reason."""
    # An argument that is not UTF-8 reaches a process as bytes.
    words = [os.fsdecode(argument) for argument in arguments]
    done = processes.run(words[0], "--server", server.address, *words[1:], code=code)
    assert said in complaint(done)


def test_a_value_beyond_the_limit_is_refused(processes: Processes, server: Process) -> None:
    """A value of 16 MiB is beyond what a transaction holds with its key; just below it is not."""
    put = ("put", "--server", server.address, "/large", "k", "-")
    done = processes.run(*put, stdin=bytes(TRANSACTION_BYTES_MAX), code=ExitCode.USAGE)
    assert "16,777,216 are allowed" in complaint(done)
    largest = os.urandom(TRANSACTION_BYTES_MAX - 17)
    processes.run(*put, stdin=largest)
    assert processes.run("get", "--server", server.address, "/large", "k").stdout == largest


# -- data ------------------------------------------------------------------------------------------------------


def test_a_value_comes_back_byte_for_byte(processes: Processes, server: Process) -> None:
    """``put`` and ``get`` neither add nor change a byte, whatever the value and the key."""
    data = bytes(range(256)) + b"\n"
    at = ("--server", server.address, "/bytes")
    processes.run("put", *at, "text", "1")
    processes.run("put", *at, "raw", "-", stdin=data)
    processes.run("put", *at, "--base64", "/wA=", "AP8=")
    assert processes.run("get", *at, "text").stdout == b"1"
    assert processes.run("get", *at, "raw").stdout == data
    assert processes.run("get", *at, "--base64", "/wA=").stdout == b"\x00\xff"
    shown = processes.run("get", *at, "--base64", "/wA=", "--json").stdout
    assert json.loads(shown) == {"key_base64": "/wA=", "value_base64": "AP8="}


def test_a_missing_key_is_said(processes: Processes, server: Process) -> None:
    """``get`` of a key that is not there prints nothing, says so, and ends with 1."""
    processes.run("put", "--server", server.address, "/missing", "there", "1")
    done = processes.run("get", "--server", server.address, "/missing", "elsewhere", code=ExitCode.FAILED)
    assert done.stdout == b""
    assert complaint(done) == "understudy: no key elsewhere in /missing"


def test_a_write_is_answered_with_its_receipt(processes: Processes, server: Process) -> None:
    """``put`` and ``delete`` print realm, version, LSN and digest, which the log has too."""
    put = json.loads(processes.run("put", "--server", server.address, "/receipt", "k", "v", "--json").stdout)
    gone = json.loads(processes.run("delete", "--server", server.address, "/receipt", "k", "--json").stdout)
    assert (put["realm"], put["version"], gone["version"]) == ("/receipt", 1, 2)
    assert gone["lsn"] > put["lsn"]
    assert re.fullmatch("[0-9a-f]{64}", put["digest"])


def test_keys_and_ranges_are_deleted(processes: Processes, server: Process) -> None:
    """``delete`` takes keys away, or all keys from START to before END; "" is no bound."""
    at = ("--server", server.address, "/deleting")
    for key in "abcdefg":
        processes.run("put", *at, key, key)
    processes.run("delete", *at, "a", "never-there")
    processes.run("delete", *at, "--range", "c", "e")
    assert processes.run("scan", *at).stdout == b"b\tb\ne\te\nf\tf\ng\tg\n"
    processes.run("delete", *at, "--range", "f", "")
    assert processes.run("scan", *at).stdout == b"b\tb\ne\te\n"


def test_deleting_from_a_realm_that_is_none_makes_none(processes: Processes, server: Process) -> None:
    """A mistyped path is named, with keys and with a range, and no empty realm comes of it."""
    for what in (["key"], ["--range", "", ""]):
        done = processes.run("delete", "--server", server.address, "/mistyped", *what, code=ExitCode.FAILED)
        assert "/mistyped" in complaint(done)
    assert b"/mistyped" not in processes.run("realms", "--server", server.address).stdout


def test_a_scan_goes_from_start_to_end(processes: Processes, server: Process) -> None:
    """``scan`` keeps to start, end, limit and direction, and shows what is no text in quotes, with escapes."""
    at = ("--server", server.address, "/scanning")
    for key in "abcd":
        processes.run("put", *at, key, key.upper())
    processes.run("put", *at, "--base64", "/w==", "AA==")

    def keys(*options: str) -> list[str]:
        shown = processes.run("scan", *at, "--json", *options).stdout
        return [row.get("key", row.get("key_base64")) for row in map(json.loads, shown.splitlines())]

    assert keys() == ["a", "b", "c", "d", "/w=="]
    assert keys("--start", "b", "--end", "d") == ["b", "c"]
    assert keys("--limit", "2") == ["a", "b"]
    assert keys("--reverse", "--end", "c", "--limit", "1") == ["b"]
    assert processes.run("scan", *at, "--start", "d").stdout == b'd\tD\n"\\xff"\t"\\x00"\n'


def on_a_terminal(*arguments: str) -> bytes:
    """What ``understudy ARGUMENTS`` writes to a terminal."""
    ours, theirs = os.openpty()
    with subprocess.Popen([sys.executable, "-m", "understudy.cli", *arguments], stdout=theirs) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError), open(ours, "rb", buffering=0) as terminal:  # it ends with an error
            while data := terminal.read(1000):
                shown += data
        assert process.wait(60) == 0
    return shown.replace(b"\r\n", b"\n")


def test_data_can_not_drive_a_terminal(processes: Processes, server: Process) -> None:
    """On a terminal neither keys nor values are sent as control characters, whatever they hold and however printed."""
    at = ("--server", server.address, "/terminal")
    evil = "\x1b]0;title\x07\x9b31m\x7f\u202e".encode()
    line = json.dumps({"key": evil.decode(), "value": evil.decode()}).encode() + b"\n"
    processes.run("import", *at, "-", stdin=line + b'{"key": "text", "value": "two\\n\\tlines\\n"}')
    key = base64.b64encode(evil).decode()
    assert processes.run("get", *at, key, "--base64").stdout == evil
    for command in (
        ("scan", *at),
        ("scan", *at, "--json"),
        ("get", *at, "--base64", key),
        ("get", *at, "--base64", key, "--json"),
    ):
        shown = on_a_terminal(*command)
        assert "title" in shown.decode()
        assert not [c for c in shown.decode() if c not in "\n\t" and not c.isprintable()], shown
    assert on_a_terminal("get", *at, "text") == b"two\n\tlines\n"
    assert json.loads(processes.run("get", *at, key, "--base64", "--json").stdout)["value"] == evil.decode()


@pytest.fixture(scope="module")
def long_realm(running: Processes, server: Process) -> str:
    """A realm with more in it than a pipe holds, in one value too."""
    lines = [b'{"key": "%06d", "value": "%s"}\n' % (number, b"v" * 100) for number in range(5_000)]
    lines.append(b'{"key": "long", "value": "%s"}\n' % (b"v" * 1_000_000))
    running.run("import", "--server", server.address, "/pipe", "-", stdin=b"".join(lines))
    return "/pipe"


@pytest.mark.parametrize("command", ["scan", "scan --json", "export", "get", "log", "log --json"])
def test_a_reader_that_leaves_early_is_no_error(
    server: Process, long_realm: str, tmp_path: Path, command: str
) -> None:
    """A command into ``head`` ends without a traceback when the pipe closes."""
    name, *options = command.split()
    data_dir = server.arguments[server.arguments.index("--data-dir") + 1]
    where = [data_dir] if name == "log" else ["--server", server.address, long_realm]
    where += ["long"] if name == "get" else []
    full_command = [sys.executable, "-m", "understudy.cli", name, *where, *options]
    with subprocess.Popen(full_command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) in (0, 1)


def test_realms_are_listed_and_dropped(processes: Processes, server: Process) -> None:
    """``realms`` lists realms; ``--drop`` asks first, does nothing at "no", and needs no answer with ``--yes``."""
    at = ("--server", server.address)
    for realm in ("/drop/one", "/drop/two"):
        processes.run("put", *at, realm, "k", "v")

    def listed() -> set[str]:
        return {row["path"] for row in json.loads(processes.run("realms", *at, "--json").stdout)}

    assert {"/drop/one", "/drop/two"} <= listed()
    assert "/__system" not in listed()
    heading, *rows = processes.run("realms", *at).stdout.splitlines()
    assert b"entries at checkpoint" in heading
    assert any(b"/drop/one" in row for row in rows)
    asked = processes.run("realms", *at, "--drop", "/drop/one", stdin=b"n\n", code=ExitCode.FAILED)
    assert b"with 1 key," in asked.stderr
    processes.run("realms", *at, "--drop", "/drop/one", code=ExitCode.FAILED)  # nobody to answer
    assert "/drop/one" in listed()
    processes.run("realms", *at, "--drop", "/drop/one", stdin=b"y\n")
    processes.run("realms", *at, "--drop", "/drop/two", "--yes")
    assert not {"/drop/one", "/drop/two"} & listed()


def test_ctrl_c_ends_a_command_as_shells_expect(processes: Processes, server: Process) -> None:
    """Ctrl-C in the middle of an import ends it with 130, says how much is in, and leaves no traceback."""
    command = [sys.executable, "-m", "understudy.cli", "import", "--server", server.address, "/ctrl-c", "-"]
    lines = b"".join(b'{"key": "%d", "value": ""}\n' % number for number in range(3_000))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write(lines)
        process.stdin.flush()
        realm = ("scan", "--server", server.address, "/ctrl-c", "--limit", "1")
        wait_until(lambda: subprocess.run([*command[:3], *realm], capture_output=True).stdout)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        said = process.stderr.read().decode()
    assert said.startswith("understudy: interrupted with")
    assert "Traceback" not in said


@pytest.mark.parametrize("command", ["status", "get", "scan", "export", "put", "fence", "forget", "verify"])
def test_ctrl_c_while_a_server_is_silent_leaves_no_traceback(command: str) -> None:
    """Ctrl-C while a command waits for a server that accepts and says nothing ends it with 130, without a word."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(DEADLINE_S)
        at = ["--server", f"127.0.0.1:{silent.getsockname()[1]}"]
        rest = {
            "get": ["/a", "k"],
            "scan": ["/a"],
            "export": ["/a"],
            "put": ["/a", "k", "v"],
            "forget": ["b"],
            "verify": ["--against", at[1]],
        }
        words = [sys.executable, "-m", "understudy.cli", command, *at, *rest.get(command, [])]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            connection, _ = silent.accept()
            with connection:
                process.send_signal(signal.SIGINT)
                out, said = process.communicate(timeout=DEADLINE_S)
            assert process.returncode == 130, said
            assert (out.strip(), said.strip()) == (b"", b"")
