"""What waiting in the broker costs, beside other ways: ``python -m tests.benchmarks.delays``.

First what a delay costs its publisher. Then what a retry costs the broker: messages are handed
over once, wait for four seconds in one way or another, are handed over again and acked. The
broker's CPU time is that of its process (``/proc/PID/stat``), for all that happens to a message
from its first publication on; it is steadier than a rate. Prints the tables of
``docs/explanation/delays.md``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import aiormq
from pamqp.commands import Basic

from aioworkq import Producer, Queue
from aioworkq.testing import RabbitMQ

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from aiormq.abc import AbstractChannel, DeliveredMessage

BODY: Final = b"x" * 256
TICKS: Final = os.sysconf("SC_CLK_TCK")

ONE_BIT: Final = 4.0  # 32 eighths
FIVE_BITS: Final = 3.875  # 31 eighths
PUBLISHED_FOR: Final = (("at once", 0.0), ("one bit", 4096.0), ("five bits", 3968.0))


def broker_cpu(node: RabbitMQ) -> float:
    """Return the CPU seconds of a node's process so far."""
    assert node._node is not None
    assert node._node.server is not None
    stat = Path(f"/proc/{node._node.server.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(stat[11]) + int(stat[12])) / TICKS


async def publisher_row(node: RabbitMQ, name: str, delay: float, count: int) -> str:
    """Publish to a quorum queue, with a delay that does not end here."""
    queue = Queue(f"published {name}", bytes)
    async with Producer(node.url) as producer:
        await producer.publish(queue, BODY, delay=delay)
        wall, cpu, broker = time.perf_counter(), time.process_time(), broker_cpu(node)
        report = await producer.publish_many(queue, (BODY for _ in range(count)), delay=delay)
        report.raise_for_errors()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        broker = broker_cpu(node) - broker
    cells = (f"{count / wall:,.0f}", f"{cpu / count * 1e6:.0f}", f"{broker / count * 1e6:.0f}")
    return f"| {name} | {' | '.join(cells)} |"


@dataclass
class Way:
    """One way to wait: how a message that is handed over the first time is made to wait.

    Attributes:
        name: Its name in the table.
        delay: Seconds.
        arguments: Of the queue that is consumed from.
        hops: Into how many queues a message is written after it was handed over.
    """

    name: str
    delay: float
    hops: int
    arguments: dict[str, Any] = field(default_factory=dict[str, Any])


NO_RETRY: Final = Way("no retry", 0.0, 0)
WAYS: Final = (
    NO_RETRY,
    Way("delay queues, one bit", ONE_BIT, 2),
    Way("delay queues, five bits", FIVE_BITS, 6),
    Way("a queue for this delay", ONE_BIT, 2),
)
NATIVE: Final = Way(
    "native delayed retry",
    ONE_BIT,
    0,
    {"x-delayed-retry-type": "failed", "x-delayed-retry-min": int(1000 * ONE_BIT)},
)


class Retrier:
    """Consumes from a queue, lets every message wait once, and acks it the second time."""

    def __init__(self, way: Way, queue: str, producer: Producer) -> None:
        self._way = way
        self._queue = Queue(queue, bytes, declare=False)
        self._waiting = Queue(f"{queue}.waiting", bytes, declare=False)
        self._producer = producer
        self.due: dict[str, float] = {}
        self.late: list[float] = []
        self.last = 0.0

    async def on_message(self, message: DeliveredMessage) -> None:
        """Take one delivery."""
        way, channel = self._way, message.channel
        message_id = message.header.properties.message_id or ""
        now = time.monotonic()
        assert isinstance(message.delivery, Basic.Deliver)
        tag = message.delivery.delivery_tag or 0
        if way is NO_RETRY or message_id in self.due:
            self.late.append(now - self.due.get(message_id, now))
            self.last = now
            await channel.basic_ack(tag)
        elif way is NATIVE:
            self.due[message_id] = now + way.delay
            await channel.basic_reject(tag, requeue=True)
        else:
            is_ladder = way.name.startswith("delay queues")
            await self._producer.publish(
                self._queue if is_ladder else self._waiting,
                message.body,
                message_id=message_id,
                delay=way.delay if is_ladder else None,
            )
            self.due[message_id] = time.monotonic() + way.delay
            await channel.basic_ack(tag)


async def declare(channel: AbstractChannel, way: Way, queue: str) -> None:
    """Declare a way's queues: all quorum, dead-lettering at least once."""
    quorum: dict[str, Any] = {"x-queue-type": "quorum"}
    await channel.queue_declare(queue, durable=True, arguments=quorum | way.arguments)
    waits: dict[str, Any] = {
        "x-message-ttl": int(1000 * way.delay),
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": queue,
    }
    await channel.queue_declare(f"{queue}.waiting", durable=True, arguments=quorum | waits)


@contextlib.asynccontextmanager
async def retrying(
    node: RabbitMQ, way: Way, queue: str
) -> AsyncGenerator[tuple[Retrier, Producer]]:
    """Consume from a new queue."""
    connection = await aiormq.connect(node.url)
    try:
        channel = await connection.channel()
        await declare(channel, way, queue)
        async with Producer(node.url) as producer:
            if way.name.startswith("delay queues"):  # declared before it is measured
                await producer.publish(f"{queue}.other", BODY, delay=way.delay)
            retrier = Retrier(way, queue, producer)
            await channel.basic_qos(prefetch_count=200)
            await channel.basic_consume(queue, retrier.on_message)
            yield retrier, producer
    finally:
        await connection.close()


async def retry_row(node: RabbitMQ, way: Way, rate: int, seconds: int) -> str:
    """Measure lateness and CPU at a steady rate, then how fast a burst comes back."""
    count = rate * seconds
    name = f"{way.name} {way.hops}"
    async with retrying(node, way, f"steady {name}") as (retrier, producer):
        queue = Queue(f"steady {name}", bytes, declare=False)
        cpu = broker_cpu(node)
        begin = time.monotonic()
        for number in range(count):
            await asyncio.sleep(begin + number / rate - time.monotonic())
            await producer.publish(queue, BODY)
        while len(retrier.late) < count:
            await asyncio.sleep(0.01)
        cpu = broker_cpu(node) - cpu
        cuts = statistics.quantiles(retrier.late, n=100)
    async with retrying(node, way, f"burst {name}") as (burst, producer):
        queue = Queue(f"burst {name}", bytes, declare=False)
        began = time.monotonic()
        await producer.publish_many(queue, (BODY for _ in range(count)))
        while len(burst.late) < count:
            await asyncio.sleep(0.01)
        took = burst.last - min(burst.due.values(), default=began)
    late = [f"{1000 * cuts[at]:.0f}" for at in (49, 94, 98)]
    late = ["", "", ""] if way is NO_RETRY else late
    cells = (str(way.hops), *late, f"{cpu / count * 1e6:.0f}", f"{count / took:,.0f}")
    return f"| {way.name} | {' | '.join(cells)} |"


async def run(version: str | None, count: int, rate: int, seconds: int) -> None:
    async with RabbitMQ(version=version) as node:
        print(f"\nRabbitMQ {node.version}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}\n")
        print("| delay | msg/s | CPU µs, publisher | CPU µs, broker |\n| --- | --- | --- | --- |")
        for name, delay in PUBLISHED_FOR:
            print(await publisher_row(node, name, delay, count), flush=True)
        print("\n| | writes | late by (ms), 50 % | 95 % | 99 % | CPU µs, broker | burst, msg/s |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        has_native = tuple(map(int, node.version.split(".")[:2])) >= (4, 3)
        for way in (*WAYS, NATIVE) if has_native else WAYS:
            print(await retry_row(node, way, rate, seconds), flush=True)


def main() -> None:
    """Measure, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rabbitmq", metavar="VERSION", help="the version of RabbitMQ")
    parser.add_argument("--messages", type=int, default=20_000, help="of the publisher's rows")
    parser.add_argument("--rate", type=int, default=200, help="messages per second to retry")
    parser.add_argument("--seconds", type=int, default=10)
    options = parser.parse_args()
    asyncio.run(run(options.rabbitmq, options.messages, options.rate, options.seconds))


if __name__ == "__main__":
    main()
