"""Where the CPU time of a message goes: samples of what runs, by module.

``python -m tests.benchmarks.profile`` prints the tables of ``docs/explanation/internals.md``. The
kernel says when a few milliseconds of CPU are used up; what the interpreter runs then is counted.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from aioworkq import Producer, Queue, Worker
from aioworkq.testing import RabbitMQ

if TYPE_CHECKING:
    from collections.abc import Generator
    from types import FrameType

MESSAGES: Final = 200_000
ROWS: Final = 12
INTERVAL: Final = 0.001
LIBRARIES: Final = {
    "/aiormq/": "aiormq and pamqp",
    "/pamqp/": "aiormq and pamqp",
    "/anyio/": "AnyIO",
    "/asyncio/": "asyncio",
    "/selectors.py": "asyncio",
    "weakref": "weak references, for tasks",
}


@dataclass
class Order:
    number: int
    text: str


def part_of(path: str) -> str:
    """Say which part of the whole a file is."""
    _, found, module = path.partition("/aioworkq/")
    if found and "/tests/" not in path:
        return f"`{module.removesuffix('.py').replace('/', '.')}`"
    for part, name in LIBRARIES.items():
        if part in path:
            return name
    return "the rest"


@contextmanager
def sampled(what: str) -> Generator[None]:
    """Sample what runs, and print the shares."""
    samples: Counter[str] = Counter()

    def note(_: int, frame: FrameType | None) -> None:
        if frame is not None:
            samples[part_of(frame.f_code.co_filename)] += 1

    before, began = signal.signal(signal.SIGPROF, note), time.process_time()
    signal.setitimer(signal.ITIMER_PROF, INTERVAL, INTERVAL)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    cpu = (time.process_time() - began) / MESSAGES * 1e6
    total = samples.total()
    print(f"\n| {what}: {cpu:.1f} µs a message | share |\n| --- | --- |")
    for part, count in samples.most_common(ROWS):
        print(f"| {part} | {100 * count / total:.0f} % |")


async def main() -> None:
    """Publish, then handle."""
    raw, typed = Queue("raw", bytes, type="classic"), Queue("typed", Order, type="classic")
    async with RabbitMQ() as node, Producer(node.url) as producer:
        await producer.publish(raw, b"the first one declares the queue")
        with sampled("`publish_many`, 256 bytes"):
            await producer.publish_many(raw, [b"x" * 256] * MESSAGES)
        await producer.publish_many(typed, [Order(1, "x" * 230)] * MESSAGES)
        worker, left, begins, ends = Worker(node.url), MESSAGES, asyncio.Event(), asyncio.Event()

        @worker.handler(typed, prefetch_count=100, concurrency=100)
        async def handle(order: Order) -> None:
            nonlocal left
            left -= 1
            begins.set()
            if not left:
                ends.set()

        async with worker:
            await begins.wait()
            with sampled("a no-op handler, typed JSON"):
                await ends.wait()


if __name__ == "__main__":
    asyncio.run(main())
