"""What contestants are asked to do, and the clock of the latency."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.benchmarks.clock import Count
from tests.benchmarks.job import Job, Latencies, Order, encode, publish_stamped


def test_a_job_survives_the_command_line() -> None:
    """What was asked for is done."""
    job = Job(url="amqp://a/", queue="q", count=3, size=300, handlers=2, rate=0.5)
    assert Job.from_json(job.to_json()) == job
    assert job.queues == ["q-0", "q-1"]


@pytest.mark.parametrize("size", [256, 1_000])
def test_a_body_is_a_document_of_the_size(size: int) -> None:
    """It has what the dataclass has."""
    body = Job(url="", queue="", count=1, size=size).body
    assert len(body) == size
    assert isinstance(Order(**json.loads(body)).stamp, int)


def test_a_body_cannot_be_smaller_than_its_fields() -> None:
    """Nothing else than the size asked for is measured."""
    with pytest.raises(ValueError, match="at least"):
        _ = Job(url="", queue="", count=1, size=7).body


async def test_latencies_are_those_of_what_was_published() -> None:
    """Every body carries its time; the first tenth is left out; paced or not."""
    for rate in (0.0, 10_000.0):
        job = Job(url="", queue="", count=20, size=256, rate=rate)
        latencies = Latencies(job.count)

        async def publish(fields: dict[str, Any], latencies: Latencies = latencies) -> None:
            assert len(encode(fields)) == 256
            latencies.take(fields["stamp"])

        await publish_stamped(job, publish)
        assert latencies.done.is_set()
        taken = latencies.summary()["latencies"]
        assert len(taken) == 18
        assert all(seconds >= 0 for seconds in taken)


def test_the_last_message_is_noticed_once() -> None:
    """Batches may go beyond the last one, and stragglers come after it."""
    ends: list[str] = []
    count = Count(5, lambda: ends.append("end"))
    for number in (2, 2, 2, 1):
        count.add(number)
    assert ends == ["end"]
    assert count.clock.wall >= 0
