"""Workers in applications that do as they like: cancel, stop, enter and choose."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import sys
from datetime import timedelta
from decimal import Decimal
from typing import Any

import anyio
import pytest

import aioworkq
from aioworkq import (
    DeadLetters,
    MemoryBroker,
    Producer,
    Queue,
    Reject,
    Requeue,
    RetryLater,
    RetryPolicy,
    StateError,
    Worker,
)
from aioworkq.message import ATTEMPTS, TRIAL, Message
from aioworkq.trials import _mark
from tests.consuming import eventually


@pytest.mark.parametrize("steps", range(1, 40, 3))
@pytest.mark.parametrize("kind", ["retry", "dead letter", "requeue"])
async def test_a_handlers_task_that_is_cancelled_while_it_is_settled(kind: str, steps: int) -> None:
    """An application may keep the task, to cancel a job: then, too, nothing stays unsettled."""
    broker = MemoryBroker()
    worker, tasks = Worker(broker), list[asyncio.Task[Any] | None]()
    options: dict[str, dict[str, Any]] = {
        "retry": {"retry": RetryPolicy(first=3600)},
        "dead letter": {"on_error": "dead-letter"},
        "requeue": {"attempts": 2},
    }

    @worker.handler(Queue("q", int, type="classic"), concurrency=1, **options[kind])
    async def handle(number: int) -> None:
        tasks.append(asyncio.current_task())
        raise ValueError(number)

    async with worker, Producer(broker) as producer:
        for number in range(3):
            await producer.publish(Queue("q", int, type="classic"), number)
        seen = 0
        while len(tasks) < 3:
            await eventually(lambda: len(tasks) > seen)  # noqa: B023 - called at once
            seen = len(tasks)
            for _ in range(steps):
                await asyncio.sleep(0)
            for task in tasks:
                if task is not None:
                    task.cancel()
        await eventually(lambda: broker.counts("q") == (0, 0))


def test_a_stop_in_the_handler_of_a_signal_is_at_once() -> None:
    """The event loop is asleep then, though it counts as running."""
    program = """
import asyncio, signal
from aioworkq import MemoryBroker, Worker

async def main():
    worker = Worker(MemoryBroker())

    @worker.handler("q")
    async def handle(body): pass

    signal.signal(signal.SIGALRM, lambda *_: worker.stop())
    running = asyncio.create_task(worker.run())
    await worker.wait_ready()
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    async with asyncio.timeout(20):
        await running

asyncio.run(main())
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


async def test_run_is_for_the_main_thread() -> None:
    """Elsewhere signals cannot be handled: it says what to do instead."""
    with pytest.raises(RuntimeError, match="main thread only"):
        await asyncio.to_thread(aioworkq.run, Worker(MemoryBroker()))


async def test_a_second_entry_harms_nobody() -> None:
    """It is refused, and the worker that runs goes on."""
    worker = Worker(MemoryBroker())

    @worker.handler("q")
    async def handle(body: object) -> None:
        pass

    async with worker:
        for _ in range(2):
            with pytest.raises(StateError, match="it runs already"):
                async with worker:
                    pass
        assert worker.is_ready
    with pytest.raises(StateError, match="it has ended"):
        async with worker:
            pass


async def test_what_chooses_dead_letters() -> None:
    """Anything true or false will do; what chooses all of them by mistake is refused."""
    broker, queue = MemoryBroker(), Queue("q", int)
    worker = Worker(broker)

    @worker.handler(queue)
    async def handle(number: int) -> None:
        raise Reject("odd" if number % 2 else "even")

    async with worker, Producer(broker) as producer:
        await producer.publish_many(queue, range(4))
        await eventually(lambda: worker.statistics().dead_lettered == 4)

    async def never(_: object) -> bool:
        return False

    wrong: list[Any] = [never, lambda _: never(0), "odd"]
    async with DeadLetters(broker, queue) as dead:
        for where in wrong:
            for call in (dead.replay, dead.purge):
                with pytest.raises(TypeError, match=r"^where"):
                    await call(where)
        chosen: Any = lambda one: one.reason == "odd" and "yes"  # noqa: E731
        assert await dead.purge(chosen) == 2
        assert [one.reason for one in await dead.peek()] == ["even"] * 2
    with pytest.raises(StateError, match="Make a new DeadLetters"):
        await dead.__aenter__()


MINUTE: Any = timedelta(minutes=1)


@pytest.mark.parametrize(
    "call",
    [
        lambda: RetryLater(MINUTE),
        lambda: RetryPolicy(first=MINUTE),
        lambda: RetryPolicy(max=MINUTE),
        lambda: Producer("amqp://localhost", timeout=MINUTE),
        lambda: Worker("amqp://localhost", grace=MINUTE),
        lambda: Worker("amqp://localhost").handler("q", timeout=MINUTE),
        lambda: Worker("amqp://localhost").batch_handler("q", max_size=1, max_wait=MINUTE),
    ],
)
def test_a_time_that_is_no_number_is_a_type_error(call: Any) -> None:
    """It says so, and what to write."""
    with pytest.raises(TypeError, match=r"must be a number\. Write `\.total_seconds\(\)`"):
        call()


async def test_a_time_that_is_no_number_is_not_published() -> None:
    """Not as a delay, an expiration or a time limit."""
    async with Producer(MemoryBroker()) as producer:
        for name in ("delay", "expiration", "timeout"):
            for value in (MINUTE, "5", True):
                options: dict[str, Any] = {name: value}
                with pytest.raises(TypeError, match=f"{name} is .* must be a number"):
                    await producer.publish("q", 1, **options)


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"on": [ValueError]}, TypeError, "on is .*: it must be an exception class, or a tuple"),
        ({"on": "ValueError"}, TypeError, "on is 'ValueError'"),
        ({"give_up_on": (ValueError, 5)}, TypeError, "give_up_on is .* it must be an exception"),
        ({"attempts": 2.5}, ValueError, "attempts is 2.5: it must be a whole number from 1"),
        ({"attempts": True}, ValueError, "attempts is True"),
    ],
)
def test_a_policy_that_cannot_be_is_refused(
    options: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    """Where it is made, and not when a handler fails for the first time."""
    with pytest.raises(error, match=sentence):
        RetryPolicy(**options)
    retry: Any = "3 times"
    with pytest.raises(TypeError, match="retry is '3 times': it must be a RetryPolicy"):
        Worker("amqp://localhost").handler("q", retry=retry)


def test_equal_messages_have_marks_of_their_own() -> None:
    """The copy for a trial has a number, as its redeliveries do; an equal message has another."""

    def copy(trial: object) -> Message:
        return Message(b"body", "q", headers={TRIAL: trial})

    assert _mark(copy("1")) == _mark(copy("1"))
    assert len({_mark(copy("1")), _mark(copy("2")), _mark(copy(True))}) == 3


class InterruptedQueryError(Exception):
    """What a driver makes of a cancellation."""


async def translated() -> None:
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        raise InterruptedQueryError from None


async def failing_cleanup() -> None:
    async def child() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise InterruptedQueryError

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(child())
        await asyncio.Event().wait()


@pytest.mark.parametrize("is_batch", [False, True])
@pytest.mark.parametrize("by_task", [False, True])
async def test_a_cancelled_worker_starts_no_trial(*, is_batch: bool, by_task: bool) -> None:
    """A message waits for the others to end, to be tried alone: it goes back unstarted."""
    broker, bodies = MemoryBroker(), list[object]()
    worker, scope = Worker(broker), anyio.CancelScope()

    async def handle(body: Any) -> None:
        bodies.append(body)
        await asyncio.Event().wait()

    if is_batch:
        worker.batch_handler("q", max_wait=0)(handle)
    else:
        worker.handler("q")(handle)

    async def run() -> None:
        with scope:
            await worker.run()

    task = asyncio.create_task(run())
    await worker.wait_ready()
    for number in (1, 2):
        trial = {ATTEMPTS: 3, TRIAL: "one"} if number == 2 else {}
        broker.node.publish(Message(b"%d" % number, "q", message_id=str(number), headers=trial))
        await eventually(lambda: len(bodies) == 1)
    await eventually(lambda: worker.statistics().waiting == 1)
    (task if by_task else scope).cancel()
    async with asyncio.timeout(20):
        await asyncio.wait({task})
    assert len(bodies) == 1
    assert broker.counts("q") == (2, 0)


async def test_a_worker_whose_task_is_cancelled_by_others_is_told() -> None:
    """Nobody goes on beside a worker that is dead, whoever killed it."""
    worker = Worker(MemoryBroker())
    worker.handler("q")(print)
    reached = False
    with pytest.raises(StateError, match="the worker ended: somebody cancelled its task"):
        async with worker:
            (task,) = (one for one in asyncio.all_tasks() if one.get_name() == "aioworkq worker")
            task.cancel()
            await asyncio.sleep(20)
            reached = True
    assert not reached
    current = asyncio.current_task()
    assert current is not None
    assert current.cancelling() == 0


@pytest.mark.parametrize("is_resting", [False, True])
@pytest.mark.parametrize("is_batch", [False, True])
async def test_the_end_of_the_loop_starts_nothing(*, is_batch: bool, is_resting: bool) -> None:
    """All tasks are cancelled, in any order: what ends in between makes no room for the next."""
    before = asyncio.all_tasks()
    broker, started = MemoryBroker(), list[object]()
    worker = Worker(broker, grace=1)

    async def handle(body: Any) -> None:
        started.append(body)
        if is_resting:
            raise LookupError
        await asyncio.Event().wait()

    if is_batch:
        worker.batch_handler(
            "q", max_size=1, max_wait=0, concurrency=4, prefetch_count=30, attempts=None
        )(handle)
    else:
        worker.handler("q", concurrency=4, prefetch_count=30, attempts=None)(handle)
    running = asyncio.create_task(worker.run())
    await worker.wait_ready()
    async with Producer(broker) as producer:
        await producer.publish_many("q", range(30))
    runs = worker._consumers[0]._runs
    await eventually(
        lambda: runs.waiting and (runs._slots._resting is not None if is_resting else started)
    )
    first = runs._slots._resting or next(iter(runs._tasks._tasks))
    count = len(started)
    tasks = asyncio.all_tasks() - before
    for task in (first, running, *tasks):
        task.cancel()
    async with asyncio.timeout(20):
        await asyncio.wait(tasks)
    assert len(started) == count


@pytest.mark.parametrize("is_batch", [False, True])
async def test_a_handler_that_changes_its_message_ends_no_worker(*, is_batch: bool) -> None:
    """Not even while the connection is lost, when the message is looked for under its id."""
    broker, goes_on = MemoryBroker(clock="virtual"), asyncio.Event()
    worker = Worker(broker)

    async def change(delivery: aioworkq.Delivery) -> None:
        await goes_on.wait()
        delivery.message.message_id = "another"

    if is_batch:

        @worker.batch_handler("q", max_size=1)
        async def handle_all(_: list[int], deliveries: list[aioworkq.Delivery]) -> None:
            await change(deliveries[0])
    else:

        @worker.handler("q")
        async def handle(_: int, delivery: aioworkq.Delivery) -> None:
            await change(delivery)

    async with worker, Producer(broker) as producer:
        await producer.publish("q", 1)
        await broker.settle()
        broker.drop_connections("worker")
        await broker.advance(20)
        goes_on.set()
        await broker.advance(20)
        assert broker.counts("q") == (0, 0)


async def test_a_rest_that_somebody_cancels_is_over() -> None:
    """The task is named as the handlers' are: an application may cancel it with those."""
    broker, works, done = MemoryBroker(clock="virtual"), False, set[int]()
    worker = Worker(broker)

    @worker.handler("q", concurrency=2, attempts=None)
    async def handle(number: int) -> None:
        if not works:
            raise LookupError
        done.add(number)

    async with worker, Producer(broker) as producer:
        await producer.publish_many("q", range(30))
        slots = worker._consumers[0]._runs._slots
        while slots._resting is None or not worker.statistics().waiting:
            await broker.advance(0.01)
        works = True
        slots._resting.cancel()
        await broker.advance(3600)
    assert done == set(range(30))


@pytest.mark.parametrize("answer", [translated, failing_cleanup])
@pytest.mark.parametrize("is_batch", [False, True])
@pytest.mark.parametrize(
    "options",
    [{"on_error": "discard"}, {"on_error": "dead-letter"}, {"attempts": 1}, {"timeout": 600}],
)
async def test_an_error_in_answer_to_the_end_of_the_worker(
    options: dict[str, Any], answer: Any, *, is_batch: bool
) -> None:
    """What is cancelled at a stop has not failed, whatever it raises: its message goes back."""
    broker, begun = MemoryBroker(), asyncio.Event()
    worker, attempts = Worker(broker, grace=0), list[int]()

    async def handle(_: Any) -> None:
        begun.set()
        await answer()

    if is_batch:
        worker.batch_handler("q", max_wait=0, **options)(handle)
    else:
        worker.handler("q", **options)(handle)
    async with worker, Producer(broker) as producer:
        await producer.publish("q", "precious")
        await begun.wait()
    assert broker.dead("q") == []
    assert worker.statistics().failed == 0

    second = Worker(broker)

    @second.handler("q")
    async def take(_: object, delivery: aioworkq.Delivery) -> None:
        attempts.append(delivery.attempt)

    async with second:
        await eventually(lambda: attempts)
    assert attempts == [1]


async def test_what_a_handler_asks_for_when_it_is_cancelled() -> None:
    """Its own word holds: a `Reject` is no accident."""
    broker, begun = MemoryBroker(), asyncio.Event()
    worker = Worker(broker, grace=0)

    @worker.handler("q")
    async def handle(_: object) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            raise Reject("half done")

    async with worker, Producer(broker) as producer:
        await producer.publish("q", "x")
        await begun.wait()
    assert broker.dead("q") == ["x"]


async def test_attempts_end_though_no_copy_can_count_them() -> None:
    """A classic queue cannot count, and takes no copy: this process counts, and does not spin."""
    broker, starts = MemoryBroker(clock="virtual"), list[tuple[int, float]]()
    queue, worker, began = Queue("q", str, type="classic"), Worker(broker), broker.now()

    @worker.handler(queue, attempts=4)
    async def handle(_: str, delivery: aioworkq.Delivery) -> None:
        starts.append((delivery.attempt, (broker.now() - began).total_seconds()))
        raise LookupError

    async with Producer(broker) as producer, worker:
        await producer.publish(queue, "x")
        broker.fail_next("refuse publish", queue=queue, times=100)
        await broker.advance(120)
    assert [attempt for attempt, _ in starts] == [1, 2, 3, 4]
    assert starts[-1][1] - starts[1][1] >= 10, "two pauses of five seconds"
    assert broker.dead(queue) == ["x"]


async def test_ids_are_made_at_the_start() -> None:
    """Processes that are forked between the making of a producer and its start have their own."""
    producer = Producer(MemoryBroker())
    assert not producer._ids
    async with producer:
        first = await producer.publish("q", "x")
        assert first == f"{producer._ids}-1"
        assert len(first) > 20


async def test_another_event_loop_is_an_error_at_once() -> None:
    """And nothing is stored: not an error after the fact."""
    broker = MemoryBroker()
    async with Producer(broker) as producer:
        await producer.publish("q", "x")

        def elsewhere() -> None:
            with pytest.raises(StateError, match="another event loop"):
                asyncio.run(producer.publish("q", "y"))
            with pytest.raises(StateError, match="another event loop"):
                asyncio.run(producer.publish_many("q", ["y"]))

        await asyncio.to_thread(elsewhere)
        assert broker.counts("q") == (1, 0)


def test_a_tls_context_without_tls_is_refused() -> None:
    """It would be ignored, and the password sent in clear."""
    context = ssl.create_default_context()
    for url in ("amqp://host/", ["amqps://host/", "amqp://other/"]):
        with pytest.raises(ValueError, match="without TLS: write it as amqps://"):
            Producer(url, ssl_context=context)
    with pytest.raises(ValueError, match="not memory://name") as caught:
        Producer("memory://user:secret@name")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("value", [Decimal(5), "5", timedelta(seconds=5), True])
async def test_what_is_no_number_is_told_at_once(value: Any) -> None:
    """And not by the first message."""
    for option in ("timeout", "heartbeat", "connect_timeout"):
        with pytest.raises(TypeError, match=rf"{option} is .*: it must be a number"):
            Producer("amqp://host/", **{option: value})
    number: Any = Decimal(5)
    for option in ("window", "max_message_size"):
        with pytest.raises(TypeError, match=rf"{option} is .*: it must be an int"):
            Producer("amqp://host/", **{option: number})
    with pytest.raises(TypeError, match=r"timeout is .*: it must be a number"):
        Worker("amqp://host/").handler("q", timeout=value)
    async with Producer(MemoryBroker()) as producer:
        with pytest.raises(TypeError, match=r"priority is .*: it must be an int"):
            await producer.publish("q", "x", priority=value)
        for one in (bytearray(b"ab"), memoryview(b"ab"), {"a": 1}):
            with pytest.raises(TypeError, match="bodies must be an iterable of bodies"):
                await producer.publish_many("q", one)


async def test_a_pause_that_no_clock_can_wait_for() -> None:
    """Fails the message and not the worker."""
    broker = MemoryBroker()
    worker = Worker(broker)
    pauses: list[Any] = [Decimal(5), 10**400]

    @worker.handler("q", on_error=lambda exc, delivery: Requeue(pause=pauses.pop()), attempts=2)
    async def handle(_: object) -> None:
        raise LookupError

    async with worker, Producer(broker) as producer:
        await producer.publish("q", "x")
        await eventually(lambda: broker.dead("q") == ["x"])
