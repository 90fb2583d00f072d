"""A picture of the comparison as SVG: a bar for each system's median, a whisker from lowest to highest."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from html import escape

from report import number

from peers.comparison import Comparison, Measured

_WIDTH, _LABEL_WIDTH, _BAR_WIDTH = 860, 330, 430
_LINE, _GAP = 18, 12
_COLOURS = {"Understudy": "#2f6fb5", "PostgreSQL": "#7a8fa6", "Redis": "#c0654f", "etcd": "#5f9e6e"}
_OTHER = "#b8b8b8"


def svg(rows: Sequence[Comparison]) -> str:
    """The whole picture; bars of one work share a scale that begins at 0."""
    shapes: list[str] = []
    y = _GAP
    for row in rows:
        better = "less" if row.less_is_better else "more"
        shapes.append(_text(10, y + _LINE, f"{row.title}, {row.unit} ({better} is better)", bold=True))
        y += 2 * _LINE
        for work, group in itertools.groupby(row.measured, key=lambda one: one.work):
            shapes.append(_text(10, y + 13, work))
            y += _LINE
            y = _bars(shapes, list(group), y)
        y += _GAP
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{y}" viewBox="0 0 {_WIDTH} {y}" '
        'font-family="sans-serif" font-size="12">'
    )
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *shapes, "</svg>"]) + "\n"


def _bars(shapes: list[str], group: Sequence[Measured], y: int) -> int:
    """Draws the bars of one work below each other; returns where the next may begin."""
    widest = max(max(one.values) for one in group) or 1.0
    for one in group:
        colour = _COLOURS.get(one.system.partition(",")[0], _OTHER)
        length, low, high = (
            _BAR_WIDTH * value / widest for value in (one.median, min(one.values), max(one.values))
        )
        shapes += [
            _text(_LABEL_WIDTH - 8, y + 12, one.system, end=True),
            f'<rect x="{_LABEL_WIDTH}" y="{y + 2}" width="{length:.1f}" height="{_LINE - 4}" fill="{colour}"/>',
            f'<path d="M{_LABEL_WIDTH + low:.1f} {y + 9} H{_LABEL_WIDTH + high:.1f}" stroke="#222"/>',
            _text(_LABEL_WIDTH + int(max(length, high)) + 6, y + 13, number(one.median)),
        ]
        y += _LINE
    return y + 4


def _text(x: int, y: int, text: str, *, bold: bool = False, end: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    anchor = ' text-anchor="end"' if end else ""
    return f'<text x="{x}" y="{y}"{weight}{anchor}>{escape(text)}</text>'
