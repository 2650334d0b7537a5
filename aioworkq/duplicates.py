"""Deliveries of messages that this process has, or had, already: held back, acked, or excused.

What RabbitMQ hands over again may still run here: then it is held until that run has ended. It may
be done, and only its ack was lost: then it is acked. Or it came back without having been started:
then that is charged to nobody. What is remembered for this is in ``redelivery.py``, and the runs
that may be handed over again in ``orphans.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from aioworkq.message import COPIES, is_counted_by_broker
from aioworkq.orphans import Orphans
from aioworkq.redelivery import RedeliveryMemory, identity
from aioworkq.settle import Settled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from datetime import datetime

    from aioworkq.message import Message
    from aioworkq.outcome import Outcome
    from aioworkq.run_state import Run

_MEMORY: Final = 1000


class Duplicates:
    """What one consumer knows of messages that may come again.

    Args:
        prefetch_count: How many deliveries there are at a time: some more are remembered.

    Attributes:
        acked: How many deliveries were acked and not run, because their message was done.
        orphans: The runs whose message may be handed over while they go on.
    """

    def __init__(self, *, prefetch_count: int) -> None:
        # Of acks it keeps the number of the subscription, not the subscription: that would keep
        # the channel, the connection and its socket.
        self._memory: RedeliveryMemory[int] = RedeliveryMemory(
            size=max(_MEMORY, 4 * prefetch_count),
        )
        self.orphans: Orphans[Run] = Orphans()
        self.acked = 0

    @property
    def held(self) -> int:
        """How many deliveries wait for the end of a run."""
        return sum(len(run.held) for run in self.orphans)

    # A delivery comes

    def excused(self, message: Message) -> int:
        """Return how many returns of this message were no attempts."""
        return self._memory.excused(message)

    def returns(self, message: Message) -> int:
        """Return how many returns of this message were failed attempts of this process."""
        return self._memory.returns(message)

    def take(self, run: Run) -> bool:
        """Take a delivery that is not to be started, or not yet."""
        if self.orphans and self._hold(run):
            return True
        return run.delivery.redelivered and self._ack_done(run)

    def _hold(self, run: Run) -> bool:
        """Let a redelivery, or a copy, of what still runs here wait for the end of that run."""
        message = run.delivery.message
        if not (run.delivery.redelivered or message.message_id or COPIES in message.headers):
            return False
        orphan = self.orphans.find(message)
        if orphan is None:
            return False
        orphan.held.append(run)
        return True

    def _ack_done(self, run: Run) -> bool:
        """Ack a redelivery of what was done here, and whose ack was lost."""
        if self._memory.acked_on(run.delivery.message) in {None, run.generation}:
            return False
        self._ack(run)
        return True

    def _ack(self, run: Run) -> None:
        run.is_settled = True
        self.acked += 1
        run.subscription.ack(run.tag)
        self._memory.acked(run.delivery.message, run.generation)

    # It is started, lost, settled

    def begin(self, run: Run) -> None:
        """Take note that a handler is started."""
        self._memory.started(run.delivery.message)
        run.was_started = True

    def excuse(self, run: Run) -> None:
        """Remember that a message comes back, and that this was no attempt."""
        message = run.delivery.message
        if run.delivery.redelivered and not is_counted_by_broker(message.headers):
            # A classic queue's flag is set already: it counts no more.
            self._memory.started(message)
        else:
            self._memory.excuse(message)

    def forget_lost(self) -> None:
        """Let go of held deliveries whose subscription is lost."""
        for orphan in self.orphans:
            for run in [run for run in orphan.held if run.subscription.is_lost]:
                orphan.held.remove(run)
                self.excuse(run)

    def expect_copy(self, run: Run) -> None:
        """Let a copy of this delivery wait until that is settled.

        It may be here before the original's ack is on its way. If it killed the process then, there
        would be two of them, each to be started as often as one may be.
        """
        self.orphans.add(run)

    def replaced(self, run: Run) -> None:
        """Take note that a copy is in the place of a delivery."""
        self._memory.acked(run.delivery.message, run.generation)
        run.is_done = True

    def first_failure(self, message: Message) -> datetime | None:
        """Return when an attempt of this message first failed in this process."""
        return self._memory.first_failure(message)

    def settled(
        self, run: Run, outcome: Outcome, settled: Settled, *, now: Callable[[], datetime]
    ) -> None:
        """Take note of what has become of a delivery."""
        if run.succeeded or settled is Settled.ACKED:
            # If its ack is lost on the way, the redelivery is acked and not run again.
            self._memory.acked(run.delivery.message, run.generation)
            run.is_done = True
        elif settled is Settled.RETURNED and getattr(outcome, "counts", run.was_started):
            self._memory.returned(run.delivery.message, now())
        elif settled is Settled.OVERCOUNTED:
            self.excuse(run)

    def release(self, run: Run) -> Iterable[Run]:
        """Return the deliveries that waited for the end of this run and have to be run themselves.

        The others are acked: the run has done their message.
        """
        self.orphans.discard(run)
        if not run.held:
            return ()
        done = identity(run.delivery.message) if run.is_done else None
        held, run.held = run.held, []
        left: list[Run] = []
        for other in held:
            is_redelivery = other.delivery.redelivered and done is not None
            if is_redelivery and identity(other.delivery.message) == done:
                self._ack(other)
            else:
                left.append(other)
        return left
