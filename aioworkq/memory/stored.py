"""A message inside a queue of the memory broker, and how RabbitMQ changes it on its way.

Pure functions: what the wire does to a message, what a dead letter says of its deaths, what a
delivery says of its earlier ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

from msgspec import structs

from aioworkq.amqp.wire import expiration_ms

if TYPE_CHECKING:
    from aioworkq.message import Message
    from aioworkq.versions import Semantics

Death: TypeAlias = dict[str, Any]
Reason: TypeAlias = Literal["rejected", "expired", "maxlen", "delivery_limit"]


@dataclass(slots=True, eq=False)
class Stored:
    """One message in one queue.

    Attributes:
        message: The message as it was published; never changed.
        sequence: Its place in the queue.
        expires_at: When it expires, in seconds since the epoch; None for never.
        deaths: What dead-lettered it so far, the latest first.
        delivery_count: How often it came back and that counted as a failure.
        acquired_count: How often it came back.
    """

    message: Message
    sequence: int
    expires_at: float | None = None
    deaths: list[Death] = field(default_factory=list[Death])
    delivery_count: int = 0
    acquired_count: int = 0


def over_the_wire(message: Message) -> Message:
    """Return a message as a consumer would get it: AMQP rounds times, and knows no tuples."""
    expiration = message.expiration
    return structs.replace(
        message,
        body=bytes(message.body),
        headers=_table(message.headers),
        timestamp=_time(message.timestamp) if message.timestamp is not None else None,
        expiration=int(expiration_ms(expiration)) / 1000 if expiration is not None else None,
    )


def _table(headers: dict[str, Any]) -> dict[str, Any]:
    return {name: _field(value) for name, value in headers.items()}


def _field(value: Any) -> Any:
    match value:
        case datetime():
            return _time(value)
        case bytes() | bytearray():
            return bytearray(value)
        case dict():
            return _table(cast("dict[str, Any]", value))
        case list() | tuple():
            return [_field(item) for item in cast("list[Any]", value)]
        case _:
            return value


def _time(value: datetime) -> datetime:
    return datetime.fromtimestamp(max(0, int(value.timestamp())), UTC)


def delivered(stored: Stored, *, queue: str, semantics: Semantics, is_quorum: bool) -> Message:
    """Return what a consumer of this queue gets: a copy with the broker's headers."""
    message = stored.message
    headers = _table(message.headers)
    if stored.deaths:
        headers |= _death_headers(stored.deaths, semantics)
    if is_quorum:
        # 4.3 calls failures x-delivery-count; before, every return is one.
        if stored.delivery_count or semantics.has_zero_count:
            headers["x-delivery-count"] = stored.delivery_count
        if stored.acquired_count and semantics.has_acquired_count:
            headers["x-acquired-count"] = stored.acquired_count
    return structs.replace(message, queue=queue, headers=headers)


def _death_headers(deaths: list[Death], semantics: Semantics) -> dict[str, Any]:
    headers: dict[str, Any] = {"x-death": _field(deaths)}
    ends = {"first": deaths[-1]}
    if semantics.has_last_death:
        ends["last"] = deaths[0]
    for which, death in ends.items():
        for key in ("exchange", "queue", "reason"):
            headers[f"x-{which}-death-{key}"] = death.get(key, "")
    return headers


def deaths_of(message: Message, semantics: Semantics) -> list[Death]:
    """Return what a client's message claims of its deaths, as far as the version believes it."""
    claimed = message.headers.get("x-death")
    if not semantics.believes_x_death or not isinstance(claimed, list):
        return []
    deaths: list[Any] = claimed
    return [death for death in deaths if isinstance(death, dict)]


def died(stored: Stored, *, queue: str, reason: Reason, now: datetime) -> list[Death]:
    """Return the deaths of a message after one more.

    One entry for each pair of queue and reason, the latest first.
    (https://www.rabbitmq.com/docs/dlx#effects)
    """
    message = stored.message
    others = [
        one for one in stored.deaths if (one.get("queue"), one.get("reason")) != (queue, reason)
    ]
    known = [one for one in stored.deaths if one not in others]
    if known:
        count = known[0].get("count", 0)
        return [{**known[0], "count": count + 1 if isinstance(count, int) else 1}, *others]
    death: Death = {
        "count": 1,
        "reason": reason,
        "queue": queue,
        "time": now.replace(microsecond=0),
        "exchange": message.exchange,
        "routing-keys": [message.routing_key],
    }
    if message.expiration is not None:
        death["original-expiration"] = expiration_ms(message.expiration)
    return [death, *others]


def is_cycle(queue: str, deaths: list[Death], reason: Reason) -> bool:
    """Say whether a dead letter would come to a queue again without anybody having rejected it.

    RabbitMQ drops it then. (``rabbit_dead_letter:detect_cycles``)
    """
    if reason == "rejected":
        return False
    for position, death in enumerate(deaths):
        if death.get("queue") == queue:
            return all(one.get("reason") != "rejected" for one in deaths[: position + 1])
    return False
