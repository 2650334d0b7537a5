"""Bytes of one channel to the connection's writer: once per step of the event loop, bounded."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from aiormq.abc import ChannelFrame

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiormq.abc import AbstractChannel


class TickWriter:
    """Collects what a channel has to say and writes it in one piece.

    At most one piece is under way at a time, and the next one waits until the socket took it, so
    that a stalled peer leaves the bytes with us, where they are bounded, and heartbeats are not
    stuck behind them. aiormq's write queue holds ten pieces of all channels; a caller that blocks
    in its ``put`` when the connection dies is never woken. So the piece is put without waiting,
    and when there is no room by a task which `close` cancels. Nothing is written once the tap has
    seen that the broker closed the channel: RabbitMQ would close the connection for it.

    Args:
        channel: The channel whose connection is written to.
        produce: Returns what is to be written now; empty when there is nothing.
    """

    def __init__(self, channel: AbstractChannel, produce: Callable[[], bytes]) -> None:
        self._loop = asyncio.get_running_loop()
        self._channel = channel
        self._queue: asyncio.Queue[Any] = getattr(channel, "write_queue")  # noqa: B009 - not in the ABC
        self._produce = produce
        self._scheduled = False
        self._in_flight: asyncio.Future[None] | None = None
        self._blocked_put: asyncio.Task[None] | None = None
        self._idle_waiters: list[asyncio.Future[None]] = []
        self._closed = False

    def wake(self) -> None:
        """Say that there is something to write; it goes out at the loop's next step."""
        if not self._scheduled and self._in_flight is None and not self._closed:
            self._scheduled = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._scheduled = False
        if self._closed or self._in_flight is not None or self._has_close:
            return
        payload = self._produce()
        if not payload:
            self._release_waiters()
            return
        written: asyncio.Future[None] = self._loop.create_future()
        self._in_flight = written
        frame = ChannelFrame(payload=payload, should_close=False, drain_future=written)
        try:
            self._queue.put_nowait(frame)
        except asyncio.QueueFull:
            self._blocked_put = self._loop.create_task(self._queue.put(frame))
        written.add_done_callback(self._written)

    @property
    def _has_close(self) -> bool:
        return getattr(getattr(self._channel, "frames", None), "has_close", False)

    def _written(self, _: asyncio.Future[None]) -> None:
        self._in_flight = None
        self._blocked_put = None
        self._flush()

    def _release_waiters(self) -> None:
        waiters, self._idle_waiters = self._idle_waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def wait_idle(self) -> None:
        """Wait until all is written, or until `close`."""
        if self._closed or not (self._scheduled or self._in_flight is not None):
            return
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._idle_waiters.append(waiter)
        await waiter

    def close(self) -> None:
        """Give up: what is not written never will be."""
        self._closed = True
        if self._blocked_put is not None:
            self._blocked_put.cancel()
        if self._in_flight is not None and not self._in_flight.done():
            self._in_flight.cancel()
        self._release_waiters()
