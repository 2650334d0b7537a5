"""Rate and CPU beside a client in C, where it can be built."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tests.benchmarks.figures import Series, comparison
from tests.benchmarks.job import Job
from tests.benchmarks.page import table
from tests.benchmarks.running import Section, Settings, delete, fill, footer, measured

if TYPE_CHECKING:
    from aioworkq.testing import RabbitMQ

SOURCE: Final = Path(__file__).with_name("librabbitmq.c")
MESSAGES: Final = 20_000
ROWS: Final = (
    ("publish_many", "ours_publish_many", "publish"),
    ("publish, 1,000 tasks", "ours_publish_1000", "publish"),
    ("no-op worker, prefetch 100", "ours_consume", "consume"),
    ("no-op batch handler of 100", "ours_consume_batches", "consume"),
)


def build(folder: Path) -> Path | None:
    """Compile the C client; None where there is no compiler or no library."""
    program = folder / "librabbitmq"
    compiler = shutil.which("gcc")
    if compiler is None:
        return None
    built = subprocess.run(
        [compiler, "-O2", "-o", program, SOURCE, "-lrabbitmq"],
        capture_output=True,
        check=False,
    )
    return None if built.returncode else program


async def c_client(program: Path, verb: str, node: RabbitMQ, job: Job) -> dict[str, Any]:
    await fill(job, job.count if verb == "consume" else 1)
    process = await asyncio.create_subprocess_exec(
        program,
        *(verb, "127.0.0.1", str(node.port), "/", job.queue, str(job.count)),
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"the C client ended with {process.returncode}.")
    await delete(job.url, [job.queue])
    result: dict[str, Any] = json.loads(output)
    return result


async def measure(node: RabbitMQ, settings: Settings) -> Section | None:
    """Measure the C client in turn with ours."""
    with tempfile.TemporaryDirectory() as folder:
        program = build(Path(folder))
        if program is None:
            print("There is no gcc or no librabbitmq-dev: the C client is left out.")
            return None
        job = Job(url=node.url, queue="beside-c", count=settings.scaled(MESSAGES))
        taken = {title: (Series(), Series()) for title, *_ in ROWS}
        for _ in range(settings.rounds):
            for title, name, verb in ROWS:
                ours, theirs = taken[title]
                ours.add(await measured(name, job))
                theirs.add(await c_client(program, verb, node, job))
    rows = [comparison(title, *series) for title, series in taken.items()]
    header = ("", "msg/s ours", "msg/s C", "ratio", "CPU µs ours", "CPU µs C", "ratio")
    return Section([*table(header, rows), *footer(node, "c", settings.rounds)])
