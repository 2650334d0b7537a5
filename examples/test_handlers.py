"""Test handlers: first as the functions that they are, then on a private RabbitMQ.

Run it with ``pytest examples/test_handlers.py``; AnyIO brings the plugin for async tests.
"""
# ruff: noqa: S101 - assert is how tests speak

import asyncio
from dataclasses import dataclass

import pytest

from aioworkq import Delivery, Message, Producer, Queue, Reject, Worker
from aioworkq.testing import RabbitMQ

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


def make_worker(url: str) -> Worker:
    worker = Worker(url)
    worker.handler(orders)(ship)
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


async def test_what_fails_is_handed_over_again() -> None:
    async with RabbitMQ() as node, make_worker(node.url) as worker, Producer(node.url) as producer:
        await producer.publish(orders, Order(1, is_heavy=True))
        assert await shipped.get() == 1
        assert worker.statistics().failed == 1
