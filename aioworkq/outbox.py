"""Publications until their outcome is known: a bounded window, deadlines, and outages.

The producer and the worker's copies (dead letters, retries) ride on the same `Outbox`. It keeps one
confirm channel open. What that channel leaves unconfirmed when it is lost is sent again on the next
one, until its deadline; then its publisher hears what is true: that it was never sent, or that
nobody knows.

A negative confirm is the queue's answer, with one exception. RabbitMQ before 4.0 refuses what a
channel publishes first to a quorum queue that has no leader at this moment, and then goes on to do
so on this channel for ever. So a channel on which a queue has refused all is replaced; and just
after a reconnect, when a node may have failed, its messages are sent again on the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import random
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final

import anyio
from msgspec import Struct

from aioworkq.broker import Confirm
from aioworkq.errors import (
    AccessRefusedError,
    ConnectionLostError,
    NotConfirmedError,
    OutcomeUnknownError,
    UnroutableError,
    WorkQueueError,
)

if TYPE_CHECKING:
    from collections.abc import Generator

    from aioworkq.broker import Connection, PublishChannel
    from aioworkq.message import Message

_log = logging.getLogger("aioworkq")

_OPEN_TIMEOUT: Final = 10.0
_CLOSE_TIMEOUT: Final = 5.0
_BACKOFF_MAX: Final = 5.0
_EXPIRE_PAUSE: Final = 2e-6
"""Seconds for each message that waits: looking for what is overdue takes a small part of the time,
however many there are."""
_FAILOVER: Final = 10.0
"""Seconds after a reconnect in which a queue that takes nothing may be one without a leader."""
_REFUSED_PAUSE: Final = 0.1
_DRAIN_TIMEOUT: Final = 1.0
_STUCK: Final = 5.0
"""Seconds without any answer to what nobody waits for any more, while others want its place."""
_WATCH_POLL: Final = 0.25
_BLOCKED_REASON: Final = "RabbitMQ blocks publishers (memory or disk alarm)"
_UNANSWERED: Final = ", and an earlier sending was never answered"
_CLOSED_REASON: Final = "the producer was closed"
_ACK: Final = Confirm.ACK
"""To look up a member of an Enum takes 80 ns before Python 3.12."""


class Publication(Struct, eq=False):
    """A message between its submission and its outcome.

    Attributes:
        outbox: Where it is submitted.
        message: The message.
        wire: What `Connection.prepare` made of it.
        deadline: When its outcome is due, by the event loop's clock.
        size: The bytes of its body.
        is_resolved: It has its outcome, or nobody wants it.
        is_sent: It is on the channel, and the channel has not answered.
        is_refused: It was refused, and shall be sent again on another channel.
        maybe_stored: It was on a connection or channel that was lost.
        is_suspect: It was on a channel that the broker closed because of one of the messages there.
    """

    outbox: Outbox
    message: Message
    wire: Any
    deadline: float
    size: int
    is_resolved: bool = False
    is_sent: bool = False
    is_refused: bool = False
    maybe_stored: bool = False
    is_suspect: bool = False

    @property
    def was_unanswered(self) -> bool:
        """Whether it was sent before without an answer."""
        return self.maybe_stored or self.is_suspect

    @property
    def is_in_doubt(self) -> bool:
        """Whether it was sent, now or before, without an answer."""
        return self.is_sent or self.was_unanswered

    def settle(self, confirm: Confirm, reason: str) -> None:
        """Take the channel's answer."""
        self.outbox.on_confirm(self, confirm, reason)

    def done(self, error: WorkQueueError | None) -> None:
        """Take the outcome: its error, or None once it is confirmed. Called once at most."""
        raise NotImplementedError


class Awaited(Publication, eq=False, kw_only=True):
    """A publication that a task waits for."""

    outcome: asyncio.Future[None]

    def done(self, error: WorkQueueError | None) -> None:
        """Tell the task, if it is still there."""
        if self.outcome.done():
            return
        if error is None:
            self.outcome.set_result(None)
        else:
            self.outcome.set_exception(error)


class Outbox:
    """Publishes through one confirm channel, which it keeps open.

    Args:
        connection: The connection to publish on, owned by this outbox from `start` to `aclose`.
        window: So many messages may be unconfirmed at a time.
        window_bytes: Their bodies may have so many bytes together; one message always may.
    """

    def __init__(self, connection: Connection, *, window: int, window_bytes: int) -> None:
        self._connection = connection
        self._window = window
        self._window_bytes = window_bytes
        self._channel: PublishChannel | None = None
        self._task: asyncio.Task[None] | None = None
        self._renewal: anyio.CancelScope | None = None
        self._waiting: OrderedDict[Publication, None] = OrderedDict()
        self._pending: dict[Publication, None] = {}
        self._expected = 0
        self._sent = 0
        self._sent_bytes = 0
        self._is_pumping = False
        self._is_pump_due = False
        self._abandoned = 0
        self._abandoned_bytes = 0
        self._stuck_since = math.inf
        self._suspects: set[Publication] = set()
        self._taking: set[str] = set()
        self._again: list[Publication] = []
        self._retirement: asyncio.TimerHandle | None = None
        self._is_retiring = False
        self._refused_pause = _REFUSED_PAUSE
        self._failover_until = 0.0
        self._was_lost = False
        self._refused: ConnectionLostError | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._watch_timer: asyncio.TimerHandle | None = None
        self._was_blocked = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_closed = False
        self._closing: asyncio.Task[None] | None = None
        self.confirmed = 0
        self.unroutable = 0
        self.not_confirmed = 0
        self.unknown = 0
        self.resent = 0

    @property
    def connection(self) -> Connection:
        """The connection that is published on."""
        return self._connection

    @property
    def window(self) -> int:
        """How many messages may be unconfirmed at a time."""
        return self._window

    @property
    def window_bytes(self) -> int:
        """How many bytes the unconfirmed bodies may have together."""
        return self._window_bytes

    @property
    def pending(self) -> int:
        """How many publications have no outcome yet."""
        return len(self._pending)

    @property
    def in_flight(self) -> int:
        """How many publications are sent and not answered."""
        return self._sent

    @functools.cached_property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop that this runs in. To ask for it each time costs a system call."""
        return asyncio.get_running_loop()

    def start(self) -> None:
        """Begin to connect, if that has not begun yet."""
        if self._task is None and not self._is_closed:
            self._task = self.loop.create_task(self._run(), name="aioworkq publishes")

    async def publish(self, message: Message, wire: Any, *, deadline: float) -> None:
        """Publish one message and wait for its confirm.

        Cancelling it is safe: a message that was not sent yet never will be; one that was sent may
        be stored.

        Args:
            message: The message.
            wire: What `Connection.prepare` made of it.
            deadline: By the event loop's clock.

        Raises:
            WorkQueueError: One of the errors of `Producer.publish`.
        """
        publication = self.begin(message, wire, deadline=deadline)
        try:
            await publication.outcome
        except asyncio.CancelledError:
            self.take_back(publication)
            raise

    def begin(self, message: Message, wire: Any, *, deadline: float) -> Awaited:
        """Submit a message whose outcome is waited for; `publish` is this, and waits."""
        outcome: asyncio.Future[None] = self.loop.create_future()
        publication = Awaited(self, message, wire, deadline, len(message.body), outcome=outcome)
        self.submit(publication)
        return publication

    def submit(self, publication: Publication) -> None:
        """Take a publication. Its `Publication.done` gets the outcome, perhaps at once."""
        if self._refused is not None or self._is_closed:
            publication.is_resolved = True
            publication.done(
                self._refusal() or self._never_sent(publication.message, _CLOSED_REASON),
            )
            return
        if not self._pending:
            self._get_busy()
        self._pending[publication] = None
        if self._timer is None or publication.deadline < self._timer_at:
            self._arm(publication.deadline)
        if self._channel is None or self._waiting or not self._has_room(publication):
            self._waiting[publication] = None
        else:
            self._send(self._channel, publication)

    def _get_busy(self) -> None:
        """See to what goes on while anything is pending."""
        self._idle.clear()
        if self._watch_timer is None:
            self._watch_timer = self.loop.call_later(_WATCH_POLL, self._watch)
        self.start()

    def take_back(self, publication: Publication) -> None:
        """Forget a publication, its ``done`` included: not sent yet, it never will be."""
        if not publication.is_resolved:
            self._resolve(publication)
            self._rest_if_idle()
            self._pump_soon()

    def _pump_soon(self) -> None:
        """Send what waits behind something that was given up.

        Not at once: what waits may be given up in the same step.
        """
        if self._waiting and not self._is_pump_due:
            self._is_pump_due = True
            self.loop.call_soon(self._pump_due)

    def _pump_due(self) -> None:
        self._is_pump_due = False
        if self._channel is not None:
            self._pump(self._channel)

    def _pump(self, channel: PublishChannel) -> None:
        """Send what waits, as far as the window has room."""
        if self._is_pumping:  # something cannot be sent, and has heard so from within the loop
            return
        self._is_pumping = True
        try:
            waiting = self._waiting
            while waiting:
                publication = next(iter(waiting))
                if not self._has_room(publication):
                    return
                del waiting[publication]
                self._send(channel, publication)
        finally:
            self._is_pumping = False

    def _has_room(self, publication: Publication) -> bool:
        if not self._sent:
            return True
        if self._suspects or self._sent >= self._window:
            return False
        return self._sent_bytes + publication.size <= self._window_bytes

    def _send(self, channel: PublishChannel, publication: Publication) -> None:
        publication.is_sent = True
        self._sent += 1
        self._sent_bytes += publication.size
        channel.send(publication)

    def on_confirm(self, publication: Publication, confirm: Confirm, reason: str) -> None:
        """Take the broker's answer to one sending."""
        publication.is_sent = False
        self._sent -= 1
        self._sent_bytes -= publication.size
        if publication.is_resolved:
            self._abandoned -= 1
            self._abandoned_bytes -= publication.size
            self._stuck_since = math.inf
        elif confirm is _ACK:
            self.confirmed += 1
            message = publication.message
            self._taking.add(message.exchange or message.queue)
            self._finish(publication, None)
        elif confirm is Confirm.NACK and self._may_lack_leader(publication):
            publication.is_refused = True
            self._again.append(publication)
        else:
            self._finish(publication, self._error_of(publication, confirm, reason))
        if self._is_retiring:
            self._renew_if_drained()
        elif self._waiting and self._channel is not None:
            self._pump(self._channel)

    def _may_lack_leader(self, publication: Publication) -> bool:
        """See to it that a channel is replaced on which a queue has refused all.

        Returns:
            Whether the message shall be sent again on the next one.
        """
        message = publication.message
        if (
            publication.is_suspect
            or (message.exchange or message.queue) in self._taking
            or not self._connection.keeps_refusing
        ):
            return False
        loop = asyncio.get_running_loop()
        if self._channel is not None and self._retirement is None and not self._is_retiring:
            # It may well be a full queue: ever more seldom.
            self._retirement = loop.call_later(self._refused_pause, self._retire)
            self._refused_pause = min(_BACKOFF_MAX, 2 * self._refused_pause)
        return loop.time() < self._failover_until

    def _retire(self) -> None:
        """Send nothing more on the channel, and have it replaced once all is answered, or soon."""
        self._retirement = None
        if self._channel is not None and self._renewal is not None:
            self._channel, self._is_retiring = None, True
            loop = asyncio.get_running_loop()
            self._retirement = loop.call_later(_DRAIN_TIMEOUT, self._renewal.cancel)
            self._renew_if_drained()

    def _renew_if_drained(self) -> None:
        if not self._sent and self._renewal is not None:
            self._renewal.cancel()

    def _error_of(
        self,
        publication: Publication,
        confirm: Confirm,
        reason: str,
    ) -> WorkQueueError:
        message = publication.message
        if confirm is Confirm.RETURNED:
            self.unroutable += 1
            return UnroutableError(message.message_id, queue=message.queue, reason=reason)
        if publication.was_unanswered:
            return self._unknown(message, reason + _UNANSWERED)
        self.not_confirmed += 1
        return NotConfirmedError(message.message_id, queue=message.queue, reason=reason)

    def truth(self, publication: Publication, error: Exception) -> Exception:
        """Return what is true of a publication that failed, or was returned and not sent again.

        An error that says that nothing is stored is not, if it was sent before and never answered.
        """
        if not publication.was_unanswered or isinstance(error, OutcomeUnknownError):
            return error
        return self._unknown(
            publication.message, getattr(error, "reason", str(error)) + _UNANSWERED
        )

    def _unknown(self, message: Message, reason: str) -> OutcomeUnknownError:
        self.unknown += 1
        return OutcomeUnknownError(message.message_id, queue=message.queue, reason=reason)

    def _never_sent(self, message: Message, reason: str) -> ConnectionLostError:
        return ConnectionLostError(
            f"message {message.message_id} for queue {message.queue!r} was not sent",
            reason=reason,
        )

    def _finish(self, publication: Publication, error: WorkQueueError | None) -> None:
        self._resolve(publication)
        publication.done(error)
        if not self._pending:  # only now: who publishes it once more says so before `flush` looks
            self._rest_if_idle()

    def _resolve(self, publication: Publication) -> None:
        publication.is_resolved = True
        self._pending.pop(publication, None)
        if publication.is_sent:
            self._abandoned += 1
            self._abandoned_bytes += publication.size
        elif self._waiting:
            self._waiting.pop(publication, None)
        if publication.is_suspect:
            self._suspects.discard(publication)

    def _rest_if_idle(self) -> None:
        if not self._pending and not self._expected:
            self._idle.set()

    @contextlib.contextmanager
    def expecting(self) -> Generator[None]:
        """Let `flush` wait for a publication that is about to be submitted."""
        self._expected += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._expected -= 1
            self._rest_if_idle()

    def _arm(self, deadline: float) -> None:
        """Have `_expire` called at the earliest deadline, with one timer for all of them."""
        if self._timer is not None:
            if self._timer_at <= deadline:
                return
            self._timer.cancel()
        self._timer_at = deadline
        self._timer = self.loop.call_at(deadline, self._expire)

    def _expire(self) -> None:
        """Tell everybody whose deadline has passed what is known."""
        self._timer = None
        now = asyncio.get_running_loop().time()
        blocked = self._connection.is_blocked
        unanswered = False
        for publication in [one for one in self._pending if one.deadline <= now]:
            unanswered |= publication.is_sent
            self._finish(publication, self._overdue(publication, blocked=blocked))
        if unanswered and not blocked and (self._suspects or self._holds_half()):
            self._renew()
        self._pump_soon()
        if self._pending:
            next_deadline = min(publication.deadline for publication in self._pending)
            self._arm(max(next_deadline, now + _EXPIRE_PAUSE * len(self._pending)))

    def _holds_half(self) -> bool:
        """Whether half the window is held by what nobody waits for any more.

        A queue that never confirms (its leader is gone) must not take the window from the others.
        """
        return (
            2 * self._abandoned >= self._window or 2 * self._abandoned_bytes >= self._window_bytes
        )

    def _renew(self) -> None:
        """Have a new channel opened in place of this one."""
        if self._renewal is not None:
            self._renewal.cancel()

    def _renew_if_stuck(self) -> None:
        """Look whether those that wait will ever have the place of what was given up.

        What was cancelled has no deadline any more by which that would be noticed.
        """
        now = self.loop.time()
        if not self._holds_half():
            self._stuck_since = math.inf
        elif self._stuck_since == math.inf:
            self._stuck_since = now
        elif self._waiting and now - self._stuck_since >= _STUCK:
            self._stuck_since = math.inf
            self._renew()

    def _overdue(self, publication: Publication, *, blocked: bool) -> WorkQueueError:
        reason = _CLOSED_REASON if self._is_closed else _BLOCKED_REASON if blocked else ""
        connected = self._channel is not None
        if publication.is_refused and not publication.is_in_doubt:
            return NotConfirmedError(
                publication.message.message_id,
                queue=publication.message.queue,
                reason="RabbitMQ sent negative confirms",
            )
        if publication.is_in_doubt:
            if not connected:
                reason = reason or f"the connection was lost ({self._connection.last_error})"
            return self._unknown(publication.message, reason or "the broker is silent")
        if connected:
            reason = reason or "the window of unconfirmed messages stayed full"
        return self._never_sent(publication.message, reason or self._connection.last_error)

    def _watch(self) -> None:
        """Look for an alarm, of which aiormq tells only when asked, and for a stuck window."""
        self._watch_timer = None
        blocked = self._connection.is_blocked
        if blocked and not self._was_blocked:
            _log.warning(
                "%s: %d messages wait for it to end. Consuming goes on.",
                _BLOCKED_REASON,
                len(self._pending),
            )
        elif self._was_blocked and not blocked and self._connection.is_connected:
            _log.warning("RabbitMQ takes messages again: its alarm has ended.")
        self._was_blocked = blocked
        if blocked:
            self._stuck_since = math.inf
        else:
            self._renew_if_stuck()
        if self._pending or blocked:
            loop = asyncio.get_running_loop()
            self._watch_timer = loop.call_later(_WATCH_POLL, self._watch)

    async def _run(self) -> None:
        """Keep one confirm channel open."""
        try:
            await self._connection.start()
            failures = 0
            while True:
                await self._connection.wait_connected()
                try:
                    channel = await self._connection.open_publish_channel(timeout=_OPEN_TIMEOUT)
                except AccessRefusedError:
                    raise
                except ConnectionLostError as exc:
                    failures += 1
                    _log.warning("%s", exc)
                    await self._connection.sleep(_backoff(failures))
                    continue
                failures = 0
                await self._use(channel)
        except ConnectionLostError as exc:
            self._refuse(exc)
        except Exception as exc:
            # A defect, ours or of a library below: nobody may wait for it in vain.
            _log.exception("aioworkq's publishing ended: please report this.")
            self._refuse(ConnectionLostError("publishing", reason=f"{type(exc).__name__}: {exc}"))

    async def _use(self, channel: PublishChannel) -> None:
        """Publish through a channel until it is lost, then take back what it did not confirm."""
        reason = ""
        try:
            with anyio.CancelScope() as self._renewal:
                self._begin(channel)
                reason = await channel.wait_lost()
        finally:
            self._channel = self._renewal = None
            was_retired, self._is_retiring = self._is_retiring, False
            if self._retirement is not None:
                self._retirement.cancel()
                self._retirement = None
        if was_retired and not reason:
            reason = "a queue refused everything on it"
        else:
            self._was_lost = bool(reason)
            reason = reason or "too much of what was sent stayed unanswered"
            self._refused_pause = _REFUSED_PAUSE
        # What is lost is closed already. One to be renewed may still confirm something meanwhile.
        await channel.aclose(timeout=_CLOSE_TIMEOUT)
        left = [one for one in channel.take_unconfirmed() if isinstance(one, Publication)]
        self._sent = self._sent_bytes = self._abandoned = self._abandoned_bytes = 0
        self._stuck_since = math.inf
        for publication in left:
            publication.is_sent = False
        again = [publication for publication in left if not publication.is_resolved]
        refusal = channel.refusal
        if refusal is not None and len(left) == 1:
            # The broker closed the channel for what was on it, and there was one message only.
            for culprit in again:
                # Then it was refused in the company that made it suspect, too.
                self._suspects.discard(culprit)
                culprit.is_suspect = False
                self._finish(culprit, self._error_of(culprit, refusal, reason))
            return
        for publication in reversed(again):
            if refusal is None:
                publication.maybe_stored = True
            else:
                # One of these messages is at fault: sent one by one, it is told from the others.
                publication.is_suspect = True
                self._suspects.add(publication)
            self._waiting[publication] = None
            self._waiting.move_to_end(publication, last=False)
        self.resent += len(again)
        verb = "is replaced" if was_retired else "was lost"
        _log.warning("The channel to publish on %s: %s. Unconfirmed: %d.", verb, reason, len(again))

    def _begin(self, channel: PublishChannel) -> None:
        """Send what waits on a new channel; first of all what was refused on another one."""
        self._channel = channel
        self._taking.clear()
        if self._was_lost:
            self._was_lost = False
            self._failover_until = asyncio.get_running_loop().time() + _FAILOVER
        for publication in reversed(self._again):
            if not publication.is_resolved:
                self._waiting[publication] = None
                self._waiting.move_to_end(publication, last=False)
        self._again.clear()
        self._pump(channel)

    def _refuse(self, error: ConnectionLostError) -> None:
        self._refused = error
        for publication in list(self._pending):
            if publication.is_in_doubt:
                self._finish(publication, self._unknown(publication.message, error.reason))
            else:
                self._finish(publication, self._refusal())

    def _refusal(self) -> ConnectionLostError | None:
        """Return the error of a producer that can never connect: a new one for everybody."""
        error = self._refused
        return error and type(error)(error.what, reason=error.reason)

    async def wait_connected(self, *, timeout: float) -> None:
        """Wait for the first usable connection.

        Raises:
            ConnectionLostError: None came within ``timeout`` seconds, or none ever can.
        """
        self.start()
        await asyncio.sleep(0)
        try:
            async with asyncio.timeout(timeout):
                await self._connection.wait_connected()
        except TimeoutError:
            raise ConnectionLostError(
                "connecting to RabbitMQ",
                reason=self._connection.last_error or f"no answer within {timeout:g} s",
            ) from None

    async def flush(self, *, timeout: float) -> bool:
        """Wait until every publication has its outcome, and say whether that came in time."""
        try:
            async with asyncio.timeout(timeout):
                while self._pending or self._expected:
                    await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def aclose(self, *, timeout: float) -> None:
        """Close the connection within ``timeout`` seconds. Twice harmless.

        What is still pending hears that its outcome is unknown, or that it was not sent. A call
        that is cancelled leaves the closing to go on by itself.
        """
        if self._closing is None:
            self._is_closed = True
            blocked = self._connection.is_blocked
            for publication in list(self._pending):
                self._finish(publication, self._overdue(publication, blocked=blocked))
            for timer in (self._timer, self._watch_timer, self._retirement):
                if timer is not None:
                    timer.cancel()
            loop = asyncio.get_running_loop()
            self._closing = loop.create_task(self._close(timeout), name="aioworkq closes")
        with anyio.CancelScope(shield=True):
            await asyncio.wait({self._closing})

    async def _close(self, timeout: float) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        # Its end is the channel's too; closing that first would wait for an answer once more.
        await self._connection.aclose(timeout=timeout)


def _backoff(failures: int) -> float:
    longest: float = min(_BACKOFF_MAX, 0.1 * 2.0 ** min(failures, 10))
    return longest * random.uniform(0.5, 1.0)  # noqa: S311 - jitter
