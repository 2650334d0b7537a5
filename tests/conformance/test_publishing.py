"""What a broker does with publications: confirms, returns, refusals, routes."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from aioworkq import ConnectionLostError, Message, TopologyError
from aioworkq.broker import Confirm
from aioworkq.topology import Binding, ExchangeDeclaration, QueueDeclaration
from tests.conformance.subject import (
    QUORUM,
    TIMEOUT,
    declare,
    publisher,
)

if TYPE_CHECKING:
    from aioworkq.topology import Declaration
    from tests.conformance.subject import Subject


async def test_what_a_queue_takes_is_confirmed(subject: Subject) -> None:
    """A publication to a queue is confirmed, and is there, in the order of publishing."""
    async with subject.connect() as connection:
        await declare(connection, "q")
        channel = await publisher(connection)
        sent = [channel.send(Message(b"%d" % number, "q")) for number in range(10)]
        answers = await asyncio.gather(*(one.answer for one in sent))
        assert {confirm for confirm, _ in answers} == {Confirm.ACK}
        assert channel.channel.take_unconfirmed() == []
        bodies = [message.body for message in await subject.take_all(connection, "q", 10)]
        assert bodies == [b"%d" % number for number in range(10)]


async def test_what_no_queue_takes_is_returned(subject: Subject) -> None:
    """A publication for a queue that does not exist comes back."""
    async with subject.connect() as connection:
        channel = await publisher(connection)
        confirm, reason = await channel.send(Message(b"x", "missing")).answer
        assert (confirm, reason) == (Confirm.RETURNED, "312 NO_ROUTE")


async def test_a_missing_exchange_ends_the_channel(subject: Subject) -> None:
    """A publication to an exchange that does not exist closes the channel, and is not answered."""
    async with subject.connect() as connection:
        channel = await publisher(connection)
        await declare(connection, "q")
        sent = [channel.send(Message(b"x", "q", exchange=name)) for name in ("missing", "")]
        assert "no exchange 'missing'" in await channel.channel.wait_lost()
        assert channel.channel.refusal is Confirm.RETURNED
        assert channel.channel.take_unconfirmed() == sent
        assert await connection.count_messages("q", timeout=TIMEOUT) == 0
        assert connection.is_connected
        await channel.channel.aclose(timeout=5)


async def test_a_full_classic_queue_refuses(subject: Subject) -> None:
    """With max-length and reject-publish, a classic queue refuses what is too much."""
    async with subject.connect() as connection:
        await declare(connection, "q", max_length=3, overflow="reject-publish")
        channel = await publisher(connection)
        confirms = [await channel.publish(Message(b"x", "q")) for _ in range(5)]
        assert confirms == [Confirm.ACK] * 3 + [Confirm.NACK] * 2
        await subject.take_all(connection, "q", 3)
        assert await channel.publish(Message(b"x", "q")) is Confirm.ACK


async def test_a_full_quorum_queue_refuses(subject: Subject) -> None:
    """A quorum queue takes its max-length and a little more, refuses, and takes again later.

    It refuses once it has told the channel that it is full, and takes again below 80 %.
    """
    arguments = {**QUORUM, "x-max-length": 5, "x-overflow": "reject-publish"}
    async with subject.connect() as connection:
        await connection.declare([QueueDeclaration("q", arguments)], timeout=TIMEOUT)
        channel = await publisher(connection)
        confirms = [await channel.publish(Message(b"x", "q")) for _ in range(8)]
        taken = confirms.index(Confirm.NACK)
        assert 6 <= taken < 8
        assert confirms == [Confirm.ACK] * taken + [Confirm.NACK] * (8 - taken)
        await subject.take_all(connection, "q", taken)

        async def is_taken() -> bool:
            return await channel.publish(Message(b"x", "q")) is Confirm.ACK

        await subject.eventually(is_taken)


async def test_a_full_queue_drops_its_head(subject: Subject) -> None:
    """Without reject-publish, the oldest messages make room, and are dead-lettered."""
    async with subject.connect() as connection:
        await declare(connection, "dead")
        await declare(
            connection,
            "q",
            max_length=2,
            dead_letter_exchange="",
            dead_letter_routing_key="dead",
        )
        await (await publisher(connection)).publish_bodies("q", b"0", b"1", b"2")
        assert [message.body for message in await subject.take_all(connection, "q", 2)] == [
            b"1",
            b"2",
        ]
        (dead,) = await subject.take_all(connection, "dead", 1)
        assert (dead.body, dead.headers["x-first-death-reason"]) == (b"0", "maxlen")


async def test_properties_arrive(subject: Subject) -> None:
    """What was said of a message is what its consumer reads, times in whole seconds."""
    now = datetime(2026, 1, 2, 3, 4, 5, 678_000, tzinfo=UTC)
    headers: dict[str, Any] = {
        "text": "Ünï",
        "number": 2**40,
        "float": 0.1,
        "yes": True,
        "none": None,
        "time": now,
        "bytes": b"\x00",
        "list": ("a", 1, {"b": [2.5]}),
    }
    message = Message(
        b"\x00body",
        "q",
        message_id="id",
        correlation_id="correlation",
        content_type="text/plain",
        content_encoding="utf-8",
        headers=headers,
        priority=3,
        expiration=100.0004,
        timestamp=now,
        type="type",
        app_id="app",
        reply_to="reply",
    )
    async with subject.connect() as connection:
        await declare(connection, "q")
        assert await (await publisher(connection)).publish(message) is Confirm.ACK
        (got,) = await subject.take_all(connection, "q", 1)
    second = now.replace(microsecond=0)
    assert got.headers == headers | {"time": second, "list": ["a", 1, {"b": [2.5]}]}
    assert (got.body, got.queue, got.exchange, got.routing_key) == (b"\x00body", "q", "", "q")
    assert (got.message_id, got.correlation_id) == ("id", "correlation")
    assert (got.content_type, got.content_encoding) == ("text/plain", "utf-8")
    assert (got.priority, got.expiration, got.timestamp) == (3, 100.001, second)
    assert (got.persistent, got.type, got.app_id, got.reply_to) == (True, "type", "app", "reply")


@pytest.mark.parametrize(
    "message",
    [
        Message(b"x" * (16 * 1024 * 1024 + 1), "q"),
        Message(b"", "q", message_id="x" * 256),
        Message(b"", "q" * 256),
        Message(b"", "q", priority=256),
        Message(b"", "q", expiration=-1),
        Message(b"", "q", headers={"large": "x" * 140_000}),
    ],
    ids=["body", "message id", "routing key", "priority", "expiration", "headers"],
)
async def test_what_cannot_be_sent_is_refused_before(subject: Subject, message: Message) -> None:
    """A message that the wire cannot carry is a ValueError."""
    async with subject.connect() as connection:
        with pytest.raises(ValueError, match=r"."):
            connection.prepare(message)


async def test_a_header_without_a_type_is_refused(subject: Subject) -> None:
    """A header's value that AMQP does not know is a TypeError."""
    async with subject.connect() as connection:
        with pytest.raises(TypeError, match="header 'set'"):
            connection.prepare(Message(b"", "q", headers={"set": {1}}))


TOPOLOGY: list[Declaration] = [
    QueueDeclaration("one", {}),
    QueueDeclaration("other", {}),
    QueueDeclaration("rest", {}),
    ExchangeDeclaration("rest", "fanout"),
    Binding("rest", "queue", source="rest", routing_key=""),
    ExchangeDeclaration("topic", "topic", {"alternate-exchange": "rest"}),
    ExchangeDeclaration("below", "topic"),
    Binding("one", "queue", source="topic", routing_key="*.1.#"),
    Binding("below", "exchange", source="topic", routing_key="#.0"),
    Binding("other", "queue", source="below", routing_key="a.#"),
    Binding("one", "queue", source="below", routing_key="b.*"),
]


@pytest.mark.parametrize(
    ("key", "queues"),
    [
        ("x.1", {"one"}),
        ("x.1.y.z", {"one"}),
        ("x.y.1", {"rest"}),
        ("a.0", {"other"}),
        ("a.1.0", {"one", "other"}),
        ("b.0", {"one"}),
        ("b.1.0", {"one"}),
        ("nothing", {"rest"}),
        ("", {"rest"}),
    ],
)
async def test_topics_lead_where_their_bindings_say(
    subject: Subject, key: str, queues: set[str]
) -> None:
    """Words, wildcards, exchanges bound to exchanges, and an alternate exchange for the rest."""
    async with subject.connect() as connection:
        await connection.declare(TOPOLOGY, timeout=TIMEOUT)
        channel = await publisher(connection)
        message = Message(b"x", "", exchange="topic", routing_key=key)
        assert await channel.publish(message) is Confirm.ACK
        for queue in ("one", "other", "rest"):
            await subject.wait_ready(connection, queue, int(queue in queues))
        for queue in queues:
            (got,) = await subject.take_all(connection, queue, 1)
            assert (got.exchange, got.routing_key) == ("topic", key)


async def test_what_an_exchange_binds_nowhere_is_returned(subject: Subject) -> None:
    """An exchange without a binding that matches returns the message."""
    async with subject.connect() as connection:
        await connection.declare(
            [ExchangeDeclaration("a", "topic"), ExchangeDeclaration("b", "topic")], timeout=TIMEOUT
        )
        await connection.declare(
            [Binding("b", "exchange", source="a", routing_key="#")], timeout=TIMEOUT
        )
        channel = await publisher(connection)
        assert await channel.publish(Message(b"x", "", exchange="a")) is Confirm.RETURNED


async def test_declaring_again_changes_nothing(subject: Subject) -> None:
    """A queue that exists is used as it is, with its messages, whatever arguments are given."""
    async with subject.connect() as connection:
        await declare(connection, "q")
        await (await publisher(connection)).publish_bodies("q", b"x")
        await declare(connection, "q", queue_type="quorum")
        await subject.wait_ready(connection, "q", 1)


@pytest.mark.parametrize(
    ("declaration", "code"),
    [
        (QueueDeclaration("missing", {}, "fail"), 404),
        (ExchangeDeclaration("topic", "fanout"), 406),
        (Binding("missing", "queue", source="topic", routing_key="k"), 404),
        (Binding("q", "queue", source="missing", routing_key="k"), 404),
        (Binding("missing", "exchange", source="topic", routing_key="k"), 404),
        (QueueDeclaration("p", {"x-queue-type": "quorum", "x-max-priority": 5}), 406),
        (QueueDeclaration("d", {"x-delivery-limit": 5}), 406),
    ],
    ids=str,
)
async def test_a_declaration_is_refused(
    subject: Subject, declaration: Declaration, code: int
) -> None:
    """What cannot be declared is a TopologyError with RabbitMQ's code; the connection stays."""
    async with subject.connect() as connection:
        await connection.declare(
            [QueueDeclaration("q", {}), ExchangeDeclaration("topic", "topic")], timeout=TIMEOUT
        )
        with pytest.raises(TopologyError) as caught:
            await connection.declare([declaration], timeout=TIMEOUT)
        assert caught.value.code == code
        await declare(connection, "another")


async def test_a_missing_dead_letter_queue_is_a_warning(
    subject: Subject, caplog: pytest.LogCaptureFixture
) -> None:
    """A queue that may be missing is only warned about."""
    async with subject.connect() as connection:
        await connection.declare([QueueDeclaration("missing", {}, "warn")], timeout=TIMEOUT)
    assert "'missing'" in caplog.text


async def test_a_blocked_publisher_waits(subject: Subject) -> None:
    """While an alarm lasts, publications are not answered; afterwards they are confirmed."""
    async with subject.connect() as connection, subject.connect() as another:
        await declare(connection, "q")
        channel = await publisher(connection)
        await channel.publish_bodies("q", b"before")
        assert not connection.is_blocked
        async with subject.alarm():
            sent = channel.send(Message(b"meanwhile", "q"))
            await subject.eventually(lambda: connection.is_blocked)
            assert await another.count_messages("q", timeout=TIMEOUT) == 1
            assert not sent.answer.done()
        async with asyncio.timeout(TIMEOUT):
            assert (await sent.answer)[0] is Confirm.ACK
        # The reader hands over a confirm at once, and leaves it to aiormq to tell of the rest.
        await subject.eventually(lambda: not connection.is_blocked)
        await subject.take_all(another, "q", 2)


async def test_a_dropped_connection_leaves_what_is_unconfirmed(subject: Subject) -> None:
    """A channel that is lost says why, and what it did not confirm; the connection comes back."""
    async with subject.connect() as connection:
        await declare(connection, "q")
        channel = await publisher(connection)
        await channel.publish_bodies("q", b"x")
        await subject.drop_connections()
        assert await channel.channel.wait_lost()
        sent = channel.send(Message(b"too late", "q"))
        assert channel.channel.take_unconfirmed() == [sent]
        assert channel.channel.refusal is None
        await subject.eventually(lambda: connection.is_connected)
        assert connection.reconnects == 1
        assert connection.last_error
        await subject.take_all(connection, "q", 1)


async def test_a_closed_connection_is_of_no_use(subject: Subject) -> None:
    """After aclose, nothing can be opened, and waiting for the connection is an error."""
    async with subject.connect() as connection:
        await connection.aclose(timeout=5)
        await connection.aclose(timeout=5)
        with pytest.raises(ConnectionLostError):
            await connection.wait_connected()
        with pytest.raises(ConnectionLostError):
            await connection.open_publish_channel(timeout=TIMEOUT)
        assert not connection.is_connected


async def test_time_is_told_and_passes(subject: Subject) -> None:
    """A connection tells the time, waits for time, and stops waiting when an event is set."""
    async with subject.connect() as connection:
        began, event = connection.now(), asyncio.Event()
        await subject.wait_for(connection.sleep(0.05))
        await subject.wait_for(connection.sleep(0.05, until=event))
        assert connection.now() - began >= timedelta(seconds=0.1)
        asyncio.get_running_loop().call_later(0.01, event.set)
        async with asyncio.timeout(TIMEOUT):
            await connection.sleep(3600, until=event)
            await connection.sleep(3600, until=event)
