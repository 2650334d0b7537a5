"""Runs whose message RabbitMQ may hand over again while they go on.

Their connection was lost, or they are threads whose time is up. A redelivery of such a message, or
a copy of it, waits for the end of the run; this finds the run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

from aioworkq.redelivery import common_key
from aioworkq.settle import Unsettled

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aioworkq.message import Message

U = TypeVar("U", bound=Unsettled)


class Orphans(Generic[U]):
    """A set of runs, each found by its message in no more time when there are many."""

    def __init__(self) -> None:
        self._runs: dict[U, str | bytes] = {}
        self._by_message: dict[str | bytes, dict[U, None]] = {}

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[U]:
        return iter(self._runs)

    def __contains__(self, run: object) -> bool:
        return run in self._runs

    def add(self, run: U) -> None:
        """Add a run. Twice harmless."""
        key = self._runs.setdefault(run, common_key(run.delivery.message))
        self._by_message.setdefault(key, {})[run] = None

    def discard(self, run: U) -> None:
        """Take a run out, if it is in."""
        if run not in self._runs:
            return
        key = self._runs.pop(run)
        del self._by_message[key][run]
        if not self._by_message[key]:
            del self._by_message[key]

    def find(self, message: Message) -> U | None:
        """Return the oldest run of this message, of a copy of it, or of an equal one without id."""
        return next(iter(self._by_message.get(common_key(message), ())), None)
