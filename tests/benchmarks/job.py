"""What a contestant is asked to do, and how it waits between messages.

Nothing here imports aioworkq: the programs of other work queues use it too.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

PREFETCH: Final = 100
_STAMP: Final = 20  # digits of a clock that counts nanoseconds


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one program does; its command line has it as JSON.

    Attributes:
        url: Of the broker.
        queue: The queue; with several handlers, how the names of theirs begin.
        count: How many messages.
        size: Bytes of a body.
        queue_type: ``"classic"`` or ``"quorum"``.
        handlers: How many queues one worker has handlers for.
        rate: Messages per second, paced by the clock; 0 for the next when the last is confirmed.
    """

    url: str
    queue: str
    count: int
    size: int = 256
    queue_type: str = "classic"
    handlers: int = 1
    rate: float = 0.0

    @classmethod
    def from_json(cls, text: str) -> Job:
        return cls(**json.loads(text))

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @property
    def body(self) -> bytes:
        return b"x" * self.size

    @property
    def queues(self) -> list[str]:
        """The names of the queues of several handlers."""
        return [f"{self.queue}-{number}" for number in range(self.handlers)]


class Latencies:
    """Seconds from `publish` to the handler's first line, by the clock that all processes share."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._seconds: list[float] = []
        self.done = asyncio.Event()

    @staticmethod
    def stamped(size: int) -> str:
        """Return a body that says when it was made."""
        return f"{time.monotonic_ns():0{_STAMP}}".ljust(size, "x")

    def take(self, body: str | bytes) -> None:
        """Note the arrival of a body: the first thing that a handler does."""
        now = time.monotonic_ns()
        self._seconds.append((now - int(body[:_STAMP])) / 1e9)
        if len(self._seconds) == self._count:
            self.done.set()

    def summary(self) -> dict[str, Any]:
        """Return all latencies but those of the first tenth, in which connections warm up."""
        return {"latencies": self._seconds[self._count // 10 :]}


async def publish_stamped(job: Job, publish: Callable[[str], Awaitable[Any]]) -> None:
    """Publish stamped bodies: one after the other, or by the clock, come what may of the last."""
    if not job.rate:
        for _ in range(job.count):
            await publish(Latencies.stamped(job.size))
        return

    async def one() -> None:
        await publish(Latencies.stamped(job.size))

    start = time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        for number in range(job.count):
            # Never below 0: those that were due meanwhile start together, and one tick later.
            await asyncio.sleep(max(0.0, start + number / job.rate - time.monotonic()))
            tasks.create_task(one())


def say(**facts: Any) -> None:
    """Print one line of JSON for the program that started this one."""
    print(json.dumps(facts), flush=True)
