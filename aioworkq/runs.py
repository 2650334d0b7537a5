"""Deliveries of one queue on their way through the handler: started, run, settled.

Each has a task, a slot and a cancel scope of its own. The scope takes the worker's cancellation, so
that AnyIO's shields hold in a handler as they do in a task group. What surrounds that way has
modules of its own: ``handler_tasks.py``, ``slots.py``, ``duplicates.py`` for what comes again,
``admission.py`` for what is not handled, ``calls.py`` for the handler itself.

Where the deliveries come from, and that they come at all, is ``consumer.py``'s.
"""

from __future__ import annotations

import asyncio
import functools
from collections import deque
from typing import TYPE_CHECKING, Final

import anyio

from aioworkq.admission import Admission
from aioworkq.background import to_the_end
from aioworkq.calls import Calls
from aioworkq.duplicates import Duplicates
from aioworkq.handler import ThreadCall
from aioworkq.handler_tasks import HandlerTasks
from aioworkq.message import (
    TRIAL,
    Delivery,
    is_counted_by_broker,
    own_attempts,
    used_attempts,
    without_counts,
)
from aioworkq.outcome import Ack, DeadLetter, Outcome, Requeue
from aioworkq.pace import Pace
from aioworkq.run_state import Run
from aioworkq.slots import Slots

if TYPE_CHECKING:
    from collections.abc import Callable

    from anyio.abc import TaskGroup

    from aioworkq.broker import Incoming, Subscription
    from aioworkq.handler import Handler
    from aioworkq.settle import Settled, Settler, Unsettled
    from aioworkq.trials import Trials

_ACK: Final = Ack()


class Runs:
    """The deliveries of one consumer that are not settled yet.

    Args:
        handler: What to run.
        settler: What carries out the outcomes.
        stopping: Set once the worker stops: then nothing is started any more.
        trials: What lets a message run alone in the worker.
        on_change_of_prefetch: Called when `prefetch_count` is back at what the handler asks for.
    """

    def __init__(
        self,
        handler: Handler,
        *,
        settler: Settler,
        stopping: anyio.Event,
        trials: Trials,
        on_change_of_prefetch: Callable[[], None],
    ) -> None:
        self._handler = handler
        self._settler = settler
        self._stopping = stopping
        self._trials = trials
        self._on_change_of_prefetch = on_change_of_prefetch
        self._is_classic = handler.queue.type == "classic"
        self._is_cautious = False
        self._newest: Subscription | None = None
        self._generation = 0
        self._unstarted: deque[Run] = deque()
        self._trying: dict[Run, asyncio.Task[None]] = {}
        self._running: dict[Run, None] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._may_go_back = asyncio.Event()
        self._tasks = HandlerTasks(
            f"aioworkq handles {handler.queue.name}",
            may_end=self._may_go_back,
        )
        self._pace = Pace(handler.concurrency, slow_down=handler.options.slow_down)
        self._slots = Slots(
            self._pace,
            tasks=self._tasks,
            trials=trials,
            connection=settler.connection,
            may_go_back=self._may_go_back,
            on_end_of_rest=self.start_waiting,
        )
        self._duplicates = Duplicates(prefetch_count=handler.prefetch_count)
        self._orphans = self._duplicates.orphans
        self._admission = Admission(
            handler,
            settler=settler,
            trials=trials,
            duplicates=self._duplicates,
        )
        self._calls = Calls(
            handler,
            counts=settler.counts,
            pace=self._pace,
            orphans=self._orphans,
            tasks=self._tasks,
        )

    def start_in(self, tasks: TaskGroup) -> None:
        """Say whose end is the handlers' end; nothing is started before."""
        if not self._stopping.is_set():
            self._tasks.guard_in(tasks, on_begin=self.start_waiting, on_end=self._cancel_running)

    def _cancel_running(self) -> None:
        for run in list(self._trying):  # what waits for its trial is not started any more
            self._trying.pop(run).cancel()
            self._unstarted.append(run)
        for run in self._running:
            run.life.cancel()

    @property
    def in_flight(self) -> int:
        """How many messages are in the hands of handlers."""
        return len(self._running)

    @property
    def is_slowed(self) -> bool:
        """Whether one runs at a time, because nearly everything fails."""
        return self._pace.is_slowed

    @property
    def duplicates(self) -> int:
        """How many deliveries were acked and not run, because their message was done."""
        return self._duplicates.acked

    @property
    def waiting(self) -> int:
        """How many deliveries are here and not started."""
        return len(self._unstarted) + len(self._trying) + self._duplicates.held

    @property
    def prefetch_count(self) -> int:
        """How many deliveries to ask for: one by one while they come for a trial."""
        return 1 if self._is_cautious else self._handler.prefetch_count

    def forget_lost(self) -> None:
        """Take note of what cannot be settled any more, because its subscription is lost."""
        if self._newest is not None and self._newest.is_lost:
            self._newest = None
        for run in [run for run in self._unstarted if run.subscription.is_lost]:
            self._unstarted.remove(run)
            self._duplicates.excuse(run)
        self._duplicates.forget_lost()
        for run in [run for run in self._trying if run.subscription.is_lost]:
            self._trying.pop(run).cancel()
            self._duplicates.excuse(run)
        for run in self._running:
            if run.subscription.is_lost and not run.delivery.lost:
                run.delivery.lost = True
                self._orphans.add(run)
                if self._handler.options.on_connection_loss == "cancel" and run.scope is not None:
                    run.scope.cancel()

    # Starting

    def on_delivery(self, subscription: Subscription, incoming: Incoming) -> None:
        """Take a delivery: hold it, start it, or keep it until there is room."""
        message = incoming.message
        headers = message.headers
        if self._is_classic and headers and is_counted_by_broker(headers):  # by another queue
            message.headers = without_counts(headers)
        used = own_attempts(message.headers)
        if TRIAL not in message.headers:
            used = used_attempts(
                message.headers,
                redelivered=incoming.redelivered,
                excused=self._duplicates.excused(message) if incoming.redelivered else 0,
            )
            could_copy = not self._settler.counts.failed_copies
            if incoming.redelivered and not (could_copy or is_counted_by_broker(message.headers)):
                known = own_attempts(message.headers) + self._duplicates.returns(message)
                used = max(used, known)
        delivery = Delivery(
            message,
            queue=self._handler.queue.name,
            attempt=used + 1,
            redelivered=incoming.redelivered,
        )
        if subscription is not self._newest:
            self._newest = subscription
            self._generation += 1
        run = Run(
            delivery,
            subscription,
            incoming.tag,
            used,
            generation=self._generation,
            life=anyio.CancelScope(),
        )
        if (incoming.redelivered or self._orphans) and self._duplicates.take(run):
            return
        self._dispatch(run)

    def _dispatch(self, run: Run) -> None:
        """Start what no run of the same message holds up, or keep it until that may be done."""
        if run.delivery.redelivered:
            self._admission.look_at_redelivery(run)
            run.first_failure = self._duplicates.first_failure(run.delivery.message)
        headers = run.delivery.message.headers
        run.is_trial = TRIAL in headers and not self._admission.is_used_up(run)
        if run.is_trial:
            self._try_or_keep(run)
            return
        if self._is_cautious:
            self._is_cautious = False
            self._on_change_of_prefetch()
        self._start_or_keep(run)

    def _try_or_keep(self, run: Run) -> None:
        """Run a message once the worker holds no other, see `trials.py`."""
        if not self._tasks.is_guarded or self._stopping.is_set():
            self._unstarted.append(run)
            return

        async def process() -> None:
            del self._trying[run]
            if not self._tasks.is_guarded or self._stopping.is_set():  # meanwhile
                self._unstarted.append(run)
                return
            self._take_slot(run)
            await self._process(run)

        self._trying[run] = self._tasks.start(
            self._trials.run_alone(run, process), functools.partial(self._give_up, run)
        )

    def _start_or_keep(self, run: Run) -> None:
        if self._has_room and not self._unstarted:
            self._start(run)
        else:
            self._unstarted.append(run)

    def _start(self, run: Run) -> None:
        self._take_slot(run)
        self._tasks.start(self._process(run), functools.partial(self._give_up, run))

    def _give_up(self, run: Run) -> None:
        """Give back what a task was started for that somebody cancelled before its first step."""
        if run in self._trying:
            del self._trying[run]
            self._take_slot(run)
        if self._is_unbegun(run):
            work = self._finish_unbegun(run)
            self._tasks.start(work, functools.partial(self._give_up, run))

    def _is_unbegun(self, run: Run) -> bool:
        """Whether the task of a run has ended, and nobody has seen to it."""
        return run in self._running

    async def _finish_unbegun(self, run: Run) -> None:
        try:
            await self._carry_out(run, Requeue(counts=False))
        finally:
            self._slots.free(has_failed=False)
            self._end(run)

    def _take_slot(self, *runs: Run) -> None:
        self._slots.used += 1
        for run in runs:
            self._running[run] = None
        self._idle.clear()

    def start_waiting(self) -> None:
        """Start what waits for a slot, if one is free."""
        while self._unstarted and self._has_room:
            self._start(self._unstarted.popleft())

    @property
    def _has_room(self) -> bool:
        """Whether one more may be started."""
        return self._slots.has_free and not self._stopping.is_set()

    # Running

    async def _process(self, run: Run) -> None:
        """Bring one delivery to its end: run the handler, settle, free the slot."""
        try:
            with run.life:
                await self._run(run)
        finally:
            self._slots.free(has_failed=run.has_failed)
            self._end(run)

    def _end(self, run: Run) -> None:
        """Let go of a delivery, whose message is settled, and whose handler has ended."""
        del self._running[run]
        self._release(run)
        self.start_waiting()
        if not self._running:
            self._idle.set()

    def _release(self, run: Run) -> None:
        for held in self._duplicates.release(run):
            self._dispatch(held)

    async def _run(self, run: Run) -> None:
        """Run the handler, and settle."""
        outcome: Outcome = Requeue(counts=False)  # stands if we are cancelled before we know better
        thread = None if self._handler.is_async else ThreadCall()
        try:
            outcome = await self._outcome(run, thread)
            if isinstance(outcome, Requeue) and outcome.pause:
                await self._pause(outcome.pause)
        finally:
            await self._carry_out(run, outcome)
        if thread is not None and run.was_started and run in self._orphans:
            # Its time is up and its message settled, but a thread cannot be stopped: the slot
            # stays taken, and a redelivery of the message waits, until it ends.
            await thread.has_ended.wait()

    async def _outcome(self, run: Run, thread: ThreadCall | None) -> Outcome:
        """Say what becomes of the delivery, by running the handler if it may be run."""
        verdict = await self._admission.admit(run)
        if verdict is not None:
            return verdict
        self._duplicates.begin(run)
        result = await self._calls.handle((run,), run.body, run.delivery, thread)
        if result is None:
            run.succeeded = True
            if self._calls.note_success():
                self._slots.end_rest()
            return _ACK
        return self._calls.failure(run, result) if isinstance(result, Exception) else result

    async def _pause(self, seconds: float) -> None:
        """Keep a failed message for a moment, but not while the worker ends.

        It goes back once this consumer is cancelled: before, it would be handed over here again.
        """
        await self._settler.connection.sleep(seconds, until=self._may_go_back)

    # Settling

    async def _carry_out(self, run: Run, outcome: Outcome) -> None:
        """Settle a delivery, whoever is cancelled meanwhile, unless a copy is in its place."""
        if isinstance(outcome, Ack):
            self._settled(run, outcome, self._settler.ack(run))
        elif not run.is_settled:
            if run.is_marked and isinstance(outcome, Requeue):
                # Before it is back, and another worker finds the mark, as if it had crashed.
                run.is_marked = False
                await to_the_end(self._trials.unmark(run.delivery.message))
            await to_the_end(self._settle(run, outcome))
        if run.is_marked:
            await to_the_end(self._trials.unmark(run.delivery.message))

    async def _settle(self, run: Run, outcome: Outcome) -> None:
        if not isinstance(outcome, DeadLetter):
            self._duplicates.expect_copy(run)
        self._settled(run, outcome, await self._settler.settle(run, outcome))

    def _settled(self, run: Run, outcome: Outcome, settled: Settled) -> None:
        """Take note of what has become of a delivery."""
        self._settler.counts.handled += run.succeeded
        self._duplicates.settled(run, outcome, settled, now=self._settler.connection.now)

    # Stopping

    async def wait_idle(self) -> None:
        """Wait until no handler runs."""
        await self._idle.wait()

    def flush(self) -> None:
        """Start what waits for nothing but others of its batch. Called at most once, at a stop."""

    def end_pauses(self) -> None:
        """Give back at once what is kept for a pause: nothing is handed over here any more."""
        self._may_go_back.set()

    async def give_back_unstarted(self, *, keep: Unsettled | None = None) -> None:
        """Give back what was delivered and never started; that is no attempt. Bounded.

        Args:
            keep: What waits for its trial and is not given back.
        """
        trying = [run for run in self._trying if run is not keep]
        self._is_cautious = bool(trying)
        for run in trying:
            self._trying.pop(run).cancel()
        unstarted = [run for run in (*self._unstarted, *trying) if not run.subscription.is_lost]
        self._unstarted.clear()
        await to_the_end(self._give_back_all(unstarted))

    async def _give_back_all(self, runs: list[Run]) -> None:
        async with anyio.create_task_group() as tasks:
            for run in runs:
                tasks.start_soon(self._give_back, run)

    async def _give_back(self, run: Run) -> None:
        # As a plain copy a suspect would be one no more: its charges would look like its own.
        try:
            if not (run.needs_trial and await self._admission.is_replaced(run)):
                await self._settle(run, Requeue(counts=False))
        finally:
            self._release(run)
