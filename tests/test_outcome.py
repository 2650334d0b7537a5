"""What becomes of a delivery whose handler raised."""

from __future__ import annotations

from typing import Any

import pytest

from aioworkq.errors import DecodeError, Reject, RetryLater
from aioworkq.message import Delivery, Message
from aioworkq.outcome import (
    Ack,
    DeadLetter,
    Outcome,
    Requeue,
    Retry,
    failure_of,
    is_used_up,
    outcome_of,
)
from aioworkq.retry import RetryPolicy

POLICY = RetryPolicy(attempts=3, first=2, jitter=0, on=ValueError, give_up_on=UnicodeError)
BOOM = ValueError("boom")


def delivery(attempt: int = 1) -> Delivery:
    return Delivery(Message(b"", "q"), queue="q", attempt=attempt, redelivered=False)


def retry_in_7(exc: Exception, delivery: Delivery) -> Outcome:
    return Retry(7)


@pytest.mark.parametrize(
    ("exc", "attempt", "options", "expected"),
    [
        (BOOM, 1, {}, Requeue(pause=0.1)),
        (BOOM, 3, {}, Requeue(pause=0.4)),
        (BOOM, 19, {}, Requeue(pause=5.0)),
        (BOOM, 10**6, {"attempts": None}, Requeue(pause=5.0)),
        (BOOM, 1, {"on_error": "discard"}, Ack()),
        (BOOM, 1, {"on_error": retry_in_7}, Retry(7)),
        (BOOM, 1, {"retry": POLICY, "attempts": 3}, Retry(2)),
        (BOOM, 2, {"retry": POLICY, "attempts": 3}, Retry(4)),
        (RetryLater(5), 1, {}, Retry(5)),
        (RetryLater(5, counts=False), 50, {}, Retry(5, counts=False)),
    ],
)
def test_a_message_that_has_attempts_left_comes_back(
    exc: Exception,
    attempt: int,
    options: dict[str, Any],
    expected: Outcome,
) -> None:
    """Requeued with a pause, or retried after a delay, or as on_error says."""
    options = {"attempts": 20, **options}
    assert outcome_of(exc, delivery(attempt), **options) == expected


@pytest.mark.parametrize(
    ("exc", "attempt", "options", "reason"),
    [
        (Reject("too old"), 1, {}, "too old"),
        (Reject("too old"), 1, {"on_error": "discard"}, "too old"),
        (DecodeError("Email", reason="no"), 1, {}, "the body is not a valid Email"),
        (BOOM, 20, {}, "gave up after 20 attempts"),
        (BOOM, 25, {}, "gave up after 25 attempts"),
        (BOOM, 1, {"attempts": 1}, "gave up after 1 attempts"),
        (BOOM, 3, {"retry": POLICY, "attempts": 3}, "gave up after 3 attempts"),
        (KeyError("k"), 1, {"retry": POLICY}, "not retried: KeyError"),
        (UnicodeError("u"), 1, {"retry": POLICY}, "not retried: UnicodeError"),
        (BOOM, 1, {"on_error": "dead-letter"}, "failed: ValueError"),
        (RetryLater(5), 20, {}, "gave up after 20 attempts"),
    ],
)
def test_a_message_without_hope_is_dead_lettered(
    exc: Exception,
    attempt: int,
    options: dict[str, Any],
    reason: str,
) -> None:
    """With a reason that tells why."""
    options = {"attempts": 20, **options}
    outcome = outcome_of(exc, delivery(attempt), **options)
    assert isinstance(outcome, DeadLetter)
    assert outcome.reason.startswith(reason)


def test_what_on_error_raises_is_passed_on() -> None:
    """The consumer deals with it."""

    def broken(exc: Exception, delivery: Delivery) -> Outcome:
        raise LookupError("on_error is broken")

    with pytest.raises(LookupError):
        outcome_of(BOOM, delivery(), attempts=20, on_error=broken)


def test_attempts_are_used_up_at_their_number() -> None:
    """None is no bound."""
    assert is_used_up(20, 20)
    assert not is_used_up(19, 20)
    assert not is_used_up(10**9, None)


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def test_any_exception_becomes_text() -> None:
    """Even one whose text cannot be made."""
    failure = failure_of(UnprintableError())
    assert failure.type.endswith("UnprintableError")
    assert failure.message == "<its text cannot be made: RuntimeError>"
    assert failure_of(BOOM).type == "ValueError"
    group = failure_of(ExceptionGroup("both", [BOOM, KeyError("k")]))
    assert "boom" in group.traceback
