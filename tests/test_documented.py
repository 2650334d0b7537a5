"""The fallback of the fast paths: documented calls of aiormq alone."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from aioworkq import Producer, Queue, UnroutableError, Worker
from aioworkq.amqp import features
from aioworkq.amqp.documented import DocumentedPublishChannel, DocumentedSubscription
from tests.consuming import Broker, eventually, headers_of


@pytest.fixture
def no_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let aiormq lack a name."""
    monkeypatch.setattr(features, "CHANNEL_NAMES", ("rpc", "no_such_name"))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "aioworkq" and "documented calls" in record.getMessage()
    ]


@pytest.mark.parametrize("lacks", [True, False])
async def test_one_line_says_what_is_missing(
    url: str,
    queue_name: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    lacks: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    """And everything works, with the names and without them."""
    names = ("rpc", "no_such_name") if lacks else ("rpc",)
    monkeypatch.setattr(features, "CHANNEL_NAMES", names)
    queue = Queue(queue_name, int)
    worker = Worker(url)
    handled: set[int] = set()

    @worker.handler(queue, prefetch_count=20)
    async def handle(number: int) -> None:
        handled.add(number)

    with caplog.at_level(logging.INFO, "aioworkq"):
        async with Producer(url) as producer, worker:
            (await producer.publish_many(queue, range(100))).raise_for_errors()
            await eventually(lambda: handled == set(range(100)))
            kinds = {
                isinstance(producer._outbox._channel, DocumentedPublishChannel)
                if producer._outbox
                else None,
                *(
                    isinstance(one._subscription, DocumentedSubscription)
                    for one in worker._consumers
                ),
            }
    assert kinds == {lacks}
    # One for the connection of the producer, one for that of the worker.
    assert len(warnings(caplog)) == (2 if lacks else 0)
    assert all("has no Channel.no_such_name: aioworkq" in line for line in warnings(caplog))


@pytest.mark.usefixtures("no_names")
async def test_equal_message_ids_keep_their_own_outcomes(url: str, queue_name: str) -> None:
    """Returns are told apart by the id only: so one publication waits for the other."""
    there, missing = Queue(queue_name, int), Queue(f"{queue_name}.missing", int, declare=False)
    async with Producer(url) as producer:
        await producer.publish(there, 0)
        outcomes = await asyncio.gather(
            *(
                producer.publish(queue, number, message_id="same")
                for number in range(20)
                for queue in (there, missing)
            ),
            return_exceptions=True,
        )
    kinds: list[type[Any]] = [type(outcome) for outcome in outcomes]
    assert kinds == [str, UnroutableError] * 20


@pytest.mark.usefixtures("no_names")
async def test_headers_are_encoded_by_us(broker: Broker, url: str, queue_name: str) -> None:
    """A float keeps its 64 bits, as on the fast path."""
    async with Producer(url) as producer:
        await producer.publish(Queue(queue_name, int), 1, headers={"tenth": 0.1})
    message = await broker.take(queue_name)
    assert headers_of(message)["tenth"] == 0.1
