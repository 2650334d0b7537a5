"""The broker is killed between the retry copy of a message and the ack of its original.

A proxy sees the frames. At the frame that publishes a retry copy, confirms it, or acks its
original, the broker is killed: at that very moment, or a few milliseconds later; the frame itself
still gets through, or is held back for ever. Afterwards every message must have been handled or
dead-lettered, and no delivery may count more attempts than there are. Duplicates are allowed,
counted and printed, and so is how many messages were between confirm and ack at the kill.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import signal
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Final

import pytest
from pamqp.commands import Basic
from pamqp.header import ContentHeader

from aioworkq import Delivery, Producer, Queue, Reject, RetryPolicy, Worker
from tests.consuming import Broker, eventually
from tests.nodes import write_down
from tests.proxy import Proxy

if TYPE_CHECKING:
    from aioworkq.testing import RabbitMQ
    from tests.proxy import Direction

ATTEMPTS: Final = 3
EACH: Final = 30
"""Messages of each queue and round."""
PATIENCE: Final = 60.0

METHOD, HEADER = 1, 2
BASIC_CONSUME: Final = b"\x00\x3c\x00\x14"
BASIC_PUBLISH: Final = b"\x00\x3c\x00\x28"
BASIC_DELIVER: Final = b"\x00\x3c\x00\x3c"
BASIC_ACK: Final = b"\x00\x3c\x00\x50"
CONFIRM_SELECT: Final = b"\x00\x55\x00\x0a"

PUBLISH, CONFIRM, ACK = MOMENTS = (
    "publish of the copy",
    "confirm of the copy",
    "ack of the original",
)


class Copies:
    """Follows retry copies and their originals through the frames of a worker's connections.

    Copies to other queues than those of delays (dead letters, new counts) are left out.

    Attributes:
        in_window: The ids of messages of which a retry copy is confirmed, and the original not yet
            acked.
        too_early: Those whose original was acked before the copy was confirmed. While it lives, the
            worker makes up for that; nobody would if it died too.
    """

    def __init__(self) -> None:
        self._delivered: defaultdict[int, dict[int, str]] = defaultdict(dict)
        self._published: defaultdict[int, dict[int, str]] = defaultdict(dict)
        self._numbers: Counter[int] = Counter()
        self._heads: dict[tuple[Direction, int], tuple[dict[int, str], int]] = {}
        self._acked = set[str]()
        self.in_window = set[str]()
        self.too_early = set[str]()

    def begin(self) -> None:
        """Forget what a kill has left behind."""
        for messages in (self._acked, self.in_window, self.too_early):
            messages.clear()

    def __call__(self, direction: Direction, kind: int, channel: int, payload: bytes) -> bool:
        """Let a frame through."""
        self.note(direction, kind, channel, payload)
        return True

    def moment(self, direction: Direction, kind: int, channel: int, payload: bytes) -> str | None:
        """Say which moment of a retry copy a frame is that is not noted yet."""
        if kind != METHOD:
            return None
        if direction == "to_broker" and payload[:4] == BASIC_PUBLISH:
            return PUBLISH if is_to_delay_queue(payload) else None
        if payload[:4] != BASIC_ACK:
            return None
        if direction == "to_client":
            return CONFIRM if covered(self._published[channel], payload) else None
        originals = covered(self._delivered[channel], payload)
        return ACK if not self.in_window.isdisjoint(originals.values()) else None

    def note(self, direction: Direction, kind: int, channel: int, payload: bytes) -> None:
        """Take note of a frame that has come from the broker, or gets to it."""
        if kind == HEADER and (direction, channel) in self._heads:
            messages, number = self._heads.pop((direction, channel))
            header = ContentHeader()
            header.unmarshal(payload)
            messages[number] = header.properties.message_id or ""
            if direction == "to_client":
                self._acked.discard(messages[number])
        if kind != METHOD:
            return
        delivered, published = self._delivered[channel], self._published[channel]
        match direction, payload[:4]:
            case "to_broker", method if method == BASIC_CONSUME:  # another channel, from 1 on
                delivered.clear()
            case "to_broker", method if method == CONFIRM_SELECT:
                published.clear()
                self._numbers[channel] = 0
            case "to_client", method if method == BASIC_DELIVER:
                deliver = Basic.Deliver()
                deliver.unmarshal(payload[4:])
                self._heads[direction, channel] = delivered, deliver.delivery_tag or 0
            case "to_broker", method if method == BASIC_PUBLISH:
                self._numbers[channel] += 1
                if is_to_delay_queue(payload):
                    self._heads[direction, channel] = published, self._numbers[channel]
            case "to_client", method if method == BASIC_ACK:
                confirmed = take_covered(published, payload)
                held = {one for messages in self._delivered.values() for one in messages.values()}
                self.in_window |= confirmed
                self.too_early |= (confirmed & self._acked) - held
            case "to_broker", method if method == BASIC_ACK:
                acked = take_covered(delivered, payload)
                self.in_window -= acked
                self._acked |= acked
            case _:
                pass


def is_to_delay_queue(publish: bytes) -> bool:
    """Tell whether a Basic.Publish goes to the exchange of a delay queue."""
    frame = Basic.Publish()
    frame.unmarshal(publish[4:])
    return (frame.exchange or "").startswith("aioworkq.v1.delay.")


def covered(messages: dict[int, str], ack: bytes) -> dict[int, str]:
    """Return those messages, by their numbers, that a Basic.Ack means."""
    frame = Basic.Ack()
    frame.unmarshal(ack[4:])
    tag = frame.delivery_tag or 0
    if frame.multiple:
        return {number: one for number, one in messages.items() if number <= tag or not tag}
    return {tag: messages[tag]} if tag in messages else {}


def take_covered(messages: dict[int, str], ack: bytes) -> set[str]:
    """Take out those messages that a Basic.Ack means."""
    return {messages.pop(number) for number in covered(messages, ack)}


class Strike:
    """Kills a node around one frame of a retry copy: the ``on_frame`` of a proxy.

    Attributes:
        window: How many messages were between their copy's confirm and their ack at the kill.
        too_early: Originals that had been acked before the confirm.
    """

    def __init__(self, node: RabbitMQ, copies: Copies, chance: random.Random) -> None:
        self._node = node
        self._copies = copies
        self._name = chance.choice(MOMENTS)
        self._frames_left = chance.randint(1, 8)
        self._is_held = chance.random() < 0.5
        self._offset = chance.choice((0.0, chance.uniform(0, 0.005), chance.uniform(0, 0.05)))
        self._loop = asyncio.get_running_loop()
        self.window = 0
        self.too_early = set[str]()
        self.is_due = False
        self.is_done = False

    def __str__(self) -> str:
        held = "held back" if self._is_held else "let through"
        return f"{self._name} {held}, {1000 * self._offset:.1f} ms later"

    def __call__(self, direction: Direction, kind: int, channel: int, payload: bytes) -> bool:
        moment = self._copies.moment(direction, kind, channel, payload)
        if direction == "to_client":  # what the broker has said is so, whoever hears it
            self._copies.note(direction, kind, channel, payload)
        if moment == self._name and not self.is_due:
            self._frames_left -= 1
            if not self._frames_left:
                self.is_due = True
                if self._offset:
                    self._loop.call_later(self._offset, self.kill)
                else:
                    self.kill()
        if self.is_due and self._is_held:
            return False  # a frame is no use without those that follow it
        if direction == "to_broker" and not self.is_done:
            self._copies.note(direction, kind, channel, payload)
        return True

    def kill(self) -> None:
        """Kill the node. It is dead on return, but for the kernel's cleaning up."""
        if not self.is_done:
            self.is_done = True
            self.window = len(self._copies.in_window)
            self.too_early |= self._copies.too_early
            assert self._node._node is not None
            assert self._node._node.server is not None
            os.killpg(self._node._node.server.pid, signal.SIGKILL)


class Ledger:
    """What has become of the messages, by their numbers."""

    def __init__(self) -> None:
        self.published: set[int] = set()
        self.runs: Counter[int] = Counter()
        self.handled: Counter[int] = Counter()
        self.dead: Counter[int] = Counter()
        self.highest_attempt = 0

    @property
    def lost(self) -> set[int]:
        return self.published - self.handled.keys() - self.dead.keys()

    async def handle(self, number: int, delivery: Delivery) -> None:
        """Fail as the number says: never, once, twice, always, or for good at once."""
        self.runs[number] += 1
        self.highest_attempt = max(self.highest_attempt, delivery.attempt)
        await asyncio.sleep(random.uniform(0, 0.01))  # what a handler takes, each another time
        failures = number % 5
        if failures == 4:
            raise Reject("its number says so")
        if delivery.attempt <= failures:
            raise ValueError(number)
        self.handled[number] += 1

    async def look_for_dead(self, url: str, *queues: Queue[int]) -> bool:
        """Take the dead letters, and tell whether nothing is missing any more."""
        async with Broker(url) as broker:
            for queue in queues:
                letters = await broker.take_all(queue.dead_letter_queue)
                self.dead.update(int(letter.body) for letter in letters)
        return not self.lost


@pytest.mark.rabbitmq
@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_nothing_is_lost(
    quick_node: RabbitMQ,
    queue_name: str,
    is_long: bool,  # noqa: FBT001 - a fixture
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Every message is handled or dead-lettered, wherever between copy and ack the broker dies."""
    caplog.set_level(logging.CRITICAL)
    queues = (
        Queue(f"{queue_name}.quorum", int),
        Queue(f"{queue_name}.classic", int, type="classic"),
    )
    ledger, copies, numbers = Ledger(), Copies(), iter(range(1_000_000))
    windows = list[int]()
    retry = RetryPolicy(attempts=ATTEMPTS, first=0.125, max=0.25)

    async def round_of(strike: Strike | None, proxy: Proxy, producer: Producer) -> None:
        copies.begin()
        proxy.on_frame = strike or copies
        for queue in queues:
            mine = [next(numbers) for _ in range(EACH)]
            report = await producer.publish_many(queue, mine)
            # What was not confirmed before the strike need not be there.
            ledger.published |= {n for n, error in zip(mine, report, strict=True) if error is None}
        if strike is not None:
            await eventually(lambda: strike.is_done or not ledger.lost, timeout=PATIENCE)
            strike.kill()
            await quick_node.kill()
            proxy.on_frame = copies
            await quick_node.start()
        await eventually(ledger.look_for_dead, quick_node.url, *queues, timeout=PATIENCE)

    async with Proxy(quick_node.port) as proxy, Producer(quick_node.url) as producer:
        proxy.on_frame = copies
        worker = Worker(proxy.url(quick_node.url), grace=10)
        for queue in queues:
            worker.handler(queue, concurrency=5, retry=retry)(ledger.handle)
        async with worker:
            await round_of(None, proxy, producer)
            await write_down(quick_node)  # all queues exist
            for number in range(100 if is_long else 10):
                strike = Strike(quick_node, copies, random.Random(number))
                before = ledger.dead + ledger.handled
                with contextlib.suppress(TimeoutError):
                    await round_of(strike, proxy, producer)
                again = sum(n > 1 for n in (ledger.dead + ledger.handled - before).values())
                windows.append(strike.window)
                print(
                    f"{number}: {strike}: {strike.window} between confirm and ack, "
                    f"{again} done twice, lost: {sorted(ledger.lost)}",
                )
                assert not ledger.lost
                assert not strike.too_early
    done = ledger.dead + ledger.handled
    unlucky = sum(number % 5 < ATTEMPTS for number in ledger.dead)
    print(
        f"{len(ledger.published)} messages, {sum(ledger.runs.values())} runs, "
        f"{len(ledger.handled)} handled, {len(ledger.dead)} dead-lettered "
        f"({unlucky} of them by bad luck), {sum(n > 1 for n in done.values())} done twice; "
        f"{sum(map(bool, windows))} of {len(windows)} kills between a confirm and an ack",
    )
    assert any(windows)
    assert ledger.highest_attempt == ATTEMPTS
    assert not [number for number in ledger.handled if number % 5 >= ATTEMPTS]
