"""Jobs in this process's memory: gone with it, expired after a while, capped.

A finished job is kept for `completed_retention_s` or `faulted_retention_s`. Above `max_finished` the job that finished
first is forgotten before its time, so that memory stays bounded at any rate; queued and running jobs are limited where
they are accepted (`engine.max_queued`). The parts of all jobs together have `max_part_bytes`: for more, finished jobs with
parts are forgotten before their time, and where that is not enough, the parts are refused.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING

from koan_ray.domain.query import Page, Query, milliseconds
from koan_ray.domain.status import ExecutionStatus, JobStatus
from koan_ray.errors import LimitExceededError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from koan_ray.domain.query import Place
    from koan_ray.domain.records import ExecutionRecord, JobRecord, Part
    from koan_ray.ports import Change

_SLICE = 4096  # records scanned before other work on the loop gets its turn
_PAGE_BYTES = 8 * 1024 * 1024  # of parts in one answer


class MemoryStore:
    """The default store.

    Cost: get and apply are dictionary operations. A query looks at every record, in slices that leave the loop free,
    except for children (``parent_job_id``), which have an index, and for the newest jobs, which were kept last: the walk
    back ends as soon as no earlier record can be newer than what was found.

    Args:
        completed_retention_s: For how long completed jobs are kept.
        faulted_retention_s: The same of failed and cancelled ones.
        max_finished: Jobs that have ended, at most.
        max_part_bytes: Of the parts of all jobs.
        monotonic: The clock that retention is counted by, so that a wall clock which is set forward forgets nothing before
            its time. Without one, it is counted from when a job has ended by the wall clock that `expire` is given.
    """

    def __init__(
        self,
        *,
        completed_retention_s: float = 3600.0,
        faulted_retention_s: float = 7200.0,
        max_finished: int = 1_000_000,
        max_part_bytes: int = 256 * 1024 * 1024,
        monotonic: Callable[[], float] | None = None,
    ) -> None:
        self._monotonic = monotonic
        self._retention = {
            JobStatus.COMPLETED: completed_retention_s,
            JobStatus.FAILED: faulted_retention_s,
            JobStatus.CANCELLED: faulted_retention_s,
        }
        self._max_finished = max_finished
        self._jobs: dict[str, JobRecord] = {}
        # One execution is the usual case and kept bare; a list each would double the memory of small jobs.
        self._executions: dict[str, ExecutionRecord | list[ExecutionRecord]] = {}
        self._children: dict[str, set[str]] = {}
        self._finished: dict[JobStatus, deque[tuple[float, str]]] = {status: deque() for status in self._retention}
        self._n_finished = 0
        self._max_part_bytes = max_part_bytes
        self._parts: dict[str, dict[str, dict[int, Part]]] = {}  # by job, stream and number
        self._part_bytes = 0
        # How much later than a job one with an earlier ``created_at`` was kept at most: bounds what a walk may overlook.
        self._newest_at, self._lateness_s = 0.0, 0.0

    def __len__(self) -> int:
        return len(self._jobs)

    async def apply(self, changes: Sequence[Change]) -> list[Change]:
        """Write what is guarded right; see `JobStore.apply`. Never suspends."""
        jobs = self._jobs
        at = self._monotonic() if self._monotonic is not None else None
        refused = []
        for change in changes:
            job, expect, executions = change
            stored = jobs.get(job.id)
            if (stored.rev if stored is not None else 0) != expect:
                refused.append(change)
                continue
            jobs[job.id] = job
            for execution in executions:
                self._keep(execution)
            if stored is None:
                if job.created_at >= self._newest_at:
                    self._newest_at = job.created_at
                elif self._newest_at - job.created_at > self._lateness_s:
                    self._lateness_s = self._newest_at - job.created_at
                if job.particulars.parent_job_id is not None:
                    self._children.setdefault(job.particulars.parent_job_id, set()).add(job.id)
            if job.completed_at is not None and (stored is None or not stored.status.is_final):
                self._finished[job.status].append((job.completed_at if at is None else at, job.id))
                self._n_finished += 1
        while self._n_finished > self._max_finished:
            self._forget_oldest()
        return refused

    def objection(self, record: JobRecord | ExecutionRecord) -> str | None:
        """Return None: memory holds everything."""
        return None

    async def file_executions(self, changes: Sequence[Change]) -> None:
        """Keep the executions of changes whose jobs are written."""
        for change in changes:
            for execution in change.executions:
                self._keep(execution)

    async def get(self, job_id: str) -> JobRecord | None:
        """Return the record of a job."""
        return self._jobs.get(job_id)

    async def executions(self, job_id: str) -> list[ExecutionRecord]:
        """Return a job's executions, oldest first."""
        kept = self._executions.get(job_id)
        if kept is None:
            return []
        return list(kept) if isinstance(kept, list) else [kept]

    async def query(self, query: Query) -> Page:
        """Return one page; the records match at the moment each was looked at."""
        found: list[tuple[Place, JobRecord]] = []
        keep = query.limit + 1
        pick = heapq.nlargest if query.descending else heapq.nsmallest
        newest_first = query.descending and query.order_by == "created_at" and query.parent_job_id is None
        async for batch, oldest_at in self._scan_back(query) if newest_first else self._scan_all(query):
            found += [(query.sort_key(job), job) for job in batch if query.is_after_cursor(job)]
            if len(found) > 4 * keep or (oldest_at is not None and len(found) >= keep):
                found = pick(keep, found, key=lambda pair: pair[0])
            if oldest_at is not None and len(found) >= keep and milliseconds(oldest_at + self._lateness_s) < found[-1][0][0]:
                break
        page = [job for _, job in pick(keep, found, key=lambda pair: pair[0])]
        more = len(page) > query.limit
        page = page[: query.limit]
        return Page(page, query.cursor_after(page[-1]) if more else None)

    async def count(self, query: Query) -> int:
        """Return how many records match."""
        return sum([len(batch) async for batch in self._scan(query)])

    async def remove(self, job_id: str) -> bool:
        """Delete a job with its executions and parts."""
        job = self._jobs.get(job_id)
        if job is None:
            self._forget_parts(job_id)
            return False
        self._forget(job)
        return True

    async def expire(self, now: float) -> int:
        """Forget the finished jobs that have outlived their retention."""
        before = len(self._jobs)
        at = now if self._monotonic is None else self._monotonic()
        for status, queue in self._finished.items():
            while queue and queue[0][0] + self._retention[status] <= at:
                self._forget_at(queue)
        return before - len(self._jobs)

    # --- parts -------------------------------------------------------------------------------------------------------

    async def write_parts(self, partition: str, parts: Sequence[Part]) -> None:
        """Keep parts; see `JobStore.write_parts`. Memory has no partitions."""
        newer = [part for part in parts if (kept := self._part(part)) is None or kept.fence <= part.fence]
        replaced = sum(len(kept.body) for part in newer if (kept := self._part(part)) is not None)
        grows_by = sum(len(part.body) for part in newer) - replaced
        self._make_room(grows_by, {part.job_id for part in newer})
        for part in newer:
            self._parts.setdefault(part.job_id, {}).setdefault(part.stream, {})[part.seq] = part
        self._part_bytes += grows_by

    def _part(self, like: Part) -> Part | None:
        return self._parts.get(like.job_id, {}).get(like.stream, {}).get(like.seq)

    def _make_room(self, grows_by: int, writing: set[str]) -> None:
        if self._part_bytes + grows_by <= self._max_part_bytes:
            return
        for job_id in [job_id for job_id in self._parts if job_id not in writing]:  # whose first parts are oldest first
            job = self._jobs.get(job_id)
            if job is not None and job.status.is_final:  # one that is not there yet is about to be accepted
                self._forget(job)
            if self._part_bytes + grows_by <= self._max_part_bytes:
                return
        wanted = self._part_bytes + grows_by
        raise LimitExceededError(
            "bytes that items of jobs in memory have produced (jobs in documents have no such limit)", wanted,
            self._max_part_bytes, "memory.max_part_bytes",
        )  # fmt: skip

    async def read_parts(self, partition: str, job_id: str, stream: str, after: int = -1, limit: int = 50) -> list[Part]:
        """Return what follows; see `JobStore.read_parts`."""
        kept = self._parts.get(job_id, {}).get(stream, {})
        found: list[Part] = []
        size = 0
        for seq in heapq.nsmallest(limit, (seq for seq in kept if seq > after)):
            size += len(kept[seq].body)
            if found and size > _PAGE_BYTES:
                break
            found.append(kept[seq])
        return found

    async def drop_parts(self, partition: str, job_id: str, stream: str, from_seq: int, *, below: int) -> None:
        """Delete parts; see `JobStore.drop_parts`."""
        kept = self._parts.get(job_id, {}).get(stream, {})
        for seq in [seq for seq, part in kept.items() if seq >= from_seq and part.fence < below]:
            self._part_bytes -= len(kept.pop(seq).body)

    def _forget_parts(self, job_id: str) -> None:
        streams = self._parts.pop(job_id, {})
        self._part_bytes -= sum(len(part.body) for kept in streams.values() for part in kept.values())

    def n_settled(self) -> dict[JobStatus, int]:
        """Return about how many jobs of each final status there are: removed ones are counted until they expire."""
        return {status: len(queue) for status, queue in self._finished.items()}

    def last_settled(self, limit: int) -> list[JobRecord]:
        """Return the jobs that ended last, newest end first, at most ``limit``. Cost: proportional to that."""
        ends = [end for queue in self._finished.values() for end in islice(reversed(queue), limit)]
        jobs = (self._jobs.get(job_id) for _, job_id in heapq.nlargest(limit, ends))
        return [job for job in jobs if job is not None]

    async def _scan_all(self, query: Query) -> AsyncIterator[tuple[list[JobRecord], None]]:
        async for batch in self._scan(query):
            yield batch, None

    async def _scan_back(self, query: Query) -> AsyncIterator[tuple[list[JobRecord], float]]:
        """Yield matches from what was kept last to what was kept first, with the creation of the last one looked at."""
        ids = list(islice(reversed(self._jobs), _SLICE))
        first, is_whole = set(ids), len(ids) < _SLICE
        start = 0
        while ids[start : start + _SLICE]:
            records = [job for job_id in ids[start : start + _SLICE] if (job := self._jobs.get(job_id)) is not None]
            if records:
                yield [job for job in records if query.matches(job)], records[-1].created_at
            await asyncio.sleep(0)
            start += _SLICE
            if not is_whole:  # few get here: a copy of all keys
                ids, is_whole, start = [job_id for job_id in reversed(self._jobs) if job_id not in first], True, 0

    async def _scan(self, query: Query) -> AsyncIterator[list[JobRecord]]:
        parent_id = query.parent_job_id
        ids = list(self._jobs if parent_id is None else self._children.get(parent_id, ()))
        for start in range(0, len(ids), _SLICE):
            if start:
                await asyncio.sleep(0)
            records = (self._jobs.get(job_id) for job_id in ids[start : start + _SLICE])
            yield [job for job in records if job is not None and query.matches(job)]

    def _keep(self, execution: ExecutionRecord) -> None:
        kept = self._executions.get(execution.job_id)
        if kept is None:
            self._executions[execution.job_id] = execution
            return
        if not isinstance(kept, list):
            if kept.id == execution.id:
                if kept.status is ExecutionStatus.RUNNING:
                    self._executions[execution.job_id] = execution
                return
            kept = self._executions[execution.job_id] = [kept]
        for place in range(len(kept) - 1, -1, -1):
            if kept[place].id == execution.id:
                if kept[place].status is ExecutionStatus.RUNNING:
                    kept[place] = execution
                return
        kept.append(execution)

    def _forget_oldest(self) -> None:
        self._forget_at(min((queue for queue in self._finished.values() if queue), key=lambda queue: queue[0][0]))

    def _forget_at(self, queue: deque[tuple[float, str]]) -> None:
        _, job_id = queue.popleft()
        self._n_finished -= 1
        if (job := self._jobs.get(job_id)) is not None:
            self._forget(job)

    def _forget(self, job: JobRecord) -> None:
        del self._jobs[job.id]
        self._executions.pop(job.id, None)
        self._forget_parts(job.id)
        parent = job.particulars.parent_job_id
        if parent is not None and (siblings := self._children.get(parent)) is not None:
            siblings.discard(job.id)
            if not siblings:
                del self._children[parent]
