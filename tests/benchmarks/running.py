"""Runs contestants, each in a process of its own, beside one private RabbitMQ."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import subprocess
import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import aio_pika

from aioworkq import Producer, Queue
from tests.benchmarks.figures import Series

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping

    from aioworkq.testing import RabbitMQ
    from tests.benchmarks.job import Job

ROOT: Final = Path(__file__).parents[2]
PEERS_PYTHON: Final = ROOT / ".venv-bench" / "bin" / "python"
PINS: Final = Path(__file__).with_name("peers.txt")

_LONGEST_LINE: Final = 64 * 2**20  # a line has all latencies of a run
_OURS: Final = ("aio-pika", "aiormq", "anyio", "msgspec")
_VERSIONS: Final = """
import json, sys
from importlib.metadata import version
print(json.dumps([f"{name} {version(name)}" for name in sys.argv[1:]]))
"""

K = TypeVar("K")


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


def is_of_this_environment(name: str) -> bool:
    """Say whether a contestant runs beside aioworkq; the others need an environment of theirs."""
    return name.startswith(("ours", "idiom"))


@asynccontextmanager
async def started(name: str, job: Job) -> AsyncGenerator[Contestant]:
    """Run a contestant; the end of the block waits for its end, or brings it about."""
    is_local = is_of_this_environment(name)
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


async def check_queue(node: RabbitMQ, job: Job) -> None:
    """Ask the broker whether a contestant used the same as all others.

    Raises:
        RuntimeError: Its queue is of another type or not durable, or has a message that is not
            persistent.
    """
    items = "messages, messages_persistent" if job.queue_type == "classic" else ""
    facts = await node.eval(
        f'{{ok, Queue}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"/">>, queue, <<"{job.queue}">>)),'
        "Counts = [Count || {_, Count} <- rabbit_amqqueue:info(Queue, [" + items + "])],"
        "{amqqueue:get_type(Queue), amqqueue:is_durable(Queue), length(lists:usort(Counts)) < 2}"
    )
    expected = f"{{rabbit_{job.queue_type}_queue,true,true}}"
    if facts != expected:
        raise RuntimeError(
            f"the queue {job.queue} is not what all contestants use: (type, durable, all messages "
            f"persistent) is {facts} and not {expected}."
        )


async def measured(
    node: RabbitMQ, name: str, job: Job, *, is_filled: bool = False, keep: bool = False
) -> dict[str, Any]:
    """Run one contestant alone with a queue of its own, which is filled before if it consumes.

    Those of other environments declare and fill their queues themselves: by then it must be gone.
    """
    if not is_filled and is_of_this_environment(name):
        await fill(job, job.count if "_consume" in name else 1)
    result = await result_of(name, job)
    await check_queue(node, job)
    if not keep:
        await delete(job.url, [job.queue])
    return result


def turned(names: Iterable[K], number: int) -> list[K]:
    """Return the order of a round: every other one is backwards, and then another one begins."""
    order = list(names)
    begin = number // 2 % len(order)
    order = order[begin:] + order[:begin]
    return order[::-1] if number % 2 else order


async def interleaved(
    rounds: int, runs: Mapping[K, Callable[[], Awaitable[Mapping[str, Any]]]]
) -> dict[K, Series]:
    """Run contestants in turn, in another order in each round."""
    taken = {name: Series() for name in runs}
    for number in range(rounds):
        for name in turned(runs, number):
            result = await runs[name]()
            taken[name].add(result)
            rate, cpu = taken[name].rates[-1], taken[name].cpus[-1]
            print(f"{name}: {rate:,.0f} msg/s, CPU {cpu:.0f} µs", flush=True)
    return taken


def peer_versions() -> str:
    """Return the versions of the other work queues, as they are installed."""
    names = [line.partition("==")[0] for line in PINS.read_text().splitlines() if "==" in line]
    printed = subprocess.run(
        [PEERS_PYTHON, "-c", _VERSIONS, *names], stdout=subprocess.PIPE, check=True
    ).stdout
    return f"The environment of the others has {', '.join(json.loads(printed))}."


def footer(node: RabbitMQ | None, part: str, rounds: int, *more: str) -> list[str]:
    """Return what each section ends with: where its numbers come from, and how to repeat it.

    Args:
        node: The broker; None where there was none.
        part: What `make bench` calls this.
        rounds: Of how many the medians are.
        more: Versions beside those of our own environment.
    """
    versions = [f"Python {platform.python_version()}"]
    versions += [f"RabbitMQ {node.version}"] if node else []
    versions += [f"{name} {version(name)}" for name in _OURS]
    versions += more
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
