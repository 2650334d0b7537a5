"""How long an import takes: in fresh processes, in turn, with compiled files in the cache."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING, Final

from tests.benchmarks.page import table
from tests.benchmarks.running import ROOT, Section, Settings, footer

if TYPE_CHECKING:
    from aioworkq.testing import RabbitMQ

MODULES: Final = ("aio_pika", "aioworkq")
ROUNDS: Final = 10  # for each round of the others
MOST_MORE: Final = 30  # milliseconds
PROGRAM: Final = """
import time
wall, cpu = time.perf_counter(), time.process_time()
import {module}
print([time.perf_counter() - wall, time.process_time() - cpu])
"""


def import_time(module: str, cache: str) -> tuple[float, float]:
    """Return the milliseconds of one import in a new process: wall, CPU."""
    environment = {
        name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"
    }
    output = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(module=module)],
        env=environment | {"PYTHONPYCACHEPREFIX": cache},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    wall, cpu = json.loads(output)
    return 1000 * wall, 1000 * cpu


async def measure(node: RabbitMQ, settings: Settings) -> Section:
    """Import in turn; it needs no RabbitMQ."""
    rounds = ROUNDS * settings.rounds
    taken: dict[str, list[tuple[float, float]]] = {module: [] for module in MODULES}
    with tempfile.TemporaryDirectory() as cache:
        for module in MODULES:
            import_time(module, cache)
        for number in range(rounds):
            for module in MODULES if number % 2 else reversed(MODULES):
                taken[module].append(import_time(module, cache))
    rows = [[f"`import {module}`", *_medians(times), ""] for module, times in taken.items()]
    more = [
        (ours[0] - theirs[0], ours[1] - theirs[1])
        for theirs, ours in zip(*taken.values(), strict=True)
    ]
    rows.append(["more, within a round", *_medians(more), f"at most {MOST_MORE}"])
    rows.append(["lowest to highest", *_spreads(more), ""])
    return Section(
        [*table(("", "ms", "ms of CPU", "target"), rows), *footer(None, "import", rounds)],
    )


def _medians(times: list[tuple[float, float]]) -> list[str]:
    return [f"{statistics.median(column):.1f}" for column in zip(*times, strict=True)]


def _spreads(times: list[tuple[float, float]]) -> list[str]:
    return [f"{min(column):.1f} to {max(column):.1f}" for column in zip(*times, strict=True)]
