"""What becomes of a delivery: the closed union, and the one pure function that decides it.

Carrying an outcome out is ``settle.py``'s work. Nothing here waits, publishes or looks at a clock.
"""

from __future__ import annotations

import inspect
import math
import traceback
from typing import TYPE_CHECKING, Literal, TypeAlias

from msgspec import Struct

from aioworkq.errors import MessageError, Reject, RetryLater, check_number
from aioworkq.message import Failure
from aioworkq.retry import requeue_pause

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioworkq.message import Delivery
    from aioworkq.retry import RetryPolicy


class Ack(Struct, frozen=True):
    """Done: the broker may forget the message."""


class Requeue(Struct, frozen=True):
    """Back to the queue it came from (negative acknowledgement with requeue).

    Attributes:
        pause: Seconds that this worker waits before it gives the message back, so that a message
            that fails again and again cannot become a hot loop.
        counts: Whether this delivery was an attempt.
    """

    pause: float = 0.0
    counts: bool = True


class Retry(Struct, frozen=True):
    """Once more after a delay, which the broker keeps.

    Attributes:
        delay: Seconds.
        counts: Whether this delivery was an attempt.
    """

    delay: float
    counts: bool = True


class DeadLetter(Struct, frozen=True):
    """To ``<queue>.dead``, with this reason in its headers."""

    reason: str
    failure: Failure | None = None


Outcome: TypeAlias = Ack | Requeue | Retry | DeadLetter

OnError: TypeAlias = (
    "Literal['requeue', 'dead-letter', 'discard'] | Callable[[Exception, Delivery], Outcome]"
)


def outcome_of(
    exc: Exception,
    delivery: Delivery,
    *,
    attempts: int | None,
    on_error: OnError = "requeue",
    retry: RetryPolicy | None = None,
    spread: float = 0.0,
) -> Outcome:
    """Decide what becomes of a delivery whose handler raised.

    Args:
        exc: What the handler raised, a signal or an error.
        delivery: The delivery; ``attempt`` says how many starts were used, this one included.
        attempts: How many starts a message gets in all; None for no bound.
        on_error: What the handler's options say.
        retry: The handler's retry policy, which goes before ``on_error``.
        spread: A random number of [0, 1), for the jitter of the retry policy.

    Returns:
        The outcome. A message that used its attempts up is dead-lettered whatever was asked for.

    Raises:
        Exception: What a function given as ``on_error`` raises.
    """
    match exc:
        case Reject():
            return DeadLetter(exc.reason)
        case MessageError():
            return DeadLetter(str(exc), failure_of(exc))
        case RetryLater():
            if exc.counts and is_used_up(delivery.attempt, attempts):
                return DeadLetter(f"gave up after {delivery.attempt} attempts", failure_of(exc))
            return Retry(exc.delay, counts=exc.counts)
        case _:
            pass
    if callable(on_error):
        return on_error(exc, delivery)
    if on_error == "discard":
        return Ack()
    failure = failure_of(exc)
    if retry is not None and not retry.applies_to(exc):
        return DeadLetter(f"not retried: {failure.type}", failure)
    if on_error == "dead-letter":
        return DeadLetter(f"failed: {failure.type}", failure)
    if is_used_up(delivery.attempt, attempts):
        return DeadLetter(f"gave up after {delivery.attempt} attempts", failure)
    if retry is not None:
        return Retry(retry.delay(delivery.attempt, spread=spread))
    return Requeue(pause=requeue_pause(delivery.attempt))


def is_used_up(attempt: int, attempts: int | None) -> bool:
    """Say whether an attempt of this number was the last one a message gets."""
    return attempts is not None and attempt >= attempts


def bounded(
    outcome: Outcome,
    delivery: Delivery,
    *,
    attempts: int | None,
    exc: Exception | None = None,
) -> Outcome:
    """Return the outcome, or a dead letter if it asks for an attempt that there is not.

    Args:
        outcome: What was decided.
        delivery: What it was decided for.
        attempts: How many starts a message gets in all; None for no bound.
        exc: What the handler raised, for the dead letter.
    """
    if (
        isinstance(outcome, Requeue | Retry)
        and outcome.counts
        and is_used_up(delivery.attempt, attempts)
    ):
        failure = None if exc is None else failure_of(exc)
        return DeadLetter(f"gave up after {delivery.attempt} attempts", failure)
    return outcome


def check_outcome(outcome: object, source: str) -> None:
    """Check an outcome that comes from a user.

    Args:
        outcome: What is to be one.
        source: Where it comes from, as the start of a sentence that goes on with its value.

    Raises:
        TypeError: It is no outcome.
        ValueError: A number in it makes no sense.
    """
    if inspect.iscoroutine(outcome):
        outcome.close()
    match outcome:
        case Ack():
            return
        case DeadLetter(failure=failure):
            if failure is not None and not isinstance(failure, Failure):
                raise TypeError(
                    f"{source} DeadLetter: its failure is {failure!r:.60}, and must be a Failure. "
                    "Leave it out: what a handler raises is written down anyway.",
                )
        case Requeue(pause=seconds) | Retry(delay=seconds):
            check_number(f"{source} {type(outcome).__name__}: its number of seconds", seconds)
            if not seconds >= 0 or (seconds == math.inf and isinstance(outcome, Requeue)):
                raise ValueError(f"{source} {outcome!r}: that is no number of seconds.")
        case _:
            raise TypeError(
                f"{source} {outcome!r}: it must be Ack, Requeue, Retry or DeadLetter.",
            )


def failure_of(exc: BaseException) -> Failure:
    """Turn an exception into text; never raises, even when the exception's own ``str`` does."""
    kind = type(exc)
    name = (
        kind.__qualname__
        if kind.__module__ == "builtins"
        else f"{kind.__module__}.{kind.__qualname__}"
    )
    try:
        message = str(exc)
    except Exception as broken:  # an exception's __str__ is user code
        message = f"<its text cannot be made: {type(broken).__name__}>"
    try:
        trace = "".join(traceback.format_exception(exc, limit=-30))
    except Exception:  # the same user code, reached through traceback
        trace = ""
    return Failure(name, message, trace)
