"""Messages taken one by one: basic.get on a channel of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from aiormq import exceptions as aiormq_errors

from aioworkq.amqp.decode import message_from
from aioworkq.amqp.publish_channel import close_bounded
from aioworkq.amqp.translate import describe, guarded, refusal
from aioworkq.broker import Incoming
from aioworkq.errors import ConnectionLostError

if TYPE_CHECKING:
    from aiormq.abc import AbstractChannel

_TAKING: Final = "taking a message"


class AmqpGetter:
    """The `aioworkq.broker.Getter` of RabbitMQ."""

    def __init__(self, channel: AbstractChannel, queue: str) -> None:
        self._channel = channel
        self._queue = queue

    async def get(self, *, timeout: float) -> Incoming | None:
        """Take the next message; see the protocol."""
        call = self._channel.basic_get(self._queue)
        try:
            got = await guarded(call, self._channel, timeout=timeout, what=_TAKING)
        except aiormq_errors.ChannelClosed as exc:
            raise refusal(exc, self._queue, what=_TAKING) from exc
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
        await close_bounded(self._channel, timeout=timeout)
