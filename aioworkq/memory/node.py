"""The memory broker's exchanges and queues: declaring, publishing, dead-lettering.

Synchronous and without connections; what RabbitMQ answers with a closed channel is a `Refusal`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from msgspec import structs

from aioworkq.broker import Confirm
from aioworkq.memory.queue import MemoryQueue
from aioworkq.memory.routing import Bound, Exchange, route
from aioworkq.memory.stored import Reason, Stored, died, is_cycle
from aioworkq.topology import Binding, Declaration, ExchangeDeclaration, QueueDeclaration

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aioworkq.memory.clock import Clock
    from aioworkq.message import Message
    from aioworkq.versions import Semantics

_FOLLOWED: Final = frozenset(
    {
        "x-queue-type",
        "x-message-ttl",
        "x-expires",
        "x-dead-letter-exchange",
        "x-dead-letter-routing-key",
        "x-dead-letter-strategy",
        "x-overflow",
        "x-max-length",
        "x-delivery-limit",
        "x-max-priority",
    },
)
_WITHOUT_EFFECT: Final = frozenset(
    {
        "x-queue-mode",
        "x-queue-version",
        "x-queue-leader-locator",
        "x-queue-master-locator",
        "x-quorum-initial-group-size",
        "x-quorum-target-group-size",
        "x-max-in-memory-length",
        "x-max-in-memory-bytes",
    },
)
"""Arguments that say where messages are kept, which nobody can see from outside."""
_ONLY_QUORUM: Final = frozenset({"x-delivery-limit", "x-dead-letter-strategy"})
_ONLY_CLASSIC: Final = frozenset({"x-max-priority"})


class Refusal(Exception):  # noqa: N818 - an answer of the broker's, turned into an error by callers
    """What RabbitMQ closes a channel for.

    Attributes:
        code: AMQP's reply code.
        text: RabbitMQ's words.
        field: The argument that differs, for a declaration.
        theirs: What the broker has in its place.
    """

    def __init__(self, code: int, text: str, *, field: str = "", theirs: object = None) -> None:
        super().__init__(code, text)
        self.code = code
        self.text = text
        self.field = field
        self.theirs = theirs


class Published(NamedTuple):
    """What became of a publication."""

    confirm: Confirm
    reason: str


class Node:
    """Exchanges and queues of one virtual host.

    Args:
        semantics: The version's rules.
        clock: The broker's time.
    """

    def __init__(self, semantics: Semantics, clock: Clock) -> None:
        self._semantics = semantics
        self._clock = clock
        self.exchanges: dict[str, Exchange] = {}
        self.queues: dict[str, MemoryQueue] = {}

    # Topology

    def declare(self, declaration: Declaration) -> None:
        """Declare one thing.

        Raises:
            Refusal: It is there with other arguments, or what it refers to is not there.
        """
        match declaration:
            case QueueDeclaration(name=name, arguments=arguments):
                self._declare_queue(name, arguments)
            case ExchangeDeclaration(name=name, type=kind, arguments=arguments):
                known = self.exchanges.get(name)
                if known is None:
                    alternate = arguments.get("alternate-exchange")
                    self.exchanges[name] = Exchange(name, kind, alternate)
                elif known.type != kind:
                    raise _inequivalent("exchange", name, "type", kind, known.type)
            case Binding(destination, kind, source, key):
                if source not in self.exchanges:
                    raise _missing("exchange", source)
                there = self.queues if kind == "queue" else self.exchanges
                if destination not in there:
                    raise _missing(kind, destination)
                self.exchanges[source].bindings[Bound(kind, destination, key)] = None

    def _declare_queue(self, name: str, arguments: Mapping[str, Any]) -> None:
        known = self.queues.get(name)
        if known is None:
            _check_arguments(name, arguments)
            self.queues[name] = MemoryQueue(
                name,
                arguments,
                semantics=self._semantics,
                clock=self._clock,
                dead_letter=self._dead_letter,
                on_unused=partial(self.delete_queue, name),
            )
            return
        for field in sorted(_FOLLOWED):
            ours, theirs = arguments.get(field), known.arguments.get(field)
            if field == "x-queue-type":
                ours, theirs = ours or "classic", theirs or "classic"
            if ours != theirs:
                raise _inequivalent("queue", name, field, ours, theirs)
        known.renew()

    def look_for(self, name: str) -> MemoryQueue:
        """Return a queue.

        Raises:
            Refusal: There is none of that name.
        """
        queue = self.queues.get(name)
        if queue is None:
            raise _missing("queue", name)
        return queue

    def delete_queue(self, name: str) -> None:
        """Delete a queue with its messages, its bindings and its consumers.

        Raises:
            Refusal: There is none of that name.
        """
        queue = self.look_for(name)
        del self.queues[name]
        for exchange in self.exchanges.values():
            for bound in [one for one in exchange.bindings if one[:2] == ("queue", name)]:
                del exchange.bindings[bound]
        queue.delete()

    # Messages

    def publish(self, message: Message) -> Published:
        """Put a message into the queues that it is routed to.

        Raises:
            Refusal: Its exchange does not exist.
        """
        if not message.routing_key:
            message = structs.replace(message, routing_key=message.queue)
        queues = self._route(message.exchange, message.routing_key)
        if not queues:
            return Published(Confirm.RETURNED, "312 NO_ROUTE")
        is_refused = False
        for queue in queues:
            if queue.refuses():
                is_refused = True
            else:
                queue.add(message)
        if is_refused:
            return Published(Confirm.NACK, "RabbitMQ sent a negative confirm")
        return Published(Confirm.ACK, "")

    def _route(self, exchange: str, routing_key: str) -> list[MemoryQueue]:
        if not exchange:
            return [self.queues[routing_key]] if routing_key in self.queues else []
        first = self.exchanges.get(exchange)
        if first is None:
            raise _missing("exchange", exchange)
        return [self.queues[name] for name in route(self.exchanges, first, routing_key)]

    def _dead_letter(self, queue: MemoryQueue, stored: Stored, reason: Reason) -> bool:
        """Publish a dead letter, and say whether nothing more is to be done about it."""
        limits = queue.limits
        if limits.dead_letter_exchange is None:
            return True
        message = stored.message
        copy = structs.replace(
            message,
            exchange=limits.dead_letter_exchange,
            routing_key=limits.dead_letter_routing_key or message.routing_key,
            expiration=None,
        )
        deaths = died(stored, queue=queue.name, reason=reason, now=self._clock.now())
        try:
            routed = self._route(copy.exchange, copy.routing_key)
        except Refusal:
            routed = []
        targets = [one for one in routed if not is_cycle(one.name, deaths, reason)]
        if limits.at_least_once and (not routed or any(one.refuses() for one in targets)):
            return False
        for target in targets:
            if not target.refuses():
                target.add(copy, deaths)
        return True


def _missing(kind: str, name: str) -> Refusal:
    return Refusal(404, f"NOT_FOUND - no {kind} {name!r} in vhost '/'")


def _inequivalent(kind: str, name: str, field: str, ours: object, theirs: object) -> Refusal:
    return Refusal(
        406,
        f"PRECONDITION_FAILED - inequivalent arg {field!r} for {kind} {name!r} in vhost '/': "
        f"received {ours!r} but current is {theirs!r}",
        field=field,
        theirs=theirs,
    )


def _check_arguments(name: str, arguments: Mapping[str, Any]) -> None:
    kind = arguments.get("x-queue-type", "classic")
    if kind not in {"classic", "quorum"}:
        raise Refusal(406, f"the memory broker has no queues of type {kind!r}")
    wrong = (_ONLY_CLASSIC if kind == "quorum" else _ONLY_QUORUM) & arguments.keys()
    if wrong:
        raise Refusal(
            406,
            f"PRECONDITION_FAILED - invalid arg {min(wrong)!r} for queue {name!r} in vhost '/' of "
            f"queue type rabbit_{kind}_queue",
        )
    unknown = {key for key in arguments if key.startswith("x-")} - _FOLLOWED - _WITHOUT_EFFECT
    if unknown:
        raise Refusal(406, f"the memory broker does not follow the argument {min(unknown)!r}")
