"""The page of the benchmarks: sections between markers, each written by one part.

What stands outside of the markers is written by hand, and stays.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table; its first column needs no heading."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in lines]


def replace_section(page: str, name: str, lines: Iterable[str]) -> str:
    """Put lines between the markers of a section.

    Raises:
        ValueError: The page does not have the section's two markers, once and in this order.
    """
    begin, end = f"<!-- measured: {name} -->\n", f"<!-- end: {name} -->\n"
    pattern = f"{re.escape(begin)}.*?{re.escape(end)}"
    found = re.findall(pattern, page, re.DOTALL)
    if len(found) != 1 or page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"the page needs {begin.strip()} and then {end.strip()}, once.")
    text = "\n".join(lines).strip()
    return page.replace(found[0], f"{begin}\n{text}\n\n{end}")
