"""A worker whose broker, connection, channel or queue fails: it comes back, or says why not."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from aioworkq import (
    AccessRefusedError,
    ConsumerState,
    Delivery,
    Producer,
    Queue,
    Reject,
    RetryPolicy,
    TopologyError,
    Worker,
    WorkQueueError,
)
from tests.consuming import (
    Broker,
    channels,
    crash,
    eventually,
    headers_of,
    publish_all,
    publish_with_pika,
)
from tests.proxy import Proxy
from tests.publishing import memory_alarm

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from aioworkq.testing import RabbitMQ
    from aioworkq.topology import QueueType
    from tests.proxy import Direction

    Lost = Callable[[], Awaitable[None]]
    Fault = Callable[[RabbitMQ, Proxy, Lost], Awaitable[None]]


@pytest.fixture(autouse=True)
def short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the steps of a stop less time than users get: no test waits for the sake of waiting."""
    monkeypatch.setattr("aioworkq.settle._STOPPING_TIMEOUT", 1.0)


pytestmark = pytest.mark.rabbitmq

TYPES = pytest.mark.parametrize("kind", ["quorum", "classic"])

BASIC_PUBLISH = b"\x00\x3c\x00\x28"
BASIC_ACK = b"\x00\x3c\x00\x50"


@pytest.fixture
async def node_url(node: RabbitMQ, queue_name: str) -> AsyncIterator[str]:
    yield await node.add_vhost(queue_name)
    with contextlib.suppress(Exception):  # a test may have deleted it
        await node.delete_vhost(queue_name)


def drop_to_broker(*methods: bytes) -> Callable[[Direction, int, int, bytes], bool]:
    def on_frame(direction: Direction, kind: int, channel: int, payload: bytes) -> bool:
        return direction != "to_broker" or payload[:4] not in methods

    return on_frame


def channel_of(worker: Worker, queue: str) -> Any:
    (consumer,) = [one for one in worker._consumers if one.queue.name == queue]
    subscription: Any = consumer._subscription
    return subscription._channel


def losses(worker: Worker, queue: str) -> int:
    return worker.statistics().consumers[queue].losses


async def is_done(broker: Broker, worker: Worker, queue: str) -> bool:
    """Say whether nothing is left to do, in the queue or here."""
    if not worker.is_ready or await broker.ready(queue):
        return False
    await worker.wait_ready(timeout=1)
    return not worker.statistics().in_flight + worker.statistics().waiting


# One channel


async def test_channel_error_hits_one_handler(proxy_url: str, url: str, queue_name: str) -> None:
    """A channel that RabbitMQ closes is opened again; other handlers notice nothing of it."""
    one, two = f"{queue_name}.one", f"{queue_name}.two"
    worker = Worker(proxy_url)
    release = asyncio.Event()
    seen: list[tuple[str, Any]] = []

    @worker.handler(one)
    async def handle_one(body: Any) -> None:
        seen.append(("one", body))

    @worker.handler(two)
    async def handle_two(body: Any) -> None:
        await release.wait()
        seen.append(("two", body))

    async with worker, Producer(url) as producer:
        await producer.publish(two, 2)
        await eventually(lambda: worker.statistics().in_flight == 1)
        await channel_of(worker, one).basic_ack(99_999)  # what a double ack is to RabbitMQ
        await eventually(lambda: losses(worker, one) == 1)
        assert "PRECONDITION_FAILED" in worker.statistics().consumers[one].last_error
        assert worker.statistics().consumers[two].is_subscribed
        await worker.wait_ready()
        await producer.publish(one, 1)
        await eventually(lambda: seen == [("one", 1)])
        release.set()
        await eventually(lambda: len(seen) == 2)
        statistics = worker.statistics()
    assert losses(worker, two) == 0
    assert statistics.consumers[two].stale_settles == 0
    assert statistics.reconnects == 0


@pytest.mark.parametrize("declare", [True, False])
@TYPES
async def test_queue_deleted(
    broker: Broker,
    url: str,
    queue_name: str,
    kind: QueueType,
    declare: bool,  # noqa: FBT001
) -> None:
    """A deleted queue is declared again, or waited for when operators own it; and then consumed."""
    if not declare:
        await broker.declare(queue_name)
        await broker.declare(f"{queue_name}.dead")
    worker = Worker(url)
    handled: list[Any] = []

    @worker.handler(Queue(queue_name, type=kind, declare=declare))
    async def handle(body: Any) -> None:
        handled.append(body)

    async with worker:
        await broker.delete(queue_name)
        await eventually(lambda: losses(worker, queue_name) == 1)
        if not declare:
            await eventually(
                lambda: "NOT_FOUND" in worker.statistics().consumers[queue_name].last_error
            )
            assert not worker.is_ready
            assert worker.statistics().is_connected
            await broker.declare(queue_name)
        await worker.wait_ready()
        await broker.publish(queue_name, b"x", content_type="text/plain")
        await eventually(lambda: handled == ["x"])


async def test_queue_replaced_by_another_kind(
    broker: Broker, proxy: Proxy, proxy_url: str, queue_name: str
) -> None:
    """A queue that was deleted and declared otherwise meanwhile is used as it is."""
    worker = Worker(proxy_url)
    handled: list[Any] = []

    @worker.handler(queue_name)
    async def handle(body: Any) -> None:
        handled.append(body)

    async with worker:
        proxy.refuse()
        proxy.cut()
        await eventually(lambda: not worker.is_ready)
        await broker.delete(queue_name)
        await broker.declare(queue_name, **{"x-max-priority": 3})
        proxy.accept()
        await worker.wait_ready()
        await broker.publish(queue_name, b"x", content_type="text/plain")
        await eventually(lambda: handled == ["x"])


async def test_consumer_timeout(node: RabbitMQ, node_url: str, queue_name: str) -> None:
    """A handler longer than the consumer_timeout loses its channel, runs once, and is acked."""
    before = await node.eval("application:get_env(rabbit, consumer_timeout)")
    await node.eval("application:set_env(rabbit, consumer_timeout, 600)")
    await node.eval("application:set_env(rabbit, channel_tick_interval, 200)")
    try:
        worker = Worker(node_url)
        runs: list[int] = []
        release = asyncio.Event()

        @worker.handler(queue_name)
        async def slow(body: Any, delivery: Delivery) -> None:
            runs.append(delivery.attempt)
            await release.wait()
            assert delivery.lost

        async with worker, Producer(node_url) as producer, Broker(node_url) as broker:
            await producer.publish(queue_name, "x")
            # Its redelivery waits here, and is timed out as well, again and again.
            await eventually(lambda: losses(worker, queue_name) >= 2)
            last_error = worker.statistics().consumers[queue_name].last_error
            assert "timed out" in last_error or "within the consumer_timeout" in last_error
            await eventually(lambda: worker.statistics().waiting == 1)
            release.set()
            await eventually(lambda: worker.statistics().duplicates >= 1)
            await eventually(lambda: is_done(broker, worker, queue_name))
        assert runs == [1]
        assert worker.statistics().handled == 1
    finally:
        value = before.removeprefix("{ok,").removesuffix("}")
        await node.eval(f"application:set_env(rabbit, consumer_timeout, {value})")
        await node.eval("application:set_env(rabbit, channel_tick_interval, 60000)")


# The connection: what runs meanwhile


@TYPES
async def test_running_when_the_connection_is_lost(
    broker: Broker, proxy: Proxy, proxy_url: str, url: str, queue_name: str, kind: QueueType
) -> None:
    """What runs goes on, is told, is not run beside itself; its redelivery is acked at its end."""
    worker = Worker(proxy_url)
    release = asyncio.Event()
    log: list[str] = []

    @worker.handler(Queue(queue_name, type=kind))
    async def slow(body: Any, delivery: Delivery) -> None:
        log.append(f"starts, lost: {delivery.lost}")
        await release.wait()
        log.append(f"ends, lost: {delivery.lost}")

    async with worker, Producer(url) as producer:
        await producer.publish(Queue(queue_name, type=kind), "x")
        await eventually(lambda: log)
        proxy.cut()
        await eventually(lambda: worker.statistics().waiting == 1)  # its redelivery
        assert worker.statistics().in_flight == 1
        release.set()
        await eventually(lambda: worker.statistics().duplicates == 1)
    assert log == ["starts, lost: False", "ends, lost: True"]
    statistics = worker.statistics()
    assert (statistics.handled, statistics.stale_settles) == (1, 1)
    assert await broker.ready(queue_name) == 0


@TYPES
async def test_failing_when_the_connection_is_lost(
    proxy: Proxy, proxy_url: str, url: str, queue_name: str, kind: QueueType
) -> None:
    """When the run that went on fails, its redelivery is run after it, as the next attempt."""
    worker = Worker(proxy_url)
    release = asyncio.Event()
    log: list[str] = []

    @worker.handler(Queue(queue_name, type=kind))
    async def slow(body: Any, delivery: Delivery) -> None:
        log.append(f"starts {delivery.attempt}")
        if delivery.attempt == 1:
            await release.wait()
            log.append("fails")
            raise ValueError("no")

    async with worker, Producer(url) as producer:
        await producer.publish(Queue(queue_name, type=kind), "x")
        await eventually(lambda: log)
        proxy.cut()
        await eventually(lambda: worker.statistics().waiting == 1)
        release.set()
        await eventually(lambda: worker.statistics().handled == 1)
    assert log == ["starts 1", "fails", "starts 2"]


async def test_cancelled_when_the_connection_is_lost(
    proxy: Proxy, proxy_url: str, url: str, queue_name: str
) -> None:
    """With on_connection_loss="cancel" the run is cancelled, and the redelivery runs after it."""
    worker = Worker(proxy_url)
    log: list[str] = []

    @worker.handler(queue_name, on_connection_loss="cancel")
    async def slow(body: Any, delivery: Delivery) -> None:
        log.append("starts")
        try:
            if len(log) == 1:
                await anyio.sleep_forever()
        except asyncio.CancelledError:
            log.append(f"cancelled, lost: {delivery.lost}")
            raise

    async with worker, Producer(url) as producer:
        await producer.publish(queue_name, "x")
        await eventually(lambda: log)
        proxy.cut()
        await eventually(lambda: worker.statistics().handled == 1)
    assert log == ["starts", "cancelled, lost: True", "starts"]
    assert worker.statistics().failed == 0


async def test_thread_when_the_connection_is_lost(
    proxy: Proxy, proxy_url: str, url: str, queue_name: str
) -> None:
    """A thread goes on too, even with "cancel", and is not joined by a second one."""
    worker = Worker(proxy_url)
    release = threading.Event()
    log: list[str] = []

    @worker.handler(queue_name, concurrency=2, on_connection_loss="cancel")
    def slow(body: Any, delivery: Delivery) -> None:
        log.append("starts")
        if len(log) == 1:
            release.wait(60)
        log.append("ends")

    async with worker, Producer(url) as producer:
        await producer.publish(queue_name, "x")
        await eventually(lambda: log)
        proxy.cut()
        await eventually(lambda: worker.statistics().waiting == 1)
        release.set()
        await eventually(lambda: worker.statistics().handled == 1)
    assert log == ["starts", "ends", "starts", "ends"]


# The connection: what is settled meanwhile


@TYPES
async def test_lost_acks(
    broker: Broker, proxy: Proxy, proxy_url: str, url: str, queue_name: str, kind: QueueType
) -> None:
    """What succeeded and whose ack was lost on the way is acked, and not run a second time."""
    queue = Queue(queue_name, int, type=kind)
    worker = Worker(proxy_url)
    handled: list[int] = []

    @worker.handler(queue)
    async def handle(number: int) -> None:
        handled.append(number)

    async with worker, Producer(url) as producer:
        proxy.on_frame = drop_to_broker(BASIC_ACK)
        await publish_all(producer, queue, range(10))
        await eventually(lambda: worker.statistics().handled == 10)
        proxy.on_frame = None
        proxy.cut()
        await eventually(lambda: worker.statistics().duplicates == 10)
    assert sorted(handled) == list(range(10))
    assert await broker.ready(queue_name) == 0


async def test_lost_ack_of_a_dead_letter(
    broker: Broker, proxy: Proxy, proxy_url: str, url: str, queue_name: str
) -> None:
    """What was dead-lettered and whose ack was lost is not dead-lettered a second time."""
    worker = Worker(proxy_url)

    @worker.handler(queue_name)
    async def reject(body: Any) -> None:
        raise Reject("no")

    async with worker, Producer(url) as producer:
        proxy.on_frame = drop_to_broker(BASIC_ACK)
        await producer.publish(queue_name, "x")
        await eventually(lambda: worker.statistics().dead_lettered == 1)
        proxy.on_frame = None
        proxy.cut()
        await eventually(lambda: worker.statistics().duplicates == 1)
    assert await broker.ready(queue_name) == 0
    assert await broker.ready(f"{queue_name}.dead") == 1


@TYPES
async def test_equal_messages_without_id(
    broker: Broker,
    proxy: Proxy,
    proxy_url: str,
    url: str,
    queue_name: str,
    kind: QueueType,
    *,
    documented_calls: bool,
) -> None:
    """Equal messages without ids are each their own piece of work, whatever is lost in between."""
    worker = Worker(proxy_url)
    runs = 0

    @worker.handler(Queue(queue_name, type=kind), concurrency=2, prefetch_count=5)
    async def handle(body: Any, delivery: Delivery) -> None:
        nonlocal runs
        assert delivery.message_id == "" or documented_calls  # then copies get one
        await asyncio.sleep(0.005)
        runs += 1

    async with worker:
        await publish_with_pika(url, queue_name, *[b"same"] * 40)
        for handled in (5, 15, 25):
            await eventually(lambda n: runs >= n, handled)
            proxy.cut()

        await eventually(lambda: is_done(broker, worker, queue_name))
    assert runs >= 40
    assert worker.statistics().duplicates == 0


@pytest.mark.parametrize("retry", [RetryPolicy(first=0.125, jitter=0), None])
async def test_a_copy_is_not_taken_for_its_original(
    broker: Broker,
    proxy: Proxy,
    proxy_url: str,
    url: str,
    queue_name: str,
    retry: RetryPolicy | None,
) -> None:
    """The copy of a failed message is never acked as if it were the original that was settled."""
    queue = Queue(queue_name, str, type="classic")
    worker = Worker(proxy_url, grace=0)
    fail, release = asyncio.Event(), asyncio.Event()
    log: list[str] = []

    @worker.handler(queue, concurrency=1, prefetch_count=3, retry=retry)
    async def handle(body: str, delivery: Delivery) -> None:
        log.append(f"{body} {delivery.attempt}")
        if body == "fails" and delivery.attempt == 1:
            await fail.wait()
            raise ValueError("no")
        if body == "blocks":
            await release.wait()

    async with worker, Producer(url) as producer:
        await producer.publish(queue, "fails")
        await producer.publish(queue, "blocks")
        await eventually(lambda: worker.statistics().waiting == 1)
        fail.set()
        await eventually(lambda: "blocks 1" in log)
        await eventually(lambda: worker.statistics().waiting == 1)  # what failed, behind it
        # Now what the original was acked on is lost, and the copy comes back redelivered.
        for times in (1, 2):
            proxy.cut()
            await eventually(lambda n: losses(worker, queue_name) == n, times)
            await eventually(lambda: worker.statistics().waiting == 2)
        release.set()
        await eventually(lambda: worker.statistics().handled == 2)
    assert log == ["fails 1", "blocks 1", "fails 2"]
    assert await broker.ready(queue_name) == 0


async def test_the_same_message_published_again(
    proxy: Proxy, proxy_url: str, url: str, queue_name: str
) -> None:
    """A message published again under the id of one that was done runs again, whatever is lost."""
    queue = Queue(queue_name, str)
    worker = Worker(proxy_url)
    release = asyncio.Event()
    log: list[str] = []

    @worker.handler(queue, concurrency=1, prefetch_count=3)
    async def handle(body: str) -> None:
        log.append(body)
        if body == "blocks":
            await release.wait()

    async with worker, Producer(url) as producer:
        await producer.publish(queue, "daily", message_id="daily")
        await eventually(lambda: worker.statistics().handled == 1)
        await producer.publish(queue, "blocks")
        await producer.publish(queue, "daily", message_id="daily")
        await eventually(lambda: worker.statistics().waiting == 1)
        proxy.cut()
        await eventually(lambda: losses(worker, queue_name) == 1)
        await eventually(lambda: worker.statistics().waiting == 2)
        release.set()
        await eventually(lambda: log == ["daily", "blocks", "daily"])


async def test_excuses_and_failures_add_up(
    broker: Broker, proxy: Proxy, proxy_url: str, url: str, queue_name: str
) -> None:
    """A message lost unstarted, then failing, is still started exactly `attempts` times."""
    queue = Queue(queue_name, str)
    worker = Worker(proxy_url)
    release = asyncio.Event()
    attempts: list[int] = []

    @worker.handler(queue, concurrency=1, prefetch_count=2, attempts=3)
    async def handle(body: str, delivery: Delivery) -> None:
        if body == "blocks":
            await release.wait()
            return
        attempts.append(delivery.attempt)
        raise ValueError("no")

    async with worker, Producer(url) as producer:
        await producer.publish(queue, "blocks")
        await producer.publish(queue, "fails")
        for times in (1, 2):
            await eventually(lambda: worker.statistics().waiting >= 1)
            proxy.cut()
            await eventually(lambda n: losses(worker, queue_name) == n, times)
            await eventually(lambda: worker.statistics().waiting == 2)
        release.set()
        dead = await broker.take(queue.dead_letter_queue)
    assert attempts == [1, 2, 3]
    assert headers_of(dead)["x-aioworkq-reason"] == "gave up after 3 attempts"


# The broker


async def kill_and_start(node: RabbitMQ, proxy: Proxy, lost: Lost) -> None:
    await crash(node)
    await node.start()


async def close_all(node: RabbitMQ, proxy: Proxy, lost: Lost) -> None:
    await node.eval('rabbit_networking:close_all_connections("as a test wants it")')


async def pause_past_the_heartbeat(node: RabbitMQ, proxy: Proxy, lost: Lost) -> None:
    node.pause()
    try:
        await lost()
    finally:
        node.resume()


async def half_open(node: RabbitMQ, proxy: Proxy, lost: Lost) -> None:
    proxy.half_open()
    await lost()
    proxy.flow()
    proxy.cut()  # what was swallowed broke the frames


async def stall_to_broker(node: RabbitMQ, proxy: Proxy, lost: Lost) -> None:
    proxy.stall(to_client=False)
    await lost()
    proxy.flow()


async def stall_to_client(node: RabbitMQ, proxy: Proxy, lost: Lost) -> None:
    proxy.stall(to_broker=False)
    await lost()
    proxy.flow()


async def check_comes_back(node: RabbitMQ, url: str, queue: str, fault: Fault) -> None:
    handled: set[Any] = set()
    async with Proxy(node.port) as proxy:
        worker = Worker(proxy.url(url), heartbeat=1, connect_timeout=2, grace=5)

        async def lost() -> None:
            await eventually(lambda: not worker.is_ready)

        @worker.handler(queue, concurrency=2)
        async def handle(body: Any) -> None:
            handled.add(body)

        async with worker:
            noticed = asyncio.create_task(lost())
            await fault(node, proxy, lost)
            await noticed
            await worker.wait_ready()
            statistics = worker.statistics()
            assert statistics.is_connected
            assert statistics.reconnects >= 1
            assert statistics.consumers[queue].losses >= 1
            assert statistics.consumers[queue].last_error
            async with Producer(url) as producer:
                await publish_all(producer, queue, range(20))
            await eventually(lambda: len(handled) == 20)
        assert worker.statistics().consumers[queue].state is ConsumerState.STOPPED


@pytest.mark.parametrize("fault", [kill_and_start, close_all, pause_past_the_heartbeat])
async def test_comes_back_to_the_broker(
    node: RabbitMQ, node_url: str, queue_name: str, fault: Fault
) -> None:
    """After a crash, a closed or a frozen broker the consumer comes back by itself, and says so."""
    await check_comes_back(node, node_url, queue_name, fault)


async def test_comes_back_through_the_network(
    node: RabbitMQ, node_url: str, queue_name: str
) -> None:
    """After a network that swallows, or stalls in one direction, it comes back as well."""
    async with asyncio.TaskGroup() as tasks:
        for number, fault in enumerate((half_open, stall_to_broker, stall_to_client)):
            queue = f"{queue_name}.{number}"
            tasks.create_task(check_comes_back(node, node_url, queue, fault))


async def test_refused_for_good_after_an_outage(
    node: RabbitMQ, node_url: str, queue_name: str
) -> None:
    """A user, password or virtual host that is gone when it comes back raises the typed error."""
    for case in ("user", "password", "vhost"):
        user = f"user-{case}"
        await node.add_user(user, "secret")
        vhost = f"{queue_name}.{case}"
        url = (await node.add_vhost(vhost)).replace("guest:guest", f"{user}:secret")
        await node.set_permissions(user, vhost=vhost)
        async with Proxy(node.port) as proxy:
            worker = Worker(proxy.url(url))

            @worker.handler(queue_name)
            async def handle(body: Any) -> None: ...

            with pytest.raises(AccessRefusedError) as caught:
                async with worker:
                    proxy.refuse()
                    proxy.cut()
                    await eventually(lambda w: not w.is_ready, worker)
                    if case == "user":
                        await node.rabbitmqctl("delete_user", user)
                    elif case == "password":
                        await node.rabbitmqctl("change_password", user, "another")
                    else:
                        await node.delete_vhost(vhost)
                    proxy.accept()
                    await asyncio.sleep(60)
            assert "secret" not in str(caught.value)
            state = worker.statistics().consumers[queue_name].state
            assert state is ConsumerState.FAILED


async def test_alarm_does_not_stop_workers(node: RabbitMQ, node_url: str, queue_name: str) -> None:
    """While RabbitMQ blocks publishers, a worker goes on, also after a reconnect."""
    async with Proxy(node.port) as proxy:
        worker = Worker(proxy.url(node_url))
        handled: list[int] = []
        go = asyncio.Event()

        @worker.handler(Queue(queue_name, int), concurrency=1)
        async def handle(number: int) -> None:
            handled.append(number)
            if len(handled) == 10:
                await go.wait()

        async with Producer(node_url) as producer:
            await publish_all(producer, Queue(queue_name, int), range(30))
            async with memory_alarm(node), worker:
                await eventually(lambda: len(handled) == 10)
                proxy.cut()
                await eventually(lambda: losses(worker, queue_name) == 1)
                await worker.wait_ready()
                go.set()
                await eventually(lambda: set(handled) == set(range(30)))
                assert worker.is_ready
                assert not worker._connection.is_blocked


async def test_stop_during_an_alarm(node: RabbitMQ, node_url: str, queue_name: str) -> None:
    """A stop during an alarm waits a few seconds for its copies, then gives back by a nack."""
    worker = Worker(node_url, grace=0)

    @worker.handler(Queue(queue_name, int), concurrency=1, prefetch_count=20)
    async def handle(number: int) -> None:
        await anyio.sleep_forever()

    async with Broker(node_url) as broker, Producer(node_url) as producer:
        await publish_all(producer, Queue(queue_name, int), range(50))
        async with memory_alarm(node), worker, asyncio.timeout(60):
            await eventually(lambda: worker.statistics().waiting == 19)
            worker.stop()
        left = {int(message.body) for message in await broker.take_all(queue_name)}
    assert left == set(range(50))


async def test_many_handlers_start_at_once(node: RabbitMQ, node_url: str, queue_name: str) -> None:
    """Whose queues are all missing: RabbitMQ closes a channel for each of these in answer.

    aiormq drops what it has to answer when there is too much at a time, and RabbitMQ closes the
    connection when it sees the number of such a channel again. With few numbers that is soon.
    """
    worker = Worker(node_url, timeout=90)
    for number in range(400):
        worker.handler(Queue(f"{queue_name}.{number}", bytes, type="classic"))(_nothing)
    await node.eval("application:set_env(rabbit, channel_max, 450)")
    try:
        async with asyncio.timeout(100), worker:
            statistics = worker.statistics()
            assert {one.state for one in statistics.consumers.values()} == {
                ConsumerState.SUBSCRIBED
            }
            assert statistics.reconnects == 0
    finally:
        await node.eval("application:set_env(rabbit, channel_max, 2047)")


async def test_more_handlers_than_channels(node: RabbitMQ, node_url: str, queue_name: str) -> None:
    """RabbitMQ allows a connection so many channels: whoever gets none is told so."""
    worker = Worker(node_url, timeout=10)
    for number in range(10):
        worker.handler(Queue(f"{queue_name}.{number}", bytes, type="classic"))(_nothing)
    await node.eval("application:set_env(rabbit, channel_max, 5)")
    try:
        with pytest.raises(WorkQueueError, match="all 5 channels that RabbitMQ allows"):
            async with worker:
                pass
    finally:
        await node.eval("application:set_env(rabbit, channel_max, 2047)")


async def _nothing(_: bytes) -> None: ...


# Odd messages


@pytest.mark.parametrize(
    "properties",
    [
        {"timestamp": 1_700_000_000_000},
        {"priority": 255},
        {"expiration": "60000"},
        {"headers": {"nested": {"list": [1, "two", None, True]}}},
        {"headers": {"x-aioworkq-attempts": "many"}},
        {"headers": {"x-aioworkq-attempts": [1]}},
        {"headers": {"x-aioworkq-attempts": -5}},
        {"headers": {"x-death": "nonsense", "x-delivery-count": "nonsense"}},
    ],
    ids=repr,
)
async def test_odd_properties(url: str, queue_name: str, properties: dict[str, Any]) -> None:
    """Whatever properties another client writes, the message is handled or dead-lettered."""
    worker = Worker(url)
    handled: list[bytes] = []

    @worker.handler(Queue(queue_name, bytes), retry=RetryPolicy(attempts=2, first=0.125))
    async def handle(body: bytes, delivery: Delivery) -> None:
        handled.append(body)
        if len(handled) == 1:
            raise ValueError("no")

    async with worker:
        await publish_with_pika(url, queue_name, b"x", **properties)
        await eventually(lambda: worker.statistics().handled == 1)
    assert handled == [b"x", b"x"]
    assert losses(worker, queue_name) == 0


async def test_header_of_the_first_failure(broker: Broker, url: str, queue_name: str) -> None:
    """A dead letter says when its first and its last attempt failed."""
    worker = Worker(url)

    @worker.handler(queue_name, retry=RetryPolicy(attempts=2, first=1.0, jitter=0))
    async def fail(body: Any) -> None:
        raise ValueError("no")

    async with worker, Producer(url) as producer:
        await producer.publish(queue_name, "x")
        dead = await broker.take(f"{queue_name}.dead")
    headers = headers_of(dead)
    assert headers["x-aioworkq-first-failure"] < headers["x-aioworkq-last-failure"]
    assert headers["x-aioworkq-last-failure"] <= datetime.now(UTC)


# Nothing leaks


async def test_nothing_leaks(
    rabbitmq: RabbitMQ,
    broker: Broker,
    proxy: Proxy,
    proxy_url: str,
    url: str,
    queue_name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """After 300 lost connections there are as many tasks, threads and sockets as before."""
    caplog.set_level(logging.CRITICAL)  # pytest keeps what is logged, tracebacks and all
    for name in ("connection._BACKOFF_FIRST", "connection._SETTLED_AFTER"):
        monkeypatch.setattr(f"aioworkq.amqp.{name}", 0.001)
    monkeypatch.setattr("aioworkq.consumer._GOOD_AFTER", 0)
    worker = Worker(proxy_url, heartbeat=1)  # timers of dead connections end with a heartbeat

    @worker.handler(Queue(queue_name, int), concurrency=2, prefetch_count=5)
    async def handle(number: int) -> None:
        await asyncio.sleep(0.001)

    def census() -> tuple[int, int, int]:
        return len(asyncio.all_tasks()), threading.active_count(), len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    def objects() -> int:
        gc.collect()
        return len(gc.get_objects())

    async def cut(times: int) -> None:
        for number in range(times):
            await producer.publish(Queue(queue_name, int), number)
            reconnects = worker.statistics().reconnects
            proxy.cut()
            await eventually(lambda n: worker.statistics().reconnects > n, reconnects)
            if number % 10 == 0:
                await worker.wait_ready()

    async with worker, Producer(url) as producer:
        await cut(30)
        await worker.wait_ready()
        await eventually(lambda: is_done(broker, worker, queue_name))
        before = census()
        count = objects()
        await cut(270)
        await worker.wait_ready()
        await eventually(lambda: is_done(broker, worker, queue_name))

        def is_as_before() -> bool:
            return all(now <= then for now, then in zip(census(), before, strict=True))

        await eventually(is_as_before)
        consumer = worker._consumers[0]
        assert not consumer._runs._orphans
        assert consumer._runs._slots.used == 0
        await eventually(lambda: objects() - count < 5_000)
        print(f"{objects() - count} more objects after 270 connections")

        async def is_subscribed_once() -> bool:
            return len(await channels(rabbitmq, queue_name)) == 1

        await eventually(is_subscribed_once)  # a slow machine may have missed heartbeats of 1 s
    assert await broker.ready(queue_name) == 0


def test_errors_are_ours() -> None:
    """What these tests expect are the library's own errors."""
    assert issubclass(AccessRefusedError, WorkQueueError)
    assert issubclass(TopologyError, WorkQueueError)
