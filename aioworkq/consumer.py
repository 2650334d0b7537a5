"""One consumer: subscribes to a queue, notices every loss, and subscribes again.

What becomes of the deliveries is ``runs.py``'s.
"""

from __future__ import annotations

import asyncio
import logging
import random
from typing import TYPE_CHECKING, Final

import anyio

from aioworkq.batches import BatchRuns
from aioworkq.errors import (
    AccessRefusedError,
    ConnectionLostError,
    TopologyError,
    WorkQueueError,
)
from aioworkq.lifecycle import ConsumerState, change
from aioworkq.runs import Runs
from aioworkq.settle import Settler
from aioworkq.statistics import ConsumerStatistics
from aioworkq.topology import declarations

if TYPE_CHECKING:
    from collections.abc import Callable

    from anyio.abc import TaskGroup

    from aioworkq.broker import Connection, Subscription
    from aioworkq.handler import Handler
    from aioworkq.outbox import Outbox
    from aioworkq.settle import Unsettled
    from aioworkq.trials import Trials

_log = logging.getLogger("aioworkq")

_BACKOFF_MAX: Final = 5.0
_GOOD_AFTER: Final = 5.0
_STEP_TIMEOUT: Final = 5.0
_ENDS: Final = frozenset({ConsumerState.DRAINING, ConsumerState.STOPPED, ConsumerState.FAILED})
_PASSING: Final = frozenset({404, 405})
"""Refusals that may pass, once a queue was consumed from: it is gone, or held by another."""


class Consumer:
    """Consumes one queue for one handler.

    Args:
        handler: What to run.
        connection: The worker's connection, shared by its consumers.
        outbox: What copies are published through.
        stopping: Set once the worker stops.
        timeout: Seconds for a declaration, a subscription or a copy.
        trials: What lets a message run alone in the worker.
        on_change: Called when the state changed.
    """

    def __init__(
        self,
        handler: Handler,
        *,
        connection: Connection,
        outbox: Outbox,
        stopping: anyio.Event,
        timeout: float,
        trials: Trials,
        on_change: Callable[[], None],
    ) -> None:
        self.handler = handler
        self.queue = handler.queue
        self._connection = connection
        self._stopping = stopping
        self._timeout = timeout
        self._on_change = on_change
        self._settler = Settler(
            handler.queue,
            connection=connection,
            outbox=outbox,
            stopping=stopping,
            timeout=timeout,
        )
        self._state = ConsumerState.REGISTERED
        self._loop_scope: anyio.CancelScope | None = None
        self._subscription: Subscription | None = None
        self._was_subscribed = False
        self._trials = trials
        trials.join(self)
        self._runs = (Runs if handler.options.batching is None else BatchRuns)(
            handler,
            settler=self._settler,
            stopping=stopping,
            trials=trials,
            on_change_of_prefetch=self._restore_prefetch,
        )
        self._paused: Subscription | None = None
        self._asking = asyncio.Lock()
        self._tasks: TaskGroup | None = None
        self._is_answered = asyncio.Event()
        self._is_answered.set()
        self._losses = 0
        self._last_error = ""

    @property
    def state(self) -> ConsumerState:
        """Where the consumer is."""
        return self._state

    def _change(self, state: ConsumerState) -> None:
        """Change the state. Once the consumer is to end, nothing but its end can follow."""
        if self._state in _ENDS and state is not ConsumerState.STOPPED:
            return
        self._state = change(self._state, state)
        self._on_change()

    def statistics(self) -> ConsumerStatistics:
        """Return what the consumer is doing and has done."""
        counts = self._settler.counts
        return ConsumerStatistics(
            queue=self.queue.name,
            state=self._state,
            in_flight=self._runs.in_flight,
            waiting=self._runs.waiting,
            handled=counts.handled,
            failed=counts.failed,
            requeued=counts.requeued,
            retried=counts.retried,
            dead_lettered=counts.dead_lettered,
            duplicates=self._runs.duplicates,
            stale_settles=counts.stale_settles,
            is_slowed=self._runs.is_slowed,
            losses=self._losses,
            last_error=self._last_error,
        )

    # Subscribing

    async def run(self, tasks: TaskGroup) -> None:
        """Stay subscribed until the worker stops; handlers run in ``tasks``.

        Raises:
            ConnectionLostError: The connection can never be made.
            TopologyError: The queue can never be consumed from.
        """
        self._tasks = tasks
        self._runs.start_in(tasks)
        with anyio.CancelScope() as self._loop_scope:
            failures, reconnects = 0, 0
            while not self._stopping.is_set():
                self._change(ConsumerState.CONNECTING)
                try:
                    await self._connection.wait_connected()
                    if reconnects != self._connection.reconnects:
                        # Whatever failed on another connection: connecting has pauses of its own.
                        failures, reconnects = 0, self._connection.reconnects
                    await self._trials.wait_over()
                    subscription = await self._subscribe()
                except WorkQueueError as exc:
                    if self._stopping.is_set():
                        break
                    self._last_error = str(exc)
                    self._change(ConsumerState.FAILED)
                    raise
                if subscription is None:
                    failures += 1
                else:
                    lived = await self._follow(subscription)
                    failures = 1 if lived >= _GOOD_AFTER else failures + 1
                if self._stopping.is_set():
                    break
                longest = min(_BACKOFF_MAX, 0.05 * 2.0 ** min(failures, 10))
                pause = longest * random.uniform(0.5, 1.0)  # noqa: S311 - jitter
                await self._connection.sleep(pause)

    async def _subscribe(self) -> Subscription | None:
        """Declare the queue and subscribe; None when that failed and may succeed later."""
        try:
            await self._connection.declare(declarations(self.queue), timeout=self._timeout)
            self._is_answered.clear()
            subscription = await self._connection.subscribe(
                self.queue.name,
                prefetch_count=self._runs.prefetch_count,
                on_delivery=self._runs.on_delivery,
                timeout=self._timeout,
            )
            self._subscription = subscription
        except AccessRefusedError:
            raise
        except ConnectionLostError as exc:
            self._lose(str(exc))
            return None
        except TopologyError as exc:
            if not (self._was_subscribed and exc.code in _PASSING):
                raise
            self._lose(str(exc))
            return None
        finally:
            self._is_answered.set()
            self._runs.forget_lost()  # deliveries may come before the subscription is made
        self._was_subscribed = True
        if subscription.is_lost:
            return subscription
        self._change(ConsumerState.SUBSCRIBED)
        if self._last_error:
            _log.warning("The consumer of queue %r is subscribed again.", self.queue.name)
        return subscription

    async def _follow(self, subscription: Subscription) -> float:
        """Wait until the subscription is lost; return how many seconds it lived."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        reason = await subscription.wait_lost()
        self._subscription = None
        self._runs.forget_lost()
        if not self._stopping.is_set():
            self._losses += 1
            self._lose(reason)
        await subscription.aclose(timeout=_STEP_TIMEOUT)
        return loop.time() - began

    def _lose(self, reason: str) -> None:
        self._last_error = reason
        _log.warning(
            "The consumer of queue %r is not subscribed: %s It tries again.",
            self.queue.name,
            reason if reason.endswith(".") else f"{reason}.",
        )
        self._change(ConsumerState.LOST)

    # Trials

    async def pause(self, *, keep: Unsettled) -> None:
        """Take no more deliveries, and give back what was not started, but for one. Bounded."""
        subscription = self._paused = self._subscription
        if subscription is not None:
            async with self._asking:
                await subscription.cancel(timeout=_STEP_TIMEOUT)
        await self._runs.give_back_unstarted(keep=keep)

    async def resume(self) -> None:
        """Take deliveries again. Bounded."""
        subscription, self._paused = self._paused, None
        if subscription is not None and subscription is self._subscription:
            async with self._asking:
                await self._ask_again(subscription)
        self._runs.start_waiting()

    async def _ask_again(self, subscription: Subscription) -> None:
        if self._stopping.is_set() or self._state in _ENDS:
            return
        self._is_answered.clear()  # a stop waits for it, and then cancels
        try:
            await subscription.resume(
                prefetch_count=self._runs.prefetch_count,
                timeout=_STEP_TIMEOUT,
            )
        finally:
            self._is_answered.set()

    def _restore_prefetch(self) -> None:
        if self._tasks is not None and not self._stopping.is_set():
            self._tasks.start_soon(self._subscribe_anew)

    async def _subscribe_anew(self) -> None:
        """Ask for as many deliveries as the handler wants, on the same channel."""
        async with self._asking:
            subscription = self._subscription
            if subscription is not None and not self._trials.is_on:
                await subscription.cancel(timeout=_STEP_TIMEOUT)
                await self._ask_again(subscription)

    # Stopping

    @property
    def is_idle(self) -> bool:
        """Whether no handler runs."""
        return self._runs.in_flight == 0

    async def wait_idle(self) -> None:
        """Wait until no handler runs."""
        await self._runs.wait_idle()

    async def give_back_unstarted(self) -> None:
        """Give back what was delivered and never started; that is no attempt. Bounded."""
        await self._runs.give_back_unstarted()

    def hurry(self) -> None:
        """Let no copy that is under way take longer than a few seconds more."""
        self._settler.hurry()

    async def stop_consuming(self, *, flush: bool = False) -> None:
        """Take no more deliveries. Bounded, twice harmless.

        Args:
            flush: Whether what waits for the rest of its batch is started then.
        """
        self._change(ConsumerState.DRAINING)
        try:
            # RabbitMQ may have subscribed us already: what it hands over can still go back.
            with anyio.move_on_after(_STEP_TIMEOUT):
                await self._is_answered.wait()
            if self._subscription is not None:
                await self._subscription.cancel(timeout=_STEP_TIMEOUT)
            elif self._loop_scope is not None:
                self._loop_scope.cancel()
        finally:
            if flush:
                self._runs.flush()
            self._runs.end_pauses()

    async def close(self) -> None:
        """Give back what was never started, send what is settled, close the channel. Bounded."""
        await self.stop_consuming()
        await self._runs.give_back_unstarted()
        if self._subscription is not None:
            await self._subscription.aclose(timeout=_STEP_TIMEOUT)
        if self._loop_scope is not None:
            self._loop_scope.cancel()
        if self._state is ConsumerState.DRAINING:
            self._change(ConsumerState.STOPPED)
