"""What aioworkq costs, measured: ``make bench``, or ``python -m tests.benchmarks PART ...``.

Every contestant publishes or handles the same messages (256 bytes, persistent, confirmed, durable
classic queue, prefetch 100, unless a part says otherwise) on one private RabbitMQ, in a process of
its own, interleaved in rounds, so that a slow moment of the machine hits all alike. Tables show
medians, and ratios within a round. CPU per message is the client's alone, and steadier than a rate.
Other work queues are measured when ``.venv-bench`` is there, and the C client when it can be built.

Each part writes its own section of ``docs/benchmarks.md``, and leaves the others as they are.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import TYPE_CHECKING, Final

from aioworkq.testing import RabbitMQ
from tests.benchmarks import (
    beside_c,
    beside_peers,
    growth,
    imports,
    latency,
    memory,
    rates,
)
from tests.benchmarks.page import replace_section
from tests.benchmarks.running import ROOT, Section, Settings

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

PAGE: Final = ROOT / "docs" / "benchmarks.md"

PARTS: Final[dict[str, Callable[[RabbitMQ, Settings], Awaitable[Section | None]]]] = {
    "rates": rates.measure,
    "c": beside_c.measure,
    "peers": beside_peers.measure,
    "latency": latency.measure,
    "growth": growth.measure,
    "memory": memory.measure,
    "import": imports.measure,
}


def write(name: str, section: Section) -> None:
    """Put what a part found out into the page."""
    PAGE.write_text(replace_section(PAGE.read_text(), name, section.lines))
    for file, plot in section.plots.items():
        (PAGE.parent / file).write_text(plot)


async def run(names: list[str], settings: Settings, *, has_page: bool) -> None:
    for name in names:
        began = time.monotonic()
        async with RabbitMQ() as node:  # a new one, which remembers nothing of the last part
            section = await PARTS[name](node, settings)
        if section is None:
            continue
        print("\n".join(section.lines))
        print(f"\n{name} took {time.monotonic() - began:.0f} s\n", flush=True)
        if has_page:
            write(name, section)


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="times the number of messages")
    parser.add_argument("--no-page", action="store_true", help="print only")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}: choose of {', '.join(PARTS)}")
    settings = Settings(rounds=options.rounds, scale=options.scale)
    asyncio.run(run(options.parts or list(PARTS), settings, has_page=not options.no_page))


if __name__ == "__main__":
    main()
