"""The messages of one queue that wait for a consumer, in the order RabbitMQ hands them over."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from aioworkq.memory.stored import Stored

_NORMAL: Final = 4
_HIGH: Final = 5
_STRICT_LEVELS: Final = 32
_TURNS_OF_HIGH: Final = 2


class Ready(Protocol):
    """What a queue needs of the order of its messages."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Stored]: ...

    def add(self, stored: Stored) -> None:
        """Take a new message."""
        ...

    def put_back(self, stored: Stored) -> None:
        """Take a message back that was handed over."""
        ...

    def take(self) -> Stored:
        """Take the next message away; there must be one."""
        ...

    def heads(self) -> Iterable[Stored]:
        """Return the messages whose expiry is looked at: no other one is."""
        ...

    def take_head(self, stored: Stored) -> None:
        """Take one of the heads away."""
        ...


class ClassicReady:
    """A classic queue: strict priorities, and what comes back takes its old place.

    Args:
        max_priority: The highest priority; 0 for a queue without priorities.
    """

    def __init__(self, max_priority: int) -> None:
        self._max_priority = max_priority
        self._levels: dict[int, deque[Stored]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._levels.values()))

    def __iter__(self) -> Iterator[Stored]:
        for level in sorted(self._levels, reverse=True):
            yield from self._levels[level]

    def _level(self, stored: Stored) -> deque[Stored]:
        priority = min(stored.message.priority or 0, self._max_priority)
        return self._levels.setdefault(priority, deque())

    def add(self, stored: Stored) -> None:
        """Take a new message; see the protocol."""
        self._level(stored).append(stored)

    def put_back(self, stored: Stored) -> None:
        """Take a message back to its old place; see the protocol."""
        level = self._level(stored)
        place = 0
        while place < len(level) and level[place].sequence < stored.sequence:
            place += 1
        level.insert(place, stored)

    def take(self) -> Stored:
        """Take the next message away; see the protocol."""
        level = max(level for level, messages in self._levels.items() if messages)
        return self._levels[level].popleft()

    def heads(self) -> Iterable[Stored]:
        """Return the first message of each priority."""
        return [messages[0] for messages in self._levels.values() if messages]

    def take_head(self, stored: Stored) -> None:
        """Take one of the heads away."""
        self._level(stored).popleft()


class QuorumReady:
    """A quorum queue: what came back goes first, in the order it came back; then the others.

    Args:
        priorities: How the version treats priorities; see `aioworkq.versions.Semantics.priorities`.
        returns_to_end: Whether what comes back goes behind all others: without a delivery limit it
            does, so that the log of the queue can be cut.
    """

    def __init__(self, priorities: str, *, returns_to_end: bool) -> None:
        self._priorities = priorities
        self._returns_to_end = returns_to_end
        self._returned: deque[Stored] = deque()
        self._levels: dict[int, deque[Stored]] = {}
        self._turns = 0

    def __len__(self) -> int:
        return len(self._returned) + sum(map(len, self._levels.values()))

    def __iter__(self) -> Iterator[Stored]:
        yield from self._returned
        for level in sorted(self._levels, reverse=True):
            yield from self._levels[level]

    def _level(self, stored: Stored) -> deque[Stored]:
        priority = stored.message.priority
        match self._priorities:
            case "shares":
                level = int(priority is not None and priority >= _HIGH)
            case "strict":
                level = _NORMAL if priority is None else min(priority, _STRICT_LEVELS - 1)
            case _:
                level = 0
        return self._levels.setdefault(level, deque())

    def add(self, stored: Stored) -> None:
        """Take a new message; see the protocol."""
        self._level(stored).append(stored)

    def put_back(self, stored: Stored) -> None:
        """Take a message back; see the protocol."""
        if self._returns_to_end:
            self.add(stored)
        else:
            self._returned.append(stored)

    def take(self) -> Stored:
        """Take the next message away; see the protocol."""
        messages = self._next()
        if self._priorities == "shares" and messages is not self._returned:
            self._turns = self._turns + 1 if messages is self._levels.get(1) else 0
        return messages.popleft()

    def _next(self) -> deque[Stored]:
        if self._returned:
            return self._returned
        levels = sorted((level for level, found in self._levels.items() if found), reverse=True)
        both = len(levels) > 1
        if self._priorities == "shares" and both and self._turns >= _TURNS_OF_HIGH:
            return self._levels[levels[-1]]
        return self._levels[levels[0]]

    def heads(self) -> Iterable[Stored]:
        """Return the message that is handed over next, if there is one."""
        return [self._next()[0]] if len(self) else []

    def take_head(self, stored: Stored) -> None:
        """Take the head away."""
        if self._returned and self._returned[0] is stored:
            self._returned.popleft()
        else:
            self._level(stored).popleft()
