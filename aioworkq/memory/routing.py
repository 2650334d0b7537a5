"""Exchanges and bindings: which queues a routing key leads to. Pure functions and data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class Bound(NamedTuple):
    """One binding of an exchange: where it leads, and for which keys."""

    kind: Literal["queue", "exchange"]
    destination: str
    routing_key: str


@dataclass(slots=True)
class Exchange:
    """An exchange with its bindings, in the order they were made."""

    name: str
    type: Literal["topic", "fanout"]
    alternate: str | None = None
    bindings: dict[Bound, None] = field(default_factory=dict[Bound, None])

    def matching(self, routing_key: str) -> Iterable[Bound]:
        """Return the bindings that a key matches."""
        if self.type == "fanout":
            return list(self.bindings)
        words = routing_key.split(".")
        return [
            bound for bound in self.bindings if matches_topic(bound.routing_key.split("."), words)
        ]


def matches_topic(pattern: list[str], words: list[str]) -> bool:
    """Say whether a topic exchange matches: ``*`` is one word, ``#`` any number of them.

    (https://www.rabbitmq.com/tutorials/amqp-concepts#exchange-topic)
    """
    for position, part in enumerate(pattern):
        if part == "#":
            rest = pattern[position + 1 :]
            ends = range(position, len(words) + 1)
            return any(matches_topic(rest, words[end:]) for end in ends)
        if position == len(words) or part not in {"*", words[position]}:
            return False
    return len(pattern) == len(words)


def route(exchanges: Mapping[str, Exchange], first: Exchange, routing_key: str) -> list[str]:
    """Return the names of the queues that a message reaches, each once, in the order of bindings.

    An exchange that leads nowhere hands over to its alternate exchange, if that exists.
    (https://www.rabbitmq.com/docs/ae)
    """
    queues: dict[str, None] = {}
    seen = {first.name}
    pending = [first]
    while pending:
        exchange = pending.pop(0)
        found = list(exchange.matching(routing_key))
        if not found and exchange.alternate is not None:
            found = [Bound("exchange", exchange.alternate, "")]
        for bound in found:
            if bound.kind == "queue":
                queues[bound.destination] = None
            elif bound.destination not in seen and bound.destination in exchanges:
                seen.add(bound.destination)
                pending.append(exchanges[bound.destination])
    return list(queues)
