"""The fallback of the fast paths: documented calls of aiormq alone."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from aioworkq import Message, Producer, Queue, UnroutableError, Worker
from aioworkq.amqp import features
from aioworkq.amqp.documented import DocumentedPublishChannel, DocumentedSubscription
from aioworkq.amqp.wire import DEFAULT_FRAME_MAX, encode
from aioworkq.broker import Confirm, Incoming
from tests.consuming import Broker, eventually, headers_of
from tests.unwired import Unwired

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def no_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let aiormq lack a name."""
    monkeypatch.setattr(features, "CHANNEL_NAMES", ("rpc", "no_such_name"))


@pytest.fixture
def nothing_explained() -> Iterator[None]:
    """Let nothing have been logged yet in this process."""
    features.explain.cache_clear()
    yield
    features.explain.cache_clear()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "aioworkq" and "documented calls" in record.getMessage()
    ]


@pytest.mark.usefixtures("nothing_explained")
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
    # One, though the producer and the worker have a connection each.
    assert len(warnings(caplog)) == (1 if lacks else 0)
    assert all("has no Channel.no_such_name: aioworkq" in line for line in warnings(caplog))
    assert {r.levelname for r in caplog.records if "documented" in r.getMessage()} <= {"WARNING"}


@pytest.mark.usefixtures("nothing_explained")
def test_other_missing_names_are_another_line(caplog: pytest.LogCaptureFixture) -> None:
    """The same ones are told once."""
    for names in [("one",), ("one", "two"), ("one",), ("one", "two")]:
        features.explain(*names)
    assert [line.split(" has no ")[1].split(":")[0] for line in warnings(caplog)] == [
        "Channel.one",
        "Channel.one, Channel.two",
    ]


@pytest.mark.parametrize("path", ["PYTHONPATH", "sys.path"])
def test_programs_that_tests_start_are_switched_too(
    path: str,
    documented_calls: bool,  # noqa: FBT001 - a fixture
) -> None:
    """By the environment of the tests, and by their path; the library is imported no earlier."""
    program = """if True:
        import sys
        assert "aioworkq" not in sys.modules
        from aioworkq.amqp import features
        print("no_such_name" in features.CHANNEL_NAMES)
    """
    env = dict(os.environ)
    if path == "sys.path":
        env["PYTHONPATH"] = os.pathsep.join(sys.path)
    printed = subprocess.check_output([sys.executable, "-c", program], env=env, text=True)
    assert printed == f"{documented_calls}\n"


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


async def test_one_that_hangs_among_equal_ids_holds_up_nobody_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The third of three waits for the second, which is not confirmed."""
    monkeypatch.setattr("aioworkq.amqp.documented._TWIN_PATIENCE", 0.2)
    unwired, published, outcomes = Unwired(), list[str](), list[Confirm]()

    async def publish(*_: object, routing_key: str, **__: object) -> None:
        published.append(routing_key)
        if routing_key == "hung":
            await asyncio.Event().wait()

    unwired.channel.basic_publish = publish
    channel = DocumentedPublishChannel(unwired.channel, link=None, frame_max=DEFAULT_FRAME_MAX)
    for queue in ("fine", "hung", "other"):
        message = Message(b"", queue, message_id="id")
        wire = encode(message, frame_max=DEFAULT_FRAME_MAX, max_message_size=10)
        settle = lambda confirm, _: outcomes.append(confirm)  # noqa: E731
        channel.send(cast("Any", SimpleNamespace(message=message, wire=wire, settle=settle)))
    async with asyncio.timeout(20):
        assert "the same id" in await channel.wait_lost()
    assert (published, outcomes) == (["fine", "hung"], [Confirm.ACK])
    assert len(channel.take_unconfirmed()) == 2


async def test_an_ack_that_fails_on_an_open_channel_makes_it_useless() -> None:
    """Acks after it would never be sent: RabbitMQ has to hand everything over again."""
    unwired = Unwired()
    unwired.channel.is_closed = False

    async def fail(*_: object) -> None:
        raise LookupError("a defect")

    unwired.channel.basic_ack = fail
    subscription = DocumentedSubscription(
        unwired.channel, "q", link=None, charges_returns=False, on_delivery=lambda *_: None
    )
    subscription.deliver(Incoming(Message(b"", "q"), 1, redelivered=False))
    assert subscription.ack(1)
    async with asyncio.timeout(20):
        assert "a defect" in await subscription.wait_lost()
