"""What is made of the numbers of several rounds."""

from __future__ import annotations

import pytest

from tests.benchmarks.figures import (
    Row,
    Series,
    growth,
    heading,
    is_linear,
    median_ratio,
    percentile,
    spread,
)


@pytest.mark.parametrize(
    ("percent", "value"), [(1, 1), (50, 50), (50.5, 51), (99, 99), (100, 100), (0, 1)]
)
def test_a_percentile_is_a_value_by_its_rank(percent: float, value: float) -> None:
    """Of 1 to 100, the number of the rank, whatever the order."""
    assert percentile(list(range(100, 0, -1)), percent) == value


def test_one_value_is_every_percentile() -> None:
    """There is nothing to choose."""
    assert percentile([7.0], 1) == percentile([7.0], 99) == 7.0


def test_no_values_have_no_percentile() -> None:
    """It is not 0."""
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


def test_a_ratio_is_taken_within_a_round() -> None:
    """A round that was slow for both has the ratio of the others."""
    assert median_ratio([20.0, 2.0, 22.0], [10.0, 1.0, 10.0]) == 2.0


def test_growth_is_an_exponent_for_each_step() -> None:
    """A constant has 0, what doubles with the size 1, what is squared 2."""
    assert growth([1, 10, 100], [3, 3, 30]) == pytest.approx([0, 1])
    assert growth([1, 10], [1, 100]) == pytest.approx([2])


def test_one_step_is_enough_to_be_faster_than_linear() -> None:
    """Slow growth before does not make up for it."""
    assert is_linear([1, 10, 100], [5, 6, 65], noise=1.1)
    assert not is_linear([1, 10, 100], [5, 6, 75], noise=1.1)


def test_the_spread_is_of_the_ratios_within_a_round() -> None:
    """It is not the ratio of the extremes."""
    assert spread([20.0, 3.0], [10.0, 1.0]) == "2.00 to 3.00"


def test_a_row_has_medians_ratios_and_targets() -> None:
    """Rates per second, CPU in microseconds per message; a target that is not is left empty."""
    ours, theirs = Series(), Series()
    for wall, times in ((1.0, 2), (2.0, 2), (4.0, 3)):
        ours.add({"messages": 4000, "wall": wall, "cpu": 0.1})
        theirs.add({"messages": 4000, "wall": times * wall, "cpu": 0.4})
    row = Row(title="row", ours="a", theirs="b", least_ratio=1.1)
    cells = row.cells({"a": ours, "b": theirs})
    assert cells == [
        "row", "2,000", "1,000", "2.00", "2.00 to 3.00", "at least 1.1",
        "25", "", "100", "0.25",
    ]  # fmt: skip
    assert len(heading("theirs")) == len(cells)
