"""Delays as arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aioworkq.retry import RetryPolicy, requeue_pause


def test_the_pause_before_a_requeue_grows_to_five_seconds() -> None:
    """The numbers of the docstring."""
    pauses = [requeue_pause(attempt) for attempt in range(1, 9)]
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5, 5])
    assert requeue_pause(10**9) == 5


def test_the_defaults_yield_the_delays_of_the_docstring() -> None:
    """1, 2, 4, 8, 16, 32, 64 seconds, then dead-lettered."""
    policy = RetryPolicy()
    assert [policy.delay(attempt) for attempt in range(1, 8)] == [1, 2, 4, 8, 16, 32, 64]
    assert policy.attempts == 8


def test_jitter_takes_off_at_most_its_part() -> None:
    """A spread of nearly one takes nearly the whole part off."""
    policy = RetryPolicy(first=10, jitter=0.5)
    assert policy.delay(1, spread=0) == 10
    assert policy.delay(1, spread=0.5) == 7.5


@given(st.integers(1, 10**6), st.floats(0, 1, exclude_max=True))
@settings(deadline=None)
def test_no_delay_is_negative_or_longer_than_max(attempt: int, spread: float) -> None:
    """However often it is tried, even where the power overflows."""
    policy = RetryPolicy(attempts=10**6, first=0.5, max=120, factor=3, jitter=1)
    assert 0 <= policy.delay(attempt, spread=spread) <= 120


def test_a_policy_chooses_by_exception() -> None:
    """`give_up_on` goes before `on`."""
    policy = RetryPolicy(on=OSError, give_up_on=(FileNotFoundError,))
    assert policy.applies_to(ConnectionError())
    assert not policy.applies_to(FileNotFoundError())
    assert not policy.applies_to(ValueError())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"attempts": 0}, "attempts is 0"),
        ({"first": -1}, "first is -1"),
        ({"first": float("inf")}, "first is inf"),
        ({"first": 10, "max": 5}, "max is 5: it must be at least first"),
        ({"factor": 0.5}, "factor is 0.5"),
        ({"jitter": 2}, "jitter is 2"),
        ({"jitter": float("nan")}, "jitter is nan"),
    ],
)
def test_a_policy_that_cannot_be_right_is_refused(options: dict[str, Any], sentence: str) -> None:
    """Where it is made, not where it first matters."""
    with pytest.raises(ValueError, match=sentence):
        RetryPolicy(**options)
