"""Time from `publish` to the handler's first line, publisher and worker in processes of their own.

One message at a time: the next is published when the last is confirmed. At half load: messages are
published by the clock, at half of the rate that the aio-pika idiom sustains when its publisher and
its consumer run at the same time; the same rate for all.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from tests.benchmarks.figures import Series, median_ratio, percentile, spread
from tests.benchmarks.job import Job
from tests.benchmarks.page import table
from tests.benchmarks.running import (
    PEERS_PYTHON,
    Section,
    Settings,
    check_queue,
    declare,
    delete,
    footer,
    is_of_this_environment,
    peer_versions,
    result_of,
    started,
    turned,
)

if TYPE_CHECKING:
    from aioworkq.testing import RabbitMQ

OURS, IDIOM = "aioworkq", "aio-pika"
CONTESTANTS: Final = {
    OURS: "ours",
    IDIOM: "idiom",
    "FastStream": "faststream",
    "taskiq-aio-pika": "taskiq",
}
SEQUENTIAL: Final = 3_000
SUSTAINED: Final = 20_000
SECONDS: Final = 10


@dataclass
class Times:
    """The rounds of one contestant: milliseconds, and CPU µs per message of both its programs."""

    medians: list[float] = field(default_factory=list[float])
    tails: list[float] = field(default_factory=list[float])
    cpus: list[float] = field(default_factory=list[float])

    def add(self, latencies: list[float], cpu: float) -> None:
        self.medians.append(1000 * percentile(latencies, 50))
        self.tails.append(1000 * percentile(latencies, 99))
        self.cpus.append(cpu)

    def cells(self) -> list[str]:
        return [
            f"{statistics.median(self.medians):.2f}",
            f"{statistics.median(self.tails):.2f}",
            f"{statistics.median(self.cpus):.0f}",
        ]

    def columns(self) -> tuple[list[float], list[float], list[float]]:
        return self.medians, self.tails, self.cpus


async def sustained(job: Job) -> float:
    """Return the messages per second that the idiom handles while it publishes."""
    await declare(job.url, job.queue)
    async with started("idiom_consume", job) as consumer:
        await result_of("idiom_publish_orders", job)
        result = await consumer.line()
    await delete(job.url, [job.queue])
    series = Series()
    series.add(result)
    return series.rate


async def times_of(node: RabbitMQ, kind: str, job: Job) -> tuple[list[float], float]:
    """Run a publisher and a worker; return the latencies, and the CPU µs of both per message."""
    if is_of_this_environment(kind):  # the others declare their queues themselves
        await declare(job.url, job.queue)
    async with started(f"{kind}_timed_consume", job) as consumer:
        await consumer.line()
        publisher = await result_of(f"{kind}_timed_publish", job)
        latencies: list[float] = (await consumer.line())["latencies"]
        worker: dict[str, Any] = await consumer.line()
    await check_queue(node, job)
    await delete(job.url, [job.queue])
    return latencies, (publisher["cpu"] + worker["cpu"]) / job.count * 1e6


async def measure(node: RabbitMQ, settings: Settings) -> Section:
    """Measure one message at a time and half load, all contestants in turn."""
    kinds = {
        name: kind
        for name, kind in CONTESTANTS.items()
        if is_of_this_environment(kind) or PEERS_PYTHON.exists()
    }
    base = Job(url=node.url, queue="latency", count=settings.scaled(SUSTAINED))
    full = statistics.median([await sustained(base) for _ in range(settings.rounds)])
    rate = full / 2
    alone = {name: Times() for name in kinds}
    loaded = {name: Times() for name in kinds}
    for number in range(settings.rounds):
        for times, count, paced in (
            (alone, settings.scaled(SEQUENTIAL), 0.0),
            (loaded, settings.scaled(int(rate * SECONDS)), rate),
        ):
            for name in turned(kinds, number):
                job = replace(
                    base, queue=f"latency-{name}-{number}-{paced}", count=count, rate=paced
                )
                times[name].add(*await times_of(node, kinds[name], job))
                print(name, *times[name].cells(), sep=" | ", flush=True)
    rows = [[name, *alone[name].cells(), *loaded[name].cells()] for name in kinds]
    pairs = [
        pair
        for times in (alone, loaded)
        for pair in zip(times[OURS].columns(), times[IDIOM].columns(), strict=True)
    ]
    rows.append([f"{OURS} / {IDIOM}", *(f"{median_ratio(*pair):.2f}" for pair in pairs)])
    rows.append(["lowest to highest", *(spread(*pair) for pair in pairs)])
    rows.append(["target", *(("at most 1", "at most 1", "") * 2)])
    header = ("", "50 %, ms", "99 %, ms", "CPU µs", "half load: 50 %, ms", "99 %, ms", "CPU µs")
    return Section(
        [
            f"Half load is {rate:,.0f} messages per second here: the aio-pika idiom sustains "
            f"{full:,.0f}, its publisher and its consumer running at the same time.",
            "CPU is that of publisher and worker together, per message. The first tenth of each",
            "run is left out. The last rows have the ratios within a round: their median, the",
            "lowest and the highest, and the target.",
            "",
            *table(header, rows),
            "",
            *([peer_versions()] if PEERS_PYTHON.exists() else []),
            *footer(node, "latency", settings.rounds),
        ]
    )
