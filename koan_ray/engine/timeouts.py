"""Things to be called at a time, by one thread of a session."""

from __future__ import annotations

import heapq
import threading
import time
from typing import TYPE_CHECKING

from koan_ray import threads

if TYPE_CHECKING:
    from collections.abc import Callable


class Timeouts:
    """Calls things at a time; one thread, started when it is first needed, and again if it should have ended.

    What is called may raise: that is logged, and the others are called nevertheless.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._n = 0
        self._changed = threading.Condition(threads.lock())
        self._thread: threading.Thread | None = None
        self._closed = False

    def add(self, delay_s: float, action: Callable[[], None]) -> None:
        """Call ``action`` after ``delay_s``; at once when closed."""
        with self._changed:
            if not self._closed:
                self._n += 1
                heapq.heappush(self._heap, (time.monotonic() + delay_s, self._n, action))
                if self._thread is None or not self._thread.is_alive():
                    self._thread = threads.keep("koan-timeouts", self._run)
                elif self._heap[0][1] == self._n:
                    self._changed.notify()
                return
        threads.guarded("timer_failed", action)

    def close(self) -> None:
        """Call what is left now, and what is added from now on at once: it finds that the session has ended."""
        with self._changed:
            self._closed = True
            left, self._heap = sorted(self._heap, key=lambda timer: timer[:2]), []
            self._changed.notify()
        for _, _, action in left:
            threads.guarded("timer_failed", action)

    def _run(self) -> None:
        while (action := self._next()) is not None:
            threads.guarded("timer_failed", action)
            del action  # it may be the last to hold a job

    def _next(self) -> Callable[[], None] | None:
        """Return what is due next, waiting for it; None when closed."""
        with self._changed:
            while not self._closed:
                wait_s = self._heap[0][0] - time.monotonic() if self._heap else threads.LONGEST_WAIT_S
                if wait_s <= 0:
                    return heapq.heappop(self._heap)[2]
                self._changed.wait(min(wait_s, threads.LONGEST_WAIT_S))
        return None
