"""The pace of a handler: when it is slowed, and when that ends."""

from __future__ import annotations

import pytest

from aioworkq.pace import Pace


def fail(pace: Pace, count: int) -> list[bool]:
    """Let new messages fail."""
    return [pace.failed(1) for _ in range(count)]


@pytest.mark.parametrize(("concurrency", "streak"), [(1, 10), (5, 10), (20, 20), (100, 100)])
def test_a_streak_of_failures(concurrency: int, streak: int) -> None:
    """Ten new messages, or as many as the concurrency, that all fail slow it to one at a time."""
    pace = Pace(concurrency, slow_down=True)
    assert pace.limit == concurrency
    assert fail(pace, streak) == [False] * (streak - 1) + [True]
    assert pace.is_slowed
    assert pace.limit == 1


def test_the_rests_grow_and_are_bounded() -> None:
    """Between two runs it rests for 0.1 s at first, and for 5 s at most."""
    pace = Pace(1, slow_down=True)
    fail(pace, 10)
    rests = []
    for attempt in range(1, 20):
        rests.append(pace.rest())
        assert not pace.failed(attempt)
    assert rests[0] == 0.1
    assert rests == sorted(rests)
    assert rests[-1] == 5


def test_one_success_ends_it() -> None:
    """The first success brings the full speed back, and the streak is forgotten."""
    pace = Pace(20, slow_down=True)
    fail(pace, 20)
    assert pace.succeeded()
    assert not pace.is_slowed
    assert pace.limit == 20
    assert not any(fail(pace, 19))
    assert fail(pace, 1) == [True]
    assert pace.rest() == 0.1


def test_nearly_all_is_enough() -> None:
    """One success in ten does not hide an outage; one in five says that there is none."""
    pace = Pace(20, slow_down=True)
    for number in range(18):
        assert not (pace.succeeded() if number in {3, 9} else pace.failed(1))
    assert fail(pace, 2) == [False, True]
    other = Pace(10, slow_down=True)
    for number in range(1000):
        assert not (other.succeeded() if number % 5 == 0 else other.failed(1))


def test_messages_that_fail_again_are_no_outage() -> None:
    """Poison and retries are all that is left after a burst; they slow nothing down."""
    pace = Pace(10, slow_down=True)
    assert not any(pace.failed(attempt) for attempt in range(2, 1000))
    assert not any(fail(pace, 9))


def test_it_can_be_turned_off() -> None:
    """Without slow_down nothing ever slows it."""
    pace = Pace(10, slow_down=False)
    assert not any(fail(pace, 1000))
    assert not pace.succeeded()
    assert pace.limit == 10
