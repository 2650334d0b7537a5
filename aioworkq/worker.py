"""`Worker`: registers handlers, runs their consumers, drains them.

It owns one connection for consuming, and one for the copies of messages that it publishes, opened
when the first such copy is. It installs no signal handlers: that is `aioworkq.run`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, Protocol, Self, TypeVar

import anyio

from aioworkq.background import Background, to_the_end
from aioworkq.changes import Changes
from aioworkq.connect import connection_to
from aioworkq.consumer import Consumer
from aioworkq.errors import ConnectionLostError, StateError, check_number
from aioworkq.handler import Handler, make_handler
from aioworkq.lifecycle import ConsumerState
from aioworkq.options import Batching, OnConnectionLoss, Options
from aioworkq.outbox import Outbox
from aioworkq.producer import check_connection_options
from aioworkq.statistics import WorkerStatistics
from aioworkq.topology import Queue, as_queue
from aioworkq.trials import Trials

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from anyio.abc import TaskGroup, TaskStatus

    from aioworkq.broker import Connection
    from aioworkq.memory import MemoryBroker
    from aioworkq.outcome import OnError
    from aioworkq.retry import RetryPolicy

_log = logging.getLogger("aioworkq")

T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")

_COPY_WINDOW: Final = 256
_COPY_WINDOW_BYTES: Final = 16 * 1024 * 1024
_CLOSE_TIMEOUT: Final = 5.0
_STUCK_AFTER: Final = 5.0
_DEFAULT_ATTEMPTS: Final = 20


class Register(Protocol[T]):
    """The decorator that `Worker.handler` returns: takes a handler, and gives it back unchanged.

    For type checkers, the body is the handler's first parameter.
    """

    def __call__(
        self,
        function: Callable[Concatenate[T, P], R],
        /,
    ) -> Callable[Concatenate[T, P], R]:
        """Register the handler."""
        ...


class RegisterBatch(Protocol[T]):
    """The decorator that `Worker.batch_handler` returns, as `Register`.

    For type checkers, a list of bodies is the handler's first parameter.
    """

    def __call__(
        self,
        function: Callable[Concatenate[list[T], P], R],
        /,
    ) -> Callable[Concatenate[list[T], P], R]:
        """Register the handler."""
        ...


class Worker:
    """Hands messages to handlers, and settles each by what its handler did.

    Register handlers with `handler`, then run it in one of three ways: ``aioworkq.run(worker)`` in
    a script, ``async with worker:`` or ``await task_group.start(worker.run)`` inside an
    application, or ``await worker.run()``. A worker runs once.

    Args:
        url: ``amqp://user:password@host:port/vhost``, or ``amqps://``; or several, hosts of one
            cluster, tried in turn. A `MemoryBroker`, or ``memory://name``, in tests.
        grace: Seconds that running handlers get when the worker stops, before they are cancelled.
        timeout: Seconds for a declaration, a subscription, or the confirm of a copy.
        name: Shown in RabbitMQ's list of connections.
        heartbeat: Seconds; a dead peer is noticed after three times as many, plus three.
        connect_timeout: Seconds for one attempt to connect; attempts go on until one succeeds.
        ssl_context: For ``amqps://``; None for the system's certificate authorities.

    Raises:
        ValueError: The URL or a number cannot be right.
    """

    def __init__(
        self,
        url: str | Sequence[str] | MemoryBroker,
        *,
        grace: float = 30.0,
        timeout: float = 30.0,
        name: str = "aioworkq worker",
        heartbeat: int = 10,
        connect_timeout: float = 10.0,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._grace = _checked_grace(grace)
        if not 0 < timeout < math.inf:
            raise ValueError(f"timeout is {timeout}: it must be more than 0 seconds.")
        self._timeout = timeout
        check_connection_options(heartbeat=heartbeat, connect_timeout=connect_timeout)

        def connection(purpose: str) -> Connection:
            return connection_to(
                url,
                owner="worker",
                name=f"{name}{purpose}",
                heartbeat=heartbeat,
                connect_timeout=connect_timeout,
                ssl_context=ssl_context,
                max_message_size=2**31,  # a copy is never larger than what the broker delivered
            )

        self._connection = connection("")
        self._outbox = Outbox(
            connection(" (copies)"),
            window=_COPY_WINDOW,
            window_bytes=_COPY_WINDOW_BYTES,
        )
        self._handlers: dict[str, Handler] = {}
        self._consumers: list[Consumer] = []
        self._changes = Changes()
        self._stopping = anyio.Event()
        self._hurry = Changes()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._deadline = math.inf
        self._error: BaseException | None = None
        self._was_started = False
        self._was_announced = False
        self._has_ended = False
        self._background: Background | None = None

    def handler(
        self,
        queue: Queue[T] | str,
        *,
        concurrency: int | None = None,
        prefetch_count: int | None = None,
        timeout: float | None = None,
        attempts: int | None = _DEFAULT_ATTEMPTS,
        on_error: OnError = "requeue",
        on_connection_loss: OnConnectionLoss = "finish",
        retry: RetryPolicy | None = None,
        slow_down: bool = True,
    ) -> Register[T]:
        """Register a function as the handler of a queue; it is returned unchanged.

        A coroutine function runs in the event loop, a plain one in a thread. One parameter takes
        the body; another one, annotated `Delivery`, may take the delivery. It returns: the message
        is acked. It raises: ``on_error`` says. It raises `Reject`: dead-lettered. It raises
        `RetryLater`: handed over again after a delay.

        Args:
            queue: The queue; a bare name is short for ``Queue(name)`` with the body type that the
                function's parameter is annotated with.
            concurrency: How many run at a time; None for 10, or for threads the number of CPUs.
            prefetch_count: How many unsettled deliveries RabbitMQ hands over at most; None for
                ``concurrency``. With 1 and 1, work goes to whoever is free.
            timeout: Seconds that one run may take; None for no limit. A coroutine is cancelled; a
                thread cannot be stopped: its message is settled, its slot stays taken until it
                ends.
            attempts: How often a message is started in all before it is dead-lettered, crashes of
                the process included; None for no bound.
            on_error: ``"requeue"`` gives the message back to the queue after a pause that grows
                from 0.1 to 5 s; ``"dead-letter"`` and ``"discard"`` do so at the first error; a
                function of exception and delivery returns the outcome.
            on_connection_loss: ``"finish"`` lets running handlers end, though their message is
                handed over again (a redelivery here waits for them); ``"cancel"`` cancels them.
            retry: Instead of requeueing a failed message, let it wait in RabbitMQ for the policy's
                delays; the policy's ``attempts`` count. Only for the default ``on_error``.
            slow_down: When nine in ten of the last new messages failed (of ten, or as many as the
                concurrency), run one at a time, with rests from 0.1 to 5 s, until one succeeds: an
                outage of what the handler needs shall not use up the attempts of the whole queue.

        Raises:
            TypeError: The function does not take what a handler is given.
            ValueError: An option is out of range, or the queue has a handler.
            StateError: The worker runs already.
        """
        registered = as_queue(queue)
        options = Options(
            concurrency=concurrency,
            prefetch_count=prefetch_count,
            timeout=timeout,
            attempts=attempts,
            on_error=on_error,
            on_connection_loss=on_connection_loss,
            retry=retry,
            slow_down=slow_down,
        )

        def register(function: Callable[Concatenate[T, P], R]) -> Callable[Concatenate[T, P], R]:
            self._register(registered, function, options)
            return function

        return register

    def batch_handler(
        self,
        queue: Queue[T] | str,
        *,
        max_size: int = 100,
        max_wait: float = 1.0,
        concurrency: int = 1,
        prefetch_count: int | None = None,
        timeout: float | None = None,
        attempts: int | None = _DEFAULT_ATTEMPTS,
        on_error: OnError = "requeue",
        on_connection_loss: OnConnectionLoss = "finish",
        retry: RetryPolicy | None = None,
        slow_down: bool = True,
    ) -> RegisterBatch[T]:
        """Register a function that handles many messages at a time; it is returned unchanged.

        One parameter takes a list of bodies, from 1 to ``max_size``, in the order in which they
        came; another one, annotated ``list[Delivery]``, may take their deliveries, at the same
        positions. It returns: all are acked. It raises `BatchError`: those that it names get what
        it says, all others are acked. It raises anything else, or exceeds its time limit: each
        message fails as if it alone had raised it.

        A batch begins when ``max_size`` messages are there, or when the oldest of them has waited
        for ``max_wait``. A message that cannot be decoded, or has no attempt left, is dead-lettered
        and in no batch. One that may have killed its process is a batch by itself. When the worker
        stops, an incomplete batch begins at once, within the grace period, if a slot is free;
        what is not in it goes back uncounted, as everything does when the grace period is 0.

        Args:
            queue: The queue; a bare name is short for ``Queue(name)`` with the type of the items
                that the function's parameter is annotated with.
            max_size: How many messages a batch has at most.
            max_wait: Seconds that a message waits at most for others, while a slot is free; 0 for
                none.
            concurrency: How many batches run at a time, in threads too.
            prefetch_count: How many unsettled messages RabbitMQ hands over at most; None for
                ``max_size * (concurrency + 1)``, at most 65,535: while all slots are taken, one
                more batch fills.
            timeout: Seconds that one batch may take; otherwise as for `handler`.
            attempts: How often each message is started in all; otherwise as for `handler`.
            on_error: As for `handler`; a function is asked for each message.
            on_connection_loss: As for `handler`; ``"cancel"`` cancels the whole batch.
            retry: As for `handler`, for each message.
            slow_down: As for `handler`, of batches in which no message succeeded. While slowed,
                messages are handed over one by one: what fails a whole batch is then found.

        Raises:
            TypeError: The function does not take what a batch handler is given.
            ValueError: An option is out of range, or the queue has a handler.
            StateError: The worker runs already.
        """
        registered = as_queue(queue)
        options = Options(
            concurrency=concurrency,
            prefetch_count=prefetch_count,
            timeout=timeout,
            attempts=attempts,
            on_error=on_error,
            on_connection_loss=on_connection_loss,
            retry=retry,
            slow_down=slow_down,
            batching=Batching(max_size, max_wait),
        )

        def register(
            function: Callable[Concatenate[list[T], P], R],
        ) -> Callable[Concatenate[list[T], P], R]:
            self._register(registered, function, options)
            return function

        return register

    def _register(
        self,
        queue: Queue[Any],
        function: Callable[..., Any],
        options: Options,
    ) -> None:
        if self._was_started:
            raise StateError(
                f"handler of queue {queue.name!r} cannot be registered",
                reason="the worker runs already",
                advice="Register all handlers before it is started.",
            )
        if queue.name in self._handlers:
            raise ValueError(
                f"queue {queue.name!r} has a handler already, "
                f"{self._handlers[queue.name].name}: a queue has one handler per worker.",
            )
        self._handlers[queue.name] = make_handler(queue, function, options)

    # Running

    async def run(self, *, task_status: TaskStatus[None] | None = None) -> None:
        """Consume until `stop`, then drain.

        Outages are waited out: consumers come back by themselves, with a WARNING each time. With
        ``await task_group.start(worker.run)`` the caller goes on once every consumer is subscribed,
        or when the worker was stopped before that.

        Cancelling it cancels the running handlers, whose messages go back to their queues and are
        not charged an attempt; it still closes in order, within a few seconds for each step.

        Raises:
            AccessRefusedError: RabbitMQ refuses the credentials or the virtual host.
            ConnectionLostError: The TLS handshake can never succeed.
            TopologyError: A queue can never be consumed from.
            StateError: The worker was started before, or has no handlers.
        """
        if self._was_started:
            raise self._started_already()
        if not self._handlers:
            raise StateError(
                "this worker cannot be started",
                reason="it has no handlers",
                advice="Register one with @worker.handler(queue).",
            )
        self._was_started = True
        self._loop = asyncio.get_running_loop()
        trials = Trials(self._connection, timeout=self._timeout)
        self._consumers = [
            Consumer(
                handler,
                connection=self._connection,
                outbox=self._outbox,
                stopping=self._stopping,
                timeout=self._timeout,
                trials=trials,
                on_change=self._changes.notify,
            )
            for handler in self._handlers.values()
        ]
        try:
            if not self._stopping.is_set():
                await self._run(task_status)
        finally:
            await to_the_end(self._close())
        if self._error is not None:
            raise self._error
        if task_status is not None and not self._was_announced:
            task_status.started()

    def _started_already(self) -> StateError:
        return StateError(
            "this worker cannot be started",
            reason="it has ended" if self._has_ended else "it runs already",
            advice="Make a new Worker.",
        )

    async def _run(self, task_status: TaskStatus[None] | None) -> None:
        await self._connection.start()
        async with anyio.create_task_group() as supervision:
            try:
                async with anyio.create_task_group() as handlers:
                    for consumer in self._consumers:
                        supervision.start_soon(self._supervise, consumer, handlers)
                    supervision.start_soon(self._announce, task_status)
                    is_cancelled = True
                    try:
                        await self._stopping.wait()
                        is_cancelled = False
                    finally:  # cancelled, too: nothing may be started any more
                        self._stopping.set()
                        await to_the_end(self._stop_consuming(flush=not is_cancelled))
                    await self._drain(handlers)
            finally:
                # Before the supervising tasks end: what they wait for ends with the connection.
                await to_the_end(self._close_consumers())
                supervision.cancel_scope.cancel()

    async def _supervise(self, consumer: Consumer, handlers: TaskGroup) -> None:
        """Run one consumer; its error ends the worker, once the others have drained."""
        try:
            await consumer.run(handlers)
        except Exception as exc:
            _log.error("The worker stops, because of queue %r: %s", consumer.queue.name, exc)
            self._error = self._error or exc
            self._stopping.set()
            self._changes.notify()

    async def _announce(self, task_status: TaskStatus[None] | None) -> None:
        while not (self.is_ready or self._stopping.is_set()):
            await self._changes.wait()
        if self.is_ready:
            _log.info("The worker is ready: %s.", ", ".join(self._handlers))
            self._was_announced = True
            if task_status is not None:
                task_status.started()

    async def _stop_consuming(self, *, flush: bool) -> None:
        """Take no more deliveries, and let no copy take long. Bounded.

        Args:
            flush: Whether batches that are not full are started, if there is time for them.
        """
        self._changes.notify()
        if self._deadline == math.inf:
            self._deadline = anyio.current_time() + self._grace
        flush = flush and self._deadline > anyio.current_time()
        async with anyio.create_task_group() as tasks:
            for consumer in self._consumers:
                consumer.hurry()
                tasks.start_soon(functools.partial(consumer.stop_consuming, flush=flush))

    async def _drain(self, handlers: TaskGroup) -> None:
        """End what runs.

        No consumer takes more deliveries by now.

        1. What was delivered and not started goes back. A last batch was started before.
        2. Running handlers get until the end of the grace period; heartbeats go on.
        3. The rest is cancelled, and goes back uncounted.
        """
        async with anyio.create_task_group() as tasks:
            for consumer in self._consumers:
                tasks.start_soon(consumer.give_back_unstarted)
        await self._wait_idle()
        left = [consumer for consumer in self._consumers if not consumer.is_idle]
        if left:
            names = ", ".join(consumer.handler.name for consumer in left)
            _log.warning("The grace period is over: running handlers are cancelled: %s.", names)
            handlers.cancel_scope.cancel()

    async def _wait_idle(self) -> None:
        """Wait until no handler runs, or until the grace period, which `stop` may cut, is over."""
        while not all(consumer.is_idle for consumer in self._consumers):
            left = self._deadline - anyio.current_time()
            if left <= 0:
                return
            with anyio.move_on_after(left):
                async with anyio.create_task_group() as tasks:

                    async def first(wait: Callable[[], Any], tasks: TaskGroup = tasks) -> None:
                        await wait()
                        tasks.cancel_scope.cancel()

                    tasks.start_soon(first, self._hurry.wait)
                    tasks.start_soon(first, self._all_idle)

    async def _all_idle(self) -> None:
        for consumer in self._consumers:
            await consumer.wait_idle()

    async def _close_consumers(self) -> None:
        """Close all consumers at a time, then their connection. Bounded, twice harmless."""
        async with anyio.create_task_group() as tasks:
            for consumer in self._consumers:
                tasks.start_soon(consumer.close)
        await self._connection.aclose(timeout=_CLOSE_TIMEOUT)

    async def _close(self) -> None:
        """Close everything, whatever happened. Bounded."""
        self._stopping.set()
        await self._close_consumers()
        await self._outbox.flush(timeout=_CLOSE_TIMEOUT)
        await self._outbox.aclose(timeout=_CLOSE_TIMEOUT)
        self._has_ended = True
        self._changes.notify()

    def stop(self, *, grace: float | None = None) -> None:
        """Begin to stop, and return at once; `run` returns when all is done.

        Works in every phase, before the start and during a hanging connect too. Called again, it
        can only shorten the grace period: ``stop(grace=0)`` cancels the handlers now. May be called
        from another thread.

        Args:
            grace: Seconds that running handlers get; None for the worker's, or for what an earlier
                call gave.
        """
        if grace is None and self._stopping.is_set():
            return
        seconds = self._grace if grace is None else _checked_grace(grace)
        loop = self._loop
        if loop is None:
            self._grace = min(self._grace, seconds)
            self._stopping.set()
            with contextlib.suppress(RuntimeError):  # no event loop in this thread
                asyncio.get_running_loop()
                self._changes.notify()
            loop = self._loop  # `run` may have begun meanwhile, in another thread
        if loop is None:
            return
        with contextlib.suppress(RuntimeError):  # a closed loop: it has stopped
            try:
                is_own = asyncio.get_running_loop() is loop
            except RuntimeError:
                is_own = False
            if is_own:
                self._stop(seconds)
                # In a handler of a signal the loop may be asleep, though it counts as running.
                loop.call_soon_threadsafe(_wake)
            else:
                loop.call_soon_threadsafe(self._stop, seconds)

    def _stop(self, seconds: float) -> None:
        self._deadline = min(self._deadline, anyio.current_time() + seconds)
        self._stopping.set()
        self._hurry.notify()
        self._changes.notify()

    @property
    def is_ready(self) -> bool:
        """Whether every consumer is subscribed, and the worker is not stopping."""
        return (
            self._was_started
            and not self._stopping.is_set()
            and all(consumer.state is ConsumerState.SUBSCRIBED for consumer in self._consumers)
        )

    async def wait_ready(self, timeout: float | None = 30.0) -> None:
        """Wait until every consumer is subscribed.

        Args:
            timeout: Seconds; None for no bound.

        Raises:
            ConnectionLostError: They are not within ``timeout`` seconds. The worker goes on trying.
            WorkQueueError: The error that ended the worker.
            StateError: The worker has ended, or is stopping.
        """
        with anyio.move_on_after(timeout):
            while not self.is_ready:
                if self._error is not None:
                    raise self._error
                if self._stopping.is_set():
                    raise StateError(
                        "this worker will not be ready",
                        reason="it was stopped",
                        advice="Make a new Worker.",
                    )
                await self._changes.wait()
            return
        raise ConnectionLostError("waiting until the worker is ready", reason=self._why_not_ready())

    def _why_not_ready(self) -> str:
        for consumer in self._consumers:
            if consumer.state is not ConsumerState.SUBSCRIBED:
                error = consumer.statistics().last_error or self._connection.last_error
                queue = consumer.queue.name
                return f"queue {queue!r} is not consumed from: {error or 'no answer in time'}"
        return "it was not started"

    def statistics(self) -> WorkerStatistics:
        """Return what the worker is doing and has done."""
        return WorkerStatistics(
            is_ready=self.is_ready,
            is_connected=self._connection.is_connected,
            reconnects=self._connection.reconnects,
            consumers={consumer.queue.name: consumer.statistics() for consumer in self._consumers},
        )

    # In the background

    async def __aenter__(self) -> Self:
        if self._was_started or self._background is not None:
            raise self._started_already()
        self._background = Background(self)
        try:
            await self._background.start(timeout=self._timeout)
        except BaseException:
            self._background = None
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        background, self._background = self._background, None
        if background is not None:
            await background.finish(exc_value)


def _wake() -> None:
    """Do nothing, in the event loop."""


def _checked_grace(grace: float) -> float:
    check_number("grace", grace)
    if not 0 <= grace < math.inf:
        raise ValueError(f"grace is {grace}: it must be a number of seconds, 0 or more.")
    return grace
