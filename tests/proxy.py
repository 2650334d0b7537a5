"""A TCP proxy that tests put between a client and RabbitMQ, to break what a network breaks.

::

    async with Proxy(node.port) as proxy:
        connection = await aio_pika.connect(proxy.url(node.url))
        proxy.cut()

It reads and writes plain sockets: what it does not read piles up in the kernel and then in its
peer, as behind a real stalled network. It knows where AMQP frames end and nothing else about
AMQP. A connection that does not begin with ``AMQP`` (TLS) is passed through as bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import struct
from typing import TYPE_CHECKING, Literal, Protocol, Self, cast
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from types import TracebackType

Direction = Literal["to_broker", "to_client"]

HOST = "127.0.0.1"
FRAME_END = 0xCE

_CHUNK = 65_536
_HEADER = struct.Struct("!BHI")
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER for 0 seconds: close() sends RST


class OnFrame(Protocol):
    """What is asked about every frame; False drops it."""

    def __call__(
        self, direction: Direction, frame_type: int, channel: int, payload: bytes, /
    ) -> bool: ...


class Proxy:
    """A proxy on a loopback port of its own, in front of a port of the loopback interface.

    All methods that are no coroutines take effect before they return: nothing is forwarded after
    :meth:`stall`, nobody gets in after :meth:`refuse`.

    Attributes:
        port: Where it listens.
        total_connections: How many connections were ever accepted.
        on_frame: Asked about every whole frame in both directions, ``None`` for nobody. An
            exception that it raises closes the connection and is raised when the proxy closes.
    """

    def __init__(self, upstream_port: int) -> None:
        self.upstream_port = upstream_port
        self.port = 0
        self.total_connections = 0
        self.on_frame: OnFrame | None = None
        self._latency = 0.0
        self._swallows = False
        self._gates: dict[Direction, asyncio.Event] = {}
        self._connections: set[_Connection] = set()
        self._changed = asyncio.Condition()
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._errors: list[BaseException] = []

    async def __aenter__(self) -> Self:
        self._gates = {"to_broker": _open_gate(), "to_client": _open_gate()}
        self.accept()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.refuse()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._errors and exc_value is None:
            raise self._errors[0]
