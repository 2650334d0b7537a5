"""Side by side with pika: the same queue, either who comes first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import pika
import pytest

from aioworkq import Delivery, Producer, Queue, Worker

if TYPE_CHECKING:
    from collections.abc import Callable

    from pika.adapters.blocking_connection import BlockingChannel

pytestmark = pytest.mark.anyio

TASKS = Queue("task_queue", bytes, type="classic")


async def in_thread(work: Callable[[BlockingChannel], None], url: str) -> None:
    """Run a piece of a pika program: a connection, its channel, done."""

    def program() -> None:
        connection = pika.BlockingConnection(pika.URLParameters(url))
        work(connection.channel())
        connection.close()

    await anyio.to_thread.run_sync(program)


def new_task(channel: BlockingChannel) -> None:
    """The publisher of RabbitMQ's tutorial."""
    channel.queue_declare(queue="task_queue", durable=True)
    for number in range(5):
        channel.basic_publish(
            exchange="",
            routing_key="task_queue",
            body=f"task {number}",
            properties=pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent),
        )


def declare(channel: BlockingChannel) -> None:
    channel.queue_declare(queue="task_queue", durable=True)


@pytest.mark.parametrize("pika_first", [True, False])
async def test_our_worker_handles_what_pika_published(
    url: str,
    pika_first: bool,  # noqa: FBT001 - a table's column
) -> None:
    """Either declares the queue first; the declarations agree."""
    if pika_first:
        await in_thread(new_task, url)
    worker = Worker(url)
    seen: list[bytes] = []
    done = anyio.Event()

    @worker.handler(TASKS)
    async def handle(body: bytes, delivery: Delivery) -> None:
        assert delivery.attempt == 1
        seen.append(body)
        if len(seen) == 5:
            done.set()

    async with worker:
        if not pika_first:
            await in_thread(new_task, url)
        with anyio.fail_after(30):
            await done.wait()
    assert sorted(seen) == [f"task {number}".encode() for number in range(5)]


@pytest.mark.parametrize("pika_first", [True, False])
async def test_pika_consumes_what_we_published(
    url: str,
    pika_first: bool,  # noqa: FBT001 - a table's column
) -> None:
    """The body as it is, persistent, with an id and a content type."""
    if pika_first:
        await in_thread(declare, url)
    async with Producer(url) as producer:
        sent = await producer.publish(TASKS, b"Hello World!", headers={"kind": "greeting"})
    got: list[tuple[bytes, pika.BasicProperties]] = []

    def consume(channel: BlockingChannel) -> None:
        channel.queue_declare(queue="task_queue", durable=True)
        for method, properties, body in channel.consume("task_queue", inactivity_timeout=10):
            assert method is not None, "nothing came"
            assert body is not None
            assert properties is not None
            got.append((body, properties))
            channel.basic_ack(method.delivery_tag)
            break
        channel.cancel()

    await in_thread(consume, url)
    ((body, properties),) = got
    assert body == b"Hello World!"
    assert properties.delivery_mode == 2
    assert properties.message_id == sent
    assert properties.headers == {"kind": "greeting"}
    assert properties.content_type == "application/octet-stream"


async def test_text_has_no_quotes_for_others(url: str) -> None:
    """A str body is plain text, not JSON."""
    async with Producer(url) as producer:
        await producer.publish(Queue("texts", str, type="classic"), "Hello")
    got: list[bytes] = []

    def consume(channel: BlockingChannel) -> None:
        _, _, body = channel.basic_get("texts", auto_ack=True)
        assert body is not None
        got.append(body)

    await in_thread(consume, url)
    assert got == [b"Hello"]
