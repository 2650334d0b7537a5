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


def spread(these: Iterable[float], those: Iterable[float]) -> str:
    """Return the lowest and the highest of the ratios of each round."""
    ratios = [a / b for a, b in zip(these, those, strict=True)]
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


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


@dataclass(frozen=True, kw_only=True)
class Row:
    """Two contestants beside each other, and what the first of them aims at.

    Attributes:
        title: What they do.
        ours: The name of the one.
        theirs: The name of the other.
        least_ratio: The target of the ratio of their rates; None for none.
        most_cpu: The target of ours, in CPU µs per message; None for none.
    """

    title: str
    ours: str
    theirs: str
    least_ratio: float | None = None
    most_cpu: float | None = None

    def cells(self, taken: Mapping[str, Series]) -> list[str]:
        """Return what stands below the `heading`."""
        ours, theirs = taken[self.ours], taken[self.theirs]
        return [
            self.title,
            f"{ours.rate:,.0f}",
            f"{theirs.rate:,.0f}",
            f"{median_ratio(ours.rates, theirs.rates):.2f}",
            spread(ours.rates, theirs.rates),
            target("at least", self.least_ratio),
            f"{ours.cpu:.0f}",
            target("at most", self.most_cpu),
            f"{theirs.cpu:.0f}",
            f"{median_ratio(ours.cpus, theirs.cpus):.2f}",
        ]


def heading(theirs: str) -> tuple[str, ...]:
    """Return the heading of a table of rows."""
    rates = ("msg/s ours", f"msg/s {theirs}", "ratio", "lowest to highest", "target")
    return ("", *rates, "CPU µs ours", "target", f"CPU µs {theirs}", "ratio")


def target(word: str, value: float | None) -> str:
    """Return the cell of a target, which is empty where there is none."""
    return "" if value is None else f"{word} {value:g}"
