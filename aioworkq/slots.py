"""Slots: how many runs of a handler there are at a time, and whether one more may begin now.

Not while all slots are taken, of which a slow pace leaves one; not during its rests, nor during a
trial of the worker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from aioworkq.broker import Connection
    from aioworkq.handler_tasks import HandlerTasks
    from aioworkq.pace import Pace
    from aioworkq.trials import Trials


class Slots:
    """The slots of one consumer.

    Args:
        pace: Says how many there are, and how long to rest between two runs of a slow pace.
        tasks: What the rests are waited for in.
        trials: While one is on, nothing else may be started.
        connection: Whose clock the rests go by.
        may_go_back: Set once the consumer is cancelled: then there are no rests.
        on_end_of_rest: Called when something may be started again.

    Attributes:
        used: How many slots are taken.
    """

    def __init__(
        self,
        pace: Pace,
        *,
        tasks: HandlerTasks,
        trials: Trials,
        connection: Connection,
        may_go_back: asyncio.Event,
        on_end_of_rest: Callable[[], None],
    ) -> None:
        self._pace = pace
        self._tasks = tasks
        self._trials = trials
        self._connection = connection
        self._may_go_back = may_go_back
        self._on_end_of_rest = on_end_of_rest
        self._resting: asyncio.Task[None] | None = None
        self.used = 0

    @property
    def has_free(self) -> bool:
        """Whether there is a slot for one more."""
        return (
            self.used < self._pace.limit
            and self._resting is None
            and not self._trials.is_on
            and self._tasks.is_guarded
            and not self._tasks.are_cancelled
        )

    def free(self, *, has_failed: bool) -> None:
        """Give a slot back, and rest if nearly everything fails."""
        self.used -= 1
        if has_failed and self._pace.is_slowed and not self.used and not self._may_go_back.is_set():
            rest = self._connection.sleep(self._pace.rest(), until=self._may_go_back)
            self._resting = self._tasks.start(rest)
            self._resting.add_done_callback(self._end_of_rest)

    def _end_of_rest(self, task: asyncio.Task[None]) -> None:
        """Go on, even if somebody has cancelled the rest: it must not last for ever."""
        if self._resting is task:
            self._resting = None
            self._on_end_of_rest()

    def end_rest(self) -> None:
        """Rest no longer: something succeeded."""
        if self._resting is not None:
            self._resting.cancel()
            self._resting = None
        self._on_end_of_rest()
