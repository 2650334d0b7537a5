"""What aioworkq costs beside the aio-pika idiom: ``make bench``.

Every contestant publishes or handles the same messages (256 bytes, persistent, confirmed, durable
classic queue, prefetch 100) on one private RabbitMQ, in a process of its own, interleaved in
rounds, so that a slow moment of the machine hits all alike. The table shows medians, and ratios
within a round. CPU per message is the client's alone, and steadier than a rate. Other work queues
are measured when ``.venv-bench`` is there, and the C client when it can be built.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Final

from aioworkq import Producer
from aioworkq.testing import RabbitMQ
from tests.benchmarks.contestants import BODY, bench_queue
from tests.benchmarks.plot import bars

ROOT: Final = Path(__file__).parents[2]
PAGE: Final = ROOT / "docs" / "benchmarks.md"
PLOT: Final = ROOT / "docs" / "benchmarks.svg"
PEERS_PYTHON: Final = ROOT / ".venv-bench" / "bin" / "python"
PEERS_PINS: Final = Path(__file__).with_name("peers.txt")

PEERS: Final = {
    "aioworkq": ("ours_publish_100", "ours_consume"),
    "aio-pika": ("idiom_publish_100", "idiom_consume"),
    "FastStream": ("faststream_publish", "faststream_consume"),
    "taskiq-aio-pika": ("taskiq_publish", "taskiq_consume"),
    "Dramatiq": ("dramatiq_publish", "dramatiq_consume"),
    "Celery": ("celery_publish", "celery_consume"),
}
PEER_MESSAGES: Final = 5_000

C_SOURCE: Final = Path(__file__).with_name("librabbitmq.c")
BESIDE_C: Final = (
    ("publish_many", "ours_publish_many", "publish"),
    ("publish, 1,000 tasks", "ours_publish_1000", "publish"),
    ("no-op worker, prefetch 100", "ours_consume", "consume"),
)
C_MESSAGES: Final = 20_000

PAIRS: Final = (
    ("publish, one at a time", "ours_publish_1", "idiom_publish_1", 3_000),
    ("publish, 100 in flight", "ours_publish_100", "idiom_publish_100", 20_000),
    ("publish, 1,000 tasks", "ours_publish_1000", "idiom_publish_1000", 20_000),
    ("publish_many / 1,000 tasks", "ours_publish_many", "idiom_publish_1000", 20_000),
    ("no-op worker, prefetch 100", "ours_consume", "idiom_consume", 20_000),
)


@dataclass
class Series:
    """The rounds of one contestant in one row."""

    rates: list[float] = field(default_factory=list[float])
    cpus: list[float] = field(default_factory=list[float])

    def add(self, result: dict[str, float]) -> None:
        self.rates.append(result["messages"] / result["wall"])
        self.cpus.append(result["cpu"] / result["messages"] * 1e6)


async def contestant(name: str, url: str, queue: str, count: int) -> list[dict[str, float]]:
    """Run one contestant in a process of its own; return the lines it printed."""
    is_local = name.startswith(("ours", "idiom"))
    process = await asyncio.create_subprocess_exec(
        sys.executable if is_local else str(PEERS_PYTHON),
        "-m",
        "tests.benchmarks.contestants" if is_local else "tests.benchmarks.peers",
        name,
        url,
        queue,
        str(count),
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"{name} ended with {process.returncode}.")
    return [json.loads(line) for line in output.decode().splitlines()]


async def fill(url: str, queue: str, count: int) -> None:
    async with Producer(url) as producer:
        report = await producer.publish_many(bench_queue(queue), (BODY for _ in range(count)))
        report.raise_for_errors()


async def pair(url: str, rounds: int, row: tuple[str, str, str, int]) -> tuple[Series, Series]:
    """Run two contestants in turn, who goes first changing with each round."""
    _, ours, idiom, count = row
    series = {ours: Series(), idiom: Series()}
    for number in range(rounds):
        for name in (ours, idiom) if number % 2 else (idiom, ours):
            queue = f"bench-{name}-{number}"
            await fill(url, queue, count if name.endswith("consume") else 1)
            results = await contestant(name, url, queue, count)
            series[name].add(results[-1])
    return series[ours], series[idiom]


def build_c_client(folder: Path) -> Path | None:
    """Compile the C client; None where there is no compiler or no library."""
    program = folder / "librabbitmq"
    compiler = shutil.which("gcc")
    if compiler is None:
        return None
    built = subprocess.run(
        [compiler, "-O2", "-o", program, C_SOURCE, "-lrabbitmq"],
        capture_output=True,
        check=False,
    )
    return None if built.returncode else program


async def beside_c(node: RabbitMQ, rounds: int, program: Path) -> list[str]:
    """Measure the C client in turn with ours; return its part of the page."""
    taken = {title: (Series(), Series()) for title, *_ in BESIDE_C}
    for number in range(rounds):
        for title, name, verb in BESIDE_C:
            for who, series in zip((name, "c"), taken[title], strict=True):
                queue = f"c-{who}-{name}-{number}"
                await fill(node.url, queue, C_MESSAGES if verb == "consume" else 1)
                if who == "c":
                    series.add(await c_client(program, verb, node, queue))
                else:
                    series.add((await contestant(name, node.url, queue, C_MESSAGES))[-1])
    return [
        "",
        "## Beside the C client",
        "",
        "librabbitmq publishes with 1,000 messages unconfirmed at most, and consumes with prefetch",
        "100 and one ack for a hundred deliveries, without decoding anything. It says what broker",
        f"and machine can do. {C_MESSAGES:,} messages, medians of {rounds} rounds.",
        "",
        "| | msg/s ours | msg/s C | ratio | CPU µs ours | CPU µs C | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(table_row(title, *series) for title, series in taken.items()),
    ]


async def c_client(program: Path, verb: str, node: RabbitMQ, queue: str) -> dict[str, float]:
    arguments = (verb, "127.0.0.1", str(node.port), "/", queue, str(C_MESSAGES))
    process = await asyncio.create_subprocess_exec(
        program, *arguments, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"the C client ended with {process.returncode}.")
    result: dict[str, float] = json.loads(output)
    return result


async def beside_peers(url: str, rounds: int) -> tuple[list[str], str]:
    """Measure the other work queues too; return their part of the page, and the plot."""
    taken = {name: (Series(), Series()) for name in PEERS}
    for number in range(rounds):
        for name, contestants in PEERS.items():
            for contestant_name, series in zip(contestants, taken[name], strict=True):
                queue = f"peers-{contestant_name}-{number}"
                if contestant_name in {"ours_consume", "idiom_consume"}:
                    await fill(url, queue, PEER_MESSAGES)
                elif contestant_name == "idiom_publish_100":
                    await fill(url, queue, 1)
                series.add((await contestant(contestant_name, url, queue, PEER_MESSAGES))[-1])
    costs = {
        name: (statistics.median(publish.cpus), statistics.median(consume.cpus))
        for name, (publish, consume) in taken.items()
    }
    ours = costs["aioworkq"]
    rows = [
        f"| {name} | {publish:.0f} | {publish / ours[0]:.1f} | {consume:.0f} | "
        f"{consume / ours[1]:.1f} |"
        for name, (publish, consume) in costs.items()
    ]
    pins = PEERS_PINS.read_text().splitlines()[1:]
    part = [
        "",
        "## Beside other work queues",
        "",
        f"The same body, {PEER_MESSAGES:,} times, by each one's own documentation: persistent,",
        "confirmed, acked after the handler. Those with asyncio publish in 100 tasks and prefetch",
        "100; Dramatiq and Celery publish one after the other, and handle in 8 threads and in the",
        "worker's own. They do not all do the same: see the comparison for what each promises.",
        f"Medians of {rounds} rounds.",
        "",
        "| | publish, CPU µs | times ours | handle, CPU µs | times ours |",
        "| --- | --- | --- | --- | --- |",
        *rows,
        "",
        "![CPU per message](benchmarks.svg)",
        "",
        f"Versions: {', '.join(pins)}.",
    ]
    return part, bars("CPU µs per message: publish, handle", costs)


def table_row(title: str, ours: Series, idiom: Series) -> str:
    rate = statistics.median(a / b for a, b in zip(ours.rates, idiom.rates, strict=True))
    cpu = statistics.median(a / b for a, b in zip(ours.cpus, idiom.cpus, strict=True))
    cells = [
        title,
        f"{statistics.median(ours.rates):,.0f}",
        f"{statistics.median(idiom.rates):,.0f}",
        f"{rate:.2f}",
        f"{statistics.median(ours.cpus):.0f}",
        f"{statistics.median(idiom.cpus):.0f}",
        f"{cpu:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


async def run(rounds: int, messages: int) -> tuple[str, str]:
    """Measure everything; return the page, and the plot if there is one."""
    rows: list[str] = []
    peers: list[str] = []
    c_part: list[str] = []
    plot = ""
    async with RabbitMQ() as node:
        with tempfile.TemporaryDirectory() as folder:
            program = build_c_client(Path(folder))
            if program is None:
                print("There is no gcc or no librabbitmq-dev: the C client is left out.")
            else:
                c_part = await beside_c(node, rounds, program)
                print("\n".join(c_part), flush=True)
        for row in PAIRS:
            ours, idiom = await pair(node.url, rounds, row)
            rows.append(table_row(row[0], ours, idiom))
            print(rows[-1], flush=True)
        if PEERS_PYTHON.exists():
            peers, plot = await beside_peers(node.url, rounds)
            print("\n".join(peers), flush=True)
        memory = await contestant("ours_memory", node.url, "bench-memory", messages)
    notes = [f"| {line['at']} | {line['resident_mb']:.0f} |" for line in memory if "at" in line]
    print("\n".join(notes), flush=True)
    versions = ", ".join(f"{name} {version(name)}" for name in ("aio-pika", "aiormq", "anyio"))
    page = "\n".join(
        (
            "# Benchmarks",
            "",
            "What aioworkq costs beside the aio-pika idiom (`exchange.publish`, and",
            "`queue.consume` with `message.process()`): 256-byte persistent messages, publisher",
            "confirms, a durable classic queue, prefetch 100, one process each, the broker beside",
            "them.",
            "",
            f"Medians of {rounds} interleaved rounds; ratios are taken within a round. More is",
            "better for messages per second, less for CPU. The rate swings with the machine; CPU",
            "time per message, of the client alone, is the figure to compare.",
            "",
            "| | msg/s ours | msg/s idiom | ratio | CPU µs ours | CPU µs idiom | ratio |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *rows,
            *c_part,
            *peers,
            "",
            f"## Memory of one process that publishes and handles {messages:,} messages",
            "",
            "| | resident MB |",
            "| --- | --- |",
            *notes,
            "",
            "## How to repeat it",
            "",
            "`make bench` starts a private RabbitMQ, runs all of this and writes this page.",
            "",
            f"This page: Python {platform.python_version()}, {versions}, {os.cpu_count()} CPUs, "
            f"{platform.system()}.",
            "",
        ),
    )
    return page, plot


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--messages", type=int, default=1_000_000, help="of the memory run")
    parser.add_argument("--no-page", action="store_true", help="print only")
    options = parser.parse_args()
    page, plot = asyncio.run(run(options.rounds, options.messages))
    if not options.no_page:
        PAGE.write_text(page)
        if plot:
            PLOT.write_text(plot)
        print(f"written to {PAGE}")


if __name__ == "__main__":
    main()
