"""Many messages under way at once: the window of `Producer.publish_many`, and its report."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, Generic, Self, TypeVar

from aioworkq.errors import ConnectionLostError, UnroutableError, WorkQueueError
from aioworkq.outbox import Publication

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime
    from types import TracebackType

    from aioworkq.message import Message
    from aioworkq.outbox import Outbox
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


class _Member(Publication, eq=False, kw_only=True):
    """A publication of a batch.

    Attributes:
        batch: Its batch.
        position: The position of its body in the iterable.
        is_second: Whether it was published before, and returned.
    """

    batch: Batch[Any]
    position: int
    is_second: bool

    def done(self, error: WorkQueueError | None) -> None:
        """Tell the batch."""
        self.batch.done(self, error)


class Batch(Generic[T]):
    """The messages of one `Producer.publish_many`.

    Leave it, as a context manager, in any way: it waits for the outcomes, unless it is left by a
    cancellation, which takes back what was not sent yet.

    Args:
        producer: Declares queues, and says whether it was closed meanwhile.
        outbox: Where the messages are published.
        queue: Where they shall go.
        message_of: Makes a message of a body.
        delay: Seconds that each message waits in the broker first.
        at: When they shall arrive: then the delay of those that come later is shorter.
        timeout: Seconds that each message has.

    Attributes:
        report: What became of the messages so far. Failures are logged, too, when it is left.
    """

    def __init__(
        self,
        producer: Producer,
        outbox: Outbox,
        queue: Queue[T],
        message_of: Callable[[T], Message],
        *,
        delay: float,
        at: datetime | None,
        timeout: float,
    ) -> None:
        self._producer = producer
        self._outbox = outbox
        self._queue = queue
        self._message_of = message_of
        self._delay = delay
        self._at = at
        self._timeout = timeout
        self._loop = asyncio.get_running_loop()
        self.report = PublishReport()
        self._can_declare = queue.declare or delay > 0
        self._position = 0
        self._under_way: dict[int, _Member] = {}
        self._bytes_under_way = 0
        self._wanted_room = 0
        self._has_room = asyncio.Event()
        self._again: deque[tuple[_Member, UnroutableError]] = deque()
        self._publishing_again: asyncio.Task[None] | None = None
        self._unreachable: ConnectionLostError | None = None
        self._left_unreachable = 0

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
            if self._publishing_again is not None:
                self._publishing_again.cancel()
            for member in self._under_way.values():
                self._outbox.take_back(member)
            self._log_failures()

    async def publish(self, bodies: Iterable[T] | AsyncIterable[T]) -> None:
        """Publish each body; return when the last one is under way.

        Raises:
            TypeError: It is no iterable, or a single body.
            StateError: The producer is closed meanwhile.
            Exception: What the iterable raises.
        """
        if isinstance(bodies, AsyncIterable):
            async for body in bodies:
                await self._publish_next(body)
            return
        is_one = isinstance(bodies, str | bytes | bytearray | memoryview | Mapping)
        if is_one or not isinstance(bodies, Iterable):
            raise TypeError(f"bodies must be an iterable of bodies, not {type(bodies).__name__}.")
        for body in bodies:
            if self._must_wait():
                await self._publish_next(body)
            else:
                self._submit_body(body)

    def _must_wait(self) -> bool:
        return (
            self._position % _BREATH == 0
            or self._delay > 0
            or len(self._under_way) >= self._outbox.window
            or self._bytes_under_way >= self._outbox.window_bytes
            or self._publishing_again is not None
        )

    async def _publish_next(self, body: T) -> None:
        await self._wait_room()
        self._producer.check_running()
        if not self._delay:
            self._submit_body(body)
            return
        if self._is_unreachable():
            return
        try:
            message = self._message_of(body)
            deadline = self._loop.time() + self._timeout
            await self._make_way(message, deadline)
            wire = self._outbox.connection.prepare(message)
        except (TypeError, ValueError, WorkQueueError) as exc:
            self._fail(exc)
            if isinstance(exc, ConnectionLostError):
                # Those of the same window would have waited as long, all at the same time.
                self._unreachable = exc
                self._left_unreachable = self._outbox.window - 1
        else:
            self._unreachable = None
            self._submit_next(message, wire, deadline)

    def _is_unreachable(self) -> bool:
        """Whether the next body fails as the last one did, without waiting once more."""
        lost = self._unreachable
        if lost is None or not self._left_unreachable or self._outbox.connection.is_connected:
            return False
        self._left_unreachable -= 1
        self._fail(type(lost)(lost.what, reason=lost.reason))
        return True

    def _submit_body(self, body: T) -> None:
        try:
            message = self._message_of(body)
            wire = self._outbox.connection.prepare(message)
        except (TypeError, ValueError) as exc:
            self._fail(exc)
        else:
            self._submit_next(message, wire, self._loop.time() + self._timeout)

    def _submit_next(self, message: Message, wire: Any, deadline: float) -> None:
        position = self._position
        self._position += 1
        self._bytes_under_way += len(message.body)
        self._submit(position, message, wire, deadline)

    def _fail(self, error: Exception) -> None:
        """Note that the next message cannot be sent."""
        self.report.errors[self._position] = _without_frames(error)
        self._position += 1

    def _submit(
        self,
        position: int,
        message: Message,
        wire: Any,
        deadline: float,
        *,
        is_second: bool = False,
        maybe_stored: bool = False,
    ) -> None:
        """Hand one message to the outbox."""
        self._under_way[position] = member = _Member(
            self._outbox,
            message,
            wire,
            deadline,
            len(message.body),
            batch=self,
            position=position,
            is_second=is_second,
            maybe_stored=maybe_stored,
        )
        self._outbox.submit(member)

    def done(self, member: _Member, error: WorkQueueError | None) -> None:
        """Take the outcome of a message, which may be published once more."""
        if error is None:
            self.report.confirmed += 1
            self._leave(member)
        elif isinstance(error, UnroutableError) and self._can_declare and not member.is_second:
            self._again.append((member, error))
            if self._publishing_again is None:
                self._begin_again()
        else:
            self._give_up(member, error)

    def _give_up(self, member: _Member, error: Exception) -> None:
        truth = self._outbox.truth(member, error)
        self.report.errors[member.position] = _without_frames(truth)
        self._leave(member)

    def _leave(self, member: _Member) -> None:
        del self._under_way[member.position]
        self._bytes_under_way -= member.size
        if len(self._under_way) <= self._wanted_room:
            self._has_room.set()

    async def _wait_room(self) -> None:
        """Wait until another message may be under way."""
        window, window_bytes = self._outbox.window, self._outbox.window_bytes
        if self._position % _BREATH == 0:
            await asyncio.sleep(0)  # where nothing ever waits, other tasks get their turn
        if len(self._under_way) >= window:
            # Half a window at a time: waking up for every single confirm costs more than it gains.
            await self._wait_under_way(window // 2)
        while self._bytes_under_way >= window_bytes:
            await self._wait_under_way(len(self._under_way) - 1)
        if self._publishing_again is not None:  # the queue does not exist yet
            await asyncio.wait({self._publishing_again})

    async def _wait_under_way(self, number: int) -> None:
        self._wanted_room = number
        while len(self._under_way) > number:
            self._has_room.clear()
            await self._has_room.wait()

    def _begin_again(self) -> None:
        """See to it that what was returned is published again, before the next body comes."""
        work = self._publish_again()
        self._publishing_again = self._loop.create_task(work, name="aioworkq declares")
        self._publishing_again.add_done_callback(self._end_again)

    def _end_again(self, task: asyncio.Task[None]) -> None:
        self._publishing_again = None
        if task.cancelled() or task.exception() is not None:  # cancelled perhaps before it began
            while self._again:
                self._give_up(*self._again.popleft())
        elif self._again:
            self._begin_again()

    async def _publish_again(self) -> None:
        """Publish what was returned because a queue had been deleted, after declaring it anew."""
        with self._outbox.expecting():
            while self._again:
                self._producer.forget(self._queue)
                for _ in range(len(self._again)):
                    await self._publish_second(self._again[0][0])
                    self._again.popleft()

    async def _publish_second(self, member: _Member) -> None:
        message = member.message
        try:
            await self._make_way(message, member.deadline)
            wire = self._outbox.connection.prepare(message)
        except Exception as exc:  # a defect, too: somebody waits for each of them
            self._give_up(member, exc)
            return
        self._submit(
            member.position,
            message,
            wire,
            member.deadline,
            is_second=True,
            maybe_stored=member.was_unanswered,
        )

    async def _make_way(self, message: Message, deadline: float) -> None:
        delay = self._delay if self._at is None else self._producer.seconds_until(self._at)
        if not delay:  # not through the delay queues any more
            message.exchange, message.routing_key = "", self._queue.name
        with self._outbox.expecting():
            await self._producer.make_way(self._queue, deadline, message=message, delay=delay)

    def _log_failures(self) -> None:
        """Log that some failed, so that nobody has to look at the report to hear of it."""
        report = self.report
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


def _without_frames(error: Exception) -> Exception:
    """Take the frames off an error and off what it came from, for they hold the body."""
    chain: list[BaseException] = [error]
    for link in chain:
        link.__traceback__ = None
        origins = (link.__cause__, link.__context__)
        chain += [one for one in origins if one is not None and one not in chain]
    return error
