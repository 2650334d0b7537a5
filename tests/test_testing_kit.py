"""`deliver` and `drain`, and the fixtures of the pytest plugin."""

from __future__ import annotations

import asyncio
import os
import textwrap
import threading

import pytest

from aioworkq import (
    Ack,
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
    StateError,
    Worker,
)
from aioworkq.testing import Drained, NotInstalledError, RabbitMQ, deliver, drain

NUMBERS = Queue("numbers", int)


@pytest.fixture
def broker() -> MemoryBroker:
    return MemoryBroker(clock="virtual")


@pytest.fixture
def worker(broker: MemoryBroker) -> Worker:
    """A worker that acks 0, and does something else with every other number."""
    worker = Worker(broker)

    @worker.handler(NUMBERS, timeout=5, attempts=3)
    async def handle(number: int, delivery: Delivery) -> None:
        match number:
            case 1:
                raise LookupError
            case 2:
                raise RetryLater(60)
            case 3:
                raise Reject("no")
            case 4 if delivery.attempt == 1:
                raise LookupError
            case _:
                pass

    return worker


@pytest.mark.parametrize(
    ("number", "attempt", "outcome"),
    [
        (0, 1, Ack()),
        (1, 1, Requeue(pause=0.1)),
        (1, 2, Requeue(pause=0.2)),
        (2, 1, Retry(60)),
        (3, 1, DeadLetter("no")),
    ],
)
async def test_a_delivery_has_an_outcome(
    worker: Worker, number: int, attempt: int, outcome: Outcome
) -> None:
    """The handler runs once, and its outcome is returned and not carried out."""
    assert await deliver(worker, NUMBERS, number, attempt=attempt) == outcome


async def test_the_last_attempt_is_the_last(worker: Worker) -> None:
    """The options of the handler count."""
    outcome = await deliver(worker, NUMBERS, 1, attempt=3)
    assert isinstance(outcome, DeadLetter)
    assert outcome.reason == "gave up after 3 attempts"
    assert outcome.failure is not None
    assert outcome.failure.type == "LookupError"


async def test_a_message_that_cannot_be_decoded_is_dead(worker: Worker) -> None:
    """A whole message is handed over as it is."""
    outcome = await deliver(worker, NUMBERS, Message(b"no number", "numbers"))
    assert isinstance(outcome, DeadLetter)
    assert outcome.reason.startswith("the body is not a valid int")


async def test_a_time_limit_holds() -> None:
    """A handler that takes too long is cancelled, and that is a failure."""
    worker = Worker("amqp://nowhere.invalid/")

    @worker.handler("forever", timeout=0.01, on_error="dead-letter")
    async def handle(_: bytes) -> None:
        await asyncio.Event().wait()

    outcome = await deliver(worker, "forever", b"x")
    assert isinstance(outcome, DeadLetter)
    assert outcome.reason == "failed: TimeoutError"


async def test_a_plain_function_runs_in_a_thread() -> None:
    """The handler, its headers and its id are as in production; the worker may be RabbitMQ's."""
    worker, seen = Worker("amqp://nowhere.invalid/"), list[tuple[object, ...]]()

    @worker.handler(NUMBERS)
    def handle(number: int, delivery: Delivery) -> None:
        thread = threading.current_thread() is threading.main_thread()
        seen.append((number, thread, delivery.message_id, delivery.headers["a"]))

    outcome = await deliver(worker, NUMBERS, 1, headers={"a": "b"}, message_id="id")
    assert outcome == Ack()
    assert seen == [(1, False, "id", "b")]


async def test_wrong_deliveries_are_refused(worker: Worker) -> None:
    """A queue without a handler, a body of another type and attempt 0 are errors."""
    with pytest.raises(StateError, match="the worker has no handler for it"):
        await deliver(worker, "another", b"")
    with pytest.raises(TypeError, match="is int, not str"):
        await deliver(worker, "numbers", "one")
    with pytest.raises(ValueError, match="attempts count from 1"):
        await deliver(worker, NUMBERS, 1, attempt=0)


async def test_drain_works_until_nothing_is_ready(broker: MemoryBroker, worker: Worker) -> None:
    """Failures are handed over again until they are done; delays are left alone."""
    async with Producer(broker) as producer:
        for number in range(5):
            await producer.publish(NUMBERS, number)
        assert await drain(worker) == Drained(
            handled=2, failed=4, requeued=3, retried=1, dead_lettered=2
        )
        assert sorted(broker.dead(NUMBERS)) == [1, 3]
        assert broker.published(NUMBERS) == [0, 1, 2, 3, 4]
        assert await drain(worker) == Drained()
        await broker.advance(65)
        assert await drain(worker) == Drained(retried=1)


async def test_drain_of_a_worker_that_runs(broker: MemoryBroker, worker: Worker) -> None:
    """A running worker goes on running, and only what is new is counted."""
    async with Producer(broker) as producer, worker:
        await producer.publish(NUMBERS, 4)
        await broker.settle()
        assert worker.statistics().consumers["numbers"].failed == 1
        assert await drain(worker) == Drained(handled=1, requeued=1)
        await producer.publish(NUMBERS, 4)
        await broker.settle()
        broker.drop_connections("worker")
        assert await drain(worker) == Drained(handled=1)
        assert worker.is_ready


async def test_drain_waits_for_threads_and_real_time() -> None:
    """With a real clock, and handlers in threads, drain waits until they are through."""
    broker, attempts = MemoryBroker(), list[int]()
    worker = Worker(broker)

    @worker.handler(NUMBERS)
    def handle(_: int, delivery: Delivery) -> None:
        attempts.append(delivery.attempt)
        if delivery.attempt == 1:
            raise LookupError

    async with Producer(broker) as producer:
        await producer.publish(NUMBERS, 1)
        assert await drain(worker) == Drained(handled=1, failed=1, requeued=1)
    assert attempts == [1, 2]


async def test_drain_waits_for_what_expires_too() -> None:
    """On a real clock, a message that another consumer leaves to expire ends the wait."""
    broker = MemoryBroker()
    queue = Queue("numbers", int, type="classic")
    worker, other = Worker(broker), Worker(broker)
    holds, release = asyncio.Event(), asyncio.Event()

    @other.handler(queue, concurrency=1)
    async def hold(_: int) -> None:
        holds.set()
        await release.wait()

    worker.handler(queue)(print)
    async with Producer(broker) as producer, other:
        await producer.publish(queue, 1)
        await holds.wait()
        asyncio.get_running_loop().call_later(0.05, release.set)
        assert await drain(worker) == Drained()


async def test_what_cannot_be_drained_is_told(broker: MemoryBroker, worker: Worker) -> None:
    """A worker of RabbitMQ, one on the wrong broker, and one that never ends are errors."""
    with pytest.raises(StateError, match="not on a memory broker"):
        await drain(Worker("amqp://localhost/"))
    async with Producer(MemoryBroker()) as elsewhere:
        await elsewhere.publish(NUMBERS, 1)
        with pytest.raises(StateError, match="the same MemoryBroker"):
            await drain(worker)
    endless = Worker(broker)

    @endless.handler(NUMBERS, attempts=None)
    async def fail(_: int) -> None:
        await asyncio.Event().wait()

    async with Producer(broker) as producer:
        await producer.publish(NUMBERS, 1)
        with pytest.raises(StateError, match=r"not empty after 0\.05 s"):
            await drain(endless, timeout=0.05)


async def test_retries_are_drained_after_their_delay(broker: MemoryBroker) -> None:
    """A retry policy's attempts come with time, one drain each."""
    worker, attempts = Worker(broker), list[int]()

    @worker.handler(NUMBERS, retry=RetryPolicy(attempts=3, first=3600))
    async def handle(_: int, delivery: Delivery) -> None:
        attempts.append(delivery.attempt)
        raise LookupError

    async with Producer(broker) as producer:
        await producer.publish(NUMBERS, 1)
        for hours in (0, 1.1, 1.1):
            await broker.advance(hours * 3600)
            await drain(worker)
    assert attempts == [1, 2, 3]
    assert broker.dead(NUMBERS) == [1]


TESTS = """
import pytest
from aioworkq import MemoryBroker, Producer, Queue, Worker
from aioworkq.testing import drain

handled = []


async def handle(number: int) -> None:
    handled.append(number)


{mark}
async def test_memory(memory_broker: MemoryBroker) -> None:
    queue, worker = Queue("q", int), Worker(memory_broker)
    worker.handler(queue)(handle)
    async with Producer(memory_broker) as producer:
        await producer.publish(queue, 1, delay=3600)
        await memory_broker.advance(3600)
        assert (await drain(worker)).handled == 1
    assert handled == [1]
"""

NODE_TESTS = """
{mark}
async def test_node(rabbitmq_url: str) -> None:
    async with Producer(rabbitmq_url) as producer:
        await producer.publish("q", 1)

def test_every_test_has_a_virtual_host_of_its_own(rabbitmq, rabbitmq_url: str) -> None:
    assert rabbitmq.is_running
    assert "/test-" in rabbitmq_url
"""

# The plugins that are installed are loaded by themselves, as for users: all but that of Hypothesis,
# which may be in use in this process before.
OPTIONS = (
    *("-rs", "-c", os.devnull, "--rootdir", "."),
    *("-o", "asyncio_default_fixture_loop_scope=function"),  # or pytest-asyncio warns
    *("-p", "no:hypothesispytest"),
)
MARKS = {"asyncio": "@pytest.mark.asyncio", "anyio": "@pytest.mark.anyio"}
BACKEND = """
@pytest.fixture
def anyio_backend():
    return "asyncio"
"""


def write_tests(pytester: pytest.Pytester, tests: str, plugin: str) -> None:
    """Make a project without configuration."""
    backend = BACKEND if plugin == "anyio" else ""
    pytester.makepyfile(textwrap.dedent(tests).format(mark=MARKS[plugin]) + backend)


def test_the_plugin_works_under_pytest_asyncio(pytester: pytest.Pytester) -> None:
    """The fixture of the memory broker is there for tests that pytest-asyncio runs."""
    write_tests(pytester, TESTS, "asyncio")
    pytester.runpytest_inprocess(*OPTIONS).assert_outcomes(passed=1)


@pytest.mark.rabbitmq
def test_the_plugin_starts_a_node(pytester: pytest.Pytester) -> None:
    """A test that asks for a node gets one, with an empty virtual host."""
    write_tests(pytester, TESTS + NODE_TESTS, "anyio")
    pytester.runpytest_subprocess(*OPTIONS, timeout=120).assert_outcomes(passed=3)


def test_without_rabbitmq_its_tests_are_skipped(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where RabbitMQ is missing, tests that need it are skipped and say why; AnyIO runs others."""

    async def start(_: RabbitMQ) -> None:
        raise NotInstalledError("no node", reason="not there", advice="Install it.")

    monkeypatch.setattr(RabbitMQ, "start", start)
    write_tests(pytester, TESTS + NODE_TESTS, "anyio")
    done = pytester.runpytest_inprocess(*OPTIONS)
    done.assert_outcomes(passed=1, skipped=2)
    done.stdout.fnmatch_lines("*needs a RabbitMQ server*")
