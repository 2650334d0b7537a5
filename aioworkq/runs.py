"""Deliveries of one queue on their way through the handler: held, started, run, settled.

Each handler runs in a task of its own, never inside anything that dies with a channel, and in a
copy of the context that the worker was started in. A cancel scope around it takes the worker's
cancellation, so that AnyIO's shields hold in a handler as they do in a task group. The task is one
of asyncio all the same: starting it in a task group costs six times as much. One task of the
worker's group stands for all of them, and ends with the last.

Where the deliveries come from, and that they come at all, is ``consumer.py``'s.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections import deque
from typing import TYPE_CHECKING, Any, Final

import anyio
from anyio.lowlevel import checkpoint

from aioworkq.calls import Calls
from aioworkq.errors import DecodeError, Signal, TopologyError, WorkQueueError
from aioworkq.handler import ThreadCall
from aioworkq.message import (
    CRASHED,
    TRIAL,
    Delivery,
    is_counted_by_broker,
    own_attempts,
    used_attempts,
)
from aioworkq.orphans import Orphans
from aioworkq.outcome import (
    Ack,
    DeadLetter,
    Outcome,
    Requeue,
    failure_of,
)
from aioworkq.pace import Pace
from aioworkq.redelivery import RedeliveryMemory, identity
from aioworkq.settle import Settled, Settler, Unsettled

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from datetime import datetime

    from anyio.abc import TaskGroup

    from aioworkq.broker import Incoming, Subscription
    from aioworkq.handler import Handler
    from aioworkq.trials import Trials

_log = logging.getLogger("aioworkq")

_MEMORY: Final = 1000
_NO_COPY_PAUSE: Final = 1.0
_ACK: Final = Ack()


class Run(Unsettled):
    """One delivery on its way through the handler."""

    __slots__ = (
        "body",
        "came",
        "generation",
        "has_failed",
        "held",
        "is_done",
        "is_marked",
        "is_trial",
        "life",
        "needs_recount",
        "needs_trial",
        "scope",
        "succeeded",
    )

    def __init__(
        self,
        delivery: Delivery,
        subscription: Subscription,
        tag: int,
        used: int,
        *,
        generation: int,
    ) -> None:
        super().__init__(delivery, subscription, tag, used)
        self.generation = generation
        """The number of its subscription."""
        self.body: Any = None
        """What the handler gets, once it is decoded."""
        self.came: datetime | None = None
        """Since when it waits for others of its batch; None if it waits no longer."""
        self.needs_recount = False
        """Whether the queue could not count one more start of it."""
        self.is_trial = False
        """Whether it is run alone."""
        self.is_marked = False
        """Whether it is written down that its trial began."""
        self.needs_trial = False
        """Whether it must be marked for a trial before its last start."""
        self.life = anyio.CancelScope()
        """Cancelled when the worker has no more time for it."""
        self.scope: anyio.CancelScope | None = None
        """Around the handler: its time limit, or the loss of the connection."""
        self.held: list[Run] = []
        """Redeliveries of the same message, which wait for the end of this run."""
        self.has_failed = False
        """Whether the handler raised an error, or exceeded its time limit."""
        self.succeeded = False
        """Whether the handler returned."""
        self.is_done = False
        """Whether the message needs no further run."""


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
        self._task_name = f"aioworkq handles {handler.queue.name}"
        self._settler = settler
        self._stopping = stopping
        self._trials = trials
        self._on_change_of_prefetch = on_change_of_prefetch
        self._trying: dict[Run, asyncio.Task[None]] = {}
        self._is_cautious = False
        self._is_guarded = False
        self._context = contextvars.Context()
        self._pace = Pace(handler.concurrency, slow_down=handler.options.slow_down)
        self._calls = Calls(handler, counts=settler.counts, pace=self._pace)
        self._resting: asyncio.Task[None] | None = None
        self._running: dict[Run, None] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._unstarted: deque[Run] = deque()
        self._orphans: Orphans[Run] = Orphans()
        self._slots_used = 0
        self._newest: Subscription | None = None
        self._generation = 0
        # Of acks it keeps the number of the subscription, not the subscription: that would keep
        # the channel, the connection and its socket.
        self._memory: RedeliveryMemory[int] = RedeliveryMemory(
            size=max(_MEMORY, 4 * handler.prefetch_count),
        )
        self._idle = asyncio.Event()
        self._idle.set()
        self._may_go_back = asyncio.Event()
        self._defect: asyncio.Future[None] | None = None
        self.duplicates = 0

    def start_in(self, tasks: TaskGroup) -> None:
        """Say whose end is the handlers' end; nothing is started before."""
        if not self._stopping.is_set():
            self._context = contextvars.copy_context()
            tasks.start_soon(self._guard)

    async def _guard(self) -> None:
        """Stay until the last run has ended; cancelled, cancel them, and still wait for them."""
        self._defect = asyncio.get_running_loop().create_future()
        self._is_guarded = True
        try:
            self.start_waiting()
            ending = asyncio.ensure_future(self._wait_ended())
            try:
                await asyncio.wait({ending, self._defect}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                ending.cancel()
            if self._defect.done():
                self._defect.result()
        finally:
            self._is_guarded = False
            for run in self._running:
                run.life.cancel()
            with anyio.CancelScope(shield=True):
                while self._tasks:
                    await asyncio.wait(self._tasks)

    async def _wait_ended(self) -> None:
        await self._may_go_back.wait()
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _end_of_task(self, task: asyncio.Task[None]) -> None:
        """Hand on what a run raised: it is no error of a handler, but a defect or an exit."""
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if self._defect is not None and not self._defect.done():
            self._defect.set_exception(error)

    @property
    def in_flight(self) -> int:
        """How many messages are in the hands of handlers."""
        return len(self._running)

    @property
    def is_slowed(self) -> bool:
        """Whether one runs at a time, because nearly everything fails."""
        return self._pace.is_slowed

    @property
    def waiting(self) -> int:
        """How many deliveries are here and not started."""
        held = sum(len(run.held) for run in self._orphans)
        return len(self._unstarted) + len(self._trying) + held

    @property
    def prefetch_count(self) -> int:
        """How many deliveries to ask for: one by one while they come for a trial."""
        return 1 if self._is_cautious else self._handler.prefetch_count

    def forget_lost(self) -> None:
        """Take note of what cannot be settled any more, because its subscription is lost."""
        if self._newest is not None and self._newest.is_lost:
            self._newest = None
        for runs in (self._unstarted, *(orphan.held for orphan in self._orphans)):
            for run in [run for run in runs if run.subscription.is_lost]:
                runs.remove(run)
                self._excuse(run)
        for run in [run for run in self._trying if run.subscription.is_lost]:
            self._trying.pop(run).cancel()
            self._excuse(run)
        for run in self._running:
            if run.subscription.is_lost and not run.delivery.lost:
                run.delivery.lost = True
                self._orphans.add(run)
                if self._handler.options.on_connection_loss == "cancel" and run.scope is not None:
                    run.scope.cancel()

    def _excuse(self, run: Run) -> None:
        """Remember that a message comes back, and that this was no attempt."""
        message = run.delivery.message
        if run.delivery.redelivered and not is_counted_by_broker(message.headers):
            # A classic queue's flag is set already: it counts no more.
            self._memory.started(message)
        else:
            self._memory.excuse(message)

    def on_delivery(self, subscription: Subscription, incoming: Incoming) -> None:
        """Take a delivery: hold it, start it, or keep it until there is room."""
        message = incoming.message
        is_trial = TRIAL in message.headers
        used = own_attempts(message.headers)
        if not is_trial:
            used = used_attempts(
                message.headers,
                redelivered=incoming.redelivered,
                excused=self._memory.excused(message) if incoming.redelivered else 0,
            )
        delivery = Delivery(
            message,
            queue=self._handler.queue.name,
            attempt=used + 1,
            redelivered=incoming.redelivered,
        )
        if subscription is not self._newest:
            self._newest = subscription
            self._generation += 1
        run = Run(delivery, subscription, incoming.tag, used, generation=self._generation)
        if self._orphans and self._is_held(run):
            return
        if incoming.redelivered:
            if self._is_known(run):
                return
            is_classic = not is_counted_by_broker(message.headers)
            run.needs_recount = is_classic and used > own_attempts(message.headers)
            run.needs_trial = self._is_suspect(run)
        run.is_trial = is_trial and not self._is_used_up(run)
        if run.is_trial:
            self._try_or_keep(run)
            return
        if self._is_cautious:
            self._is_cautious = False
            self._on_change_of_prefetch()
        self._start_or_keep(run)

    def _is_suspect(self, run: Run) -> bool:
        """Say whether a message has one attempt left, and may have killed the process before.

        What this process gave back itself, after a failure, did not kill it.
        """
        message, attempts = run.delivery.message, self._handler.options.attempts
        charged = run.used - own_attempts(message.headers) - self._memory.returns(message)
        return (
            attempts is not None
            and attempts > 1
            and run.used >= attempts - 1
            and charged > 0
            and TRIAL not in message.headers
        )

    def _is_held(self, run: Run) -> bool:
        """Let a redelivery, or a copy, of what still runs here wait for the end of that run."""
        message = run.delivery.message
        if not (run.delivery.redelivered or message.message_id):
            return False
        orphan = self._orphans.find(message)
        if orphan is None:
            return False
        orphan.held.append(run)
        return True

    def _is_known(self, run: Run) -> bool:
        """Ack a redelivery of what was done here, and whose ack was lost."""
        if self._memory.acked_on(run.delivery.message) in {None, run.generation}:
            return False
        self._ack_duplicate(run)
        return True

    def _try_or_keep(self, run: Run) -> None:
        """Run a message once the worker holds no other, see `trials.py`."""
        if not self._is_guarded or self._stopping.is_set():
            self._unstarted.append(run)
            return

        async def process() -> None:
            del self._trying[run]
            self._take_slot(run)
            await self._process(run)

        self._trying[run] = self._start_task(self._trials.run_alone(run, process))

    def _start_or_keep(self, run: Run) -> None:
        if self._has_room and not self._unstarted:
            self._start(run)
        else:
            self._unstarted.append(run)

    def _start(self, run: Run) -> None:
        self._take_slot(run)
        self._start_task(self._process(run))

    def _take_slot(self, *runs: Run) -> None:
        self._slots_used += 1
        for run in runs:
            self._running[run] = None
        self._idle.clear()

    def _start_task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        # Not by the loop's task factory, which may be eager: this is called between two steps of
        # the loop. Not in the context of who frees a slot: what a handler sets is not for the next.
        task = asyncio.Task(
            work,
            loop=asyncio.get_running_loop(),
            name=self._task_name,
            context=self._context.copy(),
        )
        self._tasks.add(task)
        task.add_done_callback(self._end_of_task)
        return task

    def start_waiting(self) -> None:
        """Start what waits for a slot, if one is free."""
        while self._unstarted and self._has_room:
            self._start(self._unstarted.popleft())

    @property
    def _has_room(self) -> bool:
        """Whether one more may be started."""
        return self._has_slot and not self._stopping.is_set()

    @property
    def _has_slot(self) -> bool:
        return (
            self._slots_used < self._pace.limit
            and self._resting is None
            and not self._trials.is_on
            and self._is_guarded
        )

    def _rest(self) -> None:
        """Start nothing for a moment: nearly everything fails."""
        if not self._may_go_back.is_set():
            self._resting = self._start_task(self._rest_for(self._pace.rest()))

    async def _rest_for(self, seconds: float) -> None:
        await self._settler.connection.sleep(seconds, until=self._may_go_back)
        self._resting = None
        self.start_waiting()

    def _end_rest(self) -> None:
        if self._resting is not None:
            self._resting.cancel()
            self._resting = None
        self.start_waiting()

    async def _process(self, run: Run) -> None:
        """Bring one delivery to its end: run the handler, settle, free the slot."""
        try:
            with run.life:
                await self._run(run)
        finally:
            self._free_slot(has_failed=run.has_failed)
            self._end(run)

    def _free_slot(self, *, has_failed: bool) -> None:
        self._slots_used -= 1
        if has_failed and self._pace.is_slowed and not self._slots_used:
            self._rest()

    def _end(self, run: Run) -> None:
        """Let go of a delivery, whose message is settled, and whose handler has ended."""
        del self._running[run]
        self._release_held(run)
        self.start_waiting()
        if not self._running:
            self._idle.set()

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

    async def _carry_out(self, run: Run, outcome: Outcome) -> None:
        """Settle a delivery, whoever is cancelled meanwhile, unless a copy is in its place."""
        if isinstance(outcome, Ack):
            self._settled(run, outcome, self._settler.ack(run))
        elif not run.is_settled:
            with anyio.CancelScope(shield=True):
                await self._settle(run, outcome)
        if run.is_marked:
            with anyio.CancelScope(shield=True):
                await self._trials.unmark(run.delivery.message)

    async def _is_replaced(self, run: Run) -> bool:
        """Put a copy that carries its count in the place of a delivery, if that is necessary."""
        if (self._is_used_up(run) and not run.needs_trial) or run.subscription.is_lost:
            return False
        trial_of = self._handler.options.attempts if run.needs_trial else None
        with anyio.CancelScope(shield=True):
            await self._settler.recount(run, trial_of=trial_of)
        if run.is_settled:
            self._memory.acked(run.delivery.message, run.generation)
            run.is_done = True
        return run.is_settled

    def _is_used_up(self, run: Run) -> bool:
        attempts = self._handler.options.attempts
        return attempts is not None and run.used >= attempts

    async def _outcome(self, run: Run, thread: ThreadCall | None) -> Outcome:
        """Say what becomes of the delivery, by running the handler if it may be run."""
        verdict = await self._admit(run)
        if verdict is not None:
            return verdict
        self._begin(run)
        result = await self._handle((run,), run.body, run.delivery, thread)
        if result is None:
            run.succeeded = True
            if self._calls.note_success():
                self._end_rest()
            return _ACK
        return self._failure(run, result) if isinstance(result, Exception) else result

    async def _admit(self, run: Run) -> Outcome | None:
        """Say what becomes of a delivery that is not handled; otherwise decode it."""
        delivery = run.delivery
        if (run.needs_recount or run.needs_trial) and await self._is_replaced(run):
            return Requeue(counts=False)  # it is settled
        if run.life.cancel_called:
            await checkpoint()
        if run.subscription.is_lost:
            self._excuse(run)
            return Requeue(counts=False)
        if run.needs_trial:  # and there is no copy for it
            return Requeue(counts=False, pause=_NO_COPY_PAUSE)
        if run.is_trial and (verdict := await self._begin_trial(run)) is not None:
            return verdict
        if self._is_used_up(run):
            is_charged = run.used > own_attempts(delivery.message.headers)
            return DeadLetter(CRASHED if is_charged else f"gave up after {run.used} attempts")
        try:
            run.body = self._handler.decode(delivery)
        except Exception as exc:  # a user's type may raise what no codec expects
            reason = str(exc) if isinstance(exc, DecodeError) else "the body cannot be decoded"
            return DeadLetter(reason, failure_of(exc))
        return None

    def _begin(self, run: Run) -> None:
        self._memory.started(run.delivery.message)
        run.was_started = True

    async def _begin_trial(self, run: Run) -> Outcome | None:
        """Write down that a message is started alone, unless it was before: then it crashed."""
        message = run.delivery.message
        try:
            # The mark stays: a crash may have left the message in two copies.
            if await self._trials.is_marked(message):
                run.used += 1
                return DeadLetter(CRASHED)
            await self._trials.mark(message)
        except TopologyError as exc:  # never: what RabbitMQ charges is all there is to go by
            _log.warning("The trial of %r cannot be marked: %s", run.delivery, exc)
            if run.delivery.redelivered:
                run.used += 1
                return DeadLetter(CRASHED)
            return None
        except WorkQueueError as exc:
            _log.warning("%r is not started, its trial cannot be marked: %s", run.delivery, exc)
            return Requeue(counts=False, pause=_NO_COPY_PAUSE)
        run.is_marked = True
        return None

    async def _handle(
        self,
        runs: Sequence[Run],
        body: Any,
        delivery: Any,
        thread: ThreadCall | None,
    ) -> Exception | Requeue | None:
        """Run the handler, within its limits if it has any.

        Returns:
            None if it returned, what it raised, or what becomes of deliveries that it lost.
        """
        options = self._handler.options
        if options.timeout is None and options.on_connection_loss != "cancel":
            return await self._calls.call(body, delivery, thread)
        with anyio.CancelScope() as scope:
            for run in runs:
                run.scope = scope
            if options.timeout is not None:
                scope.deadline = anyio.current_time() + options.timeout
            return await self._calls.call(body, delivery, thread)
        # The scope was cancelled: by its deadline, or because the connection was lost.
        if thread is not None and not thread.has_ended.is_set():
            for run in runs:
                self._orphans.add(run)
        if options.on_connection_loss == "cancel" and any(run.delivery.lost for run in runs):
            return Requeue(counts=False)
        return TimeoutError(f"the handler exceeded {options.timeout:g} s")

    def _failure(self, run: Run, exc: Exception) -> Outcome:
        """Decide what becomes of a delivery whose handler raised, and log it."""
        outcome = self._decide(run, exc)
        if run.has_failed:
            self._calls.note_failure(run.delivery)
            self._calls.log_failure(repr(run.delivery), type(outcome).__name__, exc)
        return outcome

    def _decide(self, run: Run, exc: Exception) -> Outcome:
        run.has_failed = not isinstance(exc, Signal)
        return self._calls.decide(run.delivery, exc)

    async def _pause(self, seconds: float) -> None:
        """Keep a failed message for a moment, but not while the worker ends.

        It goes back once this consumer is cancelled: before, it would be handed over here again.
        """
        await self._settler.connection.sleep(seconds, until=self._may_go_back)

    async def _settle(self, run: Run, outcome: Outcome) -> None:
        self._settled(run, outcome, await self._settler.settle(run, outcome))

    def _settled(self, run: Run, outcome: Outcome, settled: Settled) -> None:
        """Take note of what has become of a delivery."""
        message = run.delivery.message
        self._settler.counts.handled += run.succeeded
        # A copy that counts can be told from its original.
        is_gone = settled is Settled.ACKED and getattr(outcome, "counts", True)
        if run.succeeded or is_gone:
            # If its ack is lost on the way, the redelivery is acked and not run again.
            self._memory.acked(message, run.generation)
            run.is_done = True
        elif settled is Settled.ACKED:
            self._memory.settled(message)
        elif settled is Settled.RETURNED and getattr(outcome, "counts", False):
            self._memory.returned(message)
        elif settled is Settled.OVERCOUNTED:
            self._excuse(run)

    def _release_held(self, run: Run) -> None:
        """Deal with the redeliveries that waited for the end of this run."""
        self._orphans.discard(run)
        if not run.held:
            return
        done = identity(run.delivery.message) if run.is_done else None
        held, run.held = run.held, []
        for other in held:
            is_redelivery = other.delivery.redelivered and done is not None
            if is_redelivery and identity(other.delivery.message) == done:
                self._ack_duplicate(other)
            else:
                self._start_or_keep(other)

    def _ack_duplicate(self, run: Run) -> None:
        run.is_settled = True
        self.duplicates += 1
        run.subscription.ack(run.tag)
        self._memory.acked(run.delivery.message, run.generation)

    @property
    def is_idle(self) -> bool:
        """Whether no handler runs."""
        return not self._running

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
        with anyio.CancelScope(shield=True):
            async with anyio.create_task_group() as tasks:
                for run in unstarted:
                    tasks.start_soon(self._give_back, run)

    async def _give_back(self, run: Run) -> None:
        # As a plain copy a suspect would be one no more: its charges would look like its own.
        if not (run.needs_trial and await self._is_replaced(run)):
            await self._settle(run, Requeue(counts=False))
