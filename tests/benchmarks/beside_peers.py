"""Rate and CPU beside other work queues, where their environment is there."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Final

from tests.benchmarks.figures import Series, median_ratio, spread, target
from tests.benchmarks.job import Job
from tests.benchmarks.page import table
from tests.benchmarks.plot import bars
from tests.benchmarks.running import (
    PEERS_PYTHON,
    Section,
    Settings,
    footer,
    interleaved,
    measured,
    peer_versions,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aioworkq.testing import RabbitMQ

MESSAGES: Final = 5_000
OURS: Final = "aioworkq"
PUBLISH: Final = {
    OURS: "ours_publish_orders",
    "aio-pika": "idiom_publish_orders",
    "FastStream": "faststream_publish",
    "taskiq-aio-pika": "taskiq_publish",
    "Dramatiq": "dramatiq_publish",
    "Celery": "celery_publish",
}
HANDLE: Final = {
    OURS: "ours_consume",
    "aio-pika": "idiom_consume",
    "FastStream": "faststream_consume",
    "taskiq-aio-pika": "taskiq_consume",
    "Dramatiq": "dramatiq_consume",
    "Celery": "celery_consume",
}
LEAST: Final = {"aio-pika": 2.0, "FastStream": 2.5, "taskiq-aio-pika": 4.0}
"""How many times as fast as others our worker shall be."""


def rows_of(
    contestants: Mapping[str, str], taken: Mapping[str, Series], least: Mapping[str, float]
) -> list[list[str]]:
    """Return a row for each, with how ours compares in each round."""
    ours = taken[contestants[OURS]]
    rows: list[list[str]] = []
    for name, contestant in contestants.items():
        theirs = taken[contestant]
        rate = (median_ratio(ours.rates, theirs.rates), spread(ours.rates, theirs.rates))
        cpu = (median_ratio(theirs.cpus, ours.cpus), spread(theirs.cpus, ours.cpus))
        is_ours = name == OURS
        rows.append(
            [
                name,
                f"{theirs.rate:,.0f}",
                *(["", ""] if is_ours else [f"{rate[0]:.1f}", rate[1]]),
                target("at least", least.get(name)),
                f"{theirs.cpu:.0f}",
                *(["", ""] if is_ours else [f"{cpu[0]:.1f}", cpu[1]]),
            ]
        )
    return rows


def heading(what: str) -> tuple[str, ...]:
    """Return what stands above the rows."""
    rates = (f"{what}/s", "ours is times as fast", "lowest to highest", "target")
    return ("", *rates, "CPU µs", "times ours", "lowest to highest")


async def measure(node: RabbitMQ, settings: Settings) -> Section | None:
    """Measure all in turn."""
    if not PEERS_PYTHON.exists():
        print("There is no .venv-bench: other work queues are left out.")
        return None
    runs = {}
    for contestant in (*PUBLISH.values(), *HANDLE.values()):
        job = Job(url=node.url, queue=f"peers-{contestant}", count=settings.scaled(MESSAGES))
        runs[contestant] = functools.partial(measured, node, contestant, job)
    taken = await interleaved(settings.rounds, runs)
    costs = {name: (taken[PUBLISH[name]].cpu, taken[HANDLE[name]].cpu) for name in PUBLISH}
    return Section(
        [
            *table(heading("published"), rows_of(PUBLISH, taken, {})),
            "",
            *table(heading("handled"), rows_of(HANDLE, taken, LEAST)),
            "",
            "![CPU per message](benchmarks.svg)",
            "",
            peer_versions(),
            *footer(node, "peers", settings.rounds),
        ],
        {"benchmarks.svg": bars("CPU µs per message: publish, handle", costs)},
    )
