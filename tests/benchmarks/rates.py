"""Rate and CPU beside the aio-pika idiom."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tests.benchmarks.figures import comparison
from tests.benchmarks.job import Job
from tests.benchmarks.page import table
from tests.benchmarks.running import Section, Settings, footer, interleaved

if TYPE_CHECKING:
    from aioworkq.testing import RabbitMQ

PAIRS: Final = (
    ("publish, one at a time", "ours_publish_1", "idiom_publish_1", 3_000),
    ("publish, 100 in flight", "ours_publish_100", "idiom_publish_100", 20_000),
    ("publish, 1,000 tasks", "ours_publish_1000", "idiom_publish_1000", 20_000),
    ("publish_many / 1,000 tasks", "ours_publish_many", "idiom_publish_1000", 20_000),
    ("no-op worker, prefetch 100", "ours_consume", "idiom_consume", 20_000),
)


async def measure(node: RabbitMQ, settings: Settings) -> Section:
    """Measure pairs."""
    rows: list[list[str]] = []
    for title, ours, idiom, count in PAIRS:
        job = Job(url=node.url, queue="rates", count=settings.scaled(count))
        taken = await interleaved(settings.rounds, {ours: job, idiom: job})
        rows.append(comparison(title, taken[ours], taken[idiom]))
        print(*rows[-1], sep=" | ", flush=True)
    header = ("", "msg/s ours", "msg/s idiom", "ratio", "CPU µs ours", "CPU µs idiom", "ratio")
    return Section(
        [
            "More is better for messages per second, less for CPU.",
            "",
            *table(header, rows),
            *footer(node, "rates", settings.rounds),
        ]
    )
