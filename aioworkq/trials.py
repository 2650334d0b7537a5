"""Trials: a message that may kill its process is started alone, so that no other pays for it.

When a process dies, RabbitMQ charges every message that it held, started or not. What is held
beside a message that kills its process again and again would be given up with it. So before the
last attempt that such charges leave, a message is replaced by a copy that is meant for a trial,
and the copy is run while this worker runs nothing else.

That it was started is written down before, in RabbitMQ: there is a queue whose name is made of the
message's, as long as the trial lasts. Charges count no more from then on, for a copy is charged for
many reasons. A copy that comes back and has been started killed its process, and it did so alone.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from typing import TYPE_CHECKING, Final, Protocol

import anyio

from aioworkq.background import to_the_end
from aioworkq.errors import TopologyError, WorkQueueError
from aioworkq.message import TRIAL, raw
from aioworkq.topology import QueueDeclaration

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from datetime import datetime

    from aioworkq.broker import Connection
    from aioworkq.message import Message
    from aioworkq.settle import Unsettled

_log = logging.getLogger("aioworkq")

_PREFIX: Final = "aioworkq.v1.trial"
_FORGOTTEN_AFTER: Final = 7 * 86_400_000
_NOT_FOUND: Final = 404

_LONGEST: Final = 60.0
"""So long others wait for the end of a trial, and a trial for the end of others: a message that
runs for longer does not die at once, and nobody shall wait for hours."""


class Member(Protocol):
    """A consumer of the worker."""

    async def pause(self, *, keep: Unsettled) -> None:
        """Take no more deliveries, and give back what was not started, but for one. Bounded."""
        ...

    async def resume(self) -> None:
        """Take deliveries again. Bounded."""
        ...

    async def wait_idle(self) -> None:
        """Wait until no handler runs."""
        ...


class Trials:
    """The trials of one worker: at most one at a time.

    Args:
        connection: What the marks are made with.
        timeout: Seconds for each of them.
    """

    def __init__(self, connection: Connection, *, timeout: float) -> None:
        self._connection = connection
        self._timeout = timeout
        self._members: list[Member] = []
        self._turn = asyncio.Lock()
        self._last_ended: datetime | None = None
        self._last_took = 0.0
        self._ended: set[str] = set()
        self._is_over = asyncio.Event()
        self._is_over.set()

    def join(self, member: Member) -> None:
        """Add a consumer."""
        self._members.append(member)

    @property
    def is_on(self) -> bool:
        """Whether nothing else may be started now."""
        return not self._is_over.is_set()

    async def wait_over(self) -> None:
        """Wait until others may be started: a trial keeps them for about two minutes at most."""
        await self._is_over.wait()

    async def run_alone(self, message: Unsettled, run: Callable[[], Awaitable[None]]) -> None:
        """Run one message while the worker holds no other.

        Cancelled before it runs, it does not run; afterwards the others go on in any case.

        Args:
            message: What is tried; it stays when the others are given back.
            run: Called when the worker holds nothing else.
        """
        await self._take_turn()
        self._is_over.clear()
        loop = asyncio.get_running_loop()
        began = self._connection.now()
        patience: asyncio.TimerHandle | None = None

        @functools.cache  # it ends once, and is not cancelled half-way: others would stay paused
        def end() -> asyncio.Task[None]:
            return loop.create_task(self._end(began))

        try:
            await to_the_end(self._pause(message))
            with anyio.move_on_after(_LONGEST):
                for member in self._members:
                    await member.wait_idle()
            patience = loop.call_later(_LONGEST, end)
            await run()
        finally:
            if patience is not None:
                patience.cancel()
            await to_the_end(end())

    async def _take_turn(self) -> None:
        """Wait until the others had as much time as the last trial took from them."""
        await self._turn.acquire()
        try:
            if self._last_ended is not None:
                passed = (self._connection.now() - self._last_ended).total_seconds()
                left = self._last_took - max(0.0, passed)  # the time of day may be set back
                if left > 0:
                    await self._connection.sleep(left)
        except BaseException:
            self._turn.release()
            raise

    async def _pause(self, message: Unsettled) -> None:
        await asyncio.gather(*(member.pause(keep=message) for member in self._members))

    async def _end(self, began: datetime) -> None:
        """Let the others go on; what was tried may run still."""
        self._is_over.set()
        self._last_ended = now = self._connection.now()
        # No trial keeps others for longer, whatever the time of day is set to.
        self._last_took = min((now - began).total_seconds(), 2 * _LONGEST)
        try:
            await asyncio.gather(*(member.resume() for member in self._members))
        finally:  # not before they are resumed, however short the trial was
            self._turn.release()

    # Marks

    async def mark(self, message: Message) -> None:
        """Write down that a message is about to be started.

        Raises:
            WorkQueueError: It is not known whether that is done: do not start it.
        """
        mark = QueueDeclaration(_mark(message), {"x-expires": _FORGOTTEN_AFTER})
        await self._connection.declare([mark], timeout=self._timeout)

    async def is_marked(self, message: Message) -> bool:
        """Say whether a message was started before, and did not come to an end.

        Raises:
            WorkQueueError: It cannot be found out.
        """
        mark = _mark(message)
        if mark in self._ended:
            await self._take_away(mark)
            return False
        try:
            await self._connection.count_messages(mark, timeout=self._timeout)
        except TopologyError as exc:
            if exc.code == _NOT_FOUND:
                return False
            raise
        return True

    async def unmark(self, message: Message) -> None:
        """Take the mark away.

        Should this fail, it goes by itself after a week, and only this worker knows better.
        """
        mark = _mark(message)
        self._ended.add(mark)
        try:
            await self._take_away(mark)
        except WorkQueueError as exc:
            _log.warning("The mark of a trial stays for a week: %s", exc)

    async def _take_away(self, mark: str) -> None:
        await self._connection.delete_queue(mark, timeout=self._timeout)
        self._ended.discard(mark)


def _mark(message: Message) -> str:
    """Return the name of the queue that marks a copy for a trial, the same in all its redeliveries.

    Equal messages have trials of their own, each under the number that its copy has.
    """
    import hashlib  # noqa: PLC0415 - takes a millisecond to load, and is seldom needed

    trial = message.headers.get(TRIAL)
    key = trial.encode() if isinstance(trial, str) else raw(message.message_id) or message.body
    return f"{_PREFIX}.{hashlib.sha256(message.queue.encode() + b'.' + key).hexdigest()[:32]}"
