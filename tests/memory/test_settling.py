"""Settling where something refuses or is cut off: a copy, a mark, a task."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from aioworkq import (
    DeadLetter,
    DeadLetters,
    Delivery,
    MemoryBroker,
    NotConfirmedError,
    Producer,
    Queue,
    RetryLater,
    RetryPolicy,
    Worker,
)
from aioworkq.message import ATTEMPTS, TRIAL, Message
from aioworkq.testing import drain
from tests.consuming import eventually

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioworkq.topology import QueueType

both_types = pytest.mark.parametrize("kind", ["quorum", "classic"])
with_batches = pytest.mark.parametrize("is_batch", [False, True])


async def fill(producer: Producer, queue: Queue[int], number: int) -> int:
    """Publish until the queue is full; return the next number."""
    while True:
        try:
            await producer.publish(queue, number)
        except NotConfirmedError:
            return number
        number += 1


async def die(worker: Worker, broker: MemoryBroker, task: asyncio.Task[None]) -> None:
    """End a worker as if its process was killed: nothing of it arrives any more."""
    with broker.outage():
        worker.stop(grace=0)
        await task


@both_types
async def test_a_full_queue_whose_head_is_suspect_is_worked_off(kind: QueueType) -> None:
    """No room for the copies that are to be tried alone: they wait elsewhere until there is."""
    broker = MemoryBroker()
    queue = Queue("q", int, type=kind, max_length=20)
    started, done = list[int](), set[int]()
    async with Producer(broker) as producer:
        stored = 0
        for deaths in (1, 2):
            victim = Worker(broker)

            @victim.handler(queue, attempts=3)
            async def hang(number: int) -> None:
                started.append(number)
                await asyncio.Event().wait()

            task = asyncio.create_task(victim.run())
            await victim.wait_ready()
            stored = await fill(producer, queue, stored)
            await eventually(lambda expected=10 * deaths: len(started) >= expected)
            stored = await fill(producer, queue, stored)
            await die(victim, broker, task)
        worker = Worker(broker)

        @worker.handler(queue, attempts=3)
        async def handle(number: int) -> None:
            done.add(number)

        async with worker:
            await eventually(lambda: len(done) == stored)
    assert broker.counts(queue) == (0, 0)
    assert broker.dead(queue) == []


@both_types
async def test_poison_in_a_full_queue_is_started_as_often_as_it_may_be(kind: QueueType) -> None:
    """Dying workers are what fills a queue: the count of starts must not need room in it."""
    broker = MemoryBroker()
    queue = Queue("q", int, type=kind, max_length=3)
    attempts, poisoned = list[int](), asyncio.Event()
    async with Producer(broker) as producer:
        number = await fill(producer, queue, 0)
        while not broker.dead(queue):
            assert len(attempts) < 4
            worker = Worker(broker)

            @worker.handler(queue, attempts=3, concurrency=1)
            async def handle(number: int, delivery: Delivery) -> None:
                if number == 0:
                    attempts.append(delivery.attempt)
                    poisoned.set()
                    await asyncio.Event().wait()

            task = asyncio.create_task(worker.run())
            await worker.wait_ready()
            number = await fill(producer, queue, number)
            await eventually(lambda: poisoned.is_set() or broker.dead(queue))
            poisoned.clear()
            await die(worker, broker, task)
    assert attempts == [1, 2, 3]
    assert broker.dead(queue) == [0]


@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_a_lost_connection_is_no_crash_of_a_trial(*, is_cancelled: bool) -> None:
    """The mark of the trial could not be taken away: the worker knows that it ended."""
    broker = MemoryBroker(clock="virtual")
    worker, attempts, goes_on = Worker(broker), list[int](), asyncio.Event()
    how: dict[str, Any] = {"on_connection_loss": "cancel"} if is_cancelled else {}

    @worker.handler("q", attempts=3, **how)
    async def handle(_: object, delivery: Delivery) -> None:
        attempts.append(delivery.attempt)
        if len(attempts) == 1:
            await goes_on.wait()
            raise RetryLater(0.2, counts=False)

    async with worker:
        headers = {ATTEMPTS: 2, TRIAL: "one"}
        broker.node.publish(Message(b"1", "q", message_id="1", headers=headers))
        await broker.advance(5)
        with broker.outage():
            goes_on.set()
            await broker.advance(1)
        await broker.advance(60)
    assert attempts == [3, 3]
    assert broker.dead("q") == []
    assert not [name for name in broker.node.queues if "trial" in name]


@with_batches
async def test_a_task_that_is_cancelled_before_its_first_step(*, is_batch: bool) -> None:
    """Nothing of it has run, and yet its message is settled, and its slot is free."""
    broker, done = MemoryBroker(), list[int]()
    worker = Worker(broker)

    async def handle(body: Any) -> None:
        done.extend(body if is_batch else [body])

    if is_batch:
        worker.batch_handler(Queue("q", int), max_size=1, max_wait=0)(handle)
    else:
        worker.handler(Queue("q", int), concurrency=1)(handle)
    async with worker, Producer(broker) as producer:
        publishing = asyncio.create_task(producer.publish("q", 1))
        tasks = worker._consumers[0]._runs._tasks._tasks
        cancelled = 0
        while cancelled < 3:  # the task that gives it back, too
            for task in list(tasks):
                if "handles" in task.get_name():
                    task.cancel()
                    cancelled += 1
            await asyncio.sleep(0)
        await publishing
        await producer.publish("q", 2)
        await eventually(lambda: sorted(done) == [1, 2])
        assert worker.statistics().in_flight == 0
    assert broker.counts("q") == (0, 0)


@pytest.mark.parametrize("steps", range(12))
async def test_a_copy_is_made_once_whoever_is_cancelled(steps: int) -> None:
    """The task that puts a copy with its count in the place of a message is cancelled."""
    broker, done = MemoryBroker(), list[object]()
    worker, queue = Worker(broker), Queue("q", int, type="classic")

    @worker.handler(queue, concurrency=1)
    async def handle(number: int) -> None:
        done.append(number)

    async with Producer(broker) as producer:
        await producer.publish(queue, 1)
    victim = Worker(broker)

    @victim.handler(queue)
    async def hang(_: int) -> None:
        done.append("started")
        await asyncio.Event().wait()

    task = asyncio.create_task(victim.run())
    await eventually(lambda: done == ["started"])
    await die(victim, broker, task)
    async with worker:
        tasks = worker._consumers[0]._runs._tasks._tasks
        while not tasks:
            await asyncio.sleep(0)
        (first,) = tasks
        for _ in range(steps):
            await asyncio.sleep(0)
        first.cancel()
        await eventually(lambda: len(done) == 2)
        await broker.settle()
    assert done == ["started", 1]
    assert broker.counts(queue) == (0, 0)


@pytest.mark.parametrize("steps", range(8))
async def test_leaving_dead_letters_is_cancelled(steps: int) -> None:
    """Both connections are closed all the same."""
    broker, looked = MemoryBroker(), asyncio.Event()

    async def look() -> None:
        async with DeadLetters(broker, Queue("q", int)) as dead_letters:
            await dead_letters.counts()
            looked.set()

    task = asyncio.create_task(look())
    await looked.wait()
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    assert not broker.is_in_use


async def test_copies_that_cannot_be_delayed_do_not_wait_for_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A delay queue hangs: each copy has its own time limit, and no more."""
    broker = MemoryBroker(clock="virtual")
    worker = Worker(broker, timeout=1)

    @worker.handler("q", retry=RetryPolicy(attempts=3, first=1), concurrency=10)
    async def handle(_: object) -> None:
        raise LookupError

    async with worker, Producer(broker) as producer:
        connection = worker._consumers[0]._connection
        declare = connection.declare

        async def hang(declarations: Any, *, timeout: float) -> None:
            if any("delay" in getattr(one, "name", "") for one in declarations):
                await asyncio.Event().wait()
            await declare(declarations, timeout=timeout)

        monkeypatch.setattr(connection, "declare", hang)
        await producer.publish_many("q", range(10))
        counts = worker._consumers[0]._settler.counts
        await eventually(lambda: counts.failed_copies == 10)
        worker.stop(grace=0)


@pytest.mark.parametrize("failure", [ValueError("boom"), "boom"])
async def test_a_failure_that_is_none_is_told(failure: Any) -> None:
    """An exception in the place of its text."""
    broker = MemoryBroker()
    worker, told = Worker(broker), list[str]()

    def decide(_: Exception, __: Delivery) -> DeadLetter:
        return DeadLetter("bad", failure)

    @worker.handler("q", on_error=decide, attempts=1)
    async def handle(_: object) -> None:
        raise LookupError

    async with Producer(broker) as producer:
        await producer.publish("q", 1)
    await drain(worker)
    async with DeadLetters(broker, Queue("q", int)) as dead_letters:
        told += [one.reason for one in await dead_letters.peek()]
    assert told == ["gave up after 1 attempts"]


def test_no_pause_stays_no_pause() -> None:
    """However often it is doubled."""
    policy = RetryPolicy(first=0, factor=1e200)
    assert [policy.delay(attempt) for attempt in (1, 3, 5000)] == [0, 0, 0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Queue("q", type="classic", max_length=1.5),  # type: ignore[call-overload]
        lambda: Queue("q", type="classic", max_length=True),
        lambda: Queue("q", type="classic", max_length=2**70),
        lambda: Queue("q", type="classic", max_priority=1.5),  # type: ignore[call-overload]
        lambda: Queue("q", type="classic", max_priority=True),
    ],
)
def test_a_number_that_a_queue_cannot_have_is_refused(make: Callable[[], object]) -> None:
    """Where it is given."""
    with pytest.raises(ValueError, match="must be a whole number from 1"):
        make()


async def test_dead_letters_count_a_whole_number() -> None:
    """Nothing is no number of them."""
    async with DeadLetters(MemoryBroker(), Queue("q", int)) as dead_letters:
        for limit in (0, -5, 1.5, True):
            with pytest.raises(ValueError, match="must be a whole number from 1"):
                await dead_letters.counts(limit=limit)  # type: ignore[arg-type]
