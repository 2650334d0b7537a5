"""Batch handlers: sizes and waits, outcomes of single messages, stops, lost connections."""

from __future__ import annotations

import asyncio
import logging
import pickle
import threading
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import anyio
import anyio.lowlevel
import pytest

from aioworkq import (
    Ack,
    BatchError,
    DeadLetter,
    Delivery,
    MemoryBroker,
    Message,
    Outcome,
    Producer,
    Queue,
    Reject,
    Requeue,
    Retry,
    RetryLater,
    RetryPolicy,
    Worker,
)
from aioworkq.testing import deliver, drain
from tests.consuming import Broker, eventually, headers_of, publish_all

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioworkq.topology import QueueType
    from tests.proxy import Proxy

NOWHERE = "amqp://nowhere.invalid/"
NUMBERS = Queue("numbers", int)
LONG = 3600.0
"""Seconds: who waits for so long for others of its batch waits for ever."""

TYPES = pytest.mark.parametrize("kind", ["quorum", "classic"])


@pytest.fixture
def memory() -> MemoryBroker:
    return MemoryBroker(clock="virtual")


def recorded(worker: Worker, queue: Queue[int], **options: Any) -> list[list[int]]:
    """Register a handler that succeeds, and return the list of the batches that it gets."""
    batches: list[list[int]] = []

    @worker.batch_handler(queue, **options)
    async def handle(numbers: list[int]) -> None:
        batches.append(numbers)

    return batches


def note_attempts(
    attempts: dict[int, list[int]], numbers: list[int], deliveries: list[Delivery]
) -> None:
    """Write down which attempt of each message this is."""
    for number, delivery in zip(numbers, deliveries, strict=True):
        attempts.setdefault(number, []).append(delivery.attempt)


async def hang(numbers: list[int], cancelled: list[int]) -> None:
    """Wait for ever, and write down what was cancelled."""
    try:
        await anyio.sleep_forever()
    finally:
        cancelled.extend(numbers)


# Collecting


async def test_a_batch_is_full_or_its_oldest_has_waited(memory: MemoryBroker) -> None:
    """Full batches begin at once, the rest when `max_wait` is over, not before."""
    worker = Worker(memory)
    batches = recorded(worker, NUMBERS, max_size=4, max_wait=2)

    async with worker, Producer(memory) as producer:
        await publish_all(producer, NUMBERS, range(10))
        await memory.settle()
        assert batches == [[0, 1, 2, 3], [4, 5, 6, 7]]
        assert worker.statistics().waiting == 2
        await memory.advance(1)
        await producer.publish(NUMBERS, 10)
        await memory.advance(0.9)
        assert len(batches) == 2
        await memory.advance(0.1)
        assert batches[2:] == [[8, 9, 10]]
        await producer.publish(NUMBERS, 11)  # its time counts from its own arrival
        await memory.advance(1.9)
        assert len(batches) == 3
        await memory.advance(0.1)
        assert batches[3:] == [[11]]
        assert worker.statistics().handled == 12


async def test_the_time_of_day_holds_no_batch_up(
    memory: MemoryBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Set back by an hour, it makes no message wait for more than `max_wait` from then on."""
    worker = Worker(memory)
    batches: list[list[int]] = []
    go_on = asyncio.Event()
    now, set_back = memory.clock.now, timedelta(0)
    monkeypatch.setattr(memory.clock, "now", lambda: now() - set_back)

    @worker.batch_handler(NUMBERS, max_size=4, max_wait=2)
    async def handle(numbers: list[int]) -> None:
        batches.append(numbers)
        await go_on.wait()

    async with worker, Producer(memory) as producer:
        await producer.publish(NUMBERS, 0)
        await memory.advance(1)
        set_back += timedelta(hours=1)  # while it is waited for the first one's time
        await memory.advance(0.9)
        assert batches == []
        await memory.advance(0.1)
        assert batches == [[0]]
        await producer.publish(NUMBERS, 1)
        await memory.settle()
        set_back += timedelta(hours=1)  # while the second one waits for the only slot
        go_on.set()
        await memory.advance(2)
        assert batches[1:] == [[1]]
        await producer.publish(NUMBERS, 2)  # and all is as before
        await memory.advance(1.9)
        assert batches[2:] == []
        await memory.advance(0.1)
        assert batches[2:] == [[2]]


async def test_without_a_wait_what_is_there_is_handed_over(memory: MemoryBroker) -> None:
    """With `max_wait=0` nothing waits for others, but those that came during a run are a batch."""
    worker = Worker(memory)
    batches: list[list[int]] = []
    go_on = asyncio.Event()

    @worker.batch_handler(NUMBERS, max_wait=0)
    async def handle(numbers: list[int]) -> None:
        batches.append(numbers)
        await go_on.wait()

    async with worker, Producer(memory) as producer:
        await publish_all(producer, NUMBERS, range(5))
        await memory.settle()
        assert batches == [[0]]
        go_on.set()
        await memory.settle()
    assert batches == [[0], [1, 2, 3, 4]]


async def test_batches_on_rabbitmq(broker: Broker, url: str, queue_name: str) -> None:
    """Every message is handled once, in batches of at most `max_size`, and acked."""
    queue = Queue(queue_name, int)
    worker = Worker(url)
    batches: list[list[int]] = []

    @worker.batch_handler(queue, max_size=40, max_wait=0.05)
    async def handle(numbers: list[int], deliveries: list[Delivery]) -> None:
        assert [delivery.body for delivery in deliveries] == [b"%d" % n for n in numbers]
        assert {delivery.attempt for delivery in deliveries} == {1}
        batches.append(numbers)

    async with worker, Producer(url) as producer:
        await publish_all(producer, queue, range(1010))
        await eventually(lambda: worker.statistics().handled == 1010)
    assert [number for batch in batches for number in batch] == list(range(1010))
    assert max(map(len, batches)) <= 40
    assert await broker.ready(queue_name) == 0


async def test_concurrency_counts_batches(url: str, queue_name: str) -> None:
    """Two batches run at a time, one more fills, and RabbitMQ hands over no more than that."""
    queue = Queue(queue_name, int)
    worker = Worker(url)
    release = asyncio.Event()
    running = peak = 0

    @worker.batch_handler(queue, max_size=5, max_wait=LONG, concurrency=2)
    async def handle(numbers: list[int]) -> None:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        await release.wait()
        running -= 1

    async with worker, Producer(url) as producer:
        await publish_all(producer, queue, range(40))
        await eventually(lambda: worker.statistics().waiting == 5 and running == 2)
        assert worker.statistics().in_flight == 10
        release.set()
        await eventually(lambda: worker.statistics().handled == 40)
    assert peak == 2


async def test_plain_functions_run_in_threads(url: str, queue_name: str) -> None:
    """A plain function gets its batch in a thread, and `concurrency` of them run at a time."""
    queue = Queue(queue_name, int)
    worker = Worker(url)
    both = threading.Barrier(2, timeout=30)
    threads: list[bool] = []

    @worker.batch_handler(queue, max_size=3, max_wait=LONG, concurrency=2)
    def handle(numbers: list[int]) -> None:
        both.wait()
        threads.append(threading.current_thread() is threading.main_thread())
        raise BatchError({numbers.index(n): Reject("odd") for n in numbers if n % 2})

    async with worker, Producer(url) as producer:
        await publish_all(producer, queue, range(6))
        await eventually(lambda: worker.statistics().dead_lettered == 3)
    assert threads == [False, False]
    assert worker.statistics().handled == 3


# Outcomes


@TYPES
async def test_each_named_message_gets_its_outcome(
    broker: Broker, url: str, queue_name: str, kind: QueueType
) -> None:
    """Every outcome and every kind of exception is carried out for its message alone."""
    queue = Queue(queue_name, int, type=kind)
    worker = Worker(url)
    attempts: dict[int, list[int]] = {}

    @worker.batch_handler(queue, max_size=9, max_wait=0.2, attempts=2)
    async def handle(numbers: list[int], deliveries: list[Delivery]) -> None:
        note_attempts(attempts, numbers, deliveries)
        outcomes: dict[int, Outcome | Exception] = {
            1: Ack(),
            2: Requeue(),
            3: Retry(0.125),
            4: DeadLetter("as an outcome"),
            5: Reject("as a signal"),
            6: RetryLater(0.125),
            7: ValueError("each time"),
        }
        raise BatchError(
            {
                at: outcomes[number]
                for at, number in enumerate(numbers)
                if number in ({3, 7} if deliveries[at].attempt > 1 else outcomes)
            }
        )

    async with worker, Producer(url) as producer:
        await publish_all(producer, queue, range(9))
        await eventually(lambda: worker.statistics().handled == 3 + 2)
        await eventually(lambda: worker.statistics().dead_lettered == 4)
    assert attempts == {n: [1, 2] if n in {2, 3, 6, 7} else [1] for n in range(9)}
    dead = {
        int(one.body): headers_of(one)["x-aioworkq-reason"]
        for one in await broker.take_all(queue.dead_letter_queue)
    }
    assert dead == {
        3: "gave up after 2 attempts",
        4: "as an outcome",
        5: "as a signal",
        7: "gave up after 2 attempts",
    }
    assert worker.statistics().failed == 2
    assert worker.statistics().retried == 2
    assert await broker.ready(queue_name) == 0


@TYPES
async def test_attempts_of_a_failing_batch_are_exact(
    broker: Broker, url: str, queue_name: str, kind: QueueType
) -> None:
    """Whatever else a handler raises counts for each message: `attempts` starts, no more."""
    queue = Queue(queue_name, int, type=kind)
    worker = Worker(url)
    attempts: dict[int, list[int]] = {}

    @worker.batch_handler(queue, max_size=6, max_wait=0.05, attempts=3)
    async def handle(numbers: list[int], deliveries: list[Delivery]) -> None:
        note_attempts(attempts, numbers, deliveries)
        raise ValueError("never works")

    async with worker, Producer(url) as producer:
        await publish_all(producer, queue, range(6))
        await eventually(lambda: worker.statistics().dead_lettered == 6)
    assert attempts == {number: [1, 2, 3] for number in range(6)}
    assert worker.statistics().failed == 18
    assert {
        headers_of(one)["x-aioworkq-attempts"]
        for one in await broker.take_all(queue.dead_letter_queue)
    } == {3}


async def test_a_retry_policy_makes_copies(memory: MemoryBroker) -> None:
    """Each failed message waits in the broker for the policy's delay, and is counted."""
    worker = Worker(memory)
    attempts: list[list[int]] = []

    @worker.batch_handler(
        NUMBERS, max_size=3, max_wait=1, retry=RetryPolicy(attempts=3, first=8, jitter=0)
    )
    async def handle(numbers: list[int], deliveries: list[Delivery]) -> None:
        attempts.append([delivery.attempt for delivery in deliveries])
        raise ValueError("never works")

    async with worker, Producer(memory) as producer:
        await publish_all(producer, NUMBERS, range(3))
        await memory.advance(7)
        assert attempts == [[1, 1, 1]]
        assert worker.statistics().in_flight == worker.statistics().waiting == 0
        await memory.advance(60)
    assert attempts == [[1, 1, 1], [2, 2, 2], [3, 3, 3]]
    assert sorted(memory.dead(NUMBERS)) == [0, 1, 2]


async def test_a_pause_holds_nobody_up(memory: MemoryBroker) -> None:
    """While one message is kept for its pause, the others are acked and the next batch runs."""
    worker = Worker(memory)
    batches: list[list[int]] = []

    @worker.batch_handler(NUMBERS, max_size=3, max_wait=1)
    async def handle(numbers: list[int]) -> None:
        batches.append(numbers)
        if len(batches) == 1:
            raise BatchError({0: Requeue(pause=100)})

    async with worker, Producer(memory) as producer:
        await publish_all(producer, NUMBERS, range(6))
        await memory.settle()
        assert batches == [[0, 1, 2], [3, 4, 5]]
        assert (worker.statistics().handled, worker.statistics().in_flight) == (5, 1)
        await memory.advance(99)
        assert len(batches) == 2
        await memory.advance(2)
        assert batches[2:] == [[0]]


async def check_all_fail(memory: MemoryBroker, fail: Callable[[], None], sentence: str) -> None:
    """Check that a batch fails as a whole, each message with an error that says this."""
    worker = Worker(memory)
    errors: list[str] = []

    def decide(exc: Exception, delivery: Delivery) -> Outcome:
        errors.append(str(exc))
        return DeadLetter("wrong")

    @worker.batch_handler(NUMBERS, max_size=2, on_error=decide)
    async def handle(numbers: list[int]) -> None:
        fail()

    async with Producer(memory) as producer:
        await publish_all(producer, NUMBERS, range(2))
    drained = await drain(worker)
    assert (drained.handled, drained.failed, drained.dead_lettered) == (0, 2, 2)
    assert len(errors) == 2
    assert all(sentence in error for error in errors)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({2: Reject()}, "BatchError names the item 2: the batch has 2, counted from 0."),
        (
            {0: "no"},
            "BatchError says of item 0 'no': it must be Ack, Requeue, Retry or DeadLetter.",
        ),
        (
            {0: Requeue(pause=-1)},
            "BatchError says of item 0 Requeue(pause=-1, counts=True): that is no number of",
        ),
        ({-1: Reject()}, "BatchError names the item -1: positions in the list of bodies count"),
        ({"0": Reject()}, "BatchError names the item '0': it must be a position in the list"),
        ({True: Reject()}, "BatchError names the item True: it must be a position in the list"),
        ({0: ValueError}, "BatchError names <class 'ValueError'> for item 0: it must be an"),
        ({0: asyncio.CancelledError()}, "BatchError names CancelledError() for item 0: it must"),
        ({0: BatchError({})}, "for item 0: it must be an outcome, or an instance of Exception"),
        (5, "BatchError takes a mapping of positions in the batch to outcomes, not 5."),
    ],
    ids=repr,
)
async def test_a_wrong_batch_error_loses_nothing(
    memory: MemoryBroker, wrong: Any, sentence: str
) -> None:
    """Then every message of the batch fails, and the sentence says what was wrong."""

    def fail() -> None:
        raise BatchError(wrong)

    await check_all_fail(memory, fail, sentence)


class UnpreparedError(BatchError):
    """One whose class forgets to call its base."""

    def __init__(self, *_: object) -> None:
        pass


class Unprintable:
    """A value that cannot be shown."""

    def __repr__(self) -> str:
        raise LookupError("no text")


def changed(outcomes: Any) -> BatchError:
    """Return an error whose outcomes were changed after it was made."""
    error = BatchError({})
    error.outcomes = outcomes
    return error


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (UnpreparedError(), "has no attribute 'outcomes'"),
        (changed(None), "has no attribute 'items'"),
        (
            changed({-1: LookupError()}),
            "BatchError names the item -1: positions in the list of bodies count",
        ),
        (BatchError({0: cast("Any", Unprintable())}), "no text"),
    ],
    ids=["of an unprepared class", "without a mapping", "changed afterwards", "unprintable"],
)
async def test_a_broken_batch_error_ends_no_worker(
    memory: MemoryBroker, error: BatchError, sentence: str
) -> None:
    """Every message of the batch fails because of it, none is acked, and the worker goes on."""

    def fail() -> None:
        raise error

    await check_all_fail(memory, fail, sentence)


def test_a_batch_error_keeps_what_it_was_given() -> None:
    """It can be read, printed and pickled; one that names nothing is allowed."""
    error: BatchError = pickle.loads(  # noqa: S301 - our own bytes
        pickle.dumps(BatchError({3: DeadLetter("no address")})),
    )
    assert error.outcomes == {3: DeadLetter("no address")}
    assert str(error) == (
        "not all of the batch is done: 3: DeadLetter(reason='no address', failure=None)."
    )
    assert str(BatchError({})) == "not all of the batch is done: no item is named."


async def test_a_batch_error_that_names_nothing_acks_all(memory: MemoryBroker) -> None:
    """A handler may collect failures, find none, and raise all the same."""
    worker = Worker(memory)

    @worker.batch_handler(NUMBERS)
    async def handle(numbers: list[int]) -> None:
        raise BatchError({})

    async with Producer(memory) as producer:
        await publish_all(producer, NUMBERS, range(3))
    assert (await drain(worker)).handled == 3


async def test_a_failing_batch_is_one_line_in_the_log(
    memory: MemoryBroker, caplog: pytest.LogCaptureFixture
) -> None:
    """It names the handler, how many messages there were, and what became of them."""
    worker = Worker(memory)

    @worker.batch_handler(NUMBERS, on_error="dead-letter")
    async def handle(numbers: list[int]) -> None:
        raise LookupError("all of them")

    async with Producer(memory) as producer:
        await publish_all(producer, NUMBERS, range(7))
    with caplog.at_level(logging.WARNING, "aioworkq"):
        await drain(worker)
    lines = [r.getMessage() for r in caplog.records if r.exc_info]
    assert len(lines) == 1
    assert lines[0].endswith("failed on a batch of 7 messages from 'numbers': 7 DeadLetter.")


@TYPES
async def test_what_cannot_be_handled_is_in_no_batch(
    broker: Broker, url: str, queue_name: str, kind: QueueType
) -> None:
    """Undecodable messages, and such without an attempt left, are dead-lettered by themselves."""
    queue = Queue(queue_name, int, type=kind)
    worker = Worker(url)
    batches = recorded(worker, queue, max_size=5, max_wait=LONG, attempts=3)

    async with worker, Producer(url) as producer:
        await producer.publish(queue, 0)
        await broker.publish(queue_name, b"no number", content_type="application/json")
        await producer.publish(queue, 1)
        await broker.publish(
            queue_name,
            b"2",
            content_type="application/json",
            headers={"x-aioworkq-attempts": 3},
        )
        await producer.publish(queue, 3)
        await eventually(lambda: worker.statistics().handled == 3)
        await eventually(lambda: worker.statistics().dead_lettered == 2)
    assert batches == [[0, 1, 3]]
    assert {one.body for one in await broker.take_all(queue.dead_letter_queue)} == {
        b"no number",
        b"2",
    }


async def test_nothing_to_hand_over_is_no_call(memory: MemoryBroker) -> None:
    """A handler never gets an empty list."""
    worker = Worker(memory)
    batches = recorded(worker, NUMBERS)

    async with Producer(memory) as producer:
        await publish_all(producer, NUMBERS.name, ["one", "two"])
    assert (await drain(worker)).dead_lettered == 2
    assert batches == []


async def test_an_outage_uses_few_attempts(memory: MemoryBroker) -> None:
    """While every batch fails, messages are tried one by one; then batches are full again."""
    worker = Worker(memory)
    sizes: list[int] = []
    is_up = False

    @worker.batch_handler(NUMBERS, max_size=10, max_wait=1)
    async def handle(numbers: list[int]) -> None:
        sizes.append(len(numbers))
        if not is_up:
            raise ConnectionError("the database is down")

    async with worker, Producer(memory) as producer:
        await publish_all(producer, NUMBERS, range(200))
        await memory.advance(120)
        assert worker.statistics().consumers["numbers"].is_slowed
        assert (max(sizes), sizes[-1]) == (10, 1)
        is_up = True
        del sizes[:]
        await memory.advance(60)
        assert (sizes[0], max(sizes)) == (1, 10)
        assert worker.statistics().handled == 200
        assert worker.statistics().dead_lettered == 0


# Time limits


@TYPES
async def test_a_batch_that_exceeds_its_time(
    broker: Broker, url: str, queue_name: str, kind: QueueType
) -> None:
    """A coroutine is cancelled, and each of its messages fails with a TimeoutError."""
    queue = Queue(queue_name, int, type=kind)
    worker = Worker(url)
    cancelled: list[int] = []

    @worker.batch_handler(queue, max_size=3, max_wait=LONG, timeout=0.1, on_error="dead-letter")
    async def handle(numbers: list[int]) -> None:
        await hang(numbers, cancelled)

    async with worker, Producer(url) as producer:
        await publish_all(producer, queue, range(3))
        await eventually(lambda: worker.statistics().dead_lettered == 3)
    assert cancelled == [0, 1, 2]
    for one in await broker.take_all(queue.dead_letter_queue):
        assert headers_of(one)["x-aioworkq-reason"] == "failed: TimeoutError"
        assert headers_of(one)["x-aioworkq-exception-message"] == "the handler exceeded 0.1 s"


async def test_a_thread_that_exceeds_its_time_keeps_its_slot(url: str, queue_name: str) -> None:
    """Its messages are settled; their copies, and all other batches, wait for its end."""
    queue = Queue(queue_name, int)
    worker = Worker(url)
    release = threading.Event()
    log: list[object] = []

    @worker.batch_handler(
        queue,
        max_size=2,
        max_wait=LONG,
        timeout=2,
        retry=RetryPolicy(attempts=3, first=0.125, jitter=0),
    )
    def handle(numbers: list[int], deliveries: list[Delivery]) -> None:
        log.append(sorted(numbers))
        if deliveries[0].attempt == 1:
            release.wait(60)
            log.append("ends")

    async with worker, Producer(url) as producer:
        await publish_all(producer, queue, range(2))
        await eventually(lambda: worker.statistics().waiting == 2)  # the copies
        assert worker.statistics().retried == 2
        release.set()
        await eventually(lambda: worker.statistics().handled == 2)
    assert log[:2] == [[0, 1], "ends"]
    assert worker.statistics().failed == 2


# Stopping


@TYPES
async def test_a_stop_hands_over_the_last_batch(
    broker: Broker, url: str, queue_name: str, kind: QueueType
) -> None:
    """What waits for the rest of its batch when the worker stops is handled, and acked."""
    queue = Queue(queue_name, int, type=kind)
    worker = Worker(url)
    batches: list[list[int]] = []

    @worker.batch_handler(queue, max_size=100, max_wait=LONG)
    async def handle(numbers: list[int]) -> None:
        await anyio.lowlevel.checkpoint()
        batches.append(numbers)

    async with worker, Producer(url) as producer:
        await publish_all(producer, queue, range(7))
        await eventually(lambda: worker.statistics().waiting == 7)
    assert batches == [list(range(7))]
    assert worker.statistics().handled == 7
    assert await broker.ready(queue_name) == 0


@TYPES
async def test_without_grace_a_waiting_batch_goes_back(
    url: str, queue_name: str, kind: QueueType
) -> None:
    """With `grace=0` nothing is started at a stop, and nobody is charged an attempt."""
    queue = Queue(queue_name, int, type=kind)
    first, second = Worker(url, grace=0), Worker(url)
    seen: dict[str, list[tuple[int, int]]] = {"first": [], "second": []}

    def register(worker: Worker, name: str) -> None:
        @worker.batch_handler(queue, max_size=7, max_wait=LONG if name == "first" else 0.1)
        async def handle(numbers: list[int], deliveries: list[Delivery]) -> None:
            attempts = [delivery.attempt for delivery in deliveries]
            seen[name] += zip(numbers, attempts, strict=True)

    register(first, "first")
    register(second, "second")
    async with Producer(url) as producer:
        async with first:
            await publish_all(producer, queue, range(6))
            await eventually(lambda: first.statistics().waiting == 6)
        async with second:
            await eventually(lambda: len(seen["second"]) == 6)
    assert seen["first"] == []
    assert sorted(seen["second"]) == [(number, 1) for number in range(6)]


@pytest.mark.parametrize("grace", [30, 0])
async def test_a_stop_while_a_batch_runs(
    broker: Broker, url: str, queue_name: str, grace: float
) -> None:
    """It gets the grace period, then it is cancelled and goes back; what waited goes back."""
    queue = Queue(queue_name, int)
    worker = Worker(url, grace=grace)
    release = asyncio.Event()
    started: list[list[int]] = []

    @worker.batch_handler(queue, max_size=3, max_wait=LONG)
    async def handle(numbers: list[int]) -> None:
        started.append(numbers)
        await release.wait()

    async with anyio.create_task_group() as tasks, Producer(url) as producer:
        await tasks.start(worker.run)
        await publish_all(producer, queue, range(5))
        await eventually(lambda: started and worker.statistics().waiting == 2)
        worker.stop()
        await eventually(lambda: worker.statistics().waiting == 0)
        release.set() if grace else None
    assert started == [[0, 1, 2]]
    left = {int(one.body) for one in await broker.take_all(queue_name)}
    assert left == ({3, 4} if grace else {0, 1, 2, 3, 4})
    assert worker.statistics().handled == (3 if grace else 0)


@pytest.mark.parametrize("by_task", [False, True])
async def test_cancelling_the_worker_starts_nothing(
    broker: Broker, url: str, queue_name: str, *, by_task: bool
) -> None:
    """Only a stop hands over a last batch: cancelled, the worker gives back what waits."""
    queue = Queue(queue_name, int)
    worker = Worker(url)
    batches = recorded(worker, queue, max_wait=LONG)
    scope = anyio.CancelScope()

    async def run() -> None:
        with scope:
            await worker.run()

    task = asyncio.create_task(run())
    async with Producer(url) as producer:
        await publish_all(producer, queue, range(5))
        await eventually(lambda: worker.statistics().waiting == 5)
        (task if by_task else scope).cancel()
        await asyncio.wait({task})
    assert batches == []
    assert len(await broker.take_all(queue_name)) == 5


async def test_a_stop_ends_pauses(url: str, queue_name: str) -> None:
    """A message that is kept for a moment goes back when the worker stops."""
    queue = Queue(queue_name, int)
    worker = Worker(url)

    @worker.batch_handler(queue, max_size=2, max_wait=LONG)
    async def handle(numbers: list[int]) -> None:
        raise BatchError({0: Requeue(pause=LONG)})

    async with worker, Producer(url) as producer:
        await publish_all(producer, queue, range(2))
        await eventually(lambda: worker.statistics().handled == 1)
    assert worker.statistics().requeued == 1


async def test_a_stop_does_not_wait_for_a_thread_without_grace(
    broker: Broker, url: str, queue_name: str
) -> None:
    """The messages of a thread whose time is up are settled; nobody waits for its end."""
    queue = Queue(queue_name, int)
    worker = Worker(url, grace=0)
    release = threading.Event()

    @worker.batch_handler(queue, max_size=2, max_wait=LONG, timeout=2, on_error="dead-letter")
    def handle(numbers: list[int]) -> None:
        release.wait(60)

    async with worker, Producer(url) as producer:
        await publish_all(producer, queue, range(2))
        await eventually(lambda: worker.statistics().dead_lettered == 2)
        assert worker.statistics().in_flight == 2
    assert not release.is_set()
    release.set()
    assert await broker.ready(queue.dead_letter_queue) == 2


# Lost connections


@TYPES
async def test_a_lost_connection_runs_nothing_twice(
    broker: Broker, proxy: Proxy, proxy_url: str, queue_name: str, kind: QueueType
) -> None:
    """The batch goes on; its redeliveries wait for it, and are acked without a second run."""
    queue = Queue(queue_name, int, type=kind)
    worker = Worker(proxy_url)
    release = asyncio.Event()
    started: list[int] = []
    lost: list[bool] = []

    @worker.batch_handler(queue, max_size=4, max_wait=LONG, concurrency=2)
    async def handle(numbers: list[int], deliveries: list[Delivery]) -> None:
        started.extend(numbers)
        await release.wait()
        lost.extend(delivery.lost for delivery in deliveries)

    async with worker:
        for number in range(4):
            await broker.publish(
                queue_name, b"%d" % number, message_id=str(number), content_type="application/json"
            )
        await eventually(lambda: len(started) == 4)
        proxy.cut()
        await eventually(lambda: worker.statistics().waiting == 4)
        release.set()
        await eventually(lambda: worker.statistics().duplicates == 4)
    assert sorted(started) == [0, 1, 2, 3]
    assert lost == [True] * 4
    assert worker.statistics().handled == 4
    assert worker.statistics().stale_settles == 4
    assert await broker.ready(queue_name) == 0


@TYPES
async def test_many_losses_lose_nothing(
    broker: Broker, proxy: Proxy, proxy_url: str, url: str, queue_name: str, kind: QueueType
) -> None:
    """Lost again and again, while some messages fail and some are refused: each has its end."""
    queue = Queue(queue_name, int, type=kind)
    worker = Worker(proxy_url)
    handled: set[int] = set()
    failed: set[int] = set()

    @worker.batch_handler(queue, max_size=20, max_wait=0.05, concurrency=2, attempts=5)
    async def handle(numbers: list[int]) -> None:
        await anyio.lowlevel.checkpoint()
        named: dict[int, Outcome | Exception] = {}
        for position, number in enumerate(numbers):
            if number % 10 == 3:
                named[position] = Reject("three")
            elif number % 10 == 5 and number not in failed:
                failed.add(number)
                named[position] = ValueError("five")
            else:
                handled.add(number)
        raise BatchError(named)

    async with worker, Producer(url) as producer:
        for start in range(0, 500, 50):
            await publish_all(producer, queue, range(start, start + 50))
            proxy.cut()
        await eventually(lambda: len(handled) == 450)
        dead: dict[int, str] = {}

        async def all_are_dead() -> bool:
            for one in await broker.take_all(queue.dead_letter_queue):
                dead[int(one.body)] = headers_of(one)["x-aioworkq-reason"]
            return len(dead) >= 50

        await eventually(all_are_dead)
    assert dead == dict.fromkeys(range(3, 500, 10), "three")


async def test_a_lost_connection_may_cancel_a_batch(
    proxy: Proxy, proxy_url: str, url: str, queue_name: str
) -> None:
    """With `on_connection_loss="cancel"` it is cancelled, and handed over again."""
    queue = Queue(queue_name, int)
    worker = Worker(proxy_url)
    started: list[list[int]] = []
    cancelled: list[int] = []

    @worker.batch_handler(queue, max_size=3, max_wait=LONG, on_connection_loss="cancel")
    async def handle(numbers: list[int]) -> None:
        started.append(sorted(numbers))
        if len(started) == 1:
            await hang(numbers, cancelled)

    async with worker, Producer(url) as producer:
        await publish_all(producer, queue, range(3))
        await eventually(lambda: started)
        proxy.cut()
        await eventually(lambda: worker.statistics().handled == 3)
    assert started == [[0, 1, 2], [0, 1, 2]]
    assert cancelled == [0, 1, 2]
    assert worker.statistics().failed == 0


async def test_what_waits_when_the_connection_is_lost_comes_again(
    proxy: Proxy, proxy_url: str, url: str, queue_name: str
) -> None:
    """An incomplete batch is forgotten with its connection, and is no attempt."""
    queue = Queue(queue_name, int)
    worker = Worker(proxy_url)
    seen: list[tuple[int, int]] = []

    @worker.batch_handler(queue, max_size=4, max_wait=LONG)
    async def handle(numbers: list[int], deliveries: list[Delivery]) -> None:
        seen.extend(zip(numbers, [one.attempt for one in deliveries], strict=True))

    async with worker, Producer(url) as producer:
        await publish_all(producer, queue, range(3))
        await eventually(lambda: worker.statistics().waiting == 3)
        proxy.cut()
        await eventually(lambda: worker.statistics().consumers[queue_name].losses == 1)
        await eventually(lambda: worker.statistics().waiting == 3)
        await producer.publish(queue, 3)
        await eventually(lambda: worker.statistics().handled == 4)
    assert sorted(seen) == [(number, 1) for number in range(4)]


@TYPES
async def test_a_suspect_is_tried_alone(
    broker: Broker, proxy: Proxy, proxy_url: str, queue_name: str, kind: QueueType
) -> None:
    """After lost starts the last one is a batch of one each, and none is given up for the others.

    A worker that vanishes with its connection is, to RabbitMQ, one that died.
    """
    queue = Queue(queue_name, int, type=kind)
    starts: list[list[int]] = []
    async with Producer(proxy_url) as producer:
        await publish_all(producer, queue, range(3))
    first = Worker(proxy_url)
    started = asyncio.Event()

    @first.batch_handler(queue, max_size=3, max_wait=0.5, attempts=2)
    async def stay(numbers: list[int]) -> None:
        started.set()
        await anyio.sleep_forever()

    async with anyio.create_task_group() as tasks:
        await tasks.start(first.run)
        await started.wait()
        proxy.refuse()
        proxy.cut()
        await eventually(lambda: not first.statistics().is_connected)
        tasks.cancel_scope.cancel()
    proxy.accept()
    second = Worker(proxy_url)

    @second.batch_handler(queue, max_size=3, max_wait=0.05, attempts=2)
    async def handle(numbers: list[int], deliveries: list[Delivery]) -> None:
        assert [delivery.attempt for delivery in deliveries] == [2]
        starts.append(numbers)

    async with second:
        await eventually(lambda: second.statistics().handled == 3)
    assert sorted(starts) == [[0], [1], [2]]
    assert second.statistics().dead_lettered == 0
    assert await broker.ready(queue_name) == 0


# In tests


@pytest.mark.parametrize(
    ("number", "outcome"),
    [(0, Ack()), (1, Requeue(pause=0.1)), (2, DeadLetter("no")), (3, Retry(5))],
)
async def test_deliver_hands_over_a_batch_of_one(number: int, outcome: Outcome) -> None:
    """A batch handler can be tested like another one, and waits for no others then."""
    worker = Worker(NOWHERE)

    @worker.batch_handler(NUMBERS, max_wait=LONG)
    async def handle(numbers: list[int], deliveries: list[Delivery]) -> None:
        assert len(numbers) == len(deliveries) == 1
        match numbers[0]:
            case 1:
                raise LookupError
            case 2:
                raise BatchError({0: DeadLetter("no")})
            case 3:
                raise BatchError({0: RetryLater(5)})
            case _:
                pass

    assert await deliver(worker, NUMBERS, number) == outcome


async def test_deliver_of_what_cannot_be_decoded() -> None:
    """What is in no batch has an outcome too."""
    worker = Worker(NOWHERE)

    @worker.batch_handler(NUMBERS, max_wait=LONG)
    async def handle(numbers: list[int]) -> None: ...

    outcome = await deliver(worker, NUMBERS, Message(b"no number", "numbers"))
    assert isinstance(outcome, DeadLetter)


async def test_drain_lets_batches_wait_in_virtual_time(memory: MemoryBroker) -> None:
    """An incomplete batch is handled when its hour has passed, which takes no time."""
    worker = Worker(memory)
    batches: list[list[int]] = []

    @worker.batch_handler(NUMBERS, max_size=4, max_wait=LONG)
    async def handle(numbers: list[int]) -> None:
        batches.append(numbers)
        if numbers == [4, 5]:
            raise LookupError

    async with Producer(memory) as producer:
        await publish_all(producer, NUMBERS, range(6))
    drained = await drain(worker)
    assert batches[:2] == [[0, 1, 2, 3], [4, 5]]
    assert (drained.failed, drained.dead_lettered) == (2 * 20, 2)


# Registering


def test_the_decorator_returns_the_function() -> None:
    """A batch handler stays a function, and its options are those that were asked for."""
    worker = Worker(NOWHERE)

    def handle(numbers: list[int]) -> int:
        return sum(numbers)

    assert worker.batch_handler(NUMBERS, max_size=50, concurrency=3)(handle) is handle
    assert worker._handlers["numbers"].prefetch_count == 200
    worker.batch_handler("huge", max_size=60_000)(handle)
    assert worker._handlers["huge"].prefetch_count == 65_535
    assert handle([1, 2]) == 3


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_size": 0}, "max_size is 0: it must be a whole number from 1 to 65535"),
        ({"max_size": 2.5}, "max_size is 2.5: it must be a whole number from 1 to 65535"),
        ({"max_size": 65_536}, "max_size is 65536: it must be a whole number from 1 to 65535"),
        ({"max_wait": -1}, "max_wait is -1: it must be a number of seconds, 0 or more."),
        ({"max_wait": float("inf")}, "max_wait is inf: it must be a number of seconds"),
        ({"max_wait": float("nan")}, "max_wait is nan: it must be a number of seconds"),
        ({"concurrency": 0}, "concurrency is 0: it must be a whole number from 1."),
        (
            {"max_size": 10, "prefetch_count": 9},
            "prefetch_count is 9: no batch would ever have its max_size of 10 messages.",
        ),
        ({"attempts": 0}, "attempts is 0: it must be a whole number from 1, or None."),
    ],
    ids=repr,
)
def test_options_out_of_range(options: dict[str, Any], sentence: str) -> None:
    """A bad option is refused where it is given."""
    worker = Worker(NOWHERE)

    def handle(bodies: list[Any]) -> None: ...

    with pytest.raises(ValueError) as caught:
        worker.batch_handler("q", **options)(handle)
    assert sentence in str(caught.value)


def no_list(body: str) -> None: ...
def other_items(bodies: list[int]) -> None: ...
def a_set(bodies: set[str]) -> None: ...
def one_delivery(bodies: list[str], delivery: Delivery) -> None: ...
def two_lists(bodies: list[str], others: list[str]) -> None: ...
def deliveries_twice(bodies: list[str], one: list[Delivery], two: list[Delivery]) -> None: ...


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (no_list, "takes str, but a batch handler takes a list of bodies. Write it as `async def"),
        (other_items, "takes a list of int, but the bodies of queue 'q' are str: annotate the"),
        (a_set, "takes set, but a batch handler takes a list of bodies"),
        (one_delivery, "gets many deliveries at a time. Write it as"),
        (two_lists, "must take the bodies in exactly one parameter; it has 'bodies', 'others'"),
        (deliveries_twice, "asks for the deliveries twice"),
    ],
)
def test_functions_that_are_no_batch_handlers(function: Callable[..., Any], sentence: str) -> None:
    """A function that cannot be called with a list is refused when it is registered."""
    worker = Worker(NOWHERE)
    with pytest.raises(TypeError) as caught:
        worker.batch_handler(Queue("q", str))(function)
    assert sentence in str(caught.value)


async def test_deliveries_may_be_asked_for_with_a_default(memory: MemoryBroker) -> None:
    """So that the function can be called without them, in tests."""
    worker = Worker(memory)
    seen: list[str] = []

    @worker.batch_handler(NUMBERS)
    async def handle(numbers: list[int], deliveries: list[Delivery] | None = None) -> None:
        seen.extend(delivery.message_id for delivery in deliveries or ())

    def quoted(bodies: list[int], deliveries: list[Delivery] | None = None) -> None: ...

    # As under TYPE_CHECKING, where nothing can be looked up.
    quoted.__annotations__ = {"bodies": "list[Unknown]", "deliveries": "list[Delivery] | None"}
    worker.batch_handler(Queue("quoted", int))(quoted)
    assert worker._handlers["quoted"].delivery_parameter == "deliveries"
    async with Producer(memory) as producer:
        ids = [await producer.publish(NUMBERS, number) for number in range(3)]
    await drain(worker)
    assert seen == ids


async def test_a_wait_that_somebody_cancels_holds_no_batch_up(memory: MemoryBroker) -> None:
    """The task that waits is named as the handlers' are: an application may cancel it, too."""
    worker = Worker(memory)
    batches = recorded(worker, NUMBERS, max_wait=10)
    async with worker, Producer(memory) as producer:
        await producer.publish(NUMBERS, 1)
        await memory.settle()
        (waits,) = (one for one in asyncio.all_tasks() if "handles" in one.get_name())
        waits.cancel()
        await memory.advance(20)
        assert batches == [[1]]


async def test_the_type_of_a_bare_queue_is_that_of_the_items(memory: MemoryBroker) -> None:
    """With a name alone, the annotation says what the bodies are."""
    worker = Worker(memory)
    seen: list[object] = []

    @worker.batch_handler("numbers")
    async def handle(numbers: list[int]) -> None:
        seen.extend(numbers)

    async with Producer(memory) as producer:
        await publish_all(producer, "numbers", [1, "two", 3])
    assert (await drain(worker)).dead_lettered == 1
    assert seen == [1, 3]


async def test_a_batch_error_of_a_single_handler_is_an_error(memory: MemoryBroker) -> None:
    """Only a batch handler has items to name."""
    worker = Worker(memory)

    @worker.handler(NUMBERS, on_error="dead-letter")
    async def handle(number: int) -> None:
        raise BatchError({0: Ack()})

    outcome = await deliver(worker, NUMBERS, 1)
    assert isinstance(outcome, DeadLetter)
    assert outcome.reason == "failed: aioworkq.errors.BatchError"
