"""What a coordinator shows to processes that present jobs, such as the HTTP API: its memory, and a feed of changes.

Jobs in documents are read from their sources by whoever presents them; these calls answer for what only this process
knows. Records go out without contexts and results unless one job is asked for.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from koan_ray.domain.query import parse_query
from koan_ray.domain.records import told
from koan_ray.domain.status import JobStatus
from koan_ray.engine.catalog import MEMORY
from koan_ray.engine.feed import Feed, News

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from koan_ray.domain.records import ExecutionRecord, JobRecord
    from koan_ray.engine.catalog import Catalog
    from koan_ray.engine.reasons import Reasons
    from koan_ray.ports import Clock

NO_PAYLOAD = b"null"
_FEED_LIMIT = 100  # changes of one answer; more than that nobody reads, and hundreds of readers would have to be sent them
_MOST_BYTES = 4 * 1024 * 1024  # of contexts and results, in one answer
_LOOKED_AT = 10_000  # live jobs, for the one that waits longest


class Figures(NamedTuple):
    """What an overview needs: jobs in memory by final status, the ends of the last ones, and the oldest queued job.

    Shape: ``ended`` as (end, status, begin), newest first. ``oldest_queued_at`` is of all jobs, documents included.
    """

    n_settled: dict[str, int]
    ended: list[tuple[float, JobStatus, float | None]]
    oldest_queued_at: float | None


def outlined(job: JobRecord) -> JobRecord:
    """Return a record without its context, result and checkpoint body."""
    checkpoint = None if job.checkpoint is None else job.checkpoint._replace(body=NO_PAYLOAD)
    return job.evolve(context=NO_PAYLOAD, result=None if job.result is None else NO_PAYLOAD, checkpoint=checkpoint)


class Window:
    """A view of one coordinator. All methods run on its loop.

    Args:
        live: Its jobs that have not ended.
        catalog: Returns where its jobs are kept.
        kinds: Returns the names of the job classes that it knows.
        reasons: Why jobs do not run.
        clock: For the feed.
        epoch: The coordinator's.
    """

    def __init__(
        self, live: Mapping[str, JobRecord], catalog: Callable[[], Catalog], kinds: Callable[[], list[str]],
        reasons: Reasons, clock: Clock, epoch: str,
    ) -> None:  # fmt: skip
        self._live, self._catalog, self._kinds, self._reasons = live, catalog, kinds, reasons
        self.feed: Feed[JobRecord | None] = Feed(clock, epoch, _FEED_LIMIT)

    def removed(self, job_id: str) -> None:
        """Tell listeners of a job that is gone."""
        if self.feed.is_heard:
            self.feed.note([(job_id, None)])

    async def page(self, filters: Mapping[str, Any]) -> tuple[list[JobRecord], str | None]:
        """Return one page of the jobs in memory, outlined, and the cursor of the next.

        Raises:
            ConfigurationError: A filter is unknown or unusable.
        """
        page = await self._catalog().memory.query(parse_query({**filters, "source": MEMORY}))
        return [self._outlined(self._live.get(job.id, job)) for job in page.jobs], page.cursor

    def _outlined(self, job: JobRecord) -> JobRecord:
        return outlined(self._reasons.shown(job))

    async def job(self, job_id: str) -> JobRecord | None:
        """Return a job that is in memory or has not ended, complete; None if it is neither."""
        job = self._live.get(job_id) or await self._catalog().memory.get(job_id)
        return job and self._reasons.shown(job)

    async def reasons(self, job_ids: Sequence[str]) -> dict[str, str]:
        """Return in words why those of these jobs do not run that could, by id; for who reads the jobs from their source."""
        return self._reasons.of(job_ids)

    async def jobs(self, job_ids: Sequence[str]) -> list[JobRecord | None]:
        """Return these jobs as `job` does, in their order: at least the first, and no more once that is a lot of bytes."""
        found: list[JobRecord | None] = []
        size = 0
        for job_id in job_ids:
            job = await self.job(job_id)
            found.append(job)
            size += 0 if job is None else len(job.context) + len(job.result or b"")
            if size > _MOST_BYTES:
                break
        return found

    async def executions(self, job_id: str) -> list[ExecutionRecord]:
        """Return the executions of a job in memory, oldest first."""
        return told(await self._catalog().memory.executions(job_id))

    async def figures(self, n_ended: int) -> Figures:
        """Return what an overview needs of this coordinator, without looking at every job."""
        memory = self._catalog().memory
        n_settled: Callable[[], dict[JobStatus, int]] = getattr(memory, "n_settled", dict)
        last_settled: Callable[[int], list[JobRecord]] = getattr(memory, "last_settled", lambda _limit: [])
        # In the order of their submission: those that wait longest are among the first.
        first = islice(self._live.values(), _LOOKED_AT)
        waiting = (job.queued_at for job in first if job.status is JobStatus.QUEUED and not job.terms.part)
        oldest = min((at for at in waiting if at is not None), default=None)
        ended = [(job.completed_at or 0.0, job.status, job.started_at) for job in last_settled(n_ended)]
        return Figures({status.value: n for status, n in n_settled().items()}, ended, oldest)

    async def kinds(self) -> list[str]:
        """Return the names of all job classes that this coordinator can run."""
        return self._kinds()

    async def news(self, listener_id: str, epoch: str | None, park_s: float) -> News[JobRecord | None]:
        """Return the jobs that have changed since this listener asked last, outlined; None for one that was removed."""
        epoch_is, changes, n_lost = await self.feed.news(listener_id, epoch, park_s)
        return News(epoch_is, [(job_id, job and self._outlined(job)) for job_id, job in changes], n_lost)
