"""Connecting, reconnecting and closing: hosts that are silent, wrong or gone; TLS; leaks."""

from __future__ import annotations

import asyncio
import gc
import logging
import ssl
import tracemalloc
from typing import TYPE_CHECKING, Any

import pytest
import trustme

from aioworkq import AccessRefusedError, ConnectionLostError, Producer, Queue, StateError
from aioworkq.amqp import AmqpConnection
from aioworkq.testing import RabbitMQ, TLSFiles
from tests.consuming import Broker, eventually
from tests.proxy import Proxy
from tests.publishing import is_cut_off, no_complaints, open_files

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from anyio.from_thread import BlockingPortal

__all__ = ["no_complaints"]

pytestmark = pytest.mark.rabbitmq

SECRET = "s3cr3t-p4ssw0rd"
ADVICE = "Check that RabbitMQ runs and is reachable at the URL, or allow a longer timeout."


@pytest.fixture(autouse=True)
def quick_reconnects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for seconds after many losses in a row: the pause is not what is tested."""
    monkeypatch.setattr("aioworkq.amqp.connection._BACKOFF_MAX", 0.1)


@pytest.fixture
def queue(queue_name: str) -> Queue[bytes]:
    return Queue(queue_name, bytes, type="classic")


# Hosts that do not answer


async def test_a_refused_connection_fails_after_the_timeout_with_its_reason(
    proxy: Proxy, proxy_url: str
) -> None:
    """Nobody listens: tried until the timeout, then the error names what the system said."""
    proxy.refuse()
    with pytest.raises(ConnectionLostError) as caught:
        async with Producer(proxy_url, timeout=0.5):
            pass
    assert str(caught.value) == (
        f"connecting to RabbitMQ: Connect call failed ('127.0.0.1', {proxy.port}). {ADVICE}"
    )


async def test_an_unknown_host_fails_with_its_reason() -> None:
    """A name that cannot be resolved is said to be one."""
    with pytest.raises(ConnectionLostError) as caught:
        await Producer("amqp://no-such-host.invalid/", timeout=0.5).start()
    assert str(caught.value).startswith("connecting to RabbitMQ: ")
    assert str(caught.value).endswith(ADVICE)


async def test_a_host_that_accepts_and_says_nothing_is_given_up(
    proxy: Proxy, proxy_url: str
) -> None:
    """A host that never answers the handshake costs `connect_timeout`, and does not hang."""
    proxy.half_open()
    producer = Producer(proxy_url, timeout=3, connect_timeout=0.2)
    with pytest.raises(ConnectionLostError, match=r"connecting to RabbitMQ: .*answer"):
        await producer.start()
    assert proxy.total_connections >= 2
    await proxy.wait_connections(0)


async def test_a_server_that_speaks_something_else_is_told_apart() -> None:
    """An HTTP server at the port is an error that shows what came, not a hang."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(8)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(ConnectionLostError) as caught:
            await Producer(f"amqp://127.0.0.1:{port}/", timeout=0.5).start()
    assert caught.value.reason


async def test_a_silent_host_becomes_the_right_one(
    proxy: Proxy, proxy_url: str, queue: Queue[bytes]
) -> None:
    """start() keeps trying: once the host answers, it returns."""
    proxy.half_open()
    producer = Producer(proxy_url, timeout=30, connect_timeout=0.3)
    starting = asyncio.create_task(producer.start())
    await proxy.wait_connections(1)
    proxy.flow()
    await starting
    await producer.publish(queue, b"x")
    await producer.close()


@pytest.mark.parametrize("fault", ["half open", "refused", "fine"])
async def test_a_start_that_is_cancelled_leaves_nothing(
    proxy: Proxy, proxy_url: str, fault: str
) -> None:
    """Cancelled at any step of connecting, it closes its socket and stays closed."""
    if fault == "half open":
        proxy.half_open()
    elif fault == "refused":
        proxy.refuse()
    for steps in (1, 2, 3, 5, 8, 13, 21, 34, 55):
        producer = Producer(proxy_url)
        starting = asyncio.create_task(producer.start())
        for _ in range(steps):
            await asyncio.sleep(0)
        starting.cancel()
        await asyncio.wait([starting])
        if starting.cancelled():
            with pytest.raises(StateError):
                await producer.start()
        await producer.close()
    await proxy.wait_connections(0)


async def test_a_start_can_be_closed_from_another_task(proxy: Proxy, proxy_url: str) -> None:
    """close() ends a start() that waits for a silent host; it does not wait for the host."""
    proxy.half_open()
    producer = Producer(proxy_url, timeout=600, connect_timeout=600)
    starting = asyncio.create_task(producer.start())
    await proxy.wait_connections(1)
    async with asyncio.timeout(10):
        await producer.close()
    with pytest.raises(ConnectionLostError, match="this side closed it"):
        await starting
    await proxy.wait_connections(0)


# Several hosts


async def test_several_hosts_are_tried_in_turn(url: str, proxy: Proxy, queue: Queue[bytes]) -> None:
    """Of a refused host, a silent one and one that works, the last is found."""
    async with Proxy(proxy.upstream_port) as silent:
        silent.half_open()
        proxy.refuse()
        urls = [proxy.url(url), silent.url(url), url]
        async with Producer(urls, connect_timeout=2) as producer:
            await producer.publish(queue, b"x")
        assert silent.total_connections == 1


async def test_a_refusal_counts_though_another_host_is_down(url: str, proxy: Proxy) -> None:
    """The hosts are those of one cluster: what one of them refuses again, no other one takes."""
    proxy.refuse()
    wrong = url.replace("guest:guest", "guest:wrong")
    producer = Producer([proxy.url(wrong), wrong], timeout=60)
    with pytest.raises(AccessRefusedError, match="ACCESS_REFUSED"):
        await producer.start()


async def test_another_host_takes_over_when_one_fails(
    url: str, proxy: Proxy, queue: Queue[bytes]
) -> None:
    """On reconnect too: back and forth between two hosts, as one or the other is gone."""
    async with (
        Proxy(proxy.upstream_port) as other,
        Producer([proxy.url(url), other.url(url)]) as producer,
    ):
        for here, there in ((proxy, other), (other, proxy), (proxy, other)):
            there.accept()
            here.refuse()
            here.cut()
            await producer.publish(queue, b"x")
            assert (here.connections, there.connections) == (0, 1)


async def test_one_refusing_host_among_several_is_not_the_end(
    url: str, proxy: Proxy, rabbitmq: RabbitMQ, queue: Queue[bytes]
) -> None:
    """A wrong password at one host says nothing of the one at another that does not answer yet."""
    wrong = url.replace("guest:guest", f"guest:{SECRET}")
    proxy.refuse()
    producer = Producer([wrong, proxy.url(url)], timeout=30)
    connection = producer._connection
    assert isinstance(connection, AmqpConnection)
    starting = asyncio.create_task(producer.start())
    await eventually(lambda: connection._failures >= 3)
    assert not starting.done()
    proxy.accept()
    await starting
    await producer.publish(queue, b"x")
    await producer.close()


# TLS


class Authority:
    """A certificate authority, a node that it vouches for, and clients that trust it or not."""

    def __init__(self, folder: Path) -> None:
        self._ca = trustme.CA()
        cert = self._ca.issue_cert("127.0.0.1")
        certfile, keyfile, self.cafile = folder / "cert", folder / "key", folder / "ca"
        cert.cert_chain_pems[0].write_to_path(str(certfile))
        cert.private_key_pem.write_to_path(str(keyfile))
        self._ca.cert_pem.write_to_path(str(self.cafile))
        self.files = TLSFiles(certfile=certfile, keyfile=keyfile)

    @property
    def context(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        self._ca.configure_trust(context)
        return context


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def tls_node(
    portal: BlockingPortal, authority: Authority, version: str | None
) -> Iterator[RabbitMQ]:
    with portal.wrap_async_context_manager(RabbitMQ(version=version, tls=authority.files)) as node:
        yield node


@pytest.fixture
async def tls_proxy(tls_node: RabbitMQ) -> AsyncIterator[Proxy]:
    async with Proxy(tls_node.tls_port) as proxy:
        yield proxy


async def test_tls_works_and_comes_back(
    tls_proxy: Proxy, tls_node: RabbitMQ, authority: Authority, queue: Queue[bytes]
) -> None:
    """Over amqps:// with an ssl_context, messages are stored, also after a cut."""
    url = tls_proxy.url(tls_node.tls_url)
    async with Producer(url, ssl_context=authority.context) as producer:
        await producer.publish(queue, b"1")
        tls_proxy.cut()
        report = await producer.publish_many(queue, (b"x" * 50_000 for _ in range(100)))
        assert report.confirmed == 100


async def test_the_authority_may_stand_in_the_url(
    tls_node: RabbitMQ, authority: Authority, queue: Queue[bytes]
) -> None:
    """As aio-pika has it: amqps://...?cafile=..."""
    async with Producer(f"{tls_node.tls_url}?cafile={authority.cafile}") as producer:
        await producer.publish(queue, b"1")


async def test_an_unknown_authority_is_refused_at_once(tls_node: RabbitMQ) -> None:
    """A certificate that nobody trusts fails long before the timeout, and says so."""
    with pytest.raises(ConnectionLostError) as caught:
        await Producer(tls_node.tls_url, timeout=600).start()
    assert str(caught.value) == (
        f"connecting to amqps://127.0.0.1:{tls_node.tls_port}/: the server's certificate was "
        f"refused: unable to get local issuer certificate. {ADVICE}"
    )


async def test_a_certificate_for_another_host_is_refused_at_once(
    tls_node: RabbitMQ, authority: Authority
) -> None:
    """A host name that the certificate does not have fails at once, and says so."""
    url = tls_node.tls_url.replace("127.0.0.1", "localhost")
    with pytest.raises(ConnectionLostError) as caught:
        await Producer(url, ssl_context=authority.context, timeout=600).start()
    assert "the server's certificate was refused: Hostname mismatch" in str(caught.value)


async def test_tls_and_plain_that_meet_do_not_hang(
    tls_node: RabbitMQ, authority: Authority
) -> None:
    """amqps:// to a plain port, and amqp:// to a TLS port, fail within the timeout."""
    plain = tls_node.url.replace("amqp://", "amqps://")
    tls = tls_node.tls_url.replace("amqps://", "amqp://")
    for url, context in ((plain, authority.context), (tls, None)):
        with pytest.raises(ConnectionLostError):
            await Producer(url, ssl_context=context, timeout=1, connect_timeout=0.4).start()


async def test_a_stalled_tls_connection_closes_in_time(
    tls_proxy: Proxy, tls_node: RabbitMQ, authority: Authority, queue: Queue[bytes]
) -> None:
    """A TLS peer that is silent cannot hold up close(), nor the next attempt to connect."""
    url = tls_proxy.url(tls_node.tls_url)
    producer = Producer(url, ssl_context=authority.context, timeout=20)
    await producer.start()
    await producer.publish(queue, b"1")
    producer._timeout = 0.3
    tls_proxy.half_open()
    async with asyncio.timeout(15):
        await producer.close()
    await tls_proxy.wait_connections(0)


# Secrets and noise


async def test_no_log_shows_the_password(
    proxy: Proxy,
    proxy_url: str,
    rabbitmq: RabbitMQ,
    queue: Queue[bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """At DEBUG, through connect, publish, cut, refusal and reconnect, of whatever logger."""
    caplog.set_level(logging.DEBUG)
    user = queue.name
    await rabbitmq.add_user(user, SECRET)
    await rabbitmq.set_permissions(user, vhost=queue.name)
    url = proxy_url.replace("guest:guest", f"{user}:{SECRET}")
    async with Producer([url, url], timeout=30) as producer:
        await producer.publish(queue, b"x")
        proxy.refuse()
        proxy.cut()
        await eventually(lambda: is_cut_off(producer))
        with pytest.raises(ConnectionLostError) as caught:
            await producer.publish(queue, b"x", timeout=0.3)
        proxy.accept()
        await producer.publish(queue, b"x")
        shown = [repr(producer._connection), repr(producer.statistics()), str(caught.value)]
    assert "Connecting to" in caplog.text
    assert SECRET not in caplog.text
    assert not [text for text in shown if SECRET in text]


# Leaks


@pytest.mark.slow
async def test_three_hundred_reconnects_leave_nothing(
    proxy: Proxy,
    proxy_url: str,
    queue: Queue[bytes],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tasks, sockets and memory are what they were, however often the connection was lost."""
    caplog.set_level(logging.CRITICAL)  # its records would be the leak
    monkeypatch.setattr("aioworkq.amqp.connection._BACKOFF_MAX", 0.01)
    async with Producer(proxy_url) as producer:

        async def lose(times: int) -> tuple[int, int, int]:
            for _ in range(times):
                proxy.cut()
                await asyncio.gather(
                    producer.publish(queue, b"x"),
                    producer.publish_many(queue, [b"x"] * 3),
                )
            gc.collect()
            await eventually(lambda: producer.statistics().pending == 0)
            return len(asyncio.all_tasks()), open_files(), tracemalloc.get_traced_memory()[0]

        await producer.publish(queue, b"x")
        tracemalloc.start()
        try:
            await lose(50)
            tasks, files, memory = await lose(10)
            tasks_after, files_after, memory_after = await lose(240)
        finally:
            tracemalloc.stop()
        assert producer.statistics().reconnects >= 290
        assert tasks_after <= tasks + 3
        assert files_after <= files + 3
        assert memory_after - memory < 200_000
        connection: Any = producer._connection
        assert len(connection._going_on) == 0
        assert len(connection._tasks) == 2


@pytest.mark.parametrize("turns", range(1, 9))
async def test_a_cancelled_opening_of_a_channel_ends_at_once(
    turns: int, proxy: Proxy, proxy_url: str
) -> None:
    """Whichever turn of the event loop it is cancelled in.

    `asyncio.wait_for` of Python 3.11 forgets a cancellation that meets the end of what it waits
    for: the call then waited for its whole time limit, and with it the end of its connection.
    """
    connection = AmqpConnection(
        proxy_url,
        name="test",
        heartbeat=10,
        connect_timeout=10,
        ssl_context=None,
        max_message_size=2**24,
    )
    await connection.start()
    try:
        await connection.wait_connected()
        proxy.stall()
        opening = asyncio.ensure_future(connection.open_publish_channel(timeout=60))
        for _ in range(turns):
            await asyncio.sleep(0)
        opening.cancel()
        await asyncio.wait({opening})
        await eventually(lambda: not _calls_under_way(), timeout=5)
    finally:
        proxy.cut()
        await connection.aclose(timeout=1)


def _calls_under_way() -> list[str]:
    """Return aiormq's calls that wait for an answer."""
    names = [getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()]
    return [name for name in names if name in {"Connection.channel", "Channel.rpc"}]


async def test_many_short_lives_leave_no_socket(url: str, queue: Queue[bytes]) -> None:
    """Producers that are opened and closed give back every socket and task."""
    async with Producer(url) as producer:
        await producer.publish(queue, b"x")
    before = open_files()
    for _ in range(15):
        async with Producer(url) as producer:
            await producer.publish(queue, b"x")
    await eventually(lambda: open_files() <= before)
    async with Broker(url) as broker:
        assert await broker.ready(queue.name) == 16


async def test_a_loss_is_noticed_before_the_next_message_is_lost(
    proxy: Proxy, proxy_url: str, queue: Queue[bytes]
) -> None:
    """Statistics tell of a loss and of the return, with the reason."""
    async with Producer(proxy_url) as producer:
        await producer.publish(queue, b"x")
        assert producer.statistics().last_error == ""
        proxy.refuse()
        proxy.cut()
        await eventually(lambda: is_cut_off(producer))
        await eventually(lambda: producer.statistics().last_error)
        proxy.accept()
        await eventually(lambda: producer.statistics().is_connected)
        assert producer.statistics().reconnects == 1
