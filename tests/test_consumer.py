"""One consumer: its window and its slots, its attempts, its threads."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import anyio
import anyio.from_thread
import pytest

from aioworkq import Delivery, Producer, Queue, Requeue, RetryPolicy, Worker
from tests.consuming import (
    PATIENCE,
    Broker,
    channels,
    eventually,
    headers_of,
    publish_all,
    publish_with_pika,
)

if TYPE_CHECKING:
    from aioworkq.testing import RabbitMQ
    from aioworkq.topology import QueueType
    from tests.proxy import Direction, Proxy

TYPES = pytest.mark.parametrize("kind", ["quorum", "classic"])


async def test_own_channel_and_prefetch(rabbitmq: RabbitMQ, url: str, queue_name: str) -> None:
    """Each handler has its own channel, and RabbitMQ hands it `prefetch_count` messages at most."""
    vhost = queue_name
    one, two = Queue(f"{queue_name}.one"), Queue(f"{queue_name}.two")
    worker = Worker(url, grace=0)

    @worker.handler(one, prefetch_count=3, concurrency=1)
    async def handle_one(body: Any) -> None:
        await anyio.sleep_forever()

    @worker.handler(two, concurrency=5)
    async def handle_two(body: Any) -> None:
        await anyio.sleep_forever()

    async with worker, Producer(url) as producer:
        for queue in (one, two):
            await publish_all(producer, queue, range(20))
        await eventually(lambda: worker.statistics().waiting + worker.statistics().in_flight == 8)

        async def windows_are_full() -> bool:
            found = await channels(rabbitmq, vhost)
            windows = {(one["prefetch_count"], one["messages_unacknowledged"]) for one in found}
            return len(found) == 2 and windows == {(3, 3), (5, 5)}

        await eventually(windows_are_full)
        statistics = worker.statistics().consumers
        assert (statistics[one.name].in_flight, statistics[one.name].waiting) == (1, 2)
        assert (statistics[two.name].in_flight, statistics[two.name].waiting) == (5, 0)


async def test_buffers_are_sized_to_the_prefetch(url: str, queue_name: str) -> None:
    """By documented calls all deliveries of a prefetch, four frames each, are taken off the wire.

    It is bounded by 65,535 frames.
    """
    worker = Worker(url)
    sizes = {1: 64, 16: 64, 17: 68, 100: 400, 16_384: 65_535, 65_535: 65_535}
    for prefetch_count in sizes:

        @worker.handler(f"{queue_name}.{prefetch_count}", prefetch_count=prefetch_count)
        async def handle(body: Any) -> None: ...

    async with worker:
        subscriptions: list[Any] = [consumer._subscription for consumer in worker._consumers]
        found = {one._prefetch_count: one._channel.frames.maxsize for one in subscriptions}
    assert found == sizes


async def test_concurrency_is_a_bound(url: str, queue_name: str) -> None:
    """No more than `concurrency` handlers run at a time, and all slots are used."""
    queue = Queue(queue_name, int)
    worker = Worker(url)
    running = peak = 0

    @worker.handler(queue, concurrency=4, prefetch_count=50)
    async def handle(number: int) -> None:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        await anyio.sleep(0.01)
        running -= 1

    async with worker, Producer(url) as producer:
        await publish_all(producer, queue, range(300))
        await eventually(lambda: worker.statistics().handled == 300)
    assert peak == 4


async def test_as_many_threads_as_concurrency_says(url: str, queue_name: str) -> None:
    """Fifty plain functions run at once, more than AnyIO's own limit, and never one more."""
    queue = Queue(queue_name, int)
    worker = Worker(url)
    release, lock = threading.Event(), threading.Lock()
    running = peak = 0

    @worker.handler(queue, concurrency=50, prefetch_count=150)
    def handle(number: int) -> None:
        nonlocal running, peak
        with lock:
            running += 1
            peak = max(peak, running)
        release.wait(2 * PATIENCE)
        with lock:
            running -= 1

    async with worker, Producer(url) as producer:
        try:
            await publish_all(producer, queue, range(150))
            await eventually(lambda: running == 50 and worker.statistics().waiting == 100)
        finally:
            release.set()
        await eventually(lambda: worker.statistics().handled == 150)
    assert peak == 50


async def test_a_slow_message_does_not_hold_the_others(url: str, queue_name: str) -> None:
    """Acks above a gap go out: one slow handler does not use the window up."""
    queue = Queue(queue_name, int)
    worker = Worker(url)
    release = asyncio.Event()
    handled: list[int] = []

    @worker.handler(queue, concurrency=2)
    async def handle(number: int) -> None:
        if number == 0:
            await release.wait()
        handled.append(number)

    async with worker, Producer(url) as producer:
        await publish_all(producer, queue, range(100))
        await eventually(lambda: len(handled) == 99)
        release.set()
    assert sorted(handled) == list(range(100))


@TYPES
async def test_shutdown_is_no_attempt(url: str, queue_name: str, kind: QueueType) -> None:
    """A handler that a shutdown cancelled starts again as the same attempt, three times over."""
    queue: Queue[Any] = Queue(queue_name, type=kind)
    attempts: list[int] = []
    async with Producer(url) as producer:
        await producer.publish(queue, "x")
    for _ in range(3):
        worker = Worker(url)
        started = asyncio.Event()

        @worker.handler(queue)
        async def handle(body: Any, delivery: Delivery, started: asyncio.Event = started) -> None:
            attempts.append(delivery.attempt)
            started.set()
            await anyio.sleep_forever()

        async with worker:
            await started.wait()
            worker.stop(grace=0)
    assert attempts == [1, 1, 1]


async def test_a_stop_charges_what_failed_once(broker: Broker, url: str, queue_name: str) -> None:
    """Forty are kept for a pause, which is more than a quorum queue takes back in one command."""
    worker, queue = Worker(url), Queue(queue_name, int)

    @worker.handler(queue, concurrency=40, slow_down=False, on_error=lambda *_: Requeue(pause=3600))
    async def handle(_: int) -> None:
        raise LookupError

    async with worker, Producer(url) as producer:
        await publish_all(producer, queue, range(40))
        await eventually(lambda: worker.statistics().failed == 40)
        await publish_all(producer, queue, range(10))  # no room for them: they stay where they are

    async def are_all_back() -> bool:
        return await broker.ready(queue_name) == 50

    await eventually(are_all_back)  # RabbitMQ 4.3 may still execute the last returns
    left = await broker.take_all(queue_name)
    counts = Counter(headers_of(one).get("x-delivery-count", 0) for one in left)
    assert counts == {0: 10, 1: 40}


@TYPES
async def test_unstarted_messages_go_back_uncharged(
    broker: Broker, url: str, queue_name: str, kind: QueueType
) -> None:
    """With a prefetch of 50 and one slot, a stop loses nothing and charges nobody an attempt."""
    queue = Queue(queue_name, int, type=kind)
    async with Producer(url) as producer:
        await publish_all(producer, queue, range(60))
    worker = Worker(url)
    started = asyncio.Event()

    @worker.handler(queue, prefetch_count=50, concurrency=1)
    async def handle(number: int) -> None:
        started.set()
        await anyio.sleep_forever()

    async with worker:
        await started.wait()
        await eventually(lambda: worker.statistics().waiting == 49)
        worker.stop(grace=0)

    async def are_all_back() -> bool:
        return await broker.ready(queue_name) == 60

    await eventually(are_all_back)  # RabbitMQ 4.3 may still execute the last returns
    assert worker.statistics().requeued == 50

    second = Worker(url)
    seen: list[tuple[int, int]] = []

    @second.handler(queue)
    async def see(number: int, delivery: Delivery) -> None:
        seen.append((number, delivery.attempt))

    async with second:
        await eventually(lambda: len(seen) == 60)
    assert sorted(seen) == [(number, 1) for number in range(60)]


async def test_losing_the_connection_unstarted_is_no_attempt(
    proxy: Proxy, proxy_url: str, url: str, queue_name: str
) -> None:
    """What waited here when the connection was lost comes back as attempt 1, then fails exactly."""
    queue = Queue(queue_name, int)
    worker = Worker(proxy_url, grace=0)
    release = asyncio.Event()
    attempts: dict[int, list[int]] = {}

    @worker.handler(queue, prefetch_count=10, concurrency=1, attempts=3, retry=None)
    async def handle(number: int, delivery: Delivery) -> None:
        await release.wait()
        attempts.setdefault(number, []).append(delivery.attempt)
        if number == 5:
            raise ValueError("no")

    async with worker, Producer(url) as producer:
        await publish_all(producer, queue, range(10))
        for losses in (1, 2, 3):
            # After a loss the redelivery of what runs on is held, and waits too.
            await eventually(lambda n: worker.statistics().waiting == n, 9 if losses == 1 else 10)
            proxy.cut()
            await eventually(
                lambda n: worker.statistics().consumers[queue_name].losses == n,
                losses,
            )
            await worker.wait_ready()
        await eventually(lambda: worker.statistics().waiting >= 9)
        release.set()
        await eventually(lambda: worker.statistics().dead_lettered == 1)
        await eventually(lambda: worker.statistics().in_flight == 0)
    # The first one ran while its channel was lost, so its redelivery was acked.
    assert attempts == {n: [1, 2, 3] if n == 5 else [1] for n in range(10)}


@pytest.mark.parametrize("mode", ["stop", "cancel"])
async def test_no_delivery_after_the_end(
    broker: Broker, url: str, queue_name: str, mode: str
) -> None:
    """While unstarted messages go back, none of the backlog takes their place and is charged."""
    queue = Queue(queue_name, int, type="classic")
    async with Producer(url) as producer:
        await publish_all(producer, queue, range(500))
    worker = Worker(url, grace=0)
    starts = 0

    @worker.handler(queue, prefetch_count=20, concurrency=1)
    async def handle(number: int) -> None:
        nonlocal starts
        starts += 1
        await anyio.sleep_forever()

    async with anyio.create_task_group() as tasks:
        await tasks.start(worker.run)
        await eventually(lambda: worker.statistics().waiting == 19)
        if mode == "stop":
            worker.stop()
        else:
            tasks.cancel_scope.cancel()
    assert starts == 1
    left = await broker.take_all(queue_name)
    assert len(left) == 500
    assert [m for m in left if m.delivery.redelivered] == []  # type: ignore[union-attr]


@TYPES
async def test_lost_while_starting_is_not_started(
    proxy: Proxy, proxy_url: str, url: str, queue_name: str, kind: QueueType
) -> None:
    """Many losses in a row, at random moments: every message runs, and none is given up."""
    queue = Queue(queue_name, int, type=kind)
    worker = Worker(proxy_url)
    handled: set[int] = set()

    @worker.handler(queue, concurrency=3, prefetch_count=30, attempts=3)
    async def handle(number: int) -> None:
        handled.add(number)

    async with worker, Producer(url) as producer:
        for start in range(0, 500, 50):
            await publish_all(producer, queue, range(start, start + 50))
            proxy.cut()
        await eventually(lambda: len(handled) == 500)
    assert worker.statistics().dead_lettered == 0


# Threads


async def test_thread_handlers(url: str, queue_name: str) -> None:
    """A plain function runs in a thread, gets the delivery, and may call into the event loop."""
    queue = Queue(queue_name, str)
    worker = Worker(url)
    here = threading.get_ident()
    seen: list[tuple[str, int, bool, float]] = []

    async def ask_the_loop() -> float:
        await asyncio.sleep(0)
        return asyncio.get_running_loop().time()

    @worker.handler(queue)
    def handle(body: str, delivery: Delivery) -> None:
        answer = anyio.from_thread.run(ask_the_loop)
        seen.append((body, delivery.attempt, threading.get_ident() != here, answer))

    async with worker, Producer(url) as producer:
        await producer.publish(queue, "x")
        await eventually(lambda: worker.statistics().handled == 1)
    ((body, attempt, is_elsewhere, answer),) = seen
    assert (body, attempt, is_elsewhere) == ("x", 1, True)
    assert answer > 0


@TYPES
async def test_coroutine_that_exceeds_its_time(url: str, queue_name: str, kind: QueueType) -> None:
    """A coroutine past its timeout is cancelled, which is a failure, and its slot is free again."""
    queue = Queue(queue_name, str, type=kind)
    worker = Worker(url)
    log: list[str] = []

    @worker.handler(queue, concurrency=1, timeout=0.2)
    async def handle(body: str, delivery: Delivery) -> None:
        if delivery.attempt == 1:
            try:
                await anyio.sleep_forever()
            finally:
                log.append("cancelled")
        log.append(f"attempt {delivery.attempt}")

    async with worker, Producer(url) as producer:
        await producer.publish(queue, "x")
        await eventually(lambda: worker.statistics().handled == 1)
    assert log == ["cancelled", "attempt 2"]
    assert worker.statistics().failed == 1


@TYPES
async def test_thread_that_exceeds_its_time(url: str, queue_name: str, kind: QueueType) -> None:
    """A thread past its timeout keeps its slot, and its message is not run again beside it."""
    queue = Queue(queue_name, str, type=kind)
    worker = Worker(url)
    release = threading.Event()
    log: list[str] = []

    @worker.handler(queue, concurrency=2, timeout=2)
    def handle(body: str, delivery: Delivery) -> None:
        log.append(f"{body} {delivery.attempt}")
        if body == "slow" and delivery.attempt == 1:
            release.wait(60)
            log.append("slow ends")

    async with worker, Producer(url) as producer:
        await producer.publish(queue, "slow")
        await eventually(lambda: worker.statistics().waiting == 1)  # its redelivery waits
        assert worker.statistics().failed == 1
        assert worker.statistics().in_flight == 1
        # The other slot works on.
        await producer.publish(queue, "quick")
        await eventually(lambda: worker.statistics().handled == 1)
        assert log == ["slow 1", "quick 1"]
        release.set()
        await eventually(lambda: worker.statistics().handled == 2)
    assert log == ["slow 1", "quick 1", "slow ends", "slow 2"]


async def test_copy_waits_for_the_thread(url: str, queue_name: str) -> None:
    """A retry's copy of what still runs in a thread waits too, though it is no redelivery."""
    queue = Queue(queue_name, str)
    worker = Worker(url)
    release = threading.Event()
    log: list[str] = []

    @worker.handler(
        queue,
        concurrency=2,
        timeout=2,
        retry=RetryPolicy(attempts=3, first=0.125, jitter=0),
    )
    def handle(body: str, delivery: Delivery) -> None:
        log.append(f"starts {delivery.attempt}")
        if delivery.attempt == 1:
            release.wait(60)
            log.append("ends")

    async with worker, Producer(url) as producer:
        await producer.publish(queue, "slow")
        await eventually(lambda: worker.statistics().waiting == 1)
        release.set()
        await eventually(lambda: worker.statistics().handled == 1)
    assert log == ["starts 1", "ends", "starts 2"]


async def test_thread_that_never_began(broker: Broker, url: str, queue_name: str) -> None:
    """A time limit that is over before the thread begins frees the slot again."""
    queue = Queue(queue_name, str)
    worker = Worker(url)

    @worker.handler(queue, concurrency=1, timeout=1e-9, attempts=3)
    def handle(body: str) -> None:
        time.sleep(0)

    async with worker, Producer(url) as producer:
        await publish_all(producer, queue, ["a", "b"])
        await eventually(lambda: worker.statistics().dead_lettered == 2)
        await eventually(lambda: worker.statistics().in_flight == 0)


async def test_stop_while_a_thread_runs(broker: Broker, url: str, queue_name: str) -> None:
    """A stop does not wait for a thread beyond the grace period; its message is given back."""
    queue = Queue(queue_name, str)
    worker = Worker(url)
    release = threading.Event()
    started = threading.Event()

    @worker.handler(queue)
    def handle(body: str) -> None:
        started.set()
        release.wait(60)

    try:
        async with worker, Producer(url) as producer:
            await producer.publish(queue, "x")
            await eventually(started.is_set)
            worker.stop(grace=0.1)
        left = await broker.take_all(queue_name)
        assert [message.body for message in left] == [b"x"]
        assert "x-aioworkq-attempts" not in headers_of(left[0])
    finally:
        release.set()


async def test_plain_function_that_returns_an_awaitable(
    broker: Broker, url: str, queue_name: str
) -> None:
    """A lambda around a coroutine function is told so, and does not ack what never ran."""
    queue: Queue[Any] = Queue(queue_name)
    worker = Worker(url)

    async def work(body: Any) -> None:
        raise AssertionError

    worker.handler(queue, attempts=1)(lambda body: work(body))  # noqa: PLW0108 - no coroutine function
    async with worker, Producer(url) as producer:
        await producer.publish(queue, "x")
        dead = await broker.take(queue.dead_letter_queue)
    assert "never awaited" in headers_of(dead)["x-aioworkq-exception-message"]


# Attempts on classic queues


async def test_classic_counts_every_redelivery(
    rabbitmq: RabbitMQ,
    broker: Broker,
    proxy: Proxy,
    proxy_url: str,
    queue_name: str,
) -> None:
    """A classic queue cannot count: each lost start is written into a copy before the next one."""
    queue = Queue(queue_name, str, type="classic")
    await broker.declare(queue_name)
    await publish_with_pika(proxy_url, queue_name, b'"x"', content_type="application/json")
    attempts: list[int] = []

    async def is_settled_but_one() -> bool:
        found = await channels(rabbitmq, queue_name)
        # The last attempt is a trial, during which nothing is consumed.
        return [one["messages_unacknowledged"] for one in found] in ([1], [])

    for _ in range(3):
        worker = Worker(proxy_url)
        started = asyncio.Event()

        @worker.handler(queue, attempts=3)
        async def handle(body: str, delivery: Delivery, started: asyncio.Event = started) -> None:
            attempts.append(delivery.attempt)
            started.set()
            await anyio.sleep_forever()

        async with anyio.create_task_group() as tasks:
            await tasks.start(worker.run)
            await started.wait()
            await eventually(is_settled_but_one)
            # What a crash does: the socket goes, and nothing was given back.
            proxy.refuse()
            proxy.cut()
            await eventually(lambda w=worker: not w.statistics().is_connected)
            tasks.cancel_scope.cancel()
        proxy.accept()
    assert attempts == [1, 2, 3]
    last = Worker(proxy_url)
    last.handler(queue, attempts=3)(handle)  # pyright: ignore[reportPossiblyUnboundVariable]
    async with last:
        dead = await broker.take(queue.dead_letter_queue)
    assert attempts == [1, 2, 3]
    assert headers_of(dead)["x-aioworkq-attempts"] == 3
    assert headers_of(dead)["x-aioworkq-reason"] == "crashed"


async def test_classic_works_when_nothing_can_be_published(
    broker: Broker, proxy: Proxy, proxy_url: str, queue_name: str
) -> None:
    """Without a publishing connection a redelivered message runs all the same, counted once."""
    queue = Queue(queue_name, str, type="classic")
    await broker.declare(queue_name)
    await broker.publish(queue_name, b'"x"', content_type="application/json")
    channel = await broker._open()
    await channel.basic_get(queue_name)
    await channel.close()  # it is redelivered from now on
    worker = Worker(proxy_url, timeout=3, grace=0)
    attempts: list[int] = []

    def on_frame(direction: Direction, kind: int, channel: int, payload: bytes) -> bool:
        return not (direction == "to_broker" and payload[:4] == b"\x00\x3c\x00\x28")

    @worker.handler(queue)
    async def handle(body: str, delivery: Delivery) -> None:
        attempts.append(delivery.attempt)

    proxy.on_frame = on_frame
    async with worker:
        await eventually(lambda: worker.statistics().handled == 1)
    assert attempts == [2]
