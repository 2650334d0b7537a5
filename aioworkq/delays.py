"""Declaring the delay queues when they are first needed, and no more of them than needed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from aioworkq.delay import Route, arrival, destination_declarations, level_declarations, route
from aioworkq.topology import refuses_when_full

if TYPE_CHECKING:
    from aioworkq.broker import Connection
    from aioworkq.message import Message
    from aioworkq.topology import Declaration, Queue

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

    async def send_off(
        self, message: Message, delay: float, queue: Queue[Any], *, timeout: float
    ) -> None:
        """Declare what a message needs to reach its queue after a delay, and address it.

        Args:
            message: Its exchange and routing key are set.
            delay: Seconds, more than 0.
            queue: Where it shall arrive.
            timeout: Seconds for each declaration.

        Raises:
            TopologyError: The broker refuses a declaration.
            ConnectionLostError: The connection went away, or no answer came in time.
        """
        end = _end(queue)
        way = route(end, delay)
        async with self._lock:
            needed = self._needed(way, queue.name, end)
            if needed:
                await self._connection.declare(needed, timeout=timeout)
                self._level = max(self._level, way.level)
                self._bound[end] = _now()
        message.exchange, message.routing_key = way.exchange, way.routing_key

    def send_off_nowait(self, message: Message, delay: float, queue: Queue[Any]) -> bool:
        """Address a message, and return True, if nothing has to be declared for it."""
        end = _end(queue)
        way = route(end, delay)
        if self._needed(way, queue.name, end):
            return False
        message.exchange, message.routing_key = way.exchange, way.routing_key
        return True

    def _needed(self, way: Route, name: str, end: str) -> list[Declaration]:
        needed: list[Declaration] = []
        if way.level > self._level:
            needed += level_declarations(way.level)
        if _now() - self._bound.get(end, -_BOUND_FOR) >= _BOUND_FOR:
            needed += destination_declarations(name, may_refuse=end != name)
        return needed

    def forget(self) -> None:
        """Declare everything again: something of it was found missing."""
        self._level = -1
        self._bound.clear()


def _end(queue: Queue[Any]) -> str:
    """Return the name of the queue that the way through the delay queues ends in."""
    return arrival(queue.name) if refuses_when_full(queue) else queue.name


def _now() -> float:
    return asyncio.get_running_loop().time()
