"""What a broker does with deliveries: order, prefetch, returns, counts, expiry, dead letters."""

from __future__ import annotations

import asyncio
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
    from aioworkq.broker import Connection, Incoming, Subscription
    from tests.conformance.subject import Subject

CLASSIC: dict[str, Any] = {}
BOTH = pytest.mark.parametrize("arguments", [CLASSIC, QUORUM], ids=["classic", "quorum"])


async def start(
    connection: Connection, arguments: dict[str, Any], *bodies: bytes, queue: str = "q"
) -> None:
    """Declare a queue and fill it."""
    await connection.declare([QueueDeclaration(queue, arguments)], timeout=TIMEOUT)
    await (await publisher(connection)).publish_bodies(queue, *bodies)


def counts(incoming: Incoming) -> tuple[int | None, int | None]:
    headers = incoming.message.headers
    return headers.get("x-delivery-count"), headers.get("x-acquired-count")


@BOTH
async def test_deliveries_come_in_order(subject: Subject, arguments: dict[str, Any]) -> None:
    """Messages are handed over in the order they were published, numbered, and are new."""
    async with subject.connect() as connection:
        await start(connection, arguments, b"0", b"1", b"2")
        consumer = await subject.consume(connection, "q")
        incoming = await consumer.wait(3)
        assert consumer.bodies == [b"0", b"1", b"2"]
        assert [one.tag for one in incoming] == [1, 2, 3]
        assert [one.redelivered for one in incoming] == [False] * 3
        assert incoming[0].message.queue == "q"


@BOTH
async def test_prefetch_bounds_what_is_out(subject: Subject, arguments: dict[str, Any]) -> None:
    """No more than prefetch_count deliveries are unsettled; an ack makes room for the next one."""
    async with subject.connect() as connection:
        await start(connection, arguments, b"0", b"1", b"2", b"3")
        consumer = await subject.consume(connection, "q", prefetch_count=2)
        await consumer.wait(2)
        await subject.wait_ready(connection, "q", 2)
        assert consumer.settled().ack(2)
        await consumer.wait(3)
        assert consumer.bodies == [b"0", b"1", b"2"]


@BOTH
async def test_a_delivery_is_settled_once(subject: Subject, arguments: dict[str, Any]) -> None:
    """A second ack or return of the same delivery does nothing."""
    async with subject.connect() as connection:
        await start(connection, arguments, b"0", b"1")
        consumer = await subject.consume(connection, "q")
        await consumer.wait(2)
        subscription = consumer.settled()
        assert subscription.ack(1)
        assert subscription.requeue(2, counts=True)
        assert not subscription.ack(1)
        assert not subscription.ack(2)
        assert not subscription.requeue(1, counts=True)
        assert not subscription.ack(99)
        await consumer.wait(3)
        assert consumer.bodies[2] == b"1"


@BOTH
async def test_acked_messages_are_gone(subject: Subject, arguments: dict[str, Any]) -> None:
    """What was acked before the channel was closed does not come back; everything else does."""
    async with subject.connect() as connection:
        await start(connection, arguments, *(b"%d" % number for number in range(5)))
        consumer = await subject.consume(connection, "q")
        await consumer.wait(5)
        for tag in (1, 2, 4):
            consumer.settled().ack(tag)
        await consumer.settled().aclose(timeout=5)
        left = await subject.take_all(connection, "q", 2)
        assert [message.body for message in left] == [b"2", b"4"]


@BOTH
async def test_what_is_rejected_comes_first(subject: Subject, arguments: dict[str, Any]) -> None:
    """A rejected message is handed over again before those that wait, and is marked."""
    async with subject.connect() as connection:
        await start(connection, arguments, b"0", b"1", b"2")
        consumer = await subject.consume(connection, "q", prefetch_count=1)
        await consumer.wait(1)
        consumer.settled().requeue(1, counts=True)
        again = (await consumer.wait(2))[1]
        assert (again.message.body, again.redelivered) == (b"0", True)


async def test_what_comes_back_to_a_classic_queue_takes_its_place(subject: Subject) -> None:
    """A classic queue puts what comes back where it was, whatever comes back first."""
    assert await order_after_returns(subject, CLASSIC) == [b"0", b"1", b"2", b"3"]


async def test_what_comes_back_to_a_quorum_queue_queues_up_before_it(subject: Subject) -> None:
    """A quorum queue hands over what came back first, in the order it came back."""
    assert await order_after_returns(subject, QUORUM) == [b"2", b"0", b"1", b"3"]


async def order_after_returns(subject: Subject, arguments: dict[str, Any]) -> list[bytes]:
    async with subject.connect() as connection:
        await start(connection, arguments, b"0", b"1", b"2", b"3")
        consumer = await subject.consume(connection, "q", prefetch_count=3)
        await consumer.wait(3)
        await consumer.settled().cancel(timeout=5)
        for ready, tag in enumerate((3, 1, 2), 2):
            assert consumer.settled().requeue(tag, counts=True)
            await subject.wait_ready(connection, "q", ready)
        await consumer.settled().aclose(timeout=5)
        return [message.body for message in await subject.take_all(connection, "q", 4)]


async def test_without_a_limit_what_comes_back_goes_to_the_end(subject: Subject) -> None:
    """A quorum queue without a delivery limit, as in 3.10 by default, requeues at the end."""
    async with subject.connect() as connection:
        await start(connection, {"x-queue-type": "quorum"}, b"0", b"1")
        consumer = await subject.consume(connection, "q", prefetch_count=1)
        await consumer.wait(1)
        consumer.settled().requeue(1, counts=True)
        await consumer.wait(2)
        first_again = subject.number >= (4, 0)  # its default limit is 20
        assert consumer.bodies[1] == (b"0" if first_again else b"1")


async def test_a_quorum_queue_counts_returns(subject: Subject) -> None:
    """Rejects and lost channels are counted by every version, nacks before 4.3 only."""
    async with subject.connect() as connection:
        await start(connection, QUORUM, b"x")
        consumer = await subject.consume(connection, "q")
        (await consumer.wait(1))[0]
        consumer.settled().requeue(1, counts=True)
        rejected = (await consumer.wait(2))[1]
        consumer.settled().requeue(2, counts=False)
        nacked = (await consumer.wait(3))[2]
        await consumer.settled().aclose(timeout=5)
        another = await subject.consume(connection, "q")
        lost = (await another.wait(1))[0]
        assert all(one.redelivered for one in (rejected, nacked, lost))
        expected: list[tuple[int | None, int | None]] = [(1, None), (2, None), (3, None)]
        if subject.number >= (4, 3):
            expected = [(1, 1), (1, 2), (2, 3)]
        assert [counts(one) for one in (rejected, nacked, lost)] == expected
        assert connection.counts_nacks == (subject.number < (4, 3))


async def test_a_first_delivery_is_not_counted(subject: Subject) -> None:
    """The count of a first delivery is 0 or missing."""
    async with subject.connect() as connection:
        await start(connection, QUORUM, b"x")
        consumer = await subject.consume(connection, "q")
        assert set(counts((await consumer.wait(1))[0])) <= {None, 0}


async def test_a_nack_alone_is_told(subject: Subject) -> None:
    """A message that was only nacked is marked as redelivered, whether that counts or not."""
    async with subject.connect() as connection:
        await start(connection, QUORUM, b"x")
        consumer = await subject.consume(connection, "q")
        await consumer.wait(1)
        consumer.settled().requeue(1, counts=False)
        again = (await consumer.wait(2))[1]
        assert again.redelivered
        assert counts(again) == ((None, 1) if subject.number >= (4, 3) else (1, None))


async def test_a_classic_queue_counts_nothing(subject: Subject) -> None:
    """A classic queue says only that a message was handed over before."""
    async with subject.connect() as connection:
        await start(connection, CLASSIC, b"x")
        consumer = await subject.consume(connection, "q")
        for tag in (1, 2):
            await consumer.wait(tag)
            consumer.settled().requeue(tag, counts=True)
        third = (await consumer.wait(3))[2]
        assert third.redelivered
        assert counts(third) == (None, None)


async def test_the_delivery_limit_ends_it(subject: Subject) -> None:
    """One return more than x-delivery-limit dead-letters a message."""
    arguments = {
        "x-queue-type": "quorum",
        "x-delivery-limit": 2,
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": "dead",
    }
    async with subject.connect() as connection:
        await declare(connection, "dead")
        await start(connection, arguments, b"x")
        consumer = await subject.consume(connection, "q")
        for tag in (1, 2, 3):
            await consumer.wait(tag)
            consumer.settled().requeue(tag, counts=True)
        (dead,) = await subject.take_all(connection, "dead", 1)
        assert dead.headers["x-first-death-reason"] == "delivery_limit"
        await consumer.wait(3)


async def test_consumers_take_turns(subject: Subject) -> None:
    """Two consumers of a queue get every second message each."""
    async with subject.connect() as connection:
        await start(connection, QUORUM)
        one = await subject.consume(connection, "q")
        two = await subject.consume(connection, "q")
        await (await publisher(connection)).publish_bodies("q", *(b"%d" % n for n in range(6)))
        await subject.eventually(lambda: len(one.deliveries) + len(two.deliveries) == 6)
        assert {tuple(one.bodies), tuple(two.bodies)} == {(b"0", b"2", b"4"), (b"1", b"3", b"5")}


async def test_who_has_no_room_is_passed_over(subject: Subject) -> None:
    """A consumer whose prefetch is used up gets nothing, another one gets it."""
    async with subject.connect() as connection:
        await start(connection, QUORUM)
        busy = await subject.consume(connection, "q", prefetch_count=1)
        free = await subject.consume(connection, "q")
        await (await publisher(connection)).publish_bodies("q", *(b"%d" % n for n in range(5)))
        await subject.eventually(lambda: len(free.deliveries) == 4)
        await busy.wait(1)


@BOTH
async def test_a_cancelled_consumer_settles_what_it_has(
    subject: Subject, arguments: dict[str, Any]
) -> None:
    """After cancel nothing comes any more, and what came can still be acked or returned."""
    async with subject.connect() as connection:
        await start(connection, arguments, b"0", b"1")
        consumer = await subject.consume(connection, "q")
        await consumer.wait(2)
        subscription = consumer.settled()
        await subscription.cancel(timeout=5)
        await (await publisher(connection)).publish_bodies("q", b"2")
        await subject.wait_ready(connection, "q", 1)
        assert subscription.ack(1)
        assert subscription.requeue(2, counts=True)
        await subject.wait_ready(connection, "q", 2)
        await subscription.aclose(timeout=5)
        await subscription.aclose(timeout=5)
        assert subscription.is_lost
        assert subscription.reason
        assert consumer.bodies == [b"0", b"1"]


@BOTH
async def test_a_cancelled_consumer_goes_on(subject: Subject, arguments: dict[str, Any]) -> None:
    """After resume deliveries come again, with the new prefetch; what it had it still has."""
    async with subject.connect() as connection:
        await start(connection, arguments, b"0")
        consumer = await subject.consume(connection, "q", prefetch_count=5)
        await consumer.wait(1)
        subscription = consumer.settled()
        for _ in range(2):
            await subscription.cancel(timeout=5)
        await (await publisher(connection)).publish_bodies("q", b"1", b"2", b"3")
        await subject.wait_ready(connection, "q", 3)
        assert subscription.ack(1)
        await subscription.resume(prefetch_count=2, timeout=5)
        await consumer.wait(3)
        await subject.wait_ready(connection, "q", 1)
        assert subscription.ack(2)
        await consumer.wait(4)
        assert consumer.bodies == [b"0", b"1", b"2", b"3"]
        assert not subscription.is_lost
        await subscription.aclose(timeout=5)
        await subscription.resume(prefetch_count=2, timeout=5)
        assert subscription.is_lost


@BOTH
async def test_a_prefetch_is_a_consumers(subject: Subject, arguments: dict[str, Any]) -> None:
    """What came before a cancel takes no room of what is asked for afterwards."""
    async with subject.connect() as connection:
        await start(connection, arguments, b"0")
        consumer = await subject.consume(connection, "q", prefetch_count=1)
        await consumer.wait(1)
        subscription = consumer.settled()
        await subscription.cancel(timeout=5)
        await subscription.resume(prefetch_count=1, timeout=5)
        await (await publisher(connection)).publish_bodies("q", b"1", b"2")
        await consumer.wait(2)
        await subject.wait_ready(connection, "q", 1)
        assert subscription.ack(1)
        await subject.wait_ready(connection, "q", 1)
        assert subscription.ack(2)
        await consumer.wait(3)
        assert consumer.bodies == [b"0", b"1", b"2"]


@BOTH
async def test_a_queue_can_be_deleted(subject: Subject, arguments: dict[str, Any]) -> None:
    """What is in it goes with it; to delete what is not there is no error."""
    async with subject.connect() as connection:
        await start(connection, arguments, b"0")
        for _ in range(2):
            await connection.delete_queue("q", timeout=TIMEOUT)
        with pytest.raises(TopologyError) as caught:
            await connection.count_messages("q", timeout=TIMEOUT)
        assert caught.value.code == 404


async def test_an_unused_queue_goes_by_itself(subject: Subject) -> None:
    """With x-expires, a queue goes when it had no consumer, and nobody looked, for so long."""
    lease = 4000  # milliseconds
    async with subject.connect() as connection:
        await start(connection, {"x-expires": lease}, queue="unused")
        await connection.count_messages("unused", timeout=TIMEOUT)
        await start(connection, {"x-expires": lease}, queue="used")
        consumer = await subject.consume(connection, "used")
        publishing = await publisher(connection)

        async def is_gone(queue: str) -> bool:
            # To look for it would be a use.
            return await publishing.publish(Message(b"x", queue)) is Confirm.RETURNED

        await subject.eventually(lambda: is_gone("unused"))
        assert not await is_gone("used")
        await consumer.settled().aclose(timeout=5)
        await subject.eventually(lambda: is_gone("used"))


@BOTH
async def test_a_lost_connection_returns_everything(
    subject: Subject, arguments: dict[str, Any]
) -> None:
    """When the connection is lost, what was unsettled is handed over again, in order."""
    async with subject.connect() as connection:
        await start(connection, arguments, b"0", b"1", b"2")
        consumer = await subject.consume(connection, "q")
        await consumer.wait(3)
        consumer.settled().ack(1)
        await wait_unacked_are(connection, consumer.settled())
        await subject.drop_connections()
        assert await consumer.settled().wait_lost()
        assert not consumer.settled().ack(2)
        assert not consumer.settled().requeue(3, counts=True)
        await consumer.settled().cancel(timeout=5)
        await connection.wait_connected()
        again = await subject.consume(connection, "q")
        assert [one.redelivered for one in await again.wait(2)] == [True, True]
        assert again.bodies == [b"1", b"2"]


async def wait_unacked_are(connection: Connection, subscription: Subscription) -> None:
    """Wait until the broker has read what was settled: it answers a later request."""
    await subscription.cancel(timeout=5)


@BOTH
async def test_a_deleted_queue_ends_its_consumers(
    subject: Subject, arguments: dict[str, Any]
) -> None:
    """A consumer whose queue is deleted is lost, and says so; the connection stays."""
    async with subject.connect() as connection:
        await start(connection, arguments, b"0")
        consumer = await subject.consume(connection, "q")
        await consumer.wait(1)
        await subject.delete_queue("q")
        assert "queue" in await consumer.settled().wait_lost()
        assert consumer.settled().is_lost
        assert not consumer.settled().ack(1)
        await consumer.settled().aclose(timeout=5)
        assert connection.is_connected
        with pytest.raises(TopologyError) as caught:
            await subject.consume(connection, "q")
        assert caught.value.code == 404


async def test_a_missing_queue_is_told(subject: Subject) -> None:
    """Counting, taking and consuming from a queue that does not exist are TopologyErrors."""
    async with subject.connect() as connection:
        getter = await connection.open_getter("missing", timeout=TIMEOUT)
        for call in (
            connection.count_messages("missing", timeout=TIMEOUT),
            getter.get(timeout=TIMEOUT),
            subject.consume(connection, "missing"),
        ):
            with pytest.raises(TopologyError) as caught:
                await call
            assert caught.value.code == 404
        await getter.aclose(timeout=5)


@BOTH
async def test_taking_one_by_one(subject: Subject, arguments: dict[str, Any]) -> None:
    """A getter takes what it asks for; what it did not ack is back when it is closed."""
    async with subject.connect() as connection:
        await start(connection, arguments, b"0", b"1", b"2")
        getter = await connection.open_getter("q", timeout=TIMEOUT)
        taken = [await getter.get(timeout=TIMEOUT) for _ in range(4)]
        assert taken[3] is None
        assert [one.message.body for one in taken if one] == [b"0", b"1", b"2"]
        assert taken[1] is not None
        await getter.ack(taken[1].tag, timeout=TIMEOUT)
        assert await connection.count_messages("q", timeout=TIMEOUT) == 0
        await getter.aclose(timeout=5)
        await getter.aclose(timeout=5)
        await subject.wait_ready(connection, "q", 2)
        assert [one.body for one in await subject.take_all(connection, "q", 2)] == [b"0", b"2"]
        with pytest.raises(ConnectionLostError):
            await getter.get(timeout=TIMEOUT)


@BOTH
async def test_what_was_taken_goes_back_in_its_order(
    subject: Subject, arguments: dict[str, Any]
) -> None:
    """However many they are, and however often."""
    bodies = [str(number).encode() for number in range(25)]
    async with subject.connect() as connection:
        await start(connection, arguments, *bodies)
        for _ in range(3):
            getter = await connection.open_getter("q", timeout=TIMEOUT)
            taken = [await getter.get(timeout=TIMEOUT) for _ in bodies]
            assert [one.message.body for one in taken if one] == bodies
            await getter.aclose(timeout=5)
            await subject.wait_ready(connection, "q", len(bodies))


async def publish_priorities(connection: Connection, *priorities: int | None) -> None:
    channel = await publisher(connection)
    for number, priority in enumerate(priorities):
        message = Message(f"{number}:{priority}".encode(), "q", priority=priority)
        assert await channel.publish(message) is Confirm.ACK


async def test_priorities_of_a_classic_queue(subject: Subject) -> None:
    """Higher priorities overtake, up to x-max-priority; no priority is the lowest one."""
    async with subject.connect() as connection:
        await declare(connection, "q", max_priority=5)
        await publish_priorities(connection, None, 0, 2, 5, 9, 1)
        bodies = [message.body for message in await subject.take_all(connection, "q", 6)]
        assert bodies == [b"3:5", b"4:9", b"2:2", b"5:1", b"0:None", b"1:0"]


async def test_priorities_of_a_quorum_queue(subject: Subject) -> None:
    """Ignored by 3.10; by 4.0 two turns of three for those from 5 on; by 4.3 strict."""
    async with subject.connect() as connection:
        await connection.declare([QueueDeclaration("q", QUORUM)], timeout=TIMEOUT)
        await publish_priorities(connection, None, 1, 5, 9, 6)
        bodies = [message.body for message in await subject.take_all(connection, "q", 5)]
    if subject.number < (4, 0):
        assert bodies == [b"0:None", b"1:1", b"2:5", b"3:9", b"4:6"]
    elif subject.number < (4, 3):
        assert bodies == [b"2:5", b"3:9", b"0:None", b"4:6", b"1:1"]
    else:
        assert bodies == [b"3:9", b"4:6", b"2:5", b"0:None", b"1:1"]


DEAD = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": "dead"}


@BOTH
async def test_what_expires_is_dead_lettered(subject: Subject, arguments: dict[str, Any]) -> None:
    """An expired message goes to the dead-letter exchange, and says what happened to it."""
    async with subject.connect() as connection:
        await declare(connection, "dead")
        await connection.declare([QueueDeclaration("q", arguments | DEAD)], timeout=TIMEOUT)
        channel = await publisher(connection)
        message = Message(b"x", "q", expiration=0.05, headers={"own": 1}, message_id="id")
        assert await channel.publish(message) is Confirm.ACK
        (dead,) = await subject.take_all(connection, "dead", 1)
        assert (dead.body, dead.message_id, dead.headers["own"]) == (b"x", "id", 1)
        assert (dead.exchange, dead.routing_key, dead.expiration) == ("", "dead", None)
        (death,) = dead.headers["x-death"]
        assert death.pop("time") is not None
        assert death == {
            "count": 1,
            "reason": "expired",
            "queue": "q",
            "exchange": "",
            "routing-keys": ["q"],
            "original-expiration": "50",
        }
        first = {"exchange": "", "queue": "q", "reason": "expired"}
        for which in ("first", "last") if subject.number >= (4, 0) else ("first",):
            assert {key: dead.headers[f"x-{which}-death-{key}"] for key in first} == first


@BOTH
async def test_messages_expire_at_the_head_only(
    subject: Subject, arguments: dict[str, Any]
) -> None:
    """A message behind one that lives longer is handed over late, or expires when it is first."""
    async with subject.connect() as connection:
        await declare(connection, "dead")
        await connection.declare([QueueDeclaration("q", arguments | DEAD)], timeout=TIMEOUT)
        channel = await publisher(connection)
        for body, expiration in ((b"long", 60), (b"short", 0.05), (b"also", 0.05)):
            await channel.publish(Message(body, "q", expiration=expiration))
        probe = Message(b"probe", "dead", expiration=0.3)
        await connection.declare([QueueDeclaration("probed", {})], timeout=TIMEOUT)
        await connection.declare(
            [
                QueueDeclaration(
                    "probe",
                    {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": "probed"},
                )
            ],
            timeout=TIMEOUT,
        )
        probe.routing_key = "probe"
        await channel.publish(probe)
        await subject.wait_ready(connection, "probed", 1)  # 0.3 s have passed on the broker's clock
        assert await connection.count_messages("q", timeout=TIMEOUT) == 3
        getter = await connection.open_getter("q", timeout=TIMEOUT)
        first = await getter.get(timeout=TIMEOUT)
        assert first is not None
        assert first.message.body == b"long"
        await subject.wait_ready(connection, "dead", 2)
        assert await getter.get(timeout=TIMEOUT) is None
        await getter.aclose(timeout=5)
        assert [one.body for one in await subject.take_all(connection, "dead", 2)] == [
            b"short",
            b"also",
        ]


async def test_a_time_to_live_leads_through_exchanges(subject: Subject) -> None:
    """x-message-ttl without a dead-letter routing key keeps the key, at least once too."""
    arguments = {
        "x-queue-type": "quorum",
        "x-message-ttl": 50,
        "x-dead-letter-exchange": "next",
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    }
    async with subject.connect() as connection:
        await connection.declare(
            [
                ExchangeDeclaration("next", "topic"),
                QueueDeclaration("waits", arguments),
                QueueDeclaration("q", {}),
                ExchangeDeclaration("first", "topic"),
                Binding("waits", "queue", source="first", routing_key="#"),
                Binding("q", "queue", source="next", routing_key="some.*"),
            ],
            timeout=TIMEOUT,
        )
        channel = await publisher(connection)
        message = Message(b"x", "", exchange="first", routing_key="some.key", expiration=60)
        assert await channel.publish(message) is Confirm.ACK
        (got,) = await subject.take_all(connection, "q", 1)
        assert (got.exchange, got.routing_key) == ("next", "some.key")


async def test_a_cycle_without_a_reject_is_dropped(subject: Subject) -> None:
    """A message that expiry would lead back to where it died is dropped."""
    itself = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": "q"}
    async with subject.connect() as connection:
        await connection.declare([QueueDeclaration("q", itself)], timeout=TIMEOUT)
        channel = await publisher(connection)
        await channel.publish(Message(b"x", "q", expiration=0.05))
        await subject.wait_ready(connection, "q", 0)


async def test_a_published_x_death_is_believed_before_4(subject: Subject) -> None:
    """Up to 3.13 a copy that carries x-death is dropped as a cycle; so it must be stripped."""
    claimed = {"x-death": [{"queue": "dead", "reason": "expired", "count": 1}]}
    async with subject.connect() as connection:
        await declare(connection, "dead")
        await connection.declare([QueueDeclaration("q", DEAD)], timeout=TIMEOUT)
        channel = await publisher(connection)
        await channel.publish(Message(b"claims", "q", expiration=0.05, headers=claimed))
        await channel.publish(Message(b"does not", "q", expiration=0.05))
        is_believed = subject.number < (4, 0)
        expected = [b"does not"] if is_believed else [b"claims", b"does not"]
        got = await subject.take_all(connection, "dead", len(expected))
        assert [message.body for message in got] == expected


async def test_deaths_are_counted_by_queue_and_reason(subject: Subject) -> None:
    """A second death adds to x-death; the first one stays first."""
    async with subject.connect() as connection:
        await connection.declare(
            [
                QueueDeclaration("end", {}),
                QueueDeclaration(
                    "two",
                    {
                        "x-message-ttl": 20,
                        "x-dead-letter-exchange": "",
                        "x-dead-letter-routing-key": "end",
                    },
                ),
                QueueDeclaration(
                    "one",
                    {
                        "x-message-ttl": 20,
                        "x-dead-letter-exchange": "",
                        "x-dead-letter-routing-key": "two",
                    },
                ),
            ],
            timeout=TIMEOUT,
        )
        await (await publisher(connection)).publish_bodies("one", b"x")
        (got,) = await subject.take_all(connection, "end", 1)
        deaths = got.headers["x-death"]
        assert [(death["queue"], death["count"]) for death in deaths] == [("two", 1), ("one", 1)]
        assert got.headers["x-first-death-queue"] == "one"


async def test_a_call_that_is_given_up_leaves_nothing_behind(subject: Subject) -> None:
    """A subscription whose caller is cancelled holds no messages."""
    async with subject.connect() as connection:
        await start(connection, QUORUM, b"x")
        for steps in range(6):
            call = asyncio.ensure_future(subject.consume(connection, "q"))
            for _ in range(steps):
                await asyncio.sleep(0)
            call.cancel()
            await asyncio.wait({call})
            if not call.cancelled():
                await call.result().settled().aclose(timeout=5)
            await subject.wait_ready(connection, "q", 1)
