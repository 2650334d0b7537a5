"""`Worker`: how it is set up, started, watched and ended."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from typing import TYPE_CHECKING, Any

import anyio
import pytest

import aioworkq
from aioworkq import (
    AccessRefusedError,
    ConnectionLostError,
    ConsumerState,
    Delivery,
    Producer,
    Queue,
    RetryPolicy,
    StateError,
    TopologyError,
    Worker,
    WorkQueueError,
)
from tests.consuming import Broker, eventually, publish_all

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable

    from aioworkq.testing import RabbitMQ
    from tests.proxy import Proxy

NOWHERE = "amqp://guest:guest@127.0.0.1:1/"


async def handle(body: Any) -> None:
    """Do nothing with a message."""


# Setting up


def test_decorator_returns_the_function() -> None:
    """What is registered stays a plain function, to be called and tested as one."""
    worker = Worker(NOWHERE)
    assert worker.handler("q")(handle) is handle


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"concurrency": 0}, "concurrency is 0: it must be a whole number from 1."),
        ({"concurrency": -1}, "concurrency is -1: it must be a whole number from 1."),
        ({"concurrency": 1.5}, "concurrency is 1.5: it must be a whole number from 1."),
        ({"prefetch_count": 0}, "prefetch_count is 0: it must be a whole number from 1 to 65535."),
        ({"prefetch_count": -1}, "prefetch_count is -1: it must be a whole number from 1"),
        ({"prefetch_count": 65_536}, "prefetch_count is 65536: it must be a whole number from 1"),
        ({"timeout": -1}, "timeout is -1: it must be more than 0 seconds, or None."),
        ({"timeout": 0}, "timeout is 0: it must be more than 0 seconds, or None."),
        ({"timeout": float("nan")}, "timeout is nan: it must be more than 0 seconds, or None."),
        ({"attempts": 0}, "attempts is 0: it must be a whole number from 1, or None."),
        ({"attempts": -3}, "attempts is -3: it must be a whole number from 1, or None."),
        ({"attempts": True}, "attempts is True: it must be a whole number from 1, or None."),
        ({"on_error": "explode"}, "on_error is 'explode': it must be 'requeue', 'dead-letter'"),
        ({"on_connection_loss": "wait"}, "on_connection_loss is 'wait': it must be 'finish' or"),
        (
            {"retry": RetryPolicy(), "on_error": "discard"},
            "retry and on_error='discard' are both given",
        ),
    ],
    ids=repr,
)
def test_options_out_of_range(options: dict[str, Any], sentence: str) -> None:
    """A bad option is refused where it is given, with a sentence that says what is right."""
    worker = Worker(NOWHERE)
    with pytest.raises(ValueError) as caught:
        worker.handler("q", **options)(handle)
    assert sentence in str(caught.value)


def no_parameter() -> None: ...
def two_bodies(one: Any, two: Any) -> None: ...
def two_deliveries(body: Any, one: Delivery, two: Delivery) -> None: ...
def positional(body: Any, /) -> None: ...
def wrong_type(body: int) -> None: ...
async def generator(body: Any) -> AsyncIterator[int]:
    yield 1


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (no_parameter, "must take the body in exactly one parameter; it has none"),
        (two_bodies, "must take the body in exactly one parameter; it has 'one', 'two'"),
        (two_deliveries, "asks for the delivery twice"),
        (positional, "has the positional-only parameter 'body'"),
        (wrong_type, "takes int, but the bodies of queue 'q' are str"),
        (generator, "is a generator function: it must return, not yield"),
        (5, "a handler is a function, not 5"),
    ],
)
def test_functions_that_are_no_handlers(function: Any, sentence: str) -> None:
    """A function that cannot be called with a message is refused when it is registered."""
    worker = Worker(NOWHERE)
    with pytest.raises(TypeError) as caught:
        worker.handler(Queue("q", str))(function)
    assert sentence in str(caught.value)


def test_one_handler_per_queue() -> None:
    """A second handler of a queue is refused, and the first one is named."""
    worker = Worker(NOWHERE)
    worker.handler(Queue("q", str))(handle)
    with pytest.raises(ValueError) as caught:
        worker.handler("q")(handle)
    assert str(caught.value) == (
        "queue 'q' has a handler already, handle: a queue has one handler per worker."
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"grace": -1}, "grace is -1: it must be a number of seconds, 0 or more."),
        ({"grace": float("inf")}, "grace is inf: it must be a number of seconds, 0 or more."),
        ({"timeout": 0}, "timeout is 0: it must be more than 0 seconds."),
        ({"timeout": float("nan")}, "timeout is nan: it must be more than 0 seconds."),
    ],
    ids=repr,
)
def test_numbers_of_the_worker(options: dict[str, Any], sentence: str) -> None:
    """A worker's own bounds are checked too."""
    with pytest.raises(ValueError) as caught:
        Worker(NOWHERE, **options)
    assert str(caught.value) == sentence


async def test_no_handlers() -> None:
    """A worker without handlers does not pretend to work."""
    with pytest.raises(StateError) as caught:
        await Worker(NOWHERE).run()
    assert str(caught.value) == (
        "this worker cannot be started: it has no handlers. "
        "Register one with @worker.handler(queue)."
    )


async def test_run_twice(url: str, queue_name: str) -> None:
    """A worker runs once: neither beside itself nor again."""
    worker = Worker(url)
    worker.handler(queue_name)(handle)
    async with worker:
        with pytest.raises(StateError, match=r"it runs already\. Make a new Worker"):
            await worker.run()
    with pytest.raises(StateError, match=r"it has ended\. Make a new Worker"):
        await worker.run()


async def test_register_while_running(url: str, queue_name: str) -> None:
    """A handler that is registered too late would never be run: it is refused."""
    worker = Worker(url)
    worker.handler(queue_name)(handle)
    async with worker:
        with pytest.raises(StateError, match="Register all handlers before it is started"):
            worker.handler(f"{queue_name}.late")(handle)
    assert list(worker.statistics().consumers) == [queue_name]


# Running


async def run_in_body(worker: Worker, work: Callable[[], Any]) -> None:
    async with worker:
        await work()


async def run_in_anyio(worker: Worker, work: Callable[[], Any]) -> None:
    async with anyio.create_task_group() as tasks:
        await tasks.start(worker.run)
        assert worker.is_ready
        await work()
        worker.stop()


async def run_in_asyncio(worker: Worker, work: Callable[[], Any]) -> None:
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(worker.run())
        await worker.wait_ready()
        await work()
        worker.stop()


async def run_and_cancel(worker: Worker, work: Callable[[], Any]) -> None:
    task = asyncio.create_task(worker.run())
    await worker.wait_ready()
    await work()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("way", [run_in_body, run_in_anyio, run_in_asyncio, run_and_cancel])
async def test_ways_to_run(url: str, queue_name: str, way: Any) -> None:
    """A worker runs as a body, in a task group of either kind, or as a task that is cancelled."""
    worker = Worker(url)
    worker.handler(queue_name)(handle)
    assert not worker.is_ready

    async def work() -> None:
        async with Producer(url) as producer:
            await producer.publish(queue_name, "x")
        await eventually(lambda: worker.statistics().handled == 1)

    await way(worker, work)
    assert not worker.is_ready
    assert worker.statistics().consumers[queue_name].state is ConsumerState.STOPPED
    assert not worker.statistics().is_connected


async def test_enter_and_exit_in_different_tasks(url: str, queue_name: str) -> None:
    """Frameworks enter and exit in different tasks: nothing is bound to the one that entered."""
    worker = Worker(url)
    worker.handler(queue_name)(handle)
    await asyncio.create_task(worker.__aenter__())
    assert worker.is_ready
    await asyncio.create_task(worker.__aexit__(None, None, None))
    assert not worker.statistics().is_connected


async def test_each_handler_has_a_context_of_its_own(url: str, queue_name: str) -> None:
    """What a handler sets in a context variable is seen by no other run, but the worker's is."""
    mine: contextvars.ContextVar[str] = contextvars.ContextVar("mine", default="unset")
    mine.set("by the worker")
    worker = Worker(url)
    seen: list[str] = []
    done = asyncio.Event()

    @worker.handler(Queue(queue_name, int), concurrency=2, prefetch_count=10)
    async def handle(number: int) -> None:
        seen.append(mine.get())
        mine.set(f"by message {number}")
        await asyncio.sleep(0)
        if len(seen) == 10:
            done.set()

    async with Producer(url) as producer, worker:
        (await producer.publish_many(Queue(queue_name, int), range(10))).raise_for_errors()
        async with asyncio.timeout(30):
            await done.wait()
    assert seen == ["by the worker"] * 10


async def test_shields_hold_in_handlers(url: str, queue_name: str) -> None:
    """A handler that is cancelled goes on inside a shield of AnyIO, as in a task group."""
    worker = Worker(url, grace=0)
    ends: list[str] = []
    started = asyncio.Event()

    @worker.handler(Queue(queue_name, int))
    async def handle(number: int) -> None:
        started.set()
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.01)
                ends.append("cleaned up")
            with contextlib.suppress(asyncio.CancelledError):
                await anyio.sleep_forever()
            ends.append("cancelled again")

    async with Producer(url) as producer, worker:
        await producer.publish(Queue(queue_name, int), 1)
        async with asyncio.timeout(30):
            await started.wait()
    assert ends == ["cleaned up", "cancelled again"]


async def test_handler_that_cancels_its_own_task(
    url: str, queue_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A handler's task that others cancel is a failed attempt; the worker and the rest go on."""
    worker = Worker(url)
    runs = 0

    @worker.handler(queue_name, concurrency=2)
    async def suicidal(body: Any) -> None:
        nonlocal runs
        runs += 1
        if runs == 1:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(10)

    @worker.handler(f"{queue_name}.others")
    async def other(body: Any) -> None:
        await asyncio.sleep(0.2)

    async with worker, Producer(url) as producer:
        await producer.publish(f"{queue_name}.others", "x")
        await producer.publish(queue_name, "x")
        await eventually(lambda: worker.statistics().handled == 2)
    assert worker.statistics().failed == 1
    assert "though the worker did not cancel it" in caplog.text


def test_worker_that_nobody_awaits(url: str, queue_name: str) -> None:
    """asyncio.run() that ends beside a running worker ends it, and the message is not lost."""

    async def main() -> asyncio.Task[None]:
        worker = Worker(url)
        started = asyncio.Event()

        @worker.handler(queue_name)
        async def hang(body: Any) -> None:
            started.set()
            await asyncio.sleep(60)

        async with Producer(url) as producer:
            await producer.publish(queue_name, "x")
        task = asyncio.create_task(worker.run())
        await started.wait()
        return task

    for _ in range(2):  # the second one gets the message that the first one had
        assert asyncio.run(main()).cancelled()


# Watching


async def test_truth_about_readiness(proxy: Proxy, proxy_url: str, queue_name: str) -> None:
    """`is_ready`, `wait_ready` and `statistics` say what is, before, during and after an outage."""
    worker = Worker(proxy_url, connect_timeout=2)
    worker.handler(queue_name)(handle)
    with pytest.raises(ConnectionLostError, match="it was not started"):
        await worker.wait_ready(timeout=0.01)
    async with worker:
        assert worker.is_ready
        await worker.wait_ready(timeout=0)
        statistics = worker.statistics()
        assert statistics.is_ready
        assert statistics.is_connected
        assert statistics.reconnects == 0
        assert statistics.consumers[queue_name].is_subscribed
        assert statistics.consumers[queue_name].last_error == ""

        proxy.refuse()
        proxy.cut()
        await eventually(lambda: not worker.is_ready)
        statistics = worker.statistics()
        assert not statistics.is_ready
        assert not statistics.is_connected
        assert not statistics.consumers[queue_name].is_subscribed
        assert statistics.consumers[queue_name].losses == 1
        assert statistics.consumers[queue_name].last_error
        with pytest.raises(ConnectionLostError) as caught:
            await worker.wait_ready(timeout=0.2)
        assert f"queue '{queue_name}' is not consumed from" in str(caught.value)

        proxy.accept()
        await worker.wait_ready()
        assert worker.is_ready
        assert worker.statistics().reconnects == 1
    with pytest.raises(StateError, match="it was stopped"):
        await worker.wait_ready()


async def test_wait_ready_hears_of_a_stop() -> None:
    """Who waits for a worker that is stopped before it starts is told at once."""
    worker = Worker(NOWHERE)
    worker.handler("q")(handle)
    async with anyio.create_task_group() as tasks:

        async def wait() -> None:
            with pytest.raises(StateError, match="it was stopped"):
                await worker.wait_ready(timeout=None)

        tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        worker.stop()


# Failing


async def enter(worker: Worker) -> None:
    async with worker:
        pytest.fail("the body must not begin")


async def start(worker: Worker) -> None:
    async with anyio.create_task_group() as tasks:
        await tasks.start(worker.run)


@pytest.fixture
async def stranger(rabbitmq: RabbitMQ, queue_name: str, url: str) -> str:
    """The URL for a user who may do nothing in the virtual host but enter it."""
    name = queue_name.replace(".", "_")
    await rabbitmq.add_user(name, "secret-word")
    await rabbitmq.set_permissions(name, vhost=queue_name, configure="^$", write="^$", read="^$")
    return url.replace("guest:guest", f"{name}:secret-word")


@pytest.mark.parametrize("way", [Worker.run, enter, start])
@pytest.mark.parametrize(
    ("case", "error", "sentence"),
    [
        ("password", AccessRefusedError, "Correct the user, the password"),
        ("vhost", AccessRefusedError, "nowhere"),
        ("permission", TopologyError, "ACCESS_REFUSED"),
        ("missing", TopologyError, "NOT_FOUND"),
    ],
)
async def test_what_can_never_work_raises(
    url: str,
    stranger: str,
    queue_name: str,
    case: str,
    error: type[WorkQueueError],
    sentence: str,
    way: Any,
) -> None:
    """Wrong credentials, no such virtual host, no permission, no queue: the typed error, bare."""
    urls = {
        "password": url.replace("guest:guest", "guest:hush-hush"),
        "vhost": url.rpartition("/")[0] + "/nowhere",
        "permission": stranger,
        "missing": url,
    }
    worker = Worker(urls[case])
    worker.handler(Queue(queue_name, declare=case != "missing"))(handle)
    with pytest.raises((WorkQueueError, ExceptionGroup)) as caught:
        await way(worker)
    raised: BaseException = caught.value
    if way is start:  # a task group wraps whatever its tasks raise
        assert isinstance(raised, ExceptionGroup)
        (raised,) = raised.exceptions
    assert type(raised) is error
    assert sentence in str(raised)
    assert "hush-hush" not in str(raised)
    assert "secret-word" not in str(raised)
    assert worker.statistics().consumers[queue_name].state is ConsumerState.FAILED
    assert not worker.is_ready
    with pytest.raises(error):
        await worker.wait_ready()


async def test_one_queue_that_fails_ends_all_in_order(
    rabbitmq: RabbitMQ, broker: Broker, stranger: str, queue_name: str
) -> None:
    """The worker whose one queue can never be consumed lets the handlers of others end."""
    user = queue_name.replace(".", "_")
    await rabbitmq.set_permissions(user, vhost=queue_name)
    worker = Worker(stranger)
    started, ended = asyncio.Event(), asyncio.Event()
    other = f"{queue_name}.other"

    @worker.handler(queue_name)
    async def slow(body: Any) -> None:
        started.set()
        await eventually(lambda: not worker.is_ready)
        await asyncio.sleep(0.1)
        ended.set()

    worker.handler(other)(handle)
    with pytest.raises(TopologyError, match=other):
        async with worker:
            await broker.publish(queue_name, b"x")
            await started.wait()
            await rabbitmq.set_permissions(user, vhost=queue_name, read="^$")
            await broker.delete(other)
            await asyncio.sleep(60)
    assert ended.is_set()
    assert worker.statistics().handled == 1


class TestPermissionRevoked:
    """A user who may no longer read: a refusal that no retry can mend."""

    @pytest.fixture
    async def running(
        self, rabbitmq: RabbitMQ, stranger: str, queue_name: str
    ) -> AsyncGenerator[tuple[Worker, Callable[[], None]]]:
        user = queue_name.replace(".", "_")
        await rabbitmq.set_permissions(user, vhost=queue_name)
        worker = Worker(stranger)
        worker.handler(queue_name)(handle)

        async def revoke_all() -> None:
            await rabbitmq.set_permissions(
                user, vhost=queue_name, configure="^$", write="^$", read="^$"
            )
            # Permissions are cached for a while in a channel: a new one asks again.
            async with Broker(rabbitmq.url + queue_name) as broker:
                await broker.delete(queue_name)
                await broker.declare(queue_name)

        revoking: list[asyncio.Task[None]] = []
        # It goes on beside the worker, which may fail before it is through.
        yield worker, lambda: revoking.append(asyncio.create_task(revoke_all()))
        await asyncio.gather(*revoking)

    async def test_cancels_the_body(self, running: tuple[Worker, Callable[[], None]]) -> None:
        """`async with` cancels its body and raises the worker's error when the worker fails."""
        worker, revoke = running
        was_cancelled = False
        with pytest.raises(TopologyError, match="ACCESS_REFUSED"):
            async with worker:
                revoke()
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    was_cancelled = True
                    raise
        assert was_cancelled
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0

    async def test_an_error_of_the_body_wins(
        self, running: tuple[Worker, Callable[[], None]]
    ) -> None:
        """What the body raises in answer is what the caller sees."""
        worker, revoke = running
        with pytest.raises(LookupError, match="mine"):
            async with worker:
                revoke()
                try:
                    await asyncio.sleep(60)
                finally:
                    raise LookupError("mine")

    async def test_a_body_that_has_ended(self, running: tuple[Worker, Callable[[], None]]) -> None:
        """A body that swallowed the cancellation, and ended, still hears of the error."""
        worker, revoke = running
        with pytest.raises(TopologyError):
            async with worker:
                revoke()
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(60)

    async def test_a_cancellation_from_outside_wins(
        self, running: tuple[Worker, Callable[[], None]]
    ) -> None:
        """A body that was cancelled by others too ends as cancelled: that is never swallowed."""
        worker, revoke = running
        entered = asyncio.Event()

        async def body() -> None:
            async with worker:
                entered.set()
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    await asyncio.sleep(60)

        task = asyncio.create_task(body())
        await entered.wait()
        revoke()
        await eventually(lambda: task.cancelling() == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_body_error_wins(url: str, queue_name: str) -> None:
    """An exception of the body stops the worker in order, and is raised."""
    worker = Worker(url)
    worker.handler(queue_name)(handle)
    with pytest.raises(LookupError, match="mine"):
        async with worker:
            raise LookupError("mine")
    assert worker.statistics().consumers[queue_name].state is ConsumerState.STOPPED


async def test_body_that_cannot_begin(proxy: Proxy, proxy_url: str, queue_name: str) -> None:
    """`async with` waits `timeout` seconds for the worker to be ready, then says why it is not."""
    proxy.half_open()
    worker = Worker(proxy_url, timeout=0.5, connect_timeout=10)
    worker.handler(queue_name)(handle)
    with pytest.raises(ConnectionLostError, match="is not consumed from"):
        await enter(worker)
    assert not worker.statistics().is_connected


def test_public_names() -> None:
    """What a user of workers needs is at the top level."""
    assert aioworkq.Worker is Worker
    assert callable(aioworkq.run)


@pytest.mark.fast_path("pamqp refuses the names")
async def test_a_queue_may_have_any_name_that_rabbitmq_takes(url: str) -> None:
    """The narrower idea that pamqp has of names, and RabbitMQ has not, stops no worker."""
    worker = Worker(url)
    seen: set[str] = set()

    async def handle(body: str) -> None:
        seen.add(body)

    names = {"größe", "a|b", "it's {so}", "*"}
    for name in names:
        worker.handler(Queue(name, str))(handle)
    async with worker, Producer(url) as producer:
        for name in names:
            await producer.publish(Queue(name, str), name)
        await eventually(lambda: seen == names)


async def test_an_outage_is_no_flood_of_dead_letters(
    url: str, queue_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """When everything fails, one runs at a time, until one succeeds: then all are handled."""
    worker = Worker(url)
    is_up = False
    running, most = 0, 0
    handled: set[int] = set()

    @worker.handler(Queue(queue_name, int), concurrency=10, on_error="dead-letter")
    async def call_a_service(number: int) -> None:
        nonlocal running, most
        running += 1
        try:
            most = max(most, running)
            await anyio.lowlevel.checkpoint()
            if not is_up:
                raise ConnectionError("the service is down")
            handled.add(number)
        finally:
            running -= 1

    async with worker, Producer(url) as producer, Broker(url) as broker:
        await publish_all(producer, queue_name, range(500))
        await eventually(lambda: worker.statistics().consumers[queue_name].is_slowed)
        await eventually(lambda: worker.statistics().in_flight == 0)  # those that ran already
        most, failed = 0, worker.statistics().failed
        await eventually(lambda: worker.statistics().failed >= failed + 3)
        assert most == 1
        assert worker.statistics().dead_lettered < 100
        is_up = True
        await eventually(lambda: len(handled) == 500 - worker.statistics().dead_lettered)
        assert not worker.statistics().consumers[queue_name].is_slowed
        assert await broker.ready(f"{queue_name}.dead") == worker.statistics().dead_lettered
    assert "fails on nearly every message" in caplog.text
    assert "succeeds again: back to full speed" in caplog.text


async def test_slowing_down_can_be_turned_off(url: str, queue_name: str) -> None:
    """With slow_down=False a handler that always fails goes on at full speed."""
    worker = Worker(url)

    @worker.handler(Queue(queue_name, int), on_error="dead-letter", slow_down=False)
    async def fail(number: int) -> None:
        raise ConnectionError("the service is down")

    async with worker, Producer(url) as producer:
        await publish_all(producer, queue_name, range(200))
        await eventually(lambda: worker.statistics().dead_lettered == 200)
        assert not worker.statistics().consumers[queue_name].is_slowed
