"""Fuzzes all targets, or some, guided by coverage: ``make fuzz SECONDS=600``.

Each target runs in a process of its own, for its share of the time. It begins with the samples and with whatever an
earlier run has found interesting, in ``.fuzz/corpus/``. An input that gives neither a result nor one of our errors, or
takes too much time or memory, is kept in ``.fuzz/findings/``, and the command that tries it again is printed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent.parent
FUZZ = ROOT / ".fuzz"
INPUT_S_MAX = 20  # for one input
PROCESS_MIB_MAX = 2_048

sys.path.insert(0, str(ROOT / "tests"))


def main() -> int:
    """Runs what was asked for; 1 where something was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=int, default=600, help="for all targets together")
    parser.add_argument("--only", metavar="WORDS", default="", help="targets whose names hold this")
    parser.add_argument(
        "--replay", type=Path, metavar="FILE", help="tries a finding again, and shows its trace"
    )
    asked = parser.parse_args()
    if asked.replay is not None:
        return _replay(asked.replay)
    return _fuzz_all(asked.only, asked.seconds)


def _replay(file: Path) -> int:
    from fuzz.registry import TARGETS
    from fuzz.target import opened

    names = {_folder_name(name): name for name in TARGETS}
    with opened(TARGETS[names[file.resolve().parent.name]]) as attempt:
        attempt(file.read_bytes())
    print("it gives a result, or one of our errors")
    return 0


def _folder_name(target: str) -> str:
    return target.replace(" ", "-")


# -- fuzzing -----------------------------------------------------------------------------------------------------


def _fuzz_all(only: str, seconds: int) -> int:
    import atheris  # not for the tests, which do without it

    # Once, for all: it takes longer than a short share of the time.
    with atheris.instrument_imports(include=["understudy"]):
        from fuzz.registry import TARGETS

    names = [name for name in TARGETS if only in name]
    if not names:
        print(f"no target's name holds {only!r}; there are: {', '.join(TARGETS)}", file=sys.stderr)
        return 2
    found = 0
    for number, name in enumerate(names, 1):
        share_s = max(seconds // len(names), 1)
        print(f"{number}/{len(names)}  {name}, {share_s} s", flush=True)
        found += _fuzz_in_process(name, share_s)
    print(f"{found} of {len(names)} targets have findings" if found else "nothing found")
    return 1 if found else 0


def _fuzz_in_process(name: str, share_s: int) -> bool:
    """Whether something was found."""
    from fuzz.target import in_memory

    findings, printed = FUZZ / "findings" / _folder_name(name), FUZZ / f"{_folder_name(name)}.log"
    findings.mkdir(parents=True, exist_ok=True)
    before = set(findings.iterdir())
    # Removed here, since libFuzzer ends the child without another word.
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=in_memory()) as scratch:
        child = os.fork()
        if not child:
            tempfile.tempdir = scratch
            _fuzz_here(name, share_s, findings, printed)
        _, status = os.waitpid(child, 0)
    for finding in sorted(set(findings.iterdir()) - before):
        print(f"  found: {sys.executable} tests/fuzz/run.py --replay {finding.relative_to(ROOT)}")
    if status:
        print(
            "\n".join(f"  {line}" for line in printed.read_text(errors="replace").splitlines()[-25:]),
            flush=True,
        )
    return status != 0


def _fuzz_here(name: str, share_s: int, findings: Path, printed: Path) -> NoReturn:
    """Fuzzes one target, as libFuzzer does, which ends the process."""
    import atheris

    from fuzz.registry import TARGETS
    from fuzz.target import INPUT_BYTES_MAX, opened

    output = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    corpus = FUZZ / "corpus" / _folder_name(name)
    corpus.mkdir(parents=True, exist_ok=True)
    for sample in TARGETS[name].samples():
        (corpus / f"sample-{hashlib.sha256(sample).hexdigest()[:16]}").write_bytes(sample)
    arguments = [
        f"-max_total_time={share_s}",
        f"-max_len={INPUT_BYTES_MAX}",
        f"-timeout={INPUT_S_MAX}",
        f"-rss_limit_mb={PROCESS_MIB_MAX}",
        f"-artifact_prefix={findings}/",
        str(corpus),
    ]
    with opened(TARGETS[name]) as attempt:
        atheris.Setup([name, *arguments], attempt)
        atheris.Fuzz()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
