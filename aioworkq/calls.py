"""The calls of one handler: their limits, what it raised, and what that means.

Whatever a handler raises ends in an outcome here; only what ends the process, or comes from the
worker itself, goes through. Nothing is settled here.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from typing import TYPE_CHECKING, Any

import anyio

from aioworkq.errors import BatchError, Signal
from aioworkq.outcome import Ack, Outcome, Requeue, bounded, check_outcome, outcome_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aioworkq.handler import Handler, ThreadCall
    from aioworkq.handler_tasks import HandlerTasks
    from aioworkq.message import Delivery
    from aioworkq.orphans import Orphans
    from aioworkq.pace import Pace
    from aioworkq.run_state import Run
    from aioworkq.settle import Counts

_log = logging.getLogger("aioworkq")


class Calls:
    """Calls a handler, decides what its errors mean, and tells its pace of them.

    Args:
        handler: What is called.
        counts: Where failures are counted.
        pace: What is told of successes and failures.
        orphans: What is told of runs whose thread goes on when their time is up.
        tasks: Where the handler runs: whether all of them are being cancelled.
    """

    def __init__(
        self,
        handler: Handler,
        *,
        counts: Counts,
        pace: Pace,
        orphans: Orphans[Run],
        tasks: HandlerTasks,
    ) -> None:
        self._handler = handler
        self._counts = counts
        self._pace = pace
        self._orphans = orphans
        self._tasks = tasks

    async def handle(
        self,
        runs: Sequence[Run],
        body: Any,
        delivery: Any,
        thread: ThreadCall | None,
    ) -> Exception | Requeue | None:
        """Run the handler, within its limits if it has any.

        Args:
            runs: What it is called for: one delivery, or a batch.
            body: The body, or the list of them.
            delivery: The delivery, or the list of them.
            thread: The call's thread, if it has one.

        Returns:
            None if it returned, what it raised, or what becomes of deliveries that it lost.
        """
        options = self._handler.options
        if options.timeout is None and options.on_connection_loss != "cancel":
            error = await self._call(body, delivery, thread)
            return None if error is None else self._answer(runs, error)
        with anyio.CancelScope() as scope:
            for run in runs:
                run.scope = scope
            if options.timeout is not None:
                scope.deadline = anyio.current_time() + options.timeout
            error = await self._call(body, delivery, thread)
            return None if error is None else self._answer(runs, error)
        # The scope was cancelled: by its deadline, or because the connection was lost.
        if thread is not None and not thread.has_ended.is_set():
            for run in runs:
                self._orphans.add(run)
        if self._are_given_up(runs):
            return Requeue(counts=False)
        return TimeoutError(f"the handler exceeded {options.timeout:g} s")

    def _are_given_up(self, runs: Sequence[Run]) -> bool:
        """Say whether the handler was cancelled because its connection was lost."""
        cancels = self._handler.options.on_connection_loss == "cancel"
        return cancels and any(run.delivery.lost for run in runs)

    def _answer(self, runs: Sequence[Run], error: Exception) -> Exception | Requeue:
        """Say what an error of the handler is: its answer to being cancelled is no failure.

        A driver may turn a cancellation into an error of its own, and a cleanup may fail.
        """
        if isinstance(error, Signal | BatchError):
            return error
        is_cancelled = any(run.life.cancel_called for run in runs) or self._tasks.are_cancelled
        if not (is_cancelled or self._are_given_up(runs)):
            return error
        _log.warning(
            "Handler %s raised an error when it was cancelled: what it had goes back.",
            self._handler.name,
            exc_info=error,
        )
        return Requeue(counts=False)

    async def _call(self, body: Any, delivery: Any, thread: ThreadCall | None) -> Exception | None:
        """Call the handler, and return what it raised."""
        try:
            if thread is None:
                await self._handler.call(body, delivery)
            else:
                await self._handler.call_in_thread(body, delivery, thread)
        except Exception as exc:  # whatever a handler raises must end in an outcome
            return exc
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as exc:
            if isinstance(exc, asyncio.CancelledError) and self._is_cancelled():
                raise
            return _as_error(exc)
        return None

    def _is_cancelled(self) -> bool:
        """Say whether the worker, or the end of the event loop, cancelled the handler's task."""
        return anyio.current_effective_deadline() == -math.inf or self._tasks.are_cancelled

    def failure(self, run: Run, exc: Exception) -> Outcome:
        """Decide what becomes of a delivery whose handler raised, log it, and tell the pace."""
        outcome = self.decide(run, exc)
        if run.has_failed:
            self.note_failure(run.delivery)
            self.log_failure(repr(run.delivery), type(outcome).__name__, exc)
        return outcome

    def decide(self, run: Run, exc: Exception) -> Outcome:
        """Decide what becomes of a delivery whose handler raised, and count it."""
        delivery, options = run.delivery, self._handler.options
        run.has_failed = not isinstance(exc, Signal)
        try:
            outcome = outcome_of(
                exc,
                delivery,
                attempts=options.attempts,
                on_error=options.on_error,
                retry=options.retry,
                spread=random.random(),  # noqa: S311 - jitter
            )
            check_outcome(outcome, "on_error returned")
        except (Exception, SystemExit) as broken:  # on_error is the user's function
            _log.exception("on_error of handler %s failed.", self._handler.name)
            error = broken
            if not isinstance(error, Exception):
                error = RuntimeError(f"on_error raised {type(broken).__name__}")
            outcome = outcome_of(error, delivery, attempts=options.attempts)
        outcome = bounded(outcome, delivery, attempts=options.attempts, exc=exc)
        if run.has_failed:
            self._counts.failed += 1
        if options.on_error == "discard" and isinstance(outcome, Ack):
            self._counts.discarded += 1
        return outcome

    def note_success(self) -> bool:
        """Take note of a success, and say whether it ends the slow pace."""
        if not self._pace.succeeded():
            return False
        _log.warning("Handler %s succeeds again: back to full speed.", self._handler.name)
        return True

    def note_failure(self, delivery: Delivery) -> None:
        """Take note of a failure, which may begin the slow pace."""
        if self._pace.failed(delivery.attempt):
            _log.warning(
                "Handler %s fails on nearly every message: it runs one at a time, with rests, "
                "until one succeeds. What it needs may be down.",
                self._handler.name,
            )

    def log_failure(self, what: str, outcome: str, exc: Exception) -> None:
        """Log what the handler failed on, and what becomes of it."""
        _log.warning(
            "Handler %s failed on %s: %s.",
            self._handler.name,
            what,
            outcome,
            exc_info=exc,
        )


def _as_error(exc: BaseException) -> RuntimeError:
    """Make an error of what a handler raised that is none."""
    if isinstance(exc, asyncio.CancelledError):
        text = "the handler raised CancelledError, though the worker did not cancel it"
    else:
        text = f"the handler raised {type(exc).__name__}"
    error = RuntimeError(text)
    error.__cause__ = exc
    return error
