"""What contestants are asked to do, and the clock of the latency."""

from __future__ import annotations

from tests.benchmarks.clock import Count
from tests.benchmarks.job import Job, Latencies, publish_stamped


def test_a_job_survives_the_command_line() -> None:
    """What was asked for is done."""
    job = Job(url="amqp://a/", queue="q", count=3, size=7, handlers=2, rate=0.5)
    assert Job.from_json(job.to_json()) == job
    assert (job.body, job.queues) == (b"x" * 7, ["q-0", "q-1"])


async def test_latencies_are_those_of_what_was_published() -> None:
    """Every body carries its time; the first tenth is left out; paced or not."""
    for rate in (0.0, 10_000.0):
        job = Job(url="", queue="", count=20, size=64, rate=rate)
        latencies = Latencies(job.count)

        async def publish(body: str, latencies: Latencies = latencies) -> None:
            assert len(body) == 64
            latencies.take(body)

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
