"""Time that moves when a test says so."""

from __future__ import annotations

import heapq
import itertools
from typing import TYPE_CHECKING

from koan_ray.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable


class ManualTimer:
    """A call that a `ManualClock` is going to make."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action: Callable[[], None] | None = action

    @property
    def is_live(self) -> bool:
        """It was neither made nor cancelled."""
        return self._action is not None

    def cancel(self) -> None:
        """Do not make the call."""
        self._action = None

    def fire(self) -> None:
        """Make the call, once."""
        action, self._action = self._action, None
        if action is not None:
            action()


class ManualClock:
    """A `koan_ray.ports.Clock` whose time stands still between two calls of `advance`.

    Timers run inside `advance`, in the order of their instants, each with the clock showing its own instant. The wall
    clock can `jump` apart from the monotonic one, as real ones do.

    Units: seconds; ``now`` since the Unix epoch.
    """

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self._now = now
        self._monotonic = 0.0
        self._timers: list[tuple[float, int, ManualTimer]] = []
        self._order = itertools.count()

    def now(self) -> float:
        """Return the wall clock."""
        return self._now

    def monotonic(self) -> float:
        """Return seconds since the clock was made."""
        return self._monotonic

    def call_later(self, delay_s: float, action: Callable[[], None]) -> ManualTimer:
        """Call ``action`` when the clock has been advanced by ``delay_s``."""
        timer = ManualTimer(action)
        heapq.heappush(self._timers, (self._monotonic + max(0.0, delay_s), next(self._order), timer))
        return timer

    def next_at(self) -> float | None:
        """Return the monotonic instant of the earliest timer, None without one."""
        while self._timers and not self._timers[0][2].is_live:
            heapq.heappop(self._timers)
        return self._timers[0][0] if self._timers else None

    def advance(self, duration_s: float) -> None:
        """Move time forward, running what becomes due.

        Raises:
            ConfigurationError: ``duration_s`` is negative; use `jump` for a wall clock that is set back.
        """
        if duration_s < 0:
            msg = f"advance: time does not go back, got {duration_s!r}; use jump() for the wall clock"
            raise ConfigurationError(msg)
        until = self._monotonic + duration_s
        while (at := self.next_at()) is not None and at <= until:
            self._move_to(at)
            heapq.heappop(self._timers)[2].fire()
        self._move_to(until)

    def advance_to_next(self) -> bool:
        """Move to the earliest timer and run what is due then; false if there is none."""
        at = self.next_at()
        if at is None:
            return False
        self.advance(max(0.0, at - self._monotonic))
        return True

    def jump(self, seconds: float) -> None:
        """Set the wall clock forward or back; the monotonic clock and the timers do not notice."""
        self._now += seconds

    def _move_to(self, at: float) -> None:
        self._now += at - self._monotonic
        self._monotonic = at
