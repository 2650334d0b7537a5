"""What a handler is registered with: checked where it is given, and carried along as one value.

What the numbers are that nobody gave depends on the function, so that is said here too.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from msgspec import Struct
from msgspec.structs import force_setattr

from aioworkq.errors import check_number, is_whole
from aioworkq.retry import RetryPolicy

if TYPE_CHECKING:
    from aioworkq.outcome import OnError

OnConnectionLoss: TypeAlias = Literal["finish", "cancel"]

_ASYNC_CONCURRENCY: Final = 10
_BATCH_CONCURRENCY: Final = 1
_MAX_PREFETCH: Final = 65_535


class Batching(Struct, frozen=True):
    """How the batches of a batch handler are made.

    Attributes:
        max_size: How many messages a batch has at most.
        max_wait: Seconds that a message waits at most for others of its batch.

    Raises:
        ValueError: A number is out of range.
    """

    max_size: int
    max_wait: float

    def __post_init__(self) -> None:
        if not is_whole(self.max_size) or not 1 <= self.max_size <= _MAX_PREFETCH:
            raise ValueError(
                f"max_size is {self.max_size!r}: it must be a whole number from 1 to "
                f"{_MAX_PREFETCH}, as many as RabbitMQ hands over unsettled.",
            )
        check_number("max_wait", self.max_wait)
        if not 0 <= self.max_wait < math.inf:
            raise ValueError(
                f"max_wait is {self.max_wait!r}: it must be a number of seconds, 0 or more.",
            )


class Options(Struct, frozen=True, kw_only=True):
    """What `Worker.handler` or `Worker.batch_handler` was given, checked.

    The attributes are their parameters. ``attempts`` are those of ``retry``, if that is given;
    ``batching`` is None for a handler that takes one message.

    Raises:
        ValueError: An option is out of range, or does not go with another one.
    """

    concurrency: int | None
    prefetch_count: int | None
    timeout: float | None
    attempts: int | None
    on_error: OnError
    on_connection_loss: OnConnectionLoss
    retry: RetryPolicy | None
    slow_down: bool
    batching: Batching | None = None

    def __post_init__(self) -> None:
        self._check_numbers()
        if not callable(self.on_error) and self.on_error not in {
            "requeue",
            "dead-letter",
            "discard",
        }:
            raise ValueError(
                f"on_error is {self.on_error!r}: it must be 'requeue', 'dead-letter', 'discard', "
                "or a function of exception and delivery that returns an outcome.",
            )
        if self.on_connection_loss not in {"finish", "cancel"}:
            raise ValueError(
                f"on_connection_loss is {self.on_connection_loss!r}: it must be 'finish' or "
                "'cancel'.",
            )
        if self.retry is not None:
            if not isinstance(self.retry, RetryPolicy):
                raise TypeError(f"retry is {self.retry!r}: it must be a RetryPolicy.")
            if self.on_error != "requeue":
                raise ValueError(
                    f"retry and on_error={self.on_error!r} are both given: a retry policy is what "
                    "happens on an error. Give one of them.",
                )
            force_setattr(self, "attempts", self.retry.attempts)

    def _check_numbers(self) -> None:
        concurrency, prefetch_count = self.concurrency, self.prefetch_count
        if concurrency is not None and (not is_whole(concurrency) or concurrency < 1):
            raise ValueError(f"concurrency is {concurrency!r}: it must be a whole number from 1.")
        if prefetch_count is not None:
            if not is_whole(prefetch_count) or not 1 <= prefetch_count <= _MAX_PREFETCH:
                raise ValueError(
                    f"prefetch_count is {prefetch_count!r}: it must be a whole number from 1 to "
                    f"{_MAX_PREFETCH}. No bound at all (0) would pull a whole backlog into memory.",
                )
            if self.batching is not None and prefetch_count < self.batching.max_size:
                raise ValueError(
                    f"prefetch_count is {prefetch_count}: no batch would ever have its max_size of "
                    f"{self.batching.max_size} messages. Give at least as many, or leave it out.",
                )
        if self.timeout is not None:
            check_number("timeout", self.timeout)
            if not self.timeout > 0:
                raise ValueError(
                    f"timeout is {self.timeout!r}: it must be more than 0 seconds, or None.",
                )
        if self.attempts is not None and (not is_whole(self.attempts) or self.attempts < 1):
            raise ValueError(
                f"attempts is {self.attempts!r}: it must be a whole number from 1, or None.",
            )

    def concurrency_of(self, *, is_async: bool) -> int:
        """Return how many runs there are at a time, of a coroutine function or of a plain one."""
        if self.concurrency is not None:
            return self.concurrency
        if self.batching is not None:
            return _BATCH_CONCURRENCY
        return _ASYNC_CONCURRENCY if is_async else os.cpu_count() or 1

    def prefetch_count_of(self, *, is_async: bool) -> int:
        """Return how many unsettled deliveries to ask for, likewise."""
        if self.prefetch_count is not None:
            return self.prefetch_count
        wanted = self.concurrency_of(is_async=is_async)
        if self.batching is not None:
            wanted = self.batching.max_size * (wanted + 1)
        return min(wanted, _MAX_PREFETCH)
