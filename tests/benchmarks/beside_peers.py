"""CPU beside other work queues, where their environment is there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.benchmarks.figures import Series
from tests.benchmarks.job import Job
from tests.benchmarks.page import table
from tests.benchmarks.plot import bars
from tests.benchmarks.running import (
    PEERS_PYTHON,
    Section,
    Settings,
    footer,
    measured,
    result_of,
)

if TYPE_CHECKING:
    from aioworkq.testing import RabbitMQ

PINS: Final = Path(__file__).with_name("peers.txt")
MESSAGES: Final = 5_000
PEERS: Final = {
    "aioworkq": ("ours_publish_100", "ours_consume"),
    "aio-pika": ("idiom_publish_100", "idiom_consume"),
    "FastStream": ("faststream_publish", "faststream_consume"),
    "taskiq-aio-pika": ("taskiq_publish", "taskiq_consume"),
    "Dramatiq": ("dramatiq_publish", "dramatiq_consume"),
    "Celery": ("celery_publish", "celery_consume"),
}


def pins() -> str:
    """Return the versions of the other work queues."""
    return ", ".join(PINS.read_text().splitlines()[1:])


async def measure(node: RabbitMQ, settings: Settings) -> Section | None:
    """Measure all in turn."""
    if not PEERS_PYTHON.exists():
        print("There is no .venv-bench: other work queues are left out.")
        return None
    taken = {name: (Series(), Series()) for name in PEERS}
    for number in range(settings.rounds):
        for name, contestants in PEERS.items():
            for contestant, series in zip(contestants, taken[name], strict=True):
                job = Job(
                    url=node.url,
                    queue=f"peers-{contestant}-{number}",
                    count=settings.scaled(MESSAGES),
                )
                is_local = name in {"aioworkq", "aio-pika"}  # others declare and fill themselves
                series.add(await (measured if is_local else result_of)(contestant, job))
    costs = {name: (publish.cpu, handle.cpu) for name, (publish, handle) in taken.items()}
    rates = {name: (publish.rate, handle.rate) for name, (publish, handle) in taken.items()}
    ours, our_rates = costs["aioworkq"], rates["aioworkq"]
    rows = [
        [
            name,
            f"{publish:.0f}",
            f"{publish / ours[0]:.1f}",
            f"{handle:.0f}",
            f"{handle / ours[1]:.1f}",
            f"{rates[name][1]:,.0f}",
            f"{our_rates[1] / rates[name][1]:.1f}",
        ]
        for name, (publish, handle) in costs.items()
    ]
    header = (
        "",
        "publish, CPU µs",
        "times ours",
        "handle, CPU µs",
        "times ours",
        "handled/s",
        "ours is times as fast",
    )
    return Section(
        [
            *table(header, rows),
            "",
            "![CPU per message](benchmarks.svg)",
            "",
            f"Versions: {pins()}.",
            *footer(node, "peers", settings.rounds),
        ],
        {"benchmarks.svg": bars("CPU µs per message: publish, handle", costs)},
    )
