"""Publishing on a broker in memory, where each fault happens at the moment that is asked for."""

from __future__ import annotations

import asyncio
import math
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from aioworkq import (
    ConnectionLostError,
    MemoryBroker,
    NotConfirmedError,
    OutcomeUnknownError,
    Producer,
    Queue,
    StateError,
    UnroutableError,
)
from tests.consuming import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine
    from typing import Any, TypeAlias

    Publish: TypeAlias = Callable[[Producer, Queue[int]], Coroutine[Any, Any, None]]

QUEUE = Queue("q", int)
BARE = Queue("q", int, declare=False)


@pytest.fixture
def broker() -> MemoryBroker:
    return MemoryBroker(clock="virtual")


@pytest.fixture
async def producer(broker: MemoryBroker) -> AsyncIterator[Producer]:
    """A producer whose queue exists."""
    async with Producer(broker) as producer:
        await producer.publish(QUEUE, 0)
        yield producer


async def one(producer: Producer, queue: Queue[int]) -> None:
    await producer.publish(queue, 1)


async def many(producer: Producer, queue: Queue[int]) -> None:
    (await producer.publish_many(queue, [1])).raise_for_errors()


each_way = pytest.mark.parametrize("publish", [one, many])


@each_way
@pytest.mark.parametrize("queue", [QUEUE, BARE])
async def test_what_may_be_stored_is_never_said_to_be_not(
    broker: MemoryBroker, producer: Producer, publish: Publish, queue: Queue[int]
) -> None:
    """It was stored, and nobody said so. Then its queue is gone, and must not be declared again."""
    broker.fail_next("lose confirm", queue=QUEUE)
    task = asyncio.create_task(publish(producer, queue))
    while broker.counts(QUEUE) == (1, 0):
        await asyncio.sleep(0)
    broker.delete_queue(QUEUE)  # before anybody is connected again
    broker.fail_next("refuse declaration", queue=QUEUE)
    await broker.advance(10)
    with pytest.raises(OutcomeUnknownError, match="an earlier sending was never answered"):
        await task


@each_way
async def test_a_refusal_is_the_truth_where_nothing_was_sent_before(
    broker: MemoryBroker, producer: Producer, publish: Publish
) -> None:
    """Its queue was gone, was declared again, and refuses it."""
    broker.delete_queue(QUEUE)
    broker.fail_next("refuse publish", queue=QUEUE)
    with pytest.raises(NotConfirmedError):
        await publish(producer, QUEUE)


@each_way
async def test_closing_waits_for_what_is_published_once_more(
    broker: MemoryBroker, producer: Producer, publish: Publish
) -> None:
    """It was returned because its queue is gone, and the producer is closed at this moment."""
    broker.delete_queue(QUEUE)
    task = asyncio.create_task(publish(producer, QUEUE))
    while not producer.statistics().pending:
        await asyncio.sleep(0)
    await producer.close()
    await task
    assert broker.counts(QUEUE) == (1, 0)


async def test_what_was_returned_does_not_wait_for_the_next_body(
    broker: MemoryBroker, producer: Producer
) -> None:
    """An iterable may be slow."""
    broker.delete_queue(QUEUE)

    async def bodies() -> AsyncIterator[int]:
        yield 1
        await eventually(lambda: broker.counts(QUEUE) == (1, 0))
        yield 2

    report = await producer.publish_many(QUEUE, bodies())
    assert (report.confirmed, report.failed) == (2, 0)
    assert broker.published(QUEUE) == [0, 1, 2]


async def test_what_declares_again_may_be_cancelled(
    broker: MemoryBroker, producer: Producer
) -> None:
    """By whoever cancels tasks that are not his: the call ends all the same, and tells."""
    broker.delete_queue(QUEUE)
    call = asyncio.create_task(producer.publish_many(QUEUE, [1, 2]))
    while not (found := [one for one in asyncio.all_tasks() if "declares" in one.get_name()]):
        await asyncio.sleep(0)
    found[0].cancel()
    report = await call
    assert [type(error) for error in report.errors.values()] == [UnroutableError] * 2


async def test_failures_are_logged_when_the_iterable_raises(
    broker: MemoryBroker, producer: Producer, caplog: pytest.LogCaptureFixture
) -> None:
    """Then there is no report to look at."""
    broker.fail_next("refuse publish", queue=QUEUE)

    async def bodies() -> AsyncIterator[int]:
        yield 1
        await eventually(lambda: producer.statistics().not_confirmed == 1)
        raise LookupError

    with pytest.raises(LookupError):
        await producer.publish_many(QUEUE, bodies())
    assert "1 of 1 messages to queue 'q' failed, the first (number 0)" in caplog.text


async def test_what_is_returned_after_its_time_goes_straight_to_its_queue(
    broker: MemoryBroker, producer: Producer
) -> None:
    """The delay queues are gone, and there is nothing left to wait for."""
    await producer.publish(QUEUE, 1, delay=1)
    await broker.advance(2)
    at = broker.now() + timedelta(seconds=1)
    task = asyncio.create_task(producer.publish_many(QUEUE, [2], at=at))
    while not producer.statistics().in_flight:
        await asyncio.sleep(0)
    with broker.outage():
        broker.drop_connections()
        await broker.advance(5)
        for name in set(broker.node.queues) - {QUEUE.name}:
            broker.delete_queue(name)
    await broker.advance(10)
    (await task).raise_for_errors()
    assert broker.counts(QUEUE)[0] == 3


async def test_the_loop_is_known_before_anything_is_published() -> None:
    """A call from another one is refused, and does not make that one the producer's."""
    async with Producer(MemoryBroker()) as producer:

        def elsewhere() -> None:
            with pytest.raises(StateError, match="another event loop"):
                asyncio.run(producer.publish("q", "y"))

        await asyncio.to_thread(elsewhere)
        await producer.publish("q", "x")


async def test_nobody_waits_longer_for_delayed_messages_than_for_others(
    broker: MemoryBroker, producer: Producer
) -> None:
    """In an outage a window full of messages has its time limit together, not one by one."""
    with broker.outage():
        broker.drop_connections()
        task = asyncio.create_task(producer.publish_many(QUEUE, range(500), delay=1, timeout=0.2))
        await eventually(task.done)
        report = await task
        assert report.failed == 500
        assert {type(error) for error in report.errors.values()} == {ConnectionLostError}
        assert len({id(error) for error in report.errors.values()}) == 500


async def test_a_window_is_not_taken_for_stuck_because_an_earlier_one_was(
    broker: MemoryBroker, producer: Producer
) -> None:
    """Nobody looked any more when the channel of that one was lost."""
    outbox = producer._outbox
    assert outbox is not None
    outbox._stuck_since = 0.0
    broker.drop_connections()
    await broker.advance(10)
    await producer.publish(QUEUE, 1)
    assert outbox._stuck_since == math.inf
