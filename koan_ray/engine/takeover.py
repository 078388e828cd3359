"""What the tenures of a coordinator ask: jobs in documents that become ours, and that cease to be."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from koan_ray.domain.status import JobStatus
from koan_ray.engine.tenure import TenureState
from koan_ray.errors import StoreUnavailableError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from koan_ray.domain.records import JobRecord
    from koan_ray.engine.catalog import Catalog
    from koan_ray.engine.elsewhere import Elsewhere
    from koan_ray.engine.kinds import Kinds
    from koan_ray.engine.live import LiveJobs
    from koan_ray.engine.recovery import Recovery
    from koan_ray.engine.shards import Shards
    from koan_ray.engine.tasks import Tasks
    from koan_ray.engine.tenure import Tenure
    from koan_ray.engine.waiters import Waiters
    from koan_ray.ports import Log


class Takeover:
    """The `Host` of a coordinator's tenures.

    Args:
        live: The jobs that have not ended.
        kinds: The job classes.
        catalog: Where jobs are kept.
        recovery: What becomes of running actors.
        waiters: Who waits for ends.
        elsewhere: Waits for jobs that are not ours.
        tasks: What runs what takes time.
        log: Where changes of state are told.
    """

    def __init__(
        self, live: LiveJobs, kinds: Kinds, catalog: Catalog, recovery: Recovery, waiters: Waiters, elsewhere: Elsewhere,
        tasks: Tasks, log: Log,
    ) -> None:  # fmt: skip
        self._jobs, self._live = live, live.by_id
        self._kinds, self._catalog, self._recovery, self._waiters = kinds, catalog, recovery, waiters
        self._elsewhere, self._tasks, self._log = elsewhere, tasks, log
        self._finding = asyncio.Lock()

    def written(self, jobs: Sequence[JobRecord]) -> None:
        """A flush has written these."""
        self._jobs.written(jobs)

    def refused(self, job: JobRecord) -> None:
        """The insert of a job found its id taken: a submit that was made before, or somebody else's job."""
        self._jobs.refused(job)
        if self._waiters.is_watched(job.id):  # by the submit that was repeated; it may have ended by now
            self._elsewhere.watch(job.id)
        if (tenure := self._catalog.tenure_of(job)) is not None:
            self._tasks.spawn(self._take_back(tenure, job.id), "take back")

    def unstorable(self, job: JobRecord, size: int, limit: int) -> None:
        """The store cannot keep a record of this size."""
        self._jobs.unstored(job, size, limit)

    def unwritable(self, job: JobRecord, problem: str) -> None:
        """No document can hold this state of a job."""
        self._jobs.unwritable(job, problem)

    async def _take_back(self, tenure: Tenure, job_id: str) -> None:
        """Take in a stored job that was passed over because a repeated submit stood in its place when it was read."""
        with contextlib.suppress(StoreUnavailableError):  # then the sweep or the next coordinator finds it
            stored = await tenure.store.get(job_id) if await tenure.has_all() else None
            if stored is not None and not stored.status.is_final and stored.term == tenure.term:
                await self.found(tenure, [stored], is_late=True)

    def took_in(self, tenure: Tenure, jobs: Sequence[JobRecord]) -> None:
        """Make a source's unfinished jobs ours; they are not dispatched before `opened`."""
        for job in jobs:
            placed = self._catalog.placed(job, tenure.source)
            self._jobs.put(self._kinds.routed(placed) or placed)

    async def opened(self, tenure: Tenure) -> None:
        """Adopt what runs, count as lost what nobody runs, close children of parents that have ended, and dispatch.

        All shards of the source that have come so far are opened together, by the first of their tenures that gets here.
        """
        shards = self._catalog.sources[tenure.source]
        if await shards.all_read(tenure):
            async with shards.opening:
                if tenure.state is TenureState.RECOVERING:
                    await self._open(shards, [each for each in shards.tenures if each.is_to_be_opened])

    async def _open(self, shards: Shards, tenures: Sequence[Tenure]) -> None:
        mine = [job for job in self._live.values() if any(self._catalog.is_in(job, tenure) for tenure in tenures)]
        await self._recovery.adopt(shards, sorted(slot for tenure in tenures for slot in tenure.slots), mine)
        others = (each for source in self._catalog.sources.values() for each in source.tenures if each not in tenures)
        if all(each.state is TenureState.ACTIVE for each in others):
            self._recovery.release()
        self._dispatch_taken(mine)
        await self._close_orphans(mine)
        for tenure in tenures:
            tenure.activate()
        self._log.info("jobs_recovered", source=shards.source, n=len(mine), unroutable=self._kinds.unroutable())

    async def found(self, tenure: Tenure, jobs: Sequence[JobRecord], *, is_late: bool = False) -> None:
        """Take in those of a source's unfinished jobs that are not known here: its queue, and what was inserted late.

        ``is_late``: they were read while we served, so that a job which is not known here may be one that has ended since.
        """
        if not is_late:
            await self._take_in(tenure, [job for job in jobs if job.id not in self._live])
            return
        async with self._finding:  # one at a time: what was looked up must not be taken in and ended by another meanwhile
            unknown = [job for job in jobs if job.id not in self._live]
            left = await _still_unfinished(tenure, unknown)
            await self._take_in(tenure, [job for job in unknown if job.id in left and job.id not in self._live])

    async def _take_in(self, tenure: Tenure, new: Sequence[JobRecord]) -> None:
        if not new:
            return
        self.took_in(tenure, new)
        mine = [self._live[job.id] for job in new]
        if any(job.status is JobStatus.RUNNING for job in mine):
            await self._recovery.adopt(self._catalog.sources[tenure.source], tenure.slots, mine)
        self._dispatch_taken(mine)
        await self._close_orphans(mine)

    def _dispatch_taken(self, jobs: Sequence[JobRecord]) -> None:
        for job in jobs:
            if self._live.get(job.id) is job and job.status is JobStatus.QUEUED:
                self._jobs.enqueue(job)

    async def _close_orphans(self, jobs: Sequence[JobRecord]) -> None:
        """A crash came between the end of a parent and the cancellation of its children."""
        for parent_id in {job.particulars.parent_job_id for job in jobs} - {None, *self._live}:
            parent = await self._catalog.get(parent_id or "")
            if parent is not None and parent.status.is_final:
                self._jobs.close_children(parent)

    def resumed(self, job_ids: Sequence[str]) -> None:
        """The lease is certain again: dispatch what was held back."""
        for job_id in job_ids:
            job = self._live.get(job_id)
            if job is not None and job.status is JobStatus.QUEUED:
                self._jobs.enqueue(job)
            elif job is not None:
                self._jobs.resume(job)

    def stood_down(self, tenure: Tenure) -> None:
        """Another coordinator has the source: let go of everything that lives there; its waiters are told from afar."""
        gone = [job for job in self._live.values() if self._catalog.is_in(job, tenure)]
        for job in gone:
            self._jobs.drop(job)
            if self._waiters.is_watched(job.id):
                self._elsewhere.watch(job.id)


async def _still_unfinished(tenure: Tenure, jobs: Sequence[JobRecord]) -> set[str]:
    """Return the ids of those that have not ended, nor been removed, since they were read."""
    by_partition: dict[str, list[str]] = {}
    for job in jobs:
        by_partition.setdefault(job.particulars.residence.partition, []).append(job.id)
    left: set[str] = set()
    for partition, job_ids in by_partition.items():
        statuses = await tenure.store.statuses(job_ids, partition)
        left.update(job_id for job_id, status in statuses.items() if not status.is_final)
    return left
