"""Producers, workers and `DeadLetters` on both brokers: the same code, the same results."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Literal

import pytest

from aioworkq import (
    DeadLetters,
    Delivery,
    NotConfirmedError,
    Producer,
    Queue,
    Reject,
    RetryLater,
    RetryPolicy,
    TopologyError,
    UnroutableError,
    Worker,
)

if TYPE_CHECKING:
    from tests.conformance.subject import Subject

BOTH_TYPES = pytest.mark.parametrize("kind", ["quorum", "classic"])

QueueKind = Literal["quorum", "classic"]


class Seen:
    """What handlers saw."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self.deliveries: list[tuple[Any, int, bool]] = []

    def note(self, body: Any, delivery: Delivery) -> None:
        self.deliveries.append((body, delivery.attempt, delivery.redelivered))

    async def wait(self, number: int) -> None:
        await self._subject.eventually(lambda: len(self.deliveries) >= number)


async def ready(subject: Subject, queue: str) -> int:
    async with subject.connect() as connection:
        return await connection.count_messages(queue, timeout=10)


async def wait_empty(subject: Subject, queue: str) -> None:
    async def is_empty() -> bool:
        return await ready(subject, queue) == 0

    await subject.eventually(is_empty)


@BOTH_TYPES
async def test_work_is_done(subject: Subject, kind: QueueKind) -> None:
    """What is published is handled once, with its body and as its first attempt."""
    queue, seen, worker = Queue("work", int, type=kind), Seen(subject), Worker(subject.address)
    worker.handler(queue)(seen_by(seen))
    async with Producer(subject.address) as producer, worker:
        report = await producer.publish_many(queue, range(50))
        assert report.confirmed == 50
        await seen.wait(50)
    assert seen.deliveries == [(number, 1, False) for number in range(50)]
    assert worker.statistics().consumers["work"].handled == 50
    await wait_empty(subject, "work")


def seen_by(seen: Seen) -> Any:
    async def handle(body: int, delivery: Delivery) -> None:
        seen.note(body, delivery)

    return handle


@BOTH_TYPES
async def test_failures_are_attempts(subject: Subject, kind: QueueKind) -> None:
    """A handler that fails gets the message again, counted, and in the end it is dead-lettered."""
    queue, seen, worker = Queue("work", int, type=kind), Seen(subject), Worker(subject.address)

    @worker.handler(queue, attempts=3)
    async def handle(body: int, delivery: Delivery) -> None:
        seen.note(body, delivery)
        raise LookupError(body)

    async with Producer(subject.address) as producer, worker:
        await producer.publish(queue, 7)
        await subject.eventually(lambda: worker.statistics().consumers["work"].dead_lettered == 1)
    assert [attempt for _, attempt, _ in seen.deliveries] == [1, 2, 3]
    async with DeadLetters(subject.address, queue) as dead:
        (letter,) = await dead.peek()
        assert (letter.body(), letter.attempts, letter.exception_type) == (7, 3, "LookupError")
        assert letter.reason == "gave up after 3 attempts"
        assert await dead.replay() == 1
        assert await dead.peek() == []
    assert await ready(subject, "work") == 1


@BOTH_TYPES
async def test_retries_wait_in_the_broker(subject: Subject, kind: QueueKind) -> None:
    """A retry policy, RetryLater and a delay lead through the delay queues and back."""
    queue, seen, worker = Queue("work", str, type=kind), Seen(subject), Worker(subject.address)

    @worker.handler(queue, retry=RetryPolicy(attempts=2, first=0.2))
    async def handle(body: str, delivery: Delivery) -> None:
        seen.note(body, delivery)
        if delivery.attempt == 1 and body == "fails":
            raise LookupError
        if body == "waits" and delivery.headers.get("x-aioworkq-attempts") is None:
            raise RetryLater(0.2, counts=False)

    async with Producer(subject.address) as producer, worker:
        await producer.publish(queue, "late", delay=0.3)
        await producer.publish(queue, "fails")
        await producer.publish(queue, "waits")
        await seen.wait(5)
    assert sorted((body, attempt) for body, attempt, _ in seen.deliveries) == [
        ("fails", 1),
        ("fails", 2),
        ("late", 1),
        ("waits", 1),
        ("waits", 1),
    ]


@BOTH_TYPES
async def test_a_stop_charges_nothing(subject: Subject, kind: QueueKind) -> None:
    """What a stopped worker returns, interrupted or unstarted, is handled as a first attempt."""
    queue, begun = Queue("work", int, type=kind), asyncio.Event()
    first, second, seen = Worker(subject.address), Worker(subject.address), Seen(subject)

    @first.handler(queue, concurrency=1, prefetch_count=3)
    async def never_ends(_: int) -> None:
        begun.set()
        await asyncio.Event().wait()

    second.handler(queue)(seen_by(seen))
    async with Producer(subject.address) as producer, first:
        await producer.publish_many(queue, range(4))
        await begun.wait()
        await subject.eventually(lambda: first.statistics().consumers["work"].waiting == 2)
        first.stop(grace=0)
    async with second:
        await seen.wait(4)
    assert sorted((body, attempt) for body, attempt, _ in seen.deliveries) == [
        (number, 1) for number in range(4)
    ]
    await wait_empty(subject, "work")


@BOTH_TYPES
async def test_a_lost_connection_runs_nothing_twice(subject: Subject, kind: QueueKind) -> None:
    """A run that outlives its connection ends; its redelivery is acked and not run again."""
    queue, begun, may_end = Queue("work", int, type=kind), asyncio.Event(), asyncio.Event()
    worker, seen = Worker(subject.address), Seen(subject)

    @worker.handler(queue)
    async def handle(body: int, delivery: Delivery) -> None:
        seen.note(body, delivery)
        begun.set()
        await may_end.wait()

    async with Producer(subject.address) as producer, worker:
        await producer.publish(queue, 1)
        await begun.wait()
        await subject.drop_connections()
        await subject.eventually(lambda: worker.statistics().consumers["work"].losses == 1)
        await subject.wait_for(worker.wait_ready())
        await producer.publish(queue, 2)  # the producer is back as well
        may_end.set()
        await subject.eventually(lambda: worker.statistics().consumers["work"].duplicates == 1)
        await seen.wait(2)
    assert [body for body, _, _ in seen.deliveries] == [1, 2]
    await wait_empty(subject, "work")


async def test_what_cannot_be_handled_is_dead_at_once(subject: Subject) -> None:
    """A body of another type, and a Reject, go to the dead letters with their reasons."""
    queue, worker = Queue("work", int), Worker(subject.address)

    @worker.handler(queue)
    async def handle(_: int) -> None:
        raise Reject("not this one")

    async with Producer(subject.address) as producer, worker:
        await producer.publish(queue, 1)
        await producer.publish(Queue("work", str), "no number")
        await subject.eventually(lambda: worker.statistics().consumers["work"].dead_lettered == 2)
    async with DeadLetters(subject.address, queue) as dead:
        reasons = sorted(letter.reason for letter in await dead.peek())
        assert reasons[0] == "not this one"
        assert reasons[1].startswith("the body is not a valid int")
        assert await dead.purge() == 2


async def test_a_full_queue_is_told(subject: Subject) -> None:
    """A producer hears that a queue with max_length is full."""
    queue = Queue("work", int, type="classic", max_length=1)
    async with Producer(subject.address) as producer:
        await producer.publish(queue, 1)
        with pytest.raises(NotConfirmedError):
            await producer.publish(queue, 2)


async def test_what_expires_is_dead(subject: Subject) -> None:
    """A message that nobody handled in time goes from a quorum queue to its dead letters."""
    queue = Queue("work", int)
    async with Producer(subject.address) as producer, DeadLetters(subject.address, queue) as dead:
        await producer.publish(queue, 1, expiration=0.05)

        async def is_dead() -> bool:
            return await dead.peek() != []

        await subject.eventually(is_dead)
        (letter,) = await dead.peek()
        assert (letter.body(), letter.reason, letter.queue) == (1, "expired", "work")


async def test_a_queue_that_operators_own_is_only_used(subject: Subject) -> None:
    """With declare=False a missing queue is an error of worker and producer."""
    queue, worker = Queue("missing", int, declare=False), Worker(subject.address)
    worker.handler(queue)(seen_by(Seen(subject)))
    async with Producer(subject.address) as producer:
        with pytest.raises(UnroutableError):
            await producer.publish(queue, 1)
    with pytest.raises(TopologyError):
        await worker.run()


async def test_a_worker_outlives_its_queue(subject: Subject) -> None:
    """A deleted queue is declared anew by worker and producer."""
    queue, worker, seen = Queue("work", int), Worker(subject.address), Seen(subject)
    worker.handler(queue)(seen_by(seen))
    async with Producer(subject.address) as producer, worker:
        await producer.publish(queue, 1)
        await seen.wait(1)
        await subject.delete_queue("work")
        await subject.eventually(lambda: worker.statistics().consumers["work"].losses == 1)
        await subject.wait_for(worker.wait_ready())
        await producer.publish(queue, 2)
        await seen.wait(2)
