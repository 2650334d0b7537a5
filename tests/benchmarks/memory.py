"""Memory of one process that publishes and handles many messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tests.benchmarks.job import Job
from tests.benchmarks.page import table
from tests.benchmarks.running import Section, Settings, footer, started

if TYPE_CHECKING:
    from aioworkq.testing import RabbitMQ

MESSAGES: Final = 1_000_000
_NOTES: Final = 12  # idle, ten tenths, the end


async def measure(node: RabbitMQ, settings: Settings) -> Section:
    """Run one process once."""
    job = Job(url=node.url, queue="memory", count=settings.scaled(MESSAGES))
    async with started("ours_memory", job) as contestant:
        notes = [await contestant.line() for _ in range(_NOTES)]
    rows = [[note["at"], f"{note['resident_mb']:.0f}"] for note in notes]
    return Section([*table(("", "resident MB"), rows), *footer(node, "memory", 1)])
