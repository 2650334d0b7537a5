"""Charts as SVG, readable on light and on dark pages."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_LEFT, _WIDTH, _BAR, _GAP = 140, 420, 14, 12
_COLORS: Final = ("#3b82f6", "#f59e0b")


def bars(title: str, values: Mapping[str, tuple[float, ...]]) -> str:
    """Draw a group of bars for each name; less is better."""
    longest = max(value for group in values.values() for value in group)
    parts: list[str] = []
    y = 40
    for name, group in values.items():
        middle = y + len(group) * _BAR / 2 + 4
        parts.append(
            f'<text x="{_LEFT - 8}" y="{middle:g}" text-anchor="end">{escape(name)}</text>'
        )
        for color, value in zip(_COLORS, group, strict=True):
            width = max(1.0, value / longest * _WIDTH)
            parts.append(
                f'<rect x="{_LEFT}" y="{y}" width="{width:.1f}" height="{_BAR - 2}" '
                f'fill="{color}"/>'
                f'<text x="{_LEFT + width + 6:.1f}" y="{y + _BAR - 4}">{value:.0f}</text>',
            )
            y += _BAR
        y += _GAP
    size = f'width="{_LEFT + _WIDTH + 60}" height="{y}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" '
        f'font-size="12" fill="#6b7280">\n'
        f'<text x="{_LEFT}" y="22" font-size="14">{escape(title)}</text>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


@dataclass(frozen=True)
class Panel:
    """One of several charts of lines.

    Attributes:
        title: What is varied.
        labels: The values of it, from the left to the right.
        lines: For each name, a number for each label. ``ours`` and ``idiom`` have colors of their
            own, and are dashed when something follows after a comma.
    """

    title: str
    labels: Sequence[str]
    lines: Mapping[str, Sequence[float]]


_PANEL_WIDTH, _PANEL_HEIGHT, _MARGIN = 340, 170, 50
_COLUMNS: Final = 2
_LOG_FROM: Final = 20  # what is that many times the least would hide it


def panels(title: str, drawn: Sequence[Panel]) -> str:
    """Draw charts of lines beside and below each other; less is better."""
    rows = math.ceil(len(drawn) / _COLUMNS)
    step = _PANEL_HEIGHT + 2 * _MARGIN
    width, height = _COLUMNS * (_PANEL_WIDTH + 2 * _MARGIN), rows * step + 40
    parts: list[str] = []
    for number, panel in enumerate(drawn):
        x = number % _COLUMNS * (_PANEL_WIDTH + 2 * _MARGIN) + _MARGIN
        y = number // _COLUMNS * step + 40 + _MARGIN / 2
        parts.append(f'<g transform="translate({x:g} {y:g})">')
        parts.extend(_panel(panel))
        parts.append("</g>")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12" fill="#6b7280">\n'
        f'<text x="{_MARGIN}" y="22" font-size="14">{escape(title)}</text>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _panel(panel: Panel) -> Iterator[str]:
    numbers = [number for line in panel.lines.values() for number in line]
    least, most = min(numbers), max(numbers)
    is_log = least > 0 and most / least > _LOG_FROM

    def x_of(position: int) -> float:
        return (position + 0.5) * _PANEL_WIDTH / len(panel.labels)

    def y_of(number: float) -> float:
        part = math.log(number / least) / math.log(most / least) if is_log else number / most
        return _PANEL_HEIGHT - part * (_PANEL_HEIGHT - 20)

    scale = " (logarithmic)" if is_log else ""
    yield f'<text x="0" y="-6">{escape(panel.title)}{scale}</text>'
    yield f'<path d="M0 0V{_PANEL_HEIGHT}H{_PANEL_WIDTH}" fill="none" stroke="#9ca3af"/>'
    for position, label in enumerate(panel.labels):
        yield (
            f'<text x="{x_of(position):.1f}" y="{_PANEL_HEIGHT + 16}" '
            f'text-anchor="middle">{escape(label)}</text>'
        )
    for name, line in panel.lines.items():
        color = _COLORS[0] if name.startswith("ours") else _COLORS[1]
        dash = ' stroke-dasharray="4 3"' if "," in name else ""
        points = [(x_of(position), y_of(number)) for position, number in enumerate(line)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        yield f'<polyline points="{path}" fill="none" stroke="{color}"{dash}/>'
        for (x, y), number in zip(points, line, strict=True):
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>'
            yield f'<text x="{x:.1f}" y="{y - 6:.1f}" text-anchor="middle">{number:,.0f}</text>'
        x, y = points[-1]
        yield f'<text x="{x + 8:.1f}" y="{y + 4:.1f}" fill="{color}">{escape(name)}</text>'
