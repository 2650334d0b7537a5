"""Headers that another message had: what a new one takes from them, and whom its counts bind."""

from __future__ import annotations

import math
from typing import Any

import pytest

from aioworkq import Delivery, MemoryBroker, Producer, Queue, Worker
from aioworkq.message import OUR_HEADERS, Message
from aioworkq.testing import drain
from tests.publishing import publish_as_another_client


@pytest.mark.parametrize("version", ["3.10", "4.0", "4.3"])
async def test_a_job_that_publishes_itself_again(version: Any) -> None:
    """With the headers of its delivery, and a delay: RabbitMQ 3.10 would drop it as a cycle."""
    broker = MemoryBroker(version=version, clock="virtual")
    queue, worker, seen = Queue("q", int), Worker(broker), list[tuple[int, int]]()

    async with Producer(broker) as producer:

        @worker.handler(queue)
        async def handle(number: int, delivery: Delivery) -> None:
            seen.append((number, delivery.attempt))
            assert delivery.headers["mine"] == "kept"
            if number < 5:
                await producer.publish(queue, number + 1, headers=delivery.headers, delay=1)

        await producer.publish(queue, 1, headers={"mine": "kept"})
        async with worker:
            await broker.advance(60)
    assert seen == [(number, 1) for number in range(1, 6)]


async def test_what_was_counted_of_another_message_is_left_out() -> None:
    """Neither RabbitMQ's counts nor ours, nor our marks, are those of a new message."""
    broker = MemoryBroker()
    theirs = {"x-delivery-count": 7, "x-acquired-count": 8, "x-death": [1, 2]}
    ours: dict[str, Any] = dict.fromkeys(OUR_HEADERS, 50)
    worker, headers = Worker(broker), list[dict[str, Any]]()

    @worker.handler(Queue("q", int, type="classic"), attempts=3)
    async def handle(_: int, delivery: Delivery) -> None:
        headers.append(dict(delivery.headers))

    async with Producer(broker) as producer:
        queue = Queue("q", int, type="classic")
        await producer.publish(queue, 1, headers={**theirs, **ours, "mine": 1})
        await producer.publish_many(queue, [2], headers={**theirs, **ours, "mine": 2})
    await drain(worker)
    assert headers == [{"mine": 1}, {"mine": 2}]


@pytest.mark.parametrize("count", [0, 7])
@pytest.mark.parametrize("header", ["x-delivery-count", "x-acquired-count"])
async def test_a_count_of_a_quorum_queue_says_nothing_in_a_classic_one(
    header: str, count: int
) -> None:
    """Another client published what it got from a quorum queue as it was: `attempts` holds."""
    broker, starts = MemoryBroker(clock="virtual"), list[int]()
    queue, worker = Queue("q", bytes, type="classic"), Worker(broker)

    @worker.handler(queue, attempts=3)
    async def handle(_: bytes, delivery: Delivery) -> None:
        starts.append(delivery.attempt)
        raise LookupError

    async with Producer(broker) as producer, worker:
        await producer.publish(queue, b"declares it")
        await broker.advance(60)
        starts.clear()
        await publish_as_another_client(broker, Message(b"x", "q", headers={header: count}))
        await broker.advance(60)
    assert starts == [1, 2, 3]
    assert broker.dead(queue) == [b"declares it", b"x"]


async def test_a_count_on_what_was_never_handed_over_counts_nothing() -> None:
    """It is another client's copy, and not dead-lettered unseen."""
    broker, starts = MemoryBroker(), list[int]()
    worker = Worker(broker)

    @worker.handler("q", attempts=3)
    async def handle(_: object, delivery: Delivery) -> None:
        starts.append(delivery.attempt)

    async with Producer(broker) as producer:
        await producer.publish("q", "declares it")
    message = Message(b"x", "q", headers={"x-delivery-count": 7})
    await publish_as_another_client(broker, message)
    await drain(worker)
    assert starts == [1, 1]


@pytest.mark.parametrize("name", ["CC", "BCC"])
async def test_a_message_is_for_one_queue(name: str) -> None:
    """RabbitMQ would confirm it for any of them, and route each copy to all of them again."""
    broker = MemoryBroker()
    async with Producer(broker) as producer:
        with pytest.raises(ValueError, match="the headers have CC or BCC"):
            await producer.publish("q", "x", headers={name: ["other"]})
    copy = Message(b"x", "q", headers={name: ["other"]}).copy_to("q.dead", {name: ["other"]})
    assert name not in copy.headers


@pytest.mark.parametrize("value", [math.nan, math.inf, [1.0, -math.inf], {"a": math.nan}])
async def test_a_float_that_rabbitmq_cannot_read_is_refused(value: object) -> None:
    """RabbitMQ would close the connection over it, with everything that is on its way."""
    async with Producer(MemoryBroker()) as producer:
        with pytest.raises(ValueError, match=r"header '.+' is .+: RabbitMQ closes the connection"):
            await producer.publish("q", "x", headers={"bad": value})
