"""Waiting until a state has changed, for objects whose state many may watch."""

from __future__ import annotations

import asyncio


class Changes:
    """Wakes everybody who waits, each time something changed.

    ``while not condition(): await changes.wait()`` never misses a change, because nothing can
    happen between the check and the wait.
    """

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        """Wake everybody who waits now."""
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self) -> None:
        """Wait for the next `notify`."""
        await self._event.wait()
