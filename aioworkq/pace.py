"""How fast a handler may go: one run at a time while nearly everything fails.

When a service is down that a handler needs, every message fails. At full speed the queue would be
through all its attempts within minutes, and then a flood of dead letters. So after a streak of
failures of several messages the handler is slowed to one run at a time, with a growing rest
between two, until one succeeds.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from aioworkq.retry import requeue_pause

if TYPE_CHECKING:
    from collections.abc import Hashable

_LEAST_RUNS: Final = 10
_LEAST_MESSAGES: Final = 5
_SHARE: Final = 0.9


class Pace:
    """The pace of one handler. Pure bookkeeping: it neither waits nor looks at a clock.

    Args:
        concurrency: How many runs there are at a time at full speed.
        slow_down: Whether it is slowed at all.
    """

    def __init__(self, concurrency: int, *, slow_down: bool) -> None:
        self._concurrency = concurrency
        self._slow_down = slow_down
        self._rests = 0
        # Of each run the message, if it failed.
        self._recent: deque[Hashable | None] = deque(maxlen=max(_LEAST_RUNS, 2 * concurrency))
        self.is_slowed = False

    @property
    def limit(self) -> int:
        """How many runs there may be at a time."""
        return 1 if self.is_slowed else self._concurrency

    def rest(self) -> float:
        """Return the seconds to rest now, before one more is tried: each time more, 0.1 to 5."""
        self._rests += 1
        return requeue_pause(self._rests)

    def succeeded(self) -> bool:
        """Take note of a success, and say whether it ends the slow pace."""
        if not self.is_slowed:
            if self._recent:
                self._recent.append(None)
            return False
        self.is_slowed = False
        self._recent.clear()
        self._rests = 0
        return True

    def failed(self, message: Hashable) -> bool:
        """Take note of a failure, and say whether the slow pace begins with it.

        Args:
            message: What tells the message from others: one that fails again and again by itself
                says nothing about the others.
        """
        if self.is_slowed:
            return False
        self._recent.append(message)
        failures = [one for one in self._recent if one is not None]
        if (
            not self._slow_down
            or len(self._recent) < (self._recent.maxlen or 0)
            or len(failures) < _SHARE * len(self._recent)
            or len(set(failures)) < _LEAST_MESSAGES
        ):
            return False
        self.is_slowed = True
        return True
