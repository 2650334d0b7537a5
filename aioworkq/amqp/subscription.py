"""One consumer on a channel of its own: deliveries in, acks and requeues out.

What is settled is sent once per step of the event loop: requeues first, then one
``ack(multiple=True)`` over the longest run of finished deliveries from the oldest on, and single
acks above a gap, so that one slow message does not hold the prefetch window. RabbitMQ takes a
multiple ack only for a tag that is itself outstanding, which the last of such a run always is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import anyio
from aiormq.exceptions import AMQPError
from pamqp import commands as spec

from aioworkq.amqp.declare import rpc
from aioworkq.amqp.publish_channel import close_bounded
from aioworkq.amqp.tap import Content, FrameTap
from aioworkq.amqp.translate import closing_exception, describe, guarded
from aioworkq.amqp.wire import ack_frame, message_from, requeue_frame
from aioworkq.amqp.writer import TickWriter
from aioworkq.errors import WorkQueueError

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiormq.abc import AbstractChannel
    from pamqp.commands import Basic

    from aioworkq.broker import Incoming, Subscription
    from aioworkq.message import Message

_log = logging.getLogger("aioworkq")

_QUORUM_COMMANDS: Final = 32
"""So many commands to a quorum queue a channel lets be under way at a time
(RabbitMQ's ``quorum_commands_soft_limit``)."""


class _Consume(spec.Basic.Consume):
    """Without pamqp's own idea of what a queue may be called: RabbitMQ takes any text."""

    def validate(self) -> None:
        """Leave it to RabbitMQ."""


@dataclass(slots=True, eq=False)
class AmqpIncoming:
    """One delivery, as it came."""

    message: Message
    tag: int
    redelivered: bool


class AmqpSubscription:
    """The `aioworkq.broker.Subscription` of RabbitMQ."""

    def __init__(
        self,
        channel: AbstractChannel,
        queue: str,
        *,
        on_delivery: Callable[[Subscription, Incoming], None],
    ) -> None:
        self._channel = channel
        self._queue = queue
        self._on_delivery = on_delivery
        self._outstanding: dict[int, None] = {}
        self._acked: set[int] = set()
        self._requeues: list[tuple[int, bool]] = []
        self._writer = TickWriter(channel, self._take_settled)
        self._lost = asyncio.Event()
        self._reason = ""
        self._consumer_tag: str | None = None
        self._returned = 0
        self._is_flushing = False
        FrameTap(channel, on_content=self._on_content)
        self._closing = channel.closing
        self._closing.add_done_callback(self._on_closing)
        channel.on_consumer_cancel_callbacks.add(self._on_cancelled_by_broker)

    async def consume(self, *, prefetch_count: int, timeout: float) -> None:
        """Set the prefetch and subscribe.

        Raises:
            ConnectionLostError: The channel ended, or no answer came in time.
            ChannelClosed: The broker refuses.
        """
        await self._consume({}, prefetch_count=prefetch_count, timeout=timeout)

    async def _consume(
        self, arguments: dict[str, Any], *, prefetch_count: int, timeout: float
    ) -> None:
        what = f"consuming from queue {self._queue!r}"
        qos = self._channel.basic_qos(prefetch_count=prefetch_count)
        await guarded(qos, self._channel, timeout=timeout, what=what)
        # As aiormq's basic_consume does it, but with a name that only RabbitMQ judges.
        tag = f"aioworkq.{uuid.uuid4().hex}"
        getattr(self._channel, "consumers")[tag] = _never_called  # noqa: B009 - not in the ABC
        frame = _Consume(queue=self._queue, consumer_tag=tag, arguments=arguments)
        consume = rpc(self._channel, frame)
        answer = await guarded(consume, self._channel, timeout=timeout, what=what)
        self._consumer_tag = answer.consumer_tag

    def _on_content(self, method: Content, properties: Basic.Properties, body: bytes) -> None:
        tag = getattr(method, "delivery_tag", None)
        if tag is None or self._lost.is_set():
            return
        message = message_from(
            properties,
            body,
            queue=self._queue,
            exchange=method.exchange or "",
            routing_key=method.routing_key or "",
        )
        self._outstanding[tag] = None
        if self._is_flushing:
            self.requeue(tag, counts=False)
            return
        self._on_delivery(
            self, AmqpIncoming(message, tag, bool(getattr(method, "redelivered", False)))
        )

    @property
    def is_lost(self) -> bool:
        """Whether the channel or the consumer is gone."""
        return self._lost.is_set()

    @property
    def reason(self) -> str:
        """Why it is lost; empty while it is not."""
        return self._reason

    def ack(self, tag: int) -> bool:
        """Acknowledge one delivery; see the protocol."""
        if self._lost.is_set() or tag in self._acked or tag not in self._outstanding:
            return False
        self._acked.add(tag)
        self._writer.wake()
        return True

    def requeue(self, tag: int, *, counts: bool) -> bool:
        """Give one delivery back; see the protocol."""
        if self._lost.is_set() or tag in self._acked or self._outstanding.pop(tag, 0) == 0:
            return False
        self._requeues.append((tag, counts))
        self._returned += 1
        self._writer.wake()
        return True

    def _take_settled(self) -> bytes:
        number, acked, outstanding = self._channel.number, self._acked, self._outstanding
        frames = [requeue_frame(number, tag, counts=counts) for tag, counts in self._requeues]
        self._requeues.clear()
        if not acked:
            return b"".join(frames)
        prefix: list[int] = []
        for tag in outstanding:
            if tag not in acked:
                break
            prefix.append(tag)
        if prefix:
            frames.append(ack_frame(number, prefix[-1], multiple=len(prefix) > 1))
            acked.difference_update(prefix)
            for tag in prefix:
                del outstanding[tag]
        for tag in sorted(acked):
            frames.append(ack_frame(number, tag, multiple=False))
            del outstanding[tag]
        acked.clear()
        return b"".join(frames)

    async def _on_cancelled_by_broker(self, _: Basic.Cancel) -> None:
        # Called inside the channel's reader: an RPC on this channel would deadlock here.
        self._set_lost("RabbitMQ cancelled the consumer: its queue was deleted or moved")

    def _on_closing(self, future: asyncio.Future[Any]) -> None:
        self._set_lost(describe(closing_exception(future)))

    def _set_lost(self, reason: str) -> None:
        if self._lost.is_set():
            return
        self._reason = reason
        self._writer.close()
        self._lost.set()

    async def wait_lost(self) -> str:
        """Wait until the subscription is gone, and return why."""
        await self._lost.wait()
        return self._reason

    async def cancel(self, *, timeout: float) -> None:
        """Ask for no more deliveries, and wait until the broker agrees. Bounded, twice harmless."""
        consumer_tag, self._consumer_tag = self._consumer_tag, None
        if self._lost.is_set() or consumer_tag is None:
            return
        self._returned = 0
        # With an answer (no nowait): what comes before it is still handed over.
        cancel = self._channel.basic_cancel(consumer_tag)
        what = "cancelling a consumer"
        try:
            await guarded(cancel, self._channel, timeout=timeout, what=what)
        except (WorkQueueError, OSError, RuntimeError) as exc:
            self._set_lost(str(exc))
        except Exception as exc:  # aiormq's own: the channel is gone
            self._set_lost(describe(exc))

    async def resume(self, *, prefetch_count: int, timeout: float) -> None:
        """Ask for deliveries again; see the protocol."""
        if self._lost.is_set() or self._consumer_tag is not None:
            return
        try:
            await self.consume(prefetch_count=prefetch_count, timeout=timeout)
        except (WorkQueueError, OSError, RuntimeError) as exc:
            self._set_lost(str(exc))
        except AMQPError as exc:
            self._set_lost(describe(exc))

    async def aclose(self, *, timeout: float) -> None:
        """Send what is settled, then close the channel. Bounded, twice harmless."""
        if not self._lost.is_set():
            with anyio.CancelScope(shield=True), anyio.move_on_after(timeout):
                await self._writer.wait_idle()
                if self._returned >= _QUORUM_COMMANDS:
                    await self._flush(timeout=timeout)
        await close_bounded(self._channel, timeout=timeout)
        self._set_lost("closed by this worker")

    async def _flush(self, *, timeout: float) -> None:
        """Wait until a quorum queue has taken back all that was returned.

        A channel keeps what exceeds its limit of commands to a quorum queue, and forgets it when
        it is closed: RabbitMQ 4.3 would then count these deliveries as failures. To subscribe and
        to cancel are commands that are answered once the queue has executed them, and so all that
        came before. What is handed over meanwhile, if no other consumer takes it, goes back.
        """
        self._is_flushing = True
        with contextlib.suppress(WorkQueueError, OSError, RuntimeError, AMQPError):
            await self._consume({"x-priority": -1000}, prefetch_count=1, timeout=timeout)
            await self.cancel(timeout=timeout)
            await self._writer.wait_idle()


async def _never_called(_: object) -> None:
    """Stand where aiormq wants a consumer callback; the tap takes every delivery before it."""
