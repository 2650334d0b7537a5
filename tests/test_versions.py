"""The table of versions: each cell is asked of the RabbitMQ that the tests run with."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, Literal

import anyio
import pika
import pytest

from aioworkq import (
    ConnectionLostError,
    DeadLetters,
    DeadMessage,
    Producer,
    Queue,
    Worker,
    dead_letters,
)
from aioworkq.delay import UNROUTABLE
from aioworkq.testing import RabbitMQ
from aioworkq.versions import TABLE, Semantics, semantics_of
from tests.nodes import in_thread

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anyio.from_thread import BlockingPortal
    from pika.adapters.blocking_connection import BlockingChannel, BlockingConnection

QUORUM = {"x-queue-type": "quorum"}
MOST = 40


@pytest.mark.parametrize(
    ("version", "line"),
    [
        ("3.10.8", (3, 10)),
        ("3.13.7", (3, 10)),
        ("4.0.5", (4, 0)),
        ("4.2.9", (4, 0)),
        ("4.3.6", (4, 3)),
        ("4.10.0", (4, 3)),
        ("5.0", (4, 3)),
        ("3.8.9", (3, 10)),
        ("", (3, 10)),
        ("unknown", (3, 10)),
    ],
)
def test_a_version_belongs_to_the_last_line_before_it(version: str, line: tuple[int, int]) -> None:
    """A version between two lines behaves as the older one; one that nobody knows as the oldest."""
    assert semantics_of(version) is TABLE[line]


@pytest.fixture
def semantics(rabbitmq: RabbitMQ) -> Semantics:
    return semantics_of(rabbitmq.version)


@pytest.fixture
def connection(url: str) -> Iterator[BlockingConnection]:
    with contextlib.closing(pika.BlockingConnection(pika.URLParameters(url))) as connection:
        yield connection


@pytest.fixture
def channel(connection: BlockingConnection) -> BlockingChannel:
    channel = connection.channel()
    channel.confirm_delivery()
    return channel


def publish(channel: BlockingChannel, queue: str, body: bytes = b"x", **properties: Any) -> None:
    channel.basic_publish("", queue, body, pika.BasicProperties(**properties), mandatory=True)


def get(channel: BlockingChannel, queue: str) -> tuple[int, dict[str, Any]] | None:
    """Take one message, unsettled: its tag and its headers."""
    got: Any = channel.basic_get(queue)
    method, properties, _ = got
    return None if method is None else (method.delivery_tag, properties.headers or {})


def get_next(channel: BlockingChannel, queue: str) -> tuple[int, dict[str, Any]]:
    """Take the message that was returned just now, as soon as it is there."""
    for _ in range(1000):
        if (got := get(channel, queue)) is not None:
            return got
        channel.connection.process_data_events(0.01)
    raise AssertionError("nothing came back")


def test_a_first_delivery(channel: BlockingChannel, queue_name: str, semantics: Semantics) -> None:
    """Some versions count from 0, others say nothing of a first delivery."""
    channel.queue_declare(queue_name, durable=True, arguments=QUORUM)
    publish(channel, queue_name)
    _, headers = get_next(channel, queue_name)
    assert ("x-delivery-count" in headers) is semantics.has_zero_count
    assert headers.get("x-delivery-count", 0) == 0


@pytest.mark.parametrize("verb", ["nack", "reject"])
def test_a_return(
    channel: BlockingChannel, queue_name: str, semantics: Semantics, verb: str
) -> None:
    """What a nack and a reject with requeue do to the counts of a quorum queue."""
    channel.queue_declare(queue_name, durable=True, arguments=QUORUM)
    publish(channel, queue_name)
    for _ in range(3):
        tag, _ = get_next(channel, queue_name)
        if verb == "nack":
            channel.basic_nack(tag)
        else:
            channel.basic_reject(tag)
    _, headers = get_next(channel, queue_name)
    counts = semantics.counts_nack if verb == "nack" else semantics.counts_reject
    assert headers.get("x-delivery-count", 0) == (3 if counts else 0)
    assert ("x-acquired-count" in headers) is semantics.has_acquired_count
    assert headers.get("x-acquired-count", 3) == 3


def test_a_lost_channel(
    connection: BlockingConnection, channel: BlockingChannel, queue_name: str, semantics: Semantics
) -> None:
    """The broker charges every delivery of a channel that ends, whatever its client did with it."""
    channel.queue_declare(queue_name, durable=True, arguments=QUORUM)
    publish(channel, queue_name)
    lost = connection.channel()
    get_next(lost, queue_name)
    lost.close()
    _, headers = get_next(channel, queue_name)
    assert headers.get("x-delivery-count", 0) == int(semantics.counts_lost_channel)


def test_the_brokers_delayed_retry_takes_a_lost_channel_for_a_failure(
    connection: BlockingConnection, channel: BlockingChannel, queue_name: str, semantics: Semantics
) -> None:
    """Why `RetryPolicy` does not use it: it keeps back and counts what nobody failed at."""
    arguments = {"x-delayed-retry-type": "failed", "x-delayed-retry-min": 1000}
    channel.queue_declare(queue_name, durable=True, arguments=QUORUM | arguments)
    for has_failed in (True, False):
        publish(channel, queue_name)
        other = connection.channel()
        tag, _ = get_next(other, queue_name)
        if has_failed:
            other.basic_reject(tag)
        began = time.monotonic()
        other.close()
        tag, headers = get_next(channel, queue_name)
        waited = time.monotonic() - began
        assert waited > 0.9 or semantics is not TABLE[4, 3]
        assert headers["x-delivery-count"] == 1
        channel.basic_ack(tag)


@pytest.mark.parametrize("verb", ["nack", "reject"])
def test_the_limit_of_a_queue_without_one(
    channel: BlockingChannel, queue_name: str, semantics: Semantics, verb: str
) -> None:
    """From 4.0 on, a quorum queue that was declared without a limit has one."""
    dead = f"{queue_name}.dead"
    channel.queue_declare(dead, durable=True)
    arguments = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead}
    channel.queue_declare(queue_name, durable=True, arguments=QUORUM | arguments)
    publish(channel, queue_name)
    counts = semantics.counts_nack if verb == "nack" else semantics.counts_reject
    limit = semantics.delivery_limit if counts else None
    expected = MOST if limit is None else limit + 1
    for _ in range(expected):
        tag, _ = get_next(channel, queue_name)
        if verb == "nack":
            channel.basic_nack(tag)
        else:
            channel.basic_reject(tag)
    get_next(channel, queue_name if limit is None else dead)


def return_often(url: str, queue: str) -> None:
    """Return a message by rejects and lost channels, and look whether it comes back each time."""
    with contextlib.closing(pika.BlockingConnection(pika.URLParameters(url))) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        publish(channel, queue)
        for number in range(MOST):
            one = connection.channel()
            tag, headers = get_next(one, queue)
            assert headers.get("x-delivery-count", number) == number
            if number % 2:
                one.basic_reject(tag)
            one.close()
        get_next(channel, queue)


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["quorum", "classic"])
async def test_no_limit_of_a_queue_of_ours(
    url: str, queue_name: str, kind: Literal["quorum", "classic"]
) -> None:
    """Returned forty times, a message is still in a queue that we declared, whichever it is."""
    queue = Queue[str](queue_name, type=kind)
    async with Producer(url) as producer:
        await producer.publish(queue, "x", delay=3600)  # this declares all of them
    for name in (queue.name, queue.dead_letter_queue, UNROUTABLE):
        await in_thread(return_often, url, name)


def test_priorities_of_a_quorum_queue(
    channel: BlockingChannel, queue_name: str, semantics: Semantics
) -> None:
    """They were nothing, then a share for the higher half, and are an order at last."""
    channel.queue_declare(queue_name, durable=True, arguments=QUORUM)
    priorities = [0, 1, 2, 5, 6, 7, 20]
    for priority in priorities:
        publish(channel, queue_name, str(priority).encode(), priority=priority)
    order = [int(channel.basic_get(queue_name, auto_ack=True)[2] or b"") for _ in priorities]
    match semantics.priorities:
        case "none":
            assert order == priorities
        case "strict":
            assert order == sorted(priorities, reverse=True)
        case "shares":
            high, low = [5, 6, 7, 20], [0, 1, 2]
            assert [one for one in order if one in high] == high
            assert [one for one in order if one in low] == low
            assert order[:3] in ([5, 6, 0], [5, 0, 6], [0, 5, 6])


def test_a_dead_letter_cycle_that_a_client_publishes(
    channel: BlockingChannel, queue_name: str, semantics: Semantics
) -> None:
    """Older versions believe a client's x-death, and drop what looks like a cycle."""
    first, second, end = (f"{queue_name}.{number}" for number in range(3))
    channel.queue_declare(end, durable=True)
    for queue, to in ((first, second), (second, end)):
        arguments = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": to}
        channel.queue_declare(queue, durable=True, arguments=arguments | {"x-message-ttl": 1})
    publish(channel, second)
    _, headers = get_next(channel, end)
    assert headers["x-death"]
    assert headers["x-first-death-reason"] == "expired"
    assert ("x-last-death-reason" in headers) is semantics.has_last_death
    # With this history, the way over the second queue looks like the second round of a cycle.
    for body, properties in ((b"again", {"headers": headers}), (b"new", {})):
        publish(channel, first, body, **properties)
    bodies: list[bytes] = []
    while b"new" not in bodies:
        bodies += filter(None, [channel.basic_get(end, auto_ack=True)[2]])
        channel.connection.process_data_events(0.01)
    assert (b"again" not in bodies) is semantics.believes_x_death


@pytest.fixture(scope="module")
def impatient(portal: BlockingPortal, version: str | None) -> Iterator[RabbitMQ]:
    """A node that waits for settlements for a second only."""
    config = {"consumer_timeout": "1000"}
    with portal.wrap_async_context_manager(RabbitMQ(version=version, config=config)) as node:
        # How often a channel looks for what is late. A minute by default.
        portal.call(node.eval, "application:set_env(rabbit, channel_tick_interval, 200)")
        yield node


@pytest.mark.rabbitmq
@pytest.mark.parametrize("kind", ["quorum", "classic"])
def test_the_consumer_timeout(impatient: RabbitMQ, queue_name: str, kind: str) -> None:
    """What ends when a delivery is not settled in time."""
    semantics = semantics_of(impatient.version)
    expected = semantics.timeout_of_quorum if kind == "quorum" else semantics.timeout_of_classic
    parameters = pika.URLParameters(impatient.url)
    with contextlib.closing(pika.BlockingConnection(parameters)) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        channel.queue_declare(queue_name, durable=True, arguments={"x-queue-type": kind})
        publish(channel, queue_name)
        cancelled: list[Any] = []
        channel.add_on_cancel_callback(cancelled.append)
        channel.basic_consume(queue_name, lambda *_: None)
        for _ in range(30 if expected is None else 300):
            connection.sleep(0.1)
            if cancelled or channel.is_closed:
                break
        ended = "channel" if channel.is_closed else "consumer" if cancelled else None
        assert ended == expected


@pytest.mark.anyio
@pytest.mark.rabbitmq
@pytest.mark.parametrize("kind", ["quorum", "classic"])
async def test_a_slow_replay_outlasts_the_consumer_timeout(
    impatient: RabbitMQ,
    queue_name: str,
    kind: Literal["quorum", "classic"],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Dead letters that stay are given back in time, and looked at once more."""
    monkeypatch.setattr(dead_letters, "_HOLD_TIME", 0.3)
    queue = Queue[int](queue_name, type=kind)
    looked_at: list[int] = []

    def is_odd(one: DeadMessage[int]) -> bool:
        looked_at.append(one.body())
        return one.body() % 2 == 1

    async with DeadLetters(impatient.url, queue) as dead, Producer(impatient.url) as producer:
        there = Queue[int](queue.dead_letter_queue, declare=False)
        (await producer.publish_many(there, range(20))).raise_for_errors()
        assert await dead.replay(is_odd, rate=4) == 10
        assert sorted(one.body() for one in await dead.peek()) == list(range(0, 20, 2))
    assert Counter(looked_at)[0] > 1
    assert Counter(looked_at) >= Counter(range(20))
    assert [number for number in looked_at if number % 2] == list(range(1, 20, 2))
    handled: list[int] = []
    worker = Worker(impatient.url)

    @worker.handler(queue)
    async def handle(number: int) -> None:
        handled.append(number)

    async with worker:
        with anyio.fail_after(30):
            while len(handled) < 10:
                await anyio.sleep(0.01)
    assert sorted(handled) == list(range(1, 20, 2))


@pytest.mark.anyio
@pytest.mark.rabbitmq
async def test_a_replay_that_the_consumer_timeout_ends_says_so(
    impatient: RabbitMQ, queue_name: str
) -> None:
    """Where it is shorter than the time we hold what stays. What was not replayed is there."""
    queue = Queue[int](queue_name)
    async with DeadLetters(impatient.url, queue) as dead, Producer(impatient.url) as producer:
        there = Queue[int](queue.dead_letter_queue, declare=False)
        (await producer.publish_many(there, range(10))).raise_for_errors()
        with pytest.raises(ConnectionLostError, match="delivery acknowledgement on channel"):
            await dead.replay(lambda one: one.body() % 2 == 1, rate=0.5)
        left = sorted(one.body() for one in await dead.peek())
        assert left == [0, *range(2, 10)]  # 3 among them: its copy was published, its ack too late
        assert await dead.replay() == 9
        assert await dead.peek() == []
