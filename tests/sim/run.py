"""Runs stories: `make sim`, `make sim SEEDS=100000`, `make sim SEED=n`, and says what they covered.

A story that breaks a promise is told again without each of the things that befell it, until all that is left of them
is needed, and is printed with its trace.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

_STORIES_A_PROCESS = 10
_STORY_S_MAX = 120
# For personality(2).
_ADDR_NO_RANDOMIZE = 0x0040000
_ASK = 0xFFFFFFFF
_REAL_TIME = time.perf_counter  # a story changes what `time` says


def tell(seed: int, without: Iterable[int]) -> dict[str, Any]:
    """Tells one story in this process, which is good for no other: what was killed in it stays in memory."""
    from sim.story import Story

    logging.getLogger("understudy").setLevel(logging.CRITICAL + 1)
    shm = Path("/dev/shm")
    root = Path(tempfile.mkdtemp(prefix="understudy-sim-", dir=shm if shm.is_dir() else None))
    try:
        story = Story(seed, root, frozenset(without))
        faults = [str(one) for one in story.faults]
        return {**asdict(story.tell()), "faults": faults}
    except Exception as error:  # of the simulator, or of the product where nobody catches it
        import traceback

        return {"seed": seed, "problem": f"{error!r}\n{traceback.format_exc()}", "trace": [], "faults": []}
    finally:
        shutil.rmtree(root, ignore_errors=True)


def child(seeds: list[int], without: list[int]) -> NoReturn:
    """Has forks of a process of its own tell some stories, and write each as a line.

    So each begins with the same memory: where objects lie decides in which order sets of them are walked.
    """
    begin_without_chance()
    import sim.story  # noqa: F401  # once for all

    gc.disable()  # what was killed must not run, and would: files that it had open would be closed, by number
    answers = os.dup(1)
    os.dup2(2, 1)
    for seed in seeds:
        if not os.fork():
            with os.fdopen(answers, "w") as lines:
                lines.write(json.dumps(tell(seed, without)) + "\n")
            os._exit(0)
        _, status = os.wait()
        if status:
            break  # whoever waits for its line hears why on standard error
    os._exit(0)


def told(seeds: list[int], without: Iterable[int] = ()) -> Iterator[dict[str, Any]]:
    """Stories, told by a process where nothing but the seed decides: not even where it lies in memory."""
    tests = str(Path(__file__).parent.parent)
    command = [sys.executable, "-P", __file__, "--child", json.dumps([seeds, list(without)])]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join([tests, *sys.path])},
        process_group=0,  # so that its forks end with it
    )
    left = list(seeds)
    try:
        out, complaint = process.communicate(timeout=_STORY_S_MAX * len(seeds))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, complaint = process.communicate()
        complaint += "\nit did not come to an end"
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    for line in out.splitlines():
        left.pop(0)
        yield json.loads(line)
    if left:
        yield {
            "seed": left[0],
            "problem": f"its process has ended: {complaint[-3000:]}",
            "trace": [],
            "faults": [],
        }


def begin_without_chance() -> None:
    """Begins this process anew, with its memory where it always lies, unless it lies there already.

    Not between fork and exec: in a process that uses gRPC, what gRPC does there can end the child.
    """
    personality = ctypes.CDLL(None).personality
    now = personality(_ASK)
    if not now & _ADDR_NO_RANDOMIZE:
        personality(now | _ADDR_NO_RANDOMIZE)
        os.execv(sys.executable, sys.orig_argv)


def shrunk(seed: int, count: int) -> list[int]:
    """Which of a story's faults it does not need to go wrong."""
    without: list[int] = []
    for at in range(count):
        [story] = told([seed], [*without, at])
        if story["problem"]:
            without.append(at)
    return without


def show(story: dict[str, Any]) -> None:
    """Prints a story that went wrong, as small as it becomes."""
    seed = story["seed"]
    print(f"\nseed {seed}: {story['problem']}", flush=True)
    if story["faults"]:
        without = shrunk(seed, len(story["faults"]))
        [story] = told([seed], without)
        print(f"with these of its faults:\n  {chr(10).join(['', *story['faults']]).strip()}")
        print(f"it ends with: {story['problem']}\n")
    print("\n".join(story["trace"][-200:]))
    print(f"\nagain: make sim SEED={seed}")


def run(seeds: list[int], seconds: float) -> int:
    """Tells stories for so long, or all of them, and returns how many broke a promise."""
    started_s = _REAL_TIME()
    batches = [seeds[at : at + _STORIES_A_PROCESS] for at in range(0, len(seeds), _STORIES_A_PROCESS)]
    total: dict[str, float] = {}
    broken: list[dict[str, Any]] = []
    count = 0

    def one(batch: list[int]) -> list[dict[str, Any]]:
        return list(told(batch)) if _REAL_TIME() - started_s < seconds else []

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for stories in pool.map(one, batches):
            for story in stories:
                count += 1
                for name in ("simulated_s", "steps", "crashes", "promotions", "acknowledged", "reads"):
                    total[name] = total.get(name, 0) + story.get(name, 0)
                if story["problem"]:
                    broken.append(story)
                    print(f"seed {story['seed']}: {story['problem'][:300]}", flush=True)
    took_s = _REAL_TIME() - started_s
    print(
        f"{count} stories in {took_s:.0f} s: {total.get('simulated_s', 0) / 3600:.2f} simulated hours, "
        f"{total.get('crashes', 0):.0f} crashes, {total.get('promotions', 0):.0f} promotions, "
        f"{total.get('acknowledged', 0):,.0f} acknowledged transactions, {total.get('reads', 0):,.0f} whole readings, "
        f"{total.get('steps', 0):,.0f} steps, "
        f"{len(broken)} broken"
    )
    for story in broken[:3]:
        show(story)
    return len(broken)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, help="tell this story, and print its trace")
    parser.add_argument("--seeds", type=int, help="tell so many; without it, as many as a minute takes")
    parser.add_argument("--first", type=int, help="the first seed; a fresh one if not given")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*json.loads(options.child))
    if options.seed is not None:
        [story] = told([options.seed])
        if story["problem"]:
            show(story)
        else:
            print("\n".join([*story["trace"], f"\nseed {options.seed}: no promise was broken"]))
        return bool(story["problem"])
    first = secrets.randbelow(1 << 31) if options.first is None else options.first
    print(f"first seed {first}", flush=True)
    many = options.seeds or 1_000_000
    return run(list(range(first, first + many)), float("inf") if options.seeds else options.seconds) > 0


if __name__ == "__main__":
    sys.exit(main())
