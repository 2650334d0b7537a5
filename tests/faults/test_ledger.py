"""A ledger of thousands of messages through random faults, in the manner of Jepsen's total queue.

Twenty tasks publish numbered messages, some with a delay, while faults drawn from a printed seed
hit broker and network, handlers fail, and messages are retried. In the end what was confirmed must
have been handled or dead-lettered: the difference is empty. Duplicates are allowed, counted and
printed.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import random
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from aioworkq import (
    Delivery,
    Producer,
    Queue,
    Reject,
    RetryLater,
    RetryPolicy,
    Worker,
    WorkQueueError,
)
from tests.consuming import Broker, crash, eventually
from tests.nodes import node_with_quick_delays, write_down
from tests.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from anyio.from_thread import BlockingPortal

    from aioworkq.testing import RabbitMQ

pytestmark = pytest.mark.rabbitmq

PRODUCERS = 20
EACH = 100
FAULTS = ("cut", "cut", "stall", "half-open", "close all", "one direction")


@pytest.fixture(scope="module")
def node(portal: BlockingPortal, version: str | None) -> Iterator[RabbitMQ]:
    """A node for all seeds, which kill it."""
    with portal.wrap_async_context_manager(node_with_quick_delays(version)) as node:
        yield node


@pytest.fixture
async def node_url(node: RabbitMQ, queue_name: str) -> AsyncIterator[str]:
    yield await node.add_vhost(queue_name)
    await node.delete_vhost(queue_name)


class Ledger:
    """Who published what, and what has become of it."""

    def __init__(self, chance: random.Random) -> None:
        self.confirmed: set[int] = set()
        self.unknown: set[int] = set()
        self.handled: Counter[int] = Counter()
        self.dead: Counter[int] = Counter()
        numbers = range(PRODUCERS * EACH)
        self.flaky = set(chance.sample(numbers, len(numbers) // 10))
        self.later = set(chance.sample(numbers, len(numbers) // 50))
        self.hopeless = set(chance.sample(numbers, len(numbers) // 50))
        self.rejected = set(chance.sample(numbers, len(numbers) // 50))

    @property
    def lost(self) -> set[int]:
        return self.confirmed - self.handled.keys() - self.dead.keys()

    def judge(self, number: int, attempt: int) -> None:
        """Fail as it was drawn for this number."""
        if number in self.rejected:
            raise Reject("drawn")
        if number in self.hopeless or (number in self.flaky and attempt < 3):
            raise ValueError(number)
        if number in self.later and attempt == 1:
            raise RetryLater(0.25)
        self.handled[number] += 1


async def publish(
    producer: Producer, queue: Queue[int], ledger: Ledger, mine: range, chance: random.Random
) -> None:
    for number in mine:
        try:
            delay = chance.choice((None, None, None, 0.125, 0.75))
            await producer.publish(queue, number, delay=delay, timeout=30)
        except WorkQueueError:
            ledger.unknown.add(number)
        else:
            ledger.confirmed.add(number)
        await asyncio.sleep(chance.uniform(0, 0.02))


async def strike(fault: str, node: RabbitMQ, proxy: Proxy, chance: random.Random) -> None:
    pause = chance.uniform(0.05, 0.4)
    match fault:
        case "cut":
            proxy.cut()
        case "stall":
            proxy.stall()
            await asyncio.sleep(pause)
            proxy.flow()
        case "one direction":
            proxy.stall(to_broker=chance.random() < 0.5, to_client=False)
            await asyncio.sleep(pause)
            proxy.flow()
        case "half-open":
            proxy.half_open()
            await asyncio.sleep(pause)
            proxy.flow()
            proxy.cut()
        case "close all":
            await node.eval('rabbit_networking:close_all_connections("the ledger wants it")')
        case "kill":
            await crash(node)
            await node.start()
        case _:
            raise ValueError(fault)


async def strike_at_random(
    node: RabbitMQ, proxies: list[Proxy], chance: random.Random, log: list[str], *, kills: bool
) -> None:
    faults = [chance.choice(FAULTS) for _ in range(chance.randint(5, 8))]
    if kills:
        faults.insert(chance.randrange(len(faults)), "kill")
    for fault in faults:
        await asyncio.sleep(chance.uniform(0.05, 0.4))
        log.append(fault)
        await strike(fault, node, chance.choice(proxies), chance)


@pytest.mark.timeout(600)  # on a busy machine
@pytest.mark.parametrize("seed", range(10))
async def test_nothing_confirmed_is_lost(
    node: RabbitMQ,
    node_url: str,
    queue_name: str,
    seed: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Confirmed minus handled minus dead-lettered is empty, whatever broker and network do."""
    caplog.set_level(logging.CRITICAL)  # pytest keeps what is logged, tracebacks and all
    caplog.set_level(logging.WARNING, "asyncio")
    chance = random.Random(seed)
    queue = Queue(queue_name, int, type=chance.choice(("quorum", "classic")))
    retry = chance.choice((None, RetryPolicy(attempts=5, first=0.125, max=0.5)))
    ledger = Ledger(chance)
    faults: list[str] = []
    async with contextlib.AsyncExitStack() as stack:
        proxies = [await stack.enter_async_context(Proxy(node.port)) for _ in range(3)]
        workers = [
            Worker(proxy.url(node_url), heartbeat=2, connect_timeout=2, grace=10)
            for proxy in proxies[:2]
        ]
        for worker in workers:

            @worker.handler(queue, concurrency=20, prefetch_count=40, attempts=5, retry=retry)
            async def handle(number: int, delivery: Delivery) -> None:
                await asyncio.sleep(0.002)
                ledger.judge(number, delivery.attempt)

            await stack.enter_async_context(worker)
        url = proxies[2].url(node_url)
        producer = Producer(url, heartbeat=2, connect_timeout=2)
        await stack.enter_async_context(producer)
        kills = seed % 3 == 0  # a start takes seconds
        if kills:  # delay queues that are created in that moment may have no leader ever after
            await producer.publish(f"{queue_name}.other", 0, delay=0.75)
            await write_down(node)
        async with asyncio.TaskGroup() as tasks:
            for number in range(PRODUCERS):
                mine = range(number * EACH, (number + 1) * EACH)
                tasks.create_task(publish(producer, queue, ledger, mine, chance))
            tasks.create_task(strike_at_random(node, proxies, chance, faults, kills=kills))

        async def is_settled() -> bool:
            async with Broker(node_url) as broker:
                dead = await broker.take_all(queue.dead_letter_queue)
            ledger.dead.update(int(message.body) for message in dead)
            return not ledger.lost

        with contextlib.suppress(TimeoutError):
            await eventually(is_settled, timeout=300)
        duplicates = sum(ledger.handled.values()) - len(ledger.handled)
        print(
            f"seed {seed}: {queue.type}, {'retry' if retry else 'requeue'}, {', '.join(faults)}: "
            f"{len(ledger.confirmed)} confirmed, {len(ledger.unknown)} unknown, "
            f"{len(ledger.handled)} handled, {duplicates} of them again, "
            f"{len(ledger.dead)} dead-lettered "
            f"({len(ledger.dead.keys() - ledger.hopeless - ledger.rejected)} of them by bad luck), "
            f"{sum(worker.statistics().duplicates for worker in workers)} recognised",
        )
        for worker in workers:
            print(worker.statistics().consumers[queue.name])
    gc.collect()
    assert not caplog.records  # no error of a task or a callback that nobody looked at
    assert not ledger.lost
    assert len(ledger.confirmed) + len(ledger.unknown) == PRODUCERS * EACH
    assert not ledger.handled.keys() & (ledger.hopeless | ledger.rejected)
