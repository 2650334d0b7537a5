"""Work that goes on beside other code of the event loop, and work that must come to its end."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, Protocol

import anyio

from aioworkq.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Coroutine


class Runnable(Protocol):
    """What can run in the background: a worker."""

    async def run(self) -> None:
        """Run until `stop`."""
        ...

    def stop(self, *, grace: float | None = None) -> None:
        """Begin to stop."""
        ...

    async def wait_ready(self, timeout: float | None = None) -> None:
        """Wait until it does what it is for."""
        ...


class Background:
    """A worker that runs beside the body of ``async with worker:``.

    It is a plain task, not a task group of the body, so that enter and exit may happen in different
    tasks (as in fixtures of test frameworks). Like a task group, it cancels the body when the
    worker fails: nobody goes on beside a worker that is dead.
    """

    def __init__(self, worker: Runnable) -> None:
        self._worker = worker
        self._host = asyncio.current_task()
        self._cancellations = self._host.cancelling() if self._host is not None else 0
        self._task: asyncio.Task[None] | None = None
        self._is_body = False
        self._cancelled_body = False

    async def start(self, *, timeout: float) -> None:
        """Start the worker, and wait until it is ready.

        Raises:
            WorkQueueError: It failed, or is not ready within ``timeout`` seconds; then it ended.
        """
        worker = self._worker
        task = asyncio.get_running_loop().create_task(worker.run(), name="aioworkq worker")
        self._task = task
        try:
            ready = asyncio.ensure_future(worker.wait_ready(timeout))
            try:
                await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
                if task.done():
                    task.result()
                if ready.done():
                    ready.result()
            finally:
                ready.cancel()
                await asyncio.wait({ready})
                if not ready.cancelled():
                    ready.exception()
        except BaseException:
            worker.stop(grace=0)
            await self._wait()
            raise
        self._is_body = True
        task.add_done_callback(self._on_done)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        failed = task.cancelled() or task.exception() is not None
        if failed and self._is_body and self._host is not None and not self._host.done():
            self._cancelled_body = True
            self._host.cancel()

    async def finish(self, body_error: BaseException | None) -> None:
        """Stop the worker and wait for its end.

        Raises:
            WorkQueueError: Its error, unless the body raised one of its own. `StateError` if its
                task was cancelled, and the body was not.
        """
        self._is_body = False
        self._worker.stop()
        await self._wait()
        is_ours = False
        if self._cancelled_body and self._host is not None:
            # The body may have been cancelled by others too: that goes before.
            is_ours = self._host.uncancel() <= self._cancellations
        task = self._task
        if task is None:
            return
        error = task.exception() if not task.cancelled() else self._was_cancelled()
        if error is not None and (
            body_error is None or (is_ours and isinstance(body_error, asyncio.CancelledError))
        ):
            raise error

    def _was_cancelled(self) -> StateError:
        return StateError(
            "the worker ended",
            reason="somebody cancelled its task",
            advice="Call its stop(), and leave the task named 'aioworkq worker' alone.",
        )

    async def _wait(self) -> None:
        """Wait for the worker's end; a cancellation of the caller stops it at once."""
        task = self._task
        if task is None:
            return
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            self._worker.stop(grace=0)
            with contextlib.suppress(Exception):  # being cancelled goes before the worker's error
                await to_the_end(task)
            raise
        finally:
            if task.done() and not task.cancelled():
                task.exception()


async def to_the_end(work: Coroutine[Any, Any, object] | asyncio.Task[Any]) -> None:
    """Wait for bounded work that must not be left half done, however often we are cancelled.

    AnyIO's shield keeps its own cancellations away, and not those of `asyncio.Task.cancel`.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):
        while not task.done():
            try:
                await asyncio.wait({task})
            except asyncio.CancelledError as exc:
                cancelled = exc
    if cancelled is not None:
        raise cancelled
    if not task.cancelled():
        task.result()
