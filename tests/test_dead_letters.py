"""Dead letters: looked at, replayed, purged, counted, on a real RabbitMQ."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from aioworkq import (
    ConnectionLostError,
    DeadLetterGroup,
    DeadLetters,
    DeadMessage,
    DecodeError,
    Delivery,
    Message,
    Producer,
    Queue,
    Reject,
    RetryPolicy,
    StateError,
    Worker,
)
from aioworkq.message import ATTEMPTS, COPIES, OUR_HEADERS, raw
from tests.consuming import eventually

if TYPE_CHECKING:
    from tests.consuming import Broker
    from tests.proxy import Direction, Proxy

pytestmark = pytest.mark.anyio

BASIC_PUBLISH = b"\x00\x3c\x00\x28"
BASIC_ACK = b"\x00\x3c\x00\x50"


@dataclass
class Job:
    number: int


async def die(url: str, queue: Queue[Any], bodies: list[Any]) -> None:
    """Have every message dead-lettered: odd numbers by an error, even ones by a Reject."""
    worker = Worker(url)

    @worker.handler(queue, attempts=1)
    async def handle(job: Job) -> None:
        if job.number % 2:
            raise ValueError(f"odd: {job.number}")
        raise Reject("even")

    async with Producer(url) as producer:
        sent = Queue(queue.name, type=queue.type)
        (await producer.publish_many(sent, bodies, headers={"mine": "kept"})).raise_for_errors()
    async with worker:
        with anyio.fail_after(30):
            while worker.statistics().dead_lettered < len(bodies):
                await anyio.sleep(0.01)


def jobs(count: int) -> list[Any]:
    return [{"number": number} for number in range(count)]


async def test_a_look_leaves_everything_where_it_is(url: str, queue_name: str) -> None:
    """Peeked twice, the same messages in the same order; bounded by the limit."""
    queue = Queue(queue_name, Job)
    await die(url, queue, jobs(12))
    async with DeadLetters(url, queue) as dead:
        first = await dead.peek()
        assert sorted(one.body().number for one in first) == list(range(12))
        ids = [one.message.message_id for one in first]
        again = await dead.peek()
        assert [one.message.message_id for one in again] == ids
        some = await dead.peek(limit=2)
        assert [one.message.message_id for one in some] == ids[:2]
        again = await dead.peek()
    assert sorted(one.message.message_id for one in again) == sorted(ids)


@pytest.mark.fast_path("pamqp cannot decode the property")
async def test_a_property_that_is_no_text_is_in_nobodys_way(
    url: str, queue_name: str, broker: Broker
) -> None:
    """It can be looked at, and every copy has it as it was: replayed, retried, given up."""
    queue = Queue(queue_name, bytes, type="classic")
    binary = bytes(range(0x80, 0x100))
    for name in (queue.name, queue.dead_letter_queue):
        await broker.declare(name)
    correlation_id = bytes((len(binary),)) + binary
    await broker.publish_raw(queue.dead_letter_queue, b"x", b"\x14\x00\x02" + correlation_id)
    worker, seen = Worker(url), list[str | None]()

    @worker.handler(queue, retry=RetryPolicy(attempts=2, first=0.1))
    async def handle(body: bytes, delivery: Delivery) -> None:
        seen.append(delivery.correlation_id)
        raise ValueError("never")

    async with DeadLetters(url, queue) as dead:
        with anyio.fail_after(30):
            while not await dead.peek():
                await anyio.sleep(0.01)
        assert await dead.replay() == 1
        async with worker:
            with anyio.fail_after(30):
                while worker.statistics().dead_lettered < 1:
                    await anyio.sleep(0.01)
        (given_up,) = await dead.peek()
        assert await dead.purge() == 1
    ids = [*seen, given_up.message.correlation_id]
    assert [one and raw(one) for one in ids] == [binary] * 3
    assert str(ids[0]) == "\ufffd" * len(binary)


async def test_a_dead_letter_tells_its_story(url: str, queue_name: str) -> None:
    """Queue, reason, attempts, times, exception, and the message's own headers."""
    queue = Queue(queue_name, Job)
    await die(url, queue, [{"number": 1}])
    async with DeadLetters(url, queue) as dead:
        (one,) = await dead.peek()
    assert one.queue == queue_name
    assert one.reason == "gave up after 1 attempts"
    assert one.attempts == 1
    assert one.exception_type == "ValueError"
    assert one.exception_message == "odd: 1"
    assert "odd: 1" in (one.traceback or "")
    assert one.first_failure is not None
    assert one.first_failure == one.last_failure
    assert one.message.headers["mine"] == "kept"
    assert one.body() == Job(1)


async def test_an_undecodable_body_is_shown_as_it_is(url: str, queue_name: str) -> None:
    """That may be why it is here."""
    queue = Queue(queue_name, Job)
    await die(url, queue, [b"{"])
    async with DeadLetters(url, queue) as dead:
        (one,) = await dead.peek()
    assert one.message.body == b"{"
    with pytest.raises(DecodeError):
        one.body()


async def test_counts_are_grouped_by_reason_and_exception(url: str, queue_name: str) -> None:
    """So that one cause among thousands of letters is seen."""
    queue = Queue(queue_name, Job)
    await die(url, queue, jobs(5))
    async with DeadLetters(url, queue) as dead:
        assert await dead.counts() == {
            DeadLetterGroup("even", None): 3,
            DeadLetterGroup("gave up after 1 attempts", "ValueError"): 2,
        }
        assert sum((await dead.counts(limit=2)).values()) == 2


async def test_replayed_messages_are_as_new(url: str, queue_name: str) -> None:
    """Only those chosen, with their attempts reset and our headers gone."""
    queue = Queue(queue_name, Job)
    await die(url, queue, jobs(4))
    async with DeadLetters(url, queue) as dead:

        def is_odd(one: DeadMessage[Job]) -> bool:
            return one.body().number % 2 == 1

        assert await dead.replay(is_odd, rate=1000) == 2
        assert sorted(one.body().number for one in await dead.peek()) == [0, 2]
    seen: list[tuple[int, int, Message]] = []
    worker = Worker(url)

    @worker.handler(queue)
    async def handle(job: Job, delivery: Delivery) -> None:
        seen.append((job.number, delivery.attempt, delivery.message))

    async with worker:
        with anyio.fail_after(30):
            while len(seen) < 2:
                await anyio.sleep(0.01)
    assert sorted((number, attempt) for number, attempt, _ in seen) == [(1, 1), (3, 1)]
    assert all(OUR_HEADERS & set(message.headers) == {COPIES} for _, _, message in seen)
    assert all(message.headers["mine"] == "kept" for _, _, message in seen)


async def test_a_replay_that_is_interrupted_can_be_run_again(url: str, queue_name: str) -> None:
    """What was replayed is gone from the dead letters, the rest is still there."""
    queue = Queue(queue_name, Job)
    await die(url, queue, jobs(6))
    chosen: list[int] = []

    def until_the_third(one: DeadMessage[Job]) -> bool:
        if len(chosen) == 3:
            raise RuntimeError("interrupted")
        chosen.append(one.body().number)
        return True

    async with DeadLetters(url, queue) as dead:
        with pytest.raises(RuntimeError, match="interrupted"):
            await dead.replay(until_the_third)
        left = {one.body().number for one in await dead.peek()}
        assert left == set(range(6)) - set(chosen)
        assert await dead.replay() == 3
        assert await dead.peek() == []


async def test_a_rate_bounds_a_replay(
    url: str, queue_name: str, proxy: Proxy, proxy_url: str
) -> None:
    """No copy is sent before its turn, of which there are as many in a second as `rate` says."""
    queue, rate, sent = Queue(queue_name, Job), 10, list[float]()
    await die(url, queue, jobs(8))

    def on_frame(direction: Direction, kind: int, channel: int, payload: bytes) -> bool:
        if (direction, payload[:4]) == ("to_broker", BASIC_PUBLISH):
            sent.append(time.monotonic())
        return True

    async with DeadLetters(proxy_url, queue) as dead:
        proxy.on_frame = on_frame
        began = time.monotonic()
        assert await dead.replay(rate=rate) == 8
    assert len(sent) == 8
    assert all(at >= began + turn / rate for turn, at in enumerate(sent))


async def test_a_replay_that_is_cut_off_before_an_ack(
    url: str, queue_name: str, proxy: Proxy, proxy_url: str
) -> None:
    """Between a copy's confirm and the dead letter's ack: nothing is lost, and this one is two."""
    queue = Queue(queue_name, Job)
    await die(url, queue, jobs(6))
    seen = list[str]()

    def on_frame(direction: Direction, kind: int, channel: int, payload: bytes) -> bool:
        if payload[:4] == BASIC_PUBLISH and direction == "to_broker":
            seen.append("copy")
        elif payload[:4] == BASIC_ACK:
            seen.append("ack" if direction == "to_broker" else "confirm")
        if seen.count("ack") < 3:
            return True
        proxy.on_frame = None
        proxy.cut()
        return False

    async with DeadLetters(proxy_url, queue) as dead:
        proxy.on_frame = on_frame
        with pytest.raises(ConnectionLostError):
            await dead.replay()
    assert seen == ["copy", "confirm", "ack"] * 3
    async with DeadLetters(url, queue) as dead:
        left = [one.body().number for one in await dead.peek()]
        assert len(left) == 4
        assert await dead.replay() == 4
        assert await dead.peek() == []
    handled: Counter[int] = Counter()
    worker = Worker(url)

    @worker.handler(queue)
    async def handle(job: Job) -> None:
        handled[job.number] += 1

    async with worker:
        await eventually(lambda: worker.statistics().handled == 7)
    assert sorted(handled) == list(range(6))
    assert sum(handled.values()) == 7
    ((twice, _),) = handled.most_common(1)
    assert twice in left


async def test_a_purge_drops_what_is_chosen(url: str, queue_name: str) -> None:
    """And nothing else."""
    queue = Queue(queue_name, Job)
    await die(url, queue, jobs(5))
    async with DeadLetters(url, queue) as dead:
        assert await dead.purge(lambda one: one.reason == "even") == 3
        assert [one.body().number for one in await dead.peek()] == [1, 3]
        assert await dead.purge() == 2
        assert await dead.peek() == []


async def test_an_expired_message_is_a_dead_letter_too(url: str, queue_name: str) -> None:
    """RabbitMQ itself moves it there, and says why."""
    queue = Queue(queue_name, Job)
    async with Producer(url) as producer:
        await producer.publish(queue, Job(1), expiration=0.01)
    async with DeadLetters(url, queue) as dead:
        with anyio.fail_after(30):
            while not (found := await dead.peek()):
                await anyio.sleep(0.05)
    assert found[0].reason == "expired"
    assert ATTEMPTS not in found[0].message.headers
    assert found[0].attempts == 0


async def test_misuse_is_told(url: str, queue_name: str) -> None:
    """Numbers out of range, no connection, no broker."""
    with pytest.raises(ValueError, match="timeout is 0"):
        DeadLetters(url, "q", timeout=0)
    with pytest.raises(StateError, match="there is no connection"):
        await DeadLetters(url, "q").peek()
    nobody: DeadLetters[Any] = DeadLetters("amqp://127.0.0.1:1/", "q", timeout=0.5)
    with pytest.raises(ConnectionLostError, match="connecting to RabbitMQ"):
        await nobody.__aenter__()
    async with DeadLetters(url, Queue(queue_name, Job)) as dead:
        with pytest.raises(ValueError, match="limit is 0"):
            await dead.peek(limit=0)
        with pytest.raises(ValueError, match="rate is 0"):
            await dead.replay(rate=0)


async def test_a_look_that_is_cancelled_leaves_no_channel(url: str, queue_name: str) -> None:
    """Whenever that happens."""
    moments = random.Random(7)
    async with DeadLetters(url, Queue(queue_name, Job)) as dead:
        connection: Any = dead._connection
        for _ in range(300):
            look = asyncio.create_task(dead.peek())
            until = time.perf_counter() + moments.uniform(0, 0.004)
            while time.perf_counter() < until:
                await asyncio.sleep(0)
            look.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await look
        with anyio.fail_after(30):
            while connection._current.channels:
                await anyio.sleep(0.01)
        assert await dead.peek() == []


async def test_looking_often_drops_nothing_from_a_queue_that_is_not_ours(
    broker: Broker, url: str, queue_name: str
) -> None:
    """RabbitMQ 4 drops what came back 20 times to a quorum queue declared without a limit."""
    queue = Queue[int](queue_name)
    await broker.declare(queue.dead_letter_queue, **{"x-queue-type": "quorum"})
    there = Queue[int](queue.dead_letter_queue, declare=False)
    async with DeadLetters(url, queue) as dead, Producer(url) as producer:
        (await producer.publish_many(there, range(3), headers={"h": 1})).raise_for_errors()
        for _ in range(30):
            assert {one.body() for one in await dead.peek()} == {0, 1, 2}
        letters = await dead.peek()
    assert all(one.reason == "unknown" and one.message.headers["h"] == 1 for one in letters)
