"""How long to wait before a message is tried again: arithmetic only, no clock, no random source."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from aioworkq.errors import check_number, is_whole

_PAUSE_FIRST: Final = 0.1
_PAUSE_MAX: Final = 5.0


def requeue_pause(attempt: int) -> float:
    """Return the seconds a worker keeps a failed message before it gives it back to the queue.

    ``min(5, 0.1 * 2 ** (attempt - 1))``: 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5, 5, … seconds.
    """
    return min(_PAUSE_MAX, _PAUSE_FIRST * 2.0 ** min(attempt - 1, 30))


def _check_classes(name: str, value: object) -> None:
    for one in value if isinstance(value, tuple) else (value,):
        if not (isinstance(one, type) and issubclass(one, BaseException)):
            raise TypeError(
                f"{name} is {value!r}: it must be an exception class, or a tuple of them.",
            )


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often a failed message is tried again, and after which delays.

    The delay after attempt *n* is ``min(max, first * factor ** (n - 1))``, of which a random part
    of up to ``jitter`` is taken off, so that what failed together does not come back together.
    RabbitMQ waits for that, rounded up as any delay is: to eighths of a second, or by less than one
    part in 16. The defaults yield 0.875 to 1, 1.625 to 2, 3.125 to 4, up to 8, 16, 32 and 64 s, and
    then dead-letter the message after its 8th attempt, two minutes after its first.

    Attributes:
        attempts: Starts in all, the first one included; at least 1.
        first: Seconds after the first attempt.
        max: No delay is longer, in seconds, but for the rounding.
        factor: By how much each delay is longer than the one before; at least 1.
        jitter: The part of a delay that is random, 0 to 1.
        on: Only these exceptions are retried; others dead-letter the message at once.
        give_up_on: These exceptions are never retried, even where ``on`` would have them.

    Raises:
        ValueError: A number is out of range.
        TypeError: A value is no number, or no exception class.
    """

    attempts: int = 8
    first: float = 1.0
    max: float = 3600.0
    factor: float = 2.0
    jitter: float = 0.25
    on: tuple[type[Exception], ...] | type[Exception] = Exception
    give_up_on: tuple[type[Exception], ...] | type[Exception] = ()

    def __post_init__(self) -> None:
        if not is_whole(self.attempts) or self.attempts < 1:
            raise ValueError(f"attempts is {self.attempts!r}: it must be a whole number from 1.")
        for name in ("first", "max", "factor", "jitter"):
            check_number(name, getattr(self, name))
        for name in ("on", "give_up_on"):
            _check_classes(name, getattr(self, name))
        if not 0 <= self.first < math.inf:
            raise ValueError(f"first is {self.first}: it must be a number of seconds, 0 or more.")
        if not self.first <= self.max < math.inf:
            raise ValueError(f"max is {self.max}: it must be at least first, {self.first} seconds.")
        if not 1 <= self.factor < math.inf:
            raise ValueError(f"factor is {self.factor}: it must be at least 1.")
        if not 0 <= self.jitter <= 1:
            raise ValueError(f"jitter is {self.jitter}: it must be from 0 to 1.")

    def delay(self, attempt: int, *, spread: float = 0.0) -> float:
        """Return the seconds to wait after this attempt.

        Args:
            attempt: The attempt that failed, from 1.
            spread: A random number of [0, 1) from the caller; 0 for the delay without jitter.
        """
        try:
            # As a float, which overflows: a large int would be worked out digit by digit.
            longest = self.first * float(self.factor) ** (attempt - 1)
        except OverflowError:
            longest = self.max if self.first else 0.0
        return min(self.max, longest) * (1 - self.jitter * spread)

    def applies_to(self, exc: Exception) -> bool:
        """Say whether this exception is one to retry."""
        return isinstance(exc, self.on) and not isinstance(exc, self.give_up_on)
