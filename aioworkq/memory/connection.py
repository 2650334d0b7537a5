"""A connection to a memory broker: the `aioworkq.broker.Connection` beside AMQP's.

What a client asks for and what the broker answers are calls in one queue (``line.py``), which the
event loop empties between two steps of everything else. So nothing is answered from within a call,
order is kept, and what is under way when the connection drops is lost, as on a wire.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeVar

import anyio
from anyio.lowlevel import checkpoint

from aioworkq.amqp.wire import DEFAULT_FRAME_MAX, encode
from aioworkq.changes import Changes
from aioworkq.errors import ConnectionLostError
from aioworkq.memory.channels import MemoryGetter, MemoryPublishChannel, MemorySubscription
from aioworkq.memory.line import Line
from aioworkq.memory.node import Refusal
from aioworkq.memory.refusals import (
    NOT_FOUND,
    REFUSALS,
    OtherLoopError,
    if_missing,
    name_of,
    topology_error,
)
from aioworkq.memory.stored import over_the_wire
from aioworkq.topology import QueueDeclaration

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from datetime import datetime

    from aioworkq.broker import Event, Incoming, Subscription
    from aioworkq.memory.channel import MemoryChannel
    from aioworkq.memory.hub import Hub
    from aioworkq.message import Message
    from aioworkq.topology import Declaration

_log = logging.getLogger("aioworkq")

T = TypeVar("T")

C = TypeVar("C", bound="MemoryChannel")

Owner: TypeAlias = Literal["producer", "worker", "dead letters"]


class MemoryConnection(Line):
    """One client's connection.

    Args:
        broker: The broker.
        name: Shown in errors.
        owner: What uses it.
        max_message_size: Bodies may have so many bytes.
    """

    def __init__(
        self,
        broker: Hub,
        *,
        name: str,
        owner: Owner,
        max_message_size: int,
    ) -> None:
        super().__init__(broker)
        self.name = name
        self.owner: Owner = owner
        self._max_message_size = max_message_size
        self._channels: dict[MemoryChannel, None] = {}
        self._changes = Changes()
        self._is_closed = False
        self._was_started = False
        self._refused: OtherLoopError | None = None
        self._connects = 0

    def __repr__(self) -> str:
        return f"<MemoryConnection {self.name!r} to {self.broker!r}>"

    async def start(self) -> None:
        """Begin to connect; does not wait for it."""
        if not self._was_started and not self._is_closed:
            self._was_started = True
            try:
                self.broker.attach(self)
            except OtherLoopError as exc:
                self._refused = exc

    def connect(self) -> None:
        """Become usable. Called by the broker."""
        if not (self._is_connected or self._is_closed):
            self._is_connected = True
            self._connects += 1
            self._changes.notify()

    def drop(self, reason: str) -> None:
        """Lose the connection: everything on it, and everything under way. Called by the broker."""
        if not self._is_connected:
            return
        self.cut(reason)
        channels, self._channels = list(self._channels), {}
        for channel in channels:
            channel.lose(reason)
        for channel in channels:  # no consumer of ours is left that a message could go to
            channel.return_unacked()
        self._changes.notify()

    def forsake(self) -> None:
        """Give back what is held here: the event loop has ended, nobody is to be told."""
        self.epoch += 1
        self._is_connected = False
        self._is_closed = True
        for channel in self._channels:
            channel.stop_taking()
        for channel in self._channels:
            channel.return_unacked()

    def has_channel(self, channel: MemoryChannel) -> bool:
        """Say whether a channel is open on the broker's side."""
        return channel in self._channels

    def forget_channel(self, channel: MemoryChannel) -> None:
        """Take note that a channel is closed."""
        self._channels.pop(channel, None)

    async def wait_connected(self) -> None:
        """Wait until it is usable; see the protocol."""
        while not self._is_connected:
            if self._refused is not None:
                raise OtherLoopError(self._refused.what, reason=self._refused.reason)
            if self._is_closed:
                raise ConnectionLostError("connecting", reason="this side closed it")
            await self._changes.wait()

    @property
    def is_connected(self) -> bool:
        """Whether it is usable."""
        return self._is_connected

    @property
    def reconnects(self) -> int:
        """How often it came back after a loss."""
        return max(0, self._connects - 1)

    @property
    def last_error(self) -> str:
        """Why it was last lost; empty if it never was."""
        return self._last_error

    @property
    def counts_nacks(self) -> bool:
        """Whether a quorum queue counts a delivery that is nacked."""
        return self.broker.semantics.counts_nack

    @property
    def keeps_refusing(self) -> bool:
        """Whether a queue that refuses all on a channel may take it on another one: never here."""
        return False

    def now(self) -> datetime:
        """Return the broker's time; see the protocol."""
        return self.broker.clock.now()

    async def sleep(self, seconds: float, *, until: Event | None = None) -> None:
        """Wait by the broker's clock; see the protocol."""
        if seconds <= 0 or (until is not None and until.is_set()):
            await checkpoint()
            return
        over = asyncio.Event()
        clock = self.broker.clock
        timer = clock.call_at(clock.time() + seconds, over.set, is_pause=True)
        self.broker.changes.notify()
        try:
            if until is None:
                await over.wait()
                return
            waits = [asyncio.ensure_future(event.wait()) for event in (over, until)]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
        finally:
            timer.cancel()

    def prepare(self, message: Message) -> Message:
        """Check and copy a message as the wire would; see the protocol."""
        encode(
            message,
            frame_max=DEFAULT_FRAME_MAX,
            max_message_size=self._max_message_size,
        )
        return over_the_wire(message)

    # Using it

    async def declare(self, declarations: Iterable[Declaration], *, timeout: float) -> None:
        """Declare what does not exist yet; see the protocol."""
        for declaration in declarations:
            what = f"declaring {name_of(declaration)!r}"
            try:
                await self.call(what, partial(self._declare, declaration), timeout=timeout)
            except Refusal as refusal:
                error = topology_error(declaration, refusal)
                if refusal.code != NOT_FOUND or if_missing(declaration) != "warn":
                    raise error from None
                _log.warning("%s Messages that are given up will go back to their queue.", error)

    def _declare(self, declaration: Declaration) -> None:
        node, name = self.broker.node, name_of(declaration)
        code = self.broker.faults.happens("refuse declaration", name)
        if code:
            raise Refusal(code, f"{REFUSALS[code]} - the declaration of {name!r} is refused")
        if isinstance(declaration, QueueDeclaration) and (
            name in node.queues or declaration.if_missing != "create"
        ):
            node.look_for(name).renew()
        else:
            node.declare(declaration)

    async def open_publish_channel(self, *, timeout: float) -> MemoryPublishChannel:
        """Open a channel in confirm mode; see the protocol."""
        return await self._open("opening a channel to publish", MemoryPublishChannel, timeout)

    async def _open(self, what: str, make: Callable[[MemoryConnection], C], timeout: float) -> C:
        def serve() -> C:
            channel = make(self)
            self._channels[channel] = None
            return channel

        return await self.call(what, serve, timeout=timeout)

    async def count_messages(self, queue: str, *, timeout: float) -> int:
        """Return how many messages of a queue are ready; see the protocol."""
        what = f"counting the messages of queue {queue!r}"
        try:
            return await self.call(what, partial(self._count, queue), timeout=timeout)
        except Refusal as refusal:
            raise topology_error(queue, refusal) from None

    def _count(self, name: str) -> int:
        queue = self.broker.node.look_for(name)
        queue.renew()
        return len(queue)

    async def delete_queue(self, queue: str, *, timeout: float) -> None:
        """Delete a queue; see the protocol."""

        def serve() -> None:
            if queue in self.broker.node.queues:
                self.broker.node.delete_queue(queue)

        await self.call(f"deleting queue {queue!r}", serve, timeout=timeout)

    async def open_getter(self, queue: str, *, timeout: float) -> MemoryGetter:
        """Open a channel to take single messages; see the protocol."""
        return await self._open(
            f"reading queue {queue!r}",
            lambda connection: MemoryGetter(connection, queue),
            timeout,
        )

    async def subscribe(
        self,
        queue: str,
        *,
        prefetch_count: int,
        on_delivery: Callable[[Subscription, Incoming], None],
        timeout: float,
    ) -> MemorySubscription:
        """Open a channel and consume from a queue; see the protocol."""
        what = f"consuming from queue {queue!r}"

        subscription: MemorySubscription | None = None

        def serve() -> MemorySubscription:
            nonlocal subscription
            subscription = MemorySubscription(
                self,
                self.broker.node.look_for(queue),
                prefetch_count=prefetch_count,
                on_delivery=on_delivery,
            )
            self._channels[subscription] = None
            subscription.consume()
            return subscription

        try:
            return await self.call(what, serve, timeout=timeout)
        except Refusal as refusal:
            raise topology_error(queue, refusal) from None
        except BaseException:
            if subscription is not None:
                subscription.abandon()
            raise

    async def aclose(self, *, timeout: float) -> None:
        """Close it, after what was asked before. Bounded, twice harmless."""
        if self._is_connected and not self.is_blocked and self.broker.serves_this_loop:
            with anyio.CancelScope(shield=True), contextlib.suppress(ConnectionLostError):
                await self.call("closing", lambda: None, timeout=timeout)
        self._is_closed = True
        self.drop("this side closed it")
        self.broker.detach(self)
        self._changes.notify()
