"""Queues, their dead-letter queues, and what has to be declared for them, as data.

Nothing here talks to a broker: ``declarations`` returns the plan, the door carries it out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, TypeAlias, TypeVar, overload

from msgspec import Struct

from aioworkq.errors import is_whole

if TYPE_CHECKING:
    import builtins
    from collections.abc import Mapping

T = TypeVar("T")

QueueType: TypeAlias = Literal["quorum", "classic"]

_MAX_NAME_BYTES: Final = 255
_DEAD_SUFFIX: Final = ".dead"
_MAX_PRIORITY: Final = 255

# Quorum queues of RabbitMQ 4 drop or dead-letter a message after 20 returns unless told otherwise.
# Attempts are bounded by our workers, per handler and with a reason; the broker's own limit must
# never get there first. It cannot be switched off in a way that 3.10 knows, so it is out of reach.
_NO_DELIVERY_LIMIT: Final = 2**31 - 1


@dataclass(frozen=True, init=False, eq=True)
class Queue(Generic[T]):
    """A queue and the type of the bodies in it: the contract that both sides share.

    ``Queue("emails", Email)`` is a ``Queue[Email]``: ``publish`` and ``handler`` are checked
    against it by type checkers, and bodies are checked at run time. A bare string in place of a
    queue is short for ``Queue(name)``, whose bodies are whatever their content type says.

    A queue that does not exist is declared, durable; one that exists already is used as it is.

    Attributes:
        name: At most 250 bytes of UTF-8 (the dead-letter queue's name must fit into AMQP's 255).
        body_type: dataclass, TypedDict, msgspec Struct, attrs class, pydantic model, a union of
            them, a builtin, or ``Any``. ``bytes`` bodies are left untouched; ``str`` bodies are
            plain UTF-8 text.
        type: What a queue that we create is. ``"quorum"`` replicates in a cluster and counts
            deliveries across crashes; ``"classic"`` is what
            ``queue_declare(queue, durable=True)`` of other clients makes.
        declare: False for a queue that operators own: nothing is declared, it is only checked.
        max_priority: Messages of a higher priority overtake, 1 to 255; classic queues only.
        max_length: With so many messages waiting, further ones are refused
            (`NotConfirmedError`); at least 1.
        arguments: Further arguments of the declaration, as RabbitMQ names them.
    """

    name: str
    body_type: Any
    type: QueueType
    declare: bool
    max_priority: int | None
    max_length: int | None
    arguments: Mapping[str, Any] = field(hash=False)

    @overload
    def __init__(
        self: Queue[Any],
        name: str,
        *,
        type: QueueType = ...,
        declare: bool = ...,
        max_priority: int | None = ...,
        max_length: int | None = ...,
        arguments: Mapping[str, Any] | None = ...,
    ) -> None: ...

    @overload
    def __init__(
        self,
        name: str,
        body_type: builtins.type[T],
        *,
        type: QueueType = ...,
        declare: bool = ...,
        max_priority: int | None = ...,
        max_length: int | None = ...,
        arguments: Mapping[str, Any] | None = ...,
    ) -> None: ...

    @overload
    def __init__(
        self: Queue[Any],
        name: str,
        body_type: Any,
        *,
        type: QueueType = ...,
        declare: bool = ...,
        max_priority: int | None = ...,
        max_length: int | None = ...,
        arguments: Mapping[str, Any] | None = ...,
    ) -> None: ...

    def __init__(
        self,
        name: str,
        body_type: Any = Any,
        *,
        type: QueueType = "quorum",  # noqa: A002 - RabbitMQ's word, keyword-only
        declare: bool = True,
        max_priority: int | None = None,
        max_length: int | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        _check_name(name)
        if type not in {"quorum", "classic"}:
            raise ValueError(f"type is {type!r}: a queue is 'quorum' or 'classic'.")
        if max_priority is not None:
            if type == "quorum":
                raise ValueError(
                    "max_priority is for classic queues: a quorum queue takes none. "
                    "Use type='classic', or leave it out.",
                )
            if not is_whole(max_priority) or not 1 <= max_priority <= _MAX_PRIORITY:
                raise ValueError(
                    f"max_priority is {max_priority!r}: it must be a whole number from 1 to 255.",
                )
        if max_length is not None and not (is_whole(max_length) and 1 <= max_length < 2**63):
            raise ValueError(f"max_length is {max_length!r}: it must be a whole number from 1.")
        for attribute, value in (
            ("name", name),
            ("body_type", body_type),
            ("type", type),
            ("declare", declare),
            ("max_priority", max_priority),
            ("max_length", max_length),
            ("arguments", MappingProxyType(dict(arguments or {}))),
        ):
            object.__setattr__(self, attribute, value)

    @property
    def dead_letter_queue(self) -> str:
        """The name of the queue that messages go to which are given up: ``<name>.dead``."""
        return self.name + _DEAD_SUFFIX


class QueueDeclaration(Struct, frozen=True):
    """One durable queue to declare, or only to look for.

    Attributes:
        name: The queue's name.
        arguments: The arguments for the case that it must be created.
        if_missing: Whether to create it, to fail, or only to warn about it.
    """

    name: str
    arguments: Mapping[str, Any]
    if_missing: Literal["create", "fail", "warn"] = "create"


class ExchangeDeclaration(Struct, frozen=True):
    """One durable exchange to declare."""

    name: str
    type: Literal["topic", "fanout"]
    arguments: Mapping[str, Any] = {}


class Binding(Struct, frozen=True):
    """One binding to declare, of a queue or an exchange to an exchange."""

    destination: str
    destination_kind: Literal["queue", "exchange"]
    source: str
    routing_key: str


Declaration: TypeAlias = QueueDeclaration | ExchangeDeclaration | Binding


def declarations(queue: Queue[Any]) -> tuple[QueueDeclaration, ...]:
    """Return what has to exist before a queue can be used, in the order to declare it.

    A classic queue is declared without any argument of ours, so that another client's plain
    ``queue_declare(queue, durable=True)`` agrees with it. A quorum queue hands what the broker
    itself drops (expired messages) to the dead-letter queue, at least once.
    (https://www.rabbitmq.com/docs/quorum-queues#dead-lettering)
    """
    return (
        QueueDeclaration(
            queue.dead_letter_queue,
            _dead_letter_arguments(queue),
            "create" if queue.declare else "warn",
        ),
        QueueDeclaration(queue.name, _arguments(queue), "create" if queue.declare else "fail"),
    )


def _arguments(queue: Queue[Any]) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    if queue.type == "quorum":
        arguments |= {
            "x-queue-type": "quorum",
            "x-delivery-limit": _NO_DELIVERY_LIMIT,
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": queue.dead_letter_queue,
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",
        }
    if queue.max_priority is not None:
        arguments["x-max-priority"] = queue.max_priority
    if queue.max_length is not None:
        arguments |= {"x-max-length": queue.max_length, "x-overflow": "reject-publish"}
    return arguments | dict(queue.arguments)


def refuses_when_full(queue: Queue[Any]) -> bool:
    """Say whether a queue has a length, as far as we know, and refuses what is beyond it."""
    if queue.max_length is None and not queue.arguments:
        return False
    arguments = _arguments(queue)
    is_bounded = not arguments.keys().isdisjoint({"x-max-length", "x-max-length-bytes"})
    return is_bounded and str(arguments.get("x-overflow", "")).startswith("reject-publish")


def _dead_letter_arguments(queue: Queue[Any]) -> dict[str, Any]:
    if queue.type == "quorum":
        return {"x-queue-type": "quorum", "x-delivery-limit": _NO_DELIVERY_LIMIT}
    return {}


def as_queue(queue: Queue[T] | str) -> Queue[T]:
    """Return the queue that a bare name is short for.

    Raises:
        TypeError: It is neither a `Queue` nor a name.
        ValueError: The name cannot be a queue's.
    """
    if isinstance(queue, Queue):
        return queue
    return Queue(queue)


def _check_name(name: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f"a queue is given by its name or as a Queue, not by {name!r}.")
    if not name:
        raise ValueError("a queue's name is empty: give it one.")
    try:
        size = len(name.encode())
    except UnicodeEncodeError as exc:
        raise ValueError(f"queue name {name!r} is not valid Unicode text.") from exc
    limit = _MAX_NAME_BYTES - len(_DEAD_SUFFIX)
    if size > limit:
        raise ValueError(
            f"queue name {name[:40]!r}… has {size} bytes: it may have {limit}, "
            f"AMQP's 255 less the {_DEAD_SUFFIX!r} of its dead-letter queue.",
        )
    if "\r" in name or "\n" in name:
        raise ValueError(f"queue name {name!r} has a line break, which RabbitMQ leaves out.")
    if name.startswith("amq."):
        raise ValueError(f"queue name {name!r} starts with 'amq.', which RabbitMQ keeps to itself.")
