"""The errors that aioworkq raises, and the signals a handler may raise.

::

    WorkQueueError
    ├── ConnectionLostError      no usable connection before the deadline
    │   └── AccessRefusedError   the broker will never let us in as we are
    ├── TopologyError            the broker refuses a declaration
    ├── PublishError
    │   ├── UnroutableError      returned: no queue is bound
    │   ├── NotConfirmedError    the broker refused the message
    │   └── OutcomeUnknownError  no confirm in time: may or may not be stored
    ├── MessageError             this message can never be handled
    │   └── DecodeError
    └── StateError               used before start or after stop

    Signal                       raised by handlers: not errors
    ├── RetryLater
    └── Reject
    BatchError                   raised by batch handlers: what becomes of single messages

Every error keeps its fields and builds its sentence in ``__str__``: *what*: *why*. *Do this.*
Bad arguments are plain :class:`ValueError` and :class:`TypeError`, raised where they are given.
No password ever appears in a sentence. All of them can be pickled, and so leave a process pool.
"""

from __future__ import annotations

import numbers
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aioworkq.outcome import Outcome


class _Portable(Exception):  # noqa: N818 - a base, of signals too: not all are errors
    """An exception that can be pickled and copied, to come back from a process pool as it is.

    Python's own way calls the class with ``args`` and nothing else, which fails where a field has
    no default: such an error breaks the whole pool that it was raised in.
    """

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuilt, (type(self), self.args), self.__dict__


def _rebuilt(kind: type[_Portable], args: tuple[object, ...]) -> _Portable:
    return kind.__new__(kind, *args)


class WorkQueueError(_Portable):
    """The base of every error that aioworkq raises by itself."""


class ConnectionLostError(WorkQueueError):
    """There was no usable connection to RabbitMQ before the deadline.

    Attributes:
        what: What could not be done, as the start of a sentence.
        reason: Why the last attempt to connect failed.
    """

    def __init__(self, what: str, *, reason: str = "") -> None:
        self.what = what
        self.reason = reason
        super().__init__(what, reason)

    def __str__(self) -> str:
        reason = self.reason or "the connection to RabbitMQ was lost"
        return (
            f"{self.what}: {reason}. "
            "Check that RabbitMQ runs and is reachable at the URL, or allow a longer timeout."
        )


class AccessRefusedError(ConnectionLostError):
    """The broker will never accept this connection as it is.

    Raised for wrong credentials, an unknown virtual host, or a user who may not use it. Trying
    again cannot help, so nothing is retried.
    """

    def __str__(self) -> str:
        return (
            f"{self.what}: {self.reason or 'RabbitMQ refused the access'}. "
            "Correct the user, the password, the virtual host or the user's permissions."
        )


class TopologyError(WorkQueueError):
    """The broker refuses a declaration, or a queue that must exist does not.

    Attributes:
        name: The queue or exchange.
        expected: What we asked for, by field.
        actual: What the broker has, by field; empty when it has nothing of that name.
        reason: The broker's own words.
        code: AMQP's reply code: 403 no permission, 404 not there, 405 held by another
            connection, 406 declared otherwise; None if the broker was not asked.
    """

    def __init__(
        self,
        name: str,
        *,
        reason: str,
        code: int | None = None,
        expected: dict[str, object] | None = None,
        actual: dict[str, object] | None = None,
        advice: str = "",
    ) -> None:
        self.name = name
        self.reason = reason
        self.code = code
        self.expected = expected or {}
        self.actual = actual or {}
        self.advice = advice
        super().__init__(name, reason)

    def __str__(self) -> str:
        fields = "; ".join(
            f"{field}: ours is {value!r}, the broker's is {self.actual.get(field)!r}"
            for field, value in self.expected.items()
        )
        differs = f" ({fields})" if fields else ""
        advice = self.advice or "Declare it alike on both sides, or delete the one that is there."
        return f"queue {self.name!r} cannot be used: {self.reason}{differs}. {advice}"


class PublishError(WorkQueueError):
    """A message was not, or may not have been, taken by the broker.

    Attributes:
        message_id: The message's id, to find it by or to publish it again under.
        queue: The queue it was meant for.
        reason: Why, in the broker's words where it gave any.
    """

    def __init__(self, message_id: str, *, queue: str, reason: str) -> None:
        self.message_id = message_id
        self.queue = queue
        self.reason = reason
        super().__init__(message_id, queue, reason)

    def __str__(self) -> str:
        return f"message {self.message_id} for queue {self.queue!r} failed: {self.reason}."


class UnroutableError(PublishError):
    """The broker returned the message: no queue of that name exists. Nothing is stored."""

    def __str__(self) -> str:
        return (
            f"message {self.message_id} was returned: no queue {self.queue!r} exists "
            f"({self.reason}). Declare the queue, or leave declare=True on it."
        )


class NotConfirmedError(PublishError):
    """The broker refused the message (a negative confirm). Nothing is stored for us.

    RabbitMQ does so when a queue with ``max_length`` is full or when the queue's leader failed.
    """

    def __str__(self) -> str:
        return (
            f"message {self.message_id} was refused by queue {self.queue!r}: {self.reason}. "
            "Publish it again later; a queue with max_length may be full."
        )


class OutcomeUnknownError(PublishError):
    """No confirm came in time: the message may or may not be stored.

    Publishing it again, under the same ``message_id``, loses nothing and may duplicate it.
    """

    def __str__(self) -> str:
        return (
            f"no confirm for message {self.message_id} to queue {self.queue!r} in time: "
            f"{self.reason}. It may or may not be stored; "
            "publishing it again with the same message_id may duplicate it."
        )


class MessageError(WorkQueueError):
    """This message can never be handled: it is dead-lettered at once, never retried."""


class DecodeError(MessageError):
    """A message's body is not what the queue's body type says.

    Attributes:
        expected: The body type.
        reason: What does not fit, with the path to it.
    """

    def __init__(self, expected: str, *, reason: str) -> None:
        self.expected = expected
        self.reason = reason
        super().__init__(expected, reason)

    def __str__(self) -> str:
        return (
            f"the body is not a valid {self.expected}: {self.reason}. "
            "Publish with the same Queue that the handler is registered for."
        )


class StateError(WorkQueueError):
    """An object was used before its start or after its stop: a bug of the caller.

    Attributes:
        what: What was attempted.
        reason: The state that forbids it.
        advice: What to do instead.
    """

    def __init__(self, what: str, *, reason: str, advice: str) -> None:
        self.what = what
        self.reason = reason
        self.advice = advice
        super().__init__(what, reason)

    def __str__(self) -> str:
        return f"{self.what}: {self.reason}. {self.advice}"


class Signal(_Portable):
    """What a handler raises to decide the outcome of its delivery."""


class Reject(Signal):
    """Raised by a handler: dead-letter this message now, with this reason.

    Attributes:
        reason: Kept in the dead letter's headers.
    """

    def __init__(self, reason: str = "rejected by the handler") -> None:
        self.reason = reason
        super().__init__(reason)


class RetryLater(Signal):
    """Raised by a handler: hand this message over again after ``delay`` seconds.

    Attributes:
        delay: Seconds to wait, at least 0.
        counts: Whether this attempt is counted against the handler's ``attempts``.
    """

    def __init__(self, delay: float, *, counts: bool = True) -> None:
        check_number("delay", delay)
        if not delay >= 0:
            raise ValueError(f"delay is {delay!r}: it must be at least 0 seconds.")
        self.delay = delay
        self.counts = counts
        super().__init__(delay)


class BatchError(_Portable):
    """Raised by a batch handler: these messages of the batch are not done, all others are.

    Each is named by its position in the list of bodies, from 0, with what becomes of it: an outcome
    (`Ack`, `Requeue`, `Retry`, `DeadLetter`), or an exception, which counts as if the handler had
    raised it for this message alone::

        raise BatchError({0: DeadLetter("no address"), 3: RetryLater(60), 7: exc})

    An empty mapping names none: all are acked. A position that the batch does not have, or a value
    that is neither, makes the whole batch fail, as any other error does.

    Attributes:
        outcomes: What was given, as a dict.

    Raises:
        TypeError: It is no mapping, a position is no int, or a value is a class, or an exception
            that no handler may raise for one message.
        ValueError: A position is negative.
    """

    def __init__(self, outcomes: Mapping[int, Outcome | Exception]) -> None:
        try:
            self.outcomes = dict(outcomes)
        except (TypeError, ValueError) as exc:
            raise TypeError(
                f"BatchError takes a mapping of positions in the batch to outcomes, not "
                f"{outcomes!r}. Write it as `BatchError({{3: Reject('too old')}})`.",
            ) from exc
        for position, value in self.outcomes.items():
            check_position(position)
            if isinstance(value, type | BatchError) or (
                isinstance(value, BaseException) and not isinstance(value, Exception)
            ):
                raise TypeError(
                    f"BatchError names {value!r} for item {position}: it must be an outcome, or an "
                    "instance of Exception that is no BatchError.",
                )
        super().__init__(self.outcomes)

    def __str__(self) -> str:
        named = ", ".join(f"{position}: {value!r}" for position, value in self.outcomes.items())
        return f"not all of the batch is done: {named or 'no item is named'}."


def check_position(position: object) -> None:
    """Check that a value can be the position of an item in a batch.

    Raises:
        TypeError: It is no int.
        ValueError: It is negative.
    """
    if not isinstance(position, int) or isinstance(position, bool):
        raise TypeError(
            f"BatchError names the item {position!r}: it must be a position in the list of bodies, "
            "an int from 0.",
        )
    if position < 0:
        raise ValueError(
            f"BatchError names the item {position}: positions in the list of bodies count from 0.",
        )


def is_whole(number: object) -> bool:
    """Say whether a value is an int, and no bool."""
    return isinstance(number, int) and not isinstance(number, bool)


def check_number(name: str, value: object) -> None:
    """Check that a value is a number, which a comparison with one would not say in words.

    Raises:
        TypeError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        hint = ""
        if hasattr(value, "total_seconds"):
            hint = " Write `.total_seconds()` behind it."
        elif hasattr(value, "__float__"):
            hint = " Give float(...) of it."
        raise TypeError(f"{name} is {value!r}: it must be a number.{hint}")
    try:
        float(value)
    except OverflowError:
        raise ValueError(f"{name} is larger than a float can be.") from None
