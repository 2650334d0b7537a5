"""Thousands of delayed messages: none lost, none early, none in the worker while it waits.

How late they come is printed, and not judged: it depends on the machine, and on what else it does.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import statistics
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from aioworkq import Producer, Queue, Worker
from tests.consuming import Broker, channels, crash, eventually, publish_all

if TYPE_CHECKING:
    from aioworkq.testing import RabbitMQ

PUBLISHERS: Final = 50
PATIENCE: Final = 90.0

pytestmark = [pytest.mark.rabbitmq, pytest.mark.slow, pytest.mark.timeout(600)]


class Run:
    """Messages with random delays: when each was due at the earliest, and when it came."""

    def __init__(self, count: int, longest: float) -> None:
        self.count = count
        self.longest = longest
        self.earliest: dict[int, float] = {}
        self.due: dict[int, float] = {}
        self.came: dict[int, float] = {}
        self.times: Counter[int] = Counter()

    @property
    def lost(self) -> set[int]:
        return self.due.keys() - self.came.keys()

    @property
    def early(self) -> set[int]:
        return {number for number, came in self.came.items() if came < self.earliest[number]}

    async def handle(self, number: int) -> None:
        self.times[number] += 1
        self.came.setdefault(number, time.monotonic())

    async def publish(self, producer: Producer, queue: Queue[int]) -> None:
        """Publish all messages, a few dozen at a time."""
        numbers = iter(range(self.count))

        async def publish_some() -> None:
            for number in numbers:
                delay = random.uniform(1, self.longest)
                self.earliest[number] = time.monotonic() + delay
                await producer.publish(queue, number, delay=delay, timeout=60)
                self.due[number] = time.monotonic() + delay

        async with asyncio.TaskGroup() as tasks:
            for _ in range(PUBLISHERS):
                tasks.create_task(publish_some())

    def __str__(self) -> str:
        late = [came - self.due[number] for number, came in self.came.items()]
        cuts = statistics.quantiles(late, n=100)
        return (
            f"{self.count} messages, delays of 1 to {self.longest:g} s: "
            f"late by {statistics.median(late):.2f} s (median), {cuts[94]:.2f} s (95 %), "
            f"{cuts[98]:.2f} s (99 %), {max(late):.2f} s (all); "
            f"{sum(times > 1 for times in self.times.values())} came twice; "
            f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs"
        )


@pytest.mark.parametrize("how", ["undisturbed", "killed"])
async def test_random_delays(
    quick_node: RabbitMQ,
    queue_name: str,
    is_long: bool,  # noqa: FBT001 - a fixture
    how: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """No message comes before its time, and none is lost when the broker is killed meanwhile."""
    caplog.set_level(logging.CRITICAL)
    queue = Queue(queue_name, int)
    run = Run(5000, 30) if is_long else Run(1000, 8)
    worker = Worker(quick_node.url)
    worker.handler(queue, concurrency=50)(run.handle)
    async with worker, Producer(quick_node.url) as producer:
        await run.publish(producer, queue)
        if how == "killed":
            await eventually(lambda: len(run.came) > run.count / 4, timeout=PATIENCE)
            await crash(quick_node)
            left = run.count - len(run.came)
            await quick_node.start()
            print(f"killed with {left} messages waiting")
        await eventually(lambda: not run.lost, timeout=PATIENCE)
    print(f"{quick_node.version}, {how}: {run}")
    assert len(run.came) == run.count
    assert not run.early


WORKER = textwrap.dedent(
    """
    import asyncio, sys
    from aioworkq import Queue, Worker

    async def main():
        worker = Worker(sys.argv[1])

        @worker.handler(Queue(sys.argv[2], int))
        async def handle(number: int) -> None:
            print("handled", flush=True)

        async with worker:
            await asyncio.to_thread(sys.stdin.read)
            one = worker.statistics().consumers[sys.argv[2]]
            print(one.in_flight, one.waiting, one.handled, flush=True)

    asyncio.run(main())
    """
)


def resident(pid: int) -> int:
    """Return the bytes of a process that are in memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024


async def test_waiting_messages_cost_the_worker_nothing(
    rabbitmq: RabbitMQ,
    url: str,
    queue_name: str,
    is_long: bool,  # noqa: FBT001 - a fixture
) -> None:
    """Messages that wait for an hour are all in the broker: no memory of a worker, no prefetch."""
    count = 100_000 if is_long else 10_000
    queue = Queue(queue_name, int)
    worker = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", WORKER, url, queue_name),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        async with Producer(url) as producer, Broker(url) as broker:
            for _ in range(200):
                await producer.publish(queue, 0)
                assert await worker.stdout.readline() == b"handled\n"
            before = resident(worker.pid)
            began = time.perf_counter()
            report = await producer.publish_many(queue, range(count), delay=3600)
            took = time.perf_counter() - began
            report.raise_for_errors()
            grown = resident(worker.pid) - before
            # An hour is 28,800 eighths, 111000010000000 in binary: the first bit is number 14.
            assert await broker.ready("aioworkq.v1.delay.14") == count
            assert [
                one["messages_unacknowledged"] for one in await channels(rabbitmq, queue_name)
            ] == [0]
            await publish_all(producer, queue, [0])
            assert await worker.stdout.readline() == b"handled\n"
        output, _ = await worker.communicate(b"")
    finally:
        if worker.returncode is None:
            worker.kill()
            await worker.wait()
    print(
        f"{rabbitmq.version}: {count} messages for an hour, published in {took:.1f} s; "
        f"the worker's memory grew by {grown / 1024:.0f} KiB from {before / 1024:.0f} KiB",
    )
    assert worker.returncode == 0
    assert output == b"0 0 201\n"
    assert grown < 2**20
