"""The bench's results for people and machines: JSON, Markdown, and a table on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from results import Detail, Figure, RowResult
from rich.console import Console
from rich.table import Table

_COLUMNS = ("what", "median", "lowest to highest", "reach", "reached", "reference")


def as_json(machine: Mapping[str, Any], scale: str, rows: Sequence[RowResult]) -> dict[str, Any]:
    """Everything."""
    return {"scale": scale, "machine": machine, "rows": [row.as_json() for row in rows]}


def number(value: float) -> str:
    """Three significant digits, or all before the point."""
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    digits = 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f}"


def _cell(cell: str | float) -> str:
    return cell if isinstance(cell, str) else number(cell)


def _cells(figure: Figure) -> list[str]:
    target = figure.target
    signs = {">=": "≥", "<": "<"}
    one = len(figure.values) == 1
    return [
        figure.name,
        f"{number(figure.median)} {figure.unit}".strip(),
        "" if one else f"{number(min(figure.values))} to {number(max(figure.values))}",
        "" if target is None else f"{signs[target.is_]} {number(target.at)}",
        {None: "", True: "yes", False: "**no**"}[figure.reached],
        figure.reference,
    ]


# -- Markdown ----------------------------------------------------------------------------------------------


def as_markdown(machine: Mapping[str, Any], scale: str, rows: Sequence[RowResult], command: str) -> str:
    """What stands in ``docs/benchmarks.md`` and the files beside it; ``command`` has made it."""
    parts = [
        "# Benchmarks",
        f"Made by `{command}`; nothing here is written by hand. All processes of "
        "a row share one machine and its loopback; fdatasync is on; references are measured in the same run. "
        "[peers.md](peers.md) sets PostgreSQL, Redis and etcd beside it.",
        machine_text(machine, scale),
        _figures_table(rows),
        *(_row_section(row) for row in rows),
    ]
    return "\n\n".join(parts) + "\n"


def machine_text(machine: Mapping[str, Any], scale: str) -> str:
    """What the figures depend on, in sentences."""
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return (
        f"Machine: {machine['cpus']} processors ({machine['cpu']}), {machine['memory_gib']:g} GiB, "
        f"{machine['kernel']}, {machine['file_system']}; {machine['python']}; {packages}. Scale: {scale}. Meanwhile "
        f"the hypervisor gave {number(machine['stolen_percent'])} % of the processors' time to others; load average "
        f"before the start: {machine['load_before']:g}."
    )


def _figures_table(rows: Sequence[RowResult]) -> str:
    cells = []
    for row in rows:
        cells.append([f"**{row.title}**", "", "", "", "", ""])
        cells += [_cells(figure) for figure in row.figures]
    return table(_COLUMNS, cells)


def _row_section(row: RowResult) -> str:
    details = [f"{one.title}:\n\n{_detail_table(one)}" for one in row.details]
    return "\n\n".join([f"## {row.title}", " ".join(row.method.split()), *details])


def _detail_table(detail: Detail) -> str:
    return table(detail.columns, [[_cell(cell) for cell in row] for row in detail.rows])


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# -- the terminal ------------------------------------------------------------------------------------------


def show(console: Console, rows: Sequence[RowResult]) -> None:
    """Prints tables where a person watches, and Markdown where not."""
    if not console.is_terminal:
        details = [f"{one.title}:\n\n{_detail_table(one)}" for row in rows for one in row.details]
        print("\n\n".join([_figures_table(rows), *details]))
        return
    table = Table(*_COLUMNS, title="Understudy's bench")
    for row in rows:
        table.add_section()
        table.add_row(f"[bold]{row.title}[/bold]")
        for figure in row.figures:
            colour = {None: "", True: "green", False: "red"}[figure.reached]
            table.add_row(*(cell.strip("*") for cell in _cells(figure)), style=colour)
    console.print(table)
    for row in rows:
        for detail in row.details:
            shown = Table(*detail.columns, title=detail.title)
            for line in detail.rows:
                shown.add_row(*map(_cell, line))
            console.print(shown)
