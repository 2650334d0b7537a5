"""Which acks, rejects and nacks go out for what was settled in one step of the event loop."""

from __future__ import annotations

import asyncio
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from aioworkq import Message, Queue, Worker
from aioworkq.amqp.subscription import AmqpSubscription
from aioworkq.amqp.wire import ack_frame
from aioworkq.broker import Incoming
from tests.consuming import Broker, eventually, publish_all
from tests.unwired import Unwired

if TYPE_CHECKING:
    from aioworkq import Producer
    from aioworkq.amqp.subscription import Settle
    from tests.proxy import Direction, Proxy

LONG = 3600.0
"""Seconds: who waits for so long for others of its batch waits for ever."""

BASIC_ACK = b"\x00\x3c\x00\x50"

ACK, REJECT, NACK = "ack", "reject", "nack"


class Step(NamedTuple):
    """What happens in one step of the event loop, and what is to be sent after it."""

    acked: list[int]
    sent: list[tuple[str, int, bool]]
    requeued: dict[int, bool] = {}  # noqa: RUF012 - whether it counts, by delivery tag; never changed


SIX = range(1, 7)

STEPS = {
    "nothing": [Step([], [])],
    "all": [Step([*SIX], [(ACK, 6, True)])],
    "all, in another order": [Step([4, 6, 1, 3, 5, 2], [(ACK, 6, True)])],
    "the first ones": [Step([1, 2, 3], [(ACK, 3, True)])],
    "the first one": [Step([1], [(ACK, 1, False)])],
    "one in the middle": [Step([3], [(ACK, 3, False)])],
    "some above a gap": [Step([6, 3, 5], [(ACK, 3, False), (ACK, 5, False), (ACK, 6, False)])],
    "first ones and some above a gap": [
        Step([1, 2, 4, 6], [(ACK, 2, True), (ACK, 4, False), (ACK, 6, False)])
    ],
    "one, and one above a gap": [Step([1, 3], [(ACK, 1, False), (ACK, 3, False)])],
    "a gap that closes": [
        Step([2, 3], [(ACK, 2, False), (ACK, 3, False)]),
        Step([1], [(ACK, 1, False)]),
        Step([4, 5], [(ACK, 5, True)]),
    ],
    "a gap that closes with more": [
        Step([2, 3], [(ACK, 2, False), (ACK, 3, False)]),
        Step([1, 4], [(ACK, 4, True)]),
    ],
    # A multiple ack over what was given back would take it out of the queue: so that goes first.
    "one given back among the first": [
        Step([1, 2, 4, 5], [(NACK, 3, False), (ACK, 5, True)], {3: False})
    ],
    "one counted among the first": [
        Step([1, 2, 4, 5], [(REJECT, 3, False), (ACK, 5, True)], {3: True})
    ],
    "the first one given back": [Step([2, 3], [(NACK, 1, False), (ACK, 3, True)], {1: False})],
    "the last one given back": [
        Step([1, 2, 3, 4, 5], [(REJECT, 6, False), (ACK, 5, True)], {6: True})
    ],
    "one given back beside one": [Step([2], [(NACK, 1, False), (ACK, 2, False)], {1: False})],
    "one given back above a gap": [
        Step([1, 2, 4], [(NACK, 5, False), (ACK, 2, True), (ACK, 4, False)], {5: False})
    ],
    "all given back, in the order in which they were": [
        Step(
            [],
            [(NACK, 2, False), (REJECT, 1, False), (NACK, 3, False)],
            {2: False, 1: True, 3: False},
        )
    ],
    "one given back, and what was before it later": [
        Step([], [(REJECT, 2, False)], {2: True}),
        Step([1, 3], [(ACK, 3, True)]),
    ],
}


def subscribed(wire: Unwired, deliveries: int) -> AmqpSubscription:
    """Return a subscription that has got so many deliveries, with tags from 1."""
    subscription = AmqpSubscription(
        wire.channel, "q", link=wire.link, charges_returns=False, on_delivery=lambda *_: None
    )
    for tag in range(1, deliveries + 1):
        subscription.deliver(Incoming(Message(b"", "q"), tag, redelivered=False))
    return subscription


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
async def test_what_is_sent_for_what_was_settled(steps: list[Step]) -> None:
    """One multiple ack up to the first gap, single ones above it, what is given back first."""
    subscription = subscribed(Unwired(), len(SIX))
    for step in steps:
        assert all(subscription.ack(tag) for tag in step.acked)
        for tag, counts in step.requeued.items():
            assert subscription.requeue(tag, counts=counts)
        assert subscription.take_settled() == step.sent
        assert subscription.take_settled() == [], "told once"
    settled = {tag for step in steps for tag in (*step.acked, *step.requeued)}
    assert list(subscription._outstanding) == [tag for tag in SIX if tag not in settled]


async def test_what_a_cancel_holds_back_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """While deliveries land, nothing is told to the broker: nobody may take that for done."""
    wire, landed = Unwired(), asyncio.Event()

    async def look_for(*_: object, **__: object) -> int:
        await landed.wait()
        return 0

    async def answered(*_: object, **__: object) -> None: ...

    monkeypatch.setattr("aioworkq.amqp.subscription.look_for", look_for)
    monkeypatch.setattr("aioworkq.amqp.subscription.guarded", answered)
    monkeypatch.setattr("aioworkq.amqp.subscription.close_bounded", answered)
    wire.channel.basic_cancel = lambda _: None
    subscription = AmqpSubscription(
        wire.channel, "q", link=wire.link, charges_returns=True, on_delivery=lambda *_: None
    )
    subscription._consumer_tag = "tag"
    subscription.deliver(Incoming(Message(b"", "q"), 1, redelivered=False))
    cancel = asyncio.create_task(subscription.cancel(timeout=20))
    await asyncio.sleep(0)
    assert subscription.ack(1)
    others = [
        asyncio.create_task(work)
        for work in (
            subscription.wait_sent(),
            subscription.cancel(timeout=20),
            subscription.aclose(timeout=20),
        )
    ]
    for _ in range(20):
        await asyncio.sleep(0)
    assert not any(task.done() for task in (cancel, *others))
    assert wire.written == []
    landed.set()
    await asyncio.gather(cancel, *others)
    assert wire.written == [ack_frame(7, 1, multiple=False)], subscription.reason


async def test_what_is_settled_is_settled_once() -> None:
    """Whatever is said of it afterwards, before it is sent and after."""
    subscription = subscribed(Unwired(), 3)
    assert subscription.ack(1)
    assert subscription.requeue(2, counts=True)

    def again() -> list[bool]:
        return [
            *(subscription.ack(tag) for tag in (1, 2)),
            *(subscription.requeue(tag, counts=False) for tag in (1, 2)),
        ]

    assert again() == [False] * 4
    sent: list[Settle] = [("reject", 2, False), ("ack", 1, False)]
    assert subscription.take_settled() == sent
    assert again() == [False] * 4
    assert subscription.take_settled() == []


async def test_one_write_for_all_that_was_settled_in_a_step() -> None:
    """Requeues and acks of one step of the event loop leave together."""
    wire = Unwired()
    subscription = subscribed(wire, 100)
    for tag in range(1, 101):
        if tag == 50:
            subscription.requeue(tag, counts=False)
        else:
            subscription.ack(tag)
    assert wire.written == []
    await asyncio.sleep(0)
    assert len(wire.written) == 1
    assert wire.written[0].count(BASIC_ACK) == 1


class Acks:
    """The acks that a proxy lets through, as tag and whether it is for all up to it."""

    def __init__(self, proxy: Proxy) -> None:
        self.seen: list[tuple[int, bool]] = []
        proxy.on_frame = self

    def __call__(self, direction: Direction, kind: int, channel: int, payload: bytes) -> bool:
        if direction == "to_broker" and payload.startswith(BASIC_ACK):
            tag, multiple = struct.unpack("!QB", payload[len(BASIC_ACK) :])
            self.seen.append((tag, bool(multiple)))
        return True


async def test_a_batch_is_one_ack(
    broker: Broker, producer: Producer, proxy: Proxy, proxy_url: str, queue_name: str
) -> None:
    """On the way to RabbitMQ there is one ack for a hundred messages, if not for two batches."""
    queue = Queue(queue_name, int)
    worker = Worker(proxy_url)
    acks = Acks(proxy)

    @worker.batch_handler(queue, max_size=100, max_wait=LONG)
    async def handle(numbers: list[int]) -> None:
        """Succeed."""

    async with worker:
        await publish_all(producer, queue, range(300))
        await eventually(lambda: worker.statistics().handled == 300)
    assert acks.seen[-1] == (300, True)
    assert len(acks.seen) <= 3
    assert await broker.ready(queue_name) == 0


async def test_a_slow_message_does_not_hold_the_acks_of_others(
    producer: Producer, proxy: Proxy, proxy_url: str, queue_name: str
) -> None:
    """Five times the prefetch passes by the first message, each acked by itself."""
    queue = Queue(queue_name, int)
    worker = Worker(proxy_url)
    acks = Acks(proxy)
    release = asyncio.Event()

    @worker.handler(queue, concurrency=10, prefetch_count=10)
    async def handle(number: int) -> Any:
        if number == 0:
            await release.wait()

    async with worker:
        await publish_all(producer, queue, range(50))
        await eventually(lambda: worker.statistics().handled == 49)
        await eventually(lambda: len(acks.seen) == 49)
        assert sorted(acks.seen) == [(tag, False) for tag in range(2, 51)]
        release.set()
        await eventually(lambda: len(acks.seen) == 50)
    assert acks.seen[-1] == (1, False)
