"""The programs that are compared; each is run in a process of its own.

``python -m tests.benchmarks.contestants NAME JOB`` prints lines of JSON. The last one says how many
messages, in how many seconds, with how many seconds of CPU, from the first message to the last,
without start-up, and how much memory the process had at most. JOB is a `Job`, as JSON.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import resource
import sys
import time
from collections.abc import Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast
from unittest import mock

import aio_pika

from aioworkq import Producer, Queue, Worker
from aioworkq.amqp import features
from tests.benchmarks.clock import Collector, Count, Measurement
from tests.benchmarks.job import (
    PREFETCH,
    TASKS,
    Job,
    Latencies,
    Order,
    encode,
    publish_stamped,
    say,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from aio_pika.abc import AbstractChannel, AbstractIncomingMessage

    from aioworkq.topology import QueueType

Contestant = Callable[[Job], Coroutine[None, None, Measurement]]
T = TypeVar("T")


def typed_queue(job: Job, body_type: type[T]) -> Queue[T]:
    return Queue(job.queue, body_type, type=cast("QueueType", job.queue_type))


def bytes_queue(name: str) -> Queue[bytes]:
    return Queue(name, bytes, type="classic")


async def on_documented_calls(contestant: Contestant, job: Job) -> Measurement:
    """Run one as on an aiormq that lacks a name which the fast paths use."""
    names = (*features.CHANNEL_NAMES, "no_such_name")
    with mock.patch.object(features, "CHANNEL_NAMES", names):
        return await contestant(job)


async def in_tasks(
    publish: Callable[[], Coroutine[Any, Any, Any]], count: int, tasks: int
) -> Measurement:
    await publish()

    async def publisher() -> None:
        for _ in range(count // tasks):
            await publish()

    clock = Measurement()
    await asyncio.gather(*(publisher() for _ in range(tasks)))
    return clock.stop()


# Publishing bytes, as the C client does, or what is encoded for each message


async def ours_publish(job: Job, *, tasks: int) -> Measurement:
    async with Producer(job.url) as producer:
        target = typed_queue(job, bytes)
        body = job.body
        return await in_tasks(lambda: producer.publish(target, body), job.count, tasks)


async def ours_publish_orders(job: Job) -> Measurement:
    async with Producer(job.url) as producer:
        target = typed_queue(job, Order)
        order = job.order
        return await in_tasks(lambda: producer.publish(target, order), job.count, TASKS)


async def ours_publish_many(job: Job) -> Measurement:
    async with Producer(job.url) as producer:
        target = typed_queue(job, bytes)
        body = job.body
        await producer.publish(target, body)
        clock = Measurement()
        report = await producer.publish_many(target, (body for _ in range(job.count)))
        report.raise_for_errors()
        return clock.stop()


def idiom_message(body: bytes) -> aio_pika.Message:
    return aio_pika.Message(body, delivery_mode=aio_pika.DeliveryMode.PERSISTENT)


@asynccontextmanager
async def idiom_channel(job: Job) -> AsyncGenerator[AbstractChannel]:
    connection = await aio_pika.connect_robust(job.url)
    async with connection:
        channel = await connection.channel()
        await channel.set_qos(prefetch_count=PREFETCH)
        yield channel


async def idiom_publish(job: Job, *, tasks: int) -> Measurement:
    async with idiom_channel(job) as channel:
        exchange = channel.default_exchange
        body = job.body
        return await in_tasks(
            lambda: exchange.publish(idiom_message(body), routing_key=job.queue), job.count, tasks
        )


async def idiom_publish_orders(job: Job) -> Measurement:
    async with idiom_channel(job) as channel:
        exchange = channel.default_exchange
        fields = job.fields
        return await in_tasks(
            lambda: exchange.publish(idiom_message(encode(fields)), routing_key=job.queue),
            job.count,
            TASKS,
        )


# Consuming


async def ours_consume(job: Job, *, body_type: type[Any]) -> Measurement:
    worker = Worker(job.url)
    done = asyncio.Event()
    count = Count(job.count, done.set)

    @worker.handler(typed_queue(job, body_type), concurrency=PREFETCH, prefetch_count=PREFETCH)
    async def handle(body: Any) -> None:
        count.add()

    async with worker:
        await done.wait()
    return count.clock


async def ours_consume_batches(job: Job, *, prefetch_count: int | None) -> Measurement:
    worker = Worker(job.url)
    done = asyncio.Event()
    count = Count(job.count, done.set)

    @worker.batch_handler(typed_queue(job, Order), max_size=100, prefetch_count=prefetch_count)
    async def handle(orders: list[Order]) -> None:
        count.add(len(orders))

    async with worker:
        await done.wait()
    return count.clock


async def idiom_consume(job: Job) -> Measurement:
    """Decode to a dictionary, which is less than we do."""
    done = asyncio.Event()
    count = Count(job.count, done.set)

    async def handle(message: AbstractIncomingMessage) -> None:
        async with message.process():
            json.loads(message.body)
            count.add()

    return await idiom_consume_with(handle, job, done, count)


async def idiom_consume_bytes(job: Job) -> Measurement:
    done = asyncio.Event()
    count = Count(job.count, done.set)

    async def handle(message: AbstractIncomingMessage) -> None:
        async with message.process():
            count.add()

    return await idiom_consume_with(handle, job, done, count)


async def idiom_consume_with(
    handle: Callable[[AbstractIncomingMessage], Coroutine[None, None, None]],
    job: Job,
    done: asyncio.Event,
    count: Count,
) -> Measurement:
    async with idiom_channel(job) as channel:
        await (await channel.get_queue(job.queue)).consume(handle)
        await done.wait()
    return count.clock


# Many queues: started first, then published to


async def ours_handlers(job: Job) -> Measurement:
    worker = Worker(job.url)
    done = asyncio.Event()
    count = Count(job.count, done.set)

    async def handle(body: bytes) -> None:
        count.add()

    for name in job.queues:
        worker.handler(bytes_queue(name))(handle)

    start, collector = Measurement(), Collector()
    with collector.watched():
        async with worker:
            start.stop()
            say(wall=start.wall, cpu=start.cpu, resident_mb=resident_mb())
            await done.wait()
            stop, before = Measurement(), collector.cpu
        stop.stop()
    say(wall=stop.wall, cpu=stop.cpu, collector_cpu=collector.cpu - before)
    return count.clock


async def idiom_handlers(job: Job) -> Measurement:
    """Consume as aio-pika's documentation does, with a channel for each queue."""
    done = asyncio.Event()
    count = Count(job.count, done.set)

    async def handle(message: AbstractIncomingMessage) -> None:
        async with message.process():
            count.add()

    start = Measurement()
    connection = await aio_pika.connect_robust(job.url)
    async with connection:
        for name in job.queues:
            channel = await connection.channel()
            await channel.set_qos(prefetch_count=10)
            await (await channel.get_queue(name)).consume(handle)
        start.stop()
        say(wall=start.wall, cpu=start.cpu, resident_mb=resident_mb())
        await done.wait()
        stop = Measurement()
    stop.stop()
    say(wall=stop.wall, cpu=stop.cpu)
    return count.clock


# Several processes: each takes what it gets, until it is told to end


async def ours_share(job: Job) -> Measurement:
    worker = Worker(job.url)
    handled = 0
    first = last = 0.0
    clock = Measurement()

    @worker.handler(bytes_queue(job.queue), concurrency=PREFETCH, prefetch_count=PREFETCH)
    async def handle(body: bytes) -> None:
        nonlocal handled, first, last, clock
        last = time.monotonic()
        if not handled:
            first, clock = last, Measurement()
        handled += 1

    say(ready=True)
    await asyncio.to_thread(sys.stdin.readline)
    async with worker:
        await asyncio.to_thread(sys.stdin.readline)
        clock.stop()
    say(handled=handled, first=first, last=last)
    return clock


# Latency


async def ours_timed_publish(job: Job) -> Measurement:
    async with Producer(job.url) as producer:
        target = typed_queue(job, Order)
        clock = Measurement()
        await publish_stamped(job, lambda fields: producer.publish(target, Order(**fields)))
        return clock.stop()


async def ours_timed_consume(job: Job) -> Measurement:
    worker = Worker(job.url)
    latencies = Latencies(job.count)

    @worker.handler(typed_queue(job, Order), concurrency=PREFETCH, prefetch_count=PREFETCH)
    async def handle(order: Order) -> None:
        latencies.take(order.stamp)

    async with worker:
        say(ready=True)
        clock = Measurement()
        await latencies.done.wait()
        clock.stop()
    say(**latencies.summary())
    return clock


async def idiom_timed_publish(job: Job) -> Measurement:
    async with idiom_channel(job) as channel:
        exchange = channel.default_exchange

        async def publish(fields: dict[str, Any]) -> None:
            await exchange.publish(idiom_message(encode(fields)), routing_key=job.queue)

        clock = Measurement()
        await publish_stamped(job, publish)
        return clock.stop()


async def idiom_timed_consume(job: Job) -> Measurement:
    latencies = Latencies(job.count)

    async def handle(message: AbstractIncomingMessage) -> None:
        now = time.monotonic_ns()
        async with message.process():
            latencies.take(json.loads(message.body)["stamp"], now)

    async with idiom_channel(job) as channel:
        await (await channel.get_queue(job.queue)).consume(handle)
        say(ready=True)
        clock = Measurement()
        await latencies.done.wait()
        clock.stop()
    say(**latencies.summary())
    return clock


# Memory


async def ours_memory(job: Job) -> Measurement:
    """Publish and handle messages in one process; print its resident memory on the way."""
    worker = Worker(job.url)
    done = asyncio.Event()
    count = Count(job.count, done.set)

    @worker.handler(bytes_queue(job.queue), concurrency=PREFETCH, prefetch_count=PREFETCH)
    async def handle(body: bytes) -> None:
        count.add()

    def note(text: str) -> None:
        say(at=text, resident_mb=resident_mb())

    body = job.body
    async with worker:
        note("idle")
        async with Producer(job.url) as producer:
            for tenth in range(10):
                bodies = (body for _ in range(job.count // 10))
                report = await producer.publish_many(bytes_queue(job.queue), bodies)
                report.raise_for_errors()
                note(f"{(tenth + 1) * job.count // 10:,} published")
            await done.wait()
            note("all handled")
    return count.clock


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def peak_mb() -> float:
    """Return the most memory that was resident; getrusage would count the parent's, too."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


CONTESTANTS: Final[dict[str, Contestant]] = {
    "ours_publish_1": functools.partial(ours_publish, tasks=1),
    "ours_publish_100": functools.partial(ours_publish, tasks=100),
    "ours_publish_1000": functools.partial(ours_publish, tasks=1000),
    "ours_publish_100_documented": functools.partial(
        on_documented_calls, functools.partial(ours_publish, tasks=100)
    ),
    "ours_publish_many": ours_publish_many,
    "ours_publish_orders": ours_publish_orders,
    "ours_consume": functools.partial(ours_consume, body_type=Order),
    "ours_consume_bytes": functools.partial(ours_consume, body_type=bytes),
    "ours_consume_documented": functools.partial(
        on_documented_calls, functools.partial(ours_consume, body_type=Order)
    ),
    "ours_consume_batches": functools.partial(ours_consume_batches, prefetch_count=PREFETCH),
    "ours_consume_batches_200": functools.partial(ours_consume_batches, prefetch_count=None),
    "ours_handlers": ours_handlers,
    "ours_share": ours_share,
    "ours_timed_publish": ours_timed_publish,
    "ours_timed_consume": ours_timed_consume,
    "ours_memory": ours_memory,
    "idiom_publish_1": functools.partial(idiom_publish, tasks=1),
    "idiom_publish_100": functools.partial(idiom_publish, tasks=100),
    "idiom_publish_1000": functools.partial(idiom_publish, tasks=1000),
    "idiom_publish_orders": idiom_publish_orders,
    "idiom_consume": idiom_consume,
    "idiom_consume_bytes": idiom_consume_bytes,
    "idiom_handlers": idiom_handlers,
    "idiom_timed_publish": idiom_timed_publish,
    "idiom_timed_consume": idiom_timed_consume,
}


def main() -> None:
    """Run one contestant and print what it took."""
    name, job = sys.argv[1], Job.from_json(sys.argv[2])
    logging.basicConfig(level=logging.ERROR)
    taken: Measurement = asyncio.run(CONTESTANTS[name](job))
    say(messages=job.count, wall=taken.wall, cpu=taken.cpu, peak_mb=peak_mb())


if __name__ == "__main__":
    main()
