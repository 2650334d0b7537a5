"""Virtual time: what passes with it, in which order, and what does not."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
import uvloop

from aioworkq import (
    AccessRefusedError,
    ConsumerState,
    DeadLetters,
    Delivery,
    MemoryBroker,
    OutcomeUnknownError,
    Producer,
    Queue,
    RetryPolicy,
    StateError,
    Worker,
)
from aioworkq.memory.clock import Clock

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
def broker() -> MemoryBroker:
    return MemoryBroker(clock="virtual")


async def test_an_hour_of_backoff_passes_in_no_time(broker: MemoryBroker) -> None:
    """Attempts come at their times by the broker's clock, one after the other."""
    queue, worker, starts = Queue("q", int), Worker(broker), list[tuple[int, float]]()
    began = broker.now()

    @worker.handler(queue, retry=RetryPolicy(attempts=4, first=600, jitter=0))
    async def handle(_: int, delivery: Delivery) -> None:
        starts.append((delivery.attempt, (broker.now() - began).total_seconds()))
        raise LookupError

    async with Producer(broker) as producer, worker:
        await producer.publish(queue, 1)
        await broker.advance(599)
        assert len(starts) == 1
        await broker.advance(3600)
        assert [attempt for attempt, _ in starts] == [1, 2, 3]
        await broker.advance(600)
    times = [0, 600, 1800, 4200]
    assert [attempt for attempt, _ in starts] == [1, 2, 3, 4]
    for (_, at), expected in zip(starts, times, strict=True):
        assert expected <= at <= expected * 17 / 16
    assert broker.dead(queue) == [1]


@pytest.mark.parametrize("slow_down", [True, False])
async def test_an_outage_of_an_hour(
    broker: MemoryBroker,
    slow_down: bool,  # noqa: FBT001 - what differs
) -> None:
    """Slowed, a handler that fails for an hour gives up none of 200 messages; otherwise all."""
    queue, worker, handled, is_up = Queue("q", int), Worker(broker), set[int](), False

    @worker.handler(queue, concurrency=10, retry=RetryPolicy(), slow_down=slow_down)
    async def call_a_service(number: int) -> None:
        if not is_up:
            raise ConnectionError("the service is down")
        handled.add(number)

    async with Producer(broker) as producer, worker:
        (await producer.publish_many(queue, range(200))).raise_for_errors()
        await broker.advance(3600)
        assert worker.statistics().consumers["q"].is_slowed is slow_down
        assert not handled
        is_up = True
        await broker.advance(600)
        assert not worker.statistics().consumers["q"].is_slowed
    dead = broker.dead(queue)
    assert (len(dead) < 10) if slow_down else (len(dead) == 200)
    assert sorted([*handled, *dead]) == list(range(200))


async def test_pauses_of_a_worker_pass(broker: MemoryBroker) -> None:
    """A message that is requeued is kept for its pause of virtual time."""
    queue, worker, attempts = Queue("q", int), Worker(broker), list[int]()

    @worker.handler(queue, attempts=5)
    async def handle(_: int, delivery: Delivery) -> None:
        attempts.append(delivery.attempt)
        raise LookupError

    async with Producer(broker) as producer, worker:
        await producer.publish(queue, 1)
        for passes, count in ((0.0, 1), (0.1, 2), (0.19, 2), (0.01, 3), (1.2, 5)):
            await broker.advance(passes)
            assert len(attempts) == count
        await broker.advance(0)
    assert broker.dead(queue) == [1]


async def test_delays_end_in_their_order(broker: MemoryBroker) -> None:
    """Messages arrive by their delays, and not before them."""
    queue, worker, arrivals = Queue("q", float), Worker(broker), list[tuple[float, datetime]]()

    @worker.handler(queue)
    async def handle(delay: float) -> None:
        arrivals.append((delay, broker.now()))

    began = broker.now()
    async with Producer(broker) as producer, worker:
        for delay in (86_400.0, 1.0, 3600.0):
            await producer.publish(queue, delay, delay=delay)
        await producer.publish(queue, 60.0, at=broker.now() + timedelta(minutes=1))
        await broker.advance(100_000)
    assert [delay for delay, _ in arrivals] == [1.0, 60.0, 3600.0, 86_400.0]
    for delay, at in arrivals:
        assert delay <= (at - began).total_seconds() <= delay * 17 / 16 + 0.125


async def test_time_stamps_are_the_brokers(broker: MemoryBroker) -> None:
    """Messages and failures are stamped with virtual time."""
    queue, worker = Queue("q", int), Worker(broker)

    @worker.handler(queue, on_error="dead-letter")
    async def handle(_: int) -> None:
        raise LookupError

    async with Producer(broker) as producer:
        await producer.publish(queue, 1)
        published = broker.now()
        await broker.advance(3600)
        async with worker, DeadLetters(broker, queue) as dead:
            await broker.advance(0)
            (letter,) = await dead.peek()
    assert letter.message.timestamp == published.replace(microsecond=0)
    assert letter.last_failure == (published + timedelta(hours=1)).replace(microsecond=0)


async def test_a_handler_that_really_waits_holds_nobody_up(broker: MemoryBroker) -> None:
    """Time goes on past a handler that waits for something else."""
    queue, worker, event, done = Queue("q", int), Worker(broker), asyncio.Event(), list[int]()

    @worker.handler(queue)
    async def handle(number: int) -> None:
        if number == 1:
            await event.wait()
        done.append(number)

    async with Producer(broker) as producer, worker:
        await producer.publish(queue, 1)
        await producer.publish(queue, 2, delay=60)
        await broker.advance(3600)
        assert done == [2]
        event.set()
    assert done == [2, 1]


async def test_a_lost_connection_comes_back_with_time(broker: MemoryBroker) -> None:
    """The pause before a consumer comes back is virtual."""
    queue, worker = Queue("q", int), Worker(broker)

    @worker.handler(queue)
    async def handle(_: int) -> None: ...

    async with worker:
        broker.drop_connections("worker")
        await broker.settle()
        assert worker.statistics().consumers["q"].state is ConsumerState.LOST
        await broker.advance(1)
        assert worker.is_ready


async def test_timeouts_are_real(broker: MemoryBroker) -> None:
    """A call's timeout does not wait for virtual time."""
    async with Producer(broker) as producer:
        await producer.publish("q", 1)
        with broker.alarm(), pytest.raises(OutcomeUnknownError, match="blocks publishers"):
            await producer.publish("q", 2, timeout=0.01)


async def test_a_loop_that_never_rests_is_told(
    broker: MemoryBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody who spins in the event loop makes advance fail instead of hanging."""
    monkeypatch.setattr("aioworkq.memory.rest._MAX_TURNS", 100)

    async def spin() -> None:
        while True:
            await asyncio.sleep(0)

    spinning = asyncio.ensure_future(spin())
    with pytest.raises(StateError, match="does not come to rest"):
        await broker.advance(1)
    spinning.cancel()
    await asyncio.wait({spinning})


async def test_a_real_clock_cannot_be_advanced() -> None:
    """Advancing a real clock, or backwards, or to no end, is refused."""
    with pytest.raises(StateError, match=r"clock is the real one. Make it as MemoryBroker\(clock"):
        await MemoryBroker().advance(1)
    for seconds in (-1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="a number of seconds"):
            await MemoryBroker(clock="virtual").advance(seconds)


async def test_two_may_advance(broker: MemoryBroker) -> None:
    """Calls of advance at the same time follow each other."""
    began = broker.now()
    await asyncio.gather(broker.advance(1), broker.advance(2))
    assert broker.now() - began == timedelta(seconds=3)


async def retry_within_an_hour() -> None:
    broker, attempts = MemoryBroker(clock="virtual"), list[int]()
    queue, worker = Queue("q", int), Worker(broker)

    @worker.handler(queue, retry=RetryPolicy(attempts=3, first=600))
    async def handle(_: int, delivery: Delivery) -> None:
        attempts.append(delivery.attempt)
        raise LookupError

    async with Producer(broker) as producer, worker:
        await producer.publish(queue, 1)
        await broker.advance(3600)
    assert attempts == [1, 2, 3]


def test_other_event_loops_come_to_rest_too() -> None:
    """On uvloop, which hides what it has to do, time passes as well."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(retry_within_an_hour())


def test_messages_outlive_an_event_loop(broker: MemoryBroker) -> None:
    """What one event loop published, another one handles, even if the first one closed nothing."""
    queue = Queue("q", int)

    async def publish() -> Producer:
        producer = Producer(broker)
        await producer.start()
        await producer.publish(queue, 1)
        await producer.publish(queue, 2, delay=60)
        return producer

    async def handle_all() -> list[int]:
        worker, handled = Worker(broker), list[int]()

        @worker.handler(queue)
        async def handle(number: int) -> None:
            handled.append(number)

        async with worker:
            await broker.advance(120)
        return handled

    producer = asyncio.run(publish())
    assert asyncio.run(handle_all()) == [1, 2]
    assert not producer.statistics().is_connected


def test_faults_may_come_after_an_event_loop(broker: MemoryBroker) -> None:
    """Connections that an event loop left open can be dropped, and their queue be deleted."""
    queue = Queue("q", int)

    async def leave_open() -> Producer:
        producer = Producer(broker)
        await producer.start()
        await producer.publish(queue, 1)
        return producer

    first = asyncio.run(leave_open())
    broker.drop_connections()
    second = asyncio.run(leave_open())
    broker.delete_queue(queue)
    assert first is not second
    assert not broker.is_in_use
    assert broker.counts(queue) == (0, 0)


def test_two_event_loops_at_a_time_are_refused(broker: MemoryBroker) -> None:
    """A client in a second event loop is told so, while the first one's are connected."""

    async def main() -> None:
        async with Producer(broker):
            await asyncio.to_thread(asyncio.run, use())

    async def use() -> None:
        with pytest.raises(AccessRefusedError, match="clients in another event loop"):
            async with Producer(broker):
                pass
        worker = Worker(broker)
        worker.handler(Queue("q", int))(print)
        with pytest.raises(AccessRefusedError, match="clients in another event loop"):
            await worker.run()
        with pytest.raises(StateError, match="another event loop"):
            await broker.advance(1)

    asyncio.run(main())


async def test_a_delivery_is_no_earlier_than_its_delay_on_a_real_clock() -> None:
    """With a real clock nothing has to be advanced."""
    broker, arrived = MemoryBroker(), asyncio.Event()
    queue, worker = Queue("q", int), Worker(broker)

    @worker.handler(queue)
    async def handle(_: int) -> None:
        arrived.set()

    async with Producer(broker) as producer, worker:
        began = broker.now()
        await producer.publish(queue, 1, delay=0.3)
        await arrived.wait()
        assert broker.now() - began >= timedelta(seconds=0.3)


def test_timers_fire_in_order() -> None:
    """Timers of one moment fire in the order they were made; cancelled ones never."""
    clock, fired = Clock(is_virtual=True), list[Any]()
    start = clock.time()
    for when, name in ((2, "b"), (1, "a"), (2, "c"), (3, "d")):
        clock.call_at(start + when, lambda name=name: fired.append(name))  # type: ignore[misc]
    cancelled = clock.call_at(start + 1.5, lambda: fired.append("never"))
    cancelled.cancel()
    assert clock.step(start + 2.5)
    assert fired == ["a"]
    assert clock.step(start + 2.5)
    assert fired == ["a", "b", "c"]
    assert not clock.step(start + 2.5)
    assert clock.time() == pytest.approx(start + 2.5)


async def test_a_delayed_message_waits_for_room_in_a_full_queue(broker: MemoryBroker) -> None:
    """It is tried again every three minutes, and no other waits for it."""
    full, other = Queue("full", int, type="classic", max_length=2), Queue("other", int)
    async with Producer(broker) as producer:
        report = await producer.publish_many(full, [1, 2])
        assert report.confirmed == 2
        await producer.publish(full, 3, delay=1)
        await producer.publish(other, 4, delay=1)
        await broker.advance(2)
        assert broker.counts("full").ready == 2
        assert broker.counts("other").ready == 1
    worker, handled = Worker(broker), list[int]()

    @worker.handler(full)
    async def handle(number: int) -> None:
        handled.append(number)

    async with worker:
        await broker.advance(1)
        assert handled == [1, 2]
        await broker.advance(180)
    assert handled == [1, 2, 3]


async def test_a_replay_keeps_its_rate_by_the_brokers_clock(broker: MemoryBroker) -> None:
    """One in ten seconds, at once for the first."""
    queue, worker = Queue("q", int), Worker(broker)

    @worker.handler(queue, attempts=1)
    async def handle(number: int) -> None:
        raise LookupError(number)

    async with Producer(broker) as producer, worker:
        await producer.publish_many(queue, [1, 2, 3])
        await broker.advance(1)
    async with DeadLetters(broker, queue) as dead:
        replay = asyncio.create_task(dead.replay(rate=0.1))
        for passes, replayed in ((0, 1), (9, 1), (1, 2), (9, 2), (1, 3)):
            await broker.advance(passes)
            assert broker.counts(queue).ready == replayed
        assert await replay == 3


async def test_bodies_that_come_late_arrive_at_the_same_time(broker: MemoryBroker) -> None:
    """A point in time stays where it is while an iterable takes its time."""
    queue, at = Queue("q", int), broker.now() + timedelta(seconds=60)

    async def slowly() -> AsyncIterator[int]:
        for number in range(4):
            yield number
            await broker.advance(24)  # the last one comes after that time

    async with Producer(broker) as producer:
        report = await producer.publish_many(queue, slowly(), at=at)
        assert report.confirmed == 4
        assert broker.counts(queue).ready == 4
