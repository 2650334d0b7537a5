"""What is made of the numbers of several rounds."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


@dataclass
class Series:
    """The rounds of one contestant in one row."""

    rates: list[float] = field(default_factory=list[float])
    cpus: list[float] = field(default_factory=list[float])

    def add(self, result: Mapping[str, float]) -> None:
        """Add what a contestant printed: messages per second, and CPU µs per message."""
        self.rates.append(result["messages"] / result["wall"])
        self.cpus.append(result["cpu"] / result["messages"] * 1e6)

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    @property
    def cpu(self) -> float:
        return statistics.median(self.cpus)


def median_ratio(these: Iterable[float], those: Iterable[float]) -> float:
    """Return the median of the ratios of each round: what slows a round down slows both."""
    return statistics.median(a / b for a, b in zip(these, those, strict=True))


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that so many percent of all do not exceed (nearest rank)."""
    if not values:
        raise ValueError("there are no values.")
    rank = math.ceil(percent / 100 * len(values))
    return sorted(values)[max(rank, 1) - 1]


def growth(sizes: Sequence[float], costs: Sequence[float]) -> list[float]:
    """Return the exponent of each step: 0 where the cost stays, 1 where it grows as the size."""
    steps = zip(sizes, costs, sizes[1:], costs[1:], strict=False)
    return [math.log(cost / cost0) / math.log(size / size0) for size0, cost0, size, cost in steps]


def is_linear(sizes: Sequence[float], costs: Sequence[float], *, noise: float) -> bool:
    """Say whether no step makes the cost grow by more than the size, and some noise."""
    steps = zip(sizes, costs, sizes[1:], costs[1:], strict=False)
    return all(cost / cost0 <= noise * size / size0 for size0, cost0, size, cost in steps)


def comparison(title: str, ours: Series, theirs: Series) -> list[str]:
    """Return the cells of a row: rates and their ratio, CPU and its ratio."""
    return [
        title,
        f"{ours.rate:,.0f}",
        f"{theirs.rate:,.0f}",
        f"{median_ratio(ours.rates, theirs.rates):.2f}",
        f"{ours.cpu:.0f}",
        f"{theirs.cpu:.0f}",
        f"{median_ratio(ours.cpus, theirs.cpus):.2f}",
    ]
