"""What aioworkq needs from a broker.

There are two implementations: RabbitMQ through aio-pika (``amqp/``), and one in memory
(``memory/``). The code above this module knows nothing else of either. But for those that wait for
an event or for time, no call of these protocols waits without a bound: it returns, or raises
`ConnectionLostError` or one of its siblings.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from datetime import datetime

    from aioworkq.message import Message
    from aioworkq.topology import Declaration


class Event(Protocol):
    """What can be waited for: an event of asyncio or AnyIO."""

    def is_set(self) -> bool:
        """Whether it has happened."""
        ...

    async def wait(self) -> Any:
        """Wait until it has."""
        ...


class Confirm(Enum):
    """What a broker answers to a publication."""

    ACK = "ack"
    """It has taken responsibility."""
    NACK = "nack"
    """It refused."""
    RETURNED = "returned"
    """No queue takes it: nothing is stored."""
    UNSENDABLE = "unsendable"
    """It cannot be put on this connection, and was not sent."""


class Publication(Protocol):
    """A message on its way to the broker, as a `PublishChannel` sees it."""

    message: Message
    wire: Any
    """What `Connection.prepare` made of the message."""

    def settle(self, confirm: Confirm, reason: str) -> None:
        """Take the broker's answer. Called once per sending, never raises."""
        ...


class PublishChannel(Protocol):
    """A channel in confirm mode. It lives until it is lost, then a new one is opened."""

    def send(self, publication: Publication) -> None:
        """Send without waiting; the answer goes to ``publication.settle``.

        Nothing is answered once the channel is lost: `take_unconfirmed` has what is left.
        """
        ...

    @property
    def refusal(self) -> Confirm | None:
        """What it means for a message that the broker closed the channel because of it.

        `Confirm.RETURNED` if the message's exchange does not exist, `Confirm.NACK` if the broker
        refuses it otherwise; None if the channel was lost for another reason.
        """
        ...

    async def wait_lost(self) -> str:
        """Wait until the channel is unusable, and return why."""
        ...

    def take_unconfirmed(self) -> list[Publication]:
        """Return what was sent and not answered, in order, and forget it."""
        ...

    async def aclose(self, *, timeout: float) -> None:
        """Close the channel. Bounded, twice harmless. Meanwhile it still settles."""
        ...


class Incoming(Struct, eq=False):
    """One delivery as a broker hands it over."""

    message: Message
    tag: int
    redelivered: bool


class Subscription(Protocol):
    """One consumer on a channel of its own.

    Its settling methods never wait and never raise. On a lost channel they do nothing and return
    False: RabbitMQ has requeued everything unsettled by itself.
    """

    @property
    def is_lost(self) -> bool:
        """Whether the channel or the consumer is gone."""
        ...

    @property
    def reason(self) -> str:
        """Why it is lost; empty while it is not."""
        ...

    def ack(self, tag: int) -> bool:
        """Acknowledge one delivery."""
        ...

    def requeue(self, tag: int, *, counts: bool) -> bool:
        """Give one delivery back to its queue.

        ``counts`` chooses between the two verbs that RabbitMQ 4.3 tells apart: a reject is counted
        as a failure, a nack is not. Older versions count both.
        (https://www.rabbitmq.com/docs/nack)
        """
        ...

    async def wait_lost(self) -> str:
        """Wait until the subscription is gone, and return why."""
        ...

    async def wait_sent(self) -> None:
        """Wait until all that was settled is on its way to the broker, or the subscription lost."""
        ...

    async def cancel(self, *, timeout: float) -> None:
        """Ask for no more deliveries; those that came can still be settled. Bounded."""
        ...

    async def resume(self, *, prefetch_count: int, timeout: float) -> None:
        """Ask for deliveries again, after `cancel`. Bounded; if it fails, the channel is lost."""
        ...

    async def aclose(self, *, timeout: float) -> None:
        """Send what is settled, then close the channel. Bounded, twice harmless."""
        ...


class Getter(Protocol):
    """Takes messages of one queue one by one, on a channel of its own."""

    async def get(self, *, timeout: float) -> Incoming | None:
        """Take the next message; None when the queue has none.

        Raises:
            TopologyError: The queue does not exist, or may not be read.
            ConnectionLostError: The channel ended, or no answer came in time.
        """
        ...

    async def ack(self, tag: int, *, timeout: float) -> None:
        """Acknowledge one message.

        Raises:
            ConnectionLostError: The channel ended: the message is back in its queue.
        """
        ...

    async def aclose(self, *, timeout: float) -> None:
        """Close the channel; what was not acknowledged goes back. Bounded, twice harmless."""
        ...


class Connection(Protocol):
    """A connection that comes back by itself."""

    async def start(self) -> None:
        """Begin to connect; does not wait for it."""
        ...

    async def wait_connected(self) -> None:
        """Wait until it is usable.

        Raises:
            AccessRefusedError: It can never be.
            ConnectionLostError: It is closed, or its TLS handshake can never succeed.
        """
        ...

    @property
    def is_connected(self) -> bool:
        """Whether it is usable, as far as is known."""
        ...

    @property
    def is_blocked(self) -> bool:
        """Whether the broker blocks publishers (memory or disk alarm)."""
        ...

    @property
    def reconnects(self) -> int:
        """How often it came back after a loss."""
        ...

    @property
    def last_error(self) -> str:
        """Why it was last lost or not made; empty if neither happened."""
        ...

    @property
    def counts_nacks(self) -> bool:
        """Whether a quorum queue counts a delivery that is nacked (RabbitMQ before 4.3)."""
        ...

    @property
    def keeps_refusing(self) -> bool:
        """Whether a queue that refuses all on a channel may take it on another one.

        (RabbitMQ before 4.0, in a cluster, after a quorum queue had no leader.)
        """
        ...

    def now(self) -> datetime:
        """Return the time, aware: what messages are stamped with, and delays count from."""
        ...

    async def sleep(self, seconds: float, *, until: Event | None = None) -> None:
        """Wait for so many seconds of the broker's clock, or until an event is set.

        That clock is the real one, but for an in-memory broker whose time is virtual.
        """
        ...

    def prepare(self, message: Message) -> Any:
        """Encode all that does not depend on a channel.

        Raises:
            ValueError: The broker would not take it: too large, or a name too long.
            TypeError: A header's value has a type that AMQP does not know.
        """
        ...

    async def declare(self, declarations: Iterable[Declaration], *, timeout: float) -> None:
        """Declare what does not exist yet.

        Raises:
            TopologyError: The broker refuses, or what must exist does not.
            ConnectionLostError: The connection went away, or no answer came in time.
        """
        ...

    async def open_publish_channel(self, *, timeout: float) -> PublishChannel:
        """Open a channel in confirm mode.

        Raises:
            ConnectionLostError: As for `declare`.
        """
        ...

    async def count_messages(self, queue: str, *, timeout: float) -> int:
        """Return how many messages of a queue are ready, unacknowledged ones not among them.

        Raises:
            TopologyError: The queue does not exist.
            ConnectionLostError: As for `declare`.
        """
        ...

    async def delete_queue(self, queue: str, *, timeout: float) -> None:
        """Delete a queue with all that is in it; one that does not exist is deleted already.

        Raises:
            TopologyError: It may not be deleted.
            ConnectionLostError: As for `declare`.
        """
        ...

    async def open_getter(self, queue: str, *, timeout: float) -> Getter:
        """Open a channel to take single messages.

        Raises:
            ConnectionLostError: As for `declare`.
        """
        ...

    async def subscribe(
        self,
        queue: str,
        *,
        prefetch_count: int,
        on_delivery: Callable[[Subscription, Incoming], None],
        timeout: float,
    ) -> Subscription:
        """Open a channel and consume from a queue.

        With many at a time, each waits for its turn; its time limit begins with that.

        ``on_delivery`` is called for each delivery, in order, between two steps of the event loop;
        it must neither wait nor raise.

        Raises:
            TopologyError: The broker refuses.
            ConnectionLostError: As for `declare`.
        """
        ...

    async def aclose(self, *, timeout: float) -> None:
        """Close it. Bounded, twice harmless, effective while it still connects."""
        ...
