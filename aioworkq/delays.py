"""Declaring the delay queues when they are first needed, and no more of them than needed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakValueDictionary

from aioworkq.delay import arrival, destination_declarations, level_declarations, route
from aioworkq.topology import refuses_when_full

if TYPE_CHECKING:
    from aioworkq.broker import Connection
    from aioworkq.message import Message
    from aioworkq.topology import Queue

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
        self._levels = asyncio.Lock()
        self._ends: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

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
        async with self._levels:
            if way.level > self._level:
                await self._connection.declare(level_declarations(way.level), timeout=timeout)
                self._level = max(self._level, way.level)
        # One that hangs holds up nobody else.
        async with self._ends.setdefault(end, asyncio.Lock()):
            if not self._is_bound(end):
                needed = destination_declarations(queue.name, may_refuse=end != queue.name)
                await self._connection.declare(needed, timeout=timeout)
                self._bound[end] = _now()
        message.exchange, message.routing_key = way.exchange, way.routing_key

    def send_off_nowait(self, message: Message, delay: float, queue: Queue[Any]) -> bool:
        """Address a message, and return True, if nothing has to be declared for it."""
        end = _end(queue)
        way = route(end, delay)
        if way.level > self._level or not self._is_bound(end):
            return False
        message.exchange, message.routing_key = way.exchange, way.routing_key
        return True

    def _is_bound(self, end: str) -> bool:
        return _now() - self._bound.get(end, -_BOUND_FOR) < _BOUND_FOR

    def forget(self) -> None:
        """Declare everything again: something of it was found missing."""
        self._level = -1
        self._bound.clear()


def _end(queue: Queue[Any]) -> str:
    """Return the name of the queue that the way through the delay queues ends in."""
    return arrival(queue.name) if refuses_when_full(queue) else queue.name


def _now() -> float:
    return asyncio.get_running_loop().time()
