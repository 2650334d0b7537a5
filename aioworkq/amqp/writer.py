"""What a channel has to say, once per step of the event loop, bounded."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from aioworkq.amqp.reader import Tap
    from aioworkq.amqp.transport import Link

_log = logging.getLogger("aioworkq")


class Writer(Protocol):
    """Has something sent soon."""

    def wake(self) -> None:
        """Say that there is something to send; it goes out at the loop's next step."""
        ...

    def push(self) -> None:
        """Say, after `wake`, that there is so much that it shall go out now, if it can."""
        ...

    async def wait_idle(self) -> None:
        """Wait until all is sent, or until `close`."""
        ...

    def close(self) -> None:
        """Give up: what is not sent never will be."""
        ...


class TickWriter:
    """Collects the frames of a channel and writes them in one piece.

    While the socket is full nothing is written, so that a stalled peer leaves the bytes with us,
    where they are bounded, and heartbeats are not stuck behind them. Nor is anything once the tap
    has seen that the broker closed the channel: RabbitMQ would close the connection for it.

    Args:
        link: Where to write.
        tap: The channel's.
        produce: Returns what is to be written now; empty when there is nothing.
    """

    def __init__(self, link: Link, tap: Tap, produce: Callable[[], bytes]) -> None:
        self._loop = asyncio.get_running_loop()
        self._link = link
        self._tap = tap
        self._produce = produce
        self._is_awake = False
        self._idle_waiters: list[asyncio.Future[None]] = []
        self._closed = False

    def wake(self) -> None:
        """Say that there is something to send; it goes out at the loop's next step."""
        if not self._is_awake and not self._closed:
            self._is_awake = True
            self._loop.call_soon(self._flush)

    def push(self) -> None:
        """Write what there is, if the socket takes it; otherwise it goes out as after `wake`."""
        if not (self._closed or self._tap.has_close or self._link.is_full):
            self._link.write(self._produce())

    def _flush(self) -> None:
        if self._closed or self._tap.has_close:
            return
        if self._link.is_full:
            self._link.when_resumed(self._flush)
            return
        self._is_awake = False
        payload = self._produce()
        if payload:
            self._link.write(payload)
        _release(self._idle_waiters)

    async def wait_idle(self) -> None:
        """Wait until all is sent, or until `close`."""
        if self._is_awake and not self._closed:
            waiter: asyncio.Future[None] = self._loop.create_future()
            self._idle_waiters.append(waiter)
            await waiter

    def close(self) -> None:
        """Give up: what is not sent never will be."""
        self._closed = True
        _release(self._idle_waiters)


class CallWriter:
    """Makes documented calls of aiormq, in order, in a task that lives while there is something.

    Args:
        produce: Returns the calls to be made now; none when there is nothing.
        on_failure: Called with the error of a call. No further ones are made: what they were about
            is on a channel that cannot be relied upon.
    """

    def __init__(
        self,
        produce: Callable[[], Iterable[Callable[[], Awaitable[None]]]],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._produce = produce
        self._on_failure = on_failure
        self._task: asyncio.Task[None] | None = None
        self._idle_waiters: list[asyncio.Future[None]] = []
        self._closed = False

    def wake(self) -> None:
        """Say that there is something to send; it goes out at the loop's next step."""
        if self._task is None and not self._closed:
            self._task = asyncio.get_running_loop().create_task(self._run())

    def push(self) -> None:
        """Do nothing: the calls are made one after the other anyway."""

    async def _run(self) -> None:
        try:
            while not self._closed and (calls := list(self._produce())):
                for call in calls:
                    await call()
        except BaseException as exc:  # nearly always because the channel has ended
            if not self._closed:
                _log.debug("A channel ended before all was sent: %r", exc)
                self._closed = True
                self._on_failure(exc)
            if not isinstance(exc, Exception):
                raise
        finally:
            self._task = None
            _release(self._idle_waiters)

    async def wait_idle(self) -> None:
        """Wait until all is sent, or until `close`."""
        if self._task is not None and not self._closed:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._idle_waiters.append(waiter)
            await waiter

    def close(self) -> None:
        """Give up: what is not sent never will be."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
        _release(self._idle_waiters)


def _release(waiters: list[asyncio.Future[None]]) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)
    waiters.clear()
