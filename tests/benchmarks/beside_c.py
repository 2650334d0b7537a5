"""Rate and CPU beside a client in C, where it can be built."""

from __future__ import annotations

import asyncio
import functools
import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tests.benchmarks.figures import Row, heading
from tests.benchmarks.job import Job
from tests.benchmarks.page import table
from tests.benchmarks.running import (
    Section,
    Settings,
    check_queue,
    delete,
    fill,
    footer,
    interleaved,
    measured,
)

if TYPE_CHECKING:
    from aioworkq.testing import RabbitMQ

SOURCE: Final = Path(__file__).with_name("librabbitmq.c")
MESSAGES: Final = 60_000
VERBS: Final = ("publish", "consume")
ROWS: Final = (
    Row(
        title="publish_many of bytes",
        ours="ours_publish_many",
        theirs="publish",
        least_ratio=0.8,
        most_cpu=15,
    ),
    Row(
        title="publish bytes, 1,000 tasks",
        ours="ours_publish_1000",
        theirs="publish",
        least_ratio=0.8,
        most_cpu=15,
    ),
    Row(
        title="no-op worker, prefetch 100",
        ours="ours_consume",
        theirs="consume",
        most_cpu=60,
    ),
    Row(
        title="no-op batch handler of 100, prefetch 100",
        ours="ours_consume_batches",
        theirs="consume",
        least_ratio=0.4,
    ),
    Row(
        title="no-op batch handler of 100, prefetch 200: the default",
        ours="ours_consume_batches_200",
        theirs="consume",
    ),
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


def versions(program: Path) -> list[str]:
    """Return the versions of the library, and of the compiler."""

    def printed(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    gcc = printed("gcc", "-dumpfullversion", "-dumpversion")
    return [f"librabbitmq {printed(str(program), 'version')}", f"gcc {gcc}"]


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
    await check_queue(node, job)
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
        runs = {verb: functools.partial(c_client, program, verb, node, job) for verb in VERBS}
        for row in ROWS:
            runs[row.ours] = functools.partial(measured, node, row.ours, job)
        taken = await interleaved(settings.rounds, runs)
        built_with = versions(program)
    rows = [row.cells(taken) for row in ROWS]
    return Section(
        [*table(heading("C"), rows), *footer(node, "c", settings.rounds, *built_with)],
    )
