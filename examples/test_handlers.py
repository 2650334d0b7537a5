"""Test handlers: as functions, one delivery at a time, on a broker in memory, on RabbitMQ.

Run it with ``pytest examples/test_handlers.py``; AnyIO brings the plugin for async tests, aioworkq
the fixtures.
"""
# ruff: noqa: S101 - assert is how tests speak

import asyncio
from dataclasses import dataclass

import pytest

from aioworkq import (
    Ack,
    Delivery,
    MemoryBroker,
    Message,
    Producer,
    Queue,
    Reject,
    Retry,
    RetryPolicy,
    Worker,
)
from aioworkq.testing import deliver, drain

pytestmark = pytest.mark.anyio


@dataclass
class Order:
    """What a customer wants."""

    number: int
    is_paid: bool = True
    is_heavy: bool = False


orders = Queue("orders", Order)
shipped: asyncio.Queue[int] = asyncio.Queue()


async def ship(order: Order, delivery: Delivery) -> None:
    if not order.is_paid:
        raise Reject("not paid")
    if order.is_heavy and delivery.attempt == 1:
        raise ConnectionError("the carrier does not answer")
    shipped.put_nowait(order.number)


def make_worker(broker: str | MemoryBroker) -> Worker:
    worker = Worker(broker)
    worker.handler(orders, retry=RetryPolicy(attempts=3, first=600))(ship)
    return worker


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def delivery_of_attempt(attempt: int) -> Delivery:
    message = Message(b"", orders.name)
    return Delivery(message, queue=orders.name, attempt=attempt, redelivered=attempt > 1)


async def test_a_paid_order_is_shipped() -> None:
    await ship(Order(1), delivery_of_attempt(1))
    assert shipped.get_nowait() == 1


async def test_an_unpaid_order_is_rejected() -> None:
    with pytest.raises(Reject, match="not paid"):
        await ship(Order(1, is_paid=False), delivery_of_attempt(1))


async def test_what_becomes_of_a_delivery(memory_broker: MemoryBroker) -> None:
    worker = make_worker(memory_broker)
    assert await deliver(worker, orders, Order(1)) == Ack()
    assert shipped.get_nowait() == 1
    assert isinstance(await deliver(worker, orders, Order(2, is_heavy=True)), Retry)


async def test_a_heavy_order_is_shipped_at_the_second_attempt(memory_broker: MemoryBroker) -> None:
    worker = make_worker(memory_broker)
    async with Producer(memory_broker) as producer:
        await producer.publish(orders, Order(1, is_heavy=True))
        assert (await drain(worker)).retried == 1
        assert shipped.empty()
        await memory_broker.advance(640)
        assert (await drain(worker)).handled == 1
    assert shipped.get_nowait() == 1


async def test_an_unpaid_order_ends_among_the_dead(memory_broker: MemoryBroker) -> None:
    async with Producer(memory_broker) as producer:
        await producer.publish(orders, Order(1, is_paid=False))
    await drain(make_worker(memory_broker))
    assert memory_broker.published(orders) == [Order(1, is_paid=False)]
    assert memory_broker.dead(orders) == [Order(1, is_paid=False)]


async def test_an_order_for_later_is_shipped_in_an_hour(memory_broker: MemoryBroker) -> None:
    async with Producer(memory_broker) as producer, make_worker(memory_broker):
        await producer.publish(orders, Order(1), delay=3600)
        await memory_broker.advance(3599)
        assert shipped.empty()
        await memory_broker.advance(1)
        assert shipped.get_nowait() == 1


async def test_a_lost_connection_ships_nothing_twice(memory_broker: MemoryBroker) -> None:
    async with Producer(memory_broker) as producer, make_worker(memory_broker) as worker:
        memory_broker.fail_next("lose ack", queue=orders)
        await producer.publish(orders, Order(1))
        await memory_broker.advance(1)
        assert shipped.get_nowait() == 1
        assert shipped.empty()
        assert worker.statistics().consumers["orders"].duplicates == 1


async def test_on_a_real_rabbitmq(rabbitmq_url: str) -> None:
    async with make_worker(rabbitmq_url), Producer(rabbitmq_url) as producer:
        await producer.publish(orders, Order(1))
        assert await shipped.get() == 1
