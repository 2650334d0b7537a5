"""The socket under a connection: opened with a bound, kept at hand so that it can be aborted."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import pamqp.frame
from aiormq.connection import TransportFactory
from aiormq.exceptions import AMQPConnectionError
from pamqp.commands import Connection
from pamqp.exceptions import PAMQPException

if TYPE_CHECKING:
    from yarl import URL

_READ_LIMIT: Final = 2**18
_HANDSHAKE_BYTES: Final = 4096
_TLS_SHUTDOWN: Final = 1.0


class HandshakeReader(asyncio.StreamReader):
    """A reader that remembers the last bytes of the handshake.

    aiormq 7.2 drops the broker's reason when it refuses a virtual host ("Expected one of
    ['Connection.OpenOk']"); `refusal` finds it again.
    """

    def __init__(self, *, limit: int, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(limit=limit, loop=loop)
        self._tail: bytes | None = b""

    def feed_data(self, data: Any) -> None:
        """Take bytes from the socket."""
        if self._tail is not None:
            self._tail = (self._tail + bytes(data))[-_HANDSHAKE_BYTES:]
        super().feed_data(data)

    def end_handshake(self) -> None:
        """Stop remembering."""
        self._tail = None

    def refusal(self) -> tuple[int, str] | None:
        """Return code and text of the Connection.Close that the broker sent last, if it did."""
        tail = self._tail or b""
        start = tail.rfind(b"\x01\x00\x00")
        while start >= 0:
            try:
                _, _, frame = pamqp.frame.unmarshal(tail[start:])
            except (PAMQPException, ValueError, IndexError, KeyError):
                frame = None
            if isinstance(frame, Connection.Close):
                return frame.reply_code or 0, frame.reply_text or ""
            start = tail.rfind(b"\x01\x00\x00", 0, start)
        return None


class BoundedTransportFactory(TransportFactory):
    """Opens one socket at a time, within ``timeout`` seconds, and remembers it."""

    def __init__(self, *, timeout: float) -> None:
        self._timeout = timeout
        self._writer: asyncio.StreamWriter | None = None
        self._reader: HandshakeReader | None = None

    async def create(
        self,
        url: URL,
        **kwargs: Any,
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect; called by aiormq for each attempt."""
        self._reader = None  # what the last host said is not what this one says
        provider = kwargs.pop("ssl_context_provider", None)
        if url.scheme == "amqps" and provider is not None:
            # A silent peer would hold up the next attempt for 30 seconds.
            kwargs |= {"ssl": await provider.get_context(), "ssl_shutdown_timeout": _TLS_SHUTDOWN}
        loop = asyncio.get_running_loop()
        reader = HandshakeReader(limit=_READ_LIMIT, loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
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
        self._reader = reader
        self._writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        return reader, self._writer

    def end_handshake(self) -> None:
        """Say that the connection is open."""
        if self._reader is not None:
            self._reader.end_handshake()

    def refusal(self) -> tuple[int, str] | None:
        """Return why the broker ended the last handshake, if it said so."""
        return self._reader.refusal() if self._reader is not None else None

    def abort(self) -> None:
        """Drop the socket at once, whatever is still buffered."""
        if self._writer is not None:
            self._writer.transport.abort()
