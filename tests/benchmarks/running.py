"""Runs contestants, each in a process of its own, beside one private RabbitMQ."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import aio_pika

from aioworkq import Producer, Queue
from tests.benchmarks.figures import Series

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable

    from aioworkq.testing import RabbitMQ
    from tests.benchmarks.job import Job

ROOT: Final = Path(__file__).parents[2]
PEERS_PYTHON: Final = ROOT / ".venv-bench" / "bin" / "python"

_LONGEST_LINE: Final = 64 * 2**20  # a line has all latencies of a run
_OURS: Final = ("aio-pika", "aiormq", "anyio", "msgspec")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much is measured.

    Attributes:
        rounds: How often each contestant runs.
        scale: What all numbers of messages are multiplied by.
    """

    rounds: int
    scale: float

    def scaled(self, count: int) -> int:
        return max(1000, int(count * self.scale) // 1000 * 1000)


@dataclass
class Section:
    """What a part found out: its lines of the page, and its plots by the names of their files."""

    lines: list[str]
    plots: dict[str, str] = field(default_factory=dict[str, str])


class Contestant:
    """A contestant that runs."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self._name = name
        self._process = process

    async def line(self) -> dict[str, Any]:
        """Return the next line that it prints."""
        assert self._process.stdout is not None
        text = await self._process.stdout.readline()
        if not text:
            raise RuntimeError(f"{self._name} ended with {await self._process.wait()}.")
        facts: dict[str, Any] = json.loads(text)
        return facts

    def go_on(self) -> None:
        """Let it go on from where it waits for a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")

    async def ended(self) -> None:
        """Wait until it has ended well."""
        if code := await self._process.wait():
            raise RuntimeError(f"{self._name} ended with {code}.")


@asynccontextmanager
async def started(name: str, job: Job) -> AsyncGenerator[Contestant]:
    """Run a contestant; the end of the block waits for its end, or brings it about."""
    is_local = name.startswith(("ours", "idiom"))
    process = await asyncio.create_subprocess_exec(
        sys.executable if is_local else str(PEERS_PYTHON),
        "-m",
        "tests.benchmarks.contestants" if is_local else "tests.benchmarks.peers",
        name,
        job.to_json(),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
        limit=_LONGEST_LINE,
    )
    contestant = Contestant(name, process)
    try:
        yield contestant
        await contestant.ended()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def result_of(name: str, job: Job) -> dict[str, Any]:
    """Run a contestant that prints one line, and return it."""
    async with started(name, job) as contestant:
        return await contestant.line()


async def fill(job: Job, count: int) -> None:
    """Publish messages, at least one so that the queue is there."""
    queue = Queue(job.queue, bytes, type="quorum" if job.queue_type == "quorum" else "classic")
    async with Producer(job.url) as producer:
        report = await producer.publish_many(queue, (job.body for _ in range(max(count, 1))))
        report.raise_for_errors()


async def declare(url: str, queue: str) -> None:
    """Declare a durable classic queue."""
    async with await aio_pika.connect(url) as connection:
        await (await connection.channel()).declare_queue(queue, durable=True)


async def delete(url: str, queues: Iterable[str]) -> None:
    """Delete queues: what one contestant leaves shall not be in the way of the next."""
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        for queue in queues:
            await channel.queue_delete(queue)


async def purge(url: str, queues: Iterable[str]) -> None:
    """Take out what queues have to hand over."""
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        for queue in queues:
            await (await channel.get_queue(queue, ensure=False)).purge()


async def wait_empty(url: str, queue: str) -> None:
    """Wait until a queue has nothing left to hand over."""
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        while (await channel.declare_queue(queue, passive=True)).declaration_result.message_count:
            await asyncio.sleep(0.1)


async def measured(
    name: str, job: Job, *, is_filled: bool = False, keep: bool = False
) -> dict[str, Any]:
    """Run one contestant alone with a queue of its own, which is filled before if it consumes."""
    if not is_filled:
        await fill(job, job.count if "_consume" in name else 1)
    result = await result_of(name, job)
    if not keep:
        await delete(job.url, [job.queue])
    return result


async def interleaved(rounds: int, jobs: dict[str, Job]) -> dict[str, Series]:
    """Run contestants in turn, who goes first changing with each round."""
    taken = {name: Series() for name in jobs}
    for number in range(rounds):
        names = list(jobs) if number % 2 else list(reversed(jobs))
        for name in names:
            taken[name].add(await measured(name, jobs[name]))
    return taken


def footer(node: RabbitMQ | None, part: str, rounds: int) -> list[str]:
    """Return what each section ends with: where its numbers come from, and how to repeat it."""
    versions = [f"Python {platform.python_version()}"]
    versions += [f"RabbitMQ {node.version}"] if node else []
    versions += [f"{name} {version(name)}" for name in _OURS]
    how_often = "One round" if rounds == 1 else f"Medians of {rounds} rounds"
    return [
        "",
        f"{how_often} with {', '.join(versions)}, on {os.cpu_count()} CPUs "
        f"({_processor()}, {platform.system()} {platform.release()}, one minute's load at the end "
        f"{os.getloadavg()[0]:.1f}). To repeat it: `make bench PARTS={part}`.",
    ]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
