"""A TCP proxy that tests put between a client and RabbitMQ, to break what a network breaks.

::

    async with Proxy(node.port) as proxy:
        connection = await aio_pika.connect(proxy.url(node.url))
        proxy.cut()

It works on plain sockets: what it does not read piles up in the kernel and then in the peer, as
it does behind a real stalled network. It knows where AMQP frames end, and nothing else of AMQP; a
stream that is not AMQP (TLS) is passed through as it comes. It runs on asyncio, in the loop of
the test.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple, Self
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator
    from types import TracebackType

Direction = Literal["to_broker", "to_client"]
OnFrame = Callable[[Direction, int, int, bytes], bool]

HOST = "127.0.0.1"

_CHUNK = 65_536
_QUEUE_SIZE = 16
_FRAME_HEADER = struct.Struct("!BHI")
_FRAME_TYPES = (1, 2, 3, 8)
_FRAME_END = 0xCE
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER with 0 seconds: close() sends RST


class Proxy:
    """A proxy on a port of its own, in front of another port of the loopback interface.

    Methods that are no coroutines take effect at once: nothing is forwarded after ``stall``, and
    nobody gets in after ``refuse``. Only the resets of ``cut`` leave with the loop's next turn.

    Attributes:
        upstream_port: Where new connections lead to.
        port: Where it listens.
        total_connections: How many connections were ever accepted.
        on_frame: Asked about every frame in both directions as ``(direction, frame_type,
            channel, payload)``; False drops the frame. ``None`` for nobody. What it raises resets
            the connection, and is raised again when the proxy is closed.
    """

    def __init__(self, upstream_port: int) -> None:
        self.upstream_port = upstream_port
        self.port = 0
        self.total_connections = 0
        self.on_frame: OnFrame | None = None
        self._gates: dict[Direction, _Gate] = {"to_broker": _Gate(), "to_client": _Gate()}
        self._swallows = False
        self._latency = 0.0
        self._listener: socket.socket | None = None
        self._listening: asyncio.Task[None] | None = None
        self._connections: dict[_Connection, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._errors: list[Exception] = []

    async def __aenter__(self) -> Self:
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
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._errors and exc_value is None:
            raise self._errors[0]

    def url(self, url: str) -> str:
        """Return the URL with the proxy's host and port in place of its own."""
        parts = urlsplit(url)
        user, at, _ = parts.netloc.rpartition("@")
        return parts._replace(netloc=f"{user}{at}{HOST}:{self.port}").geturl()

    @property
    def connections(self) -> int:
        """How many connections are open now."""
        return len(self._connections)

    async def wait_connections(self, count: int, *, timeout: float = 10.0) -> None:
        """Wait until exactly so many connections are open.

        A connection that was cut is not open: after ``cut``, this waits for new ones.
        """
        try:
            async with asyncio.timeout(timeout):
                while len(self._connections) != count:
                    await self._changed.wait()
        except TimeoutError:
            message = (
                f"{len(self._connections)} connections are open after {timeout} s, not {count}"
            )
            raise TimeoutError(message) from None

    # Faults

    def cut(self) -> None:
        """Reset (RST) all connections, on both sides."""
        for connection, task in self._connections.items():
            connection.is_cut = True  # its tasks have a step left before they are cancelled
            task.cancel()
        self._connections.clear()
        self._note_change()

    def refuse(self) -> None:
        """Let nobody in any more: connecting is refused. What is open stays open."""
        if self._listening is not None and self._listener is not None:
            # Nobody gets in from now on. The task notices, and closes the socket.
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener = self._listening = None

    def accept(self) -> None:
        """Let everybody in again, on the same port."""
        if self._listening is None:
            self._listener = _listen(self.port)
            self.port = self._listener.getsockname()[1]
            self._listening = self._spawn(self._accept(self._listener))

    def stall(self, *, to_broker: bool = True, to_client: bool = True) -> None:
        """Stop reading and forwarding, in both directions or in one; the peers' buffers fill up.

        What is on its way already, 64 KiB at most in each connection, is held back.
        """
        if to_broker:
            self._gates["to_broker"].close()
        if to_client:
            self._gates["to_client"].close()

    def half_open(self) -> None:
        """Swallow all bytes: sockets stay open, everything sent is lost, nobody answers.

        New connections are accepted and lead nowhere, for ever.
        """
        self._swallows = True

    def flow(self) -> None:
        """Undo ``stall`` and ``half_open``. What was swallowed stays lost."""
        self._swallows = False
        for gate in self._gates.values():
            gate.open()

    def delay(self, latency: float) -> None:
        """Forward everything that arrives from now on so many seconds later."""
        self._latency = latency

    async def inject_to_client(self, data: bytes) -> None:
        """Put whole frames into the stream to every client, between two frames of the broker."""
        for connection in list(self._connections):
            await connection.inject("to_client", data)

    # What drives it

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine, name="proxy")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _note_change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with listener, contextlib.suppress(OSError):  # refuse() made accept() fail
            while True:
                client, _ = await loop.sock_accept(listener)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                if listener is not self._listener:  # refused a moment ago
                    client.close()
                    return
                connection = _Connection(self, client)
                task = self._connections[connection] = self._spawn(self._serve(connection))
                task.add_done_callback(connection.close)  # a task may be cut before it runs
                self.total_connections += 1
                self._note_change()

    async def _serve(self, connection: _Connection) -> None:
        try:
            await connection.run()
        except* OSError:
            pass  # one side is gone: so is the other now
        except* Exception as errors:
            self._errors.extend(errors.exceptions)  # on_frame raised
        finally:
            self._connections.pop(connection, None)
            self._note_change()


class _Connection:
    """A client's socket and the broker's, and what is on its way between them."""

    def __init__(self, proxy: Proxy, client: socket.socket) -> None:
        self._proxy = proxy
        self._client = client
        self.is_cut = False
        self._queues: dict[Direction, asyncio.Queue[_Chunk]] = {
            "to_broker": asyncio.Queue(_QUEUE_SIZE),
            "to_client": asyncio.Queue(_QUEUE_SIZE),
        }

    async def run(self) -> None:
        """Forward until both sides said their last word, or reset both."""
        client = self._client
        with socket.socket() as broker:
            for side in (client, broker):
                side.setblocking(False)
                side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            leads_nowhere = self._proxy._swallows
            if not leads_nowhere:
                address = (HOST, self._proxy.upstream_port)
                await asyncio.get_running_loop().sock_connect(broker, address)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._read("to_broker", client))
                tasks.create_task(self._write("to_broker", None if leads_nowhere else broker))
                if not leads_nowhere:
                    tasks.create_task(self._read("to_client", broker))
                    tasks.create_task(self._write("to_client", client))
            for side in (client, broker):
                side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes(len(_RESET)))

    def close(self, _task: asyncio.Task[None]) -> None:
        """Close the client's socket, in order or with a reset."""
        self._client.close()

    async def inject(self, direction: Direction, data: bytes) -> None:
        """Put whole frames on their way, which are asked nobody about."""
        await self._put(direction, data, is_injected=True)

    async def _put(self, direction: Direction, data: bytes, *, is_injected: bool) -> None:
        due = asyncio.get_running_loop().time() + self._proxy._latency
        await self._queues[direction].put(_Chunk(due, data, is_injected))

    async def _read(self, direction: Direction, source: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._proxy._gates[direction].wait_open()
            data = await loop.sock_recv(source, _CHUNK)
            await self._put(direction, data, is_injected=False)
            if not data:
                return

    async def _write(self, direction: Direction, sink: socket.socket | None) -> None:
        loop = asyncio.get_running_loop()
        stream = _Stream()
        while True:
            chunk = await self._queues[direction].get()
            await asyncio.sleep(chunk.due - loop.time())
            await self._proxy._gates[direction].wait_open()
            if chunk.is_injected:  # what was forwarded until now were whole frames
                out = chunk.data
            else:
                pieces = stream.feed(chunk.data)
                out = b"".join(piece.data for piece in pieces if self._passes(direction, piece))
            if sink is not None and out and not self.is_cut:
                await loop.sock_sendall(sink, out)
            if not chunk.data:
                if sink is not None:
                    sink.shutdown(socket.SHUT_WR)
                return

    def _passes(self, direction: Direction, piece: _Piece) -> bool:
        if self._proxy._swallows:
            return False
        on_frame = self._proxy.on_frame
        if on_frame is None or piece.frame_type is None:
            return True
        payload = piece.data[_FRAME_HEADER.size : -1]
        return on_frame(direction, piece.frame_type, piece.channel, payload)


class _Chunk(NamedTuple):
    """Bytes, and when they may be forwarded. Empty bytes are the end of the stream."""

    due: float
    data: bytes
    is_injected: bool


class _Piece(NamedTuple):
    """A whole frame, or bytes that are none (``frame_type`` is ``None``)."""

    frame_type: int | None
    channel: int
    data: bytes


class _Stream:
    """Cuts one direction of a connection into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._is_amqp = True

    def feed(self, data: bytes) -> Iterator[_Piece]:
        """Take bytes and return what is whole; at the end of the stream, all that is left."""
        self._buffer += data
        while self._buffer and self._is_amqp:
            size = self._size_of_next()
            if size is None or size > len(self._buffer):
                break
            frame = bytes(self._buffer[:size])
            if frame[:4] == b"AMQP":
                yield _Piece(None, 0, frame)
            elif frame[-1] == _FRAME_END:
                yield _Piece(frame[0], int.from_bytes(frame[1:3]), frame)
            else:
                self._is_amqp = False
                break
            del self._buffer[:size]
        if self._buffer and not (data and self._is_amqp):
            yield _Piece(None, 0, bytes(self._buffer))
            self._buffer.clear()

    def _size_of_next(self) -> int | None:
        """Say how long the next frame is, ``None`` when too little of it is known."""
        if self._buffer[0] == ord("A"):
            return len(b"AMQP\x00\x00\x09\x01")
        if self._buffer[0] not in _FRAME_TYPES:
            self._is_amqp = False
            return None
        if len(self._buffer) < _FRAME_HEADER.size:
            return None
        _, _, size = _FRAME_HEADER.unpack_from(self._buffer)
        return _FRAME_HEADER.size + int(size) + 1


class _Gate:
    """Open or closed."""

    def __init__(self) -> None:
        self._opened = asyncio.Event()
        self._opened.set()

    def open(self) -> None:
        self._opened.set()

    def close(self) -> None:
        self._opened.clear()

    async def wait_open(self) -> None:
        """Wait until it is open; it still is on return."""
        while not self._opened.is_set():
            await self._opened.wait()


def _listen(port: int) -> socket.socket:
    """Listen on a port; 0 is any below the ephemeral range, where nobody takes it meanwhile."""
    for attempt in range(100):
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port or 20_000 + secrets.randbelow(12_000)))
        except OSError:
            listener.close()
            if port or attempt == 99:
                raise
        else:
            listener.listen(128)
            listener.setblocking(False)
            return listener
    raise AssertionError
