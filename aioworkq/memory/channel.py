"""What the channels of a memory connection share, and one delivery on them."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Final

import anyio

from aioworkq.broker import Incoming
from aioworkq.errors import ConnectionLostError
from aioworkq.memory.limits import Return

if TYPE_CHECKING:
    from aioworkq.memory.connection import MemoryConnection
    from aioworkq.memory.queue import MemoryQueue
    from aioworkq.memory.stored import Stored

_CLOSED: Final = "closed by this side"


class MemoryChannel:
    """What all channels share: they are lost once, and give back what they hold."""

    def __init__(self, connection: MemoryConnection) -> None:
        self._connection = connection
        self._broker = connection.broker
        self._lost = asyncio.Event()
        self._reason = ""
        self._unacked: dict[int, tuple[MemoryQueue, Stored]] = {}
        self._tags = 0

    @property
    def is_lost(self) -> bool:
        """Whether the channel is gone."""
        return self._lost.is_set()

    @property
    def reason(self) -> str:
        """Why it is lost; empty while it is not."""
        return self._reason

    def lose(self, reason: str) -> None:
        """End: nothing comes or goes here any more."""
        if not self._lost.is_set():
            self._reason = reason
            self._lost.set()

    def stop_taking(self) -> None:
        """Be no consumer any more."""

    def return_unacked(self, cause: Return = Return.LOST) -> None:
        """Give back to the queues what was handed over here, in the order it was."""
        held, self._unacked = self._unacked, {}
        by_queue: dict[MemoryQueue, list[Stored]] = {}
        for queue, stored in held.values():
            by_queue.setdefault(queue, []).append(stored)
        for queue, returned in by_queue.items():
            queue.put_back(returned, cause)

    def hand_out(self, queue: MemoryQueue, stored: Stored) -> Incoming:
        """Number a message that goes to the client."""
        self._tags += 1
        self._unacked[self._tags] = (queue, stored)
        return Incoming(queue.outgoing(stored), self._tags, bool(stored.acquired_count))

    def take_ack(self, tag: int) -> None:
        """Forget a message: the client is done with it. Or lose the ack, when that was planned."""
        held = self._unacked.get(tag)
        if held is None:
            return
        queue, _ = held
        if self._broker.faults.happens("lose ack", queue.name):
            self._connection.drop("the connection was dropped before an ack arrived")
            self._broker.reconnect()
            return
        del self._unacked[tag]
        queue.ack()
        queue.serve()

    def abandon(self) -> None:
        """Close without waiting for an answer."""
        self.lose(_CLOSED)
        self._connection.forget_channel(self)
        self.return_unacked()

    async def aclose(self, *, timeout: float) -> None:
        """Close the channel, after all that was said on it. Bounded, twice harmless."""
        if self._connection.has_channel(self):  # one whose consumer was cancelled is open still
            with anyio.CancelScope(shield=True), contextlib.suppress(ConnectionLostError):
                await self._connection.call("closing a channel", self.abandon, timeout=timeout)
        self.lose(_CLOSED)

    async def wait_lost(self) -> str:
        """Wait until it is gone, and return why."""
        await self._lost.wait()
        return self._reason
