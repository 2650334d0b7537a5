"""Publishing while RabbitMQ or the network fails: every outcome is a true one, and it comes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from aioworkq import (
    AccessRefusedError,
    ConnectionLostError,
    NotConfirmedError,
    OutcomeUnknownError,
    Producer,
    Queue,
)
from tests.consuming import Broker, crash, eventually
from tests.proxy import Proxy
from tests.publishing import is_cut_off, memory_alarm, no_complaints

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine

    from aioworkq.testing import RabbitMQ


__all__ = ["no_complaints"]

pytestmark = pytest.mark.rabbitmq

BASIC_ACK = b"\x00\x3c\x00\x50"


@pytest.fixture
def queue(queue_name: str) -> Queue[bytes]:
    return Queue(queue_name, bytes, type="classic")


@pytest.fixture
async def producer(proxy_url: str, queue: Queue[bytes]) -> AsyncIterator[Producer]:
    """A producer behind the proxy, whose queue exists and has one message."""
    async with Producer(proxy_url, timeout=30) as producer:
        await producer.publish(queue, b"first")
        yield producer


@pytest.fixture(autouse=True)
def quick_reconnects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for seconds after many losses in a row: the pause is not what is tested."""
    monkeypatch.setattr("aioworkq.amqp.connection._BACKOFF_MAX", 0.3)


def drop_confirms(direction: str, frame_type: int, channel: int, payload: bytes) -> bool:
    return not (direction == "to_client" and frame_type == 1 and payload[:4] == BASIC_ACK)


async def bodies(broker: Broker, queue: Queue[bytes]) -> Counter[bytes]:
    return Counter(message.body for message in await broker.take_all(queue.name))


# Outages


async def test_a_killed_and_restarted_node_loses_nothing(
    quick_node: RabbitMQ, queue_name: str
) -> None:
    """What was confirmed, delayed or not, survives kill -9; what is published meanwhile waits."""
    node = quick_node
    kept, classic = Queue(queue_name, str), Queue(f"{queue_name}.classic", str, type="classic")
    late = Queue(f"{queue_name}.late", str)
    async with Producer(node.url, timeout=90) as producer:
        for number in range(20):
            await producer.publish(kept, f"before {number}")
            await producer.publish(classic, f"before {number}")
        began = time.monotonic()
        await producer.publish(late, "delayed", delay=2)
        during = [
            asyncio.create_task(producer.publish(where, f"during {number}"))
            for where in (kept, classic)
            for number in range(20)
        ]
        await crash(node)
        new = [asyncio.create_task(producer.publish(f"{queue_name}.new", "x")) for _ in range(5)]
        await node.start()
        await asyncio.gather(*during, *new)
        assert producer.statistics().reconnects >= 1
        async with Broker(node.url) as broker:
            expected = {f"{when} {number}" for when in ("before", "during") for number in range(20)}
            for where in (kept, classic):
                stored = [one.body.decode() for one in await broker.take_all(where.name)]
                assert set(stored) == expected
            assert await broker.ready(f"{queue_name}.new") >= 5
            assert (await broker.take(late.name)).body == b"delayed"
            assert time.monotonic() - began >= 2


async def test_a_maintenance_that_closes_all_connections_is_survived(
    node: RabbitMQ, queue_name: str
) -> None:
    """Connections that an operator closes come back, and every message is stored."""
    queue = Queue(queue_name, int, type="classic")
    async with Producer(node.url) as producer:
        await producer.publish(queue, -1)
        tasks = [asyncio.create_task(producer.publish_many(queue, range(2000)))]
        await eventually(lambda: producer.statistics().confirmed > 100)
        await node.eval('rabbit_networking:close_all_connections("maintenance")')
        (report,) = await asyncio.gather(*tasks)
        assert report.confirmed == 2000
        await eventually(lambda: producer.statistics().reconnects == 1)
        assert "maintenance" in producer.statistics().last_error
    async with Broker(node.url) as broker:
        assert {int(one.body) for one in await broker.take_all(queue_name)} == set(range(-1, 2000))


async def test_cuts_lose_nothing(
    proxy: Proxy, producer: Producer, broker: Broker, queue: Queue[bytes]
) -> None:
    """However often the connection is cut, each message is stored at least once."""
    tasks: list[asyncio.Task[Any]] = [
        asyncio.create_task(producer.publish(queue, b"%d" % n)) for n in range(300)
    ]
    for number in range(5):
        await proxy.wait_connections(1, timeout=30)
        proxy.cut()
        tasks += [
            asyncio.create_task(producer.publish(queue, b"%d.%d" % (number, n))) for n in range(50)
        ]
        tasks.append(asyncio.create_task(_many(producer, queue, number)))
    await asyncio.gather(*tasks)
    expected = {b"first"} | {b"%d" % n for n in range(300)}
    expected |= {b"%d.%d" % (number, n) for number in range(5) for n in range(50)}
    expected |= {b"many %d.%d" % (number, n) for number in range(5) for n in range(50)}
    assert set(await bodies(broker, queue)) == expected
    assert producer.statistics().in_flight == 0


async def _many(producer: Producer, queue: Queue[bytes], number: int) -> None:
    report = await producer.publish_many(queue, (b"many %d.%d" % (number, n) for n in range(50)))
    report.raise_for_errors()


async def test_a_delayed_batch_waits_out_an_outage(
    proxy: Proxy, producer: Producer, broker: Broker, queue: Queue[bytes]
) -> None:
    """A batch with a delay declares its way once the connection is back."""
    proxy.refuse()
    proxy.cut()
    await eventually(lambda: is_cut_off(producer))
    numbers = (b"%d" % number for number in range(20))
    task = asyncio.create_task(producer.publish_many(queue, numbers, delay=0.2))
    await eventually(lambda: producer._outbox and producer._outbox._expected)
    proxy.accept()
    assert (await task).confirmed == 20


async def test_an_outage_that_outlasts_the_timeout_says_what_is_known(
    proxy: Proxy, producer: Producer, broker: Broker, queue: Queue[bytes]
) -> None:
    """What was in flight may be stored; what was not sent is not, and a queue is not declared."""
    proxy.on_frame = drop_confirms
    sent = asyncio.create_task(producer.publish(queue, b"sent", timeout=6, message_id="m1"))
    await eventually(lambda: _has(broker, queue, 2))
    proxy.refuse()
    proxy.cut()
    await eventually(lambda: "Connect call failed" in producer.statistics().last_error)
    waiting = asyncio.create_task(producer.publish(queue, b"no", timeout=0.5, message_id="m2"))
    undeclared = asyncio.create_task(producer.publish("undeclared", b"no", timeout=0.5))
    with pytest.raises(OutcomeUnknownError) as unknown:
        await sent
    with pytest.raises(ConnectionLostError) as lost:
        await waiting
    with pytest.raises(ConnectionLostError) as not_declared:
        await undeclared
    assert str(unknown.value).startswith(
        f"no confirm for message m1 to queue {queue.name!r} in time: the connection was lost ("
    )
    advice = "Check that RabbitMQ runs and is reachable at the URL, or allow a longer timeout."
    refused = f"Connect call failed ('127.0.0.1', {proxy.port})"
    assert str(lost.value) == (
        f"message m2 for queue {queue.name!r} was not sent: {refused}. {advice}"
    )
    assert str(not_declared.value) == f"declaring queue 'undeclared': {refused}. {advice}"
    proxy.on_frame = None
    proxy.accept()
    await producer.publish(queue, b"after")
    assert await bodies(broker, queue) == {b"first": 1, b"sent": 1, b"after": 1}


async def _has(broker: Broker, queue: Queue[bytes], count: int) -> bool:
    return await broker.ready(queue.name) == count


# Confirms that do not come


async def test_messages_without_a_confirm_are_sent_again(
    proxy: Proxy, producer: Producer, broker: Broker, queue: Queue[bytes]
) -> None:
    """Stored, but the confirm was lost with the connection: a duplicate, and no loss."""
    proxy.on_frame = drop_confirms
    tasks = [asyncio.create_task(producer.publish(queue, b"%d" % n)) for n in range(100)]
    await eventually(lambda: _has(broker, queue, 101))
    proxy.on_frame = None
    proxy.cut()
    await asyncio.gather(*tasks)
    assert producer.statistics().resent == 100
    assert await bodies(broker, queue) == {b"first": 1} | {b"%d" % n: 2 for n in range(100)}


async def test_a_confirm_that_never_comes_is_an_unknown_outcome(
    proxy: Proxy, producer: Producer, broker: Broker, queue: Queue[bytes]
) -> None:
    """After the timeout the error says that the message may be stored, as here it is."""
    proxy.on_frame = drop_confirms
    with pytest.raises(OutcomeUnknownError) as caught:
        await producer.publish(queue, b"x", timeout=0.3, message_id="m1")
    assert str(caught.value) == (
        f"no confirm for message m1 to queue {queue.name!r} in time: the broker is silent. "
        "It may or may not be stored; publishing it again with the same message_id may duplicate "
        "it."
    )
    assert producer.statistics().unknown == 1
    await eventually(lambda: _has(broker, queue, 2))


async def test_a_refusal_after_a_lost_confirm_is_an_unknown_outcome(
    proxy: Proxy, proxy_url: str, broker: Broker, queue_name: str
) -> None:
    """The queue is full with the very message whose confirm was lost: "refused" would be a lie."""
    queue = Queue(queue_name, bytes, type="classic", max_length=1)
    async with Producer(proxy_url) as producer:
        with contextlib.suppress(Exception):  # declares the queue
            await producer.publish(queue, b"warm up")
        await broker.take(queue_name)
        proxy.on_frame = drop_confirms
        task = asyncio.create_task(producer.publish(queue, b"x"))
        await eventually(lambda: _has(broker, queue, 1))
        proxy.on_frame = None
        proxy.cut()
        with pytest.raises(OutcomeUnknownError, match="an earlier sending was never answered"):
            await task
        assert await bodies(broker, queue) == {b"x": 1}


@contextlib.asynccontextmanager
async def hanging(rabbitmq: RabbitMQ, vhost: str, queue: Queue[bytes]) -> AsyncGenerator[None]:
    """Suspend the process of a queue, as if its node did not answer."""
    leader = (
        f'{{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"{vhost}">>, queue, '
        f'<<"{queue.name}">>)), sys:{{}}(amqqueue:get_pid(Q))'
    )
    await rabbitmq.eval(leader.replace("{}", "suspend"))
    try:
        yield
    finally:
        await rabbitmq.eval(leader.replace("{}", "resume"))


async def overdue(producer: Producer, queue: Queue[bytes]) -> None:
    """Publish what nobody confirms, until it is too late."""
    with pytest.raises(OutcomeUnknownError):
        await producer.publish(queue, b"x", timeout=0.5)


async def cancelled(producer: Producer, queue: Queue[bytes]) -> None:
    """Publish what nobody confirms, until somebody else cancels it."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await producer.publish(queue, b"x")


@pytest.mark.parametrize("give_up", [overdue, cancelled])
async def test_a_queue_that_never_confirms_does_not_stop_the_others(
    url: str,
    rabbitmq: RabbitMQ,
    broker: Broker,
    queue_name: str,
    give_up: Callable[[Producer, Queue[bytes]], Coroutine[Any, Any, None]],
) -> None:
    """A quorum queue whose leader hangs fills the window; a new channel gives the room back."""
    hung, fine = Queue(queue_name, bytes), Queue(f"{queue_name}.fine", bytes, type="classic")
    async with Producer(url, window=8) as producer:
        await producer.publish(hung, b"x")
        await producer.publish(fine, b"x")
        async with hanging(rabbitmq, queue_name, hung):
            await asyncio.gather(*(give_up(producer, hung) for _ in range(8)))
            for _ in range(20):  # each with less patience than that takes
                with contextlib.suppress(ConnectionLostError):
                    await producer.publish(fine, b"x", timeout=1)
            for _ in range(20):
                await producer.publish(fine, b"x", timeout=1)
        assert await broker.ready(fine.name) >= 21
        assert producer.statistics().reconnects == 0
        await producer.publish(hung, b"again")


@pytest.mark.parametrize("delay", [None, 0.01])
async def test_a_queue_that_hangs_keeps_no_other_from_being_declared(
    url: str, rabbitmq: RabbitMQ, broker: Broker, queue_name: str, delay: float | None
) -> None:
    """Looking for it has no answer, and goes on when its publishers have given up."""
    hung, fine = (
        Queue(f"{queue_name}.{name}", bytes, type="classic", max_length=9)
        for name in ("hung", "fine")
    )
    async with Producer(url) as producer:
        await producer.publish(hung, b"x")
    async with Producer(url) as producer:
        await producer.publish(queue_name, b"x", delay=delay)
        async with hanging(rabbitmq, queue_name, hung):
            for _ in range(12):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.1):
                        await producer.publish(hung, b"x", delay=delay)
            await producer.publish(fine, b"x", delay=delay, timeout=10)
        await eventually(lambda: _has(broker, fine, 1))


# What RabbitMQ refuses by closing the channel


@pytest.fixture
async def small_messages(rabbitmq: RabbitMQ) -> AsyncIterator[None]:
    """Let RabbitMQ refuse bodies above 100,000 bytes, as it does those above 128 MiB."""
    # RabbitMQ 4 reads it once, when it starts.
    set_limit = (
        "application:set_env(rabbit, max_message_size, {0}), "
        "persistent_term:put(max_message_size, {0})"
    )
    await rabbitmq.eval(set_limit.format(100_000))
    yield
    await rabbitmq.eval(set_limit.format(134_217_728))


@pytest.mark.usefixtures("small_messages")
async def test_a_refused_message_harms_none_of_its_neighbours(
    url: str,
    broker: Broker,
    queue: Queue[bytes],
    caplog: pytest.LogCaptureFixture,
    *,
    documented_calls: bool,
) -> None:
    """A body too large for RabbitMQ is refused; those before, beside and after it are stored."""
    async with Producer(url, window=10_000) as producer:
        await producer.publish(queue, b"first")
        for culprit in range(5):
            big = asyncio.create_task(producer.publish(queue, b"x" * 150_000, message_id="big"))
            others: list[asyncio.Task[str]] = []
            while not big.done():  # without a pause: also while the channel closes
                if len(others) < 500:
                    body = b"%d.%d" % (culprit, len(others))
                    others.append(asyncio.create_task(producer.publish(queue, body)))
                await asyncio.sleep(0)
            with pytest.raises(NotConfirmedError) as caught:
                await big
            assert "message size 150000 is larger than configured max size" in str(caught.value)
            await asyncio.gather(*others)
        statistics = producer.statistics()
        assert statistics.not_confirmed == 5
        assert statistics.reconnects == 0 or documented_calls, statistics.last_error
        stored = await bodies(broker, queue)
        assert len(stored) == statistics.confirmed
        assert max(map(len, stored)) < 100


@pytest.mark.usefixtures("small_messages")
@pytest.mark.parametrize("give_up", [overdue, cancelled])
async def test_a_suspect_that_is_given_up_holds_up_nobody(
    url: str,
    rabbitmq: RabbitMQ,
    queue: Queue[bytes],
    queue_name: str,
    give_up: Callable[[Producer, Queue[bytes]], Coroutine[Any, Any, None]],
) -> None:
    """What was beside a refused message is sent alone: those behind it do not wait for ever."""
    hung = Queue(f"{queue_name}.hung", bytes, type="classic")
    async with Producer(url) as producer:
        await producer.publish(queue, b"first")
        await producer.publish(hung, b"first")
        async with hanging(rabbitmq, queue_name, hung), asyncio.TaskGroup() as tasks:
            big = tasks.create_task(refused(producer, queue))
            tasks.create_task(give_up(producer, hung))
            await big
            await asyncio.gather(*(producer.publish(queue, b"x") for _ in range(5)))


async def refused(producer: Producer, queue: Queue[bytes]) -> None:
    """Publish what is too large for RabbitMQ."""
    with pytest.raises(NotConfirmedError):
        await producer.publish(queue, b"x" * 150_000)


@pytest.mark.usefixtures("small_messages")
async def test_nobody_is_blamed_for_a_message_that_was_cancelled(
    proxy: Proxy, producer: Producer, broker: Broker, queue: Queue[bytes]
) -> None:
    """The culprit's publisher has gone: the message that is left is published, not refused."""
    proxy.stall()
    culprit = asyncio.create_task(producer.publish(queue, b"x" * 150_000))
    innocent = asyncio.create_task(producer.publish(queue, b"innocent"))
    await eventually(lambda: producer.statistics().in_flight == 2)
    culprit.cancel()
    await asyncio.wait([culprit])
    proxy.flow()
    await innocent
    assert await bodies(broker, queue) == {b"first": 1, b"innocent": 1}
    assert producer.statistics().not_confirmed == 0


@pytest.mark.usefixtures("small_messages")
async def test_suspects_that_are_cancelled_do_not_slow_down_the_others(
    proxy: Proxy, producer: Producer, broker: Broker, queue: Queue[bytes]
) -> None:
    """Once no suspect is left, messages are in flight by the hundred again."""
    proxy.stall()
    tasks = [asyncio.create_task(producer.publish(queue, b"x" * 150_000)) for _ in range(50)]
    await eventually(lambda: producer.statistics().in_flight == 50)
    proxy.flow()
    await eventually(lambda: producer._outbox and producer._outbox._suspects)
    proxy.stall()
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert producer._outbox is not None
    assert not producer._outbox._suspects
    proxy.flow()
    report = await producer.publish_many(queue, (b"%d" % number for number in range(1000)))
    assert report.confirmed == 1000
    assert await broker.ready(queue.name) == 1001


async def test_a_permission_that_is_revoked_is_noticed_on_the_next_channel(
    node: RabbitMQ, queue_name: str
) -> None:
    """In flight when the connection was lost: unknown; published after it: refused."""
    await node.add_user(queue_name, "pw")
    await node.set_permissions(queue_name)
    queue = Queue(queue_name, bytes, type="classic")
    async with Proxy(node.port) as proxy:
        url = proxy.url(node.url).replace("guest:guest", f"{queue_name}:pw")
        async with Producer(url) as producer, Broker(node.url) as broker:
            await producer.publish(queue, b"first")
            proxy.on_frame = drop_confirms
            task = asyncio.create_task(producer.publish(queue, b"x"))
            await eventually(lambda: _has(broker, queue, 2))
            await node.set_permissions(queue_name, write="^$")
            proxy.on_frame = None
            proxy.cut()
            with pytest.raises(OutcomeUnknownError, match="ACCESS_REFUSED"):
                await task
            with pytest.raises(NotConfirmedError, match="ACCESS_REFUSED"):
                await producer.publish(queue, b"x")


async def test_a_user_who_is_deleted_is_refused_for_good(node: RabbitMQ, queue_name: str) -> None:
    """When the next connect is refused, what waits and what comes fails at once."""
    await node.add_user(queue_name, "pw")
    await node.set_permissions(queue_name)
    queue = Queue(queue_name, bytes, type="classic")
    async with Proxy(node.port) as proxy:
        url = proxy.url(node.url).replace("guest:guest", f"{queue_name}:pw")
        async with Producer(url, timeout=600) as producer:
            await producer.publish(queue, b"first")
            await node.eval(
                f'rabbit_auth_backend_internal:delete_user(<<"{queue_name}">>, <<"test">>)'
            )
            proxy.cut()
            await eventually(lambda: is_cut_off(producer))
            with pytest.raises(AccessRefusedError, match="Login was refused"):
                await producer.publish(queue, b"x")
            with pytest.raises(AccessRefusedError, match="Login was refused"):
                await producer.publish(f"{queue_name}.new", b"x")
            report = await producer.publish_many(queue, [b"x"] * 300)
            assert {type(error) for error in report} == {AccessRefusedError}


# Alarms


async def test_an_alarm_shows_and_ends(
    node: RabbitMQ, queue_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A blocked connection is told by statistics, a warning and each error; then all goes on."""
    queue = Queue(queue_name, bytes, type="classic")
    async with Producer(node.url) as producer:
        await producer.publish(queue, b"first")
        async with memory_alarm(node):
            waits = asyncio.create_task(producer.publish(queue, b"waits"))
            await eventually(lambda: producer.statistics().is_blocked)
            with pytest.raises(OutcomeUnknownError) as caught:
                await producer.publish(queue, b"gives up", timeout=0.5)
            assert "RabbitMQ blocks publishers (memory or disk alarm)" in str(caught.value)
            await eventually(lambda: "messages wait for it to end" in caplog.text)
            # A new connection is not blocked before it publishes.
            async with Producer(node.url) as other:
                with pytest.raises(OutcomeUnknownError, match="RabbitMQ blocks publishers"):
                    await other.publish(Queue(queue_name, bytes, declare=False), b"x", timeout=3)
        await waits
        await producer.publish(queue, b"last")
        assert not producer.statistics().is_blocked
        await eventually(lambda: "RabbitMQ takes messages again" in caplog.text)
    warnings = [one for one in caplog.records if one.name == "aioworkq"]
    assert {one.levelno for one in warnings} == {logging.WARNING}
    async with Broker(node.url) as broker:
        stored = await bodies(broker, queue)
        assert stored.keys() >= {b"first", b"waits", b"last"}


async def test_a_connection_that_dies_blocked_comes_back(node: RabbitMQ, queue_name: str) -> None:
    """An alarm, then the death of the connection, then the end of both: nothing stays stuck."""
    queue = Queue(queue_name, bytes, type="classic")
    async with Proxy(node.port) as proxy, Producer(proxy.url(node.url), timeout=60) as producer:
        await producer.publish(queue, b"first")
        for number in range(3):
            async with memory_alarm(node):
                task = asyncio.create_task(producer.publish(queue, b"%d" % number))
                await eventually(lambda: producer.statistics().is_blocked)
                proxy.cut()
                await eventually(partial(_has_reconnected, producer, number + 1))
            await task
        await producer.publish(queue, b"last")
        async with Broker(node.url) as broker:
            assert set(await bodies(broker, queue)) == {b"first", b"0", b"1", b"2", b"last"}


def _has_reconnected(producer: Producer, times: int) -> bool:
    return producer.statistics().reconnects >= times


async def test_closing_during_an_alarm_is_bounded(node: RabbitMQ, queue_name: str) -> None:
    """close() waits for the timeout and no longer; what had no outcome is told so."""
    queue = Queue(queue_name, bytes, type="classic")
    producer = Producer(node.url)
    await producer.start()
    await producer.publish(queue, b"first")
    producer._timeout = 0.5
    async with memory_alarm(node):
        task = asyncio.create_task(producer.publish(queue, b"x", timeout=600))
        await eventually(lambda: producer.statistics().is_blocked)
        async with asyncio.timeout(20):
            await producer.close()
        with pytest.raises(OutcomeUnknownError, match="in time: the producer was closed"):
            await task


# Stalls and silence


@pytest.mark.parametrize("end", ["flow", "cut"])
async def test_megabytes_in_flight_survive_a_stall(
    proxy: Proxy, producer: Producer, broker: Broker, queue: Queue[bytes], end: str
) -> None:
    """A socket that takes nothing more holds up the messages, and loses none, cut or not."""
    proxy.stall(to_client=False)
    tasks = [
        asyncio.create_task(producer.publish(queue, b"%02d" % n + b"x" * 500_000))
        for n in range(40)
    ]
    await eventually(lambda: producer.statistics().in_flight > 30)
    proxy.flow()
    if end == "cut":
        proxy.cut()
    await asyncio.gather(*tasks)
    stored = Counter(body[:2] for body in (await bodies(broker, queue)).elements())
    assert set(stored) == {b"fi"} | {b"%02d" % n for n in range(40)}
    assert end == "cut" or set(stored.values()) == {1}


async def test_a_small_message_waits_behind_a_stall_until_its_timeout(
    proxy: Proxy, producer: Producer, broker: Broker, queue: Queue[bytes]
) -> None:
    """No call hangs on a full socket: each ends at its own deadline."""
    proxy.stall()
    big = [asyncio.create_task(producer.publish(queue, b"x" * 4_000_000)) for _ in range(6)]
    await eventually(lambda: producer.statistics().pending == 6)
    results = await asyncio.gather(
        *(producer.publish(queue, b"small", timeout=0.3) for _ in range(20)),
        producer.publish("undeclared", b"x", timeout=0.3),
        return_exceptions=True,
    )
    kinds = {type(result) for result in results}
    assert kinds <= {OutcomeUnknownError, ConnectionLostError}
    proxy.flow()
    await asyncio.gather(*big)
    await producer.publish(queue, b"last")


async def test_a_lost_heartbeat_is_no_cancellation(
    proxy: Proxy, proxy_url: str, broker: Broker, queue: Queue[bytes]
) -> None:
    """A half-open connection is noticed, and what was in flight is published on the next one."""
    async with Producer(proxy_url, heartbeat=1, connect_timeout=1, timeout=60) as producer:
        await producer.publish(queue, b"first")
        proxy.half_open()
        async with asyncio.TaskGroup() as tasks:
            sent = tasks.create_task(producer.publish(queue, b"sent"))
            unknown = tasks.create_task(_outcome(producer.publish(queue, b"unknown", timeout=1)))
            undeclared = tasks.create_task(_outcome(producer.publish("other", b"x", timeout=1)))
            await eventually(lambda: is_cut_off(producer))
            late = tasks.create_task(_outcome(producer.publish(queue, b"late", timeout=0.1)))
            await asyncio.wait([late])
            proxy.flow()
        assert isinstance(unknown.result(), OutcomeUnknownError)
        assert isinstance(undeclared.result(), ConnectionLostError)
        assert isinstance(late.result(), ConnectionLostError)
        assert sent.result()
        assert await bodies(broker, queue) == {b"first": 1, b"sent": 1}


async def _outcome(publishing: Any) -> Any:
    try:
        return await publishing
    except Exception as exc:
        return exc


@pytest.mark.parametrize("fault", ["stalled and full", "half open", "refused"])
async def test_closing_is_bounded_in_every_phase(
    proxy: Proxy, proxy_url: str, queue: Queue[bytes], fault: str
) -> None:
    """Whatever the network does, close() ends, all publishers hear of it, no socket stays."""
    producer = Producer(proxy_url)
    await producer.start()
    await producer.publish(queue, b"first")
    producer._timeout = 0.5
    if fault == "stalled and full":
        proxy.stall()
    elif fault == "half open":
        proxy.half_open()
    else:
        proxy.refuse()
        proxy.cut()
    tasks = [
        asyncio.create_task(_outcome(producer.publish(queue, b"x" * 2_000_000, timeout=600)))
        for _ in range(12)
    ]
    tasks.append(asyncio.create_task(_outcome(producer.publish("other", b"x", timeout=600))))
    await eventually(lambda: producer.statistics().pending == 12)
    async with asyncio.timeout(20):
        await asyncio.gather(producer.close(), producer.close())
    results = await asyncio.gather(*tasks)
    kinds = {type(result) for result in results}
    assert kinds <= {OutcomeUnknownError, ConnectionLostError}, results
    proxy.flow()
    proxy.cut()
    await producer.close()


# Cancellation


async def test_cancelling_anywhere_stores_a_message_once_or_not_at_all(
    producer: Producer, broker: Broker, queue: Queue[bytes]
) -> None:
    """Cancelled after any number of steps, also while it declares; the producer stays usable."""
    rng = random.Random(5)
    new = Queue(f"{queue.name}.new", bytes, type="classic")
    tasks: list[asyncio.Task[str]] = []
    for number in range(150):
        where = queue if number % 3 else new
        if number % 10 == 0:
            producer.forget(where)
        task = asyncio.create_task(producer.publish(where, b"%d" % number))
        tasks.append(task)
        for _ in range(rng.randrange(40)):
            await asyncio.sleep(0)
        if rng.random() < 0.7:
            task.cancel()
    await asyncio.wait(tasks)
    await producer.publish(new, b"usable")
    assert all(task.cancelled() or task.result() for task in tasks)
    await eventually(lambda: producer.statistics().in_flight == 0)
    stored = await bodies(broker, queue) + await bodies(broker, new)
    assert set(stored.values()) == {1}
    done = {b"%d" % number for number, task in enumerate(tasks) if not task.cancelled()}
    assert set(stored) >= done


async def test_random_faults_lose_nothing(
    proxy: Proxy, producer: Producer, broker: Broker, queue: Queue[bytes]
) -> None:
    """Cuts, stalls, refusals and lost confirms in any order: whatever was confirmed is stored."""
    rng = random.Random(7)
    confirmed: set[bytes] = set()
    stop = asyncio.Event()

    async def publish(name: int) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            body = b"%d.%d" % (name, number)
            with contextlib.suppress(OutcomeUnknownError, ConnectionLostError):
                await producer.publish(queue, body, timeout=rng.choice([0.05, 5.0, 5.0, 20.0]))
                confirmed.add(body)

    async with asyncio.TaskGroup() as tasks:
        for name in range(10):
            tasks.create_task(publish(name))
        for _ in range(12):
            wanted = len(confirmed) + 1
            match rng.choice(["cut", "stall", "refuse", "confirms"]):
                case "cut":
                    proxy.cut()
                case "stall":
                    proxy.stall(to_broker=rng.random() < 0.5, to_client=True)
                case "refuse":
                    proxy.refuse()
                    proxy.cut()
                case _:
                    proxy.on_frame = drop_confirms
            await asyncio.sleep(rng.random() * 0.1)  # how long a fault lasts, not a wait for it
            if proxy.on_frame is not None or rng.random() < 0.3:
                proxy.cut()
            proxy.on_frame = None
            proxy.flow()
            proxy.accept()
            while len(confirmed) < wanted:
                await asyncio.sleep(0.01)
        stop.set()
    stored = await bodies(broker, queue)
    assert confirmed <= set(stored)
    statistics = producer.statistics()
    assert (statistics.pending, statistics.in_flight) == (0, 0)
