"""One queue of the memory broker: what waits, who consumes, what comes back, what expires.

Synchronous, and without any idea of connections: a consumer is whatever has room and takes
messages.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final, Protocol

from aioworkq.memory.limits import Return, limits_of
from aioworkq.memory.ready import ClassicReady, QuorumReady, Ready
from aioworkq.memory.stored import Reason, Stored, deaths_of, delivered

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aioworkq.memory.clock import Clock, Timer
    from aioworkq.memory.stored import Death
    from aioworkq.message import Message
    from aioworkq.versions import Semantics

_LOW_LIMIT: Final = 0.8
"""A full quorum queue takes messages again when so much of its limit is left (rabbit_fifo.erl)."""
_DEAD_LETTER_RETRY: Final = 180.0
"""Seconds after which an undeliverable dead letter is tried again (at-least-once)."""


class Taker(Protocol):
    """A consumer."""

    def has_room(self) -> bool:
        """Whether its prefetch allows one more."""
        ...

    def take(self, queue: MemoryQueue, stored: Stored) -> None:
        """Take one message; it comes back through `MemoryQueue.put_back`, or is acked."""
        ...

    def lose_queue(self, reason: str) -> None:
        """Hear that the queue is gone, or that the broker cancels the consumer."""
        ...


class MemoryQueue:
    """A durable queue.

    Args:
        name: Its name.
        arguments: What it was declared with.
        semantics: The version's rules.
        clock: Where expiry is timed.
        dead_letter: Takes a message that died, and says whether all is done about it.
        on_unused: Called when nobody has used it for as long as ``x-expires`` says.
    """

    def __init__(
        self,
        name: str,
        arguments: Mapping[str, Any],
        *,
        semantics: Semantics,
        clock: Clock,
        dead_letter: Callable[[MemoryQueue, Stored, Reason], bool],
        on_unused: Callable[[], None],
    ) -> None:
        self.name = name
        self.arguments = dict(arguments)
        self.limits = limits_of(arguments, semantics)
        self._semantics = semantics
        self._clock = clock
        self._dead_letter = dead_letter
        self._on_unused = on_unused
        self._ready: Ready = (
            QuorumReady(
                semantics.priorities,
                returns_to_end=self.limits.delivery_limit is None,
            )
            if self.limits.is_quorum
            else ClassicReady(self.limits.max_priority)
        )
        self._takers: deque[Taker] = deque()
        self._undeliverable: list[tuple[Stored, Reason]] = []
        self._sequence = 0
        self._is_full = False
        self._expiry: Timer | None = None
        self._retry: Timer | None = None
        self._lease: Timer | None = None
        self.unacked = 0
        self.is_deleted = False
        self.renew()

    def __len__(self) -> int:
        """Return how many messages are ready."""
        return len(self._ready)

    def messages(self) -> list[Message]:
        """Return the messages that are ready, the next one first."""
        return [stored.message for stored in self._ready]

    # Messages in

    def refuses(self) -> bool:
        """Say whether a publication is refused because the queue is full."""
        limits = self.limits
        if limits.max_length is None or not limits.rejects_publish:
            return False
        if limits.is_quorum:
            return self._is_full
        return len(self._ready) >= limits.max_length

    def add(self, message: Message, deaths: list[Death] | None = None) -> None:
        """Take a publication, or a dead letter with its deaths."""
        self._sequence += 1
        now = self._clock.time()
        lives = [life for life in (message.expiration, self.limits.ttl) if life is not None]
        stored = Stored(
            message,
            self._sequence,
            expires_at=now + min(lives) if lives else None,
            deaths=deaths_of(message, self._semantics) if deaths is None else deaths,
        )
        self._ready.add(stored)
        self._dispatch()
        self._drop_surplus()
        self._note_fullness()

    def _drop_surplus(self) -> None:
        limit = self.limits.max_length
        if limit is None or self.limits.rejects_publish:
            return
        while len(self._ready) > limit:
            self._bury(self._ready.take(), "maxlen")

    def _note_fullness(self) -> None:
        """A quorum queue says that it is full after the message that filled it."""
        limit = self.limits.max_length
        if limit is None:
            return
        if len(self._ready) > limit:
            self._is_full = True
        elif len(self._ready) <= limit * _LOW_LIMIT:
            self._is_full = False

    # Consumers

    def renew(self) -> None:
        """Begin the time anew after which the queue goes, if nobody uses it (``x-expires``)."""
        if self._lease is not None:
            self._lease.cancel()
            self._lease = None
        if self.limits.expires is not None and not self._takers:
            when = self._clock.time() + self.limits.expires
            self._lease = self._clock.call_at(when, self._on_unused)

    def subscribe(self, taker: Taker) -> None:
        """Add a consumer; they take turns."""
        self._takers.append(taker)
        self.renew()
        self._dispatch()

    def unsubscribe(self, taker: Taker) -> None:
        """Remove a consumer, if it is one."""
        if taker in self._takers:
            self._takers.remove(taker)
            self.renew()

    @property
    def takers(self) -> list[Taker]:
        """The consumers."""
        return list(self._takers)

    def serve(self) -> None:
        """Hand over what can be handed over: a consumer has room again."""
        self._dispatch()
        self._note_fullness()

    def take_one(self) -> Stored | None:
        """Take the next message for one who asks for it; None if there is none."""
        self.renew()
        self._expire()
        if not len(self._ready):
            return None
        self.unacked += 1
        stored = self._ready.take()
        self._note_fullness()
        self._arm()
        return stored

    def _dispatch(self) -> None:
        self._expire()
        while len(self._ready) and (taker := self._next_taker()) is not None:
            self.unacked += 1
            taker.take(self, self._ready.take())
            self._expire()
        self._arm()

    def _next_taker(self) -> Taker | None:
        for _ in range(len(self._takers)):
            taker = self._takers.popleft()
            self._takers.append(taker)
            if taker.has_room():
                return taker
        return None

    def outgoing(self, stored: Stored) -> Message:
        """Return what a consumer gets."""
        return delivered(
            stored,
            queue=self.name,
            semantics=self._semantics,
            is_quorum=self.limits.is_quorum,
        )

    # What becomes of what was handed over

    def ack(self) -> None:
        """Forget a message that was handed over."""
        self.unacked -= 1

    def put_back(self, returned: list[Stored], cause: Return) -> None:
        """Take messages back that were handed over, in this order."""
        if self.is_deleted:
            return
        for stored in returned:
            self.unacked -= 1
            stored.acquired_count += 1
            if cause is not Return.NACK or self._semantics.counts_nack:
                stored.delivery_count += 1
            limit = self.limits.delivery_limit
            if self.limits.is_quorum and limit is not None and stored.delivery_count > limit:
                self._bury(stored, "delivery_limit")
            else:
                self._ready.put_back(stored)
        self._dispatch()
        self._note_fullness()

    # Messages out

    def _expire(self) -> None:
        now = self._clock.time()
        is_due = True
        while is_due:
            is_due = False
            for stored in self._ready.heads():
                if stored.expires_at is not None and stored.expires_at <= now + 1e-6:
                    is_due = True
                    self._ready.take_head(stored)
                    self._bury(stored, "expired")
        self._note_fullness()

    def _arm(self) -> None:
        """Have the next head that expires looked at when it does."""
        times = [one.expires_at for one in self._ready.heads() if one.expires_at is not None]
        first = min(times, default=None)
        if self._expiry is not None:
            if not self._expiry.is_over and self._expiry.when == first:
                return
            self._expiry.cancel()
            self._expiry = None
        if first is not None:
            self._expiry = self._clock.call_at(first, self._dispatch)

    def _bury(self, stored: Stored, reason: Reason) -> None:
        if not self._dead_letter(self, stored, reason):
            self._undeliverable.append((stored, reason))
            if self._retry is None:
                when = self._clock.time() + _DEAD_LETTER_RETRY
                self._retry = self._clock.call_at(when, self._bury_again)

    def _bury_again(self) -> None:
        self._retry = None
        again, self._undeliverable = self._undeliverable, []
        for stored, reason in again:
            self._bury(stored, reason)

    @property
    def undeliverable(self) -> list[Message]:
        """Dead letters that no queue took yet; they wait here."""
        return [stored.message for stored, _ in self._undeliverable]

    def delete(self) -> None:
        """Forget everything, and tell the consumers."""
        self.is_deleted = True
        for timer in (self._expiry, self._retry, self._lease):
            if timer is not None:
                timer.cancel()
        while len(self._ready):
            self._ready.take()
        self._undeliverable.clear()
        takers, self._takers = self._takers, deque()
        for taker in takers:
            taker.lose_queue("RabbitMQ cancelled the consumer: its queue was deleted or moved")
