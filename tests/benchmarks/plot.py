"""A bar chart as SVG, readable on light and on dark pages."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

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
