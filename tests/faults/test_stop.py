"""Stopping a worker in every phase, whatever the broker does: in order, bounded, nothing lost.

The bound: `run` returns within ``grace`` and at most ten steps of 5 s each (1 s in the
tests with a silent broker), of which a healthy or a dead broker takes none. A step is: subscribe or
not, cancel the consumers, give back what was not started, give back what was cancelled, write the
acks, close the channels, close the connection; flush the copies, close their channel, close their
connection. All consumers take each step together.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from aioworkq import ConsumerState, Delivery, Producer, Queue, Reject, Requeue, Worker
from tests.consuming import Broker, eventually, headers_of, publish_all

if TYPE_CHECKING:
    from aioworkq.testing import RabbitMQ
    from aioworkq.topology import QueueType
    from tests.proxy import Direction, Proxy

STEP = 1.0
PROMPT = 10.0
"""What takes no time at all has so many seconds, for machines that are busy."""
LONGEST = 10 * STEP + PROMPT

DECLARE_OK = b"\x00\x32\x00\x0b"
CONSUME_OK = b"\x00\x3c\x00\x15"
CANCEL_OK = b"\x00\x3c\x00\x1f"
CLOSE_OK = b"\x00\x14\x00\x29"
PUBLISH = b"\x00\x3c\x00\x28"

TYPES = pytest.mark.parametrize("kind", ["quorum", "classic"])
SILENT = pytest.mark.usefixtures("short_steps")
"""For a test whose broker does not answer; one that answers may be slower than that."""


@pytest.fixture
def short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each step less time than users get: no test waits for the sake of waiting."""
    shorten_steps(monkeypatch)


def shorten_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("settle._STOPPING_TIMEOUT", "consumer._STEP_TIMEOUT", "worker._CLOSE_TIMEOUT"):
        monkeypatch.setattr(f"aioworkq.{name}", STEP)


async def handle(body: Any) -> None:
    """Do nothing with a message."""


def worker_with(url: str, queue: Queue[Any] | str, **options: Any) -> Worker:
    worker = Worker(url, **options)
    worker.handler(queue)(handle)
    return worker


class Running:
    """A worker that runs as a task of its own."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.task = asyncio.create_task(worker.run())

    async def end(self, *, within: float) -> None:
        """Wait for its end, which must come in time and without an error."""
        done, _ = await asyncio.wait({self.task}, timeout=within)
        if not done:
            self.task.print_stack()
            pytest.fail(f"run() did not return within {within} s")
        self.task.result()
        for consumer in self.worker._consumers:
            assert consumer.state is ConsumerState.STOPPED
            assert not consumer._runs._running
            assert not consumer._runs._unstarted
            assert not consumer._runs._orphans
            assert consumer._runs._slots.used == 0
        assert not self.worker.statistics().is_connected


# Before it consumes


async def test_before_the_start(url: str, queue_name: str) -> None:
    """A worker that was stopped before returns at once, and connects to nothing."""
    worker = worker_with(url, queue_name)
    worker.stop()
    await Running(worker).end(within=PROMPT)
    assert worker.statistics().reconnects == 0


async def test_before_the_start_in_a_task_group(url: str, queue_name: str) -> None:
    """`task_group.start` of a worker that was stopped returns, as `run` does."""
    worker = worker_with(url, queue_name)
    worker.stop()
    async with anyio.create_task_group() as tasks:
        await tasks.start(worker.run)


@pytest.mark.parametrize("fault", ["half-open", "refused", "stalled"])
async def test_while_connecting(proxy: Proxy, proxy_url: str, queue_name: str, fault: str) -> None:
    """A connect that hangs, or is tried again and again, does not hold a stop."""
    if fault == "half-open":
        proxy.half_open()
    elif fault == "refused":
        proxy.refuse()
    else:
        proxy.stall()
    running = Running(worker_with(proxy_url, queue_name, connect_timeout=60))
    if fault != "refused":
        await proxy.wait_connections(1)
    else:
        await eventually(lambda: running.worker._connection.last_error)
    running.worker.stop()
    await running.end(within=PROMPT)


async def test_while_connecting_in_a_task_group(
    proxy: Proxy, proxy_url: str, queue_name: str
) -> None:
    """`task_group.start` returns when the worker is stopped before it is ready."""
    proxy.half_open()
    worker = worker_with(proxy_url, queue_name)
    async with anyio.create_task_group() as tasks:

        async def stop() -> None:
            await proxy.wait_connections(1)
            worker.stop()

        tasks.start_soon(stop)
        await tasks.start(worker.run)
        assert not worker.is_ready


@SILENT
@pytest.mark.parametrize(
    "answer", [DECLARE_OK, CONSUME_OK, CLOSE_OK], ids=["declare", "consume", "close"]
)
async def test_while_subscribing(
    broker: Broker, proxy: Proxy, proxy_url: str, url: str, queue_name: str, answer: bytes
) -> None:
    """A declaration or a subscription that is never answered does not hold a stop."""
    async with Producer(url) as producer:
        await publish_all(producer, queue_name, range(20))
    dropped = asyncio.Event()

    def on_frame(direction: Direction, kind: int, channel: int, payload: bytes) -> bool:
        if direction == "to_client" and payload[:4] == answer:
            dropped.set()
            return False
        return True

    proxy.on_frame = on_frame
    running = Running(worker_with(proxy_url, queue_name, timeout=60))
    await dropped.wait()
    await asyncio.sleep(0.05)  # deliveries may come behind it
    running.worker.stop()
    await running.end(within=3 * STEP + PROMPT)
    # RabbitMQ took the subscription: what was handed over runs, and is lost with its channel.
    statistics = running.worker.statistics()
    expected, left = 20 - statistics.handled + statistics.stale_settles, 0

    async def are_all_back() -> bool:
        nonlocal left
        left += len(await broker.take_all(queue_name))
        return left >= expected

    await eventually(are_all_back)
    assert left == expected


# While it consumes


@TYPES
@pytest.mark.parametrize("ending", ["stop", "cancel"])
async def test_at_any_moment(
    broker: Broker, url: str, queue_name: str, kind: QueueType, ending: str
) -> None:
    """Stopped or cancelled at any moment from its start on, it loses nothing and charges nobody."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    moments = random.Random(seed)
    queue = Queue(queue_name, int, type=kind)
    count = 100
    async with Producer(url) as producer:
        await publish_all(producer, queue, range(count))
    handled: set[int] = set()
    charged: set[int] = set()
    for _ in range(25):
        worker = Worker(url, grace=0)

        @worker.handler(queue, concurrency=2, prefetch_count=10)
        async def work(number: int, delivery: Delivery) -> None:
            if delivery.attempt > 1:
                charged.add(number)
            await asyncio.sleep(0.002)
            handled.add(number)

        running = Running(worker)
        await asyncio.sleep(moments.uniform(0, 0.15))
        if ending == "stop":
            worker.stop()
            await running.end(within=PROMPT)
        else:
            running.task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running.end(within=PROMPT)
    left = [int(message.body) for message in await broker.take_all(queue_name)]
    assert handled | set(left) == set(range(count))
    print(f"charged {len(charged)}, handled {len(handled)}")
    # What a quorum queue has assigned to a consumer when that is cancelled, it counts as returned,
    # though it was never sent: no client can know of it.
    assert kind == "quorum" or not charged


async def test_running_handlers_end(broker: Broker, url: str, queue_name: str) -> None:
    """Within the grace period running handlers end, and are acked; nothing more is started."""
    queue = Queue(queue_name, int)
    worker = Worker(url)
    release = asyncio.Event()
    started: list[int] = []

    @worker.handler(queue, concurrency=3, prefetch_count=10)
    async def work(number: int) -> None:
        started.append(number)
        await release.wait()

    running = Running(worker)
    await worker.wait_ready()
    async with Producer(url) as producer:
        await publish_all(producer, queue, range(10))
    await eventually(lambda: worker.statistics().waiting == 7)
    worker.stop()

    async def returned() -> bool:
        return await broker.ready(queue_name) == 7

    await eventually(returned)
    assert not running.task.done()
    release.set()
    await running.end(within=PROMPT)
    assert started == [0, 1, 2]
    assert worker.statistics().handled == 3
    assert await broker.ready(queue_name) == 7


async def test_grace_is_over(broker: Broker, url: str, queue_name: str) -> None:
    """After the grace period running handlers are cancelled, and their messages go back."""
    worker = Worker(url, grace=0.3)
    started = asyncio.Event()
    cancelled = 0

    @worker.handler(queue_name)
    async def hang(body: Any) -> None:
        nonlocal cancelled
        started.set()
        try:
            await anyio.sleep_forever()
        finally:
            cancelled += 1

    running = Running(worker)
    await worker.wait_ready()
    async with Producer(url) as producer:
        await producer.publish(queue_name, "x")
    await started.wait()
    worker.stop()
    await running.end(within=PROMPT)
    assert cancelled == 1
    assert await broker.ready(queue_name) == 1


async def test_again_and_shorter(url: str, queue_name: str) -> None:
    """A second stop shortens the grace period, and never prolongs it."""
    worker = Worker(url, grace=600)
    started = asyncio.Event()

    @worker.handler(queue_name)
    async def hang(body: Any) -> None:
        started.set()
        await anyio.sleep_forever()

    running = Running(worker)
    await worker.wait_ready()
    async with Producer(url) as producer:
        await producer.publish(queue_name, "x")
    await started.wait()
    worker.stop()
    worker.stop(grace=3600)
    await eventually(
        lambda: worker.statistics().consumers[queue_name].state is ConsumerState.DRAINING
    )
    worker.stop()
    assert not running.task.done()
    worker.stop(grace=0)
    await running.end(within=PROMPT)
    worker.stop()  # harmless


async def test_from_another_thread(url: str, queue_name: str) -> None:
    """`stop` may be called from any thread: the event loop wakes up for it."""
    running = Running(worker_with(url, queue_name, heartbeat=600))
    await running.worker.wait_ready()
    thread = threading.Thread(target=running.worker.stop)
    thread.start()
    await running.end(within=PROMPT)
    thread.join()
    running.worker.stop()


async def test_from_a_handler(url: str, queue_name: str) -> None:
    """A handler may stop its worker: it ends, and is acked."""
    worker = Worker(url)

    @worker.handler(queue_name)
    async def last(body: Any) -> None:
        worker.stop()

    running = Running(worker)
    await worker.wait_ready()
    async with Producer(url) as producer:
        await producer.publish(queue_name, "x")
    await running.end(within=PROMPT)
    assert worker.statistics().handled == 1


async def test_while_a_failed_message_pauses(broker: Broker, url: str, queue_name: str) -> None:
    """A failed message that is kept for a while goes back at once, and counts."""
    worker = Worker(url)
    failed = asyncio.Event()

    @worker.handler(queue_name, on_error=lambda *_: Requeue(pause=600))
    async def fail(body: Any) -> None:
        failed.set()
        raise ValueError("no")

    running = Running(worker)
    await worker.wait_ready()
    async with Producer(url) as producer:
        await producer.publish(queue_name, "x")
    await failed.wait()
    worker.stop()
    await running.end(within=PROMPT)
    (left,) = await broker.take_all(queue_name)
    assert headers_of(left)["x-delivery-count"] == 1


@SILENT
async def test_while_a_dead_letter_cannot_be_published(
    broker: Broker, proxy: Proxy, proxy_url: str, queue_name: str
) -> None:
    """A dead letter on its way in an outage gets a few seconds; its original is not lost."""
    worker = Worker(proxy_url, timeout=600, grace=600)
    reached = asyncio.Event()

    def on_frame(direction: Direction, kind: int, channel: int, payload: bytes) -> bool:
        if direction == "to_broker" and payload[:4] == PUBLISH:
            reached.set()
            return False
        return True

    @worker.handler(queue_name)
    async def reject(body: Any) -> None:
        raise Reject("no")

    running = Running(worker)
    await worker.wait_ready()
    proxy.on_frame = on_frame
    await broker.publish(queue_name, b"x")  # past the proxy
    await reached.wait()
    worker.stop()
    await running.end(within=2 * STEP + PROMPT)
    assert [message.body for message in await broker.take_all(queue_name)] == [b"x"]
    assert await broker.ready(f"{queue_name}.dead") == 0


@TYPES
async def test_when_nothing_can_be_given_back_by_copy(
    broker: Broker, proxy: Proxy, proxy_url: str, queue_name: str, kind: QueueType
) -> None:
    """Without a publishing connection, unstarted messages go back by a nack, all together."""
    worker = Worker(proxy_url, grace=0)
    queue = Queue(queue_name, int, type=kind)

    def on_frame(direction: Direction, kind: int, channel: int, payload: bytes) -> bool:
        return not (direction == "to_broker" and payload[:4] == PUBLISH)

    @worker.handler(queue, concurrency=2, prefetch_count=40)
    async def hang(number: int) -> None:
        await anyio.sleep_forever()

    running = Running(worker)
    await worker.wait_ready()
    for number in range(40):
        await broker.publish(queue_name, str(number).encode())
    await eventually(lambda: worker.statistics().waiting == 38)
    proxy.on_frame = on_frame
    worker.stop()
    await running.end(within=3 * 5 + PROMPT)
    left = await broker.take_all(queue_name)
    assert sorted(int(message.body) for message in left) == list(range(40))
    assert worker.statistics().requeued == 40


@SILENT
async def test_unanswered_cancel(
    broker: Broker, proxy: Proxy, proxy_url: str, queue_name: str
) -> None:
    """A broker that does not answer the end of a consumer holds a stop for a few seconds only."""
    worker = worker_with(proxy_url, queue_name, grace=0)
    running = Running(worker)
    await worker.wait_ready()

    def on_frame(direction: Direction, kind: int, channel: int, payload: bytes) -> bool:
        return payload[:4] not in {CANCEL_OK, CLOSE_OK}

    proxy.on_frame = on_frame
    worker.stop()
    await running.end(within=2 * STEP + PROMPT)


# While the broker is in trouble


@SILENT
@pytest.mark.parametrize("fault", ["stall", "half-open", "stall to broker"])
async def test_twenty_consumers_on_a_dead_line(
    proxy: Proxy, proxy_url: str, url: str, queue_name: str, fault: str
) -> None:
    """With a broker that has fallen silent, all consumers take each step together, not in turn."""
    worker = Worker(proxy_url, grace=0)
    queues = [f"{queue_name}.{number}" for number in range(20)]

    async def hang(body: Any) -> None:
        await anyio.sleep_forever()

    for name in queues:
        worker.handler(Queue(name, type="classic"), concurrency=1, prefetch_count=5)(hang)
    running = Running(worker)
    await worker.wait_ready()
    async with Producer(url) as producer:
        for name in queues:
            await publish_all(producer, Queue(name, type="classic"), range(5))
    await eventually(lambda: worker.statistics().waiting == 80)
    if fault == "stall":
        proxy.stall()
    elif fault == "half-open":
        proxy.half_open()
    else:
        proxy.stall(to_client=False)
    began = time.monotonic()
    worker.stop()
    await running.end(within=LONGEST)
    print(f"{fault}: {time.monotonic() - began:.1f} s")


async def test_when_the_broker_is_dead(own_node: RabbitMQ, queue_name: str) -> None:
    """With RabbitMQ killed, running handlers still get their grace, and run returns."""
    worker = Worker(own_node.url)
    release, started = asyncio.Event(), asyncio.Event()

    @worker.handler(queue_name, prefetch_count=10, concurrency=1)
    async def work(body: Any) -> None:
        started.set()
        await release.wait()

    running = Running(worker)
    await worker.wait_ready()
    async with Producer(own_node.url) as producer:
        await publish_all(producer, queue_name, range(10))
    await eventually(lambda: worker.statistics().waiting == 9)
    await own_node.kill()
    await eventually(lambda: not worker.statistics().is_connected)
    worker.stop()
    await asyncio.sleep(0.1)
    assert not running.task.done()
    release.set()
    await running.end(within=PROMPT)
    assert worker.statistics().consumers[queue_name].handled == 1
    assert worker.statistics().stale_settles == 1


async def test_heartbeats_go_on(
    broker: Broker, proxy: Proxy, proxy_url: str, queue_name: str
) -> None:
    """While a worker drains, heartbeats go on: RabbitMQ keeps the connection, the ack arrives."""
    worker = Worker(proxy_url, heartbeat=2, grace=60)
    started = asyncio.Event()

    @worker.handler(queue_name)
    async def long(body: Any) -> None:
        started.set()
        await asyncio.sleep(8)  # RabbitMQ closes a silent connection after 4 to 6 s

    running = Running(worker)
    await worker.wait_ready()
    await broker.publish(queue_name, b"x")
    await started.wait()
    worker.stop()
    await running.end(within=8 + PROMPT)
    assert worker.statistics().handled == 1
    assert worker.statistics().stale_settles == 0
    assert proxy.total_connections == 1
    assert await broker.ready(queue_name) == 0


# Cancelling run()


@pytest.mark.parametrize("phase", ["connecting", "running", "draining", "closing"])
async def test_cancelled(
    broker: Broker,
    proxy: Proxy,
    proxy_url: str,
    queue_name: str,
    monkeypatch: pytest.MonkeyPatch,
    phase: str,
) -> None:
    """Cancelling `run` in any phase raises CancelledError, in bounded time, and loses nothing."""
    if phase == "closing":
        shorten_steps(monkeypatch)
    worker = Worker(proxy_url, grace=600, connect_timeout=600)
    started = asyncio.Event()

    @worker.handler(queue_name, prefetch_count=10, concurrency=1)
    async def hang(body: Any) -> None:
        started.set()
        await anyio.sleep_forever()

    if phase == "connecting":
        proxy.half_open()
    running = Running(worker)
    if phase != "connecting":
        await worker.wait_ready()
        for _ in range(10):
            await broker.publish(queue_name, b"x")
        await eventually(lambda: worker.statistics().waiting == 9)
    else:
        await proxy.wait_connections(1)
    if phase in {"draining", "closing"}:
        if phase == "closing":
            proxy.stall()
        worker.stop(grace=0 if phase == "closing" else 600)
        await asyncio.sleep(0.2)
    running.task.cancel()
    await asyncio.sleep(0.1)
    running.task.cancel()  # twice, as impatient callers do
    with pytest.raises(asyncio.CancelledError):
        await running.end(within=LONGEST)
    assert worker._has_ended
    proxy.flow()
    if phase != "connecting":
        await eventually(lambda: ten(broker, queue_name))


async def ten(broker: Broker, queue: str) -> bool:
    return await broker.ready(queue) == 10


@pytest.mark.parametrize("on_error", ["requeue", "dead-letter", "discard"])
def test_the_end_of_the_event_loop_is_no_error_of_a_handler(
    url: str,
    queue_name: str,
    documented_calls: bool,  # noqa: FBT001 - a fixture
    on_error: Any,
) -> None:
    """`asyncio.run` cancels every task that is left: what runs is handed over again."""
    attempts: list[int] = []

    async def leave_it_running() -> None:
        worker, begun = Worker(url), asyncio.Event()

        @worker.handler(queue_name, on_error=on_error)
        async def handle(body: object) -> None:
            begun.set()
            await asyncio.Event().wait()

        async with Producer(url) as producer:
            await producer.publish(queue_name, 1)
        left_running.append(asyncio.create_task(worker.run()))
        await begun.wait()

    async def take_it() -> None:
        worker, taken = Worker(url), asyncio.Event()

        @worker.handler(queue_name)
        async def handle(body: object, delivery: Delivery) -> None:
            attempts.append(delivery.attempt)
            taken.set()

        async with worker, asyncio.timeout(PROMPT + 10):
            await taken.wait()

    left_running: list[asyncio.Task[None]] = []
    asyncio.run(leave_it_running())
    asyncio.run(take_it())
    # By documented calls the copy of what goes back may be on its way already: then there are two.
    assert len(attempts) == 1 or (documented_calls and len(attempts) == 2)
