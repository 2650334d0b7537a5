"""`Producer.publish_many`: any iterable, a bounded window, and a report of each message."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import weakref
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from aioworkq import (
    MemoryBroker,
    NotConfirmedError,
    Producer,
    Queue,
    StateError,
    TopologyError,
    UnroutableError,
)
from aioworkq.batch import PublishReport
from tests.consuming import Broker, eventually
from tests.publishing import is_cut_off, no_complaints

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests.proxy import Proxy

__all__ = ["no_complaints"]


@pytest.fixture
def queue(queue_name: str) -> Queue[bytes]:
    return Queue(queue_name, bytes, type="classic")


def numbers(count: int) -> Iterator[bytes]:
    return (b"%d" % number for number in range(count))


async def numbers_async(count: int) -> AsyncIterator[bytes]:
    for body in numbers(count):
        await asyncio.sleep(0)
        yield body


@pytest.mark.parametrize(
    "bodies",
    [list(numbers(1200)), numbers(1200), numbers_async(1200), tuple(numbers(1200))],
    ids=["list", "generator", "asynchronous generator", "tuple"],
)
async def test_every_iterable_is_stored_in_its_order(
    producer: Producer, broker: Broker, queue: Queue[bytes], bodies: Any
) -> None:
    """Lists, generators and asynchronous generators are stored whole and in order."""
    report = await producer.publish_many(queue, bodies)
    assert (report.confirmed, report.failed, len(report)) == (1200, 0, 1200)
    stored = [message.body for message in await broker.take_all(queue.name)]
    assert stored == list(numbers(1200))


async def test_a_report_keeps_no_bodies() -> None:
    """The errors of what could not be encoded tell of it, and do not hold it."""

    class Item(msgspec.Struct, weakref=True):
        cannot: object

    items: list[weakref.ref[Item]] = []

    def bodies() -> Iterator[Item]:
        for _ in range(5):
            item = Item(object())
            items.append(weakref.ref(item))
            yield item

    async with Producer(MemoryBroker()) as producer:
        report = await producer.publish_many(Queue("q", Item), bodies())
    gc.collect()
    assert report.failed == 5
    assert "cannot be encoded" in str(report[0])
    assert [one() for one in items] == [None] * 5


async def test_what_cannot_be_declared_again_is_told(
    url: str, broker: Broker, queue_name: str
) -> None:
    """The queue existed, is deleted meanwhile, and has arguments that cannot be sent."""
    queue = Queue(queue_name, bytes, type="classic", arguments={"x": object()})
    for name in (queue.name, queue.dead_letter_queue):
        await broker.declare(name)

    async def bodies() -> AsyncIterator[bytes]:
        for number in range(100):
            if number == 50:
                await broker.delete(queue.name)
            yield b"%d" % number

    async with Producer(url) as producer, asyncio.timeout(30):
        await producer.publish(queue, b"before")
        report = await producer.publish_many(queue, bodies())
    assert len(report) == 100
    assert report.confirmed <= 50
    assert {type(error) for error in report.errors.values()} == {TypeError}


async def test_nothing_to_publish_is_nothing(producer: Producer, queue: Queue[bytes]) -> None:
    """An empty iterable gives an empty report."""
    report = await producer.publish_many(queue, [])
    assert len(report) == 0
    report.raise_for_errors()


@pytest.mark.parametrize(
    ("bodies", "name"), [("text", "str"), (b"bytes", "bytes"), (5, "int"), (None, "NoneType")]
)
async def test_a_single_body_is_not_an_iterable_of_bodies(
    producer: Producer, queue_name: str, bodies: Any, name: str
) -> None:
    """Text and bytes, which are iterable by accident, are a TypeError."""
    with pytest.raises(TypeError) as caught:
        await producer.publish_many(queue_name, bodies)
    assert str(caught.value) == f"bodies must be an iterable of bodies, not {name}."


async def test_a_message_that_fails_does_not_stop_the_others(
    producer: Producer, broker: Broker, queue: Queue[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    """Bodies of the wrong type or size fail by themselves, each at its position."""
    bodies: list[Any] = [b"0", "1", b"2", b"x" * (16 * 1024 * 1024 + 1), b"4"]
    report = await producer.publish_many(queue, bodies)
    assert [type(error) for error in report] == [
        type(None),
        TypeError,
        type(None),
        ValueError,
        type(None),
    ]
    assert (report.confirmed, report.failed, len(report)) == (3, 2, 5)
    assert report[0] is None
    assert report[1] is report.errors[1]
    assert [message.body for message in await broker.take_all(queue.name)] == [b"0", b"2", b"4"]
    assert repr(report) == "<PublishReport: 3 confirmed, 2 failed>"
    with pytest.raises(TypeError, match="a body of this queue is bytes, not str"):
        report.raise_for_errors()
    with pytest.raises(IndexError, match="there are 5 messages, numbered from 0"):
        report[5]
    with pytest.raises(IndexError):
        report[-1]
    (warning,) = [one for one in caplog.records if one.levelno == logging.WARNING]
    assert warning.getMessage() == (
        f"2 of 5 messages to queue {queue.name!r} failed, the first (number 1): "
        "a body of this queue is bytes, not str."
    )


async def test_a_full_queue_refuses_some_and_takes_others(
    producer: Producer, broker: Broker, queue_name: str
) -> None:
    """The report says of each message whether the full queue took it."""
    queue = Queue(queue_name, bytes, type="classic", max_length=10)
    report = await producer.publish_many(queue, numbers(50))
    assert {type(error) for error in report.errors.values()} == {NotConfirmedError}
    stored = {int(message.body) for message in await broker.take_all(queue_name)}
    assert stored == set(range(50)) - set(report.errors)
    assert report.confirmed == len(stored) == 10


async def test_what_no_queue_takes_is_unroutable(producer: Producer, queue_name: str) -> None:
    """With declare=False, each message to a missing queue is an UnroutableError of its own."""
    report = await producer.publish_many(Queue(queue_name, bytes, declare=False), numbers(20))
    assert {type(error) for error in report} == {UnroutableError}
    assert len({id(error) for error in report}) == 20


async def test_options_are_for_every_message(
    producer: Producer, broker: Broker, queue: Queue[bytes]
) -> None:
    """Headers, priority, expiration and correlation id are those of all; ids are made."""
    await producer.publish_many(
        queue, numbers(3), headers={"h": 1}, priority=3, expiration=60, correlation_id="c"
    )
    properties = [one.header.properties for one in await broker.take_all(queue.name)]
    assert [one.headers for one in properties] == [{"h": 1}] * 3
    assert [one.priority for one in properties] == [3] * 3
    assert [one.expiration for one in properties] == ["60000"] * 3
    assert [one.correlation_id for one in properties] == ["c"] * 3
    assert len({one.message_id for one in properties}) == 3


async def test_a_queue_that_cannot_be_declared_fails_before_anything_is_read(
    producer: Producer, queue_name: str
) -> None:
    """A TopologyError comes at once; the iterable is not touched."""
    bodies = numbers(3)
    queue = Queue(queue_name, bytes, arguments={"x-max-priority": "high"}, type="classic")
    with pytest.raises(TopologyError, match="invalid arg 'x-max-priority'"):
        await producer.publish_many(queue, bodies)
    assert list(bodies) == [b"0", b"1", b"2"]


async def test_what_the_iterable_raises_comes_after_the_outcomes_of_what_it_gave(
    producer: Producer, broker: Broker, queue: Queue[bytes]
) -> None:
    """An exception of the iterable is raised unchanged; what came before is stored."""

    def broken() -> Iterator[bytes]:
        yield from numbers(500)
        raise LookupError("no more")

    with pytest.raises(LookupError, match="no more"):
        await producer.publish_many(queue, broken())
    assert await broker.ready(queue.name) == 500
    assert producer.statistics().pending == 0

    async def broken_async() -> AsyncIterator[bytes]:
        async for body in numbers_async(500):
            yield body
        raise TypeError("of the iterable, not of a body")

    with pytest.raises(TypeError, match="of the iterable"):
        await producer.publish_many(queue, broken_async())
    assert await broker.ready(queue.name) == 1000


async def test_no_more_than_the_window_is_under_way(
    proxy: Proxy, proxy_url: str, queue: Queue[bytes]
) -> None:
    """While no confirm comes, the iterable is read no further than the window."""
    taken = itertools.count()

    def counted() -> Iterator[bytes]:
        for body in numbers(200):
            next(taken)
            yield body

    async with Producer(proxy_url, window=20) as producer:
        await producer.publish(queue, b"first")
        proxy.stall(to_broker=False)
        task = asyncio.create_task(producer.publish_many(queue, counted()))
        await eventually(lambda: producer.statistics().in_flight == 20)
        for _ in range(100):
            await asyncio.sleep(0)
        assert producer.statistics().pending == 20
        assert next(taken) == 21  # and one more in hand, which waits for room
        proxy.flow()
        assert (await task).confirmed == 200


async def test_no_more_than_16_mebibytes_are_under_way(
    proxy: Proxy, proxy_url: str, queue: Queue[bytes]
) -> None:
    """Large bodies are not read ahead, however many messages the window has room for."""
    async with Producer(proxy_url) as producer:
        await producer.publish(queue, b"first")
        proxy.stall(to_broker=False)
        bodies = (b"x" * 2**20 for _ in range(40))
        task = asyncio.create_task(producer.publish_many(queue, bodies))
        await eventually(lambda: producer.statistics().in_flight == 16)
        for _ in range(100):
            await asyncio.sleep(0)
        assert producer.statistics().pending == 16
        proxy.flow()
        assert (await task).confirmed == 40


async def test_two_calls_at_once_share_the_window(
    producer: Producer, broker: Broker, queue: Queue[bytes]
) -> None:
    """Each reads its own iterable, and both are stored whole."""
    reports = await asyncio.gather(
        *(producer.publish_many(queue, numbers(3000)) for _ in range(3)),
    )
    assert [report.confirmed for report in reports] == [3000] * 3
    assert await broker.ready(queue.name) == 9000


async def test_a_queue_deleted_meanwhile_is_declared_again(
    producer: Producer, broker: Broker, queue: Queue[bytes]
) -> None:
    """What was returned because the queue had gone is published again; nothing is lost after it."""
    deleted_at = 0

    async def bodies() -> AsyncIterator[bytes]:
        nonlocal deleted_at
        for number, body in enumerate(numbers(2000)):
            if number in {700, 1400}:
                await eventually(lambda: producer.statistics().pending < 500)
                await broker.delete(queue.name)
                deleted_at = number
            yield body

    report = await producer.publish_many(queue, bodies())
    assert report.confirmed == 2000
    stored = {int(message.body) for message in await broker.take_all(queue.name)}
    assert stored >= set(range(deleted_at, 2000))


async def test_cancelling_waits_for_nothing_and_sends_nothing_more(
    proxy: Proxy, proxy_url: str, broker: Broker, queue: Queue[bytes]
) -> None:
    """A cancelled call returns though RabbitMQ is silent; what was not sent never will be."""
    async with Producer(proxy_url, window=50) as producer:
        await producer.publish(queue, b"first")
        proxy.cut()
        proxy.refuse()
        await eventually(lambda: is_cut_off(producer))
        task = asyncio.create_task(producer.publish_many(queue, numbers(1000)))
        await eventually(lambda: producer.statistics().pending == 50)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert producer.statistics().pending == 0
        proxy.accept()
        await producer.publish(queue, b"last")
    assert [one.body for one in await broker.take_all(queue.name)] == [b"first", b"last"]


async def test_cancelling_in_flight_leaves_each_message_stored_once_or_not(
    proxy: Proxy, proxy_url: str, broker: Broker, queue: Queue[bytes]
) -> None:
    """What was sent may be stored, never twice, and the window is free again."""
    async with Producer(proxy_url, window=50) as producer:
        await producer.publish(queue, b"first")
        proxy.stall(to_broker=False)
        task = asyncio.create_task(producer.publish_many(queue, numbers(1000)))
        await eventually(lambda: producer.statistics().in_flight == 50)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        proxy.flow()
        report = await producer.publish_many(queue, numbers(200))
        assert report.confirmed == 200
        assert producer.statistics().in_flight == 0
    assert await broker.ready(queue.name) == 1 + 50 + 200


async def test_other_tasks_run_while_every_body_is_wrong(producer: Producer) -> None:
    """An endless iterable of what cannot be published can be interrupted."""
    bodies: Any = itertools.repeat("not bytes")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await producer.publish_many(Queue("q", bytes), bodies)


async def test_closing_the_producer_ends_the_call(url: str, queue: Queue[bytes]) -> None:
    """close() lets an endless publish_many end with a StateError, once its messages are stored."""
    producer = Producer(url)
    await producer.start()
    task = asyncio.create_task(producer.publish_many(queue, itertools.repeat(b"x")))
    await eventually(lambda: producer.statistics().confirmed > 1000)
    await producer.close()
    with pytest.raises(StateError, match="cannot publish: it was closed"):
        await task
    assert producer.statistics().unknown == 0


def test_a_report_counts_what_it_holds() -> None:
    """It can be read by position and as an iterable."""
    report = PublishReport()
    report.confirmed = 2
    report.errors = {1: LookupError("b")}
    assert [type(error).__name__ for error in report] == ["NoneType", "LookupError", "NoneType"]
    with pytest.raises(LookupError, match="b"):
        report.raise_for_errors()
