"""What this process remembers of deliveries whose channel was lost.

RabbitMQ hands over again everything that was unsettled. Some of it is still running here, some of
it is done and only its ack was lost, some of it was never started. This memory tells which, so
that nothing runs beside itself, nothing that succeeded runs twice, and nothing unstarted is charged
an attempt. It is bounded, belongs to one consumer, and only ever errs towards running once more.

Messages are told apart by their ``message_id``. For one without an id, only "is an equal body still
running" is asked: two equal messages without ids may be two pieces of work, and both must be done.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from aioworkq.message import Message

K = TypeVar("K")


class RedeliveryMemory(Generic[K]):
    """A bounded memory of acks and of returns that were no attempts.

    Args:
        size: So many message ids are remembered of each kind; the oldest are forgotten first.
    """

    def __init__(self, *, size: int) -> None:
        self._size = size
        self._acked: OrderedDict[str, K] = OrderedDict()
        self._excused: OrderedDict[str, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._acked) + len(self._excused)

    def acked(self, message: Message, subscription: K) -> None:
        """Remember that a message was handled and acked on this subscription."""
        key = message.message_id
        if not key:
            return
        self._excused.pop(key, None)
        self._acked[key] = subscription
        if len(self._acked) > self._size:
            self._acked.popitem(last=False)

    def acked_on(self, message: Message) -> K | None:
        """Return the subscription that a message was last acked on, if it is remembered."""
        return self._acked.get(message.message_id) if message.message_id else None

    def excuse(self, message: Message) -> None:
        """Remember that this message comes back, though it was not started."""
        key = message.message_id
        if not key:
            return
        self._excused[key] = self._excused.pop(key, 0) + 1
        if len(self._excused) > self._size:
            self._excused.popitem(last=False)

    def excused(self, message: Message) -> int:
        """Return how many returns of this message were no attempts."""
        return self._excused.get(message.message_id, 0) if self._excused else 0

    def started(self, message: Message) -> None:
        """Forget the ack of an earlier copy: what runs now must be settled by itself."""
        if self._acked:
            self._acked.pop(message.message_id, None)

    def settled(self, message: Message) -> None:
        """Forget the excuses: this copy is gone, and a later one has counts of its own."""
        if self._excused:
            self._excused.pop(message.message_id, None)


def is_same_message(one: Message, other: Message) -> bool:
    """Say whether two deliveries may be of one message."""
    if one.message_id or other.message_id:
        return one.message_id == other.message_id
    return one.body == other.body
