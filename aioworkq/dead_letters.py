"""`DeadLetters`: look at the messages that were given up, publish them again, or drop them.

Everything goes one message at a time, the dead one acknowledged after what was to become of it is
certain: interrupted, it can be run again, and loses nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections import Counter
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, Self, TypeVar

import anyio
from msgspec import Struct

from aioworkq.background import to_the_end
from aioworkq.codec import codec_for
from aioworkq.connect import connection_to
from aioworkq.errors import ConnectionLostError, StateError, WorkQueueError, is_whole
from aioworkq.message import (
    ATTEMPTS,
    EXCEPTION_MESSAGE,
    EXCEPTION_TYPE,
    FIRST_FAILURE,
    LAST_FAILURE,
    MANY_RETURNS,
    OUR_HEADERS,
    QUEUE,
    REASON,
    TRACEBACK,
    returns,
)
from aioworkq.outbox import Outbox
from aioworkq.topology import Queue, as_queue, declarations

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from aioworkq.broker import Connection, Getter, Incoming
    from aioworkq.memory import MemoryBroker
    from aioworkq.message import Message

T = TypeVar("T")

_log = logging.getLogger("aioworkq")

_CLOSE_TIMEOUT: Final = 5.0
_RETURN_TIMEOUT: Final = 2.0
_RETURN_POLL: Final = 0.02
_HOLD_TIME: Final = 240.0
"""Seconds for which messages are held that stay: RabbitMQ advises a ``consumer_timeout`` of at
least five minutes (https://www.rabbitmq.com/docs/consumers#acknowledgement-timeout)."""
_MAX_MESSAGE_SIZE: Final = 2**31


class DeadLetterGroup(NamedTuple):
    """What `DeadLetters.counts` groups by: the reason, and the exception's type if any."""

    reason: str
    exception_type: str | None


class DeadMessage(Struct, Generic[T], frozen=True):
    """A message in a dead-letter queue.

    Attributes:
        message: The message with all its properties.
        queue: The queue it came from.
        reason: Why it was given up.
        attempts: How often its handler was started.
        first_failure: When an attempt failed for the first time, if that is known.
        last_failure: When the last attempt failed, if that is known.
        exception_type: The last exception's qualified class name, if there was one.
        exception_message: The last exception's text.
        traceback: The end of the last exception's traceback.
    """

    message: Message
    queue: str
    reason: str
    attempts: int
    first_failure: datetime | None
    last_failure: datetime | None
    exception_type: str | None
    exception_message: str | None
    traceback: str | None
    body_type: Any = Any

    def body(self) -> T:
        """Decode the body.

        Raises:
            DecodeError: It is not what the queue's body type says; that may be why it is here.
        """
        body: T = codec_for(self.body_type).decode(self.message.body, self.message.content_type)
        return body


class DeadLetters(Generic[T]):
    """The dead-letter queue of one queue.

    Use it as ``async with DeadLetters(url, queue) as dead:``.

    Args:
        url: As for `aioworkq.Producer`.
        queue: The queue whose dead letters these are.
        timeout: Seconds for each step: connecting, taking a message, publishing a copy.
        ssl_context: For ``amqps://``.

    Raises:
        ValueError: The URL or the timeout cannot be right.
    """

    def __init__(
        self,
        url: str | Sequence[str] | MemoryBroker,
        queue: Queue[T] | str,
        *,
        timeout: float = 30.0,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        if not 0 < timeout < float("inf"):
            raise ValueError(f"timeout is {timeout}: it must be more than 0 seconds.")
        self._queue: Queue[T] = as_queue(queue)
        self._timeout = timeout

        def connection(purpose: str) -> Connection:
            return connection_to(
                url,
                owner="dead letters",
                name=f"aioworkq dead letters ({purpose})",
                heartbeat=10,
                connect_timeout=10.0,
                ssl_context=ssl_context,
                max_message_size=_MAX_MESSAGE_SIZE,
            )

        self._connection = connection("reading")
        self._outbox = Outbox(connection("copies"), window=100, window_bytes=16 * 1024 * 1024)
        self._was_opened = self._is_open = False

    async def __aenter__(self) -> Self:
        if self._was_opened:
            raise StateError(
                "dead letters cannot be read",
                reason="it was opened before",
                advice="Make a new DeadLetters.",
            )
        self._was_opened = True
        try:
            await self._connection.start()
            async with asyncio.timeout(self._timeout):
                await self._connection.wait_connected()
            await self._connection.declare(declarations(self._queue), timeout=self._timeout)
        except BaseException as exc:
            await self._close()
            if isinstance(exc, TimeoutError):
                reason = self._connection.last_error or "no answer in time"
                raise ConnectionLostError("connecting to RabbitMQ", reason=reason) from None
            raise
        self._is_open = True
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._close()

    async def _close(self) -> None:
        self._is_open = False
        await to_the_end(self._close_all())

    async def _close_all(self) -> None:
        await self._outbox.aclose(timeout=_CLOSE_TIMEOUT)
        await self._connection.aclose(timeout=_CLOSE_TIMEOUT)

    async def peek(self, limit: int = 100) -> list[DeadMessage[T]]:
        """Return the oldest dead letters; they stay where they are.

        A quorum queue hands over those that have been looked at before those that have not, and
        puts what was looked at behind the former: after a look at all, a look at a few begins
        where the one before it ended.

        Args:
            limit: How many at most; they are held in memory.

        Raises:
            ConnectionLostError: The connection went away, or RabbitMQ did not answer in time.
            TopologyError: The dead-letter queue does not exist.
        """
        _check_limit(limit)
        found: list[DeadMessage[T]] = []

        async def keep(dead: DeadMessage[T]) -> bool:
            found.append(dead)
            return False

        await self._scan(keep, limit=limit)
        return found

    async def counts(self, limit: int | None = None) -> Counter[DeadLetterGroup]:
        """Count dead letters by reason and exception type.

        Args:
            limit: How many of the oldest to look at, from 1; None for all.
        """
        if limit is not None:
            _check_limit(limit)
        groups: Counter[DeadLetterGroup] = Counter()

        async def count(dead: DeadMessage[T]) -> bool:
            groups[DeadLetterGroup(dead.reason, dead.exception_type)] += 1
            return False

        await self._scan(count, limit=limit)
        return groups

    async def replay(
        self,
        where: Callable[[DeadMessage[T]], bool] | None = None,
        *,
        rate: float | None = None,
    ) -> int:
        """Publish dead letters to their queue again, with their attempts reset.

        A copy is confirmed before the dead letter is acknowledged. Those that die again meanwhile
        are not replayed a second time.

        Args:
            where: Says of each whether it is meant: a plain function, not ``async``; None for all.
                It may be asked again about one that it did not mean, when this takes minutes.
            rate: How many a second at most, by the broker's clock; None for no bound.

        Returns:
            How many were published.

        Raises:
            ConnectionLostError: The connection went away. What was not published is still there.
            PublishError: A copy was not confirmed. Its dead letter is still there.
            TopologyError: RabbitMQ refuses to go on. What was not published is still there.
            TypeError: ``where`` is no plain function.
        """
        if rate is not None and not rate > 0:
            raise ValueError(f"rate is {rate}: it must be more than 0 a second.")
        chosen = _choice(where)
        replayed = 0
        last: datetime | None = None

        async def publish(dead: DeadMessage[T]) -> bool:
            nonlocal replayed, last
            if not chosen(dead):
                return False
            if rate is not None and last is not None:
                passed = (self._connection.now() - last).total_seconds()
                # The time of day may be set back, and nobody shall wait for hours.
                await self._connection.sleep(max(0.0, 1 / rate - max(0.0, passed)))
            last = self._connection.now()
            headers = {
                name: value
                for name, value in dead.message.headers.items()
                if name not in OUR_HEADERS
            }
            await self._publish(dead.message.copy_to(self._queue.name, headers))
            replayed += 1
            return True

        await self._scan(publish)
        return replayed

    async def purge(self, where: Callable[[DeadMessage[T]], bool] | None = None) -> int:
        """Drop dead letters for good.

        Args:
            where: As for `replay`.

        Returns:
            How many were dropped.

        Raises:
            WorkQueueError: One of the errors of `replay`. What was not dropped is still there.
            TypeError: ``where`` is no plain function.
        """
        chosen = _choice(where)
        dropped = 0

        async def drop(dead: DeadMessage[T]) -> bool:
            nonlocal dropped
            is_chosen = chosen(dead)
            dropped += is_chosen
            return is_chosen

        await self._scan(drop)
        return dropped

    async def _scan(
        self,
        decide: Callable[[DeadMessage[T]], Any],
        *,
        limit: int | None = None,
    ) -> None:
        """Take the dead letters that are there now; ack those that ``decide`` is done with.

        The others stay unacknowledged until the end, and go back when the channel is closed.
        """
        if not self._is_open:
            raise StateError(
                "dead letters cannot be read",
                reason="there is no connection",
                advice="Use it inside `async with DeadLetters(...) as dead:`.",
            )
        name = self._queue.dead_letter_queue
        ready = await self._connection.count_messages(name, timeout=self._timeout)
        left = ready if limit is None else min(ready, limit)
        while left > 0:
            done = await self._look_through(name, decide, left, ready)
            if done is None:
                return
            left -= done
            ready -= done

    async def _look_through(
        self,
        name: str,
        decide: Callable[[DeadMessage[T]], Any],
        left: int,
        ready: int,
    ) -> int | None:
        """Look at this many from the oldest on, for as long as those that stay may be held.

        Returns:
            None when all have been looked at; otherwise how many are done with. The others are
            back, to be looked at once more.
        """
        done = 0
        due = anyio.current_time() + _HOLD_TIME
        getter: Getter = await self._connection.open_getter(name, timeout=self._timeout)
        try:
            for seen in range(1, left + 1):
                incoming = await getter.get(timeout=self._timeout)
                if incoming is None:
                    return None
                dead = self._dead(incoming)
                if await decide(dead) or await self._is_renewed(dead, incoming):
                    await getter.ack(incoming.tag, timeout=self._timeout)
                    done += 1
                    if seen > done and anyio.current_time() > due:
                        return done
            return None
        finally:
            await getter.aclose(timeout=_CLOSE_TIMEOUT)
            await self._wait_returned(name, ready - done)

    async def _is_renewed(self, dead: DeadMessage[T], incoming: Incoming) -> bool:
        """Put a copy behind the others, if a dead letter has been looked at often.

        Each look may be charged to it, and the queue may not be one of ours: RabbitMQ 4 drops what
        came back 20 times to a quorum queue that was declared without a limit.
        """
        if returns(incoming.message.headers, redelivered=incoming.redelivered) < MANY_RETURNS:
            return False
        headers = {QUEUE: dead.queue, REASON: dead.reason, **dead.message.headers}
        copy = dead.message.copy_to(self._queue.dead_letter_queue, headers)
        try:
            await self._publish(copy)
        except (WorkQueueError, ValueError, TypeError) as exc:
            _log.warning("A dead letter that was looked at often is not renewed: %s", exc)
            return False
        return True

    async def _publish(self, copy: Message) -> None:
        deadline = anyio.current_time() + self._timeout
        wire = self._outbox.connection.prepare(copy)
        await self._outbox.publish(copy, wire, deadline=deadline)

    async def _wait_returned(self, name: str, ready: int) -> None:
        """Wait until what was looked at is back: a quorum queue takes it back a moment later.

        Bounded, because others may take messages meanwhile.
        """
        with anyio.move_on_after(_RETURN_TIMEOUT), contextlib.suppress(WorkQueueError):
            while not await self._has_ready(name, ready):  # noqa: ASYNC110 - a broker's fact
                await anyio.sleep(_RETURN_POLL)

    async def _has_ready(self, name: str, number: int) -> bool:
        return await self._connection.count_messages(name, timeout=self._timeout) >= number

    def _dead(self, incoming: Incoming) -> DeadMessage[T]:
        message = incoming.message
        headers = message.headers
        attempts = headers.get(ATTEMPTS)
        return DeadMessage(
            message=message,
            queue=str(headers.get(QUEUE, self._queue.name)),
            reason=str(headers.get(REASON) or headers.get("x-first-death-reason") or "unknown"),
            attempts=attempts if isinstance(attempts, int) else 0,
            first_failure=_time(headers.get(FIRST_FAILURE)),
            last_failure=_time(headers.get(LAST_FAILURE)),
            exception_type=_text(headers.get(EXCEPTION_TYPE)),
            exception_message=_text(headers.get(EXCEPTION_MESSAGE)),
            traceback=_text(headers.get(TRACEBACK)),
            body_type=self._queue.body_type,
        )


def _choice(where: Any) -> Callable[[DeadMessage[Any]], bool]:
    """Return what says whether a dead letter is meant.

    Raises:
        TypeError: It is no function, or a coroutine function: it would choose all of them.
    """
    if where is None:
        return lambda _: True
    if not callable(where) or inspect.iscoroutinefunction(where):
        raise TypeError(f"where is {where!r}: it must be a plain function that returns a bool.")

    def choose(dead: DeadMessage[Any]) -> bool:
        answer = where(dead)
        if inspect.isawaitable(answer):
            if inspect.iscoroutine(answer):
                answer.close()
            raise TypeError(f"where, {where!r}, returned an awaitable: it must return a bool.")
        return bool(answer)

    return choose


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _time(value: object) -> datetime | None:
    return value if isinstance(value, datetime) else None


def _check_limit(limit: int) -> None:
    if not is_whole(limit) or limit < 1:
        raise ValueError(f"limit is {limit!r}: it must be a whole number from 1.")
