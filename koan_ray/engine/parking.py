"""Calls that are parked: answered when there is news, or after a while without.

Of each caller one call is parked at a time; a newer one answers the older, whose answer nobody waits for any more.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from koan_ray.ports import Clock


class Caller:
    """A process that calls again and again for news."""

    __slots__ = ("_parked", "seen_at")

    def __init__(self) -> None:
        self._parked: asyncio.Future[None] | None = None
        self.seen_at = 0.0

    @property
    def is_parked(self) -> bool:
        """A call of it waits."""
        return self._parked is not None

    async def park(self, clock: Clock, park_s: float) -> None:
        """Wait until `wake`, or for ``park_s``."""
        self._parked = mine = asyncio.get_running_loop().create_future()
        timer = clock.call_later(park_s, lambda: _settle(mine))
        try:
            await mine
        finally:  # also of a call that is cancelled: a caller that seems to be parked is never forgotten
            timer.cancel()
            if self._parked is mine:
                self._parked = None

    def wake(self) -> None:
        """Answer the call that is parked, if one is."""
        if self._parked is not None:
            _settle(self._parked)
            self._parked = None


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
