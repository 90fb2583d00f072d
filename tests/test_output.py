"""What people get to see: bytes, numbers, and progress where someone watches."""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy.cli import output


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b"", ""),
        (b"apple", "apple"),
        ("größe".encode(), "größe"),
        (b'"a JSON string"', '"a JSON string"'),
        (b"C:\\new", "C:\\new"),
        (b'two\n"lines"\\n', r'"two\n\"lines\"\\n"'),
        (b"\x1b[31mred\x7f", r'"\x1b[31mred\x7f"'),
        (b"\xff", r'"\xff"'),
        ("\u00ff".encode(), "\u00ff"),
        ("\x9b31m".encode(), r'"\u009b31m"'),
        ("größe".encode() + b"\xc3", r'"größe\xc3"'),
        ("a\u202eb".encode(), r'"a\u202eb"'),
        ("\U000e0001".encode(), r'"\U000e0001"'),
        (rb'"\xff"', r'"\"\\xff\""'),
        ("not cut…".encode(), '"not cut…"'),
        ('"not cut…"'.encode(), r'"\"not cut…\""'),
        (b"\xff" * 5 + b"12345678901234\xff", r'"\xff"…'),
        (b"x" * 20, "xxxxxxxxx…"),
    ],
)
def test_bytes_are_shown_on_one_line_without_surprises(data: bytes, shown: str) -> None:
    """Text is shown as it is; control characters, which could do things to a terminal, never are."""
    assert output.printable(data, length_max=10 if len(data) == 20 else 100) == shown


@given(st.binary(max_size=6), st.binary(max_size=6))
def test_no_two_look_alike(one: bytes, other: bytes) -> None:
    """Different bytes are shown differently, and nothing that can't be printed is shown."""
    shown = output.printable(one)
    assert shown.isprintable()
    assert (shown == output.printable(other)) == (one == other)


@given(st.text('"\\xf0…n\n\xff\x9b', max_size=8), st.binary(max_size=2))
def test_text_that_looks_like_an_escape_is_told_from_one(text: str, end: bytes) -> None:
    """Text never looks as other bytes do, even where it holds quotes, backslashes, and what a cut leaves."""
    data = text.encode() + end
    shown = output.printable(data, length_max=None)
    if shown.encode() != data:
        assert output.printable(shown.encode(), length_max=None) != shown


@pytest.mark.parametrize("text", ["\x7f", "\x9b31m", "\u202e", "\u2028", "\udc80", "ä", "\n"])
def test_json_has_nothing_that_a_terminal_acts_on(text: str) -> None:
    """What JSON itself would leave alone is escaped too, and comes back as it was."""
    line = output.json_bytes({"text": text})
    assert json.loads(line) == {"text": text}
    assert line.decode().isprintable()


@pytest.mark.parametrize(("number", "shown"), [(0, "0 keys"), (1, "1 key"), (2_000, "2,000 keys")])
def test_one_is_not_many(number: int, shown: str) -> None:
    """One thing is counted in the singular."""
    assert output.counted(number, "key") == shown
    assert output.counted(number, "entry", "entries").endswith(" entry") == (number == 1)


def test_what_others_have_worded_is_plain() -> None:
    """A message from a server is shown without its control characters."""
    assert output.plain("ok \x1b[2J ä") == "ok \\x1b[2J ä"


@pytest.mark.parametrize(
    ("size", "shown"),
    [(0, "0 B"), (999, "999 B"), (1_000, "1.0 kB"), (16_777_216, "16.8 MB"), (3e12, "3.0 TB")],
)
def test_sizes_have_few_digits(size: float, shown: str) -> None:
    """Decimal units, as disks are sold."""
    assert output.size_text(size) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0 ms"),
        (0.0123, "12 ms"),
        (3.21, "3.2 s"),
        (119, "119.0 s"),
        (600, "10 min"),
        (9e3, "2 h"),
        (7e5, "8 days"),
    ],
)
def test_durations_have_few_digits(seconds: float, shown: str) -> None:
    """From milliseconds to days: a replica may have been away that long."""
    assert output.seconds_text(seconds) == shown


class Screen(io.StringIO):
    """A standard error that says whether it is a terminal."""

    def __init__(self, *, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


class Clock:
    """Time that passes when it is told to."""

    now_s = 100.0

    def monotonic(self) -> float:
        """The time now."""
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock that progress goes by."""
    clock = Clock()
    monkeypatch.setattr(output, "time", clock)
    return clock


def watch(monkeypatch: pytest.MonkeyPatch, *, is_terminal: bool) -> Screen:
    """Puts a screen in standard error's place."""
    screen = Screen(is_terminal=is_terminal)
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    return screen


def test_progress_is_a_plain_line_now_and_then_where_nobody_watches(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    """Without a terminal a line is written every ten seconds, without escape sequences."""
    screen = watch(monkeypatch, is_terminal=False)
    with output.Progress("importing", unit="keys") as progress:
        for done in range(0, 2_500, 100):
            progress.update(done)
            clock.now_s += 1
    assert screen.getvalue() == "importing: 1,000 keys\nimporting: 2,000 keys\n"


def test_progress_in_bytes_is_shown_in_their_units(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """A total that is known is shown too."""
    screen = watch(monkeypatch, is_terminal=False)
    with output.Progress("fetching", unit="bytes") as progress:
        clock.now_s += 60
        progress.update(1_500_000, 3_000_000)
    assert screen.getvalue() == "fetching: 1.5 MB of 3.0 MB\n"


def test_what_is_over_at_once_shows_no_bar(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """On a terminal nothing is shown in the first second, and a bar after it."""
    screen = watch(monkeypatch, is_terminal=True)
    with output.Progress("importing", unit="keys") as progress:
        clock.now_s += 0.9
        progress.update(1, 2)
        assert screen.getvalue() == ""
        clock.now_s += 0.2
        progress.update(2, 2)
    assert "importing" in screen.getvalue()


def test_tables_are_plain_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    """Into a pipe a row is one line, however long, aligned by spaces."""
    output.print_table(("realm", "entries"), [("/a" * 100, "1"), ("/b", "20")], right=("entries",))
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == ["realm", "entries"]
    assert first.split() == ["/a" * 100, "1"]
    assert second.split() == ["/b", "20"]
    assert first.rstrip().endswith(" 1")
    assert len(first.rstrip()) == len(second.rstrip())
