"""What becomes of a delivery, seen in RabbitMQ: every outcome, and every way to fail."""

from __future__ import annotations

import asyncio
import decimal
import logging
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from aioworkq import (
    Ack,
    DeadLetter,
    DeadLetters,
    Delivery,
    Outcome,
    Producer,
    Queue,
    Reject,
    Requeue,
    Retry,
    RetryLater,
    RetryPolicy,
    Worker,
)
from aioworkq.testing import RabbitMQ
from tests.consuming import Broker, eventually, headers_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioworkq.outcome import OnError
    from aioworkq.topology import QueueType
    from tests.proxy import Direction, Proxy

TYPES = pytest.mark.parametrize("kind", ["quorum", "classic"])


@pytest.fixture(autouse=True)
def short_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a message whose copy failed go back sooner than it does for users."""
    monkeypatch.setattr("aioworkq.settle._FAILED_COPY_PAUSE", 0.5)


@dataclass
class Email:
    to: str
    size: int = 0

    def __post_init__(self) -> None:
        if self.size < 0:
            raise LookupError(self.size)


class UnspeakableError(Exception):
    def __str__(self) -> str:
        raise LookupError("no text")


@dataclass
class Unspeakable:
    to: str

    def __post_init__(self) -> None:
        raise UnspeakableError


async def test_success_acks(broker: Broker, url: str, queue_name: str) -> None:
    """A message whose handler returned is gone."""
    queue = Queue(queue_name, Email)
    worker = Worker(url)
    handled: list[Email] = []

    @worker.handler(queue)
    async def handle(email: Email) -> None:
        handled.append(email)

    async with worker, Producer(url) as producer:
        await producer.publish(queue, Email("ada"))
        await eventually(lambda: worker.statistics().handled == 1)
    assert handled == [Email("ada")]
    assert await broker.ready(queue_name) == 0
    assert await broker.ready(queue.dead_letter_queue) == 0


@TYPES
@pytest.mark.parametrize(
    ("body_type", "body", "reason"),
    [
        (Email, b"{not json", "the body is not a valid Email"),
        (Email, b'{"to": 5}', "$.to"),
        (Email, b'{"to": "ada", "size": -1}', "LookupError"),
        (Unspeakable, b'{"to": "ada"}', "the body"),
        (Email, b"[" * 100_000, "the body is not a valid Email"),
        (str, b"\xff", "the body is not a valid str"),
    ],
    ids=["no-json", "wrong-type", "post-init", "unspeakable", "deep", "no-text"],
)
async def test_undecodable_is_dead_lettered_at_once(
    broker: Broker,
    url: str,
    queue_name: str,
    kind: QueueType,
    body_type: Any,
    body: bytes,
    reason: str,
) -> None:
    """A message that can never be handled goes to `<queue>.dead` with the reason, unrun."""
    queue: Queue[Any] = Queue(queue_name, body_type, type=kind)
    worker = Worker(url)
    runs = 0

    @worker.handler(queue)
    async def handle(email: Any) -> None:
        nonlocal runs
        runs += 1

    async with worker:
        await broker.publish(queue_name, body, message_id="m", headers={"mine": "kept"})
        dead = await broker.take(queue.dead_letter_queue)
        await eventually(lambda: worker.statistics().dead_lettered == 1)
    assert runs == 0
    assert worker.statistics().requeued == 0
    assert await broker.ready(queue_name) == 0
    assert dead.body == body
    headers = headers_of(dead)
    assert reason in headers["x-aioworkq-reason"]
    assert headers["x-aioworkq-queue"] == queue_name
    assert headers["x-aioworkq-attempts"] == 0
    assert headers["mine"] == "kept"
    assert dead.header.properties.message_id == "m"


@TYPES
async def test_failing_is_requeued_and_bounded(
    broker: Broker,
    url: str,
    queue_name: str,
    kind: QueueType,
) -> None:
    """A message that always fails is started exactly `attempts` times, then dead-lettered."""
    queue: Queue[Any] = Queue(queue_name, type=kind)
    worker = Worker(url)
    attempts: list[int] = []
    starts: list[float] = []

    @worker.handler(queue, attempts=4)
    async def handle(body: Any, delivery: Delivery) -> None:
        attempts.append(delivery.attempt)
        starts.append(asyncio.get_running_loop().time())
        raise ValueError("never works")

    async with worker, Producer(url) as producer:
        await producer.publish(queue, "x")
        dead = await broker.take(queue.dead_letter_queue)
        await eventually(lambda: worker.statistics().dead_lettered == 1)
    assert attempts == [1, 2, 3, 4]
    # Paced: at least 0.1, 0.2 and 0.4 s, whatever the machine does.
    for start, after, pause in zip(starts, starts[1:], (0.1, 0.2, 0.4), strict=False):
        assert after - start >= pause
    headers = headers_of(dead)
    assert headers["x-aioworkq-attempts"] == 4
    assert headers["x-aioworkq-reason"] == "gave up after 4 attempts"
    assert headers["x-aioworkq-exception-type"] == "ValueError"
    assert headers["x-aioworkq-exception-message"] == "never works"
    assert "raise ValueError" in headers["x-aioworkq-traceback"]
    assert await broker.ready(queue_name) == 0
    assert worker.statistics().failed == 4


@TYPES
async def test_retry_policy(broker: Broker, url: str, queue_name: str, kind: QueueType) -> None:
    """With a retry policy a failed message waits in the broker, and its attempts are counted."""
    queue: Queue[Any] = Queue(queue_name, type=kind)
    worker = Worker(url)
    attempts: list[int] = []

    @worker.handler(queue, retry=RetryPolicy(attempts=3, first=0.125, max=0.25, jitter=0))
    async def handle(body: Any, delivery: Delivery) -> None:
        attempts.append(delivery.attempt)
        raise ValueError("never works")

    async with worker, Producer(url) as producer:
        await producer.publish(queue, "x")
        dead = await broker.take(queue.dead_letter_queue)
    assert attempts == [1, 2, 3]
    assert headers_of(dead)["x-aioworkq-attempts"] == 3
    assert worker.statistics().retried == 2


@TYPES
async def test_reject_dead_letters_now(
    broker: Broker, url: str, queue_name: str, kind: QueueType
) -> None:
    """`Reject` dead-letters with its reason at the first attempt, and is no failure."""
    queue: Queue[Any] = Queue(queue_name, type=kind)
    worker = Worker(url)

    @worker.handler(queue)
    async def handle(body: Any) -> None:
        raise Reject("no such customer")

    async with worker, Producer(url) as producer:
        await producer.publish(queue, "x")
        dead = await broker.take(queue.dead_letter_queue)
        await eventually(lambda: worker.statistics().dead_lettered == 1)
    assert headers_of(dead)["x-aioworkq-reason"] == "no such customer"
    assert headers_of(dead)["x-aioworkq-attempts"] == 1
    assert worker.statistics().failed == 0


@TYPES
async def test_an_uncounted_retry_that_cannot_be_published(
    broker: Broker, url: str, queue_name: str, kind: QueueType
) -> None:
    """The original goes back to its queue, whatever that counts it is no attempt."""
    queue: Queue[Any] = Queue(queue_name, type=kind)
    worker = Worker(url)
    attempts: list[int] = []

    @worker.handler(queue, attempts=2)
    async def handle(body: Any, delivery: Delivery) -> None:
        attempts.append(delivery.attempt)
        if len(attempts) == 1:
            raise RetryLater(0.125, counts=False)
        if len(attempts) == 2:
            raise ValueError("once")

    await broker.declare_exchange("aioworkq.v1.delay.00", "direct")
    async with worker, Producer(url) as producer:
        await producer.publish(queue, "x")
        await eventually(lambda: worker.statistics().handled == 1)
    assert attempts == [1, 1, 2]
    assert await broker.ready(queue.dead_letter_queue) == 0


@TYPES
async def test_a_dead_letter_tells_when_it_failed_first(
    url: str, queue_name: str, kind: QueueType
) -> None:
    """Also where its attempts were requeued, which writes nothing into the message."""
    queue: Queue[str] = Queue(queue_name, str, type=kind)
    worker = Worker(url)
    failures: list[datetime] = []

    @worker.handler(queue, attempts=4)
    async def handle(body: str) -> None:
        failures.append(datetime.now(UTC))
        raise ValueError(body)

    async with worker, Producer(url) as producer:
        await producer.publish(queue, "x")
        await eventually(lambda: worker.statistics().dead_lettered == 1)
    async with DeadLetters(url, queue) as dead:
        (letter,) = await dead.peek()
    assert letter.attempts == len(failures) == 4
    assert letter.first_failure is not None
    assert letter.last_failure is not None
    second = timedelta(seconds=1)  # AMQP's timestamps have no smaller part
    assert failures[0] - second < letter.first_failure <= failures[1]
    assert failures[3] - second < letter.last_failure


@TYPES
async def test_a_first_failure_that_is_not_known_is_not_made_up(
    broker: Broker, url: str, queue_name: str, kind: QueueType
) -> None:
    """Another process had the message before, and may have failed at it."""
    queue: Queue[str] = Queue(queue_name, str, type=kind)
    worker = Worker(url)

    @worker.handler(queue, attempts=2, on_error="dead-letter")
    async def handle(body: str) -> None:
        raise ValueError(body)

    async with Producer(url) as producer:
        await producer.publish(queue, "x")
    await broker.take_and_lose(queue_name)
    async with worker:
        await eventually(lambda: worker.statistics().dead_lettered == 1)
    async with DeadLetters(url, queue) as dead:
        (letter,) = await dead.peek()
    assert letter.attempts == 2
    assert letter.first_failure is None
    assert letter.last_failure is not None


async def test_the_limit_of_a_queue_that_is_not_ours_drops_nothing(
    broker: Broker, url: str, queue_name: str
) -> None:
    """RabbitMQ 4 drops what came back 20 times to a quorum queue declared without a limit."""
    await broker.declare(queue_name, **{"x-queue-type": "quorum"})
    queue: Queue[str] = Queue(queue_name, str)
    worker = Worker(url)
    attempts: list[int] = []

    @worker.handler(queue, attempts=None, on_error=lambda *_: Requeue())
    async def handle(body: str, delivery: Delivery) -> None:
        attempts.append(delivery.attempt)
        if len(attempts) < 50:
            raise ValueError(body)

    async with worker, Producer(url) as producer:
        await producer.publish(queue, "x")
        await eventually(lambda: worker.statistics().handled == 1, timeout=60)
    assert attempts == list(range(1, 51))


@pytest.mark.one_version
async def test_a_dead_letter_fits_into_the_smallest_frame(queue_name: str) -> None:
    """However much its own headers, a reason and an exception say."""
    queue: Queue[str] = Queue(queue_name, str)
    async with RabbitMQ(config={"frame_max": "8192"}) as node:
        worker = Worker(node.url)

        @worker.handler(queue, attempts=1)
        async def handle(body: str) -> None:
            raise Reject("\N{RABBIT FACE}" * 5000) if body == "reason" else ValueError("x" * 9000)

        async with worker, Producer(node.url) as producer:
            await producer.publish(queue, "reason")
            await producer.publish(queue, "exception", headers={"own": "x" * 7000})
            await eventually(lambda: worker.statistics().dead_lettered == 2, timeout=60)
        async with DeadLetters(node.url, queue) as dead:
            letters = {letter.body(): letter for letter in await dead.peek()}
    assert letters["reason"].reason.startswith("\N{RABBIT FACE}" * 100)
    assert letters["exception"].attempts == 1


@pytest.mark.parametrize("counts", [True, False])
async def test_retry_later(url: str, queue_name: str, counts: bool) -> None:  # noqa: FBT001
    """`RetryLater` hands the message over again, as another attempt or as the same one."""
    queue: Queue[Any] = Queue(queue_name)
    worker = Worker(url)
    attempts: list[int] = []

    @worker.handler(queue)
    async def handle(body: Any, delivery: Delivery) -> None:
        attempts.append(delivery.attempt)
        if len(attempts) < 3:
            raise RetryLater(0.125, counts=counts)

    async with worker, Producer(url) as producer:
        await producer.publish(queue, "x")
        await eventually(lambda: worker.statistics().handled == 1)
    assert attempts == ([1, 2, 3] if counts else [1, 1, 1])
    assert worker.statistics().retried == 2


async def test_retry_later_than_a_year(broker: Broker, url: str, queue_name: str) -> None:
    """A delay beyond the longest one waits that long: the message is not lost, and not spinning."""
    queue: Queue[Any] = Queue(queue_name)
    worker = Worker(url)

    @worker.handler(queue)
    async def handle(body: Any, delivery: Delivery) -> None:
        raise RetryLater(float("inf") if delivery.body == b"forever" else 1e9)

    async with worker:
        await broker.publish(queue_name, b"forever", content_type="text/plain")
        await broker.publish(queue_name, b"long", content_type="text/plain")
        await eventually(lambda: worker.statistics().retried == 2)

        async def waits() -> bool:
            return await broker.ready("aioworkq.v1.delay.27") == 2

        await eventually(waits)


def dead_letter(exc: Exception, delivery: Delivery) -> Outcome:
    return DeadLetter(f"seen {type(exc).__name__} of attempt {delivery.attempt}")


def retry_then_ack(exc: Exception, delivery: Delivery) -> Outcome:
    return Retry(0.125) if delivery.attempt == 1 else Ack()


def requeue_then_ack(exc: Exception, delivery: Delivery) -> Outcome:
    return Requeue() if delivery.attempt < 3 else Ack()


@TYPES
@pytest.mark.parametrize(
    ("on_error", "runs", "reason"),
    [
        ("dead-letter", 1, "failed: ValueError"),
        ("discard", 1, None),
        (dead_letter, 1, "seen ValueError of attempt 1"),
        (retry_then_ack, 2, None),
        (requeue_then_ack, 3, None),
    ],
    ids=["dead-letter", "discard", "to-dead-letter", "to-retry", "to-requeue"],
)
async def test_on_error(
    broker: Broker,
    url: str,
    queue_name: str,
    kind: QueueType,
    on_error: OnError,
    runs: int,
    reason: str | None,
) -> None:
    """`on_error` says what becomes of a failed message: a word, or a function that returns it."""
    queue: Queue[Any] = Queue(queue_name, type=kind)
    worker = Worker(url)
    attempts: list[int] = []

    @worker.handler(queue, on_error=on_error)
    async def handle(body: Any, delivery: Delivery) -> None:
        attempts.append(delivery.attempt)
        raise ValueError("no")

    async with worker, Producer(url) as producer:
        await producer.publish(queue, "x")
        await eventually(lambda: len(attempts) == runs)
        if reason is not None:
            dead = await broker.take(queue.dead_letter_queue)
            assert headers_of(dead)["x-aioworkq-reason"] == reason
    assert attempts == list(range(1, runs + 1))
    assert await broker.ready(queue_name) == 0
    assert await broker.ready(queue.dead_letter_queue) == 0


@TYPES
@pytest.mark.parametrize("outcome", [Requeue(), Retry(0.125)], ids=repr)
async def test_on_error_cannot_exceed_attempts(
    broker: Broker, url: str, queue_name: str, kind: QueueType, outcome: Outcome
) -> None:
    """A function given as `on_error` that never gives up is still bounded by `attempts`."""
    queue: Queue[Any] = Queue(queue_name, type=kind)
    worker = Worker(url)
    attempts: list[int] = []

    @worker.handler(queue, attempts=3, on_error=lambda exc, delivery: outcome)
    async def handle(body: Any, delivery: Delivery) -> None:
        attempts.append(delivery.attempt)
        raise ValueError("no")

    async with worker, Producer(url) as producer:
        await producer.publish(queue, "x")
        dead = await broker.take(queue.dead_letter_queue)
    assert attempts == [1, 2, 3]
    assert headers_of(dead)["x-aioworkq-reason"] == "gave up after 3 attempts"
    assert headers_of(dead)["x-aioworkq-exception-type"] == "ValueError"


async def coroutine(exc: Exception, delivery: Delivery) -> Outcome:
    return Ack()


def raising(exc: Exception, delivery: Delivery) -> Outcome:
    raise LookupError("on_error is broken too")


def leaving(exc: Exception, delivery: Delivery) -> Outcome:
    sys.exit("on_error would end the process")


@pytest.mark.parametrize(
    "on_error",
    [
        raising,
        leaving,
        coroutine,
        lambda exc, delivery: None,
        lambda exc, delivery: "requeue",
        lambda exc, delivery: Requeue(pause=float("nan")),
        lambda exc, delivery: Requeue(pause=-1),
        lambda exc, delivery: Retry(delay="soon"),  # type: ignore[arg-type]
    ],
    ids=["raises", "exits", "async", "none", "str", "nan", "negative", "text"],
)
async def test_broken_on_error(
    broker: Broker,
    url: str,
    queue_name: str,
    on_error: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An `on_error` that raises or returns nonsense is logged; the message goes the usual way."""
    queue: Queue[Any] = Queue(queue_name)
    worker = Worker(url)
    attempts: list[int] = []

    @worker.handler(queue, attempts=2, on_error=on_error)
    async def handle(body: Any, delivery: Delivery) -> None:
        attempts.append(delivery.attempt)
        raise ValueError("no")

    async with worker, Producer(url) as producer:
        await producer.publish(queue, "x")
        await broker.take(queue.dead_letter_queue)
    assert attempts == [1, 2]
    assert "on_error of handler" in caplog.text


class Loud(BaseException):
    """No Exception."""


def raiser(make: Callable[[], BaseException]) -> Any:
    def handle(body: Any) -> None:
        raise make()

    return handle


def async_raiser(make: Callable[[], BaseException]) -> Any:
    async def handle(body: Any) -> None:
        raise make()

    return handle


@pytest.mark.parametrize("handler", [async_raiser, raiser], ids=["task", "thread"])
@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: asyncio.CancelledError("odd"), "RuntimeError", "though the worker did not"),
        (lambda: SystemExit(3), "RuntimeError", "raised SystemExit"),
        (lambda: Loud("x"), "RuntimeError", "raised Loud"),
        (lambda: ExceptionGroup("two", [ValueError(1), TypeError(2)]), "ExceptionGroup", "two"),
        (lambda: BaseExceptionGroup("all", [Loud()]), "RuntimeError", "BaseExceptionGroup"),
        (UnspeakableError, f"{__name__}.UnspeakableError", "LookupError"),
        (lambda: ValueError("x" * 10_000_000), "ValueError", "xxx"),
        (lambda: ValueError("\udcff\x00🐰" * 5000), "ValueError", "🐰"),
        (lambda: StopIteration(1), "RuntimeError", "StopIteration"),
        (TimeoutError, "TimeoutError", ""),
    ],
    ids=[
        "cancelled",
        "exit",
        "base",
        "group",
        "base-group",
        "unspeakable",
        "huge",
        "surrogates",
        "stop-iteration",
        "late",
    ],
)
async def test_whatever_a_handler_raises(
    broker: Broker,
    url: str,
    queue_name: str,
    handler: Callable[..., Any],
    make: Callable[[], BaseException],
    kind: str,
    text: str,
) -> None:
    """Whatever a handler raises is a failed attempt; the dead letter says what, and fits."""
    queue: Queue[Any] = Queue(queue_name)
    worker = Worker(url)
    worker.handler(queue, attempts=2)(handler(make))
    others: list[Any] = []

    @worker.handler(f"{queue_name}.others")
    async def other(body: Any) -> None:
        others.append(body)

    async with worker, Producer(url) as producer:
        await producer.publish(queue, "x")
        dead = await broker.take(queue.dead_letter_queue)
        await producer.publish(f"{queue_name}.others", "y")
        await eventually(lambda: others)
    headers = headers_of(dead)
    assert headers["x-aioworkq-attempts"] == 2
    assert headers["x-aioworkq-exception-type"] == kind
    assert text in headers["x-aioworkq-exception-message"]
    assert worker.statistics().consumers[queue_name].failed == 2


@pytest.mark.parametrize("reason", [None, 5, ValueError("odd"), "x" * 1_000_000, "\udcff"])
async def test_odd_reasons(broker: Broker, url: str, queue_name: str, reason: Any) -> None:
    """A reason that is no text, or too long, still ends in a dead letter."""
    queue: Queue[Any] = Queue(queue_name)
    worker = Worker(url)

    @worker.handler(queue)
    async def handle(body: Any) -> None:
        raise Reject(reason)

    async with worker, Producer(url) as producer:
        await producer.publish(queue, "x")
        dead = await broker.take(queue.dead_letter_queue)
    assert headers_of(dead)["x-aioworkq-reason"][:1] in {"N", "5", "o", "x", "\\"}


@pytest.mark.parametrize(
    ("size", "kept"),
    [(60_000, {"big", "x-aioworkq-traceback"}), (120_000, {"big"}), (130_800, set[str]())],
)
async def test_dead_letter_fits_beside_large_headers(
    broker: Broker, url: str, queue_name: str, size: int, kept: set[str]
) -> None:
    """A dead letter is cut down to what a frame holds: our texts first, then its own headers."""
    queue: Queue[Any] = Queue(queue_name)
    worker = Worker(url)

    @worker.handler(queue, attempts=1)
    async def handle(body: Any) -> None:
        raise ValueError("\N{SNOWMAN}" * 10_000)

    async with worker:
        await broker.publish(queue_name, b"x", headers={"big": "x" * size})
        dead = await broker.take(queue.dead_letter_queue)
    headers = headers_of(dead)
    if size > 130_000:
        assert "big" not in headers
    assert kept <= headers.keys()
    assert headers["x-aioworkq-reason"] == "gave up after 1 attempts"


async def test_headers_that_cannot_be_written_again(
    broker: Broker, url: str, queue_name: str
) -> None:
    """A message with foreign header types (pika writes Decimals) is retried or dead-lettered."""
    queue: Queue[Any] = Queue(queue_name)
    worker = Worker(url)

    @worker.handler(queue, attempts=1)
    async def handle(body: Any) -> None:
        raise ValueError("no")

    async with worker:
        await broker.publish(queue_name, b"x", headers={"price": decimal.Decimal("1.50")})
        dead = await broker.take(queue.dead_letter_queue)
    assert dead.body == b"x"


BASIC_PUBLISH = b"\x00\x3c\x00\x28"
BASIC_ACK = b"\x00\x3c\x00\x50"


async def test_the_original_is_acked_after_the_confirm(
    broker: Broker, proxy: Proxy, proxy_url: str, queue_name: str
) -> None:
    """A dead letter whose confirm does not come leaves the original where it was."""
    queue: Queue[Any] = Queue(queue_name)
    worker = Worker(proxy_url, timeout=5, grace=0)
    published = asyncio.Event()
    confirms = 0

    def on_frame(direction: Direction, kind: int, channel: int, payload: bytes) -> bool:
        nonlocal confirms
        if direction == "to_broker" and payload[:4] == BASIC_PUBLISH:
            published.set()
        if direction == "to_client" and payload[:4] == BASIC_ACK:
            confirms += 1
            return confirms > 1
        return True

    @worker.handler(queue, attempts=1)
    async def handle(body: Any) -> None:
        raise ValueError("no")

    async with worker:
        proxy.on_frame = on_frame
        await broker.publish(queue_name, b"x", message_id="m")
        await published.wait()
        # No confirm within `timeout`: it is given back after a pause, and dead-lettered then.
        await eventually(lambda: worker.statistics().consumers[queue_name].dead_lettered == 1)
    # The first one was stored too: at least once, and the original was not lost in between.
    assert [dead.body for dead in await broker.take_all(queue.dead_letter_queue)] == [b"x", b"x"]
    assert await broker.ready(queue_name) == 0


@TYPES
@pytest.mark.parametrize("broken", ["publication", "declaration"])
async def test_a_retry_that_cannot_be_published(
    broker: Broker,
    url: str,
    queue_name: str,
    kind: QueueType,
    broken: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The original goes back to its queue, its attempt counted; nothing is in a delay queue."""
    queue: Queue[Any] = Queue(queue_name, type=kind)
    worker = Worker(url)
    attempts: list[int] = []

    @worker.handler(queue, retry=RetryPolicy(attempts=4, first=0.125, jitter=0))
    async def handle(body: Any, delivery: Delivery) -> None:
        attempts.append(delivery.attempt)
        if delivery.attempt == 1:
            raise ValueError("once")

    if broken == "publication":  # a full queue answers with a negative confirm
        full = {"x-max-length": 0, "x-overflow": "reject-publish"}
        await broker.declare("aioworkq.v1.delay.00", **full)
    else:
        await broker.declare_exchange("aioworkq.v1.delay.00", "direct")
    async with worker, Producer(url) as producer:
        await producer.publish(queue, "x")
        await eventually(lambda: worker.statistics().handled == 1)
        statistics = worker.statistics()
    assert attempts == [1, 2]
    assert (statistics.retried, statistics.requeued) == (0, 1)
    assert "could not be published, the original stays" in caplog.text
    if broken == "publication":
        assert await broker.ready("aioworkq.v1.delay.00") == 0
    assert await broker.ready(queue_name) == 0
    assert await broker.ready(queue.dead_letter_queue) == 0


async def test_dead_letter_queue_deleted(broker: Broker, url: str, queue_name: str) -> None:
    """A dead-letter queue that was deleted is declared again when it is needed."""
    queue: Queue[Any] = Queue(queue_name)
    worker = Worker(url)

    @worker.handler(queue)
    async def handle(body: Any) -> None:
        raise Reject("no")

    async with worker, Producer(url) as producer:
        await broker.delete(queue.dead_letter_queue)
        await producer.publish(queue, "x")
        await eventually(lambda: worker.statistics().dead_lettered == 1)
    assert await broker.ready(queue.dead_letter_queue) == 1


async def test_no_dead_letter_queue(
    broker: Broker, url: str, queue_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a dead-letter queue that we may declare, the message goes back and is not lost."""
    await broker.declare(queue_name)
    queue: Queue[Any] = Queue(queue_name, type="classic", declare=False)
    worker = Worker(url, grace=0)

    @worker.handler(queue)
    async def handle(body: Any) -> None:
        raise Reject("no")

    async with worker:
        await broker.publish(queue_name, b"x")
        await eventually(lambda: "could not be published" in caplog.text)
    assert "Messages that are given up will go back" in caplog.text
    assert await broker.ready(queue_name) == 1


@TYPES
async def test_properties_survive(
    broker: Broker, url: str, queue_name: str, kind: QueueType
) -> None:
    """A copy that we publish keeps all properties and headers of the message."""
    queue: Queue[Any] = Queue(queue_name, type=kind)
    worker = Worker(url)

    @worker.handler(queue, retry=RetryPolicy(attempts=2, first=0.125))
    async def handle(body: Any) -> None:
        raise ValueError("no")

    properties = {
        "message_id": "m",
        "correlation_id": "c",
        "content_type": "text/plain",
        "content_encoding": "utf-8",
        "reply_to": "r",
        "message_type": "t",
        "app_id": "a",
        "priority": 3,
    }
    async with worker:
        await broker.publish(queue_name, b"x", headers={"mine": [1, {"deep": True}]}, **properties)
        dead = await broker.take(queue.dead_letter_queue)
    found = dead.header.properties
    assert {key: getattr(found, key) for key in properties} == properties
    assert found.delivery_mode == 2
    assert headers_of(dead)["mine"] == [1, {"deep": True}]
    assert "x-death" not in headers_of(dead)


async def test_logs_name_the_handler_and_carry_the_traceback(
    url: str, queue_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Every failure is logged at WARNING with handler, message id, outcome and traceback."""
    queue: Queue[Any] = Queue(queue_name)
    worker = Worker(url)

    @worker.handler(queue, on_error="discard")
    async def send_email(body: Any) -> None:
        raise ValueError("no")

    with caplog.at_level(logging.WARNING):
        async with worker, Producer(url) as producer:
            await producer.publish(queue, "x", message_id="m-1")
            await eventually(lambda: worker.statistics().failed == 1)
    (record,) = [record for record in caplog.records if "failed on" in record.message]
    assert "send_email" in record.message
    assert "m-1" in record.message
    assert "Ack" in record.message
    assert record.exc_info is not None
