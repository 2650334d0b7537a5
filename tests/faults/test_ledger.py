"""The ledger: everything that was confirmed is handled or dead-lettered, whatever breaks meanwhile.

In the manner of Jepsen's total-queue checker: numbered messages go in from many producers while the
network and the broker break at random and handlers fail, and at the end the books must balance.
Every run prints its seed, and ``SEEDS`` may be given any other one.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import anyio
import pytest

from aioworkq import (
    DeadLetters,
    Delivery,
    OutcomeUnknownError,
    Producer,
    Queue,
    Reject,
    RetryLater,
    Worker,
    WorkQueueError,
)
from tests.consuming import crash, eventually
from tests.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aioworkq.testing import RabbitMQ

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

# What a crash interrupts in a delay queue RabbitMQ takes up again three minutes later (see its
# dead_letter_worker_publisher_confirm_timeout). So odd seeds have delays, and even ones crashes.
PRODUCERS: Final = 20
MESSAGES: Final = 4_000
SEEDS: Final = [*range(1, 10), None]
"""Nine that stay the same, and one that is new each time."""


class Ledger:
    """What went in, and what came out."""

    def __init__(self) -> None:
        self.confirmed: set[int] = set()
        self.unknown: set[int] = set()
        self.handled: Counter[int] = Counter()
        self.starts = 0

    @property
    def duplicates(self) -> int:
        return self.handled.total() - len(self.handled)


class Network:
    """Two proxies, one for producers and one for workers, and the node behind them."""

    def __init__(
        self,
        node: RabbitMQ,
        proxies: tuple[Proxy, Proxy],
        chance: random.Random,
        *,
        crashes: bool,
    ) -> None:
        self._node = node
        self._proxies = proxies
        self._chance = chance
        self._crashes = crashes
        self.faults: Counter[str] = Counter()

    async def break_things(self) -> None:
        """Break one thing after another, until cancelled; each is mended before the next one."""
        faults = [self.cut, self.cut, self.stall, self.half_open, self.refuse, self.close_all]
        try:
            await asyncio.sleep(self._chance.uniform(0.2, 0.5))
            if self._crashes:
                await self.crash()
            while True:
                await asyncio.sleep(self._chance.uniform(0.05, 0.4))
                fault = self._chance.choice(faults)
                self.faults[fault.__name__] += 1
                await fault()
        finally:
            for proxy in self._proxies:
                proxy.flow()
                proxy.accept()

    def _some(self) -> list[Proxy]:
        return self._chance.choice([[self._proxies[0]], [self._proxies[1]], list(self._proxies)])

    async def _moment(self) -> None:
        await asyncio.sleep(self._chance.uniform(0.05, 0.5))

    async def cut(self) -> None:
        for proxy in self._some():
            proxy.cut()

    async def stall(self) -> None:
        some = self._some()
        for proxy in some:
            to_broker = self._chance.random() < 0.5
            proxy.stall(to_broker=to_broker, to_client=not to_broker)
        await self._moment()
        for proxy in some:
            if self._chance.random() < 0.5:
                proxy.cut()
            proxy.flow()

    async def half_open(self) -> None:
        some = self._some()
        for proxy in some:
            proxy.half_open()
        await self._moment()
        for proxy in some:
            proxy.cut()
            proxy.flow()

    async def refuse(self) -> None:
        some = self._some()
        for proxy in some:
            proxy.refuse()
            proxy.cut()
        await self._moment()
        for proxy in some:
            proxy.accept()

    async def close_all(self) -> None:
        await self._node.eval('rabbit_networking:close_all_connections("a fault of the test")')

    async def crash(self) -> None:
        self.faults["crash"] += 1
        await crash(self._node)
        await self._node.start()


async def publish_all(
    producer: Producer,
    queue: Queue[int],
    numbers: list[int],
    ledger: Ledger,
) -> None:
    """Publish numbers one by one, each until its outcome is known, under one message id."""
    for number in numbers:
        while True:
            try:
                await producer.publish(queue, number, message_id=f"n{number}", timeout=10)
            except OutcomeUnknownError:
                ledger.unknown.add(number)
            except WorkQueueError:
                continue
            else:
                ledger.confirmed.add(number)
                break


def make_worker(
    url: str,
    queue: Queue[int],
    ledger: Ledger,
    chance: random.Random,
    *,
    delays: bool,
) -> Worker:
    """Return a worker whose handler fails, retries and rejects at random."""
    worker = Worker(url, heartbeat=2)

    @worker.handler(queue, concurrency=20, prefetch_count=40, attempts=50)
    async def handle(number: int, delivery: Delivery) -> None:
        ledger.starts += 1
        await asyncio.sleep(chance.uniform(0, 0.01))
        what = chance.random()
        if what < 0.02:
            raise RuntimeError(f"fails on {number}")
        if what < 0.04 and delays:
            raise RetryLater(chance.uniform(0.1, 0.5))
        if what < 0.05:
            raise Reject("given up by the test")
        ledger.handled[number] += 1

    return worker


@pytest.fixture
async def proxies(own_node: RabbitMQ) -> AsyncIterator[tuple[Proxy, Proxy]]:
    async with Proxy(own_node.port) as one, Proxy(own_node.port) as other:
        yield one, other


@pytest.mark.rabbitmq
@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: f"seed{seed}")
async def test_the_ledger_balances(
    own_node: RabbitMQ,
    proxies: tuple[Proxy, Proxy],
    seed: int | None,
    queue_name: str,
) -> None:
    """Confirmed minus handled minus dead-lettered is empty, and duplicates are counted."""
    if seed is None:
        seed = secrets.randbelow(10**6)
    chance = random.Random(seed)
    ledger = Ledger()
    queue = Queue(queue_name, int)
    delays = seed % 2 == 1
    network = Network(own_node, proxies, chance, crashes=not delays)
    urls = [proxy.url(own_node.url) for proxy in proxies]
    workers = [make_worker(urls[1], queue, ledger, chance, delays=delays) for _ in range(2)]
    numbers = list(range(MESSAGES))

    async with Producer(urls[0], heartbeat=2) as producer, workers[0], workers[1]:
        async with anyio.create_task_group() as breaking:
            breaking.start_soon(network.break_things)
            async with anyio.create_task_group() as publishing:
                for first in range(PRODUCERS):
                    mine = numbers[first::PRODUCERS]
                    publishing.start_soon(publish_all, producer, queue, mine, ledger)
            breaking.cancel_scope.cancel()
        dead = await balance(own_node.url, queue, ledger)

    lost = ledger.confirmed - set(ledger.handled) - dead
    print(
        f"seed {seed}: {len(ledger.confirmed)} confirmed, {len(ledger.handled)} handled, "
        f"{len(dead)} dead-lettered, {len(lost)} lost, {ledger.duplicates} duplicates, "
        f"{len(ledger.unknown)} in doubt, faults {dict(network.faults)}",
    )
    if lost:
        print(await own_node.rabbitmqctl("list_queues", "name", "messages", "consumers"))
    assert not lost
    assert ledger.confirmed == set(numbers)


async def balance(url: str, queue: Queue[int], ledger: Ledger) -> set[int]:
    """Wait until everything confirmed has come out somewhere; return what was dead-lettered."""
    dead: set[int] = set()

    async def is_balanced() -> bool:
        if len(ledger.handled) < 0.9 * len(ledger.confirmed):
            return False
        async with DeadLetters(url, queue) as letters:
            found: list[Any] = await letters.peek(limit=MESSAGES)
        dead.update(letter.body() for letter in found)
        return ledger.confirmed <= set(ledger.handled) | dead

    with contextlib.suppress(TimeoutError):  # then the books tell what is missing
        await eventually(is_balanced, timeout=60)
    return dead
