"""Deliveries on their way through a batch handler: many that share one run.

What they share is the handler's call, its slot and its time limit. All else is each delivery's own,
as in ``runs.py``: its attempts, its outcome, its pause, its end.
"""

from __future__ import annotations

import asyncio
import functools
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import anyio

from aioworkq.errors import BatchError, check_position
from aioworkq.handler import ThreadCall
from aioworkq.options import Batching
from aioworkq.outcome import Ack, Outcome, Requeue, bounded, check_outcome
from aioworkq.runs import Runs

if TYPE_CHECKING:
    from aioworkq.run_state import Run

_CLOCK_TOLERANCE: Final = 0.001
_ACK: Final = Ack()


class BatchRuns(Runs):
    """The deliveries of one consumer with a batch handler. A slot is a batch's."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._batching = self._handler.options.batching or Batching(1, 0)
        self._timer: asyncio.Task[None] | None = None
        self._finishing: dict[Run, asyncio.Task[None]] = {}

    # Collecting

    def _start_or_keep(self, run: Run) -> None:
        run.came = self._settler.connection.now()
        self._unstarted.append(run)
        self.start_waiting()

    def start_waiting(self) -> None:
        """Start what is full or has waited long enough, if a slot is free."""
        while self._unstarted and self._has_room:
            left = self._time_left()
            if len(self._unstarted) < self._size and left > 0:
                if self._timer is None:
                    oldest = self._unstarted[0]
                    wait = self._settler.connection.sleep(left, until=self._may_go_back)
                    self._timer = self._tasks.start(wait)
                    self._timer.add_done_callback(functools.partial(self._end_wait, oldest))
                return
            self._start_batch()

    def flush(self) -> None:
        """Start what waits for nothing but others of its batch. Called at most once, at a stop."""
        while self._unstarted and self._slots.has_free:
            self._start_batch()

    @property
    def _size(self) -> int:
        """How many messages a batch has: one by one they try whether anything works again."""
        return 1 if self._pace.is_slowed else self._batching.max_size

    def _time_left(self) -> float:
        """Return how many seconds the oldest delivery may wait still."""
        came = self._unstarted[0].came
        if came is None:
            return 0
        waited = max(0, (self._settler.connection.now() - came).total_seconds())
        left = self._batching.max_wait - waited
        return left if left > _CLOCK_TOLERANCE else 0

    def _end_wait(self, oldest: Run, timer: asyncio.Task[None]) -> None:
        """Take the delivery for due that was the oldest; a batch may have taken it before.

        Unless somebody has cancelled the wait: then another one begins, for the batch must not wait
        for ever.
        """
        self._timer = None
        if not timer.cancelled():
            oldest.came = None  # due, even if the time of day was set back meanwhile
        self.start_waiting()

    def _start_batch(self) -> None:
        runs = [self._unstarted.popleft()]
        while (
            self._unstarted
            and len(runs) < self._size
            and not (runs[0].is_trial or self._unstarted[0].is_trial)
        ):
            runs.append(self._unstarted.popleft())
        self._take_slot(*runs)
        self._tasks.start(self._process_batch(runs), functools.partial(self._give_up_all, runs))

    def _is_unbegun(self, run: Run) -> bool:
        return run in self._running and run not in self._finishing

    def _give_up_all(self, runs: list[Run]) -> None:
        """As `_give_up`, for a batch whose task somebody cancelled before its first step."""
        if not any(self._is_unbegun(run) for run in runs):
            return
        self._slots.free(has_failed=False)
        for run in runs:
            self._finish_soon(run, Requeue(counts=False))
        self.start_waiting()

    # Running

    async def _process(self, run: Run) -> None:
        """Bring a delivery to its end that is a batch by itself."""
        await self._process_batch([run])
        finishing = self._finishing.get(run)
        if finishing is not None:
            await asyncio.wait([finishing])

    async def _process_batch(self, runs: list[Run]) -> None:
        """Bring deliveries to their end: run the handler once, free the slot, settle each."""
        life = runs[0].life  # which may be cancelled already
        for run in runs:
            run.life = life
        try:
            with life:
                await self._run_batch(runs)
        finally:
            self._slots.free(has_failed=any(run.has_failed for run in runs))
            self.start_waiting()

    async def _run_batch(self, runs: list[Run]) -> None:
        thread = None if self._handler.is_async else ThreadCall()
        unfinished = dict.fromkeys(runs)
        try:
            for run, verdict in (await self._verdicts(runs)).items():
                if verdict is not None:
                    del unfinished[run]
                    self._finish_soon(run, verdict)
            batch = list(unfinished)
            if batch:
                outcomes = await self._outcomes(batch, thread)
                unfinished.clear()
                self._settle_all(dict(zip(batch, outcomes, strict=True)), thread)
        finally:
            for run in unfinished:  # cancelled
                self._finish_soon(run, Requeue(counts=False))
        if thread is not None and not thread.has_ended.is_set():
            # The slot stays taken until the thread ends, or nobody waits for it any more.
            left = [self._finishing[run] for run in runs if run in self._finishing]
            if left:
                await asyncio.wait(left)

    async def _verdicts(self, runs: list[Run]) -> dict[Run, Outcome | None]:
        """Say what becomes of those that are not handled; those with None are decoded."""
        verdicts: dict[Run, Outcome | None] = {}

        async def admit(run: Run) -> None:
            verdicts[run] = await self._admission.admit(run)

        async with anyio.create_task_group() as tasks:  # those that wait for a broker's answer
            for run in runs:
                if run.needs_recount or run.needs_trial or run.is_trial:
                    tasks.start_soon(admit, run)
        for run in runs:
            if run not in verdicts:
                await admit(run)
        for run in runs:
            if verdicts[run] is None and run.subscription.is_lost:  # meanwhile
                self._duplicates.excuse(run)
                verdicts[run] = Requeue(counts=False)
        return {run: verdicts[run] for run in runs}

    async def _outcomes(self, batch: list[Run], thread: ThreadCall | None) -> list[Outcome]:
        """Run the handler, and say what becomes of each delivery."""
        for run in batch:
            self._duplicates.begin(run)
        bodies = [run.body for run in batch]
        deliveries = [run.delivery for run in batch]
        result = await self._calls.handle(batch, bodies, deliveries, thread)
        if isinstance(result, Requeue):
            return [result for _ in batch]
        if isinstance(result, BatchError):
            try:
                _check_named(result, len(batch))
            except Exception as wrong:  # its class and its values may be anybody's
                wrong.__cause__ = result
                result = wrong
        outcomes = self._decide_all(batch, result)
        failed = [run for run in batch if run.has_failed]
        if any(run.succeeded for run in batch):
            if self._calls.note_success():
                self._slots.end_rest()
        else:
            for run in failed:
                self._calls.note_failure(run.delivery)
        return outcomes

    def _decide_all(self, batch: list[Run], error: Exception | None) -> list[Outcome]:
        if error is None or isinstance(error, BatchError):
            named = {} if error is None else error.outcomes
            return [self._decide_item(run, named.get(at, _ACK)) for at, run in enumerate(batch)]
        outcomes = [self._calls.decide(run, error) for run in batch]
        if any(run.has_failed for run in batch):
            kinds = Counter(type(outcome).__name__ for outcome in outcomes)
            self._calls.log_failure(
                f"a batch of {len(batch)} messages from {self._handler.queue.name!r}",
                ", ".join(f"{count} {kind}" for kind, count in kinds.items()),
                error,
            )
        return outcomes

    def _decide_item(self, run: Run, named: Outcome | Exception) -> Outcome:
        """Decide what becomes of one delivery, as the handler said it."""
        if isinstance(named, Exception):
            outcome = self._calls.decide(run, named)
            if run.has_failed:
                self._calls.log_failure(repr(run.delivery), type(outcome).__name__, named)
            return outcome
        run.succeeded = isinstance(named, Ack)
        return bounded(named, run.delivery, attempts=self._handler.options.attempts)

    # Settling

    def _settle_all(self, outcomes: dict[Run, Outcome], thread: ThreadCall | None) -> None:
        """Settle first what is done, in one step; then each of the others in a task of its own."""
        done = [
            run
            for run, outcome in outcomes.items()
            if isinstance(outcome, Ack) and not run.is_marked and run not in self._orphans
        ]
        for run in done:
            self._settled(run, _ACK, self._settler.ack(run))
        for run, outcome in outcomes.items():
            if not run.is_settled:
                self._finish_soon(run, outcome, thread if run in self._orphans else None)
        for run in done:
            self._end(run)

    def _finish_soon(
        self,
        run: Run,
        outcome: Outcome,
        thread: ThreadCall | None = None,
    ) -> None:
        run.life = anyio.CancelScope()  # of its own from now on
        self._finishing[run] = self._tasks.start(
            self._finish(run, outcome, thread),
            functools.partial(self._finish_still, run, outcome, thread),
        )

    def _finish_still(self, run: Run, outcome: Outcome, thread: ThreadCall | None) -> None:
        """Begin again to settle what somebody cancelled before it began."""
        if run in self._finishing:
            self._finish_soon(run, outcome, thread)

    async def _finish(self, run: Run, outcome: Outcome, thread: ThreadCall | None) -> None:
        """Settle one delivery, after its pause; let go of it once its thread has ended."""
        try:
            with run.life:
                try:
                    if isinstance(outcome, Requeue) and outcome.pause:
                        await self._pause(outcome.pause)
                finally:
                    await self._carry_out(run, outcome)
                if thread is not None:
                    await thread.has_ended.wait()
        finally:
            del self._finishing[run]
            self._end(run)


def _check_named(error: BatchError, size: int) -> None:
    """Check that the handler named items of its batch, and outcomes.

    Raises:
        ValueError: The batch has no such position, or an outcome's number makes no sense.
        TypeError: A value is no outcome.
    """
    for position, value in error.outcomes.items():
        check_position(position)
        if position >= size:
            raise ValueError(
                f"BatchError names the item {position}: the batch has {size}, counted from 0.",
            )
        if not isinstance(value, Exception):
            check_outcome(value, f"BatchError says of item {position}")
