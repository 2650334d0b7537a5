"""`Producer`: publishes messages and says what became of each.

The queue is declared, the body encoded and checked here; confirms, the window and outages are
`aioworkq.outbox`'s.
"""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar
from weakref import WeakValueDictionary

from aioworkq.batch import Batch, PublishReport
from aioworkq.codec import codec_for
from aioworkq.connect import connection_to
from aioworkq.delay import checked_delay
from aioworkq.delays import DelayQueues
from aioworkq.errors import (
    AccessRefusedError,
    ConnectionLostError,
    StateError,
    UnroutableError,
    WorkQueueError,
    check_number,
    is_whole,
)
from aioworkq.message import Message, new_headers
from aioworkq.outbox import Outbox
from aioworkq.statistics import ProducerStatistics
from aioworkq.topology import Queue, as_queue, declarations

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterable, Callable, Iterable, Mapping, Sequence
    from datetime import datetime
    from types import TracebackType

    from aioworkq.memory import MemoryBroker
    from aioworkq.outbox import Publication

T = TypeVar("T")

_log = logging.getLogger("aioworkq")

_DECLARE_PAUSE: Final = 0.1
_DECLARE_TIMEOUT: Final = 10.0
_CLOSE_TIMEOUT: Final = 5.0


class Producer:
    """Publishes messages to queues, each confirmed by RabbitMQ.

    Use it as ``async with Producer(url) as producer``, or call `start` and `close`. One producer
    serves any number of tasks of one event loop, and is meant to live as long as the application.

    Args:
        url: ``amqp://user:password@host:port/vhost``, or ``amqps://``; or several, hosts of one
            cluster, tried in turn. A `MemoryBroker`, or ``memory://name``, in tests.
        timeout: Seconds after which a publication that has no outcome yet fails, outages included.
        window: How many messages may be unconfirmed at a time; RabbitMQ gains nothing beyond 1,000.
        max_message_size: Larger bodies are refused here; RabbitMQ 4 takes 16 MiB by default.
        name: Shown in RabbitMQ's list of connections.
        heartbeat: Seconds; a dead peer is noticed after three times as many, plus three.
        connect_timeout: Seconds for one attempt to connect.
        ssl_context: For ``amqps://``; None for the system's certificate authorities.

    Raises:
        ValueError: The URL or a number cannot be right.
    """

    def __init__(
        self,
        url: str | Sequence[str] | MemoryBroker,
        *,
        timeout: float = 30.0,
        window: int = 1000,
        max_message_size: int = 16 * 1024 * 1024,
        name: str = "aioworkq producer",
        heartbeat: int = 10,
        connect_timeout: float = 10.0,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._timeout = _checked_timeout(timeout)
        for option, value in (("window", window), ("max_message_size", max_message_size)):
            if not is_whole(value):
                raise TypeError(f"{option} is {value!r}: it must be an int.")
            if value < 1:
                raise ValueError(f"{option} is {value}: it must be at least 1.")
        check_connection_options(heartbeat=heartbeat, connect_timeout=connect_timeout)
        self._connection = connection_to(
            url,
            owner="producer",
            name=name,
            heartbeat=heartbeat,
            connect_timeout=connect_timeout,
            ssl_context=ssl_context,
            max_message_size=max_message_size,
        )
        self._window = window
        self._window_bytes = max(max_message_size, 16 * 1024 * 1024)
        self._outbox: Outbox | None = None
        self._declared: set[str] = set()
        self._delays = DelayQueues(self._connection)
        self._declaring: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._is_closed = False
        self._ids = ""
        self._sequence = 0
        self._stamp: datetime | None = None

    async def start(self) -> None:
        """Connect, and return once that is done.

        Raises:
            AccessRefusedError: RabbitMQ refuses the credentials or the virtual host.
            ConnectionLostError: No connection within ``timeout`` seconds.
            StateError: It was started or closed before.
        """
        if self._outbox is not None or self._is_closed:
            raise StateError(
                "this producer cannot be started",
                reason="it was closed" if self._is_closed else "it runs already",
                advice="Make a new Producer.",
            )
        self._ids = uuid.uuid4().hex[:20]  # not before: a process may be forked meanwhile
        outbox = Outbox(self._connection, window=self._window, window_bytes=self._window_bytes)
        self._outbox = outbox
        try:
            await outbox.wait_connected(timeout=self._timeout)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Wait for the outcome of what is published, then disconnect. Twice harmless.

        It takes no longer than the producer's ``timeout`` and a few seconds for closing. What has
        no outcome by then is told so: `OutcomeUnknownError` or `ConnectionLostError`.
        """
        self._is_closed = True
        if self._outbox is None:
            await self._connection.aclose(timeout=_CLOSE_TIMEOUT)
            return
        try:
            await self._outbox.flush(timeout=self._timeout)
        finally:
            await self._outbox.aclose(timeout=_CLOSE_TIMEOUT)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def statistics(self) -> ProducerStatistics:
        """Return what the producer is doing and has done."""
        connection, outbox = self._connection, self._outbox
        return ProducerStatistics(
            is_connected=connection.is_connected,
            is_blocked=connection.is_blocked,
            pending=outbox.pending if outbox else 0,
            in_flight=outbox.in_flight if outbox else 0,
            confirmed=outbox.confirmed if outbox else 0,
            unroutable=outbox.unroutable if outbox else 0,
            not_confirmed=outbox.not_confirmed if outbox else 0,
            unknown=outbox.unknown if outbox else 0,
            resent=outbox.resent if outbox else 0,
            reconnects=connection.reconnects,
            last_error=connection.last_error,
        )

    async def publish(
        self,
        queue: Queue[T] | str,
        body: T,
        *,
        priority: int | None = None,
        expiration: float | None = None,
        headers: Mapping[str, Any] | None = None,
        message_id: str | None = None,
        correlation_id: str | None = None,
        delay: float | None = None,
        at: datetime | None = None,
        timeout: float | None = None,
    ) -> str:
        """Publish one message, and return its id once RabbitMQ has taken responsibility for it.

        The message is persistent, the queue durable. Through an outage the call waits for the
        connection and publishes again what has no confirm, until ``timeout``. Messages of one task
        keep their order; those that an outage made it publish again may arrive twice.

        Cancelling it is safe: the message is then stored once, or not at all.

        Args:
            queue: The queue, declared if it does not exist; a bare name is short for
                ``Queue(name)``.
            body: A value of the queue's body type.
            priority: 0 to 255, on a queue with ``max_priority``.
            expiration: Seconds after which an unhandled message expires; None for never.
            headers: Values are str, int, float, bool, None, bytes, datetime, Decimal, lists, dicts.
                They may be those of a delivery: what RabbitMQ and aioworkq wrote there is left out.
            message_id: At most 255 bytes; None to have one made. Publish again under the same id
                what got an `OutcomeUnknownError`.
            correlation_id: At most 255 bytes.
            delay: Seconds that the message waits in RabbitMQ first, a year at most; never less, and
                an eighth of a second or one part in 16 more, whichever is longer.
            at: The same as a point in time, an aware datetime; one that has passed means now.
            timeout: Seconds; None for the producer's.

        Raises:
            UnroutableError: No such queue, and ``declare=False``. Nothing is stored.
            NotConfirmedError: RabbitMQ refused the message. Nothing is stored.
            OutcomeUnknownError: No confirm in time. It may or may not be stored.
            ConnectionLostError: No usable connection in time. Nothing is stored.
            TopologyError: The queue cannot be declared. Nothing is stored.
            ValueError: The broker cannot take the message: too large, a name too long.
            TypeError: The body is not of the queue's type or cannot be encoded.
            StateError: The producer does not run.
        """
        outbox = self._running()
        queue = as_queue(queue)
        seconds = 0.0
        if delay is not None or at is not None:
            seconds = _checked_delay(delay, at, expiration, now=self._connection.now)
        message = self._message(
            queue, body, priority, expiration, headers, message_id, correlation_id
        )
        wait = self._timeout if timeout is None else _checked_timeout(timeout)
        deadline = outbox.loop.time() + wait
        wire = self._connection.prepare(message)
        if seconds or self._must_declare(queue):
            with outbox.expecting():
                await self.make_way(queue, deadline, message=message, delay=seconds)
            wire = self._connection.prepare(message)
        # As `Outbox.publish`, with a coroutine less for each message.
        publication = outbox.begin(message, wire, deadline=deadline)
        try:
            await publication.outcome
        except asyncio.CancelledError:
            outbox.take_back(publication)
            raise
        except UnroutableError as exc:
            try:
                await self._publish_again(publication, queue, seconds, exc)
            except WorkQueueError as error:
                truth = outbox.truth(publication, error)
                if truth is error:
                    raise
                raise truth from error
        return message.message_id

    async def _publish_again(
        self, returned: Publication, queue: Queue[Any], delay: float, error: UnroutableError
    ) -> None:
        """Publish once more what was returned, after declaring what is missing.

        Raises:
            UnroutableError: Nothing is declared here.
        """
        outbox, message = returned.outbox, returned.message
        if not (queue.declare or delay):
            raise error
        self.forget(queue)
        with outbox.expecting():
            await self.make_way(queue, returned.deadline, message=message, delay=delay)
        wire = self._connection.prepare(message)
        await outbox.publish(message, wire, deadline=returned.deadline)

    async def publish_many(
        self,
        queue: Queue[T] | str,
        bodies: Iterable[T] | AsyncIterable[T],
        *,
        priority: int | None = None,
        expiration: float | None = None,
        headers: Mapping[str, Any] | None = None,
        correlation_id: str | None = None,
        delay: float | None = None,
        at: datetime | None = None,
        timeout: float | None = None,
    ) -> PublishReport:
        """Publish many messages, pipelined, and report what became of each.

        The iterable is read as fast as RabbitMQ confirms: no further body is sent while ``window``
        messages are under way, or 16 MiB of bodies (``max_message_size``, where that is more), so
        memory does not grow with its length. A message that fails does not stop the others. They
        are stored in the iterable's order, but for those that an outage made it publish again.

        Cancelling it is safe, and waits for nothing: what was sent is stored or not, what was not
        sent never will be.

        Args:
            queue: As for `publish`.
            bodies: Values of the queue's body type; any iterable, or an asynchronous one.
            priority: As for `publish`, for all of them.
            expiration: As for `publish`, for all of them.
            headers: As for `publish`, for all of them.
            correlation_id: As for `publish`, for all of them.
            delay: As for `publish`, for all of them.
            at: As for `publish`, for all of them.
            timeout: Seconds for each message, from when there is room for it.

        Returns:
            The report; a message's error in it is one of those that `publish` raises.

        Raises:
            ConnectionLostError: No usable connection in time to declare the queue.
            TopologyError: The queue cannot be declared.
            StateError: The producer does not run, or is closed meanwhile.
            TypeError: ``bodies`` is no iterable, or an argument of the queue cannot be encoded.
            ValueError: An option makes no sense.
            Exception: What the iterable raises, once the messages before it have their outcome.
        """
        outbox = self._running()
        queue = as_queue(queue)
        wait = self._timeout if timeout is None else _checked_timeout(timeout)
        seconds = _checked_delay(delay, at, expiration, now=self._connection.now)
        if self._must_declare(queue):
            with outbox.expecting():
                await self.make_way(queue, asyncio.get_running_loop().time() + wait)

        def message_of(body: T) -> Message:
            return self._message(queue, body, priority, expiration, headers, None, correlation_id)

        async with Batch(
            self, outbox, queue, message_of, delay=seconds, at=at, timeout=wait
        ) as batch:
            await batch.publish(bodies)
        return batch.report

    def seconds_until(self, at: datetime) -> float:
        """Return the delay that is left until then. For `Batch` too."""
        return checked_delay(None, at, now=self._connection.now())

    def _must_declare(self, queue: Queue[Any]) -> bool:
        return queue.declare and queue.name not in self._declared

    def forget(self, queue: Queue[Any]) -> None:
        """Have `make_way` declare again: something was found missing. For `Batch` too."""
        self._declared.discard(queue.name)
        self._delays.forget()

    async def make_way(
        self,
        queue: Queue[Any],
        deadline: float,
        *,
        message: Message | None = None,
        delay: float = 0.0,
    ) -> None:
        """Declare what is not known to exist, trying again through an outage until the deadline.

        A message with a delay is addressed to the delay queues. For `Batch` too.

        Raises:
            ConnectionLostError: No usable connection in time.
            TopologyError: The broker refuses.
        """
        # Without waiting, so that messages of one step of the event loop go out in one write.
        if (
            message is not None
            and delay
            and not self._must_declare(queue)
            and self._delays.send_off_nowait(message, delay, queue)
        ):
            return
        reason = ""
        loop = asyncio.get_running_loop()
        lock = self._declaring.setdefault(queue.name, asyncio.Lock())
        try:
            async with asyncio.timeout_at(deadline), lock:
                while True:
                    await self._connection.wait_connected()
                    left = max(_DECLARE_TIMEOUT, deadline - loop.time())
                    try:
                        if self._must_declare(queue):
                            await self._connection.declare(declarations(queue), timeout=left)
                            self._declared.add(queue.name)
                        if message is not None and delay:
                            await self._delays.send_off(message, delay, queue, timeout=left)
                    except AccessRefusedError:
                        raise
                    except ConnectionLostError as exc:
                        reason = exc.reason
                        await self._connection.sleep(_DECLARE_PAUSE)
                    else:
                        return
        except TimeoutError:
            if self._connection.is_blocked:
                reason = "RabbitMQ blocks publishers (memory or disk alarm)"
            raise ConnectionLostError(
                f"declaring queue {queue.name!r}",
                reason=reason or self._connection.last_error or "no answer in time",
            ) from None

    def check_running(self) -> None:
        """Check that this producer can publish. For `Batch` too.

        Raises:
            StateError: It was not started, or it was closed.
        """
        self._running()

    def _running(self) -> Outbox:
        if self._outbox is None or self._is_closed:
            raise StateError(
                "this producer cannot publish",
                reason="it was closed" if self._is_closed else "it was not started",
                advice="Use it inside `async with Producer(...) as producer:`.",
            )
        if asyncio.get_running_loop() is not self._outbox.loop:
            raise StateError(
                "this producer cannot publish",
                reason="it runs in another event loop than the call",
                advice="From another thread use asyncio.run_coroutine_threadsafe with its loop.",
            )
        return self._outbox

    def _message(  # noqa: PLR0917 - by position: that takes half the time
        self,
        queue: Queue[Any],
        body: object,
        priority: int | None,
        expiration: float | None,
        headers: Mapping[str, Any] | None,
        message_id: str | None,
        correlation_id: str | None,
    ) -> Message:
        encoded = codec_for(queue.body_type).encode(body)
        if message_id is not None or correlation_id is not None:
            _check_ids(message_id, correlation_id)
        if message_id is None:
            self._sequence += 1
            message_id = f"{self._ids}-{self._sequence}"
        return Message(
            encoded.body,
            queue.name,
            "",  # exchange
            queue.name,
            message_id,
            correlation_id,
            encoded.content_type,
            encoded.content_encoding,
            new_headers(headers) if headers else {},
            priority,
            expiration,
            self._stamp or self._new_stamp(),
        )

    def _new_stamp(self) -> datetime:
        """Read the clock, once for all messages of this step of the event loop."""
        self._stamp = stamp = self._connection.now()
        self._running().loop.call_soon(self._forget_stamp)
        return stamp

    def _forget_stamp(self) -> None:
        self._stamp = None


def _check_ids(message_id: object, correlation_id: object) -> None:
    for what, value in (("message_id", message_id), ("correlation_id", correlation_id)):
        if value is not None and not isinstance(value, str):
            raise TypeError(f"{what} is a str, not {type(value).__name__}: give str(...) of it.")
    if message_id is not None and not message_id:
        raise ValueError("message_id is empty: give one, or None to have one made.")


def _checked_delay(
    delay: float | None,
    at: datetime | None,
    expiration: float | None,
    *,
    now: Callable[[], datetime],
) -> float:
    if delay is None and at is None:
        return 0.0
    seconds = checked_delay(delay, at, now=now())
    if seconds and expiration is not None:
        raise ValueError(
            "a delayed message cannot have an expiration too: it would end the delay. "
            "Leave one of them out.",
        )
    return seconds


def _checked_timeout(timeout: float) -> float:
    check_number("timeout", timeout)
    if not 0 <= timeout < math.inf:
        raise ValueError(f"timeout is {timeout}: it must be a number of seconds, 0 or more.")
    return timeout


def check_connection_options(*, heartbeat: int, connect_timeout: float) -> None:
    """Check what producer and worker hand on to their connections.

    Raises:
        ValueError: A number cannot be right.
    """
    check_number("heartbeat", heartbeat)
    check_number("connect_timeout", connect_timeout)
    if not 1 <= heartbeat <= 3600:  # noqa: PLR2004 - an hour
        raise ValueError(
            f"heartbeat is {heartbeat}: it must be from 1 to 3600 seconds. Without heartbeats a "
            "dead peer is never noticed.",
        )
    if not 0 < connect_timeout < math.inf:
        raise ValueError(f"connect_timeout is {connect_timeout}: it must be more than 0 seconds.")
