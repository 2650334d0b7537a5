"""What a contestant took."""

from __future__ import annotations

import time


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
