"""Publications until their outcome is known: a bounded window, deadlines, and outages.

The producer and the worker's copies (dead letters, retries) ride on the same `Outbox`. It keeps one
confirm channel open. What that channel leaves unconfirmed when it is lost is sent again on the next
one, until its deadline; then its publisher hears what is true: that it was never sent, or that
nobody knows.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from typing import TYPE_CHECKING, Any, Final

import anyio

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
    from collections.abc import Callable

    from aioworkq.broker import Connection, PublishChannel
    from aioworkq.message import Message

_log = logging.getLogger("aioworkq")

_OPEN_TIMEOUT: Final = 10.0
_BACKOFF_MAX: Final = 5.0
_BLOCKED_POLL: Final = 0.25
_BLOCKED_REASON: Final = "RabbitMQ blocks publishers (memory or disk alarm)"


class _Publication:
    """A message between its submission and its outcome."""

    __slots__ = (
        "deadline",
        "done",
        "is_resolved",
        "is_sent",
        "maybe_stored",
        "message",
        "size",
        "wire",
    )

    def __init__(
        self,
        message: Message,
        wire: Any,
        deadline: float,
        done: Callable[[WorkQueueError | None], None],
    ) -> None:
        self.message = message
        self.wire = wire
        self.deadline = deadline
        self.done = done
        self.size = len(message.body)
        self.maybe_stored = False
        self.is_resolved = False
        self.is_sent = False


class _Sent:
    """A publication on one channel: what the channel answers goes to the outbox."""

    __slots__ = ("_outbox", "message", "publication", "wire")

    def __init__(self, outbox: Outbox, publication: _Publication) -> None:
        self._outbox = outbox
        self.publication = publication
        self.message = publication.message
        self.wire = publication.wire

    def settle(self, confirm: Confirm, reason: str) -> None:
        self._outbox.on_confirm(self.publication, confirm, reason)


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
        self._waiting: deque[_Publication] = deque()
        self._pending: dict[_Publication, None] = {}
        self._sent = 0
        self._sent_bytes = 0
        self._suspects = 0
        self._refused: ConnectionLostError | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._blocked_timer: asyncio.TimerHandle | None = None
        self._was_blocked = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_closed = False
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
    def pending(self) -> int:
        """How many publications have no outcome yet."""
        return len(self._pending)

    @property
    def in_flight(self) -> int:
        """How many publications are sent and not answered."""
        return self._sent

    def start(self) -> None:
        """Begin to connect, if that has not begun yet."""
        if self._task is None and not self._is_closed:
            loop = asyncio.get_running_loop()
            self._task = loop.create_task(self._run(), name="aioworkq publishes")

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
        outcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def done(error: WorkQueueError | None) -> None:
            if outcome.done():
                return
            if error is None:
                outcome.set_result(None)
            else:
                outcome.set_exception(error)

        publication = self.submit(message, wire, deadline=deadline, done=done)
        try:
            await outcome
        except asyncio.CancelledError:
            self._resolve(publication)
            raise

    def submit(
        self,
        message: Message,
        wire: Any,
        *,
        deadline: float,
        done: Callable[[WorkQueueError | None], None],
    ) -> _Publication:
        """Take a publication; ``done`` is called with its error, or None once it is confirmed."""
        publication = _Publication(message, wire, deadline, done)
        if self._refused is not None or self._is_closed:
            publication.is_resolved = True
            done(self._refused or self._never_sent(message, "the producer is closed"))
            return publication
        self._pending[publication] = None
        self._idle.clear()
        self._waiting.append(publication)
        self._arm(deadline)
        if self._channel is not None:
            self._pump(self._channel)
        if self._blocked_timer is None:
            loop = asyncio.get_running_loop()
            self._blocked_timer = loop.call_later(_BLOCKED_POLL, self._watch_blocked)
        self.start()
        return publication

    def _pump(self, channel: PublishChannel) -> None:
        """Send what waits, as far as the window has room."""
        waiting = self._waiting
        window = 1 if self._suspects else self._window
        while waiting and self._sent < window:
            if self._sent and self._sent_bytes + waiting[0].size > self._window_bytes:
                return
            publication = waiting.popleft()
            if publication.is_resolved:
                continue
            publication.is_sent = True
            self._sent += 1
            self._sent_bytes += publication.size
            channel.send(_Sent(self, publication))

    def on_confirm(self, publication: _Publication, confirm: Confirm, reason: str) -> None:
        """Take the broker's answer to one sending."""
        self._sent -= 1
        self._sent_bytes -= publication.size
        if self._suspects:
            self._suspects -= 1
        if not publication.is_resolved:
            self._finish(publication, self._error_of(publication, confirm, reason))
        if self._waiting and self._channel is not None:
            self._pump(self._channel)

    def _error_of(
        self,
        publication: _Publication,
        confirm: Confirm,
        reason: str,
    ) -> WorkQueueError | None:
        message = publication.message
        match confirm:
            case Confirm.ACK:
                self.confirmed += 1
                return None
            case Confirm.RETURNED:
                self.unroutable += 1
                return UnroutableError(
                    message.message_id,
                    queue=message.queue,
                    reason=reason,
                )
            case Confirm.NACK:
                if publication.maybe_stored:
                    reason = f"{reason}, and an earlier sending was never answered"
                    return self._unknown(message, reason)
                self.not_confirmed += 1
                return NotConfirmedError(
                    message.message_id,
                    queue=message.queue,
                    reason=reason,
                )

    def _unknown(self, message: Message, reason: str) -> OutcomeUnknownError:
        self.unknown += 1
        return OutcomeUnknownError(message.message_id, queue=message.queue, reason=reason)

    def _never_sent(self, message: Message, reason: str) -> ConnectionLostError:
        return ConnectionLostError(
            f"message {message.message_id} for queue {message.queue!r} was not sent",
            reason=reason,
        )

    def _finish(self, publication: _Publication, error: WorkQueueError | None) -> None:
        self._resolve(publication)
        publication.done(error)

    def _resolve(self, publication: _Publication) -> None:
        publication.is_resolved = True
        self._pending.pop(publication, None)
        if not self._pending:
            self._idle.set()

    def _arm(self, deadline: float) -> None:
        """Have `_expire` called at the earliest deadline, with one timer for all of them."""
        if self._timer is not None and self._timer_at <= deadline:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = deadline
        self._timer = asyncio.get_running_loop().call_at(deadline, self._expire)

    def _expire(self) -> None:
        """Tell everybody whose deadline has passed what is known."""
        self._timer = None
        now = asyncio.get_running_loop().time()
        blocked = self._connection.is_blocked
        for publication in [one for one in self._pending if one.deadline <= now]:
            self._finish(publication, self._overdue(publication, blocked=blocked))
        if self._pending:
            self._arm(min(publication.deadline for publication in self._pending))

    def _overdue(self, publication: _Publication, *, blocked: bool) -> WorkQueueError:
        reason = _BLOCKED_REASON if blocked else ""
        connected = self._channel is not None
        if publication.is_sent or publication.maybe_stored:
            if not connected:
                reason = reason or f"the connection was lost ({self._connection.last_error})"
            return self._unknown(publication.message, reason or "the broker is silent")
        if connected:
            reason = reason or "the window of unconfirmed messages stayed full"
        return self._never_sent(publication.message, reason or self._connection.last_error)

    def _watch_blocked(self) -> None:
        """Look for an alarm while somebody waits: aiormq tells of it only when asked."""
        self._blocked_timer = None
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
        if self._pending or blocked:
            loop = asyncio.get_running_loop()
            self._blocked_timer = loop.call_later(_BLOCKED_POLL, self._watch_blocked)

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
                    await asyncio.sleep(_backoff(failures))
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
        self._channel = channel
        self._pump(channel)
        try:
            reason = await channel.wait_lost()
        finally:
            self._channel = None
        left = [one.publication for one in channel.take_unconfirmed() if isinstance(one, _Sent)]
        self._sent = self._sent_bytes = 0
        again = [publication for publication in left if not publication.is_resolved]
        for publication in again:
            publication.maybe_stored = True
            publication.is_sent = False
        if channel.is_refusal and len(again) == 1:
            # The broker closed the channel for what was on it, and there was one message only.
            self._suspects = max(0, self._suspects - 1)
            message = again[0].message
            error = NotConfirmedError(message.message_id, queue=message.queue, reason=reason)
            self.not_confirmed += 1
            self._finish(again[0], error)
            return
        if channel.is_refusal:
            # One of these messages is at fault: sent one by one, it can be told from the others.
            self._suspects = len(again)
        self._waiting.extendleft(reversed(again))
        self.resent += len(again)
        _log.warning("The channel to publish on was lost: %s. Unconfirmed: %d.", reason, len(again))

    def _refuse(self, error: ConnectionLostError) -> None:
        self._refused = error
        self._waiting.clear()
        for publication in list(self._pending):
            if publication.maybe_stored:
                self._finish(publication, self._unknown(publication.message, error.reason))
            else:
                self._finish(publication, error)

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
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def aclose(self, *, timeout: float) -> None:
        """Close channel and connection; each within ``timeout`` seconds. Twice harmless.

        What is still pending hears that its outcome is unknown, or that it was not sent.
        """
        if self._is_closed:
            return
        self._is_closed = True
        for timer in (self._timer, self._blocked_timer):
            if timer is not None:
                timer.cancel()
        for publication in list(self._pending):
            self._finish(publication, self._overdue(publication, blocked=False))
        channel, task = self._channel, self._task
        with anyio.CancelScope(shield=True):
            if task is not None:
                task.cancel()
                await asyncio.wait({task})
            if channel is not None:
                await channel.aclose(timeout=timeout)
            await self._connection.aclose(timeout=timeout)


def _backoff(failures: int) -> float:
    longest: float = min(_BACKOFF_MAX, 0.1 * 2.0 ** min(failures, 10))
    return longest * random.uniform(0.5, 1.0)  # noqa: S311 - jitter
