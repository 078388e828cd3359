"""Submissions that are answered with the end of their job, because it takes no time."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from koan_ray.domain.records import End
    from koan_ray.ports import Clock

_LINGER_S = 0.005  # the most that this delays an answer


class Lingering:
    """Answers that are held back for moments, by job."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.waiting: dict[str, asyncio.Future[End | None]] = {}
        self._is_timed = False

    async def linger(self, job_id: str) -> End | None:
        """Return the end of a job if it comes at once, None if not."""
        ended: asyncio.Future[End | None] = asyncio.get_running_loop().create_future()
        self.waiting[job_id] = ended
        if not self._is_timed:  # one timer for all, which nobody cancels: two of a kind cost more than the waiting
            self._time()
        try:
            return await ended
        finally:
            self.waiting.pop(job_id, None)

    def ended(self, end: End) -> None:
        """Answer the submission of this job, if it lingers."""
        if (waiting := self.waiting.get(end.id)) is not None and not waiting.done():
            waiting.set_result(end)

    def _time(self) -> None:
        """Give up, after `_LINGER_S`, on the jobs that linger now."""
        waiting = list(self.waiting.values())
        self._is_timed = bool(waiting)
        if waiting:
            self._clock.call_later(_LINGER_S, lambda: self._give_up(waiting))

    def _give_up(self, waiting: list[asyncio.Future[End | None]]) -> None:
        try:
            for ended in waiting:
                if not ended.done():
                    ended.set_result(None)
        finally:  # whatever happened: without the timer, every answer that lingers would for ever
            self._time()
