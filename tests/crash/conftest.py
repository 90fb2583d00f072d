"""How long the crash tests go on, and what they say at the end."""

from __future__ import annotations

import os

import pytest

from crash.tally import Tally

_SECONDS = 2.0
_PROPERTY = "tally"


@pytest.fixture
def is_thorough() -> bool:
    """Whether this is `make crash`: what can be tried completely is, instead of a part that changes from run to run."""
    return "CRASH_SECONDS" in os.environ


@pytest.fixture
def seconds() -> float:
    """How long a random test goes on."""
    return float(os.environ.get("CRASH_SECONDS", _SECONDS))


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    """What the test has done, for the summary."""
    found = Tally()
    request.node.user_properties.append((_PROPERTY, found.counts))
    return found


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line a test: what it has done."""
    lines = [
        f"{report.nodeid.rpartition('::')[2]}: {', '.join(f'{count:,} {what}' for what, count in counts.items())}"
        for category in ("passed", "failed")
        for report in terminalreporter.getreports(category)
        for name, counts in report.user_properties
        if name == _PROPERTY and report.when == "call"
    ]
    if lines:
        terminalreporter.section("what was done")
        for line in lines:
            terminalreporter.line(line)
