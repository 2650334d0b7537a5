"""A queue's arguments, read; and the ways in which a message comes back to it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aioworkq.versions import Semantics


class Return(Enum):
    """How a message came back."""

    REJECT = "reject"
    NACK = "nack"
    LOST = "lost"
    """The channel that had it has ended."""


@dataclass(frozen=True, slots=True)
class Limits:
    """A queue's arguments, read."""

    is_quorum: bool
    ttl: float | None
    expires: float | None
    dead_letter_exchange: str | None
    dead_letter_routing_key: str | None
    at_least_once: bool
    rejects_publish: bool
    max_length: int | None
    delivery_limit: int | None
    max_priority: int


def limits_of(arguments: Mapping[str, Any], semantics: Semantics) -> Limits:
    """Read the arguments of a declaration."""
    ttl_ms, expires_ms = arguments.get("x-message-ttl"), arguments.get("x-expires")
    exchange = arguments.get("x-dead-letter-exchange")
    rejects = arguments.get("x-overflow") == "reject-publish"
    strategy = arguments.get("x-dead-letter-strategy", "at-most-once")
    is_quorum = arguments.get("x-queue-type") == "quorum"
    return Limits(
        is_quorum=is_quorum,
        ttl=None if ttl_ms is None else ttl_ms / 1000,
        expires=None if expires_ms is None else expires_ms / 1000,
        dead_letter_exchange=exchange,
        dead_letter_routing_key=arguments.get("x-dead-letter-routing-key"),
        # Without the other two, RabbitMQ falls back to at-most-once and logs it.
        at_least_once=(
            is_quorum and strategy == "at-least-once" and rejects and exchange is not None
        ),
        rejects_publish=rejects,
        max_length=arguments.get("x-max-length"),
        delivery_limit=arguments.get("x-delivery-limit", semantics.delivery_limit),
        max_priority=arguments.get("x-max-priority", 0),
    )
