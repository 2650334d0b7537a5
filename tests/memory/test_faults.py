"""Faults on request: each one does what it does on a node, once, where it was asked for."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from aioworkq import (
    ConnectionLostError,
    Delivery,
    MemoryBroker,
    NotConfirmedError,
    Producer,
    Queue,
    StateError,
    TopologyError,
    Worker,
)
from tests.consuming import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

QUEUE = Queue("q", int)


@pytest.fixture
def broker() -> MemoryBroker:
    return MemoryBroker(clock="virtual")


@pytest.fixture
async def producer(broker: MemoryBroker) -> AsyncIterator[Producer]:
    async with Producer(broker) as producer:
        yield producer


@pytest.fixture
def handled() -> list[tuple[int, bool]]:
    return []


@pytest.fixture
async def worker(broker: MemoryBroker, handled: list[tuple[int, bool]]) -> AsyncIterator[Worker]:
    worker = Worker(broker)

    @worker.handler(QUEUE)
    async def handle(number: int, delivery: Delivery) -> None:
        handled.append((number, delivery.redelivered))

    async with worker:
        yield worker


async def test_a_lost_confirm_makes_a_duplicate(broker: MemoryBroker, producer: Producer) -> None:
    """The message is stored, and published again because nobody said so."""
    await producer.publish(QUEUE, 1)
    broker.fail_next("lose confirm", queue=QUEUE)
    await producer.publish(QUEUE, 2)
    await producer.publish(QUEUE, 3)
    assert broker.published(QUEUE) == [1, 2, 2, 3]
    assert producer.statistics().resent == 1
    assert producer.statistics().reconnects == 1


async def test_a_lost_ack_makes_a_duplicate_that_is_not_run(
    broker: MemoryBroker, producer: Producer, worker: Worker, handled: list[tuple[int, bool]]
) -> None:
    """A message whose ack was lost comes back; the worker remembers that it is done."""
    broker.fail_next("lose ack")
    await producer.publish(QUEUE, 1)
    await broker.advance(1)
    assert handled == [(1, False)]
    statistics = worker.statistics().consumers["q"]
    assert (statistics.duplicates, statistics.losses) == (1, 1)
    assert broker.counts(QUEUE) == (0, 0)


async def test_a_refused_publication_is_told(broker: MemoryBroker, producer: Producer) -> None:
    """A negative confirm is a NotConfirmedError, as often as it was asked for."""
    broker.fail_next("refuse publish", queue="q", times=2)
    await producer.publish("another", 1)
    for _ in range(2):
        with pytest.raises(NotConfirmedError):
            await producer.publish(QUEUE, 1)
    await producer.publish(QUEUE, 1)


async def test_a_refused_dead_letter_leaves_the_original(
    broker: MemoryBroker, producer: Producer, caplog: pytest.LogCaptureFixture
) -> None:
    """A dead letter that is refused goes back to its queue, and dies the next time."""
    worker, attempts = Worker(broker), list[int]()

    @worker.handler(QUEUE, on_error="dead-letter")
    async def handle(_: int, delivery: Delivery) -> None:
        attempts.append(delivery.attempt)
        raise LookupError

    broker.fail_next("refuse publish", queue="q.dead")
    async with worker:
        await producer.publish(QUEUE, 1)
        await broker.advance(10)
    assert attempts == [1, 2]
    assert broker.dead(QUEUE) == [1]
    assert "could not be published, the original stays" in caplog.text


@pytest.mark.parametrize("code", [403, 404, 405, 406])
async def test_a_refused_declaration_is_told(
    broker: MemoryBroker, producer: Producer, code: int
) -> None:
    """A declaration is refused with the code that was asked for."""
    broker.fail_next("refuse declaration", queue=QUEUE, code=code)
    with pytest.raises(TopologyError) as caught:
        await producer.publish(QUEUE, 1)
    assert (caught.value.code, caught.value.name) == (code, "q")
    await producer.publish(QUEUE, 1)


async def test_a_refused_redeclaration_ends_a_worker(broker: MemoryBroker) -> None:
    """A worker that may not declare its queue again, for good, ends with the reason."""
    worker = Worker(broker)

    @worker.handler(QUEUE)
    async def handle(_: int) -> None: ...

    with pytest.raises(TopologyError, match="PRECONDITION_FAILED"):
        async with worker:
            broker.fail_next("refuse declaration", queue=QUEUE)
            broker.drop_connections()
            await broker.advance(1)
            await asyncio.Event().wait()


async def test_a_cancelled_consumer_comes_back(
    broker: MemoryBroker, producer: Producer, worker: Worker, handled: list[tuple[int, bool]]
) -> None:
    """A worker notices that its consumer was cancelled, and subscribes again."""
    broker.cancel_consumers(QUEUE)
    await broker.settle()
    assert worker.statistics().consumers["q"].losses == 1
    await producer.publish(QUEUE, 1)
    await broker.advance(1)
    assert worker.is_ready
    assert handled == [(1, False)]


async def test_a_consumer_that_is_cancelled_often_waits_longer(
    broker: MemoryBroker, worker: Worker
) -> None:
    """It is asked for again after 0.1 seconds first, and after 5 at most."""
    for number in range(10):
        broker.cancel_consumers(QUEUE)
        await broker.advance(0.1)
        assert worker.is_ready or number
        if not worker.is_ready:
            break
    else:
        raise AssertionError("its pause did not grow")
    await broker.advance(5)
    assert worker.is_ready


async def test_a_connection_that_is_lost_often_makes_no_consumer_wait(
    broker: MemoryBroker, worker: Worker
) -> None:
    """Connecting has pauses of its own: a consumer adds its first one to them, each time."""
    for _ in range(10):
        broker.drop_connections("worker")
        await broker.advance(0.1)
        assert worker.is_ready


async def test_a_deleted_queue_is_declared_anew(
    broker: MemoryBroker, producer: Producer, worker: Worker, handled: list[tuple[int, bool]]
) -> None:
    """Producer and worker go on after their queue was deleted."""
    broker.delete_queue(QUEUE)
    await producer.publish(QUEUE, 1)
    await broker.advance(1)
    assert handled == [(1, False)]


async def test_an_alarm_blocks_publishers_only(
    broker: MemoryBroker, producer: Producer, worker: Worker, handled: list[tuple[int, bool]]
) -> None:
    """Messages that are there are handled during an alarm; new ones wait for its end."""
    await producer.publish(QUEUE, 1)
    with broker.alarm():
        publishing = asyncio.ensure_future(producer.publish(QUEUE, 2))
        await broker.settle()
        assert handled == [(1, False)]
        assert producer.statistics().is_blocked
    await publishing
    await broker.settle()
    assert handled == [(1, False), (2, False)]


async def test_nobody_connects_during_an_outage(broker: MemoryBroker, producer: Producer) -> None:
    """What is published during an outage is stored after it; a new client waits."""
    with broker.outage("down for maintenance"):
        publishing = asyncio.ensure_future(producer.publish(QUEUE, 1))
        await broker.advance(60)
        assert not producer.statistics().is_connected
        assert producer.statistics().last_error == "down for maintenance"
        with pytest.raises(ConnectionLostError):
            await Producer(broker, timeout=0.01).start()
    await broker.advance(1)
    await publishing
    assert broker.published(QUEUE) == [1]


async def test_connections_are_dropped_by_owner(
    broker: MemoryBroker, producer: Producer, worker: Worker
) -> None:
    """Only the connections of those that were named are dropped."""
    broker.drop_connections("worker")
    assert producer.statistics().is_connected
    await broker.advance(1)
    assert worker.statistics().reconnects == 1
    broker.drop_connections("dead letters")
    assert worker.statistics().reconnects == 1
    broker.drop_connections("producer", reason="a test wants it")
    await eventually(lambda: producer.statistics().is_connected)
    assert producer.statistics().last_error == "a test wants it"


async def test_a_fault_that_does_not_exist_is_refused(broker: MemoryBroker) -> None:
    """Faults have names, numbers bounds, and consumers and queues must be there."""
    with pytest.raises(ValueError, match="there is no fault 'lose confrim': what can fail next"):
        broker.fail_next("lose confrim")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="times is 0"):
        broker.fail_next("lose ack", times=0)
    with pytest.raises(ValueError, match="code is 200"):
        broker.fail_next("refuse declaration", code=200)
    with pytest.raises(ValueError, match="owner is 'nobody'"):
        broker.drop_connections("nobody")  # type: ignore[arg-type]
    with pytest.raises(StateError, match="no consumer of queue 'q' can be cancelled"):
        broker.cancel_consumers("q")
    with pytest.raises(StateError, match="queue 'q' cannot be deleted: it does not exist"):
        broker.delete_queue("q")


async def test_two_brokers_are_told_apart(broker: MemoryBroker, producer: Producer) -> None:
    """Asking the wrong broker for what was published is an error, not an empty list."""
    await producer.publish(QUEUE, 1)
    with pytest.raises(StateError, match="Give the producer and the worker the same MemoryBroker"):
        MemoryBroker().published(QUEUE)
    assert MemoryBroker().published("never used") == []


async def test_arguments_that_are_not_followed_are_refused(producer: Producer) -> None:
    """A queue whose arguments the memory broker would ignore is not declared."""
    with pytest.raises(TopologyError, match="does not follow the argument 'x-max-length-bytes'"):
        await producer.publish(Queue("q", arguments={"x-max-length-bytes": 1000}), 1)
    with pytest.raises(TopologyError, match="no queues of type 'stream'"):
        await producer.publish(Queue("q", arguments={"x-queue-type": "stream"}), 1)
    await producer.publish(Queue("q", arguments={"x-queue-leader-locator": "balanced"}), 1)
