"""The model of a node by itself: what the conformance tests cannot wait for, or not see."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from aioworkq import ConnectionLostError, MemoryBroker, Message, Producer, Queue, Worker
from aioworkq.broker import Confirm
from aioworkq.memory.clock import Clock
from aioworkq.memory.node import Node, Refusal
from aioworkq.memory.version import SEMANTICS
from aioworkq.topology import Binding, ExchangeDeclaration, QueueDeclaration
from tests.consuming import eventually

AT_LEAST_ONCE = {
    "x-queue-type": "quorum",
    "x-dead-letter-strategy": "at-least-once",
    "x-overflow": "reject-publish",
    "x-dead-letter-exchange": "",
    "x-dead-letter-routing-key": "dead",
}


@pytest.fixture
def clock() -> Clock:
    return Clock(is_virtual=True)


@pytest.fixture
def node(clock: Clock) -> Node:
    return Node(SEMANTICS["4.3"], clock)


def bodies(node: Node, queue: str) -> list[bytes]:
    return [message.body for message in node.queues[queue].messages()]


def pass_time(clock: Clock, seconds: float) -> None:
    target = clock.time() + seconds
    while clock.step(target):
        pass


def test_an_at_least_once_dead_letter_waits_for_its_queue(node: Node, clock: Clock) -> None:
    """It is tried again every three minutes, as RabbitMQ does, until somebody takes it."""
    node.declare(QueueDeclaration("q", AT_LEAST_ONCE))
    node.publish(Message(b"x", "q", expiration=1))
    pass_time(clock, 2)
    assert [message.body for message in node.queues["q"].undeliverable] == [b"x"]
    node.declare(QueueDeclaration("dead", {"x-max-length": 1, "x-overflow": "reject-publish"}))
    node.publish(Message(b"full", "dead"))
    pass_time(clock, 180)
    assert bodies(node, "dead") == [b"full"]
    taken = node.queues["dead"].take_one()
    assert taken is not None
    pass_time(clock, 180)
    assert bodies(node, "dead") == [b"x"]
    assert node.queues["q"].undeliverable == []


def test_an_at_most_once_dead_letter_is_lost(node: Node, clock: Clock) -> None:
    """Without the strategy nobody keeps what its exchange does not take."""
    for name, exchange in (("one", ""), ("two", "missing")):
        node.declare(QueueDeclaration(name, {"x-dead-letter-exchange": exchange}))
        node.publish(Message(b"x", name, expiration=1))
    pass_time(clock, 2)
    assert [len(queue) for queue in node.queues.values()] == [0, 0]


def test_a_deleted_queue_leaves_nothing(node: Node, clock: Clock) -> None:
    """With the queue go its messages, its bindings and what it still had to dead-letter."""
    node.declare(QueueDeclaration("q", AT_LEAST_ONCE))
    node.declare(ExchangeDeclaration("x", "topic"))
    node.declare(Binding("q", "queue", source="x", routing_key="#"))
    node.publish(Message(b"dead soon", "q", expiration=1))
    pass_time(clock, 2)
    node.publish(Message(b"x", "q", expiration=100))
    node.delete_queue("q")
    assert node.publish(Message(b"x", "", exchange="x")).confirm is Confirm.RETURNED
    node.declare(QueueDeclaration("dead", {}))
    pass_time(clock, 200)
    assert bodies(node, "dead") == []
    with pytest.raises(Refusal, match="no queue 'q'"):
        node.delete_queue("q")


def test_another_declaration_is_refused(node: Node) -> None:
    """A queue that is declared again must be declared alike."""
    node.declare(QueueDeclaration("q", {"x-max-length": 5}))
    node.declare(QueueDeclaration("q", {"x-max-length": 5, "x-queue-type": "classic"}))
    for arguments in ({}, {"x-max-length": 6}, {"x-max-length": 5, "x-queue-type": "quorum"}):
        with pytest.raises(Refusal, match="inequivalent arg") as caught:
            node.declare(QueueDeclaration("q", arguments))
        assert (caught.value.code, bool(caught.value.field)) == (406, True)


def test_dying_of_the_same_cause_again_is_counted(clock: Clock) -> None:
    """A second death in the same queue for the same reason adds one to its entry."""
    node = Node(SEMANTICS["3.10"], clock)
    claimed: dict[str, Any] = {
        "x-death": [
            {"queue": "other", "reason": "rejected", "count": 1},
            {"queue": "q", "reason": "expired", "count": 3},
        ],
    }
    node.declare(
        QueueDeclaration("q", {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": "dead"})
    )
    node.declare(QueueDeclaration("dead", {}))
    node.publish(Message(b"x", "q", expiration=1, headers=claimed))
    pass_time(clock, 2)
    stored = node.queues["dead"].take_one()
    assert stored is not None
    assert [(one["queue"], one["count"]) for one in stored.deaths] == [("q", 4), ("other", 1)]


async def test_a_call_on_a_blocked_connection_is_bounded() -> None:
    """While an alarm blocks a connection, nothing on it is answered."""
    broker = MemoryBroker()
    async with Producer(broker) as producer:
        await producer.publish("q", 1)
        bounded = pytest.raises(ConnectionLostError, match=r"did not answer within 0\.01 s")
        with broker.alarm(), bounded:
            await producer._connection.count_messages("q", timeout=0.01)
        assert await producer._connection.count_messages("q", timeout=5) == 1


async def test_a_producer_closes_during_an_alarm() -> None:
    """Closing does not wait for an alarm to end."""
    broker = MemoryBroker()
    producer = Producer(broker, timeout=0.01)
    await producer.start()
    await producer.publish("q", 1, timeout=20)
    with broker.alarm():
        assert "queues" not in repr(producer._connection)
        await producer.close()
    assert not broker.is_in_use


def test_a_real_clock_goes_from_loop_to_loop() -> None:
    """What is delayed on a real clock arrives in the event loop that is there by then."""
    broker = MemoryBroker()
    queue = Queue("q", int)

    async def publish() -> None:
        async with Producer(broker) as producer:
            await producer.publish(queue, 1, delay=0.3)

    async def handle_it() -> None:
        worker, handled = Worker(broker), asyncio.Event()

        @worker.handler(queue)
        async def handle(_: int) -> None:
            handled.set()

        async with worker:
            await eventually(handled.is_set)

    asyncio.run(publish())
    asyncio.run(handle_it())


def test_a_name_is_not_empty() -> None:
    """A broker of the process has a name."""
    with pytest.raises(ValueError, match="name is empty"):
        MemoryBroker.named("")
