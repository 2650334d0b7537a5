"""The socket under a connection: opened with a bound, kept at hand so that it can be aborted."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from aiormq.connection import TransportFactory
from aiormq.exceptions import AMQPConnectionError

from aioworkq.amqp.reader import FrameReader

if TYPE_CHECKING:
    from collections.abc import Callable

    from yarl import URL

_READ_LIMIT: Final = 2**18
_TLS_SHUTDOWN: Final = 1.0


class SocketProtocol(asyncio.StreamReaderProtocol):
    """Tells who asked when a socket that was full takes bytes again."""

    def __init__(self, reader: FrameReader, *, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(reader, loop=loop)
        self._waiting: list[Callable[[], None]] = []
        self.is_paused = False

    def pause_writing(self) -> None:
        """Take note that the socket is full."""
        self.is_paused = True
        super().pause_writing()

    def resume_writing(self) -> None:
        """Take note that it takes bytes again."""
        self.is_paused = False
        super().resume_writing()
        waiting, self._waiting = self._waiting, []
        for resume in waiting:
            resume()

    def when_resumed(self, resume: Callable[[], None]) -> None:
        """Have a function called once the socket takes bytes again; if it is lost, never."""
        self._waiting.append(resume)


class Link:
    """The two ends of one socket: frames of some channels in, bytes of theirs out.

    aiormq writes to the same socket, whole frames as well, so the order among them does not matter.
    """

    def __init__(
        self,
        reader: FrameReader,
        transport: asyncio.Transport,
        protocol: SocketProtocol,
    ) -> None:
        self.reader = reader
        self._transport = transport
        self._protocol = protocol

    @property
    def is_full(self) -> bool:
        """Whether the socket takes no more for now."""
        return self._protocol.is_paused

    def write(self, data: bytes) -> None:
        """Write whole frames; on a closed socket this does nothing."""
        if not self._transport.is_closing():
            self._transport.write(data)

    def when_resumed(self, resume: Callable[[], None]) -> None:
        """Have a function called once the socket takes bytes again; if it is lost, never."""
        self._protocol.when_resumed(resume)

    def abort(self) -> None:
        """Drop the socket at once, whatever is still buffered."""
        self._transport.abort()


class BoundedTransportFactory(TransportFactory):
    """Opens one socket at a time, within ``timeout`` seconds, and remembers it."""

    def __init__(self, *, timeout: float) -> None:
        self._timeout = timeout
        self._last: Link | None = None
        self.link: Link | None = None
        """Of the current or the last connection; None while one is being made."""

    async def create(
        self,
        url: URL,
        **kwargs: Any,
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect; called by aiormq for each attempt."""
        self.link = None  # what the last host said is not what this one says
        provider = kwargs.pop("ssl_context_provider", None)
        if url.scheme == "amqps" and provider is not None:
            # A silent peer would hold up the next attempt for 30 seconds.
            kwargs |= {"ssl": await provider.get_context(), "ssl_shutdown_timeout": _TLS_SHUTDOWN}
        loop = asyncio.get_running_loop()
        reader = FrameReader(limit=_READ_LIMIT, loop=loop)
        protocol = SocketProtocol(reader, loop=loop)
        try:
            async with asyncio.timeout(self._timeout):
                transport, _ = await loop.create_connection(
                    lambda: protocol,
                    url.host or "",
                    url.port or 0,
                    **kwargs,
                )
        except TimeoutError as exc:
            reason = f"the host did not answer within {self._timeout:g} s"
            raise AMQPConnectionError(reason) from exc
        except OSError as exc:
            raise AMQPConnectionError(*exc.args) from exc
        self.link = self._last = Link(reader, transport, protocol)
        return reader, asyncio.StreamWriter(transport, protocol, reader, loop)

    def end_handshake(self) -> None:
        """Say that the connection is open."""
        if self.link is not None:
            self.link.reader.end_handshake()

    def refusal(self) -> tuple[int, str] | None:
        """Return why the broker ended the last handshake, if it said so."""
        return self.link.reader.refusal() if self.link is not None else None

    def abort(self) -> None:
        """Drop the socket at once, whatever is still buffered."""
        if self._last is not None:
            self._last.abort()
