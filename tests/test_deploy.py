"""What ``deploy/`` says agrees with the program and with the tools that read it."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from understudy.common.errors import ExitCode

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
UNITS = ["understudy-primary.service", "understudy-replica.service"]
USELESS_TO_RETRY = {
    ExitCode.USAGE,
    ExitCode.RESET_NEEDED,
    ExitCode.CORRUPT,
    ExitCode.DIRECTORY,
    ExitCode.NOT_PERMITTED,
}


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_finds_no_fault_with_the_units(tmp_path: Path) -> None:
    """``systemd-analyze verify`` has nothing to say about either unit."""
    for unit in UNITS:
        text = (DEPLOY / unit).read_text()
        (tmp_path / unit).write_text(text.replace("/opt/understudy/bin/understudy", sys.executable))
    verified = subprocess.run(
        ["systemd-analyze", "verify", *(tmp_path / unit for unit in UNITS)], capture_output=True, text=True
    )
    assert (verified.returncode, verified.stdout + verified.stderr) == (0, "")


@pytest.mark.parametrize("unit", UNITS)
def test_units_do_not_restart_what_only_a_person_can_mend(unit: str) -> None:
    """systemd leaves a node alone after the exit codes that trying again can't change, and only after those."""
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.read_string((DEPLOY / unit).read_text())
    codes = parser["Service"]["RestartPreventExitStatus"].split()
    assert {ExitCode(int(code)) for code in codes} == USELESS_TO_RETRY
