"""The fault-injecting proxy: each fault does what it says, at once, and nothing else."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import aio_pika
import pytest

from tests.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from tests.proxy import Direction

METHOD, HEADER, BODY, HEARTBEAT = 1, 2, 3, 8
BASIC_ACK = struct.pack("!HH", 60, 80)
BASIC_PUBLISH = struct.pack("!HH", 60, 40)


def frame(frame_type: int, channel: int, payload: bytes) -> bytes:
    """Write an AMQP frame."""
    return struct.pack("!BHI", frame_type, channel, len(payload)) + payload + b"\xce"


class Broker:
    """What stands behind the proxy: a server that does nothing by itself."""

    def __init__(self) -> None:
        self.port = 0
        self.accepted: asyncio.Queue[Peer] = asyncio.Queue()

    async def next_peer(self) -> Peer:
        async with asyncio.timeout(10):
            return await self.accepted.get()


class Peer:
    """One end of a connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def receive(self, size: int) -> bytes:
        async with asyncio.timeout(10):
            return await self.reader.readexactly(size)

    async def receive_end(self) -> bytes:
        async with asyncio.timeout(10):
            return await self.reader.read()

    async def is_silent(self) -> bool:
        """Nothing comes within a while: the one thing that only time can tell."""
        try:
            async with asyncio.timeout(0.1):
                return not await self.reader.readexactly(1)
        except TimeoutError:
            return True


@asynccontextmanager
async def broker_listening() -> AsyncGenerator[Broker]:
    broker = Broker()
    peers: list[Peer] = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peers.append(Peer(reader, writer))
        await broker.accepted.put(peers[-1])

    server = await asyncio.start_server(accept, "127.0.0.1", 0, limit=1024)
    broker.port = server.sockets[0].getsockname()[1]
    async with server:
        yield broker
        for peer in peers:
            peer.writer.transport.abort()


@asynccontextmanager
async def connected(proxy: Proxy) -> AsyncGenerator[Peer]:
    peer = Peer(*await asyncio.open_connection("127.0.0.1", proxy.port, limit=1024))
    try:
        yield peer
    finally:
        peer.writer.transport.abort()


@pytest.fixture
async def broker() -> AsyncIterator[Broker]:
    """A broker that does nothing."""
    async with broker_listening() as broker:
        yield broker


@pytest.fixture
async def front(broker: Broker) -> AsyncIterator[Proxy]:
    """A proxy in front of it."""
    async with Proxy(broker.port) as proxy:
        yield proxy


@pytest.fixture
async def client(front: Proxy) -> AsyncIterator[Peer]:
    """A client of the proxy."""
    async with connected(front) as client:
        yield client


@pytest.fixture
async def server(broker: Broker, client: Peer) -> Peer:
    """The broker's end of the client's connection."""
    return await broker.next_peer()


def test_a_url_leads_through_the_proxy() -> None:
    """Only the host and the port change."""
    proxy = Proxy(1)
    proxy.port = 2
    assert (
        proxy.url("amqp://u:p%40@h:5/v%2F?heartbeat=3")
        == "amqp://u:p%40@127.0.0.1:2/v%2F?heartbeat=3"
    )
    assert proxy.url("amqp://h/") == "amqp://127.0.0.1:2/"


async def test_bytes_pass_in_both_directions(client: Peer, server: Peer, front: Proxy) -> None:
    """A healthy proxy is not noticed."""
    await client.send(b"AMQP\x00\x00\x09\x01")
    assert await server.receive(8) == b"AMQP\x00\x00\x09\x01"
    answer = frame(METHOD, 0, b"start")
    await server.send(answer)
    assert await client.receive(len(answer)) == answer
    assert (front.connections, front.total_connections) == (1, 1)


async def test_the_end_of_one_direction_leaves_the_other(
    client: Peer, server: Peer, front: Proxy
) -> None:
    """A half-closed connection stays half-closed, with everything before delivered."""
    client.writer.write(b"AMQP\x00\x00\x09\x01" + frame(METHOD, 0, b"close"))
    client.writer.write_eof()
    assert (await server.receive_end()).endswith(frame(METHOD, 0, b"close"))
    await server.send(frame(METHOD, 0, b"close-ok"))
    server.writer.write_eof()
    assert await client.receive_end() == frame(METHOD, 0, b"close-ok")
    await front.wait_connections(0)


async def test_the_unfinished_frame_before_the_end_is_delivered(client: Peer, server: Peer) -> None:
    """A broker that dies within a frame sent that much."""
    half = frame(METHOD, 0, b"start")[:-3]
    await server.send(half)
    server.writer.write_eof()
    assert await client.receive_end() == half


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01 a TLS record",
        frame(METHOD, 0, b"x") + frame(BODY, 1, b"x")[:-1] + b"? no end",
    ],
)
async def test_what_is_not_amqp_passes_as_it_is(
    client: Peer, server: Peer, front: Proxy, data: bytes
) -> None:
    """Bytes that are no frames are shown to nobody and held back never."""
    seen: list[bytes] = []

    def on_frame(direction: Direction, frame_type: int, channel: int, payload: bytes) -> bool:
        seen.append(payload)
        return True

    front.on_frame = on_frame
    await client.send(data)
    assert await server.receive(len(data)) == data
    await client.send(frame(METHOD, 0, b"later"))
    assert await server.receive(13) == frame(METHOD, 0, b"later")
    assert b"later" not in seen


async def test_a_cut_resets_both_sides(client: Peer, server: Peer, front: Proxy) -> None:
    """Both sides get a reset, and the connection is not counted any more."""
    front.cut()
    assert front.connections == 0
    for peer in (client, server):
        with pytest.raises(ConnectionResetError):
            await peer.receive(1)
    async with connected(front):
        await front.wait_connections(1)
        assert front.total_connections == 2


async def test_a_connection_may_be_cut_as_soon_as_it_is_counted(front: Proxy) -> None:
    """A connection that the proxy has not begun to serve is reset like any other."""
    async with connected(front) as client:
        while not front.connections:
            await asyncio.sleep(0)
        front.cut()
        with pytest.raises(ConnectionResetError):
            await client.receive(1)


async def test_waiting_for_connections_is_bounded(front: Proxy) -> None:
    """A wait in vain says what is there instead."""
    with pytest.raises(TimeoutError, match=r"0 connections are open after 0\.05 s, not 2"):
        await front.wait_connections(2, timeout=0.05)


async def test_nobody_gets_in_while_the_proxy_refuses(
    client: Peer, server: Peer, front: Proxy
) -> None:
    """New connections are refused, old ones live on, and all get in again afterwards."""
    front.refuse()
    front.refuse()
    with pytest.raises(ConnectionRefusedError), socket.socket() as other:
        other.connect(("127.0.0.1", front.port))
    await client.send(b"still here")
    assert await server.receive(10) == b"still here"
    port = front.port
    front.accept()
    front.accept()
    assert front.port == port
    async with connected(front):
        await front.wait_connections(2)


async def test_refusing_and_accepting_at_once_works(front: Proxy, broker: Broker) -> None:
    """There is no moment in which the port is lost."""
    for _ in range(20):
        front.refuse()
        front.accept()
        async with connected(front) as client:
            await client.send(b"hello")
            assert await (await broker.next_peer()).receive(5) == b"hello"


async def test_a_connection_that_nobody_took_yet_is_refused_too(front: Proxy) -> None:
    """Who is connected in the kernel only, when the proxy begins to refuse, is reset."""
    with socket.socket() as other:
        other.connect(("127.0.0.1", front.port))
        front.refuse()
        front.cut()
        other.settimeout(10)
        with pytest.raises(ConnectionResetError):
            await asyncio.to_thread(other.recv, 1)
    assert front.connections == 0


async def test_a_client_is_reset_when_the_broker_is_down() -> None:
    """The proxy is no broker: without one behind it, a connection ends at once."""
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    async with Proxy(port) as proxy, connected(proxy) as client:
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await client.receive(1)
        await proxy.wait_connections(0)


@pytest.mark.parametrize("stalled", ["to_broker", "to_client"])
async def test_a_stall_holds_back_one_direction(
    client: Peer, server: Peer, front: Proxy, stalled: str
) -> None:
    """Nothing comes through the stalled direction, everything through the other one."""
    sender, receiver = (client, server) if stalled == "to_broker" else (server, client)
    front.stall(to_broker=stalled == "to_broker", to_client=stalled == "to_client")
    await sender.send(frame(HEARTBEAT, 0, b"1"))
    await receiver.send(frame(HEARTBEAT, 0, b"2"))
    assert await sender.receive(9) == frame(HEARTBEAT, 0, b"2")
    assert await receiver.is_silent()
    front.flow()
    assert await receiver.receive(9) == frame(HEARTBEAT, 0, b"1")


async def test_a_stall_pushes_back(front: Proxy, broker: Broker) -> None:
    """A stalled proxy does not read: the sender's socket fills up, and nothing is lost."""
    with socket.socket() as sender:
        sender.connect(("127.0.0.1", front.port))
        sender.setblocking(False)
        server = await broker.next_peer()
        front.stall()
        sent = 0
        try:
            while sent < 100_000_000:
                sent += sender.send(b"\x00" * 65_536)
                await asyncio.sleep(0)
        except BlockingIOError:
            pass
        assert 0 < sent < 100_000_000
        front.flow()
        assert await server.receive(sent) == b"\x00" * sent


async def test_a_half_open_connection_swallows_everything(
    client: Peer, server: Peer, front: Proxy
) -> None:
    """Bytes are taken and lost, connections are taken and lead nowhere, nothing is closed."""
    front.half_open()
    await client.send(frame(HEARTBEAT, 0, b"lost"))
    await server.send(frame(HEARTBEAT, 0, b"lost"))
    async with connected(front) as other:
        await front.wait_connections(2)
        await other.send(b"AMQP\x00\x00\x09\x01")
        assert await other.is_silent()
        assert await client.is_silent()
        assert await server.is_silent()
        front.flow()
        await client.send(frame(HEARTBEAT, 0, b""))
        assert await server.receive(8) == frame(HEARTBEAT, 0, b"")
        await other.send(b"AMQP\x00\x00\x09\x01")
        assert await other.is_silent()
    await front.wait_connections(1)


async def test_a_delay_is_added_and_keeps_the_order(
    client: Peer, server: Peer, front: Proxy
) -> None:
    """Latency is added, throughput is not taken: what is sent together arrives together."""
    front.delay(2)
    start = time.monotonic()
    for number in range(10):
        await client.send(b"%d" % number)
        await asyncio.sleep(0)
    assert await server.receive(10) == b"0123456789"
    assert 2 <= time.monotonic() - start < 10
    front.delay(0)
    start = time.monotonic()
    await client.send(b"x")
    assert await server.receive(1) == b"x"
    assert time.monotonic() - start < 2


async def test_frames_are_injected_between_frames(client: Peer, server: Peer, front: Proxy) -> None:
    """An injected frame never lands within another, however the broker's bytes arrive."""
    whole, injected = frame(BODY, 1, b"x" * 200_000), frame(METHOD, 0, b"close")
    seen = asyncio.Event()

    def on_frame(direction: Direction, frame_type: int, channel: int, payload: bytes) -> bool:
        seen.set()
        return True

    front.on_frame = on_frame
    await server.send(frame(HEARTBEAT, 0, b"") + whole[:100_000])
    async with asyncio.timeout(10):
        await seen.wait()
    await front.inject_to_client(injected)
    assert await client.receive(8) == frame(HEARTBEAT, 0, b"")
    assert await client.receive(len(injected)) == injected
    await server.send(whole[100_000:])
    assert await client.receive(len(whole)) == whole


async def test_frames_are_seen_and_dropped(client: Peer, server: Peer, front: Proxy) -> None:
    """Every frame of both directions is shown, and passes unless it is refused."""
    seen: list[tuple[Direction, int, int, bytes]] = []

    def on_frame(direction: Direction, frame_type: int, channel: int, payload: bytes) -> bool:
        seen.append((direction, frame_type, channel, payload))
        return payload != b"drop"

    front.on_frame = on_frame
    await client.send(
        b"AMQP\x00\x00\x09\x01" + frame(METHOD, 7, b"drop") + frame(METHOD, 8, b"keep")
    )
    assert await server.receive(8 + 12) == b"AMQP\x00\x00\x09\x01" + frame(METHOD, 8, b"keep")
    await server.send(frame(HEADER, 9, b"drop") + frame(BODY, 9, b""))
    assert await client.receive(8) == frame(BODY, 9, b"")
    assert seen == [
        ("to_broker", METHOD, 7, b"drop"),
        ("to_broker", METHOD, 8, b"keep"),
        ("to_client", HEADER, 9, b"drop"),
        ("to_client", BODY, 9, b""),
    ]


async def test_what_on_frame_raises_is_raised_at_the_end(broker: Broker) -> None:
    """A mistake of a test is not swallowed by the proxy."""

    def on_frame(direction: Direction, frame_type: int, channel: int, payload: bytes) -> bool:
        raise ValueError("a mistake")

    proxy = Proxy(broker.port)
    await proxy.__aenter__()
    proxy.on_frame = on_frame
    async with connected(proxy) as client:
        await client.send(frame(HEARTBEAT, 0, b""))
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await client.receive(1)
    with pytest.raises(ValueError, match="a mistake"):
        await proxy.__aexit__(None, None, None)


async def test_nothing_is_left_open() -> None:
    """The end of a proxy is the end of its sockets, whatever state they are in."""
    before = open_files()
    async with (
        broker_listening() as broker,
        Proxy(broker.port) as proxy,
        connected(proxy),
        connected(proxy) as stuck,
    ):
        await proxy.wait_connections(2)
        for _ in range(2):
            await broker.next_peer()
        proxy.stall()
        stuck.writer.write(b"\x00" * 10_000_000)
        proxy.half_open()
        async with connected(proxy):
            await proxy.wait_connections(3)
    async with asyncio.timeout(10):
        while open_files() > before:
            await asyncio.sleep(0)


def open_files() -> int:
    """Count the open files of this process."""
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_a_client_of_rabbitmq_notices_nothing_but_the_fault(
    proxy: Proxy, proxy_url: str, queue_name: str
) -> None:
    """A real client publishes through the proxy; a dropped confirm is all that goes missing."""
    connection = await aio_pika.connect(proxy_url)
    async with connection:
        channel = await connection.channel()
        queue = await channel.declare_queue(queue_name)
        dropped = asyncio.Event()

        def drop_confirms(
            direction: Direction, frame_type: int, channel: int, payload: bytes
        ) -> bool:
            if direction == "to_client" and frame_type == METHOD and payload[:4] == BASIC_ACK:
                dropped.set()
                return False
            return True

        proxy.on_frame = drop_confirms
        publish = asyncio.create_task(
            channel.default_exchange.publish(aio_pika.Message(b"1"), queue_name)
        )
        async with asyncio.timeout(10):
            await dropped.wait()
        message = await queue.get(no_ack=True)
        assert message.body == b"1"
        assert not publish.done()
        proxy.cut()
        with pytest.raises(
            (aio_pika.exceptions.AMQPError, ConnectionError, asyncio.CancelledError)
        ):
            await publish
