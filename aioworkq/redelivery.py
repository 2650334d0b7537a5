"""What this process remembers of deliveries whose channel was lost.

RabbitMQ hands over again everything that was unsettled. Some of it is still running here, some of
it is done and only its ack was lost, some of it was never started. This memory tells which, so
that nothing runs beside itself, nothing that succeeded runs twice, and nothing unstarted is charged
an attempt. It is bounded, belongs to one consumer, and only ever errs towards running once more.

Messages are told apart by their ``message_id``, and a copy of ours from its original by its number.
For messages without an id, only "is an equal body still running" is asked: two
equal messages without ids may be two pieces of work, and both must be done.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Final, Generic, TypeAlias, TypeVar

from aioworkq.message import COPIES

if TYPE_CHECKING:
    from datetime import datetime

    from aioworkq.message import Message

K = TypeVar("K")

Identity: TypeAlias = "tuple[str, int, datetime | None, str]"


_END: Final = 8192


def identity(message: Message) -> Identity | None:
    """Return what a message shares with its redeliveries and with no copy; None without an id.

    The body and the time are there for clients that use an id more than once. Of a large body its
    size and its ends will do: all of it would cost more than the rest of a message's way.
    """
    if not message.message_id:
        return None
    body = message.body
    if len(body) > 2 * _END:
        body = b"%d%b%b" % (len(body), body[:_END], body[-_END:])
    copies = str(message.headers.get(COPIES, ""))
    return (message.message_id, hash(body), message.timestamp, copies)


def common_key(message: Message) -> str | bytes:
    """Return what a message shares with its redeliveries and its copies.

    Without an id that is the body: an equal one may be the same message.
    """
    return message.message_id or message.body


class RedeliveryMemory(Generic[K]):
    """A bounded memory of acks and of returns that were no attempts.

    Args:
        size: So many messages are remembered of each kind; the oldest are forgotten first.
    """

    def __init__(self, *, size: int) -> None:
        self._size = size
        self._acked: OrderedDict[Identity, K] = OrderedDict()
        self._excused: OrderedDict[Identity, int] = OrderedDict()
        self._returned: OrderedDict[Identity, tuple[int, datetime]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._acked) + len(self._excused) + len(self._returned)

    def acked(self, message: Message, subscription: K) -> None:
        """Remember that a message is done, and was acked on this subscription."""
        key = identity(message)
        if key is None:
            return
        self._excused.pop(key, None)
        self._returned.pop(key, None)
        self._acked[key] = subscription
        if len(self._acked) > self._size:
            self._acked.popitem(last=False)

    def acked_on(self, message: Message) -> K | None:
        """Return the subscription that a message was last acked on, if it is remembered."""
        key = identity(message) if self._acked else None
        return None if key is None else self._acked.get(key)

    def excuse(self, message: Message) -> None:
        """Remember that this message comes back, though its return was no attempt."""
        key = identity(message)
        if key is None:
            return
        # What comes back is not done, whatever happened to an equal message before.
        self._acked.pop(key, None)
        self._excused[key] = self._excused.pop(key, 0) + 1
        if len(self._excused) > self._size:
            self._excused.popitem(last=False)

    def excused(self, message: Message) -> int:
        """Return how many returns of this message were no attempts."""
        key = identity(message) if self._excused else None
        return 0 if key is None else self._excused.get(key, 0)

    def returned(self, message: Message, when: datetime) -> None:
        """Remember that this message was given back here, after an attempt that failed now."""
        key = identity(message)
        if key is None:
            return
        count, first = self._returned.pop(key, (0, when))
        self._returned[key] = (count + 1, first)
        if len(self._returned) > self._size:
            self._returned.popitem(last=False)

    def returns(self, message: Message) -> int:
        """Return how many returns of this message were failed attempts of this process."""
        known = self._known_returns(message)
        return 0 if known is None else known[0]

    def first_failure(self, message: Message) -> datetime | None:
        """Return when an attempt of this message failed here for the first time."""
        known = self._known_returns(message)
        return None if known is None else known[1]

    def _known_returns(self, message: Message) -> tuple[int, datetime] | None:
        key = identity(message) if self._returned else None
        return None if key is None else self._returned.get(key)

    def started(self, message: Message) -> None:
        """Forget the ack of an equal message: what runs now must be settled by itself."""
        key = identity(message) if self._acked else None
        if key is not None:
            self._acked.pop(key, None)
