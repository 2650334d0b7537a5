"""The tasks that handlers run in: each delivery has one of its own.

It is never inside anything that dies with a channel, and has a copy of the context that the worker
was started in. It is a task of asyncio, and not one of a task group: starting that costs six times
as much. One task of the worker's group, the guard, stands for all of them, and ends with the last.
"""

from __future__ import annotations

import asyncio
import contextvars
from typing import TYPE_CHECKING, Any

import anyio

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from anyio.abc import TaskGroup


class HandlerTasks:
    """The tasks of one consumer's handlers.

    Args:
        name: What each task is called.
        may_end: Set when no more tasks are to come but those that follow from the ones that run.

    Attributes:
        is_guarded: Whether the guard stands for them: only then a handler may be started.
    """

    def __init__(self, name: str, *, may_end: asyncio.Event) -> None:
        self._name = name
        self._may_end = may_end
        self._context = contextvars.Context()
        self._tasks: dict[asyncio.Task[None], Callable[[], None] | None] = {}
        self._defect: asyncio.Future[None] | None = None
        self._guardian: asyncio.Task[Any] | None = None
        self.is_guarded = False

    @property
    def are_cancelled(self) -> bool:
        """Whether the guard is being cancelled, as it is with all tasks when the loop ends."""
        return self._guardian is not None and self._guardian.cancelling() > 0

    def start(
        self, work: Coroutine[Any, Any, None], if_cancelled: Callable[[], None] | None = None
    ) -> asyncio.Task[None]:
        """Start a task, which takes its first step after this step of the event loop.

        Args:
            work: What it does.
            if_cancelled: Called when it ends by a cancellation, perhaps before its first step:
                then nothing of ``work`` has run, not even what is in its ``finally``.
        """
        # Not by the loop's task factory, which may be eager: this is called between two steps of
        # the loop. Not in the context of who frees a slot: what a handler sets is not for the next.
        task = asyncio.Task(
            work,
            loop=asyncio.get_running_loop(),
            name=self._name,
            context=self._context.copy(),
        )
        self._tasks[task] = if_cancelled
        task.add_done_callback(self._end_of)
        return task

    def _end_of(self, task: asyncio.Task[None]) -> None:
        """Hand on what a task raised: it is no error of a handler, but a defect or an exit."""
        if_cancelled = self._tasks.pop(task)
        if task.cancelled():
            if if_cancelled is not None:
                if_cancelled()
            return
        if (error := task.exception()) is None:
            return
        if self._defect is not None and not self._defect.done():
            self._defect.set_exception(error)

    def guard_in(
        self,
        group: TaskGroup,
        *,
        on_begin: Callable[[], None],
        on_end: Callable[[], None],
    ) -> None:
        """Start the guard, and take over the context of who calls this.

        Args:
            group: Whose end is the handlers' end.
            on_begin: Called when handlers may be started.
            on_end: Called when none may be any more, to cancel those that run.
        """
        self._context = contextvars.copy_context()
        group.start_soon(self._guard, on_begin, on_end)

    async def _guard(self, on_begin: Callable[[], None], on_end: Callable[[], None]) -> None:
        """Stay until the last task has ended; cancelled, cancel them, and still wait for them."""
        self._defect = asyncio.get_running_loop().create_future()
        self._guardian = asyncio.current_task()
        self.is_guarded = True
        try:
            on_begin()
            ending = asyncio.ensure_future(self._wait_ended())
            try:
                await asyncio.wait({ending, self._defect}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                ending.cancel()
            if self._defect.done():
                self._defect.result()
        finally:
            self.is_guarded = False
            on_end()
            with anyio.CancelScope(shield=True):
                while self._tasks:
                    await asyncio.wait(self._tasks)

    async def _wait_ended(self) -> None:
        await self._may_end.wait()
        while self._tasks:
            await asyncio.wait(self._tasks)
