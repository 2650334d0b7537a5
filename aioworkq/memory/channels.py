"""The channels of a memory connection: publishing with confirms, consuming, taking one by one."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from aioworkq.broker import Confirm
from aioworkq.errors import ConnectionLostError
from aioworkq.memory.channel import MemoryChannel
from aioworkq.memory.limits import Return
from aioworkq.memory.node import Refusal
from aioworkq.memory.refusals import NOT_FOUND, topology_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioworkq.broker import Incoming, Publication, Subscription
    from aioworkq.memory.connection import MemoryConnection
    from aioworkq.memory.queue import MemoryQueue
    from aioworkq.memory.stored import Stored
    from aioworkq.message import Message


class MemoryPublishChannel(MemoryChannel):
    """The `aioworkq.broker.PublishChannel` of the memory broker."""

    def __init__(self, connection: MemoryConnection) -> None:
        super().__init__(connection)
        self._number = 0
        self._unconfirmed: dict[int, Publication] = {}
        self._refusal: Confirm | None = None

    def send(self, publication: Publication) -> None:
        """Send without waiting; see the protocol."""
        self._number += 1
        self._unconfirmed[self._number] = publication
        if not self._lost.is_set():
            self._connection.has_published = True
            self._connection.post(partial(self._serve, self._number, publication.wire))

    def _serve(self, number: int, message: Message) -> None:
        if self._lost.is_set():
            return
        faults = self._broker.faults
        if faults.happens("refuse publish", message.queue):
            self._confirm(number, Confirm.NACK, "RabbitMQ sent a negative confirm")
            return
        try:
            published = self._broker.node.publish(message)
        except Refusal as refusal:
            self._refusal = Confirm.RETURNED if refusal.code == NOT_FOUND else Confirm.NACK
            self.lose(refusal.text)
            self._connection.forget_channel(self)
            return
        if published.confirm is Confirm.ACK:
            self._broker.record(message, owner=self._connection.owner)
        if faults.happens("lose confirm", message.queue):
            self._connection.drop("the connection was dropped before a confirm was sent")
            self._broker.reconnect()
            return
        self._confirm(number, published.confirm, published.reason)

    def _confirm(self, number: int, confirm: Confirm, reason: str) -> None:
        def tell() -> None:
            publication = self._unconfirmed.pop(number, None)
            if publication is not None:
                publication.settle(confirm, reason)

        self._connection.answer(tell)

    @property
    def refusal(self) -> Confirm | None:
        """What the broker's closing of the channel means for its message; see the protocol."""
        return self._refusal

    def take_unconfirmed(self) -> list[Publication]:
        """Return what was sent and not answered, in order, and forget it."""
        left = list(self._unconfirmed.values())
        self._unconfirmed.clear()
        return left


class MemorySubscription(MemoryChannel):
    """The `aioworkq.broker.Subscription` of the memory broker, and the consumer of its queue."""

    def __init__(
        self,
        connection: MemoryConnection,
        queue: MemoryQueue,
        *,
        prefetch_count: int,
        on_delivery: Callable[[Subscription, Incoming], None],
    ) -> None:
        super().__init__(connection)
        self._queue = queue
        self._prefetch_count = prefetch_count
        self._on_delivery = on_delivery
        self._outstanding: set[int] = set()
        """What the client has and did not settle."""
        self._earlier: set[int] = set()
        """What was handed over before it last asked for deliveries: a prefetch is a consumer's."""

    # The broker's side

    def consume(self) -> None:
        """Begin to take messages."""
        self._queue.subscribe(self)

    def has_room(self) -> bool:
        """Whether the prefetch allows one more."""
        self._earlier.intersection_update(self._unacked)
        held = len(self._unacked) - len(self._earlier)
        return not self._prefetch_count or held < self._prefetch_count

    def take(self, queue: MemoryQueue, stored: Stored) -> None:
        """Take one message for the client."""
        incoming = self.hand_out(queue, stored)

        def tell() -> None:
            if not self._lost.is_set():
                self._outstanding.add(incoming.tag)
                self._on_delivery(self, incoming)

        self._connection.answer(tell)

    def lose_queue(self, reason: str) -> None:
        """Hear that the broker cancels the consumer."""
        self.stop_taking()
        self._connection.answer(partial(super().lose, reason))

    def lose(self, reason: str) -> None:
        """End the consumer; see `MemoryChannel`."""
        self.stop_taking()
        super().lose(reason)

    def stop_taking(self) -> None:
        """Be no consumer any more."""
        self._queue.unsubscribe(self)

    def _serve_ack(self, tag: int) -> None:
        self.take_ack(tag)

    def _serve_requeue(self, tag: int, cause: Return) -> None:
        held = self._unacked.pop(tag, None)
        if held is not None:
            queue, stored = held
            queue.put_back([stored], cause)

    # The client's side

    def _settles(self, tag: int) -> bool:
        """Say whether a delivery can be settled, and is from now on."""
        if self._lost.is_set() or tag not in self._outstanding:
            return False
        self._outstanding.discard(tag)
        return True

    def ack(self, tag: int) -> bool:
        """Acknowledge one delivery; see the protocol."""
        if not self._settles(tag):
            return False
        self._connection.post(partial(self._serve_ack, tag))
        return True

    def requeue(self, tag: int, *, counts: bool) -> bool:
        """Give one delivery back; see the protocol."""
        if not self._settles(tag):
            return False
        cause = Return.REJECT if counts else Return.NACK
        self._connection.post(partial(self._serve_requeue, tag, cause))
        return True

    async def wait_sent(self) -> None:
        """Return at once: no process here can die before its own broker does."""

    async def cancel(self, *, timeout: float) -> None:
        """Ask for no more deliveries; see the protocol."""
        if self._lost.is_set():
            return

        def serve() -> None:
            self._queue.unsubscribe(self)

        try:
            await self._connection.call("cancelling a consumer", serve, timeout=timeout)
        except ConnectionLostError as exc:
            self.lose(exc.reason)

    async def resume(self, *, prefetch_count: int, timeout: float) -> None:
        """Ask for deliveries again; see the protocol."""
        if self._lost.is_set():
            return

        def serve() -> None:
            self._prefetch_count = prefetch_count
            self._earlier = set(self._unacked)
            self.consume()

        try:
            await self._connection.call("consuming again", serve, timeout=timeout)
        except ConnectionLostError as exc:
            self.lose(exc.reason)


class MemoryGetter(MemoryChannel):
    """The `aioworkq.broker.Getter` of the memory broker."""

    def __init__(self, connection: MemoryConnection, queue: str) -> None:
        super().__init__(connection)
        self._queue = queue

    async def get(self, *, timeout: float) -> Incoming | None:
        """Take the next message; see the protocol."""
        self._check("taking a message")
        try:
            return await self._connection.call("taking a message", self._take, timeout=timeout)
        except Refusal as refusal:
            self.abandon()
            raise topology_error(self._queue, refusal) from None

    def _take(self) -> Incoming | None:
        queue = self._broker.node.look_for(self._queue)
        stored = queue.take_one()
        return None if stored is None else self.hand_out(queue, stored)

    async def ack(self, tag: int, *, timeout: float) -> None:
        """Acknowledge one message; see the protocol."""
        self._check("acknowledging a message")
        await self._connection.call(
            "acknowledging a message", partial(self.take_ack, tag), timeout=timeout
        )

    def abandon(self) -> None:
        """Close, after all that was taken has been given back by a nack, as the real one does."""
        self.return_unacked(Return.NACK)
        super().abandon()

    def _check(self, what: str) -> None:
        if self._lost.is_set():
            raise ConnectionLostError(what, reason=self._reason)
