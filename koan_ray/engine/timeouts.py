"""Things to be called at a time, by one thread of a session."""

from __future__ import annotations

import heapq
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Timeouts:
    """Calls things at a time; one thread, started when it is first needed."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._n = 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def add(self, delay_s: float, action: Callable[[], None]) -> None:
        """Call ``action`` after ``delay_s``."""
        with self._changed:
            self._n += 1
            heapq.heappush(self._heap, (time.monotonic() + delay_s, self._n, action))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="koan-timeouts", daemon=True)
                self._thread.start()
            elif self._heap[0][1] == self._n:
                self._changed.notify()

    def close(self) -> None:
        """Call nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closed and (not self._heap or self._heap[0][0] > time.monotonic()):
                    self._changed.wait(self._heap[0][0] - time.monotonic() if self._heap else None)
                if self._closed:
                    return
                _, _, action = heapq.heappop(self._heap)
            action()
