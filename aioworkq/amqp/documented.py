"""Publishing and consuming by documented calls of aiormq alone, for a version that lacks a name.

What is confirmed is not lost here either, and every delivery is settled. What differs:

- each publication is a task, and each delivery one of aiormq's;
- of two publications with the same message id, the second is sent once the first is confirmed,
  since aiormq tells returns apart by the id only. Where that takes seconds, a new channel is opened
  for both. A message without an id, which is always a copy of another client's, gets one;
- what the broker refuses by closing the channel may cost the connection, since aiormq goes on to
  write for a moment;
- what goes back at the end of an event loop that nobody stopped may be there twice: the ack of the
  original is a call in a task, which may be cancelled when its copy is on its way already;
- a property that is no UTF-8 cannot be decoded: pamqp fails on the frame, not on the message;
- queues have names that pamqp knows: letters, digits and ``-_.:@#,/><``, and not too many.
"""

from __future__ import annotations

import asyncio
import functools
import uuid
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from aiormq.exceptions import DeliveryError
from msgspec import structs
from pamqp.commands import Basic

from aioworkq.amqp.decode import message_from
from aioworkq.amqp.publish_channel import NEGATIVE, AmqpPublishChannel
from aioworkq.amqp.subscription import AmqpSubscription
from aioworkq.amqp.translate import describe
from aioworkq.amqp.wire import Wire, encode, too_large_header
from aioworkq.amqp.writer import CallWriter
from aioworkq.broker import Confirm, Incoming

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from aiormq.abc import DeliveredMessage

    from aioworkq.amqp.transport import Link
    from aioworkq.amqp.writer import Writer
    from aioworkq.broker import Publication


_TWIN_PATIENCE: Final = 5.0


class _Properties(Basic.Properties):
    """Properties that are encoded already: pamqp rounds floats in headers to 32 bits."""

    def __init__(self, encoded: bytes, message_id: str) -> None:
        super().__init__(message_id=message_id)
        self._encoded = encoded

    def marshal(self) -> bytes:
        """Return what was encoded."""
        return self._encoded


class DocumentedPublishChannel(AmqpPublishChannel):
    """An `AmqpPublishChannel` by documented calls."""

    def attach(self, link: Link | None) -> Writer:  # noqa: ARG002 - there is none
        """Prepare to publish: confirms and returns come to each call."""
        self._queues: dict[str, deque[int]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        return CallWriter(list, lambda _: None)  # there is nothing to be called

    def send(self, publication: Publication) -> None:
        """Send without waiting; see the protocol."""
        self._number += 1
        self._unconfirmed[self._number] = publication
        message_id = publication.message.message_id or f"aioworkq-{self._number}"
        queue = self._queues.setdefault(message_id, deque())
        queue.append(self._number)
        if len(queue) == 1:
            self._publish_soon(message_id)
        elif len(queue) == 2:  # noqa: PLR2004 - the first that waits for another
            self._watch(queue)

    def _watch(self, queue: deque[int]) -> None:
        """Have messages wait for the first with their id for some seconds only."""
        loop = asyncio.get_running_loop()
        loop.call_later(_TWIN_PATIENCE, self._give_up_on, queue, queue[0])

    def _give_up_on(self, queue: deque[int], first: int) -> None:
        """Have all that is unconfirmed sent again elsewhere, if a message still waits for this."""
        if len(queue) > 1 and queue[0] == first and first in self._unconfirmed:
            self.lose("a message with the same id as others is not confirmed")

    def _publish_soon(self, message_id: str) -> None:
        if not self._lost.is_set():
            task = asyncio.get_running_loop().create_task(self._publish_next(message_id))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _publish_next(self, message_id: str) -> None:
        """Publish the first of the messages with an id, and settle it."""
        queue = self._queues[message_id]
        publication = self._unconfirmed.get(queue[0])
        if publication is None:
            return
        try:
            answer, reason = await self._publish(publication)
        except (ValueError, TypeError) as exc:
            answer, reason = Confirm.UNSENDABLE, str(exc)
        except Exception:
            return  # the channel is lost: that tells of all
        if self._unconfirmed.pop(queue.popleft(), None) is not publication:
            return
        if queue:
            self._publish_soon(message_id)
            if len(queue) > 1:
                self._watch(queue)
        else:
            del self._queues[message_id]
        publication.settle(answer, reason)

    async def _publish(self, publication: Publication) -> tuple[Confirm, str]:
        message = publication.message
        wire: Wire = publication.wire
        message_id = message.message_id
        if not message_id:
            message_id = uuid.uuid4().hex
            wire = encode(
                structs.replace(message, message_id=message_id),
                frame_max=self._frame_max,
                max_message_size=len(message.body),
            )
        if len(wire.header) + 8 > self._frame_max:
            raise ValueError(too_large_header(len(wire.header), self._frame_max))
        try:
            await self._channel.basic_publish(
                message.body,
                exchange=message.exchange,
                routing_key=message.routing_key or message.queue,
                properties=_Properties(wire.header[12:], message_id),
                mandatory=True,
            )
        except DeliveryError as exc:
            returned = getattr(exc.message, "delivery", None)
            if isinstance(returned, Basic.Return):
                return Confirm.RETURNED, f"{returned.reply_code} {returned.reply_text}"
            return Confirm.NACK, NEGATIVE
        return Confirm.ACK, ""

    def take_unconfirmed(self) -> list[Publication]:
        """Return what was sent and not answered, in order, and forget it."""
        self._queues.clear()
        for task in self._tasks:
            task.cancel()
        return super().take_unconfirmed()


class DocumentedSubscription(AmqpSubscription):
    """An `AmqpSubscription` by documented calls."""

    def attach(self, link: Link | None) -> Writer:  # noqa: ARG002 - there is none
        """Prepare to settle: deliveries come to the consumer's callback."""
        return CallWriter(self._calls, self._on_failure)

    def _on_failure(self, error: BaseException) -> None:
        if not self._channel.is_closed:  # else its end tells more
            self._set_lost(describe(error))

    def consumption(self, tag: str, arguments: dict[str, Any]) -> Coroutine[Any, Any, Any]:
        """Return the call that subscribes."""
        return self._channel.basic_consume(
            self._queue, self._on_message, consumer_tag=tag, arguments=arguments
        )

    async def _on_message(self, delivered: DeliveredMessage) -> None:
        tag = delivered.delivery_tag
        if tag is None or self._lost.is_set():
            return
        message = message_from(
            delivered.header.properties,
            delivered.body,
            queue=self._queue,
            exchange=delivered.exchange or "",
            routing_key=delivered.routing_key or "",
        )
        self.deliver(Incoming(message, tag, bool(delivered.redelivered)))

    def _calls(self) -> list[Callable[[], Awaitable[None]]]:
        channel = self._channel
        calls: list[Callable[[], Awaitable[None]]] = []
        for verb, tag, multiple in self.take_settled():
            match verb:
                case "ack":
                    calls.append(functools.partial(channel.basic_ack, tag, multiple))
                case "reject":
                    calls.append(functools.partial(channel.basic_reject, tag))
                case "nack":
                    calls.append(functools.partial(channel.basic_nack, tag))
        return calls
