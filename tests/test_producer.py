"""`Producer` on a RabbitMQ that works: what is stored, what is refused, and in which words."""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import aiormq
import pytest

from aioworkq import (
    AccessRefusedError,
    ConnectionLostError,
    MemoryBroker,
    NotConfirmedError,
    OutcomeUnknownError,
    Producer,
    Queue,
    StateError,
    TopologyError,
    UnroutableError,
)
from tests.consuming import Broker, eventually, headers_of
from tests.publishing import no_complaints

if TYPE_CHECKING:
    from aioworkq.testing import RabbitMQ
    from tests.proxy import Proxy

__all__ = ["no_complaints"]

SECRET = "s3cr3t-p4ssw0rd"
NUMBER = "x-aioworkq-publish-number"


@dataclass
class Email:
    to: str


# What is stored


async def test_a_published_message_is_persistent_in_a_durable_queue(
    producer: Producer, broker: Broker, rabbitmq: RabbitMQ, queue_name: str
) -> None:
    """publish() declares a durable queue, stores a persistent message, and returns its id."""
    message_id = await producer.publish(Queue(queue_name, Email), Email("ada"))
    message = await broker.take(queue_name)
    properties = message.header.properties
    assert message.body == b'{"to":"ada"}'
    assert properties.delivery_mode == 2
    assert properties.message_id == message_id
    assert properties.content_type == "application/json"
    assert properties.timestamp is not None
    assert abs(datetime.now(UTC) - properties.timestamp) < timedelta(minutes=5)
    durable = await rabbitmq.eval(
        f'{{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"{queue_name}">>, queue, '
        f'<<"{queue_name}">>)), {{amqqueue:is_durable(Q), amqqueue:get_type(Q)}}'
    )
    assert durable == "{true,rabbit_quorum_queue}"


async def test_a_message_carries_what_it_was_given(
    producer: Producer, broker: Broker, queue_name: str
) -> None:
    """Id, correlation id, priority, expiration and headers of every kind arrive as they were."""
    when = datetime(2024, 2, 29, 12, 30, tzinfo=UTC)
    headers = {
        "text": "ü",
        "int": -(2**63),
        "float": 0.1,
        "flag": True,
        "none": None,
        "bytes": b"\x00\xff",
        "when": when,
        "list": [1, "two", [3.5]],
        "dict": {"deep": {"deeper": 1}},
        "decimals": [Decimal("-1.50"), Decimal(3)],
        "n" * 255: 1,
    }
    message_id = await producer.publish(
        queue_name,
        b"\x00body",
        message_id="mine",
        correlation_id="theirs",
        priority=9,
        expiration=3600,
        headers=headers,
    )
    message = await broker.take(queue_name)
    properties = message.header.properties
    assert message_id == properties.message_id == "mine"
    assert properties.correlation_id == "theirs"
    assert properties.priority == 9
    assert properties.expiration == "3600000"
    assert message.body == b"\x00body"
    arrived = headers_of(message)
    arrived.pop("x-delivery-count", None)
    assert arrived == headers


async def test_an_existing_queue_is_used_as_it_is(
    producer: Producer, broker: Broker, queue_name: str
) -> None:
    """A classic queue that another client declared takes the messages of a Queue of any kind."""
    await broker.declare(queue_name)
    await producer.publish(Queue(queue_name, bytes), b"x")
    assert (await broker.take(queue_name)).body == b"x"


async def test_the_messages_of_one_task_keep_their_order(
    producer: Producer, broker: Broker, queue_name: str
) -> None:
    """What is published one after the other is stored one after the other."""
    for number in range(50):
        await producer.publish(queue_name, b"%d" % number)
    bodies = [int(message.body) for message in await broker.take_all(queue_name)]
    assert bodies == list(range(50))


async def test_empty_and_large_bodies_arrive_whole(
    producer: Producer, broker: Broker, queue_name: str
) -> None:
    """A body of no bytes, of exactly one frame, and of many frames."""
    queue = Queue(queue_name, bytes, type="classic")
    bodies = [b"", b"a" * (131_072 - 8), b"b" * (131_072 - 7), b"c" * 3_000_000]
    for body in bodies:
        await producer.publish(queue, body)
    assert [message.body for message in await broker.take_all(queue_name)] == bodies


async def test_expiration_may_be_as_long_as_rabbitmq_takes(
    producer: Producer, broker: Broker, queue_name: str
) -> None:
    """The longest expiration that is let through is one that RabbitMQ takes."""
    await producer.publish(queue_name, b"x", expiration=(2**32 - 1) / 1000)
    assert (await broker.take(queue_name)).header.properties.expiration == str(2**32 - 1)


async def test_a_queue_may_be_called_like_a_complaint_of_rabbitmq(
    producer: Producer, broker: Broker
) -> None:
    """A name that occurs in what RabbitMQ says of a missing queue is not taken for its words."""
    for name in ("timeouts", "is down or inaccessible", "no_quorum"):
        await producer.publish(name, b"x")
        assert await broker.ready(name) == 1


@pytest.mark.fast_path("pamqp refuses the names")
async def test_a_queue_may_have_any_name_that_rabbitmq_takes(producer: Producer) -> None:
    """The narrower idea that pamqp has of names, and RabbitMQ has not, stops nobody."""
    for name in ("größe", "a|b", "it's {so}", "*", "名" * 70):
        await producer.publish(name, b"x")


async def test_an_argument_that_amqp_cannot_encode_is_a_type_error_at_once(
    producer: Producer, queue_name: str
) -> None:
    """It is the caller's mistake, and no connection would take it later."""
    queue = Queue(queue_name, arguments={"x-mine": object()})
    with pytest.raises(TypeError):
        await producer.publish(queue, b"x", timeout=600)


# What is not stored


async def test_a_message_without_a_queue_is_unroutable(producer: Producer, queue_name: str) -> None:
    """With declare=False, a queue that does not exist is an UnroutableError that says so."""
    queue = Queue(queue_name, bytes, declare=False)
    with pytest.raises(UnroutableError) as caught:
        await producer.publish(queue, b"x", message_id="m1")
    assert str(caught.value) == (
        f"message m1 was returned: no queue {queue_name!r} exists (312 NO_ROUTE). "
        "Declare the queue, or leave declare=True on it."
    )
    assert producer.statistics().unroutable == 1


async def test_a_queue_deleted_since_is_declared_again(
    producer: Producer, broker: Broker, queue_name: str
) -> None:
    """A producer that declared a queue once declares it again when a message finds none."""
    queue = Queue(queue_name, bytes, type="classic")
    await producer.publish(queue, b"1")
    await broker.delete(queue_name)
    await asyncio.gather(*(producer.publish(queue, b"x") for _ in range(200)))
    assert await broker.ready(queue_name) == 200


@pytest.mark.parametrize("kind", ["classic", "quorum"])
async def test_a_full_queue_refuses(
    producer: Producer, broker: Broker, queue_name: str, kind: Any
) -> None:
    """A queue with max_length refuses what is too much, and each publisher hears of its own."""
    queue = Queue(queue_name, bytes, type=kind, max_length=3)

    async def is_full() -> bool:  # a quorum queue takes a few more before it notices
        try:
            await producer.publish(queue, b"x")
        except NotConfirmedError:
            return True
        return False

    await eventually(is_full)
    stored = await broker.ready(queue_name)
    with pytest.raises(NotConfirmedError) as caught:
        await producer.publish(queue, b"x", message_id="m1")
    assert str(caught.value) == (
        f"message m1 was refused by queue {queue_name!r}: RabbitMQ sent a negative confirm. "
        "Publish it again later; a queue with max_length may be full."
    )
    assert await broker.ready(queue_name) == stored
    statistics = producer.statistics()
    assert (statistics.confirmed, statistics.not_confirmed) == (stored, 2)


async def test_each_of_many_messages_with_one_id_gets_its_own_outcome(
    producer: Producer, broker: Broker, queue_name: str
) -> None:
    """Messages in flight under the same message_id, routed and unroutable, are told apart."""
    there = Queue(queue_name, bytes, type="classic")
    missing = Queue(f"{queue_name}.missing", bytes, declare=False)
    await producer.publish(there, b"0")
    results = await asyncio.gather(
        *(
            producer.publish(there if number % 3 else missing, b"x", message_id="the same")
            for number in range(300)
        ),
        return_exceptions=True,
    )
    for number, result in enumerate(results):
        assert isinstance(result, str if number % 3 else UnroutableError), number
    assert await broker.ready(queue_name) == 201


@pytest.mark.fast_path("pamqp refuses the names")
async def test_a_declaration_leaves_no_channel_behind(producer: Producer, queue_name: str) -> None:
    """Not for a missing queue, nor for one whose name is too long for an answer of RabbitMQ."""

    def channels() -> int:
        assert producer._outbox is not None
        connection: Any = producer._outbox.connection
        return len([one for one in connection._current.channels.values() if one is not None])

    await producer.publish(queue_name, b"x")
    before = channels()
    await producer.publish(f"{queue_name}.missing", b"x")
    await producer.publish("名" * 80, b"x")
    await eventually(lambda: channels() == before)


@pytest.mark.fast_path("nothing is numbered")
async def test_a_republished_message_does_not_lend_its_number_to_another(
    producer: Producer, broker: Broker, queue_name: str, url: str
) -> None:
    """A header that told twins apart once, and is published again, cannot mix up two outcomes."""
    queue, missing = Queue(queue_name, bytes), Queue(f"{queue_name}.missing", bytes, declare=False)
    await asyncio.gather(*(producer.publish(queue, b"x", message_id="twin") for _ in range(2)))
    left = [headers_of(message) for message in await broker.take_all(queue_name)]
    number = next(headers[NUMBER] for headers in left if NUMBER in headers)
    async with Producer(url) as another:
        # Numbers begin anew: this is the one that has the old number.
        routed = [another.publish(queue, b"x") for _ in range(number + 1)]
        copy = another.publish(missing, b"x", headers={NUMBER: number})
        await another.publish(queue, b"x")
        results = await asyncio.gather(*routed, copy, return_exceptions=True)
    assert [type(result) for result in results] == [str] * (number + 1) + [UnroutableError]


# What RabbitMQ could not take is refused before it is sent


NOT_TAKEN: list[tuple[dict[str, Any], str]] = [
    ({"message_id": "m" * 256}, "the message_id has 256 bytes: AMQP allows at most 255."),
    ({"message_id": ""}, "message_id is empty: give one, or None to have one made."),
    ({"message_id": "\ud800"}, "the message_id is not valid Unicode text."),
    ({"correlation_id": "ü" * 128}, "the correlation_id has 256 bytes"),
    ({"headers": {"h" * 256: 1}}, "has 256 bytes: RabbitMQ takes 255."),
    ({"headers": {"h": "x" * 131_072}}, "RabbitMQ takes at most 131064 in one header frame."),
    ({"priority": 256}, "priority is 256: it must be from 0 to 255."),
    ({"priority": -1}, "priority is -1: it must be from 0 to 255."),
    ({"expiration": -1}, "expiration is -1 seconds: it must be from 0 to 4294967.295."),
    ({"expiration": 4_294_967.296}, "expiration is 4294967.296 seconds: it must be from 0"),
    ({"expiration": float("nan")}, "expiration is nan seconds"),
    ({"timeout": -1}, "timeout is -1: it must be a number of seconds, 0 or more."),
    ({"timeout": float("nan")}, "timeout is nan"),
    ({"timeout": float("inf")}, "timeout is inf"),
    ({"body": b"x" * 65_537}, "the body has 65537 bytes: at most 65536 are allowed. Store "),
    ({"body": "\ud800"}, "this text cannot be encoded as UTF-8"),
    ({"queue": "q" * 251}, "has 251 bytes: it may have 250, AMQP's 255 less the '.dead'"),
    ({"queue": "ü" * 128}, "has 256 bytes: it may have 250"),
    ({"queue": ""}, "a queue's name is empty: give it one."),
    ({"queue": "amq.mine"}, "starts with 'amq.', which RabbitMQ keeps to itself."),
]


async def test_what_rabbitmq_cannot_take_is_a_value_error(url: str, queue_name: str) -> None:
    """A ValueError says what is too large or too long; nothing is sent, nothing is harmed."""
    async with Producer(url, max_message_size=65_536) as producer:
        await producer.publish(queue_name, b"before")
        before = producer.statistics()
        for options, sentence in NOT_TAKEN:
            given: Any = {"queue": queue_name, "body": b"x", **options}
            with pytest.raises(ValueError) as caught:
                await producer.publish(**given)
            assert sentence in str(caught.value)
        assert producer.statistics() == before
        await producer.publish(queue_name, b"after")


WRONG_TYPES: list[tuple[dict[str, Any], str]] = [
    ({"body": object()}, "a body of type object cannot be encoded: object "),
    ({"body": {"a": {1, 2, object()}}}, "a body of type dict cannot be encoded"),
    ({"queue": Queue("q", bytes), "body": "text"}, "a body of this queue is bytes, not str."),
    ({"queue": Queue("q", str), "body": b"bytes"}, "a body of this queue is str, not bytes."),
    ({"queue": Queue("q", Email), "body": {}}, "a body of this queue is Email, not dict."),
    (
        {"queue": Queue("q", Email), "body": Email(5)},  # type: ignore[arg-type]
        "this body is not a valid Email: Expected `str`, got `int` - at `$.to`.",
    ),
    ({"queue": 5}, "a queue is given by its name or as a Queue, not by 5."),
    ({"headers": {"h": object()}}, "AMQP takes str, int of 64 bits, float, bool, None, bytes"),
    ({"headers": {"h": 2**63}}, "header 'h' is 9223372036854775808: AMQP takes str, int of 64"),
    ({"headers": {5: "h"}}, "a header's name is a str, not int."),
    ({"message_id": uuid.UUID(int=5)}, "message_id is a str, not UUID: give str(...) of it."),
    ({"correlation_id": 7}, "correlation_id is a str, not int: give str(...) of it."),
]


async def test_what_has_the_wrong_type_is_a_type_error(producer: Producer, queue_name: str) -> None:
    """A TypeError says what is of the wrong type; nothing is sent."""
    await producer.publish(queue_name, b"before")
    before = producer.statistics()
    for options, sentence in WRONG_TYPES:
        given: Any = {"queue": queue_name, "body": b"x", **options}
        with pytest.raises(TypeError) as caught:
            await producer.publish(**given)
        assert sentence in str(caught.value)
    assert producer.statistics() == before
    await producer.publish(queue_name, b"after")


# Access


async def test_a_wrong_password_is_refused_at_once(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """AccessRefusedError comes before the timeout; neither it nor any log shows the secret."""
    caplog.set_level(logging.DEBUG)
    wrong = url.replace("guest:guest", f"guest:{SECRET}")
    producer = Producer(wrong, timeout=600)
    with pytest.raises(AccessRefusedError) as caught:
        await producer.start()
    port, vhost = wrong.rpartition(":")[2].split("/")
    assert str(caught.value) == (
        f"connecting to amqp://127.0.0.1:{port}/{vhost}: ACCESS_REFUSED - Login was refused using "
        "authentication mechanism PLAIN. For details see the broker logfile.. Correct the user, "
        "the password, the virtual host or the user's permissions."
    )
    shown = [repr(producer), repr(producer._connection), repr(producer.statistics())]
    shown += [repr(caught.value), str(caught.getrepr(showlocals=False)), caplog.text]
    assert not [text for text in shown if SECRET in text]


async def test_an_unknown_virtual_host_is_refused_at_once(url: str) -> None:
    """A virtual host that does not exist is an AccessRefusedError with RabbitMQ's reason."""
    with pytest.raises(AccessRefusedError) as caught:
        await Producer(f"{url}.missing", timeout=600).start()
    assert "NOT_ALLOWED - vhost " in str(caught.value)
    assert ".missing not found. Correct the user, the password" in str(caught.value)


async def test_a_user_who_may_not_use_the_virtual_host_is_refused_at_once(
    url: str, rabbitmq: RabbitMQ, queue_name: str
) -> None:
    """A user without permissions for the virtual host is an AccessRefusedError."""
    await rabbitmq.add_user(queue_name, SECRET)
    theirs = url.replace("guest:guest", f"{queue_name}:{SECRET}")
    with pytest.raises(AccessRefusedError, match="NOT_ALLOWED - access to vhost") as caught:
        await Producer(theirs, timeout=600).start()
    assert SECRET not in str(caught.getrepr(showlocals=False))


async def test_a_user_who_may_not_declare_hears_a_topology_error(
    url: str, rabbitmq: RabbitMQ, queue_name: str
) -> None:
    """Without the permission to configure, a queue that is missing is a TopologyError."""
    await rabbitmq.add_user(queue_name, SECRET)
    await rabbitmq.set_permissions(queue_name, vhost=queue_name, configure="^$")
    theirs = url.replace("guest:guest", f"{queue_name}:{SECRET}")
    async with Producer(theirs) as producer:
        with pytest.raises(TopologyError) as caught:
            await producer.publish(queue_name, b"x")
        assert caught.value.code == 403
        assert re.search("ACCESS_REFUSED - (configure )?access to queue", str(caught.value))
        assert "(rabbitmqctl set_permissions)" in str(caught.value)
        assert caught.value.name == f"{queue_name}.dead"


async def test_a_user_who_may_not_write_hears_that_nothing_is_stored(
    url: str, rabbitmq: RabbitMQ, broker: Broker, queue_name: str, *, documented_calls: bool
) -> None:
    """Without the permission to write, each message of many is refused; none is stored."""
    await rabbitmq.add_user(queue_name, SECRET)
    await rabbitmq.set_permissions(queue_name, vhost=queue_name, write="^$")
    await broker.declare(queue_name)
    theirs = url.replace("guest:guest", f"{queue_name}:{SECRET}")
    queue = Queue(queue_name, bytes, declare=False)
    async with Producer(theirs) as producer:
        results = await asyncio.gather(
            *(producer.publish(queue, b"x") for _ in range(20)), return_exceptions=True
        )
        assert {type(result) for result in results} == {NotConfirmedError}
        refused = "ACCESS_REFUSED - (write )?access to exchange 'amq.default'"
        assert re.search(refused, str(results[0]))
        assert producer.statistics().is_connected
        assert producer.statistics().reconnects == 0 or documented_calls
    assert await broker.ready(queue_name) == 0


async def test_a_queue_that_another_connection_holds_is_a_topology_error(
    producer: Producer, url: str, queue_name: str
) -> None:
    """An exclusive queue of somebody else cannot be used, and the error says why."""
    connection = await aiormq.connect(url)
    try:
        channel = await connection.channel()
        await channel.queue_declare(queue_name, exclusive=True)
        with pytest.raises(TopologyError, match="Another connection holds it exclusively") as got:
            await producer.publish(queue_name, b"x")
        assert got.value.code == 405
    finally:
        await connection.close()


# Options


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("", "the broker's URL has the scheme ''. Write it as amqp://user:password@host:port/vhos"),
        (f"http://guest:{SECRET}@localhost/", "the broker's URL has the scheme 'http'."),
        (f"amqp://guest:{SECRET}@localhost:port/", "the broker's URL cannot be parsed."),
        (f"amqp://guest:{SECRET}@localhost:99999/", "the broker's URL cannot be parsed."),
        (f"amqp://guest:{SECRET}@[::1/", "the broker's URL cannot be parsed."),
        (f"amqp://guest:{SECRET}@/", "the broker's URL has no host."),
        (f"amqp://guest:{SECRET}@localhost:0/", "the broker's URL has port 0."),
        (f"amqp://guest:{SECRET}@localhost/?heartbeat=0", "has heartbeat=0: it must be from 1 to"),
        (f"amqp://guest:{SECRET}@localhost/?heartbeat=soon", "the broker's URL has heartbeat=soon"),
        ([], "the list of URLs is empty: give at least one."),
        (["amqp://localhost/", f"http://:{SECRET}@h/"], "the broker's URL has the scheme 'http'."),
    ],
)
def test_a_url_that_cannot_be_right_is_a_value_error(url: Any, sentence: str) -> None:
    """The constructor checks every URL, and never shows what may be a password."""
    with pytest.raises(ValueError) as caught:
        Producer(url)
    assert sentence in str(caught.value)
    assert SECRET not in repr(caught.value)


@pytest.mark.parametrize("url", [None, 5, b"amqp://localhost/", [None]])
def test_a_url_of_the_wrong_type_is_a_type_error(url: Any) -> None:
    """A URL is a str, or a list of str."""
    with pytest.raises(TypeError, match="a URL, or a list of URLs, is needed, not "):
        Producer(url)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"timeout": -1}, "timeout is -1: it must be a number of seconds, 0 or more."),
        ({"window": 0}, "window is 0: it must be at least 1."),
        ({"max_message_size": 0}, "max_message_size is 0: it must be at least 1."),
        ({"heartbeat": 0}, "heartbeat is 0: it must be from 1 to 3600 seconds."),
        ({"heartbeat": 3601}, "heartbeat is 3601"),
        ({"connect_timeout": 0}, "connect_timeout is 0: it must be more than 0 seconds."),
        ({"connect_timeout": float("nan")}, "connect_timeout is nan"),
    ],
)
def test_an_option_that_cannot_be_right_is_a_value_error(
    options: dict[str, Any], sentence: str
) -> None:
    """The constructor checks every number."""
    with pytest.raises(ValueError) as caught:
        Producer("amqp://localhost/", **options)
    assert sentence in str(caught.value)


# Starting and closing


def test_a_producer_can_be_made_without_an_event_loop(url: str, queue_name: str) -> None:
    """A module-level producer belongs to the loop that it is started in."""
    producer = Producer(url)

    async def main() -> None:
        async with producer:
            await producer.publish(queue_name, b"x")

    asyncio.run(main())


async def test_using_a_producer_outside_of_its_life_is_a_state_error(
    url: str, queue_name: str
) -> None:
    """Before start, after close and with a second start, a StateError says what to do."""
    producer = Producer(url)
    with pytest.raises(StateError) as caught:
        await producer.publish(queue_name, b"x")
    assert str(caught.value) == (
        "this producer cannot publish: it was not started. "
        "Use it inside `async with Producer(...) as producer:`."
    )
    await producer.start()
    with pytest.raises(StateError) as caught:
        await producer.start()
    assert str(caught.value) == (
        "this producer cannot be started: it runs already. Make a new Producer."
    )
    await producer.close()
    await producer.close()
    with pytest.raises(StateError, match="cannot publish: it was closed"):
        await producer.publish(queue_name, b"x")
    with pytest.raises(StateError, match="cannot publish: it was closed"):
        await producer.publish_many(queue_name, [b"x"])
    with pytest.raises(StateError, match="cannot be started: it was closed"):
        await producer.start()


async def test_a_producer_closed_before_its_start_cannot_be_started(url: str) -> None:
    """Closing what never ran is allowed, and final."""
    producer = Producer(url)
    await producer.close()
    await producer.close()
    with pytest.raises(StateError, match="it was closed"):
        await producer.start()


async def test_close_waits_for_what_was_published_before(
    url: str, broker: Broker, queue_name: str
) -> None:
    """What publish() was called with before close() is stored, its declaration included."""
    queue = Queue(queue_name, bytes, type="classic")
    producer = Producer(url)
    await producer.start()
    tasks = [asyncio.create_task(producer.publish(queue, b"x")) for _ in range(100)]
    await asyncio.sleep(0)  # they have begun, and declare the queue
    await producer.close()
    assert all(isinstance(result, str) for result in await asyncio.gather(*tasks))
    assert await broker.ready(queue_name) == 100


async def test_two_tasks_may_close_at_the_same_time(url: str, queue_name: str) -> None:
    """Both calls return once the producer is closed."""
    producer = Producer(url)
    await producer.start()
    await producer.publish(queue_name, b"x")

    async def close() -> bool:
        await producer.close()
        return producer.statistics().is_connected

    assert not any(await asyncio.gather(close(), close()))


async def test_a_timeout_of_zero_fails_and_harms_nobody(
    broker: Broker, proxy: Proxy, proxy_url: str, queue_name: str
) -> None:
    """timeout=0 leaves no time for a confirm: the outcome is unknown, and others go on."""
    async with Producer(proxy_url) as producer:
        with pytest.raises(ConnectionLostError, match="declaring queue"):
            await producer.publish(queue_name, b"x", timeout=0)
        await producer.publish(queue_name, b"x")
        proxy.stall(to_broker=False)  # or the confirm is first, if this process stood still
        with pytest.raises(OutcomeUnknownError, match="in time: the broker is silent"):
            await producer.publish(queue_name, b"x", timeout=0)
        proxy.flow()
        await producer.publish(queue_name, b"x")
        assert await broker.ready(queue_name) == 3
        assert producer.statistics().in_flight == 0


async def test_statistics_tell_what_was_done(producer: Producer, queue_name: str) -> None:
    """Every outcome is counted once."""
    await producer.publish(queue_name, b"x")
    missing = Queue(f"{queue_name}.missing", declare=False)
    with pytest.raises(UnroutableError):
        await producer.publish(missing, b"x")
    statistics = producer.statistics()
    assert statistics.is_connected
    assert not statistics.is_blocked
    assert (statistics.confirmed, statistics.unroutable) == (1, 1)
    assert (statistics.pending, statistics.in_flight, statistics.resent) == (0, 0, 0)
    assert (statistics.reconnects, statistics.last_error) == (0, "")


async def test_the_clock_is_read_once_for_the_messages_of_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And again for those of a later one."""
    async with Producer(MemoryBroker()) as producer:
        await producer.publish("numbers", 0)
        read = list[datetime]()
        now = producer._connection.now

        def count() -> datetime:
            read.append(now())
            return read[-1]

        monkeypatch.setattr(producer._connection, "now", count)
        await asyncio.gather(*(producer.publish("numbers", number) for number in range(10)))
        assert len(read) == 1
        await producer.publish("numbers", 10)
        assert len(read) == 2
