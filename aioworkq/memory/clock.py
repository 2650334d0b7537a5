"""Time for the memory broker: timers in order, driven by the real clock or by hand.

Nothing here waits. A real clock borrows one timer of the event loop that the broker serves; a
virtual one stands still until `Clock.step`.
"""

from __future__ import annotations

import heapq
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

_RESOLUTION: Final = 1e-6
"""Seconds. Sums of delays differ from each other by less when they mean the same moment."""


class Timer:
    """A call at a point in time."""

    __slots__ = ("_callback", "_number", "is_pause", "when")

    def __init__(
        self,
        when: float,
        number: int,
        callback: Callable[[], None],
        *,
        is_pause: bool,
    ) -> None:
        self.when = when
        self.is_pause = is_pause
        self._number = number
        self._callback: Callable[[], None] | None = callback

    def __lt__(self, other: Timer) -> bool:
        return (self.when, self._number) < (other.when, other._number)

    @property
    def is_over(self) -> bool:
        """Whether it was called or cancelled."""
        return self._callback is None

    def cancel(self) -> None:
        """Never call it. Twice harmless."""
        self._callback = None

    def fire(self) -> None:
        """Call it, if that is still due."""
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()


class Clock:
    """The broker's time, in seconds since the epoch.

    Args:
        is_virtual: Whether time passes only when `step` is told so.
        after_firing: Called when timers of a real clock have fired.
    """

    def __init__(
        self,
        *,
        is_virtual: bool,
        after_firing: Callable[[], None] = lambda: None,
    ) -> None:
        self.is_virtual = is_virtual
        self.after_firing = after_firing
        self._began = time.time()
        self._began_monotonic = time.monotonic()
        self._virtual = 0.0
        self._timers: list[Timer] = []
        self._count = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._handle: asyncio.TimerHandle | None = None

    def time(self) -> float:
        """Return the seconds since the epoch. They never go backwards."""
        if self.is_virtual:
            return self._began + self._virtual
        return self._began + (time.monotonic() - self._began_monotonic)

    def now(self) -> datetime:
        """Return the time, aware, in UTC."""
        return datetime.fromtimestamp(self.time(), UTC)

    def bind(self, loop: asyncio.AbstractEventLoop | None) -> None:
        """Use the timers of this event loop from now on."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        self._loop = loop
        self._arm()

    def call_at(
        self,
        when: float,
        callback: Callable[[], None],
        *,
        is_pause: bool = False,
    ) -> Timer:
        """Call a function at a time; those of the same time in the order they were asked for.

        ``is_pause`` marks that a client waits, not a message.
        """
        self._count += 1
        timer = Timer(when, self._count, callback, is_pause=is_pause)
        heapq.heappush(self._timers, timer)
        if self._timers[0] is timer:
            self._arm()
        return timer

    def forget_pauses(self) -> None:
        """Let nobody wait any more: the event loop of those who did has ended."""
        for timer in self._timers:
            if timer.is_pause:
                timer.cancel()

    def next_due(self) -> float | None:
        """Return when the next timer is due; None if there is none."""
        while self._timers and self._timers[0].is_over:
            heapq.heappop(self._timers)
        return self._timers[0].when if self._timers else None

    def next_pause(self) -> float | None:
        """Return when the next pause of a client ends; None if there is none."""
        return min(
            (timer.when for timer in self._timers if timer.is_pause and not timer.is_over),
            default=None,
        )

    def step(self, target: float) -> bool:
        """Go on to the next timer that is due until ``target``, and call all that are due with it.

        Returns:
            Whether there was one; if not, the time is ``target`` now.
        """
        due = self.next_due()
        if due is None or due > target + _RESOLUTION:
            self._go_to(target)
            return False
        self._go_to(due)
        self._fire(due)
        return True

    def _go_to(self, moment: float) -> None:
        self._virtual = max(self._virtual, moment - self._began)

    def _fire(self, until: float) -> None:
        while (due := self.next_due()) is not None and due <= until + _RESOLUTION:
            heapq.heappop(self._timers).fire()

    def _arm(self) -> None:
        """Have the event loop call us when the first timer is due."""
        if self.is_virtual or self._loop is None or self._loop.is_closed():
            return
        due = self.next_due()
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        if due is not None:
            self._handle = self._loop.call_later(max(0.0, due - self.time()), self._on_due)

    def _on_due(self) -> None:
        self._handle = None
        self._fire(self.time())
        self._arm()
        self.after_firing()
