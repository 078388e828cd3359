"""Jobs that somebody here waits for and another coordinator runs: their ends are read from the store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from koan_ray import threads
from koan_ray.domain.records import end_of
from koan_ray.engine.writer import pause
from koan_ray.errors import StoreUnavailableError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from koan_ray.domain.records import JobRecord
    from koan_ray.engine.catalog import Catalog
    from koan_ray.engine.tasks import Tasks
    from koan_ray.engine.waiters import Waiters
    from koan_ray.ports import Clock

_EVERY_S = 1.0  # between two looks


class Elsewhere:
    """Waits of this coordinator's sessions for jobs of others. Looks only while there are any.

    Args:
        live: The jobs that are ours.
        waiters: Who waits.
        catalog: Where jobs are found.
        clock: For the intervals.
        tasks: What runs the looking.
    """

    def __init__(
        self, live: Mapping[str, JobRecord], waiters: Waiters, catalog: Catalog, clock: Clock, tasks: Tasks
    ) -> None:
        self._live, self._waiters, self._catalog, self._clock, self._tasks = live, waiters, catalog, clock, tasks
        self._watched: set[str] = set()

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._watched

    def watch(self, job_id: str) -> None:
        """Tell the waiters of this job when it has ended, wherever that is."""
        is_looking = bool(self._watched)
        self._watched.add(job_id)
        if not is_looking:
            self._tasks.keep("elsewhere", self._look, lambda: not self._watched)

    async def _look(self) -> None:
        await pause(self._clock, _EVERY_S)
        while self._watched:
            for job_id in list(self._watched):
                try:
                    await self._look_at(job_id)
                except StoreUnavailableError:
                    continue
                except Exception as error:  # noqa: BLE001 - a document that cannot be read is no reason not to look at others
                    threads.survive(f"foreign_job_unreadable: job {job_id}", error)
            self._waiters.wake()
            await pause(self._clock, _EVERY_S)

    async def _look_at(self, job_id: str) -> None:
        if job_id in self._live or not self._waiters.is_watched(job_id):
            self._watched.discard(job_id)
            return
        stored = await self._catalog.get(job_id)
        if stored is not None and stored.status.is_final:
            self._watched.discard(job_id)
            self._waiters.ended(end_of(stored))
