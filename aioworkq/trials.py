"""Trials: a message that may kill its process is started alone, so that no other pays for it.

When a process dies, RabbitMQ charges every message that it held, started or not. What is held
beside a message that kills its process again and again would be given up with it. So before the
last attempt that such charges leave, a message is replaced by a copy that is marked for a trial,
and the copy is run while this worker holds nothing else. If the process dies then, it is clear
which message did it.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, Protocol

import anyio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aioworkq.settle import Unsettled

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
    """The trials of one worker: at most one at a time."""

    def __init__(self) -> None:
        self._members: list[Member] = []
        self._turn = asyncio.Lock()
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
        """Wait until others may be started. Bounded."""
        await self._is_over.wait()

    async def run_alone(self, message: Unsettled, run: Callable[[], Awaitable[None]]) -> None:
        """Run one message while the worker holds no other.

        Cancelled before it runs, it does not run; afterwards the others go on in any case.

        Args:
            message: What is tried; it stays when the others are given back.
            run: Called when the worker holds nothing else.
        """
        async with self._turn:
            self._is_over.clear()
            patience: asyncio.Task[None] | None = None
            try:
                await asyncio.gather(*(member.pause(keep=message) for member in self._members))
                with anyio.move_on_after(_LONGEST):
                    for member in self._members:
                        await member.wait_idle()
                patience = asyncio.get_running_loop().create_task(self._lose_patience())
                await run()
            finally:
                if patience is not None:
                    patience.cancel()
                with anyio.CancelScope(shield=True):
                    await self._end()

    async def _lose_patience(self) -> None:
        await asyncio.sleep(_LONGEST)
        await self._end()

    async def _end(self) -> None:
        if self.is_on:
            self._is_over.set()
            await asyncio.gather(*(member.resume() for member in self._members))
