"""Many messages under way at once: the window of `Producer.publish_many`, and its report."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterable, Iterable
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from aioworkq.errors import UnroutableError, WorkQueueError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator
    from types import TracebackType

    from aioworkq.message import Message
    from aioworkq.outbox import Outbox, Publication
    from aioworkq.producer import Producer
    from aioworkq.topology import Queue

T = TypeVar("T")

_log = logging.getLogger("aioworkq")

_BREATH: Final = 100


class PublishReport:
    """What became of each message of a `Producer.publish_many`.

    Attributes:
        confirmed: How many messages RabbitMQ took responsibility for.
        errors: The error of each message that failed, by its position in the iterable, from 0.
    """

    def __init__(self) -> None:
        self.confirmed = 0
        self.errors: dict[int, Exception] = {}

    def __len__(self) -> int:
        return self.confirmed + len(self.errors)

    def __getitem__(self, position: int) -> Exception | None:
        """Return the error of one message, None if it was confirmed."""
        if not 0 <= position < len(self):
            raise IndexError(f"there are {len(self)} messages, numbered from 0.")
        return self.errors.get(position)

    def __iter__(self) -> Iterator[Exception | None]:
        return (self.errors.get(position) for position in range(len(self)))

    @property
    def failed(self) -> int:
        """How many messages failed."""
        return len(self.errors)

    def raise_for_errors(self) -> None:
        """Raise the error of the first message that failed, if any did."""
        if self.errors:
            raise self.errors[min(self.errors)]

    def __repr__(self) -> str:
        return f"<PublishReport: {self.confirmed} confirmed, {self.failed} failed>"


class Batch:
    """The messages of one `Producer.publish_many` that are under way.

    Leave it, as a context manager, in any way: it waits for the outcomes, unless it is left by a
    cancellation, which takes back what was not sent yet.
    """

    def __init__(
        self,
        producer: Producer,
        outbox: Outbox,
        queue: Queue[Any],
        *,
        delay: float,
        timeout: float,
    ) -> None:
        self._producer = producer
        self._outbox = outbox
        self._queue = queue
        self._delay = delay
        self._timeout = timeout
        self._loop = asyncio.get_running_loop()
        self._report = PublishReport()
        self._can_declare = queue.declare or delay > 0
        self._position = 0
        self._under_way: dict[int, Publication | None] = {}
        self._bytes_under_way = 0
        self._wanted_room = 0
        self._has_room = asyncio.Event()
        self._again: list[tuple[int, Message, float]] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if exc_value is None or isinstance(exc_value, Exception):
                await self._wait_under_way(0)
        finally:
            for publication in self._under_way.values():
                if publication is not None:
                    self._outbox.take_back(publication)

    def fail(self, error: Exception) -> None:
        """Note that the next message cannot be sent."""
        self._report.errors[self._position] = error.with_traceback(None)
        self._position += 1

    async def submit(self, message: Message) -> None:
        """Hand one message to the outbox."""
        deadline = self._loop.time() + self._timeout
        if self._delay:
            try:
                await self._make_way(message, deadline)
            except WorkQueueError as exc:
                self.fail(exc)
                return
        wire = self._outbox.connection.prepare(message)
        position = self._position
        self._position += 1
        self._under_way[position] = None
        self._bytes_under_way += len(message.body)
        self._send(position, message, wire, deadline, again=False)

    def _send(
        self,
        position: int,
        message: Message,
        wire: Any,
        deadline: float,
        *,
        again: bool,
    ) -> None:
        done = functools.partial(self._done, position, message, None if again else deadline)
        publication = self._outbox.submit(message, wire, deadline=deadline, done=done)
        if not publication.is_resolved:
            self._under_way[position] = publication

    def _done(
        self,
        position: int,
        message: Message,
        deadline: float | None,
        error: WorkQueueError | None,
    ) -> None:
        """Take the outcome of a message; with a deadline it may be published once more."""
        if deadline is not None and self._can_declare and isinstance(error, UnroutableError):
            self._under_way[position] = None
            self._again.append((position, message, deadline))
            self._has_room.set()
        else:
            self._settle(position, message, error)

    def _settle(self, position: int, message: Message, error: WorkQueueError | None) -> None:
        del self._under_way[position]
        self._bytes_under_way -= len(message.body)
        if error is None:
            self._report.confirmed += 1
        else:
            self._report.errors[position] = error.with_traceback(None)
        if len(self._under_way) <= self._wanted_room:
            self._has_room.set()

    async def wait_room(self) -> None:
        """Wait until another message may be under way."""
        window, window_bytes = self._outbox.window, self._outbox.window_bytes
        if self._position % _BREATH == 0:
            await asyncio.sleep(0)  # where nothing ever waits, other tasks get their turn
        if len(self._under_way) >= window:
            # Half a window at a time: waking up for every single confirm costs more than it gains.
            await self._wait_under_way(window // 2)
        while self._bytes_under_way >= window_bytes:
            await self._wait_under_way(len(self._under_way) - 1)
        if self._again:
            await self._publish_again()

    async def _wait_under_way(self, number: int) -> None:
        self._wanted_room = number
        while len(self._under_way) > number:
            if self._again:
                await self._publish_again()
                continue
            self._has_room.clear()
            await self._has_room.wait()

    async def _publish_again(self) -> None:
        """Publish what was returned because a queue had been deleted, after declaring it anew."""
        again, self._again = self._again, []
        self._producer.forget(self._queue)
        for position, message, deadline in again:
            try:
                await self._make_way(message, deadline)
            except WorkQueueError as exc:
                self._settle(position, message, exc)
                continue
            wire = self._outbox.connection.prepare(message)
            self._send(position, message, wire, deadline, again=True)

    async def _make_way(self, message: Message, deadline: float) -> None:
        with self._outbox.expecting():
            await self._producer.make_way(
                self._queue,
                deadline,
                message=message,
                delay=self._delay,
            )

    def finish(self) -> PublishReport:
        """Return the report; failures are logged, so that nobody has to look to hear of them."""
        report = self._report
        if report.errors:
            first = min(report.errors)
            _log.warning(
                "%d of %d messages to queue %r failed, the first (number %d): %s",
                report.failed,
                len(report),
                self._queue.name,
                first,
                report.errors[first],
            )
        return report


async def each(bodies: Iterable[T] | AsyncIterable[T]) -> AsyncGenerator[T]:
    """Iterate over either kind of iterable.

    Raises:
        TypeError: It is neither, or a single body.
    """
    if isinstance(bodies, AsyncIterable):
        async for body in bodies:
            yield body
        return
    if isinstance(bodies, str | bytes) or not isinstance(bodies, Iterable):
        raise TypeError(f"bodies must be an iterable of bodies, not {type(bodies).__name__}.")
    for body in bodies:
        yield body
