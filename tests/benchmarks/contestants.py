"""The programs that are compared; each is run in a process of its own.

``python -m tests.benchmarks.contestants NAME URL QUEUE COUNT`` prints one line of JSON: messages,
seconds, and seconds of CPU, from the first message to the last, without start-up.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import resource
import sys
from collections.abc import Callable, Coroutine
from typing import Final

import aio_pika

from aioworkq import Producer, Queue, Worker
from tests.benchmarks.clock import Measurement

BODY: Final = b"x" * 256
PREFETCH: Final = 100

Contestant = Callable[[str, str, int], Coroutine[None, None, Measurement]]


def bench_queue(name: str) -> Queue[bytes]:
    return Queue(name, bytes, type="classic")


async def ours_publish_1(url: str, queue: str, count: int) -> Measurement:
    async with Producer(url) as producer:
        await producer.publish(bench_queue(queue), BODY)
        clock = Measurement()
        for _ in range(count):
            await producer.publish(bench_queue(queue), BODY)
        return clock.stop()


async def ours_publish(url: str, queue: str, count: int, *, tasks: int) -> Measurement:
    async with Producer(url) as producer:
        target = bench_queue(queue)
        await producer.publish(target, BODY)

        async def publisher() -> None:
            for _ in range(count // tasks):
                await producer.publish(target, BODY)

        clock = Measurement()
        await asyncio.gather(*(publisher() for _ in range(tasks)))
        return clock.stop()


async def ours_publish_many(url: str, queue: str, count: int) -> Measurement:
    async with Producer(url) as producer:
        target = bench_queue(queue)
        await producer.publish(target, BODY)
        clock = Measurement()
        report = await producer.publish_many(target, (BODY for _ in range(count)))
        report.raise_for_errors()
        return clock.stop()


async def ours_consume(url: str, queue: str, count: int) -> Measurement:
    worker = Worker(url)
    seen = 0
    clock: Measurement | None = None
    done = asyncio.Event()

    @worker.handler(bench_queue(queue), concurrency=PREFETCH, prefetch_count=PREFETCH)
    async def handle(body: bytes) -> None:
        nonlocal seen, clock
        clock = clock or Measurement()
        seen += 1
        if seen == count:
            clock.stop()
            done.set()

    async with worker:
        await done.wait()
    assert clock is not None
    return clock


async def idiom_channel(
    url: str,
) -> tuple[aio_pika.abc.AbstractRobustConnection, aio_pika.abc.AbstractChannel]:
    connection = await aio_pika.connect_robust(url)
    return connection, await connection.channel()


def idiom_message() -> aio_pika.Message:
    return aio_pika.Message(BODY, delivery_mode=aio_pika.DeliveryMode.PERSISTENT)


async def idiom_publish_1(url: str, queue: str, count: int) -> Measurement:
    connection, channel = await idiom_channel(url)
    async with connection:
        await channel.default_exchange.publish(idiom_message(), routing_key=queue)
        clock = Measurement()
        for _ in range(count):
            await channel.default_exchange.publish(idiom_message(), routing_key=queue)
        return clock.stop()


async def idiom_publish(url: str, queue: str, count: int, *, tasks: int) -> Measurement:
    connection, channel = await idiom_channel(url)
    async with connection:
        exchange = channel.default_exchange
        await exchange.publish(idiom_message(), routing_key=queue)

        async def publisher() -> None:
            for _ in range(count // tasks):
                await exchange.publish(idiom_message(), routing_key=queue)

        clock = Measurement()
        await asyncio.gather(*(publisher() for _ in range(tasks)))
        return clock.stop()


async def idiom_consume(url: str, queue: str, count: int) -> Measurement:
    connection, channel = await idiom_channel(url)
    seen = 0
    clock: Measurement | None = None
    done = asyncio.Event()
    async with connection:
        await channel.set_qos(prefetch_count=PREFETCH)
        declared = await channel.declare_queue(queue, durable=True)

        async def handle(message: aio_pika.abc.AbstractIncomingMessage) -> None:
            nonlocal seen, clock
            async with message.process():
                clock = clock or Measurement()
                seen += 1
            if seen == count:
                clock.stop()
                done.set()

        await declared.consume(handle)
        await done.wait()
    assert clock is not None
    return clock


async def ours_memory(url: str, queue: str, count: int) -> Measurement:
    """Publish and handle messages in one process; print its resident memory on the way."""
    worker = Worker(url)
    seen = 0
    done = asyncio.Event()

    @worker.handler(bench_queue(queue), concurrency=PREFETCH, prefetch_count=PREFETCH)
    async def handle(body: bytes) -> None:
        nonlocal seen
        seen += 1
        if seen == count:
            done.set()

    def note(text: str) -> None:
        print(json.dumps({"at": text, "resident_mb": resident_mb()}), flush=True)

    async with worker:
        note("idle")
        async with Producer(url) as producer:
            clock = Measurement()
            for tenth in range(10):
                bodies = (BODY for _ in range(count // 10))
                (await producer.publish_many(bench_queue(queue), bodies)).raise_for_errors()
                note(f"{(tenth + 1) * count // 10} published")
            await done.wait()
            note("all handled")
    return clock.stop()


def resident_mb() -> float:
    with open("/proc/self/statm", encoding="ascii") as statm:  # noqa: PTH123 - not a path of ours
        return int(statm.read().split()[1]) * resource.getpagesize() / 2**20


CONTESTANTS: Final[dict[str, Contestant]] = {
    "ours_publish_1": ours_publish_1,
    "ours_publish_100": functools.partial(ours_publish, tasks=100),
    "ours_publish_1000": functools.partial(ours_publish, tasks=1000),
    "ours_publish_many": ours_publish_many,
    "ours_consume": ours_consume,
    "ours_memory": ours_memory,
    "idiom_publish_1": idiom_publish_1,
    "idiom_publish_100": functools.partial(idiom_publish, tasks=100),
    "idiom_publish_1000": functools.partial(idiom_publish, tasks=1000),
    "idiom_consume": idiom_consume,
}


def main() -> None:
    """Run one contestant and print what it took."""
    name, url, queue, count = sys.argv[1:]
    logging.basicConfig(level=logging.ERROR)
    taken: Measurement = asyncio.run(CONTESTANTS[name](url, queue, int(count)))
    print(json.dumps({"messages": int(count), "wall": taken.wall, "cpu": taken.cpu}))


if __name__ == "__main__":
    main()
