"""What the tests of the consuming half share: a look from beside, and waiting for facts."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from typing import TYPE_CHECKING, Any, Self

import aiormq
import anyio.to_thread
import pika
from pamqp.commands import Basic

from tests.nodes import write_down

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable
    from types import TracebackType

    from aiormq.abc import AbstractChannel, AbstractConnection, DeliveredMessage

    from aioworkq import Producer, Queue
    from aioworkq.testing import RabbitMQ

PATIENCE = 30.0
"""Seconds within which a fact must come true. On a machine that is not overloaded it takes few."""


async def eventually(
    fact: Callable[..., Any],
    *arguments: Any,
    timeout: float = PATIENCE,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Wait until a function, or a coroutine function, returns something true."""
    pause = 0.001
    async with asyncio.timeout(timeout):
        while True:
            value = fact(*arguments)
            if inspect.isawaitable(value):
                value = await value
            if value:
                return
            await sleep(pause)
            pause = min(0.01, 2 * pause)


class Broker:
    """A plain connection beside what is tested: looks into queues, and puts messages there."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._connection: AbstractConnection | None = None
        self._channel: AbstractChannel | None = None

    async def __aenter__(self) -> Self:
        self._connection = await aiormq.connect(self._url)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._connection is not None:
            await self._connection.close()

    async def _open(self) -> AbstractChannel:
        """Return a channel: another one, when the last one was closed by an error."""
        assert self._connection is not None
        if self._channel is None or self._channel.is_closed:
            self._channel = await self._connection.channel()
        return self._channel

    async def declare(self, queue: str, **arguments: Any) -> None:
        channel = await self._open()
        await channel.queue_declare(queue, durable=True, arguments=arguments)

    async def declare_exchange(self, exchange: str, kind: str) -> None:
        await (await self._open()).exchange_declare(exchange, exchange_type=kind, durable=True)

    async def delete(self, queue: str) -> None:
        await (await self._open()).queue_delete(queue)

    async def publish(self, queue: str, body: bytes, **properties: Any) -> None:
        """Publish as a client does that knows nothing of aioworkq; return once it is confirmed."""
        confirm = await (await self._open()).basic_publish(
            body,
            routing_key=queue,
            mandatory=True,
            properties=Basic.Properties(delivery_mode=2, **properties),
        )
        assert isinstance(confirm, Basic.Ack)

    async def publish_raw(self, queue: str, body: bytes, properties: bytes) -> None:
        """Publish with these flags and values of properties, whatever they say."""

        class Raw(Basic.Properties):
            def marshal(self) -> bytes:
                return properties

        channel = await self._open()
        confirm = await channel.basic_publish(body, routing_key=queue, properties=Raw())
        assert isinstance(confirm, Basic.Ack)

    async def exists(self, queue: str) -> bool:
        try:
            await (await self._open()).queue_declare(queue, passive=True)
        except aiormq.exceptions.ChannelNotFoundEntity:
            return False
        return True

    async def ready(self, queue: str) -> int:
        """Return how many messages wait in a queue; those handed over are not counted."""
        answer = await (await self._open()).queue_declare(queue, passive=True)
        return answer.message_count or 0

    async def consumers(self, queue: str) -> int:
        answer = await (await self._open()).queue_declare(queue, passive=True)
        return answer.consumer_count or 0

    async def take(self, queue: str, *, timeout: float = PATIENCE) -> DeliveredMessage:
        """Take one message, which must come."""
        taken: list[DeliveredMessage] = []

        async def get() -> bool:
            taken.extend(await self.take_all(queue, limit=1))
            return bool(taken)

        await eventually(get, timeout=timeout)
        return taken[0]

    async def take_and_lose(self, queue: str) -> None:
        """Have a message handed over, and lose the channel that it came on, unacked."""
        assert self._connection is not None
        channel = await self._connection.channel()

        async def get() -> bool:
            return isinstance((await channel.basic_get(queue)).delivery, Basic.GetOk)

        await eventually(get)
        await channel.close()

    async def take_all(self, queue: str, *, limit: int = 1_000_000) -> list[DeliveredMessage]:
        """Take what waits in a queue."""
        channel = await self._open()
        taken: list[DeliveredMessage] = []
        while len(taken) < limit:
            message = await channel.basic_get(queue, no_ack=True)
            if not isinstance(message.delivery, Basic.GetOk):
                break
            taken.append(message)
        return taken


def headers_of(message: DeliveredMessage) -> dict[str, Any]:
    headers: dict[str, Any] = message.header.properties.headers or {}
    return headers


async def crash(node: RabbitMQ) -> None:
    """Kill a node whose queues are not brand new."""
    await write_down(node)
    await node.kill()


async def channels(node: RabbitMQ, vhost: str) -> list[dict[str, int]]:
    """Return what RabbitMQ says of the channels with consumers in a virtual host."""
    keys = ("consumer_count", "prefetch_count", "messages_unacknowledged")
    binary = f"<<{','.join(map(str, vhost.encode()))}>>"
    asked = ",".join(("vhost", *keys))
    printed = await node.eval(
        f"[[proplists:get_value(K, I) || K <- [{','.join(keys)}]] "
        f"|| I <- rabbit_channel:info_all([{asked}]), "
        f"proplists:get_value(vhost, I) =:= {binary}, "
        "proplists:get_value(consumer_count, I) > 0]",
    )
    rows = [row.split(",") for row in printed.strip("[] \n").split("],[") if row]
    return [dict(zip(keys, map(int, row), strict=True)) for row in rows]


async def publish_all(producer: Producer, queue: Queue[Any] | str, bodies: Iterable[Any]) -> None:
    """Publish many messages, all of which must be confirmed."""
    report = await producer.publish_many(queue, bodies)
    report.raise_for_errors()


async def publish_with_pika(url: str, queue: str, *bodies: bytes, **properties: Any) -> None:
    """Publish as pika does: no message id, no content type, nothing but the body."""

    def publish() -> None:
        with contextlib.closing(pika.BlockingConnection(pika.URLParameters(url))) as connection:
            channel = connection.channel()
            channel.confirm_delivery()
            for body in bodies:
                channel.basic_publish("", queue, body, pika.BasicProperties(**properties))

    await anyio.to_thread.run_sync(publish)
