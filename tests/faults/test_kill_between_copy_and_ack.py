"""The broker is killed between the copy of a message (retry, dead letter) and the original's ack.

A proxy sees the frames. At the frame that publishes a copy, confirms it, or acks the original, the
broker is killed: at that very moment, or a few milliseconds later; the frame itself still gets
through, or is held back for ever. Afterwards every message must have been handled or dead-lettered,
and no delivery may count more attempts than there are. Duplicates are allowed, counted and printed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import signal
from collections import Counter
from typing import TYPE_CHECKING, Final

import pytest

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

BASIC_PUBLISH: Final = b"\x00\x3c\x00\x28"
BASIC_ACK: Final = b"\x00\x3c\x00\x50"

MOMENTS: Final[dict[str, tuple[Direction, bytes]]] = {
    "publish of the copy": ("to_broker", BASIC_PUBLISH),
    "confirm of the copy": ("to_client", BASIC_ACK),
    "ack of the original": ("to_broker", BASIC_ACK),
}


class Strike:
    """Kills a node around one frame. Watches the frames of a proxy as its ``on_frame``."""

    def __init__(self, node: RabbitMQ, chance: random.Random) -> None:
        self._node = node
        self._name = chance.choice(list(MOMENTS))
        self._frames_left = chance.randint(1, 8)
        self._is_held = chance.random() < 0.5
        self._offset = chance.choice((0.0, chance.uniform(0, 0.005), chance.uniform(0, 0.05)))
        self._loop = asyncio.get_running_loop()
        self.is_due = False
        self.is_done = False

    def __str__(self) -> str:
        held = "held back" if self._is_held else "let through"
        return f"{self._name} {held}, {1000 * self._offset:.1f} ms later"

    def __call__(self, direction: Direction, kind: int, channel: int, payload: bytes) -> bool:
        if self.is_due:
            return not self._is_held  # a frame is no use without those that follow it
        if kind != 1 or (direction, payload[:4]) != MOMENTS[self._name]:
            return True
        self._frames_left -= 1
        if self._frames_left:
            return True
        self.is_due = True
        if self._offset:
            self._loop.call_later(self._offset, self.kill)
        else:
            self.kill()
        return not self._is_held

    def kill(self) -> None:
        """Kill the node. It is dead on return, but for the kernel's cleaning up."""
        if not self.is_done:
            self.is_done = True
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
    ledger, numbers = Ledger(), iter(range(1_000_000))
    retry = RetryPolicy(attempts=ATTEMPTS, first=0.125, max=0.25)

    async def round_of(strike: Strike | None, proxy: Proxy, producer: Producer) -> None:
        proxy.on_frame = strike
        for queue in queues:
            mine = [next(numbers) for _ in range(EACH)]
            report = await producer.publish_many(queue, mine)
            # What was not confirmed before the strike need not be there.
            ledger.published |= {n for n, error in zip(mine, report, strict=True) if error is None}
        if strike is not None:
            await eventually(lambda: strike.is_done or not ledger.lost, timeout=PATIENCE)
            strike.kill()
            await quick_node.kill()
            proxy.on_frame = None
            await quick_node.start()
        await eventually(ledger.look_for_dead, quick_node.url, *queues, timeout=PATIENCE)

    async with Proxy(quick_node.port) as proxy, Producer(quick_node.url) as producer:
        worker = Worker(proxy.url(quick_node.url), grace=10)
        for queue in queues:
            worker.handler(queue, concurrency=5, retry=retry)(ledger.handle)
        async with worker:
            await round_of(None, proxy, producer)
            await write_down(quick_node)  # all queues exist
            for number in range(100 if is_long else 10):
                strike = Strike(quick_node, random.Random(number))
                before = ledger.dead + ledger.handled
                with contextlib.suppress(TimeoutError):
                    await round_of(strike, proxy, producer)
                again = sum(n > 1 for n in (ledger.dead + ledger.handled - before).values())
                print(f"{number}: {strike}: {again} done twice, lost: {sorted(ledger.lost)}")
                assert not ledger.lost
    done = ledger.dead + ledger.handled
    unlucky = sum(number % 5 < ATTEMPTS for number in ledger.dead)
    print(
        f"{len(ledger.published)} messages, {sum(ledger.runs.values())} runs, "
        f"{len(ledger.handled)} handled, {len(ledger.dead)} dead-lettered "
        f"({unlucky} of them by bad luck), {sum(n > 1 for n in done.values())} done twice",
    )
    assert ledger.highest_attempt == ATTEMPTS
    assert not [number for number in ledger.handled if number % 5 >= ATTEMPTS]
