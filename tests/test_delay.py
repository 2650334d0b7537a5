"""The way of a delayed message, on a model of topic exchanges."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aioworkq.delay import (
    DELIVERY_EXCHANGE,
    MAX_DELAY,
    UNROUTABLE,
    address,
    arrival,
    checked_delay,
    destination_declarations,
    level_declarations,
    route,
    units,
)
from aioworkq.topology import Binding, QueueDeclaration

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def matches(pattern: list[str], key: list[str]) -> bool:
    """AMQP's topic match: * is one word, # any number of them."""
    if not pattern:
        return not key
    if pattern[0] == "#":
        return any(matches(pattern[1:], key[skip:]) for skip in range(len(key) + 1))
    return bool(key) and pattern[0] in {"*", key[0]} and matches(pattern[1:], key[1:])


class Broker:
    """As much of RabbitMQ as the delay queues use: topic routing, and dead-lettering by TTL."""

    def __init__(self, destinations: list[str], *, may_refuse: bool = False) -> None:
        declarations = level_declarations(27)
        for queue in destinations:
            declarations += destination_declarations(queue, may_refuse=may_refuse)
        self.bindings = [one for one in declarations if isinstance(one, Binding)]
        self.queues = {one.name: one for one in declarations if isinstance(one, QueueDeclaration)}

    def route(self, exchange: str, key: str) -> set[str]:
        if exchange == UNROUTABLE:
            return {UNROUTABLE}
        found: set[str] = set()
        words = key.split(".")
        for binding in self.bindings:
            if binding.source == exchange and matches(binding.routing_key.split("."), words):
                if binding.destination_kind == "queue":
                    found.add(binding.destination)
                else:
                    found |= self.route(binding.destination, key)
        if not found and exchange == DELIVERY_EXCHANGE:
            return {UNROUTABLE}
        return found

    def travel(self, exchange: str, key: str) -> tuple[set[str], list[int]]:
        """Follow a message to where it ends; return that, and the milliseconds it waited."""
        waited: list[int] = []
        while True:
            queues = self.route(exchange, key)
            levels = [queue for queue in queues if queue in self.queues and queue != UNROUTABLE]
            if not levels:
                return queues, waited
            assert len(queues) == 1
            arguments = self.queues[levels[0]].arguments
            waited.append(arguments["x-message-ttl"])
            exchange = arguments["x-dead-letter-exchange"]
            key = arguments.get("x-dead-letter-routing-key", key)


QUEUES = ["orders", "eu.orders", "*.orders", "q" * 190, "q" * 250]
BROKER = Broker(QUEUES)
FULL = Broker(QUEUES, may_refuse=True)


@given(st.floats(0.001, MAX_DELAY))
@settings(deadline=None)
def test_the_times_in_the_queues_add_up_to_the_delay(delay: float) -> None:
    """Never early, at most five queues, and never more than one part in 16 or an eighth late."""
    way = route("orders", delay)
    queues, waited = BROKER.travel(way.exchange, way.routing_key)
    assert queues == {"orders"}
    assert len(waited) == way.hops <= 5
    assert len(set(waited)) == len(waited)
    total = sum(waited) / 1000
    assert delay <= total <= delay * (1 + 1 / 16) + 0.125


@pytest.mark.parametrize("queue", QUEUES)
def test_a_message_reaches_its_own_queue_and_no_other(queue: str) -> None:
    """Dotted names, names with wildcards and long names included."""
    way = route(queue, 10)
    assert len(way.routing_key.encode()) <= 255
    assert BROKER.travel(way.exchange, way.routing_key)[0] == {queue}


@pytest.mark.parametrize("queue", QUEUES)
def test_a_queue_that_may_refuse_is_reached_by_way_of_one_of_its_own(queue: str) -> None:
    """By that way only; who does not know that it may refuse reaches it as any other, once."""
    way = route(arrival(queue), 10)
    assert len(arrival(queue).encode()) <= 255
    assert len(way.routing_key.encode()) <= 255
    where, waited = FULL.travel(way.exchange, way.routing_key)
    assert where == {queue}
    assert waited == [8000, 2000, 0]
    direct = route(queue, 10)
    assert FULL.travel(direct.exchange, direct.routing_key) == ({queue}, [8000, 2000])
    deleted = Broker([queue], may_refuse=True)
    deleted.bindings = [one for one in deleted.bindings if one.destination != queue]
    assert deleted.travel(way.exchange, way.routing_key)[0] == {UNROUTABLE}


def test_a_message_for_a_queue_that_is_gone_is_kept() -> None:
    """The alternate exchange takes it, so that it can be found and jams nobody."""
    way = route("deleted", 10)
    assert BROKER.travel(way.exchange, way.routing_key)[0] == {UNROUTABLE}


@pytest.mark.parametrize("seconds", [0.125, 0.25, 0.5, 1, 2, 4, 8, 3600 / 3600, 2.0**20])
def test_powers_of_two_wait_in_one_queue(seconds: float) -> None:
    """So the default backoff costs one hop."""
    assert route("orders", seconds).hops == 1


def test_only_the_levels_up_to_the_highest_bit_are_declared() -> None:
    """A short delay declares few queues."""
    names = {one.name for one in level_declarations(3) if isinstance(one, QueueDeclaration)}
    assert names == {UNROUTABLE, *(f"aioworkq.v1.delay.{level:02}" for level in range(4))}


def test_units_round_up_and_never_down() -> None:
    """The rounding bounds the bits."""
    assert units(0.001) == 1
    assert units(1.0) == 8
    assert units(0b111111 / 8) == 0b1000000
    assert all(units(number / 8) >= number for number in range(1, 5000))


def test_a_long_name_or_one_with_wildcards_becomes_a_hash() -> None:
    """Other names stay readable in the routing key."""
    assert address("eu.orders") == "eu.orders"
    assert address("a" * 199) == "a" * 199
    assert address("a" * 200).startswith("sha256-")
    assert address("a.#").startswith("sha256-")
    assert address("a#") == "a#"


def test_a_delay_is_checked() -> None:
    """Negative, absurd, naive or doubled delays are refused; a time that has passed means now."""
    assert checked_delay(None, None, now=NOW) == 0
    assert checked_delay(1.5, None, now=NOW) == 1.5
    assert checked_delay(None, NOW + timedelta(hours=1), now=NOW) == 3600
    assert checked_delay(None, NOW - timedelta(hours=1), now=NOW) == 0
    for delay in (-1, float("nan"), float("inf"), MAX_DELAY + 1):
        with pytest.raises(ValueError, match="must be from 0 to a year"):
            checked_delay(delay, None, now=NOW)
    with pytest.raises(ValueError, match="without a time zone"):
        checked_delay(None, datetime(2026, 1, 1), now=NOW)  # noqa: DTZ001 - that is the point
    with pytest.raises(TypeError, match="at is 'noon': it must be an aware datetime"):
        checked_delay(None, "noon", now=NOW)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="both given"):
        checked_delay(1, NOW, now=NOW)
