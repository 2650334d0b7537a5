"""What a contestant took."""

from __future__ import annotations

import gc
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Generator


class Measurement:
    """Wall and CPU seconds between two points."""

    def __init__(self) -> None:
        self._wall = time.perf_counter()
        self._cpu = time.process_time()
        self.wall = self.cpu = 0.0

    def stop(self) -> Measurement:
        self.wall = time.perf_counter() - self._wall
        self.cpu = time.process_time() - self._cpu
        return self


class Collector:
    """CPU seconds of Python's garbage collector."""

    def __init__(self) -> None:
        self.cpu = 0.0

    @contextmanager
    def watched(self) -> Generator[None]:
        """Count what it takes meanwhile."""

        def note(phase: Literal["start", "stop"], _: dict[str, int]) -> None:
            self.cpu += time.process_time() * (1 if phase == "stop" else -1)

        gc.callbacks.append(note)
        try:
            yield
        finally:
            gc.callbacks.remove(note)


class Count:
    """Counts messages, from the first to the last; calls back at the end. Threads may share it."""

    def __init__(self, last: int, done: Callable[[], object]) -> None:
        self._last = last
        self._done = done
        self._seen = 0
        self._lock = threading.Lock()
        self._clock: Measurement | None = None

    @property
    def clock(self) -> Measurement:
        """What it took; there is nothing before the first message."""
        assert self._clock is not None
        return self._clock

    def add(self, number: int = 1) -> None:
        with self._lock:
            self._clock = self._clock or Measurement()
            before = self._seen
            self._seen += number
            if before < self._last <= self._seen:
                self._clock.stop()
                self._done()
