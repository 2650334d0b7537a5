"""Carrying out an outcome: the only place that settles a handled delivery.

The order never changes: what has to be published is published and confirmed first, then the
original is acked. A crash in between leaves two messages, never none. What cannot be published
leaves the original where it was.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import anyio

from aioworkq.delays import DelayQueues
from aioworkq.errors import UnroutableError, WorkQueueError
from aioworkq.message import (
    ATTEMPTS,
    FIRST_FAILURE,
    LAST_FAILURE,
    dead_letter_headers,
    is_counted_by_broker,
)
from aioworkq.outcome import Ack, DeadLetter, Outcome, Requeue, Retry
from aioworkq.topology import declarations

if TYPE_CHECKING:
    from aioworkq.broker import Connection, Subscription
    from aioworkq.message import Delivery, Message
    from aioworkq.outbox import Outbox
    from aioworkq.topology import Queue

_log = logging.getLogger("aioworkq")

_STOPPING_TIMEOUT: Final = 5.0
_FAILED_COPY_PAUSE: Final = 5.0
_SHORTEST_DELAY: Final = 0.125


@dataclass(slots=True, eq=False)
class Unsettled:
    """A delivery that has to be settled, exactly once.

    Attributes:
        delivery: What the handler sees.
        subscription: Where it came from, and the only place that may settle it.
        tag: Its number there.
        used: How many attempts were used up before it.
    """

    delivery: Delivery
    subscription: Subscription
    tag: int
    used: int
    is_settled: bool = False


@dataclass(slots=True)
class Counts:
    """What became of the deliveries of one consumer."""

    handled: int = 0
    failed: int = 0
    requeued: int = 0
    retried: int = 0
    dead_lettered: int = 0
    discarded: int = 0
    stale_settles: int = 0
    failed_copies: int = 0


class Settler:
    """Settles the deliveries of one consumer.

    Args:
        queue: The consumer's queue.
        connection: Where its queue is declared again when a copy finds none.
        outbox: What copies are published through.
        stopping: Set once the worker stops: then nothing waits for long.
        timeout: Seconds that a copy may take to be confirmed.
    """

    def __init__(
        self,
        queue: Queue[Any],
        *,
        connection: Connection,
        outbox: Outbox,
        stopping: anyio.Event,
        timeout: float,
    ) -> None:
        self._queue = queue
        self._connection = connection
        self._outbox = outbox
        self._stopping = stopping
        self._timeout = timeout
        self._delays = DelayQueues(connection)
        self.counts = Counts()

    async def settle(self, unsettled: Unsettled, outcome: Outcome) -> bool:
        """Carry out the outcome of a delivery; called once for each.

        Returns:
            Whether it was carried out: False when the channel was lost before, and RabbitMQ has
            requeued the message by itself. True for a copy that is confirmed, even when the ack of
            the original came too late.

        Raises:
            RuntimeError: It was settled already: a bug of the library.
        """
        if unsettled.is_settled:
            raise RuntimeError(f"{unsettled.delivery!r} was settled already.")
        unsettled.is_settled = True
        if unsettled.subscription.is_lost:
            self.counts.stale_settles += 1
            return False
        match outcome:
            case Ack():
                done = unsettled.subscription.ack(unsettled.tag)
                self.counts.stale_settles += not done
            case Requeue():
                done = await self._requeue(unsettled, outcome)
            case Retry():
                done = await self._retry(unsettled, outcome)
            case DeadLetter():
                done = await self._dead_letter(unsettled, outcome)
        return done

    def _ack(self, unsettled: Unsettled) -> None:
        """Ack the original of a confirmed copy; too late, it leaves two, and is counted."""
        if not unsettled.subscription.ack(unsettled.tag):
            self.counts.stale_settles += 1

    def _give_back(self, unsettled: Unsettled, *, counts: bool) -> bool:
        done = unsettled.subscription.requeue(unsettled.tag, counts=counts)
        self.counts.requeued += done
        self.counts.stale_settles += not done
        return done

    async def _requeue(self, unsettled: Unsettled, outcome: Requeue) -> bool:
        """Give a message back, counted as an attempt or not.

        Not every queue can do both by itself. A classic queue knows only that a message was
        returned at all, so a second attempt is written into a copy. A quorum queue before
        RabbitMQ 4.3 counts every return, so one that is no attempt is a copy as well.
        """
        delivery, queue = unsettled.delivery, self._queue
        if outcome.counts:
            is_classic = not is_counted_by_broker(delivery.message.headers)
            needs_copy = is_classic and delivery.redelivered
            used = delivery.attempt
        else:
            needs_copy = queue.type == "classic" or self._connection.counts_nacks
            used = unsettled.used
        if needs_copy and await self._copy_back(unsettled, used=used):
            self.counts.requeued += 1
            self._ack(unsettled)
            return True
        return self._give_back(unsettled, counts=outcome.counts)

    async def _copy_back(self, unsettled: Unsettled, *, used: int) -> bool:
        message = unsettled.delivery.message
        headers = {**message.headers, ATTEMPTS: used}
        if not used:
            del headers[ATTEMPTS]
        return await self._publish(message.copy_to(self._queue.name, headers))

    async def _retry(self, unsettled: Unsettled, outcome: Retry) -> bool:
        """Let a copy wait in the broker, for at least an eighth of a second."""
        delivery = unsettled.delivery
        now = datetime.now(UTC)
        headers = {FIRST_FAILURE: now, **delivery.message.headers, LAST_FAILURE: now}
        headers[ATTEMPTS] = delivery.attempt if outcome.counts else unsettled.used
        copy = delivery.message.copy_to(self._queue.name, headers)
        # In a delay queue an expiration would end the delay.
        copy.expiration = None
        if not await self._publish(copy, delay=max(outcome.delay, _SHORTEST_DELAY)):
            return await self._put_back(unsettled)
        self._ack(unsettled)
        self.counts.retried += 1
        return True

    async def _dead_letter(self, unsettled: Unsettled, outcome: DeadLetter) -> bool:
        delivery = unsettled.delivery
        headers = dead_letter_headers(
            delivery.message.headers,
            queue=self._queue.name,
            attempts=delivery.attempt,
            reason=outcome.reason,
            failure=outcome.failure,
            now=datetime.now(UTC),
        )
        dead = delivery.message.copy_to(self._queue.dead_letter_queue, headers)
        dead.expiration = None
        if not await self._publish(dead):
            return await self._put_back(unsettled)
        self._ack(unsettled)
        self.counts.dead_lettered += 1
        _log.warning(
            "%r was dead-lettered to %r: %s.",
            delivery,
            self._queue.dead_letter_queue,
            outcome.reason,
        )
        return True

    async def _put_back(self, unsettled: Unsettled) -> bool:
        """Return a message whose copy could not be published; wait a little, so as not to spin."""
        self.counts.failed_copies += 1
        with anyio.move_on_after(_FAILED_COPY_PAUSE):
            await self._stopping.wait()
        return self._give_back(unsettled, counts=False)

    async def _publish(self, copy: Message, *, delay: float = 0.0) -> bool:
        """Publish a copy and say whether it is confirmed. Never raises an error."""
        timeout = _STOPPING_TIMEOUT if self._stopping.is_set() else self._timeout
        try:
            try:
                await self._publish_once(copy, delay, timeout)
            except UnroutableError:
                # A queue was deleted since it was declared.
                self._delays.forget()
                await self._connection.declare(declarations(self._queue), timeout=timeout)
                await self._publish_once(copy, delay, timeout)
        except (WorkQueueError, ValueError, TypeError) as exc:
            _log.error(
                "A copy of message %s to queue %r could not be published; "
                "the original goes back to its queue: %s",
                copy.message_id or "without id",
                copy.queue,
                exc,
            )
            return False
        return True

    async def _publish_once(self, copy: Message, delay: float, timeout: float) -> None:
        if delay:
            await self._delays.send_off(copy, delay, timeout=timeout)
        deadline = anyio.current_time() + timeout
        await self._outbox.publish(copy, self._outbox.connection.prepare(copy), deadline=deadline)
