"""Admission: whether a delivery may be handled, and what becomes of it otherwise.

It may have no attempt left, a body that cannot be decoded, or a channel that is lost. It may have
to be replaced by a copy that carries its count, or that is meant for a trial. All this is found out
before its handler is called.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import anyio

from aioworkq.background import to_the_end
from aioworkq.errors import DecodeError, TopologyError, WorkQueueError
from aioworkq.message import (
    CRASHED,
    MANY_RETURNS,
    TRIAL,
    is_counted_by_broker,
    own_attempts,
    returns,
)
from aioworkq.outcome import DeadLetter, Outcome, Requeue, failure_of

if TYPE_CHECKING:
    from aioworkq.duplicates import Duplicates
    from aioworkq.handler import Handler
    from aioworkq.run_state import Run
    from aioworkq.settle import Settler
    from aioworkq.trials import Trials

_log = logging.getLogger("aioworkq")

_NO_COPY_PAUSE: Final = 1.0


class Admission:
    """What the deliveries of one consumer have to pass before they are handled.

    Args:
        handler: What they are for.
        settler: What puts copies in their place.
        trials: Where it is written down that one is started alone.
        duplicates: What is known of their messages.
    """

    def __init__(
        self,
        handler: Handler,
        *,
        settler: Settler,
        trials: Trials,
        duplicates: Duplicates,
    ) -> None:
        self._handler = handler
        self._attempts = handler.options.attempts
        self._settler = settler
        self._trials = trials
        self._duplicates = duplicates

    def look_at_redelivery(self, run: Run) -> None:
        """Note whether a redelivered message has to be replaced by a copy before it is started."""
        headers = run.delivery.message.headers
        own = own_attempts(headers)
        if is_counted_by_broker(headers):
            # The queue may not be one of ours, and drop what came back too often.
            run.needs_recount = returns(headers, redelivered=True) >= MANY_RETURNS
        else:
            run.needs_recount = run.used > own
        run.needs_trial = self._is_suspect(run)

    def _is_suspect(self, run: Run) -> bool:
        """Say whether a message has one attempt left, and may have killed the process before.

        What this process gave back itself, after a failure, did not kill it.
        """
        attempts = self._attempts
        return (
            attempts is not None
            and attempts > 1
            and run.used >= attempts - 1
            and self._is_charged(run)
            and TRIAL not in run.delivery.message.headers
        )

    def _is_charged(self, run: Run) -> bool:
        """Say whether it came back without a failure that its headers or this process know of."""
        message = run.delivery.message
        return run.used > own_attempts(message.headers) + self._duplicates.returns(message)

    def is_used_up(self, run: Run) -> bool:
        """Whether a message has no attempt left."""
        return self._attempts is not None and run.used >= self._attempts

    async def admit(self, run: Run) -> Outcome | None:
        """Say what becomes of a delivery that is not handled; otherwise decode it."""
        delivery = run.delivery
        if (run.needs_recount or run.needs_trial) and await self.is_replaced(run):
            return Requeue(counts=False)  # it is settled
        if run.life.cancel_called:
            await anyio.sleep(0)  # noqa: ASYNC115 - is cancelled here; `lowlevel` is slow to import
        if run.subscription.is_lost:
            self._duplicates.excuse(run)
            return Requeue(counts=False)
        if run.needs_trial:  # and there is no copy for it
            return Requeue(counts=False, pause=_NO_COPY_PAUSE)
        if run.is_trial and (verdict := await self._begin_trial(run)) is not None:
            return verdict
        if self.is_used_up(run):
            reason = CRASHED if self._is_charged(run) else f"gave up after {run.used} attempts"
            return DeadLetter(reason)
        try:
            run.body = self._handler.decode(delivery)
        except Exception as exc:  # a user's type may raise what no codec expects
            reason = str(exc) if isinstance(exc, DecodeError) else "the body cannot be decoded"
            return DeadLetter(reason, failure_of(exc))
        return None

    async def is_replaced(self, run: Run) -> bool:
        """Put a copy that carries its count in the place of a delivery, if that is necessary."""
        if (self.is_used_up(run) and not run.needs_trial) or run.subscription.is_lost:
            return False
        trial_of = self._attempts if run.needs_trial else None
        self._duplicates.expect_copy(run)
        try:
            await to_the_end(self._settler.recount(run, trial_of=trial_of))
        finally:
            if run.is_settled:
                self._duplicates.replaced(run)
        return run.is_settled

    async def _begin_trial(self, run: Run) -> Outcome | None:
        """Write down that a message is started alone, unless it was before: then it crashed."""
        message = run.delivery.message
        try:
            # The mark stays: a crash may have left the message in two copies.
            if await self._trials.is_marked(message):
                run.used += 1
                return DeadLetter(CRASHED)
            run.is_marked = True  # and unmarked again, should it not be known whether it was
            await self._trials.mark(message)
        except TopologyError as exc:  # never: what RabbitMQ charges is all there is to go by
            _log.warning("The trial of %r cannot be marked: %s", run.delivery, exc)
            if run.delivery.redelivered:
                run.used += 1
                return DeadLetter(CRASHED)
            run.is_marked = False
            return None
        except WorkQueueError as exc:
            _log.warning("%r is not started, its trial cannot be marked: %s", run.delivery, exc)
            return Requeue(counts=False, pause=_NO_COPY_PAUSE)
        return None
