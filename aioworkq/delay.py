"""Waiting in the broker: the delay queues, and the way of one message through them, as data.

The delay of a message is a binary number of eighths of a second. There is one quorum queue for each
of its 28 bits, in which everything waits equally long, ``2 ** level / 8`` seconds, so that what
came first expires first and a long delay never blocks a short one. Topic exchanges lead a message
through the queues of those bits that are 1, from the highest on, by its routing key: the 28 bits,
then the address of the destination. Dead-lettering from queue to queue is at-least-once.

The shape is NServiceBus's (https://docs.particular.net/transports/rabbitmq/delayed-delivery), with
its traps closed: see ``docs/explanation/delays.md``.
"""

from __future__ import annotations

import math
from datetime import datetime
from typing import Final

from msgspec import Struct

from aioworkq.errors import check_number
from aioworkq.topology import Binding, Declaration, ExchangeDeclaration, QueueDeclaration

_PREFIX: Final = "aioworkq.v1"
"""Names carry a version: arguments of queues cannot be changed once they exist."""
DELIVERY_EXCHANGE: Final = f"{_PREFIX}.delivery"
UNROUTABLE: Final = f"{_PREFIX}.unroutable"
"""The exchange and queue that take what waited for a queue that has been deleted since."""

_LEVELS: Final = 28
_UNITS_PER_SECOND: Final = 8
_MAX_BITS: Final = 5
_MAX_ADDRESS_BYTES: Final = 255 - 2 * _LEVELS

_AT_LEAST_ONCE: Final = {
    "x-queue-type": "quorum",
    "x-dead-letter-strategy": "at-least-once",
    "x-overflow": "reject-publish",
}

MAX_DELAY: Final = 365 * 24 * 3600.0
"""The longest delay in seconds: a year."""


class Route(Struct, frozen=True):
    """The way of one message: where it enters, and by which key it finds its way.

    Attributes:
        exchange: The exchange to publish to, that of the highest bit.
        routing_key: The bits and the address, at most 255 bytes.
        level: The highest bit.
        hops: How many queues it waits in.
    """

    exchange: str
    routing_key: str
    level: int
    hops: int


def checked_delay(delay: float | None, at: datetime | None, *, now: datetime) -> float:
    """Return the seconds that a message shall wait; 0 for none.

    Raises:
        ValueError: Both are given; the delay is negative or longer than a year; the time is naive.
        TypeError: The time is no datetime.
    """
    if delay is not None and at is not None:
        raise ValueError("delay and at are both given: give one of them.")
    if at is not None:
        if not isinstance(at, datetime):
            raise TypeError(f"at is {at!r}: it must be an aware datetime.")
        if at.tzinfo is None or at.utcoffset() is None:
            raise ValueError(
                f"at is {at!r}, without a time zone: give an aware datetime, "
                "such as datetime.now(UTC) + timedelta(hours=1).",
            )
        delay = max(0.0, (at - now).total_seconds())
    if delay is None:
        return 0.0
    check_number("delay", delay)
    if not 0 <= delay <= MAX_DELAY:
        raise ValueError(
            f"the delay is {delay} seconds: it must be from 0 to a year, {MAX_DELAY:g}."
        )
    return delay


def units(delay: float) -> int:
    """Return a delay in eighths of a second, rounded up to at most five bits that are 1.

    The rounding bounds the queues that a message goes through. It adds less than one part in 16.
    """
    number = math.ceil(delay * _UNITS_PER_SECOND)
    while number.bit_count() > _MAX_BITS:
        number += number & -number  # carries the lowest 1 upwards, and never makes more of them
    return number


def route(queue: str, delay: float) -> Route:
    """Return the way to a queue for a delay of more than 0 seconds."""
    number = units(delay)
    level = number.bit_length() - 1
    bits = ".".join(f"{number:0{_LEVELS}b}")
    return Route(
        exchange=_level_name(level),
        routing_key=f"{bits}.{address(queue)}",
        level=level,
        hops=number.bit_count(),
    )


def address(queue: str) -> str:
    """Return a queue's address: its name, or a hash where the name cannot be part of a key."""
    is_long = len(queue.encode()) > _MAX_ADDRESS_BYTES
    has_wildcard = any(word in {"*", "#"} for word in queue.split("."))
    if is_long or has_wildcard:
        import hashlib  # noqa: PLC0415 - takes a millisecond to load, and is seldom needed

        return "sha256-" + hashlib.sha256(queue.encode()).hexdigest()
    return queue


def level_declarations(level: int) -> list[Declaration]:
    """Return what has to exist for delays whose highest bit is this one, or a lower one."""
    declarations: list[Declaration] = [
        ExchangeDeclaration(UNROUTABLE, "fanout"),
        QueueDeclaration(UNROUTABLE, {"x-queue-type": "quorum", "x-delivery-limit": 2**31 - 1}),
        Binding(UNROUTABLE, "queue", source=UNROUTABLE, routing_key=""),
        # Without the alternate exchange one deleted destination would jam a level for all: the
        # broker keeps trying to dead-letter what it cannot route.
        ExchangeDeclaration(DELIVERY_EXCHANGE, "topic", {"alternate-exchange": UNROUTABLE}),
    ]
    for number in range(level + 1):
        name = _level_name(number)
        below = _level_name(number - 1) if number else DELIVERY_EXCHANGE
        skip = "*." * (_LEVELS - 1 - number)
        declarations += [
            ExchangeDeclaration(name, "topic"),
            QueueDeclaration(
                name,
                {
                    **_AT_LEAST_ONCE,
                    "x-message-ttl": 1000 * 2**number // _UNITS_PER_SECOND,
                    "x-dead-letter-exchange": below,
                },
            ),
            Binding(name, "queue", source=name, routing_key=f"{skip}1.#"),
            Binding(below, "exchange", source=name, routing_key=f"{skip}0.#"),
        ]
    return declarations


def arrival(queue: str) -> str:
    """Return the name of the queue in which what has waited arrives, if its own may be full."""
    return f"{_PREFIX}.arrival.{address(queue)}"


def destination_declarations(queue: str, *, may_refuse: bool) -> list[Declaration]:
    """Return what brings a queue what has waited for it.

    What a queue refuses is tried again by the queue it expired in, which holds up all that expires
    there. So what is meant for a queue that may refuse goes on from a queue of its own.

    Args:
        queue: The destination.
        may_refuse: Whether it may: see `topology.refuses_when_full`.
    """
    declarations: list[Declaration] = [destination_binding(queue)]
    if may_refuse:
        name = arrival(queue)
        arguments = {
            **_AT_LEAST_ONCE,
            "x-message-ttl": 0,
            "x-dead-letter-exchange": DELIVERY_EXCHANGE,
            "x-dead-letter-routing-key": "0." * _LEVELS + address(queue),
        }
        declarations += [QueueDeclaration(name, arguments), destination_binding(name)]
    return declarations


def destination_binding(queue: str) -> Binding:
    """Return the binding that brings a queue what has waited for it.

    Exactly as many wildcards as there are bits: with ``#`` in their place, ``orders`` would receive
    the messages of ``eu.orders`` too.
    """
    key = "*." * _LEVELS + address(queue)
    return Binding(queue, "queue", source=DELIVERY_EXCHANGE, routing_key=key)


def _level_name(level: int) -> str:
    return f"{_PREFIX}.delay.{level:02}"
