"""The comparison for people: Markdown, and the settings of every system beside the figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from report import machine_text, number, table

from peers.comparison import Comparison, Measured
from peers.system import System


def printed(rows: Sequence[Comparison], kinds: Iterable[type[System]]) -> str:
    """All rows, and what each system was set to."""
    return "\n\n".join([*(f"{row.title}:\n\n{_table(row)}" for row in rows), _settings(kinds)])


def document(
    *,
    machine: Mapping[str, Any],
    scale: str,
    rows: Sequence[Comparison],
    kinds: Iterable[type[System]],
    missing: Sequence[str],
    plot: str,
    command: str,
) -> str:
    """What stands in ``docs/peers.md``. ``plot``: the picture's name beside it; ``command`` has made both."""
    parts = [
        "# The peers, side by side",
        f"Made by `{command}`; nothing here is written by hand, and no figure comes from another run. "
        "The systems take turns in one run, round by round, on one machine, its loopback and one disk. *Ours "
        "against it* says how many times better Understudy did at the same work, by medians: above 1 it leads.",
        machine_text(machine, scale),
        *missing,
        f"![Medians of all rows, with lowest and highest]({plot})",
        *(_section(row) for row in rows),
        _settings(kinds),
    ]
    return "\n\n".join(parts) + "\n"


def _section(row: Comparison) -> str:
    return "\n\n".join([f"## {row.title}", _table(row), " ".join(row.method.split())])


def _table(row: Comparison) -> str:
    columns = [
        "work",
        "system",
        row.unit,
        "lowest to highest",
        *row.beside,
        "ours against it",
        "reach",
        "reached",
    ]
    return table(columns, [_cells(row, one) for one in row.measured])


def _cells(row: Comparison, one: Measured) -> list[str]:
    ratio = row.ratio(one)
    reached = "" if ratio is None or one.reach is None else "yes" if ratio >= one.reach else "**no**"
    return [
        one.work,
        one.system,
        number(one.median),
        "" if len(one.values) == 1 else f"{number(min(one.values))} to {number(max(one.values))}",
        *map(number, one.beside),
        "" if ratio is None else number(ratio),
        "" if one.reach is None else f"≥ {one.reach:g}",
        reached,
    ]


def _settings(kinds: Iterable[type[System]]) -> str:
    systems = [
        "\n".join([f"### {kind.name} {kind.version()}", "", *(f"* {one}" for one in kind.settings)])
        for kind in kinds
    ]
    return "\n\n".join(["## What each was set to", "What is not named is at its default.", *systems])
