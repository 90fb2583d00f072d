"""Hooks: a program of the operator's own gets the report, and does no harm whatever it does."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from harness import wait_until

from understudy.backup import hooks
from understudy.backup.hooks import run_hook
from understudy.common.errors import HookFailed

REPORT = {"result": "done", "realms": 3, "errors": ["/notes: Ä"]}


def python(source: str, *arguments: object) -> list[str]:
    """A program that runs ``source``."""
    return [sys.executable, "-c", source, *map(str, arguments)]


def is_running(pid: int) -> bool:
    """Whether a process of that number is there and no zombie."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_a_hook_gets_the_report_on_its_standard_input(tmp_path: Path) -> None:
    """One line of JSON, then the end; arguments come as they are, without a shell."""
    seen = tmp_path / "seen"
    run_hook(
        python("import sys; open(sys.argv[1], 'w').write(sys.argv[2] + sys.stdin.read())", seen, "$HOME;"),
        REPORT,
    )
    text = seen.read_text()
    assert text.startswith("$HOME;")
    assert text.count("\n") == 1
    assert json.loads(text.removeprefix("$HOME;")) == REPORT


def test_a_report_larger_than_a_pipe_arrives_whole(tmp_path: Path) -> None:
    """However slowly it reads, and though it talks meanwhile."""
    seen = tmp_path / "seen"
    source = """
import sys
data = b""
while piece := sys.stdin.buffer.read(1000):
    data += piece
    print("x" * 10_000)
open(sys.argv[1], "wb").write(data)
"""
    report = {"errors": ["x" * 1000] * 300}
    run_hook(python(source, seen), report)
    assert json.loads(seen.read_bytes()) == report


def test_a_hook_does_not_see_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """G10: it inherits the environment, but neither passphrase nor token."""
    monkeypatch.setenv("UNDERSTUDY_PASSPHRASE", "secret")
    monkeypatch.setenv("UNDERSTUDY_TOKEN", "secret")
    monkeypatch.setenv("UNDERSTUDY_OTHER", "seen")
    seen = tmp_path / "seen"
    run_hook(
        python("import os, sys, json; json.dump(dict(os.environ), open(sys.argv[1], 'w'))", seen), REPORT
    )
    environment = json.loads(seen.read_text())
    assert "secret" not in environment.values()
    assert environment["UNDERSTUDY_OTHER"] == "seen"
    assert environment["PATH"] == os.environ["PATH"]


# -- hooks that fail ---------------------------------------------------------------------------------------


def test_a_hook_that_fails_is_told_with_what_it_said() -> None:
    """The error names the program, its status, and the last of both outputs."""
    source = "import sys; print('to whom'); print('it may concern', file=sys.stderr, flush=True); sys.exit(3)"
    with pytest.raises(HookFailed, match=r"(?s)status 3; it said: .*it may concern") as caught:
        run_hook(python(source), REPORT)
    assert sys.executable in str(caught.value)
    assert "to whom" in str(caught.value)


def test_what_a_hook_says_last_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it has ended before anybody listened."""
    said = tmp_path / "said"
    source = """
import os, sys
print("the last", flush=True)
with open(sys.argv[1] + ".new", "w") as file:
    file.write(str(os.getpid()))
os.rename(sys.argv[1] + ".new", sys.argv[1])
sys.exit(1)
"""

    def after_its_end() -> float:
        wait_until(lambda: said.exists() and not is_running(int(said.read_text())))
        return time.monotonic()

    monkeypatch.setattr(hooks, "time", SimpleNamespace(monotonic=after_its_end))
    with pytest.raises(HookFailed, match="the last"):
        run_hook(python(source, said), REPORT)


def test_a_hook_that_a_signal_ended_has_failed() -> None:
    """No status, no success."""
    with pytest.raises(HookFailed, match=r"was ended by signal 9$"):
        run_hook(python("import os; os.kill(os.getpid(), 9)"), REPORT)


def test_a_program_that_can_not_be_run_is_told(tmp_path: Path) -> None:
    """Missing, without permission, or no program: the error says which and why."""
    text = tmp_path / "text"
    text.write_text("no program")
    for program, why in [
        (tmp_path / "missing", "No such file"),
        (text, "Permission denied"),
        ("a\0b", "null byte"),
    ]:
        with pytest.raises(HookFailed, match=why):
            run_hook([str(program)], REPORT)
    text.chmod(0o700)
    with pytest.raises(HookFailed, match="Exec format"):
        run_hook([str(text)], REPORT)


# -- hooks that do not behave ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "pass",
        "import sys; sys.stdin.close(); print('x' * 1_000_000)",
        "import os; [os.close(fd) for fd in range(3)]",
        "import sys; sys.stdin.read(10)",
    ],
    ids=["never reads", "closes its input", "closes everything", "reads a little"],
)
def test_a_hook_need_not_read(source: str) -> None:
    """A report larger than a pipe is left lying, and that is no failure."""
    run_hook(python(source), {"errors": ["x" * 1_000_000]})


def test_g9_output_without_end_takes_no_memory() -> None:
    """G9: of half a gigabyte only the last of it is kept."""
    source = """
import sys
for _ in range(512):
    sys.stdout.buffer.write(bytes(1 << 20))
sys.stdout.write("the end")
sys.stdout.flush()
sys.exit(1)
"""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(HookFailed, match=r"the end$") as caught:
        run_hook(python(source), REPORT)
    assert len(str(caught.value)) < 5000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


# Starts a child of its own, says in a file who both are, and waits for longer than any test.
FAMILY = """
import os, signal, subprocess, sys, time
path, own, childs = sys.argv[1:]
exec(own)
child = subprocess.Popen(
    [sys.executable, "-c", childs + "\\nimport time; print(1, flush=True); time.sleep(600)"], stdout=subprocess.PIPE
)
child.stdout.read(1)
print("ready", flush=True)
with open(path + ".new", "w") as file:
    file.write(f"{os.getpid()} {child.pid}")
os.rename(path + ".new", path)
time.sleep(600)
"""
OBEYS = ""
IS_DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"


def when_family_is_there(family: Path, then: Callable[[], float]) -> SimpleNamespace:
    """A clock for hooks that goes as usual until ``family`` is there, and by ``then`` from there on."""
    return SimpleNamespace(monotonic=lambda: then() if family.exists() else time.monotonic())


@pytest.mark.parametrize("own", [OBEYS, IS_DEAF], ids=["obeys", "is deaf"])
@pytest.mark.parametrize("childs", [OBEYS, IS_DEAF], ids=["child obeys", "child is deaf"])
def test_g9_when_its_time_is_up_a_hook_ends_with_its_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, childs: str
) -> None:
    """G9: nothing is left running, whoever ignores that it should end."""
    family = tmp_path / "family"
    monkeypatch.setattr(hooks, "time", when_family_is_there(family, lambda: time.monotonic() + 1000))
    monkeypatch.setattr(hooks, "GRACE_S", 0.2)
    with pytest.raises(HookFailed, match="did not end within 300 s; it said: ready"):
        run_hook(python(FAMILY, family, own, childs), REPORT)
    for pid in family.read_text().split():
        wait_until(lambda pid=int(pid): not is_running(pid))


def test_a_hook_is_asked_to_end_before_it_is_made_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has time to clean up, and what it says then is heard."""
    family = tmp_path / "family"
    monkeypatch.setattr(hooks, "time", when_family_is_there(family, lambda: time.monotonic() + 1000))
    monkeypatch.setattr(hooks, "GRACE_S", 60.0)
    own = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(print('x' * 1_000_000 + 'cleaned up')))"
    with pytest.raises(HookFailed, match=r"cleaned up$"):
        run_hook(python(FAMILY, family, own, OBEYS), REPORT)


def test_a_hook_ends_where_waiting_for_it_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C reaches us and not the hook, which has a session of its own; it does not survive us."""
    family = tmp_path / "family"
    interrupts = [KeyboardInterrupt()]

    def interrupted() -> float:
        if interrupts:
            raise interrupts.pop()
        return time.monotonic()

    monkeypatch.setattr(hooks, "time", when_family_is_there(family, interrupted))
    with pytest.raises(KeyboardInterrupt):
        run_hook(python(FAMILY, family, OBEYS, OBEYS), REPORT)
    for pid in family.read_text().split():
        wait_until(lambda pid=int(pid): not is_running(pid))


def test_a_hook_may_leave_something_running(tmp_path: Path) -> None:
    """Its end is what counts, though a process that it started still holds its output."""
    pid = tmp_path / "pid"
    source = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[1], "w").write(str(child.pid))
"""
    run_hook(python(source, pid), REPORT)
    assert is_running(int(pid.read_text()))
    os.kill(int(pid.read_text()), signal.SIGKILL)
