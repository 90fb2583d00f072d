"""A token source on its own: what goes wrong around it."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import Processes, wait_until

from understudy.client import Tokens, TokenSource, login, tokens


def test_a_callback_that_fails_does_not_end_renewing(
    processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An application that can't keep a new refresh token just now stays logged in, and hears of the next one."""
    primary = processes.primary(tmp_path / "a")
    processes.run(
        "user", "add", "ann", "--password-stdin", "--data-dir", tmp_path / "a", stdin=b"correct horse"
    )
    monkeypatch.setattr(tokens, "_RENEW_AT", 0.0)  # at once, again and again
    heard: list[Tokens] = []

    def on_renewed(renewed: Tokens) -> None:
        heard.append(renewed)
        raise OSError("no space left")

    with TokenSource(primary.address, login(primary.address, "ann", "correct horse"), on_renewed=on_renewed):
        wait_until(lambda: len(heard) >= 2)
    assert heard[0].refresh != heard[1].refresh
