"""How fast a handler may go: one run at a time while nearly everything fails.

When a service is down that a handler needs, every message fails. At full speed the queue would be
through all its attempts within minutes, and then a flood of dead letters. So when nearly all
messages fail that are new, the handler is slowed to one run at a time, with a growing rest between
two, until one succeeds. Messages that fail again say nothing: after a burst they are what is left.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from aioworkq.retry import requeue_pause

_LEAST_RUNS: Final = 10
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
        # Of the last runs whether they failed; of failures the first attempts only.
        self._recent: deque[bool] = deque(maxlen=max(_LEAST_RUNS, concurrency))
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
            self._recent.append(False)
            return False
        self.is_slowed = False
        self._recent.clear()
        self._rests = 0
        return True

    def failed(self, attempt: int) -> bool:
        """Take note of a failure, and say whether the slow pace begins with it.

        Args:
            attempt: Which attempt of its message it was, from 1.
        """
        if self.is_slowed or attempt > 1:
            return False
        self._recent.append(True)
        is_full = len(self._recent) == self._recent.maxlen
        self.is_slowed = (
            self._slow_down and is_full and sum(self._recent) >= _SHARE * len(self._recent)
        )
        return self.is_slowed
