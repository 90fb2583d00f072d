"""Breaks the product in known ways, one at a time, and sees that somebody notices: `make mutants`.

Each mutant is a copy of the tree with one thing wrong. Simulated stories are told with it, always the same ones, and
then, where all of them come out well, the tests are run that the registry names. A mutant that survives both shows a
check that is missing. First of all the unbroken tree has to pass the same.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mutants.mutant import Moved, Mutant
from mutants.registry import MUTANTS, QUICK

ROOT = Path(__file__).resolve().parents[2]
SEEDS = (1, 2, 5, 11)  # eventful ones: with promotions and many crashes
STORY_S_MAX = 120.0
TESTS_S_MAX = 600.0
_TEST_S_MAX = 45
_LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", ".fuzz", ".*_cache", ".hypothesis", "__pycache__", "build", "dist"
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a mutant.

    Attributes:
        caught_by: empty if nobody noticed it.
        problem: it could not be judged.
    """

    caught_by: str = ""
    problem: str = ""


class Workshop:
    """A copy of the tree, with one thing broken in it at a time."""

    def __init__(self, source: Path, root: Path) -> None:
        shutil.copytree(source, root / "tree", symlinks=True, ignore=_LEFT_OUT)
        self.tree = root / "tree"
        (root / "tmp").mkdir()
        self._environment = {
            **os.environ,
            "PYTHONPATH": f"{self.tree / '.types'}:{self.tree / 'tests'}",
            "PYTHONHASHSEED": "0",  # else a seed would not be one story
            "TMPDIR": str(root / "tmp"),
        }

    def judge(self, mutant: Mutant) -> Verdict:
        """Tells stories with it, and runs its tests."""
        with self._broken(mutant):
            found = self.told() if mutant.simulated else Verdict()
            return found if found != Verdict() else self.tested(mutant.tests)

    @contextlib.contextmanager
    def _broken(self, mutant: Mutant) -> Iterator[None]:
        path = self.tree / mutant.file
        whole = path.read_text()
        try:
            self._write(path, mutant.source(self.tree))
            yield
        finally:
            self._write(path, whole)

    @staticmethod
    def _write(path: Path, source: str) -> None:
        path.write_text(source)
        # Python takes a file of the same second and length for the one that it has compiled.
        for compiled in path.parent.glob(f"__pycache__/{path.stem}.*"):
            compiled.unlink()

    def told(self) -> Verdict:
        """Tells the stories, up to the first that breaks a promise."""
        for seed in SEEDS:
            # Each in a process that comes to its end: one that is killed leaves its disks behind.
            command = ["-P", "tests/sim/run.py", "--child", json.dumps([[seed], []])]
            with self._started(command, STORY_S_MAX) as process:
                line, _ = process.communicate()
            problem = json.loads(line)["problem"] if line else "its process ends, or never does"
            if problem:
                return Verdict(f"sim seed {seed}: {problem}")
        return Verdict()

    def tested(self, tests: Sequence[str]) -> Verdict:
        """Runs tests, up to the first that fails."""
        options = ["-x", "-rfE", "--tb=no", "-p", "no:cacheprovider", f"--timeout={_TEST_S_MAX}"]
        with self._started(["-u", "-m", "pytest", *options, *tests], TESTS_S_MAX) as process:
            assert process.stdout is not None
            # Not to its end: what a mutant leaves running may keep Python from that.
            for line in process.stdout:
                if line.startswith(("FAILED ", "ERROR ")):
                    name = line.partition(" ")[2].strip()
                    return Verdict(name) if "::" in name else Verdict(problem=name)
            code = process.wait()
        if code == -signal.SIGKILL:
            return Verdict("tests: they do not end")
        return Verdict(problem=f"pytest ends with code {code}" if code else "")

    @contextlib.contextmanager
    def _started(self, arguments: Sequence[str], seconds: float) -> Iterator[subprocess.Popen[str]]:
        """A Python process in the tree; it and what it starts are killed when the time or the block is over."""
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=self.tree,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

        def kill() -> None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(seconds, kill)
        timer.start()
        try:
            with process:
                yield process
                kill()
        finally:
            timer.cancel()
            kill()


def main() -> int:
    """The command; 0 if no mutant survives."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", metavar="NAME", help="try those with this in their names")
    parser.add_argument("--quick", action="store_true", help="try a few, in about a minute")
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if not options.quick or mutant.name in QUICK]
    chosen = [mutant for mutant in chosen if (options.only or "") in mutant.name]
    if not chosen:
        parser.error(f"no mutant is called {options.only}")
    with tempfile.TemporaryDirectory(prefix="understudy-mutants-", ignore_cleanup_errors=True) as scratch:
        try:
            return run(chosen, Path(scratch))
        except Moved as error:
            print(error, file=sys.stderr)
            return 2


def run(chosen: Sequence[Mutant], scratch: Path) -> int:
    """Tries these, and prints what becomes of each.

    Raises:
        Moved.
    """
    count = min(os.cpu_count() or 1, len(chosen) + 1)
    shops: queue.Queue[Workshop] = queue.Queue()
    source = ROOT
    for number in range(count):
        shop = Workshop(source, scratch / str(number))
        source = shop.tree  # all of the same moment, whoever edits meanwhile
        shops.put(shop)
    for mutant in chosen:
        mutant.source(source)
    with ThreadPoolExecutor(count) as pool:
        tests = sorted({test for mutant in chosen for test in mutant.tests})
        parts = [part for at in range(count) if (part := tests[at::count])]
        checks = [pool.submit(_borrowing, shops, lambda shop: shop.told())]
        checks += [
            pool.submit(_borrowing, shops, lambda shop, part=part: shop.tested(part)) for part in parts
        ]
        for verdict in (check.result() for check in checks):
            if verdict != Verdict():
                print(f"the unbroken tree does not pass: {verdict.caught_by or verdict.problem}")
                return 1
        width = max(len(mutant.name) for mutant in chosen)
        print(f"{'mutant':{width}}  {'breaks':8}  seconds  caught by", flush=True)
        survivors = 0
        for mutant, (verdict, seconds) in zip(
            chosen, pool.map(lambda one: _timed(shops, one), chosen), strict=True
        ):
            survivors += not verdict.caught_by
            caught_by = verdict.caught_by or f"SURVIVED {verdict.problem}"
            print(
                f"{mutant.name:{width}}  {mutant.guarantee:8}  {seconds:7.1f}  {_first_line(caught_by)}",
                flush=True,
            )
    print(f"{len(chosen)} mutants, {survivors} survived")
    return survivors > 0


def _borrowing(shops: queue.Queue[Workshop], work: Callable[[Workshop], Verdict]) -> Verdict:
    shop = shops.get()
    try:
        return work(shop)
    finally:
        shops.put(shop)


def _timed(shops: queue.Queue[Workshop], mutant: Mutant) -> tuple[Verdict, float]:
    started_s = time.perf_counter()
    verdict = _borrowing(shops, lambda shop: shop.judge(mutant))
    return verdict, time.perf_counter() - started_s


def _first_line(text: str) -> str:
    return text.partition("\n")[0][:160].rstrip()


if __name__ == "__main__":
    sys.exit(main())
