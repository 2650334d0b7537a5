"""Messages taken one by one: basic.get on a channel of its own.

The answers are read by ourselves: pamqp cannot decode every property that another client may have
written, and the connection would end with it.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from aiormq import exceptions as aiormq_errors

from aioworkq.amqp.decode import got_of, message_from, message_of, route_of
from aioworkq.amqp.publish_channel import close_bounded
from aioworkq.amqp.reader import Content, Tap
from aioworkq.amqp.translate import describe, guarded, refusal
from aioworkq.amqp.wire import get_frame
from aioworkq.broker import Incoming
from aioworkq.errors import ConnectionLostError

if TYPE_CHECKING:
    from aiormq.abc import AbstractChannel

    from aioworkq.amqp.transport import Link

_TAKING: Final = "taking a message"


class AmqpGetter:
    """The `aioworkq.broker.Getter` of RabbitMQ.

    Args:
        channel: A channel of its own.
        queue: The queue.
        link: Where it reads and writes; None for documented calls of aiormq alone.
    """

    def __init__(self, channel: AbstractChannel, queue: str, *, link: Link | None) -> None:
        self._channel = channel
        self._queue = queue
        self._link = link
        self._tap = Tap(on_get=self._on_get)
        self._answer: asyncio.Future[Content | None] | None = None
        if link is not None:
            link.reader.tap(channel.number, self._tap)

    def _on_get(self, content: Content | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(content)

    async def get(self, *, timeout: float) -> Incoming | None:
        """Take the next message; see the protocol."""
        call = self._get_documented() if self._link is None else self._get(self._link)
        try:
            return await guarded(call, self._channel, timeout=timeout, what=_TAKING)
        except aiormq_errors.ChannelClosed as exc:
            raise refusal(exc, self._queue, what=_TAKING) from exc

    async def _get(self, link: Link) -> Incoming | None:
        self._answer = asyncio.get_running_loop().create_future()
        if not (self._channel.is_closed or self._tap.has_close):
            link.write(get_frame(self._channel.number, self._queue))
        content = await self._answer  # none comes from a closed channel: `guarded` says why
        if content is None:
            return None
        tag, redelivered, route = got_of(content.method)
        exchange, routing_key = route_of(route)
        message = message_of(
            content.properties,
            content.body,
            queue=self._queue,
            exchange=exchange,
            routing_key=routing_key,
        )
        return Incoming(message, tag, redelivered)

    async def _get_documented(self) -> Incoming | None:
        got = await self._channel.basic_get(self._queue)
        if got.delivery_tag is None:
            return None
        message = message_from(
            got.header.properties,
            got.body,
            queue=self._queue,
            exchange=got.exchange or "",
            routing_key=got.routing_key or "",
        )
        return Incoming(message, got.delivery_tag, bool(got.redelivered))

    async def ack(self, tag: int, *, timeout: float) -> None:
        """Acknowledge one message; see the protocol."""

        async def ack() -> None:
            await self._channel.basic_ack(tag)

        try:
            await guarded(ack(), self._channel, timeout=timeout, what="acknowledging a message")
        except aiormq_errors.AMQPError as exc:
            raise ConnectionLostError("acknowledging a message", reason=describe(exc)) from exc

    async def aclose(self, *, timeout: float) -> None:
        """Give back what was not acknowledged; see the protocol."""
        await close_bounded(self._channel, timeout=timeout, close=self._give_back)

    async def _give_back(self) -> None:
        # To a quorum queue each basic.get is a consumer of its own. When a channel ends it takes
        # back theirs in the order of their numbers as text: 1, 10, 11, 2. A nack keeps the order.
        try:
            await self._channel.basic_nack(0, multiple=True)
        finally:
            await self._channel.close()
