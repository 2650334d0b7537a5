"""What a contestant is asked to do, the body that it handles, and how it waits between messages.

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
TASKS: Final = 100
"""Publishers at a time, where a contestant can publish from many tasks."""


@dataclass
class Order:
    """What a body says: a JSON document, as work queues have them.

    Attributes:
        stamp: When it was made: nanoseconds of the clock that all processes share.
        note: As long as the body shall be.
    """

    stamp: int
    customer: str
    items: list[str]
    price: float
    is_urgent: bool
    note: str


_JSON: Final = json.JSONEncoder(separators=(",", ":"))


def encode(fields: dict[str, Any]) -> bytes:
    """Return JSON without spaces, as msgspec writes it; made once, an encoder is faster."""
    return _JSON.encode(fields).encode()


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
    def fields(self) -> dict[str, Any]:
        """The fields of an `Order` that makes a body of the size, stamped now."""
        order = Order(
            stamp=time.monotonic_ns(),
            customer="1f0f2c9e-6b8a-4a63-9f3b-0e8a6f6f8f11",
            items=["B-1001", "B-1002", "B-1003"],
            price=129.95,
            is_urgent=False,
            note="",
        )
        fields = asdict(order)
        padding = self.size - len(encode(fields))
        if padding < 0:
            raise ValueError(f"a body has at least {self.size - padding} bytes, not {self.size}.")
        return fields | {"note": "x" * padding}

    @property
    def order(self) -> Order:
        return Order(**self.fields)

    @property
    def body(self) -> bytes:
        return encode(self.fields)

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

    def take(self, stamp: int, now: int | None = None) -> None:
        """Note the arrival of a body: the first thing that a handler does.

        Args:
            stamp: That of the body.
            now: When the first line was reached, by a handler that decodes the body itself.
        """
        now = time.monotonic_ns() if now is None else now
        self._seconds.append((now - stamp) / 1e9)
        if len(self._seconds) == self._count:
            self.done.set()

    def summary(self) -> dict[str, Any]:
        """Return all latencies but those of the first tenth, in which connections warm up."""
        return {"latencies": self._seconds[self._count // 10 :]}


async def publish_stamped(job: Job, publish: Callable[[dict[str, Any]], Awaitable[Any]]) -> None:
    """Publish stamped bodies: one after the other, or by the clock, come what may of the last.

    What encodes the fields belongs to `publish`, and so to the latency.
    """
    fields = job.fields

    async def one() -> None:
        await publish(fields | {"stamp": time.monotonic_ns()})

    if not job.rate:
        for _ in range(job.count):
            await one()
        return
    start = time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        for number in range(job.count):
            # Never below 0: those that were due meanwhile start together, and one tick later.
            await asyncio.sleep(max(0.0, start + number / job.rate - time.monotonic()))
            tasks.create_task(one())


def say(**facts: Any) -> None:
    """Print one line of JSON for the program that started this one."""
    print(json.dumps(facts), flush=True)
