"""Carrying out an outcome: the only place that settles a handled delivery.

The order never changes: what has to be published is published and confirmed first, then the
original is acked. A crash in between leaves two messages, never none. What cannot be published
leaves the original where it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

import anyio
from msgspec import Struct

from aioworkq.delay import MAX_DELAY
from aioworkq.delays import DelayQueues
from aioworkq.errors import (
    ConnectionLostError,
    NotConfirmedError,
    UnroutableError,
    WorkQueueError,
)
from aioworkq.message import (
    ATTEMPTS,
    FIRST_FAILURE,
    LAST_FAILURE,
    TRIAL,
    dead_letter_headers,
    is_counted_by_broker,
)
from aioworkq.outcome import Ack, DeadLetter, Outcome, Requeue, Retry
from aioworkq.topology import declarations

if TYPE_CHECKING:
    from datetime import datetime

    from aioworkq.broker import Connection, Subscription
    from aioworkq.message import Delivery, Message
    from aioworkq.outbox import Outbox
    from aioworkq.topology import Queue

_log = logging.getLogger("aioworkq")

_STOPPING_TIMEOUT: Final = 5.0
_FAILED_COPY_PAUSE: Final = 5.0
_SHORTEST_DELAY: Final = 0.125
_SHORT_REASON: Final = 200


class Unsettled(Struct, eq=False):
    """A delivery that has to be settled, exactly once.

    Attributes:
        delivery: What the handler sees.
        subscription: Where it came from, and the only place that may settle it.
        tag: Its number there.
        used: How many attempts were used up before it.
        was_started: Whether its handler was started.
        first_failure: When an attempt of it first failed in this process, if one did.
    """

    delivery: Delivery
    subscription: Subscription
    tag: int
    used: int
    was_started: bool = False
    first_failure: datetime | None = None
    is_settled: bool = False


class Settled(Enum):
    """What has become of a delivery."""

    LOST = "lost"
    """The channel was lost before: RabbitMQ has requeued it by itself."""
    ACKED = "acked"
    """Gone, or a confirmed copy has taken its place. So it is when the ack came too late."""
    RETURNED = "returned"
    """Back in its queue."""
    OVERCOUNTED = "overcounted"
    """Back in its queue, which counts an attempt that was none."""


class Counts(Struct):
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
        self.connection = connection
        self._outbox = outbox
        self._stopping = stopping
        self._timeout = timeout
        self._delays = DelayQueues(connection)
        self._copying: set[anyio.CancelScope] = set()
        self.counts = Counts()

    def hurry(self) -> None:
        """Let no copy that is under way take longer than a few seconds more: the worker stops."""
        soon = anyio.current_time() + _STOPPING_TIMEOUT
        for scope in self._copying:
            scope.deadline = min(scope.deadline, soon)

    async def settle(self, unsettled: Unsettled, outcome: Outcome) -> Settled:
        """Carry out the outcome of a delivery; called once for each. Raises no error.

        Raises:
            RuntimeError: It was settled already: a bug of the library.
        """
        self._begin(unsettled)
        if unsettled.subscription.is_lost:
            self.counts.stale_settles += 1
            return Settled.LOST
        try:
            match outcome:
                case Ack():
                    return self._ack(unsettled)
                case Requeue():
                    return await self._requeue(unsettled, outcome)
                case Retry():
                    return await self._retry(unsettled, outcome)
                case DeadLetter():
                    return await self._dead_letter(unsettled, outcome)
        except Exception:  # a defect of ours must neither lose the message nor end the worker
            _log.exception("%r goes back to its queue: please report this.", unsettled.delivery)
            return await self._put_back(unsettled, counts=unsettled.was_started)
        except BaseException:  # the event loop ends: nothing may be waited for any more
            self._give_back(unsettled, counts=unsettled.was_started)
            raise

    def ack(self, unsettled: Unsettled) -> Settled:
        """Carry out an `Ack`, which never waits; as `settle`."""
        self._begin(unsettled)
        return self._ack(unsettled)

    def _begin(self, unsettled: Unsettled) -> None:
        if unsettled.is_settled:
            raise RuntimeError(f"{unsettled.delivery!r} was settled already.")
        unsettled.is_settled = True

    async def recount(self, unsettled: Unsettled, *, trial_of: int | None = None) -> bool:
        """Put a copy that carries the attempts used so far in the place of a delivery.

        A classic queue tells that a message was handed over before, but not how often. One that
        kills its process would be started for ever; so what is about to be started once more is
        replaced, and the copy's own first start is a new one to the queue.

        Args:
            unsettled: The delivery.
            trial_of: How many attempts there are, if the copy is for a trial, see `trials.py`.

        Returns:
            Whether that was done; if not, nothing was settled.
        """
        timeout = min(self._timeout, _STOPPING_TIMEOUT)
        used, is_trial = unsettled.used, trial_of is not None
        if trial_of is not None:
            used = min(used, trial_of - 1)
        if not await self._copy_back(unsettled, used=used, is_trial=is_trial, timeout=timeout):
            return False
        unsettled.is_settled = True
        await self._ack_original(unsettled)
        return True

    async def _ack_original(self, unsettled: Unsettled) -> Settled:
        """Ack what a confirmed copy has taken the place of, and see it off. Bounded.

        What is here may be started, and kill the process, as soon as this returns.
        """
        self._ack(unsettled)
        with anyio.move_on_after(_STOPPING_TIMEOUT):
            await unsettled.subscription.wait_sent()
        return Settled.ACKED

    def _ack(self, unsettled: Unsettled) -> Settled:
        """Ack; too late for the original of a confirmed copy, it leaves two, and is counted."""
        if unsettled.subscription.ack(unsettled.tag):
            return Settled.ACKED
        self.counts.stale_settles += 1
        return Settled.LOST

    def _give_back(self, unsettled: Unsettled, *, counts: bool) -> Settled:
        if unsettled.subscription.requeue(unsettled.tag, counts=counts):
            self.counts.requeued += 1
            return Settled.RETURNED if counts or not self._overcounts else Settled.OVERCOUNTED
        self.counts.stale_settles += 1
        return Settled.LOST

    async def _requeue(self, unsettled: Unsettled, outcome: Requeue) -> Settled:
        """Give a message back, counted as an attempt or not.

        Not every queue can do both by itself. A classic queue knows only that a message was
        returned at all, so a second attempt is written into a copy. A quorum queue before
        RabbitMQ 4.3 counts every return, so one that is no attempt is a copy as well.
        """
        delivery = unsettled.delivery
        if outcome.counts:
            is_classic = not is_counted_by_broker(delivery.message.headers)
            needs_copy = is_classic and delivery.redelivered
            used = delivery.attempt
        else:
            needs_copy = self._overcounts
            used = unsettled.used
        if not needs_copy:
            return self._give_back(unsettled, counts=outcome.counts)
        if await self._copy_back(unsettled, used=used, has_failed=outcome.counts):
            self.counts.requeued += 1
            return await self._ack_original(unsettled)
        if outcome.counts:
            return await self._put_back(unsettled, counts=True)
        return self._give_back(unsettled, counts=False)

    @property
    def _overcounts(self) -> bool:
        """Whether a message that is given back is always charged an attempt."""
        return self._queue.type == "classic" or self.connection.counts_nacks

    async def _copy_back(
        self,
        unsettled: Unsettled,
        *,
        used: int,
        has_failed: bool = False,
        is_trial: bool = False,
        timeout: float | None = None,
    ) -> bool:
        message = unsettled.delivery.message
        headers = {**message.headers, ATTEMPTS: used}
        first = self._first_failure(unsettled) if has_failed else unsettled.first_failure
        if first is not None:
            headers.setdefault(FIRST_FAILURE, first)
        if is_trial:
            headers[TRIAL] = uuid.uuid4().hex  # of this copy, and of no equal message
        if not used:
            del headers[ATTEMPTS]
        copy = message.copy_to(self._queue.name, headers)
        return await self._publish(copy, timeout=timeout, if_refused=_SHORTEST_DELAY)

    async def _retry(self, unsettled: Unsettled, outcome: Retry) -> Settled:
        """Let a copy wait in the broker, for an eighth of a second up to a year."""
        delivery = unsettled.delivery
        headers = {**delivery.message.headers, LAST_FAILURE: self.connection.now()}
        if (first := self._first_failure(unsettled)) is not None:
            headers.setdefault(FIRST_FAILURE, first)
        headers[ATTEMPTS] = delivery.attempt if outcome.counts else unsettled.used
        headers.pop(TRIAL, None)
        copy = delivery.message.copy_to(self._queue.name, headers)
        # In a delay queue an expiration would end the delay.
        copy.expiration = None
        delay = min(max(outcome.delay, _SHORTEST_DELAY), MAX_DELAY)
        if not await self._publish(copy, delay=delay):
            return await self._put_back(unsettled, counts=outcome.counts)
        self.counts.retried += 1
        return await self._ack_original(unsettled)

    async def _dead_letter(self, unsettled: Unsettled, outcome: DeadLetter) -> Settled:
        delivery = unsettled.delivery
        if not self._outbox.connection.is_connected:
            # How large a header may be, the connection that publishes it has negotiated.
            with contextlib.suppress(WorkQueueError):
                await self._outbox.wait_connected(timeout=_STOPPING_TIMEOUT)
        if not await self._publish(self._dead_letter_of(unsettled, outcome)):
            return await self._put_back(unsettled, counts=unsettled.was_started)
        self.counts.dead_lettered += 1
        settled = await self._ack_original(unsettled)
        _log.warning(
            "%r was dead-lettered to %r: %s.",
            delivery,
            self._queue.dead_letter_queue,
            str(outcome.reason).rstrip("."),
        )
        return settled

    def _dead_letter_of(self, unsettled: Unsettled, outcome: DeadLetter) -> Message:
        """Return a dead letter that RabbitMQ takes.

        Ours and the message's own headers together may be more than a header frame holds, or the
        message's own ones cannot be written again. Then what matters least is left out: first what
        the exception says, then the message's own headers.
        """
        message = unsettled.delivery.message
        reason = str(outcome.reason)
        for headers, why, failure in (
            (message.headers, reason, outcome.failure),
            (message.headers, reason, None),
            ({}, reason, outcome.failure),
            ({}, reason[:_SHORT_REASON], None),
        ):
            dead = message.copy_to(
                self._queue.dead_letter_queue,
                dead_letter_headers(
                    headers,
                    queue=self._queue.name,
                    attempts=unsettled.used + unsettled.was_started,
                    reason=why,
                    failure=failure,
                    first=self._first_failure(unsettled),
                    now=self.connection.now(),
                ),
            )
            dead.expiration = None
            try:
                self._outbox.connection.prepare(dead)
            except (ValueError, TypeError) as exc:
                _log.warning("A dead letter of %r is cut down: %s", unsettled.delivery, exc)
            else:
                break
        return dead

    def _first_failure(self, unsettled: Unsettled) -> datetime | None:
        """Return when a message that fails now failed first; None if it did so elsewhere."""
        if unsettled.first_failure is not None or unsettled.used:
            return unsettled.first_failure
        return self.connection.now()

    async def _put_back(self, unsettled: Unsettled, *, counts: bool) -> Settled:
        """Return a message whose copy could not be published; wait a little, so as not to spin."""
        self.counts.failed_copies += 1
        await self.connection.sleep(_FAILED_COPY_PAUSE, until=self._stopping)
        return self._give_back(unsettled, counts=counts)

    async def _publish(
        self,
        copy: Message,
        *,
        delay: float = 0.0,
        timeout: float | None = None,
        if_refused: float = 0.0,
    ) -> bool:
        """Publish a copy and say whether it is confirmed. Never raises an error.

        Args:
            copy: The copy.
            delay: Seconds that it waits in the broker.
            timeout: Seconds that it may take to be confirmed.
            if_refused: So many seconds it waits there if its queue, which may be full, refuses it.
                Its original is in this queue: once that is acked, there is room.
        """
        if timeout is None:
            timeout = _STOPPING_TIMEOUT if self._stopping.is_set() else self._timeout
        reason = "the worker stops"
        with anyio.CancelScope() as scope:
            self._copying.add(scope)
            try:
                try:
                    await self._publish_routed(copy, delay, timeout)
                except NotConfirmedError:
                    if not if_refused:
                        raise
                    copy.expiration = None  # in a delay queue it would end the delay
                    await self._publish_routed(copy, if_refused, timeout)
            except (WorkQueueError, ValueError, TypeError) as exc:
                reason = str(exc)
            else:
                return True
            finally:
                self._copying.discard(scope)
        _log.error(
            "A copy of message %s to queue %r could not be published, the original stays: %s",
            copy.message_id or "without id",
            copy.queue,
            reason,
        )
        return False

    async def _publish_routed(self, copy: Message, delay: float, timeout: float) -> None:
        try:
            await self._publish_once(copy, delay, timeout)
        except UnroutableError:
            # A queue was deleted since it was declared.
            self._delays.forget()
            await self.connection.declare(declarations(self._queue), timeout=timeout)
            await self._publish_once(copy, delay, timeout)

    async def _publish_once(self, copy: Message, delay: float, timeout: float) -> None:
        deadline = anyio.current_time() + timeout
        if delay:
            try:
                async with asyncio.timeout_at(deadline):
                    await self._delays.send_off(copy, delay, self._queue, timeout=timeout)
            except TimeoutError:
                what = f"declaring the delay queues for queue {self._queue.name!r}"
                raise ConnectionLostError(what, reason="no answer in time") from None
        await self._outbox.publish(copy, self._outbox.connection.prepare(copy), deadline=deadline)
