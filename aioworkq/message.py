"""What a message is, what a delivery of it is, and which attempt it makes.

Here live the message and its AMQP properties as plain data, our own headers, and the arithmetic of
attempts. How a message is encoded on the wire is the door's business (``amqp/``); what becomes of
a delivery is decided in ``outcome.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Self

from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

# Our own headers. They travel in the copies that we publish.
ATTEMPTS: Final = "x-aioworkq-attempts"
"""How many attempts were used up before this copy was published (int)."""
COPIES: Final = "x-aioworkq-copies"
"""The how-manieth copy of the published message this is (int)."""
QUEUE: Final = "x-aioworkq-queue"
"""On a dead letter: the queue it came from (str)."""
REASON: Final = "x-aioworkq-reason"
"""On a dead letter: why it is one (str)."""
EXCEPTION_TYPE: Final = "x-aioworkq-exception-type"
"""On a dead letter: the last exception's qualified class name (str)."""
EXCEPTION_MESSAGE: Final = "x-aioworkq-exception-message"
"""On a dead letter: the last exception's text, at most 2,000 characters (str)."""
TRACEBACK: Final = "x-aioworkq-traceback"
"""On a dead letter: the end of the last exception's traceback, at most 8,000 characters (str)."""
FIRST_FAILURE: Final = "x-aioworkq-first-failure"
"""When an attempt failed for the first time, as far as is known (UTC timestamp)."""
LAST_FAILURE: Final = "x-aioworkq-last-failure"
"""When the last attempt failed (UTC timestamp)."""

TRIAL: Final = "x-aioworkq-trial"
"""On a copy that has one attempt left after its process died: its trial's number (str)."""

CRASHED: Final = "crashed"
"""The reason of a message whose process ended in the middle of its last attempt."""

OUR_HEADERS: Final = frozenset(
    {
        ATTEMPTS,
        COPIES,
        TRIAL,
        QUEUE,
        REASON,
        EXCEPTION_TYPE,
        EXCEPTION_MESSAGE,
        TRACEBACK,
        FIRST_FAILURE,
        LAST_FAILURE,
    },
)

# The broker's own. A copy must not carry them: RabbitMQ before 4.0 believes a client's x-death
# and drops what looks like a dead-letter cycle, and a delivery count belongs to one stay in a
# queue, not to the message.
_BROKER_HEADERS: Final = frozenset(
    {
        "x-death",
        "x-delivery-count",
        "x-acquired-count",
        "x-first-death-exchange",
        "x-first-death-queue",
        "x-first-death-reason",
        "x-last-death-exchange",
        "x-last-death-queue",
        "x-last-death-reason",
        # What routes a message past its queue, once more for each copy.
        "CC",
        "BCC",
    },
)
_NOT_PUBLISHED: Final = _BROKER_HEADERS | OUR_HEADERS

_COUNTS: Final = frozenset({"x-delivery-count", "x-acquired-count"})
_MAX_COUNT: Final = 2**31
"""Nothing is counted further: what another client wrote must have room for more."""
MANY_RETURNS: Final = 10
"""Half of what RabbitMQ 4 bears in a quorum queue that was declared without a limit."""
_MAX_EXCEPTION_MESSAGE: Final = 2_000
_MAX_TRACEBACK: Final = 8_000
_MAX_REASON: Final = 2_000


class Garbled(str):
    """Text of another client that is no UTF-8, with a mark in the place of what cannot be read.

    It equals what came as the same bytes, and nothing else. A copy has these bytes again (but not
    on the path of documented calls, where pamqp decodes).

    Attributes:
        raw: The bytes, as they came.
    """

    __slots__ = ("raw",)

    raw: bytes

    def __new__(cls, raw: bytes) -> Self:
        """Make it of bytes."""
        text = super().__new__(cls, raw.decode("utf-8", "replace"))
        text.raw = raw
        return text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Garbled) and self.raw == other.raw

    def __ne__(self, other: object) -> bool:
        return not self == other  # that of str would go by the text

    def __hash__(self) -> int:
        return hash(self.raw)

    def __reduce__(self) -> tuple[type[Garbled], tuple[bytes]]:
        return Garbled, (self.raw,)


def raw(text: str) -> bytes:
    """Encode the value of a property as it came, or as UTF-8.

    Raises:
        UnicodeEncodeError: It is no Unicode text.
    """
    return text.raw if isinstance(text, Garbled) else text.encode()


class Message(Struct, eq=False):
    """One message: its body and its AMQP 0-9-1 properties.

    Attributes:
        body: The payload, encoded.
        queue: The queue that it is meant for, or came from.
        exchange: Where it is published to; empty for the default exchange, which takes a queue's
            name as the routing key.
        routing_key: What the exchange routes by. Empty where it was given none, and then it is
            published with the queue's name.
        headers: Values are str, int, float, bool, None, bytes, datetime, Decimal, and lists and
            dicts of them.
        expiration: Seconds after which the broker may drop or dead-letter it; None for never.
        timestamp: When it was published, aware.
    """

    body: bytes
    queue: str
    exchange: str = ""
    routing_key: str = ""
    message_id: str = ""
    correlation_id: str | None = None
    content_type: str | None = None
    content_encoding: str | None = None
    headers: dict[str, Any] = {}
    priority: int | None = None
    expiration: float | None = None
    timestamp: datetime | None = None
    persistent: bool = True
    type: str | None = None
    app_id: str | None = None
    reply_to: str | None = None

    def copy_to(self, queue: str, headers: dict[str, Any]) -> Message:
        """Return a persistent copy for another queue, or for the same one, with these headers.

        It goes to the default exchange. The broker's own headers are left out, see
        `strip_broker_headers`. One header is added, by which no copy is taken for what it is a
        copy of, whatever else is the same.
        """
        return Message(
            body=self.body,
            queue=queue,
            routing_key=queue,
            message_id=self.message_id,
            correlation_id=self.correlation_id,
            content_type=self.content_type,
            content_encoding=self.content_encoding,
            headers=strip_broker_headers(headers) | {COPIES: _count(self.headers, COPIES) + 1},
            priority=self.priority,
            expiration=self.expiration,
            timestamp=self.timestamp,
            type=self.type,
            app_id=self.app_id,
            reply_to=self.reply_to,
        )


class Delivery:
    """One handing-over of a message to a handler. Ask for it by annotating a parameter.

    Attributes:
        queue: The queue's name.
        attempt: Which attempt this is, from 1. A delivery that was returned unstarted, or
            interrupted by a shutdown, is not an attempt.
        redelivered: Whether RabbitMQ says that it handed this message over before. The handler
            may have run, fully or partly: make its effects idempotent.
        message: The message with all its properties.
    """

    __slots__ = ("attempt", "lost", "message", "queue", "redelivered")

    def __init__(self, message: Message, *, queue: str, attempt: int, redelivered: bool) -> None:
        self.message = message
        self.queue = queue
        self.attempt = attempt
        self.redelivered = redelivered
        self.lost = False
        """True once the channel of this delivery is gone: RabbitMQ hands the message over again,
        and what this run does may be done a second time."""

    @property
    def body(self) -> bytes:
        """The payload as it came, undecoded."""
        return self.message.body

    @property
    def headers(self) -> Mapping[str, Any]:
        """The message's headers, ours and the broker's included."""
        return self.message.headers

    @property
    def message_id(self) -> str:
        """The message's id; empty when its producer gave none."""
        return self.message.message_id

    @property
    def correlation_id(self) -> str | None:
        """The correlation id that the producer gave, if any."""
        return self.message.correlation_id

    @property
    def priority(self) -> int | None:
        """The message's priority, if it has one."""
        return self.message.priority

    @property
    def timestamp(self) -> datetime | None:
        """When the message was published, by the producer's clock; aware; None if not given."""
        return self.message.timestamp

    def __repr__(self) -> str:
        return (
            f"<Delivery of {self.message_id or 'a message without id'} from {self.queue!r}, "
            f"attempt {self.attempt}{', lost' if self.lost else ''}>"
        )


def strip_broker_headers(headers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the headers without those that the broker adds and that a copy must not carry."""
    return {key: value for key, value in headers.items() if key not in _BROKER_HEADERS}


def new_headers(headers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the headers of a new message, which may have been those of another one.

    What RabbitMQ and aioworkq wrote into that one is left out: its counts are not this one's.

    Raises:
        ValueError: They route the message to other queues too, where no confirm is about its own.
    """
    if "CC" in headers or "BCC" in headers:
        raise ValueError(
            "the headers have CC or BCC, by which RabbitMQ routes a message to other queues too: "
            "it would be confirmed even if its own queue never got it. Leave them out, and publish "
            "to each queue.",
        )
    return {key: value for key, value in headers.items() if key not in _NOT_PUBLISHED}


def _count(headers: Mapping[str, Any], key: str) -> int:
    """Read a counter that anybody may have written: what is no count counts nothing."""
    value = headers.get(key)
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return min(value, _MAX_COUNT)
    return 0


def is_counted_by_broker(headers: Mapping[str, Any]) -> bool:
    """Say whether the queue that delivered this counts deliveries (a quorum queue does)."""
    return not _COUNTS.isdisjoint(headers)


def without_counts(headers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the headers without the counts that only a quorum queue writes."""
    return {key: value for key, value in headers.items() if key not in _COUNTS}


def returns(headers: Mapping[str, Any], *, redelivered: bool) -> int:
    """Count how often RabbitMQ got this copy back unsettled, as far as it tells.

    A quorum queue counts in ``x-delivery-count``. A classic queue says only whether it happened at
    all. (https://www.rabbitmq.com/docs/quorum-queues#poison-message-handling) A count on what was
    never handed over before is another client's, who copied it from a delivery.
    """
    if not redelivered:
        return 0
    if is_counted_by_broker(headers):
        return _count(headers, "x-delivery-count")
    return 1


def own_attempts(headers: Mapping[str, Any]) -> int:
    """Return the attempts that were used up before this copy was published."""
    return _count(headers, ATTEMPTS)


def used_attempts(headers: Mapping[str, Any], *, redelivered: bool, excused: int = 0) -> int:
    """Count the attempts that were used up before this delivery.

    Args:
        headers: The delivery's headers.
        redelivered: The delivery's flag.
        excused: How many of the returns are known not to have been attempts.
    """
    return own_attempts(headers) + max(0, returns(headers, redelivered=redelivered) - excused)


def dead_letter_headers(
    headers: Mapping[str, Any],
    *,
    queue: str,
    attempts: int,
    reason: str,
    failure: Failure | None,
    first: datetime | None,
    now: datetime,
) -> dict[str, Any]:
    """Return the headers of a dead letter: the original ones, and what became of it.

    Every text of ours is bounded, so that they never take more than about 40 kB of the 128 kB that
    a header frame may have, whatever an exception says.

    Args:
        headers: The delivery's headers.
        queue: Where it came from.
        attempts: How often its handler was started.
        reason: Why it is dead-lettered.
        failure: The last exception, if there was one.
        first: When an attempt first failed, if that is known and not in the headers.
        now: The time of the failure, aware.
    """
    dead = strip_broker_headers(headers)
    dead.pop(TRIAL, None)
    dead[QUEUE] = queue
    dead[REASON] = _bounded(reason, _MAX_REASON)
    dead[ATTEMPTS] = attempts
    if first is not None:
        dead.setdefault(FIRST_FAILURE, first)
    dead[LAST_FAILURE] = now
    if failure is not None:
        dead[EXCEPTION_TYPE] = _bounded(failure.type, 500)
        dead[EXCEPTION_MESSAGE] = _bounded(failure.message, _MAX_EXCEPTION_MESSAGE)
        dead[TRACEBACK] = _bounded_end(failure.traceback, _MAX_TRACEBACK)
    return dead


class Failure(Struct, frozen=True):
    """An exception as text: its qualified class name, its message, its traceback."""

    type: str
    message: str
    traceback: str


def _clean(text: str) -> str:
    """Make any str encodable: a lone surrogate cannot go into a header."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _bounded(text: str, limit: int) -> str:
    text = _clean(text[: limit + 1])
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _bounded_end(text: str, limit: int) -> str:
    text = _clean(text[-limit - 1 :])
    return text if len(text) <= limit else "…" + text[-limit + 1 :]
