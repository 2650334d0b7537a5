"""pika programs and ours on the same queue, as the tutorials declare it, in either start order."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any, Self

import anyio.to_thread
import pika
import pytest
from pika.exceptions import ChannelClosedByBroker

from aioworkq import Delivery, Producer, Queue, TopologyError, Worker
from tests.consuming import Broker, eventually, headers_of

if TYPE_CHECKING:
    from collections.abc import Callable

TASKS = Queue("task_queue", type="classic")

ORDERS = pytest.mark.parametrize("order", ["pika first", "ours first"])


def new_task(url: str, *bodies: bytes) -> None:
    """Publish as `new_task.py` of RabbitMQ's second tutorial does."""
    with contextlib.closing(pika.BlockingConnection(pika.URLParameters(url))) as connection:
        channel = connection.channel()
        channel.queue_declare(queue="task_queue", durable=True)
        for body in bodies:
            channel.basic_publish(
                exchange="",
                routing_key="task_queue",
                body=body,
                properties=pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent),
            )


class PikaWorker:
    """The `worker.py` of the second tutorial, in a thread."""

    def __init__(self, url: str, *, fails_first: bool = False) -> None:
        self._url = url
        self._fails_first = fails_first
        self.seen: list[tuple[bytes, pika.BasicProperties]] = []
        self._stop: Callable[[], None] = lambda: None
        self._is_ready = threading.Event()
        self._thread = threading.Thread(target=self._run)

    async def __aenter__(self) -> Self:
        self._thread.start()
        await anyio.to_thread.run_sync(self._is_ready.wait)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop()
        await anyio.to_thread.run_sync(self._thread.join)

    def _run(self) -> None:
        connection = pika.BlockingConnection(pika.URLParameters(self._url))
        channel = connection.channel()
        channel.queue_declare(queue="task_queue", durable=True)

        def callback(ch: Any, method: Any, properties: pika.BasicProperties, body: bytes) -> None:
            self.seen.append((body, properties))
            if self._fails_first and len(self.seen) == 1:
                ch.basic_nack(delivery_tag=method.delivery_tag)
            else:
                ch.basic_ack(delivery_tag=method.delivery_tag)

        channel.basic_qos(prefetch_count=1)
        channel.basic_consume(queue="task_queue", on_message_callback=callback)
        self._stop = lambda: connection.add_callback_threadsafe(channel.stop_consuming)
        self._is_ready.set()
        channel.start_consuming()
        connection.close()


@ORDERS
async def test_pika_publishes(url: str, order: str) -> None:
    """Our worker handles what a pika program publishes to the queue that either declared."""
    if order == "pika first":
        await anyio.to_thread.run_sync(new_task, url, b"early")
    worker = Worker(url)
    seen: list[bytes] = []

    @worker.handler(TASKS)
    async def handle(body: Any, delivery: Delivery) -> None:
        assert isinstance(body, bytes)  # pika says no content type
        assert delivery.message_id == ""
        seen.append(body)

    async with worker:
        await anyio.to_thread.run_sync(new_task, url, b"one", b"two..", b"\xff\x00")
        count = 4 if order == "pika first" else 3
        await eventually(lambda: worker.statistics().handled == count)
    assert seen[-3:] == [b"one", b"two..", b"\xff\x00"]


@ORDERS
async def test_pika_consumes(url: str, order: str) -> None:
    """A pika program consumes what our producer publishes, JSON with its content type."""
    if order == "pika first":
        await anyio.to_thread.run_sync(new_task, url)
    async with Producer(url) as producer:
        await producer.publish(TASKS, {"n": 1})
        async with PikaWorker(url) as pika_worker:
            await producer.publish(TASKS, {"n": 2})
            await eventually(lambda: len(pika_worker.seen) == 2)
    assert [body for body, _ in pika_worker.seen] == [b'{"n":1}', b'{"n":2}']
    for _, properties in pika_worker.seen:
        assert properties.content_type == "application/json"
        assert properties.delivery_mode == 2
        assert properties.message_id


async def test_the_default_type_works_on_their_queue(url: str) -> None:
    """A queue that pika declared is used as it is, even by a Queue that would be a quorum queue."""
    await anyio.to_thread.run_sync(new_task, url, b"x")
    worker = Worker(url)
    attempts: list[int] = []

    @worker.handler("task_queue", attempts=3)
    async def fail(body: Any, delivery: Delivery) -> None:
        attempts.append(delivery.attempt)
        raise ValueError("no")

    async with worker, Broker(url) as broker:
        dead = await broker.take("task_queue.dead")
    assert attempts == [1, 2, 3]
    assert headers_of(dead)["x-aioworkq-attempts"] == 3


async def test_a_quorum_queue_is_in_their_way(url: str) -> None:
    """Where ours came first as a quorum queue, pika's declaration is what RabbitMQ refuses."""
    async with Producer(url) as producer:
        await producer.publish("task_queue", "x")
    with pytest.raises(ChannelClosedByBroker, match="inequivalent arg"):
        await anyio.to_thread.run_sync(new_task, url)


async def test_work_is_shared(url: str) -> None:
    """A pika worker and ours share a queue: what one returns, the other gets, counted as tried."""
    worker = Worker(url)
    attempts: list[int] = []
    async with PikaWorker(url, fails_first=True) as pika_worker:
        await anyio.to_thread.run_sync(new_task, url, b"x")
        await eventually(lambda: pika_worker.seen)

        @worker.handler(TASKS)
        async def handle(body: Any, delivery: Delivery) -> None:
            attempts.append(delivery.attempt)

        async with worker:
            await anyio.to_thread.run_sync(new_task, url, *[b"y"] * 20)
            await eventually(lambda: len(pika_worker.seen) + len(attempts) >= 22)
    assert attempts


async def test_their_queue_checked_only(url: str) -> None:
    """With declare=False a queue that pika has not declared yet is an error that names it."""
    worker = Worker(url)
    worker.handler(Queue("task_queue", declare=False))(print)
    with pytest.raises(TopologyError, match="'task_queue' cannot be used: NOT_FOUND"):
        await worker.run()
