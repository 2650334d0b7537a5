"""`Outbox`: the window, deadlines, and what is remembered while nobody answers."""

from __future__ import annotations

import asyncio
import copy
import itertools
from typing import TYPE_CHECKING, Any

import pytest

from aioworkq.amqp import AmqpConnection
from aioworkq.amqp.wire import encode
from aioworkq.errors import (
    AccessRefusedError,
    ConnectionLostError,
    NotConfirmedError,
    OutcomeUnknownError,
    WorkQueueError,
)
from aioworkq.message import Message
from aioworkq.outbox import Outbox, Publication
from aioworkq.topology import QueueDeclaration
from tests.consuming import Broker, eventually
from tests.publishing import no_complaints

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.proxy import Proxy

__all__ = ["no_complaints"]


def connect(url: str) -> AmqpConnection:
    return AmqpConnection(
        url,
        name="test",
        heartbeat=10,
        connect_timeout=10,
        ssl_context=None,
        max_message_size=2**24,
    )


class Numbered(Publication, eq=False, kw_only=True):
    """A publication whose outcome is noted under its number, once."""

    number: int
    errors: dict[int, WorkQueueError | None]

    def done(self, error: WorkQueueError | None) -> None:
        assert self.number not in self.errors
        self.errors[self.number] = error


class Line:
    """An outbox, the queue that it publishes to, and numbered messages."""

    def __init__(self, url: str, queue: str, **options: Any) -> None:
        self.connection = connect(url)
        self.outbox = Outbox(self.connection, **{"window": 10, "window_bytes": 1000} | options)
        self.queue = queue
        self.errors: dict[int, WorkQueueError | None] = {}
        self._numbers = itertools.count()

    def beside(self, queue: str) -> Line:
        """Return another queue's messages through the same outbox."""
        other = copy.copy(self)
        other.queue, other.errors, other._numbers = queue, {}, itertools.count()
        return other

    async def start(self) -> None:
        await self.outbox.wait_connected(timeout=20)
        await self.connection.declare([QueueDeclaration(self.queue, {})], timeout=20)
        await eventually(lambda: self.outbox._channel is not None)

    def submit(self, *, timeout: float = 20.0, size: int = 1, header: int = 0) -> Publication:
        number = next(self._numbers)
        message = Message(b"x" * size, self.queue, message_id=f"{self.queue}: {number}")
        message.headers["h"] = "x" * header
        wire = encode(message, frame_max=2**20, max_message_size=2**24)
        deadline = asyncio.get_running_loop().time() + timeout
        numbered = Numbered(
            self.outbox, message, wire, deadline, size, number=number, errors=self.errors
        )
        self.outbox.submit(numbered)
        return numbered

    async def publish(self, **options: Any) -> None:
        message = Message(b"x", self.queue)
        wire = self.connection.prepare(message)
        deadline = asyncio.get_running_loop().time() + 20
        await self.outbox.publish(message, wire, deadline=deadline)


@pytest.fixture
async def line(proxy_url: str, queue_name: str) -> AsyncIterator[Line]:
    line = Line(proxy_url, queue_name)
    await line.start()
    yield line
    await line.outbox.aclose(timeout=5)


async def test_the_window_bounds_what_is_sent(line: Line, proxy: Proxy) -> None:
    """Ten are sent; the others wait, and follow as confirms come."""
    proxy.stall(to_broker=False)
    for _ in range(25):
        line.submit()
    assert (line.outbox.pending, line.outbox.in_flight) == (25, 10)
    proxy.flow()
    assert await line.outbox.flush(timeout=20)
    assert list(line.errors.values()) == [None] * 25
    assert (line.outbox.pending, line.outbox.in_flight) == (0, 0)


async def test_the_bytes_of_the_window_are_bounded(line: Line, proxy: Proxy) -> None:
    """So are the bytes of the bodies; a message larger than all of them goes alone."""
    proxy.stall(to_broker=False)
    for size in (400, 400, 400, 5000, 1):
        line.submit(size=size)
    assert line.outbox.in_flight == 2
    proxy.flow()
    assert await line.outbox.flush(timeout=20)
    assert list(line.errors) == [0, 1, 2, 3, 4]
    assert set(line.errors.values()) == {None}


async def test_hundreds_that_cannot_be_sent_harm_nobody(line: Line, proxy: Proxy) -> None:
    """They were encoded for larger frames. Each is refused, and what waits behind them is sent."""
    proxy.stall(to_broker=False)
    for _ in range(10):
        line.submit()
    for _ in range(400):
        line.submit(header=140_000)
    line.submit()
    proxy.flow()
    assert await line.outbox.flush(timeout=20)
    errors = [line.errors[number] for number in range(411)]
    assert [errors[number] for number in (*range(10), 410)] == [None] * 11
    assert {type(error) for error in errors[10:410]} == {NotConfirmedError}
    assert "one header frame" in str(errors[10])
    assert line.outbox.in_flight == 0


async def test_what_is_taken_back_before_it_is_sent_never_is(
    line: Line, proxy: Proxy, url: str
) -> None:
    """Its place in the queue is empty at once, and its `done` stays silent."""
    proxy.stall(to_broker=False)
    taken_back = [line.submit() for _ in range(25)]
    for publication in taken_back:
        line.outbox.take_back(publication)
        line.outbox.take_back(publication)
    assert (line.outbox.pending, line.outbox.in_flight) == (0, 10)
    assert not line.outbox._waiting
    proxy.flow()
    line.submit()
    assert await line.outbox.flush(timeout=20)
    assert line.errors == {25: None}
    assert (line.outbox.in_flight, line.outbox._abandoned, line.outbox._sent_bytes) == (0, 0, 0)
    async with Broker(url) as broker:
        assert await broker.ready(line.queue) == 11


async def test_what_is_behind_the_given_up_is_sent(line: Line, proxy: Proxy) -> None:
    """There is no room for the one in front: once that is cancelled, or late, there may be some."""
    proxy.stall(to_broker=False)
    line.submit(size=400)
    for give_up in (line.outbox.take_back, lambda _: None):
        large = line.submit(size=900, timeout=0.2)
        line.submit(size=1)
        in_flight = line.outbox.in_flight
        give_up(large)
        await eventually(lambda sent=in_flight: line.outbox.in_flight == sent + 1)
    proxy.flow()
    assert await line.outbox.flush(timeout=20)
    assert [line.errors.get(number) for number in (0, 2, 4)] == [None] * 3


async def test_an_outage_does_not_fill_the_memory(line: Line, proxy: Proxy) -> None:
    """What was cancelled or came to its deadline is forgotten, before any connection returns."""
    proxy.refuse()
    proxy.cut()
    await eventually(lambda: line.outbox._channel is None)
    for _ in range(100):
        line.submit(timeout=0.01)
        line.outbox.take_back(line.submit())
    await eventually(lambda: line.outbox.pending == 0)
    assert not line.outbox._waiting
    assert len(line.errors) == 100
    assert {type(error) for error in line.errors.values()} == {ConnectionLostError}


async def test_looking_for_deadlines_does_not_take_all_the_time(
    line: Line, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thousands of messages that become overdue one by one are found in few searches."""
    searches = itertools.count()
    expire = line.outbox._expire

    def counted() -> None:
        next(searches)
        expire()

    monkeypatch.setattr(line.outbox, "_expire", counted)
    proxy.refuse()
    proxy.cut()
    await eventually(lambda: line.outbox._channel is None)
    for number in range(5000):
        line.submit(timeout=0.2 + number / 10_000)
    await eventually(lambda: line.outbox.pending == 0)
    assert len(line.errors) == 5000
    assert next(searches) < 1000


async def test_the_window_is_whole_again_after_a_lost_channel(line: Line, proxy: Proxy) -> None:
    """Numbers in flight start from nothing on a new channel, whoever was cancelled meanwhile."""
    for _ in range(5):
        proxy.stall(to_broker=False)
        publications = [line.submit() for _ in range(25)]
        for publication in publications[::3]:
            line.outbox.take_back(publication)
        proxy.cut()
        proxy.flow()
        assert await line.outbox.flush(timeout=20)
        assert (line.outbox.in_flight, line.outbox._sent_bytes) == (0, 0)
        assert (line.outbox._abandoned, line.outbox._abandoned_bytes) == (0, 0)
    assert set(line.errors.values()) == {None}
    assert len(line.errors) == 80
    assert line.outbox.resent > 0


async def test_cancelled_publications_free_their_slots(line: Line) -> None:
    """Tasks cancelled at any step leave the window as wide as it was."""
    for steps in range(30):
        tasks = [asyncio.create_task(line.publish()) for _ in range(15)]
        for _ in range(steps):
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    await eventually(lambda: line.outbox.in_flight == 0)
    assert (line.outbox.pending, line.outbox._abandoned, line.outbox._sent_bytes) == (0, 0, 0)
    assert not line.outbox._waiting
    await line.publish()


@pytest.fixture
async def full_queue(
    line: Line, url: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Broker]:
    """A look at the queue of `line`, which has room for one message and has it.

    Whatever version this is, it is taken for one whose queues may refuse for good.
    """
    monkeypatch.setattr(AmqpConnection, "keeps_refusing", property(lambda _: True))
    full = {"x-max-length": 1, "x-overflow": "reject-publish"}
    async with Broker(url) as broker:
        await broker.delete(line.queue)
        await broker.declare(line.queue, **full)
        await broker.publish(line.queue, b"x")
        yield broker


async def test_a_channel_on_which_a_queue_refuses_all_is_replaced(
    line: Line, full_queue: Broker
) -> None:
    """The refusal is told at once, and the next channel may find the queue in another mood."""
    channel = line.outbox._channel
    with pytest.raises(NotConfirmedError):
        await line.publish()
    await eventually(lambda: line.outbox._channel not in {None, channel})
    await full_queue.take_all(line.queue)
    await line.publish()
    channel = line.outbox._channel
    with pytest.raises(NotConfirmedError):
        await line.publish()
    assert line.outbox._retirement is None
    assert line.outbox._channel is channel, "here the queue took one: its word counts"


async def test_replacing_a_channel_sends_nothing_twice(
    line: Line,
    full_queue: Broker,
    proxy: Proxy,
    queue_name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is under way when a channel is replaced is answered on it."""
    monkeypatch.setattr("aioworkq.outbox._DRAIN_TIMEOUT", 20.0)
    other = line.beside(f"{queue_name}.other")
    await full_queue.declare(other.queue)
    channel = line.outbox._channel
    proxy.delay(0.02)
    line.submit()
    published = 0
    while line.outbox._channel in {None, channel}:
        await other.publish()
        published += 1
    assert isinstance(line.errors[0], NotConfirmedError)
    assert line.outbox.resent == 0
    assert await full_queue.ready(other.queue) == published


async def test_a_channel_that_never_answers_is_replaced_all_the_same(
    line: Line, full_queue: Broker, proxy: Proxy, queue_name: str
) -> None:
    """What has no answer soon is sent again on the next channel."""
    other = line.beside(f"{queue_name}.other")
    await full_queue.declare(other.queue)
    channel = line.outbox._channel

    def drop_acks(direction: str, kind: int, _: int, payload: bytes) -> bool:
        is_ack = direction == "to_client" and kind == 1 and payload.startswith(b"\x00\x3c\x00\x50")
        return not is_ack or (line.outbox._channel is not None and line.outbox._channel != channel)

    proxy.on_frame = drop_acks
    # In this order: a negative confirm behind a lost ack may cover what that was for.
    line.submit()
    other.submit()
    await eventually(lambda: 0 in other.errors)
    assert other.errors == {0: None}
    assert line.outbox.resent == 1


async def test_a_refusal_after_a_reconnect_is_not_the_last_word(
    line: Line, full_queue: Broker, proxy: Proxy
) -> None:
    """Just after a node may have failed, a message that was refused is sent until it is taken."""
    channel = line.outbox._channel
    proxy.cut()
    await eventually(lambda: line.outbox._channel not in {None, channel})
    line.outbox._refused_pause = 3  # at the deadline nothing is under way
    line.submit()
    line.submit(timeout=1.5)
    await eventually(lambda: 1 in line.errors)
    assert isinstance(line.errors[1], NotConfirmedError)
    assert 0 not in line.errors
    await full_queue.take_all(line.queue)
    await eventually(lambda: 0 in line.errors)
    assert line.errors[0] is None
    assert line.outbox.resent == 0


async def test_a_refused_connection_gives_everybody_an_error_of_his_own(
    url: str, queue_name: str
) -> None:
    """Errors are not shared: their tracebacks would grow with every raise."""
    line = Line(url.replace("guest:guest", "guest:wrong"), queue_name)
    first, second = line.submit(), line.submit()
    await eventually(lambda: len(line.errors) == 2)
    line.submit()
    assert first.is_resolved
    assert second.is_resolved
    errors = list(line.errors.values())
    assert [type(error) for error in errors] == [AccessRefusedError] * 3
    assert len({id(error) for error in errors}) == 3
    with pytest.raises(AccessRefusedError) as one:
        await line.connection.wait_connected()
    with pytest.raises(AccessRefusedError) as another:
        await line.connection.wait_connected()
    assert one.value is not another.value
    await line.outbox.aclose(timeout=5)


async def test_a_refused_connection_is_not_tried_again(
    proxy: Proxy, proxy_url: str, queue_name: str
) -> None:
    """Repeated wrong passwords could lock the user out: one attempt has to do."""
    line = Line(proxy_url.replace("guest:guest", "guest:wrong"), queue_name)
    line.submit()
    await eventually(lambda: line.errors)
    robust = line.connection._robust
    assert robust is not None
    await eventually(lambda: robust.is_closed)
    assert proxy.total_connections == 1
    await line.outbox.aclose(timeout=5)


async def test_closing_tells_everybody_what_is_known(line: Line, proxy: Proxy) -> None:
    """What was sent has an unknown outcome, what was not sent is not stored; both say why."""
    proxy.stall(to_broker=False)
    for _ in range(12):
        line.submit()
    assert not await line.outbox.flush(timeout=0.01)
    await line.outbox.aclose(timeout=1)
    line.submit()
    kinds = [type(error) for error in line.errors.values()]
    assert kinds == [OutcomeUnknownError] * 10 + [ConnectionLostError] * 3
    assert {getattr(error, "reason", "") for error in line.errors.values()} == {
        "the producer was closed"
    }


async def test_closing_that_is_cancelled_goes_on_by_itself(line: Line, proxy: Proxy) -> None:
    """A second call waits for the same end; nothing stays open."""
    proxy.half_open()  # the handshake of closing is never answered
    closing = asyncio.create_task(line.outbox.aclose(timeout=0.5))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    await line.outbox.aclose(timeout=0.5)
    assert not line.connection.is_connected
    await proxy.wait_connections(0)
