"""Knowing that an event loop has nothing left to do but wait."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from aioworkq.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Callable

_QUIET_TURNS: Final = 16
"""On a loop that does not show what it has to do, so many turns without a task that can go on. A
turn passes one call on to the next; chains of calls between futures are far shorter than this."""

_MAX_TURNS: Final = 200_000


async def wait_at_rest(is_idle: Callable[[], bool]) -> None:
    """Give way until nothing in this event loop can go on without time, a thread or a socket.

    Between two turns of asyncio's own loop, ``_ready`` holds everything that can go on: when it is
    empty, the loop would sleep now. Other loops (uvloop) hide theirs; there every task is asked
    whether it waits.

    Args:
        is_idle: Whether the broker has nothing to do.

    Raises:
        StateError: That never comes.
    """
    loop = asyncio.get_running_loop()
    ready: object = getattr(loop, "_ready", None)
    quiet = 0
    for _ in range(_MAX_TURNS):
        await asyncio.sleep(0)
        if not is_idle():
            quiet = 0
        elif isinstance(ready, deque):
            if not ready:
                return
        else:
            quiet = quiet + 1 if _all_wait() else 0
            if quiet >= _QUIET_TURNS:
                return
    raise StateError(
        "the event loop does not come to rest",
        reason="something in it goes on and on without waiting",
        advice="Let it wait for an event, or for time; `await asyncio.sleep(0)` is no waiting.",
    )


def _all_wait() -> bool:
    """Say whether every other task waits for a future that is not done."""
    current = asyncio.current_task()
    return all(task is current or _waits(task) for task in asyncio.all_tasks())


def _waits(task: asyncio.Task[Any]) -> bool:
    future: asyncio.Future[Any] | None = getattr(task, "_fut_waiter", None)
    return future is not None and not future.done()
