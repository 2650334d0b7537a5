"""Batch handlers whose broker, process or connection dies in the middle of a batch."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import textwrap
from collections import Counter
from typing import TYPE_CHECKING

import anyio
import pytest

from aioworkq import Delivery, Producer, Queue, Worker
from tests.consuming import Broker, crash, eventually, publish_all

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aioworkq.testing import RabbitMQ
    from aioworkq.topology import QueueType
    from tests.proxy import Direction, Proxy

pytestmark = pytest.mark.rabbitmq

TYPES = pytest.mark.parametrize("kind", ["quorum", "classic"])

BASIC_CANCEL = b"\x00\x3c\x00\x1e"

LONG = 3600.0
"""Seconds: who waits for so long for others of its batch waits for ever."""

WORKER = textwrap.dedent("""
    import os, signal, sys
    from aioworkq import Queue, Worker, run

    url, name, kind = sys.argv[1:]
    worker = Worker(url)
    batches = 0

    @worker.batch_handler(Queue(name, int, type=kind), max_size=10, max_wait=3600, concurrency=1)
    async def handle(numbers: list[int]) -> None:
        global batches
        batches += 1
        print(*numbers, flush=True)
        if batches == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    run(worker)
""")


@pytest.fixture
async def node_url(node: RabbitMQ, queue_name: str) -> AsyncIterator[str]:
    yield await node.add_vhost(queue_name)
    await node.delete_vhost(queue_name)


@TYPES
async def test_a_broker_killed_while_batches_run(
    node: RabbitMQ, node_url: str, queue_name: str, kind: QueueType
) -> None:
    """All that was confirmed, before it died or later, is handled; what ran is not run again."""
    queue = Queue(queue_name, int, type=kind)
    worker = Worker(node_url)
    release = asyncio.Event()
    started: list[list[int]] = []
    handled: Counter[int] = Counter()

    @worker.batch_handler(queue, max_size=20, max_wait=0.05, concurrency=2)
    async def handle(numbers: list[int]) -> None:
        started.append(numbers)
        await release.wait()
        handled.update(numbers)

    async with worker, Producer(node_url, timeout=60) as producer, asyncio.TaskGroup() as tasks:
        await publish_all(producer, queue, range(200))

        def is_full() -> bool:  # two batches run, of which a slow machine may not have filled one
            statistics = worker.statistics()
            return len(started) == 2 and statistics.in_flight + statistics.waiting == 60

        await eventually(is_full)
        await crash(node)
        await eventually(lambda: not (worker.is_ready or producer.statistics().is_connected))
        tasks.create_task(publish_all(producer, queue, range(200, 400)))
        await node.start()
        await worker.wait_ready(timeout=60)
        assert len(started) == 2
        release.set()
        await eventually(lambda: handled.keys() == {*range(400)}, timeout=60)

        async def is_done() -> bool:
            return not worker.statistics().in_flight + worker.statistics().waiting

        await eventually(is_done)
    async with Broker(node_url) as broker:
        assert await broker.ready(queue_name) == 0
        assert await broker.ready(queue.dead_letter_queue) == 0
    assert {handled[number] for batch in started[:2] for number in batch} == {1}


@TYPES
async def test_a_process_killed_in_the_middle_of_a_batch(
    broker: Broker, url: str, queue_name: str, kind: QueueType
) -> None:
    """Another worker does its batch again, as a second attempt, and all the rest."""
    queue = Queue(queue_name, int, type=kind)
    async with Producer(url) as producer:
        await publish_all(producer, queue, range(100))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", WORKER, url, queue_name, kind), stdout=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(60):
            printed, _ = await process.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    assert process.returncode == -signal.SIGKILL
    *done, killed = [{int(word) for word in line.split()} for line in printed.splitlines()]
    assert [len(batch) for batch in (*done, killed)] == [10, 10, 10]
    worker = Worker(url)
    attempts: dict[int, int] = {}

    @worker.batch_handler(queue, max_size=10, max_wait=0.05)
    async def handle(numbers: list[int], deliveries: list[Delivery]) -> None:
        attempts.update(zip(numbers, [one.attempt for one in deliveries], strict=True))

    missing = set(range(100)).difference(*done)
    async with worker:
        await eventually(lambda: attempts.keys() >= missing)
        await eventually(lambda: not worker.statistics().in_flight + worker.statistics().waiting)
    assert {attempts[number] for number in killed} == {2}
    assert await broker.ready(queue_name) == 0
    assert await broker.ready(queue.dead_letter_queue) == 0


@pytest.mark.parametrize("when", ["before its last batch", "in its last batch"])
@TYPES
async def test_a_connection_cut_while_the_worker_stops(
    broker: Broker,
    proxy: Proxy,
    proxy_url: str,
    url: str,
    queue_name: str,
    kind: QueueType,
    when: str,
) -> None:
    """The worker ends, and what it could not ack is in the queue for the next one."""
    queue = Queue(queue_name, int, type=kind)
    worker = Worker(proxy_url)
    started, release = asyncio.Event(), asyncio.Event()
    handled: list[int] = []

    @worker.batch_handler(queue, max_size=100, max_wait=LONG)
    async def handle(numbers: list[int]) -> None:
        started.set()
        await release.wait()
        handled.extend(numbers)

    def cut_at_cancel(direction: Direction, kind: int, channel: int, payload: bytes) -> bool:
        if not payload.startswith(BASIC_CANCEL):
            return True
        asyncio.get_running_loop().call_soon(proxy.cut)
        return False

    async with Producer(url) as producer, anyio.create_task_group() as tasks:
        await tasks.start(worker.run)
        await publish_all(producer, queue, range(7))
        await eventually(lambda: worker.statistics().waiting == 7)
        if when == "before its last batch":
            proxy.on_frame = cut_at_cancel
            release.set()
            worker.stop()
        else:
            worker.stop()
            await started.wait()
            proxy.cut()
            await eventually(lambda: not worker.is_ready)
            release.set()
    assert sorted(handled) == (list(range(7)) if started.is_set() else [])

    async def are_back() -> bool:
        return await broker.ready(queue_name) == 7

    await eventually(are_back)
    next_one = Worker(url)
    again: list[int] = []

    @next_one.batch_handler(queue, max_size=7, max_wait=LONG)
    async def handle_again(numbers: list[int]) -> None:
        again.extend(numbers)

    async with next_one:
        await eventually(lambda: next_one.statistics().handled == 7)
    assert sorted(again) == list(range(7))
    assert await broker.ready(queue_name) == 0
