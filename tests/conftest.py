"""Settings of the whole test run; what starts and joins nodes is in ``harness.py``."""

from __future__ import annotations

import logging
import os
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import DEADLINE_S, Processes, plain_environment
from hypothesis import HealthCheck, settings
from killing import Nursery

from understudy.client import peers
from understudy.common.certificate_authority import KeyFiles, create_keys
from understudy.common.events import LOGGER

# How long one example takes depends on what else the machine does, and so can't be what a test fails by. The
# blob printed with a failure repeats it exactly.
settings.register_profile(
    "understudy", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("understudy")

# A shell that runs the tests in the background has it ignored, and processes that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def seed() -> int:
    """For a test's own randomness. A failure shows it, and ``TEST_SEED=… make test`` runs the same again."""
    value = int(os.environ.get("TEST_SEED") or secrets.randbits(32))
    print(f"TEST_SEED={value}")
    return value


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A repository in a folder."""
    path = tmp_path / "repository"
    path.mkdir()
    return path


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """How loud a command makes this process ends with its test."""
    loggers = [logging.getLogger(), logging.getLogger(LOGGER)]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture
def patient_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of whom a client believes: it hears every server out, also where the machine is slow."""
    monkeypatch.setattr(peers, "_SURVEY_S_MAX", DEADLINE_S)


@pytest.fixture
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Starts real processes; all that are left end with the test, and their logs show where it failed."""
    started = Processes(Path(tmp_path_factory.mktemp("processes")))
    yield started
    started.close()


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeyFiles:
    """Certificates for this machine, which no test changes."""
    directory = tmp_path_factory.mktemp("keys") / "keys"
    create_keys(directory, ["localhost"])
    return KeyFiles(directory)


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    """Starts commands that die at a step of one's choice."""
    with Nursery(plain_environment()) as started:
        yield started
