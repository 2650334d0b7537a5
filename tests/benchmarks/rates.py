"""Rate and CPU beside the aio-pika idiom."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Final

from tests.benchmarks.figures import Row, heading
from tests.benchmarks.job import Job
from tests.benchmarks.page import table
from tests.benchmarks.running import Section, Settings, footer, interleaved, measured

if TYPE_CHECKING:
    from aioworkq.testing import RabbitMQ

ROWS: Final = (
    Row(
        title="publish bytes, one at a time",
        ours="ours_publish_1",
        theirs="idiom_publish_1",
        least_ratio=1.1,
    ),
    Row(
        title="publish bytes, 100 tasks",
        ours="ours_publish_100",
        theirs="idiom_publish_100",
    ),
    Row(
        title="publish bytes, 1,000 tasks",
        ours="ours_publish_1000",
        theirs="idiom_publish_1000",
        most_cpu=15,
    ),
    Row(
        title="publish_many of bytes / 1,000 tasks",
        ours="ours_publish_many",
        theirs="idiom_publish_1000",
        most_cpu=15,
    ),
    Row(
        title="no-op worker",
        ours="ours_consume",
        theirs="idiom_consume",
        least_ratio=2,
        most_cpu=60,
    ),
    Row(
        title="no-op worker, raw bytes",
        ours="ours_consume_bytes",
        theirs="idiom_consume_bytes",
    ),
    Row(
        title="publish bytes, 100 tasks, documented calls",
        ours="ours_publish_100_documented",
        theirs="idiom_publish_100",
    ),
    Row(
        title="no-op worker, documented calls",
        ours="ours_consume_documented",
        theirs="idiom_consume",
    ),
)
MESSAGES: Final = 20_000
PIPELINED: Final = 60_000
"""So many that the start of a thousand tasks, and a cold interpreter, do not count."""
ONE_AT_A_TIME: Final = 3_000


def number_of(contestant: str) -> int:
    """Return how many messages a contestant gets."""
    if contestant.endswith("_1"):
        return ONE_AT_A_TIME
    return PIPELINED if contestant.endswith(("_1000", "_many")) else MESSAGES


async def measure(node: RabbitMQ, settings: Settings) -> Section:
    """Measure all in turn."""
    names = dict.fromkeys(name for row in ROWS for name in (row.ours, row.theirs))
    runs = {}
    for name in names:
        job = Job(url=node.url, queue="rates", count=settings.scaled(number_of(name)))
        runs[name] = functools.partial(measured, node, name, job)
    taken = await interleaved(settings.rounds, runs)
    return Section(
        [
            "More is better for messages per second, less for CPU.",
            "",
            *table(heading("idiom"), [row.cells(taken) for row in ROWS]),
            *footer(node, "rates", settings.rounds),
        ]
    )
