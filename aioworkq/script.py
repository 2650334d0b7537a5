"""Running a worker as a script: signals, and the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import threading
from typing import TYPE_CHECKING, Final

import anyio

if TYPE_CHECKING:
    from collections.abc import Generator

    from aioworkq.worker import Worker

_log = logging.getLogger("aioworkq")

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


def run(worker: Worker, *, use_uvloop: bool = False) -> None:
    """Run a worker until Ctrl-C or SIGTERM, which let running handlers end.

    The first signal drains: no more deliveries, the grace period for what runs. The second one
    cancels what still runs; its messages go back to their queues. The third one is the process's
    own again. The signal handlers that were there before are put back at the end.

    Args:
        worker: The worker, with its handlers registered.
        use_uvloop: Whether to run on uvloop (the extra ``uvloop``).

    Raises:
        WorkQueueError: What `Worker.run` raises.
        RuntimeError: Called inside a running event loop: await `Worker.run` there. Or in another
            thread than the main one, where signals cannot be handled.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            "aioworkq.run handles signals, which Python allows in the main thread only. "
            "In another one, use `asyncio.run(worker.run())`, and call `worker.stop()` to stop it.",
        )
    anyio.run(_run, worker, backend="asyncio", backend_options={"use_uvloop": use_uvloop})


async def _run(worker: Worker) -> None:
    with _drain_on_signals(worker):
        await worker.run()


@contextlib.contextmanager
def _drain_on_signals(worker: Worker) -> Generator[None, None, None]:
    loop = asyncio.get_running_loop()
    received = 0

    def on_signal(number: signal.Signals) -> None:
        nonlocal received
        received += 1
        if received == 1:
            _log.warning("%s: the worker drains. Once more to stop at once.", number.name)
            worker.stop()
            return
        _log.warning("%s: the worker stops at once.", number.name)
        worker.stop(grace=0)
        for one in _SIGNALS:
            loop.remove_signal_handler(one)

    previous = {number: signal.getsignal(number) for number in _SIGNALS}
    for number in _SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    try:
        yield
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
            if previous[number] is not None:  # None: installed by code that is not Python
                signal.signal(number, previous[number])
