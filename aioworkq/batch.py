"""Many messages under way at once: the window of `Producer.publish_many`, and its report."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from aioworkq.errors import UnroutableError, WorkQueueError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from aioworkq.message import Message
    from aioworkq.outbox import Outbox
    from aioworkq.producer import Producer
    from aioworkq.topology import Queue

T = TypeVar("T")

_log = logging.getLogger("aioworkq")


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
    """The messages of one `Producer.publish_many` that are under way."""

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
        self._under_way = 0
        self._wanted_room = 0
        self._has_room = asyncio.Event()
        self._again: list[tuple[int, Message, float]] = []

    def fail(self, error: Exception) -> None:
        """Note that the next message cannot be sent."""
        self._report.errors[self._position] = error.with_traceback(None)
        self._position += 1

    async def submit(self, message: Message) -> None:
        """Hand one message to the outbox."""
        if self._delay:
            await self._producer.send_off(message, self._delay, timeout=self._timeout)
        wire = self._outbox.connection.prepare(message)
        position = self._position
        self._position += 1
        self._send(position, message, wire, self._loop.time() + self._timeout, again=False)

    def _send(
        self,
        position: int,
        message: Message,
        wire: Any,
        deadline: float,
        *,
        again: bool,
    ) -> None:
        def done(error: WorkQueueError | None) -> None:
            self._under_way -= 1
            if error is None:
                self._report.confirmed += 1
            elif isinstance(error, UnroutableError) and self._can_declare and not again:
                self._again.append((position, message, deadline))
            else:
                self._report.errors[position] = error
            if self._under_way <= self._wanted_room:
                self._has_room.set()

        self._under_way += 1
        self._outbox.submit(message, wire, deadline=deadline, done=done)

    async def wait_room(self) -> None:
        """Wait until another message may be under way."""
        if self._again:
            await self._publish_again()
        if self._under_way >= self._outbox.window:
            # Half a window at a time: waking up for every single confirm costs more than it gains.
            await self._wait_under_way(self._outbox.window // 2)

    async def wait_done(self) -> None:
        """Wait until every message has its outcome; each has a deadline."""
        await self._wait_under_way(0)
        while self._again:
            await self._publish_again()
            await self._wait_under_way(0)

    async def _wait_under_way(self, number: int) -> None:
        self._wanted_room = number
        while self._under_way > number:
            self._has_room.clear()
            await self._has_room.wait()

    async def _publish_again(self) -> None:
        """Publish what was returned because a queue had been deleted, after declaring it anew."""
        again, self._again = self._again, []
        for position, message, deadline in again:
            try:
                await self._producer.make_way_again(
                    self._queue,
                    deadline,
                    message=message,
                    delay=self._delay,
                )
            except WorkQueueError as exc:
                self._report.errors[position] = exc
                continue
            wire = self._outbox.connection.prepare(message)
            self._send(position, message, wire, deadline, again=True)

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


async def each(bodies: Iterable[T] | AsyncIterable[T]) -> AsyncIterator[T]:
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
