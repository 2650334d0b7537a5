"""Delayed messages on RabbitMQ: never early, never to a wrong queue, never in each other's way."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta, timezone
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import aiormq
import pytest

from aioworkq import Delivery, Producer, Queue, RetryLater, RetryPolicy, TopologyError, Worker
from aioworkq.amqp.declare import look_for
from aioworkq.delay import DELIVERY_EXCHANGE, UNROUTABLE, route
from aioworkq.message import Message
from tests.consuming import Broker, eventually
from tests.publishing import no_complaints

if TYPE_CHECKING:
    from aioworkq.testing import RabbitMQ

__all__ = ["no_complaints"]

HALF_A_SECOND = "aioworkq.v1.delay.02"  # four eighths
FOUR_SECONDS = "aioworkq.v1.delay.05"


async def test_a_delayed_message_never_comes_early(
    producer: Producer, broker: Broker, queue_name: str
) -> None:
    """Each of many delays, through one delay queue or several, is waited for in full."""
    queue = Queue(queue_name, float, type="classic")
    await producer.publish(queue, 0.0)
    delays = [0.01, 0.125, 0.2, 0.375, 0.6, 0.875, 1.0, 1.3]
    began = time.monotonic()
    await asyncio.gather(*(producer.publish(queue, delay, delay=delay) for delay in delays))
    arrived = dict[float, float]()

    async def all_arrived() -> bool:
        for message in await broker.take_all(queue_name):
            arrived[float(message.body)] = time.monotonic() - began
        return len(arrived) == 1 + len(delays)

    await eventually(all_arrived)
    for delay, after in arrived.items():
        assert after >= delay


async def test_delayed_messages_wait_for_nothing_that_is_there(
    producer: Producer, queue_name: str
) -> None:
    """What was declared a moment ago makes no message wait: many then go out in one write."""
    queue = Queue(queue_name, bytes)
    await producer.publish(queue, b"x", delay=1)
    message = Message(b"x", queue_name)
    deadline = asyncio.get_running_loop().time() + 20
    way = producer.make_way(queue, deadline, message=message, delay=1)
    with pytest.raises(StopIteration):
        way.send(None)
    assert message.exchange == "aioworkq.v1.delay.03"
    longer = Message(b"x", queue_name)
    await producer.make_way(queue, deadline, message=longer, delay=2)
    assert longer.exchange == "aioworkq.v1.delay.04"


async def test_a_delayed_message_keeps_all_that_it_is(
    producer: Producer, broker: Broker, queue_name: str
) -> None:
    """Body, id, headers and priority arrive through the delay queues, persistent still."""
    message_id = await producer.publish(
        queue_name, {"a": 1}, delay=0.2, headers={"h": "v"}, priority=3, correlation_id="c"
    )
    message = await broker.take(queue_name)
    properties = message.header.properties
    assert message.body == b'{"a":1}'
    assert properties.message_id == message_id
    assert (properties.headers or {})["h"] == "v"
    assert (properties.priority, properties.correlation_id) == (3, "c")
    assert properties.delivery_mode == 2


@pytest.mark.parametrize("zone", [UTC, timezone(timedelta(hours=-7))])
async def test_a_point_in_time_is_a_delay(
    producer: Producer, broker: Broker, queue_name: str, zone: timezone
) -> None:
    """A message for a point in time, in whatever time zone, does not come before it."""
    at = datetime.now(zone) + timedelta(seconds=0.5)
    await producer.publish(queue_name, b"x", at=at)
    await broker.take(queue_name)
    assert datetime.now(UTC) >= at


async def test_a_point_in_time_that_has_passed_means_now(
    producer: Producer, broker: Broker, queue_name: str
) -> None:
    """Nothing is declared for delays then."""
    await producer.publish(queue_name, b"x", at=datetime.now(UTC) - timedelta(days=1))
    await producer.publish(queue_name, b"x", delay=0)
    assert await broker.ready(queue_name) == 2
    assert not await broker.exists(UNROUTABLE)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"delay": -1}, "the delay is -1 seconds: it must be from 0 to a year, 3.1536e+07."),
    ({"delay": 365 * 24 * 3600 + 1}, "the delay is 31536001 seconds: it must be from 0 to a"),
    ({"delay": float("nan")}, "the delay is nan seconds"),
    ({"delay": float("inf")}, "the delay is inf seconds"),
    (
        {"at": datetime(2024, 1, 1)},  # noqa: DTZ001 - that is the mistake
        "at is datetime.datetime(2024, 1, 1, 0, 0), without a time zone: give an aware "
        "datetime, such as datetime.now(UTC) + timedelta(hours=1).",
    ),
    ({"at": datetime.now(UTC) + timedelta(days=400)}, "it must be from 0 to a year"),
    ({"delay": 1, "at": datetime.now(UTC)}, "delay and at are both given: give one of them."),
    (
        {"delay": 1, "expiration": 5},
        "a delayed message cannot have an expiration too: it would end the delay. "
        "Leave one of them out.",
    ),
]


async def test_a_delay_that_cannot_be_right_is_a_value_error(
    producer: Producer, queue_name: str
) -> None:
    """It is refused before anything is declared, by publish and publish_many alike."""
    for options, sentence in WRONG:
        given: Any = options
        with pytest.raises(ValueError) as caught:
            await producer.publish(queue_name, b"x", **given)
        assert sentence in str(caught.value)
        with pytest.raises(ValueError) as caught:
            await producer.publish_many(queue_name, [b"x"], **given)
        assert sentence in str(caught.value)
    assert producer.statistics().confirmed == 0


async def test_a_delay_of_a_year_is_taken(producer: Producer, queue_name: str) -> None:
    """The longest delay needs 28 delay queues, and RabbitMQ takes their arguments."""
    await producer.publish(queue_name, b"x", delay=365 * 24 * 3600)


async def test_many_delayed_messages_arrive_all(
    producer: Producer, broker: Broker, queue_name: str
) -> None:
    """A batch with a delay goes to the delay queues as a whole, and comes out complete."""
    queue = Queue(queue_name, int, type="classic")
    report = await producer.publish_many(queue, range(300), delay=0.3)
    assert report.confirmed == 300
    await eventually(lambda: _has(broker, queue_name, 300))
    assert {int(one.body) for one in await broker.take_all(queue_name)} == set(range(300))


async def _has(broker: Broker, queue: str, count: int) -> bool:
    return await broker.ready(queue) == count


async def test_dotted_names_do_not_receive_each_others_messages(
    producer: Producer, broker: Broker, queue_name: str
) -> None:
    """`orders`, `eu.orders` and `orders.eu` are three queues to the delay queues too."""
    names = ["orders", "eu.orders", "orders.eu", "eu.orders.eu", ".orders", "orders."]
    queues = [Queue(name, str, type="classic") for name in names]
    for _ in range(2):
        await asyncio.gather(*(producer.publish(one, one.name, delay=0.15) for one in queues))
    for name in names:
        await eventually(partial(_has, broker, name, 2))
        assert {one.body.decode() for one in await broker.take_all(name)} == {name}


@pytest.mark.fast_path("pamqp refuses the names")
async def test_any_name_can_be_delayed_to(producer: Producer, url: str) -> None:
    """Names too long for a routing key, and names that look like patterns, have their address."""
    names = ["q" * 250, "a.*.b", "a.x.b", "#", "a.#", "名" * 70]
    for name in names:
        await producer.publish(name, b"x", delay=0.1)
    connection = await aiormq.connect(url)
    try:
        channel = await connection.channel()

        async def arrived() -> bool:
            found = [await look_for(channel, name, timeout=20) for name in names]
            assert max(found) == 1 or not any(found)  # none receives another's
            return found == [1] * len(names)

        await eventually(arrived)
    finally:
        await connection.close()


@pytest.mark.parametrize("broken", ["queue", "exchange", "everything"])
async def test_a_deleted_delay_queue_is_declared_again(
    producer: Producer, broker: Broker, url: str, queue_name: str, broken: str
) -> None:
    """Whoever deletes what delays are made of, the next delayed message mends it."""
    await producer.publish(queue_name, b"1", delay=0.5)
    await broker.take(queue_name)
    connection = await aiormq.connect(url)
    channel = await connection.channel()
    if broken in {"queue", "everything"}:
        await channel.queue_delete(HALF_A_SECOND)
    if broken in {"exchange", "everything"}:
        await channel.exchange_delete(HALF_A_SECOND)
    if broken == "everything":
        await channel.exchange_delete(DELIVERY_EXCHANGE)
    await connection.close()
    results = await asyncio.gather(*(producer.publish(queue_name, b"2", delay=0.5) for _ in "abc"))
    assert len(results) == 3
    await eventually(lambda: _has(broker, queue_name, 3))
    assert producer.statistics().not_confirmed == 0


async def test_a_deleted_destination_jams_nobody(
    producer: Producer, broker: Broker, queue_name: str
) -> None:
    """What waited for a queue that is gone lands in aioworkq.v1.unroutable; the others arrive.

    The others wait in the same delay queue, behind more orphans than RabbitMQ dead-letters at a
    time (32, dead_letter_worker_consumer_prefetch).
    """
    gone = Queue(f"{queue_name}.gone", bytes, type="classic")
    queue = Queue(queue_name, bytes, type="classic")
    report = await producer.publish_many(gone, [b"gone"] * 100, delay=4)
    assert report.confirmed == 100
    await broker.delete(gone.name)
    report = await producer.publish_many(queue, [b"there"] * 100, delay=4)
    assert report.confirmed == 100
    assert await broker.ready(FOUR_SECONDS) == 200
    await eventually(lambda: _has(broker, queue_name, 100))
    await eventually(lambda: _has(broker, UNROUTABLE, 100))
    assert not await broker.exists(gone.name)


@pytest.mark.parametrize("kind", ["quorum", "classic"])
async def test_a_full_destination_jams_nobody(
    producer: Producer,
    broker: Broker,
    queue_name: str,
    rabbitmq: RabbitMQ,
    kind: Literal["quorum", "classic"],
) -> None:
    """What it refuses waits in a queue of its own, and arrives once there is room."""
    timeout = "dead_letter_worker_publisher_confirm_timeout"  # after so long it is tried again
    before = await rabbitmq.eval(f"element(2, application:get_env(rabbit, {timeout}))")
    await rabbitmq.eval(f"application:set_env(rabbit, {timeout}, 500)")
    full = Queue(f"{queue_name}.full", bytes, type=kind, max_length=10)
    try:
        while not (await producer.publish_many(full, [b"now"])).errors:
            pass
        late = [b"%d" % number for number in range(40)]  # more than are tried at a time
        assert (await producer.publish_many(full, late, delay=0.5)).confirmed == 40
        await eventually(lambda: _has(broker, HALF_A_SECOND, 0))
    finally:
        await rabbitmq.eval(f"application:set_env(rabbit, {timeout}, {before})")
    queue = Queue(queue_name, bytes, type="classic")
    await producer.publish_many(queue, [b"there"] * 100, delay=0.5)
    await eventually(lambda: _has(broker, queue_name, 100))
    taken: list[bytes] = []

    async def all_taken() -> bool:
        taken.extend(message.body for message in await broker.take_all(full.name))
        return set(taken) >= set(late)

    await eventually(all_taken)
    assert not await _has(broker, UNROUTABLE, 1)


async def test_orphans_of_a_full_destination_can_be_found(
    producer: Producer, broker: Broker, queue_name: str
) -> None:
    """It goes the way of all that finds no queue."""
    gone = Queue(queue_name, bytes, max_length=1)
    await producer.publish(gone, b"gone", delay=0.5)
    await broker.delete(gone.name)
    await eventually(lambda: _has(broker, UNROUTABLE, 1))


@pytest.mark.parametrize("how", ["policy", "signal"])
async def test_a_message_delayed_ten_times_in_a_row_arrives_each_time(
    producer: Producer, broker: Broker, url: str, queue_name: str, how: str
) -> None:
    """The same message goes through the same two delay queues ten times, and is no cycle."""
    queue, worker = Queue(queue_name, str), Worker(url)
    attempts = list[int]()
    way = route(queue_name, 0.375)
    assert way.hops == 2  # from the second round on, the way from the one to the other is known
    retry = RetryPolicy(attempts=11, first=0.375, factor=1, jitter=0) if how == "policy" else None

    @worker.handler(queue, attempts=None, retry=retry)
    async def handle(_: str, delivery: Delivery) -> None:
        attempts.append(delivery.attempt)
        if len(attempts) <= 10:
            raise RetryLater(0.375) if retry is None else ConnectionError

    async with worker:
        await producer.publish(queue, "x")
        await eventually(lambda: worker.statistics().handled == 1)
    assert attempts == list(range(1, 12))
    assert worker.statistics().retried == 10
    assert await broker.ready(queue.dead_letter_queue) == 0


async def test_a_destination_that_is_not_declared_must_exist(
    producer: Producer, queue_name: str
) -> None:
    """With declare=False, a delay to a missing queue is refused when it is published."""
    with pytest.raises(TopologyError) as caught:
        await producer.publish(Queue(queue_name, declare=False), b"x", delay=60)
    assert caught.value.code == 404
    assert caught.value.name == queue_name
