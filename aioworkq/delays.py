"""Declaring the delay queues when they are first needed, and no more of them than needed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from aioworkq.delay import Route, destination_binding, level_declarations, route

if TYPE_CHECKING:
    from aioworkq.broker import Connection
    from aioworkq.message import Message
    from aioworkq.topology import Declaration

_BOUND_FOR: Final = 5.0
"""A destination is bound again after so many seconds: it may have been deleted and made anew."""


class DelayQueues:
    """Finds the way of delayed messages, and declares what is on it.

    Args:
        connection: Where to declare.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._level = -1
        self._bound: dict[str, float] = {}
        self._lock = asyncio.Lock()

    async def send_off(self, message: Message, delay: float, *, timeout: float) -> None:
        """Declare what a message needs to reach its queue after a delay, and address it.

        Args:
            message: Its ``queue`` says where it shall arrive; exchange and routing key are set.
            delay: Seconds, more than 0.
            timeout: Seconds for each declaration.

        Raises:
            TopologyError: The broker refuses a declaration.
            ConnectionLostError: The connection went away, or no answer came in time.
        """
        way = route(message.queue, delay)
        await self._ensure(way, message.queue, timeout=timeout)
        message.exchange, message.routing_key = way.exchange, way.routing_key

    def send_off_nowait(self, message: Message, delay: float) -> bool:
        """Address a message, and return True, if nothing has to be declared for it."""
        way = route(message.queue, delay)
        if self._needed(way, message.queue):
            return False
        message.exchange, message.routing_key = way.exchange, way.routing_key
        return True

    async def _ensure(self, way: Route, queue: str, *, timeout: float) -> None:
        async with self._lock:
            needed = self._needed(way, queue)
            if not needed:
                return
            await self._connection.declare(needed, timeout=timeout)
            self._level = max(self._level, way.level)
            self._bound[queue] = asyncio.get_running_loop().time()

    def _needed(self, way: Route, queue: str) -> list[Declaration]:
        needed: list[Declaration] = []
        if way.level > self._level:
            needed += level_declarations(way.level)
        now = asyncio.get_running_loop().time()
        if now - self._bound.get(queue, -_BOUND_FOR) >= _BOUND_FOR:
            needed.append(destination_binding(queue))
        return needed

    def forget(self) -> None:
        """Declare everything again: something of it was found missing."""
        self._level = -1
        self._bound.clear()
