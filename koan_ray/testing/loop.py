"""An event loop in virtual time: `asyncio.sleep` and timeouts take no time, and every run of a seed is the same."""

from __future__ import annotations

import asyncio
import selectors
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

T = TypeVar("T")
_EPOCH = 1_800_000_000.0
_STUCK_AFTER = 200  # looks at the real selector, 50 ms each, with nothing to do and nothing scheduled


class VirtualLoop(asyncio.SelectorEventLoop):
    """Jumps to the next timer instead of waiting for it. Also a `koan_ray.ports.Clock`."""

    def __init__(self) -> None:
        self._virtual = 0.0
        super().__init__(_Selector(self))

    def time(self) -> float:
        """Return virtual seconds."""
        return self._virtual

    def now(self) -> float:
        """Return the wall clock, which keeps step with the virtual time."""
        return _EPOCH + self._virtual

    def monotonic(self) -> float:
        """Return virtual seconds."""
        return self._virtual

    def pass_time(self, seconds: float) -> None:
        """Move the virtual time on."""
        self._virtual += seconds


class VirtualClock:
    """The time of a `VirtualLoop` as the engine wants it."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self.now = loop.now
        self.monotonic = loop.monotonic

    def call_later(self, delay_s: float, action: Callable[[], None]) -> asyncio.TimerHandle:
        """Call ``action`` in virtual time."""
        return self._loop.call_later(delay_s, action)


class _Selector(selectors.DefaultSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop
        self._idle = 0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if ready or timeout == 0:
            self._idle = 0
            return ready
        if timeout is None:  # nothing is scheduled: only another thread can bring work
            self._idle += 1
            if self._idle > _STUCK_AFTER:
                msg = "everything waits and nothing is scheduled: a deadlock"
                raise RuntimeError(msg)
            return super().select(0.05)
        self._loop.pass_time(timeout)
        return []


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end in virtual time, on a loop of its own."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
