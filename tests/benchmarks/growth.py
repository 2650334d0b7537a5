"""How cost grows: with handlers, bodies, backlogs, processes, and the type of the queue."""

from __future__ import annotations

import asyncio
import functools
import statistics
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from aioworkq import Producer
from tests.benchmarks.contestants import bytes_queue
from tests.benchmarks.figures import Series, growth, is_linear, median_ratio
from tests.benchmarks.job import TASKS, Job
from tests.benchmarks.page import table
from tests.benchmarks.plot import Panel, panels
from tests.benchmarks.running import (
    Section,
    Settings,
    check_queue,
    delete,
    fill,
    footer,
    interleaved,
    measured,
    purge,
    started,
    turned,
    wait_empty,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aioworkq.testing import RabbitMQ

HANDLERS: Final = (1, 10, 100, 1000)
HANDLED: Final = 20_000
SIZES: Final = {1_000: 20_000, 10_000: 10_000, 100_000: 2_000, 1_000_000: 300}
BACKLOGS: Final = (1_000, 100_000, 1_000_000)
PROCESSES: Final = (1, 2, 3, 4)
SHARED: Final = 50_000
TYPES: Final = ("classic", "quorum")
TYPED: Final = 20_000
PUBLISH, CONSUME = "ours_publish_many", "ours_consume_bytes"
LINES: Final = {
    "ours, publish": PUBLISH,
    "idiom, publish": "idiom_publish_100",
    "ours": CONSUME,
    "idiom": "idiom_consume_bytes",
}
NAMES: Final = tuple(LINES.values())

_NOISE: Final = 1.2  # what a cost may grow by, above its share, without being said to

Part = tuple[list[str], Panel]


async def measure(node: RabbitMQ, settings: Settings) -> Section:
    """Measure one after the other."""
    lines: list[str] = []
    drawn: list[Panel] = []
    for part in (with_handlers, with_bodies, with_backlog, with_processes, with_types):
        more, panel = await part(node, settings)
        print("\n".join(more), flush=True)
        lines += [*more, ""]
        drawn.append(panel)
    return Section(
        [
            "![CPU per message as it grows](benchmarks-growth.svg)",
            "",
            "Bodies are raw bytes here: nothing is decoded. A cost is said to grow faster than",
            "linearly when it grows in one step by more than the size does, and by another",
            f"{_NOISE - 1:.0%} on top, which is left to noise.",
            "",
            *lines,
            *footer(node, "growth", settings.rounds),
        ],
        {"benchmarks-growth.svg": panels("CPU µs per message", drawn)},
    )


# Handlers on one worker


async def many_handlers(node: RabbitMQ, name: str, job: Job) -> dict[str, float]:
    """Start a worker with many handlers, publish to their queues in turn, and stop it."""
    targets = [bytes_queue(queue) for queue in job.queues]
    async with Producer(job.url) as producer:

        async def publish(count: int) -> None:
            numbers = iter(range(count))

            async def publisher() -> None:
                for number in numbers:
                    await producer.publish(targets[number % len(targets)], job.body)

            await asyncio.gather(*(publisher() for _ in range(TASKS)))

        await publish(len(targets))  # the producer has looked at each queue before it is measured
        await purge(job.url, job.queues)
        async with started(name, job) as contestant:
            start = await contestant.line()
            await publish(job.count)
            stop, result = await contestant.line(), await contestant.line()
    await check_queue(node, replace(job, queue=job.queues[-1]))
    await delete(job.url, job.queues)
    return {
        "cpu": result["cpu"] / result["messages"] * 1e6,
        "rate": result["messages"] / result["wall"],
        "start": 1000 * start["wall"],
        "start_cpu": 1000 * start["cpu"],
        "stop_cpu": 1000 * stop["cpu"],
        "stop_collector": 1000 * stop.get("collector_cpu", 0.0),
        "resident_mb": start["resident_mb"],
    }


async def with_handlers(node: RabbitMQ, settings: Settings) -> Part:
    """Measure workers with 1 to 1,000 handlers, each of another queue."""
    taken: dict[tuple[str, int], list[dict[str, float]]] = {}
    pairs = [(kind, number) for number in HANDLERS for kind in ("ours", "idiom")]
    for turn in range(settings.rounds):
        for kind, number in turned(pairs, turn):
            count = settings.scaled(HANDLED)
            job = Job(url=node.url, queue=f"{kind}-of", count=count, handlers=number)
            result = await many_handlers(node, f"{kind}_handlers", job)
            taken.setdefault((kind, number), []).append(result)

    def medians(kind: str, what: str) -> list[float]:
        return [
            statistics.median(result[what] for result in taken[kind, number]) for number in HANDLERS
        ]

    columns = (
        medians("ours", "cpu"),
        medians("idiom", "cpu"),
        medians("ours", "rate"),
        medians("ours", "start_cpu"),
        medians("idiom", "start_cpu"),
        medians("ours", "start"),
        medians("ours", "stop_cpu"),
        medians("ours", "stop_collector"),
        medians("ours", "resident_mb"),
    )
    rows = [
        [f"{number:,}", *(f"{value:,.0f}" for value in values)]
        for number, *values in zip(HANDLERS, *columns, strict=True)
    ]
    header = (
        "handlers",
        "CPU µs ours",
        "CPU µs idiom",
        "msg/s ours",
        "start, CPU ms ours",
        "idiom",
        "start, ms ours",
        "stop, CPU ms ours",
        "of it garbage collector",
        "resident MB ours",
    )
    lines = [
        "### Handlers on one worker",
        "",
        f"{settings.scaled(HANDLED):,} messages are published to the queues in turn, while the",
        "worker handles them, so the rate is that of both. The idiom has a channel for each queue.",
        "Both are given 10 messages at a time of each.",
        "",
        *table(header, rows),
        "",
        *said(
            HANDLERS,
            {
                "CPU to start": medians("ours", "start_cpu"),
                "CPU to stop": medians("ours", "stop_cpu"),
                "CPU to stop, without the garbage collector": [
                    cpu - collector
                    for cpu, collector in zip(
                        medians("ours", "stop_cpu"),
                        medians("ours", "stop_collector"),
                        strict=True,
                    )
                ],
                "CPU per message": medians("ours", "cpu"),
            },
        ),
    ]
    return lines, Panel(
        "handlers on one worker",
        [f"{number:,}" for number in HANDLERS],
        {kind: medians(kind, "cpu") for kind in ("ours", "idiom")},
    )


def said(sizes: Sequence[int], costs: dict[str, list[float]]) -> list[str]:
    """Return sentences that say of each cost how it grows, from step to step."""
    lines: list[str] = []
    for name, values in costs.items():
        verdict = "no faster" if is_linear(sizes, values, noise=_NOISE) else "faster"
        exponents = ", ".join(f"{step:.2f}" for step in growth(sizes, values))
        lines.append(f"{name} grows {verdict} than linearly: exponents {exponents}.")
    return lines


# Bodies


async def with_bodies(node: RabbitMQ, settings: Settings) -> Part:
    """Measure bodies of 1 KB to 1 MB."""
    runs = {}
    for size, count in SIZES.items():
        count = max(100, int(count * settings.scale) // 100 * 100)
        job = Job(url=node.url, queue="bodies", count=count, size=size)
        for name in NAMES:
            runs[size, name] = functools.partial(measured, node, name, job)
    taken = await interleaved(settings.rounds, runs)
    rows = [
        [
            f"{size // 1000:,} KB",
            *(f"{taken[size, name].cpu:,.0f}" for name in NAMES),
            f"{taken[size, PUBLISH].rate:,.0f}",
            f"{taken[size, CONSUME].rate:,.0f}",
            f"{taken[size, PUBLISH].rate * size / 1e6:,.0f}",
            f"{taken[size, CONSUME].rate * size / 1e6:,.0f}",
        ]
        for size in SIZES
    ]
    header = (
        "body",
        "publish, CPU µs ours",
        "idiom",
        "handle, CPU µs ours",
        "idiom",
        "published/s ours",
        "handled/s ours",
        "MB/s published",
        "MB/s handled",
    )
    costs = {name: [taken[size, name].cpu for size in SIZES] for name in NAMES}
    lines = [
        "### Size of the body",
        "",
        *table(header, rows),
        "",
        *said(
            tuple(SIZES),
            {
                "CPU to publish": costs[PUBLISH],
                "CPU to handle": costs[CONSUME],
            },
        ),
    ]
    labels = [f"{size // 1000:,} KB" for size in SIZES]
    return lines, Panel(
        "size of the body",
        labels,
        {line: costs[name] for line, name in LINES.items()},
    )


# Backlog


async def with_backlog(node: RabbitMQ, settings: Settings) -> Part:
    """Measure how fast backlogs are worked off; the longest once only."""
    backlogs = list(dict.fromkeys(settings.scaled(number) for number in BACKLOGS))
    taken = {number: Series() for number in backlogs}
    fills = {number: Series() for number in backlogs}
    peaks: dict[int, list[float]] = {number: [] for number in backlogs}
    for turn in range(settings.rounds):
        for number in turned(backlogs[:-1] if turn and backlogs[1:] else backlogs, turn):
            job = Job(url=node.url, queue="backlog", count=number)
            fills[number].add(await measured(node, PUBLISH, job, keep=True))
            result = await measured(node, CONSUME, job, is_filled=True)
            taken[number].add(result)
            peaks[number].append(result["peak_mb"])
    rows = [
        [
            f"{number:,}",
            f"{fills[number].rate:,.0f}",
            f"{fills[number].cpu:.0f}",
            f"{taken[number].rate:,.0f}",
            f"{taken[number].cpu:.0f}",
            f"{statistics.median(peaks[number]):.0f}",
        ]
        for number in backlogs
    ]
    costs = [taken[number].cpu for number in backlogs]
    header = (
        "messages",
        "published/s",
        "CPU µs",
        "handled/s",
        "CPU µs",
        "most MB of the worker",
    )
    lines = [
        "### Backlog",
        "",
        "All of it is published with `publish_many` while nobody consumes, then handled by one",
        f"worker with prefetch 100; {max(backlogs):,} messages once only.",
        "",
        *table(header, rows),
        "",
        *said(
            tuple(backlogs),
            {"CPU for all": [cost * n for cost, n in zip(costs, backlogs, strict=True)]},
        ),
    ]
    return lines, Panel("backlog", [f"{number:,}" for number in backlogs], {"ours": costs})


# Processes


async def shared(node: RabbitMQ, job: Job, processes: int) -> tuple[float, float, list[int]]:
    """Let processes share a backlog; return messages/s, CPU µs per message, and what each did."""
    await fill(job, job.count)
    async with AsyncExitStack() as stack:
        workers = [
            await stack.enter_async_context(started("ours_share", job)) for _ in range(processes)
        ]
        for worker in workers:
            await worker.line()
        for worker in workers:
            worker.go_on()
        await wait_empty(job.url, job.queue)
        for worker in workers:
            worker.go_on()
        shares = [await worker.line() for worker in workers]
        ends = [await worker.line() for worker in workers]
    await check_queue(node, job)
    await delete(job.url, [job.queue])
    handled = [share["handled"] for share in shares]
    if sum(handled) != job.count:
        raise RuntimeError(f"{job.count} messages, and {handled} were handled.")
    first = min(share["first"] for share in shares if share["handled"])
    last = max(share["last"] for share in shares)
    cpu = sum(end["cpu"] for end in ends)
    return job.count / (last - first), cpu / job.count * 1e6, handled


async def with_processes(node: RabbitMQ, settings: Settings) -> Part:
    """Measure 1 to 4 worker processes at one queue."""
    job = Job(url=node.url, queue="shared", count=settings.scaled(SHARED))
    taken: dict[int, list[tuple[float, float, list[int]]]] = {number: [] for number in PROCESSES}
    for turn in range(settings.rounds):
        for number in turned(PROCESSES, turn):
            taken[number].append(await shared(node, job, number))
    rates = {n: statistics.median(rate for rate, *_ in taken[n]) for n in PROCESSES}
    cpus = {n: statistics.median(cpu for _, cpu, _ in taken[n]) for n in PROCESSES}

    def column(number: int) -> list[float]:
        return [rate for rate, *_ in taken[number]]

    rows = [
        [
            str(number),
            f"{rates[number]:,.0f}",
            f"{median_ratio(column(number), column(1)):.2f}",
            f"{cpus[number]:.0f}",
            f"{min(min(handled) / max(handled) for *_, handled in taken[number]):.2f}",
        ]
        for number in PROCESSES
    ]
    header = ("processes", "msg/s", "times one", "CPU µs", "least share / largest")
    lines = [
        "### Worker processes",
        "",
        f"They share a backlog of {job.count:,} messages, each with prefetch 100, beside the",
        "broker on the same machine: more processes than processors bring nothing here.",
        "",
        *table(header, rows),
        "",
        *said(PROCESSES, {"CPU for all": [cpus[number] for number in PROCESSES]}),
    ]
    return lines, Panel(
        "worker processes", [str(number) for number in PROCESSES], {"ours": list(cpus.values())}
    )


# Types of queues


async def with_types(node: RabbitMQ, settings: Settings) -> Part:
    """Measure classic and quorum queues."""
    runs = {}
    for queue_type in TYPES:
        job = Job(
            url=node.url,
            queue=f"type-{queue_type}",
            count=settings.scaled(TYPED),
            queue_type=queue_type,
        )
        for name in NAMES:
            runs[queue_type, name] = functools.partial(measured, node, name, job)
    taken = await interleaved(settings.rounds, runs)
    rows = [
        [
            queue_type,
            *(f"{taken[queue_type, name].cpu:.0f}" for name in NAMES),
            *(f"{taken[queue_type, name].rate:,.0f}" for name in NAMES),
        ]
        for queue_type in TYPES
    ]
    header = (
        "queue",
        "publish, CPU µs ours",
        "idiom",
        "handle, CPU µs ours",
        "idiom",
        "published/s ours",
        "idiom",
        "handled/s ours",
        "idiom",
    )
    lines = [
        "### Classic and quorum queues",
        "",
        f"{settings.scaled(TYPED):,} messages; ours with `publish_many`, the idiom with 100 tasks.",
        "",
        *table(header, rows),
    ]
    costs = {
        line: [taken[queue_type, name].cpu for queue_type in TYPES] for line, name in LINES.items()
    }
    return lines, Panel("type of the queue", list(TYPES), costs)
