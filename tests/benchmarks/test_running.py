"""In which order contestants run, and what the broker is asked about their queues."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from tests.benchmarks.job import Job
from tests.benchmarks.running import check_queue, declare, turned

if TYPE_CHECKING:
    from aioworkq.testing import RabbitMQ


def test_every_contestant_begins_a_round() -> None:
    """All run in each round, and no order comes twice in a row."""
    orders = [turned("abc", number) for number in range(6)]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert {order[0] for order in orders} == {"a", "b", "c"}
    assert all(one != other for one, other in pairwise(orders))


def test_of_two_contestants_each_begins_as_often() -> None:
    """Neither always has the warmer broker."""
    assert [turned("ab", number)[0] for number in range(4)] == ["a", "b", "b", "a"]


async def test_a_queue_must_be_as_all_others(rabbitmq: RabbitMQ, queue_name: str) -> None:
    """A contestant with a queue of another type is not compared."""
    job = Job(url=rabbitmq.url, queue=queue_name, count=1)
    await declare(rabbitmq.url, queue_name)
    await check_queue(rabbitmq, job)
    quorum = Job(url=rabbitmq.url, queue=queue_name, count=1, queue_type="quorum")
    with pytest.raises(RuntimeError, match="rabbit_classic_queue"):
        await check_queue(rabbitmq, quorum)
