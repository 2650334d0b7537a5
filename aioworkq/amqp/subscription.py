"""One consumer on a channel of its own: deliveries in, acks and requeues out.

What is settled is sent once per step of the event loop: requeues first, then one
``ack(multiple=True)`` over the longest run of finished deliveries from the oldest on, and single
acks above a gap, so that one slow message does not hold the prefetch window. RabbitMQ takes a
multiple ack only for a tag that is itself outstanding, which the last of such a run always is.

``documented.py`` does the same by documented calls of aiormq alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import anyio
from aiormq.exceptions import AMQPError
from pamqp import commands as spec

from aioworkq.amqp.declare import look_for, rpc
from aioworkq.amqp.decode import delivery_of, message_of, route_of
from aioworkq.amqp.publish_channel import close_bounded
from aioworkq.amqp.reader import Content, Tap
from aioworkq.amqp.translate import closing_exception, describe, guarded
from aioworkq.amqp.wire import ack_frame, requeue_frame
from aioworkq.amqp.writer import TickWriter
from aioworkq.broker import Incoming
from aioworkq.errors import WorkQueueError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from aiormq.abc import AbstractChannel
    from pamqp.commands import Basic

    from aioworkq.amqp.transport import Link
    from aioworkq.amqp.writer import Writer
    from aioworkq.broker import Subscription

_log = logging.getLogger("aioworkq")

_LONGEST_LANDING: Final = 1.0
_QUORUM_COMMANDS: Final = 32
"""So many commands to a quorum queue a channel lets be under way at a time
(RabbitMQ's ``quorum_commands_soft_limit``)."""

Settle: TypeAlias = tuple[Literal["ack", "reject", "nack"], int, bool]
"""What to do with a delivery, its number, and whether an ack is for all up to it."""


class _Consume(spec.Basic.Consume):
    """Without pamqp's own idea of what a queue may be called: RabbitMQ takes any text."""

    def validate(self) -> None:
        """Leave it to RabbitMQ."""


class AmqpSubscription:
    """The `aioworkq.broker.Subscription` of RabbitMQ."""

    def __init__(
        self,
        channel: AbstractChannel,
        queue: str,
        *,
        link: Link | None,
        charges_returns: bool,
        on_delivery: Callable[[Subscription, Incoming], None],
    ) -> None:
        self._channel = channel
        self._queue = queue
        self._on_delivery = on_delivery
        self._outstanding: dict[int, None] = {}
        self._acked: set[int] = set()
        self._requeues: list[tuple[int, bool]] = []
        self._route = b""
        self._exchange = self._routing_key = ""
        self._writer = self.attach(link)
        self._lost = asyncio.Event()
        self._reason = ""
        self._consumer_tag: str | None = None
        self._charges_returns = charges_returns
        self._prefetch_count = 0
        self._is_holding = False
        self._no_cancel = asyncio.Event()
        self._no_cancel.set()
        self._returned = 0
        self._is_flushing = False
        self._closing = channel.closing
        self._closing.add_done_callback(self._on_closing)
        channel.on_consumer_cancel_callbacks.add(self._on_cancelled_by_broker)

    def attach(self, link: Link | None) -> Writer:
        """Have deliveries come, and return what sends."""
        if link is None:
            raise TypeError("this subscription needs the link of its connection.")
        tap = Tap(on_delivery=self._on_content)
        link.reader.tap(self._channel.number, tap)
        return TickWriter(link, tap, self._frames)

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
        self._prefetch_count = prefetch_count
        qos = self._channel.basic_qos(prefetch_count=prefetch_count)
        await guarded(qos, self._channel, timeout=timeout, what=what)
        consume = self.consumption(f"aioworkq.{uuid.uuid4().hex}", arguments)
        answer = await guarded(consume, self._channel, timeout=timeout, what=what)
        self._consumer_tag = answer.consumer_tag

    def consumption(self, tag: str, arguments: dict[str, Any]) -> Coroutine[Any, Any, Any]:
        """Return the call that subscribes."""
        # As aiormq's basic_consume does it, but with a name that only RabbitMQ judges.
        getattr(self._channel, "consumers")[tag] = _never_called  # noqa: B009 - not in the ABC
        return rpc(
            self._channel, _Consume(queue=self._queue, consumer_tag=tag, arguments=arguments)
        )

    def _on_content(self, content: Content) -> None:
        tag, redelivered, route = delivery_of(content.method)
        if route != self._route:
            self._route = route
            self._exchange, self._routing_key = route_of(route)
        if self._lost.is_set():
            return
        message = message_of(
            content.properties,
            content.body,
            queue=self._queue,
            exchange=self._exchange,
            routing_key=self._routing_key,
        )
        self.deliver(Incoming(message, tag, redelivered))

    def deliver(self, incoming: Incoming) -> None:
        """Hand on one delivery."""
        self._outstanding[incoming.tag] = None
        if self._is_flushing:
            self.requeue(incoming.tag, counts=False)
        else:
            self._on_delivery(self, incoming)

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

    def _frames(self) -> bytes:
        number = self._channel.number
        return b"".join(
            ack_frame(number, tag, multiple=multiple)
            if verb == "ack"
            else requeue_frame(number, tag, counts=verb == "reject")
            for verb, tag, multiple in self.take_settled()
        )

    def take_settled(self) -> list[Settle]:
        """Return what is to be told to the broker now, in order, and forget it."""
        acked, outstanding = self._acked, self._outstanding
        if self._is_holding:
            return []
        settled: list[Settle] = [
            ("reject" if counts else "nack", tag, False) for tag, counts in self._requeues
        ]
        self._requeues.clear()
        if not acked:
            return settled
        prefix: list[int] = []
        for tag in outstanding:
            if tag not in acked:
                break
            prefix.append(tag)
        if prefix:
            settled.append(("ack", prefix[-1], len(prefix) > 1))
            acked.difference_update(prefix)
            for tag in prefix:
                del outstanding[tag]
        for tag in sorted(acked):
            settled.append(("ack", tag, False))
            del outstanding[tag]
        acked.clear()
        return settled

    async def _on_cancelled_by_broker(self, _: Basic.Cancel) -> None:
        # Called inside the channel's reader: an RPC on this channel would deadlock here.
        self._set_lost(
            "RabbitMQ cancelled the consumer: its queue was deleted or moved, or a delivery was "
            "not settled within the consumer_timeout"
        )

    def _on_closing(self, future: asyncio.Future[Any]) -> None:
        self._set_lost(describe(closing_exception(future)))

    def _set_lost(self, reason: str) -> None:
        if self._lost.is_set():
            return
        self._reason = reason
        self._writer.close()
        self._lost.set()

    async def wait_sent(self) -> None:
        """Wait until all that was settled is written; see the protocol."""
        await self._no_cancel.wait()  # which may hold it up
        await self._writer.wait_idle()

    async def wait_lost(self) -> str:
        """Wait until the subscription is gone, and return why."""
        await self._lost.wait()
        return self._reason

    async def cancel(self, *, timeout: float) -> None:
        """Ask for no more deliveries, and wait until the broker agrees. Bounded, twice harmless."""
        consumer_tag, self._consumer_tag = self._consumer_tag, None
        if consumer_tag is None:
            await self._no_cancel.wait()
            return
        if self._lost.is_set():
            return
        self._no_cancel.clear()
        self._returned = 0
        what = "cancelling a consumer"
        try:
            if self._charges_returns and not self._is_flushing:
                await self._let_land(timeout=timeout)
            # With an answer (no nowait): what comes before it is still handed over.
            cancel = self._channel.basic_cancel(consumer_tag)
            await guarded(cancel, self._channel, timeout=timeout, what=what)
        except (WorkQueueError, OSError, RuntimeError) as exc:
            self._set_lost(str(exc))
        except Exception as exc:  # aiormq's own: the channel is gone
            self._set_lost(describe(exc))
        finally:
            self._is_holding = False
            self._writer.wake()
            self._no_cancel.set()

    async def _let_land(self, *, timeout: float) -> None:
        """Wait until no delivery is on its way, bounded.

        What a quorum queue has assigned to a consumer and the channel has not seen when that is
        cancelled, it takes back; before RabbitMQ 4.3 it counts that as a delivery. So nothing that
        is settled is told meanwhile, which would make room for more, until the prefetch is full or
        the queue has no more. Each look at the queue comes back behind what the queue has sent.
        """
        self._is_holding = True
        deadline = anyio.current_time() + _LONGEST_LANDING
        while anyio.current_time() < deadline:
            ready = await look_for(self._channel, self._queue, timeout=timeout)
            if not ready or len(self._outstanding) + len(self._requeues) >= self._prefetch_count:
                return

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
                await self.wait_sent()
                if self._returned >= _QUORUM_COMMANDS and not self._charges_returns:
                    await self._flush(timeout=timeout)
        # Behind a Channel.Close nothing may be settled: RabbitMQ would close the connection.
        self._set_lost("closed by this worker")
        await close_bounded(self._channel, timeout=timeout)

    async def _flush(self, *, timeout: float) -> None:
        """Wait until a quorum queue has taken back all that was returned.

        A channel keeps what exceeds its limit of commands to a quorum queue, and forgets it when
        it is closed: RabbitMQ 4.3 would then count these deliveries as failures. To subscribe and
        to cancel are commands that are answered once the queue has executed them, and so all that
        came before. What is handed over meanwhile, if no other consumer takes it, goes back.
        Earlier versions would count that, and need none of this.
        """
        self._is_flushing = True
        with contextlib.suppress(WorkQueueError, OSError, RuntimeError, AMQPError):
            await self._consume({"x-priority": -1000}, prefetch_count=1, timeout=timeout)
            await self.cancel(timeout=timeout)
            await self._writer.wait_idle()


async def _never_called(_: object) -> None:
    """Stand where aiormq wants a consumer callback; the tap takes every delivery before it."""
