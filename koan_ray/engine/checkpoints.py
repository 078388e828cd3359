"""Checkpoints and parts of jobs over items: written for the execution that runs now, read by anybody.

The order is *parts, then the job's document that counts them, then the answer*; the document goes with the writer's next
flush. A crash between leaves parts that do not count (`koan_ray.domain.checkpoints`). A store that does not answer is waited
for; an execution that is not the job's current one, or whose job is somebody else's by now, is told to stop.

A checkpoint that was staged is part of the job's state: whatever becomes of the job afterwards carries it, so that a job
never ends with an older one than it has acknowledged.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from typing import TYPE_CHECKING

from koan_ray.domain.checkpoints import Standing, counted, fenced, standing
from koan_ray.domain.records import STREAMS, part_fence
from koan_ray.engine.tenure import TenureState
from koan_ray.engine.writer import pause
from koan_ray.errors import (
    ConflictError,
    JobNotFoundError,
    RecordCorruptError,
    RecordRefusedError,
    StoreError,
    StoreUnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from koan_ray.domain.records import Checkpoint, JobRecord, Part, Residence
    from koan_ray.engine.catalog import Catalog
    from koan_ray.engine.live import LiveJobs
    from koan_ray.engine.tenure import Tenure
    from koan_ray.ports import Clock

_RETRY_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_UNDECIDED_S = 20.0  # a job whose source is not ours yet is waited for so long, then the caller asks again
_LOOKS = 3  # at a job that is on its way to or from an archive while it is read
_MAX_PAGE = 500
_COPY_TRIES = 8


class Checkpoints:
    """Keeps checkpoints and parts, in memory and in sources.

    Args:
        live: The jobs that have not ended.
        catalog: Where jobs are kept.
        clock: Time.
    """

    def __init__(self, live: LiveJobs, catalog: Catalog, clock: Clock) -> None:
        self._jobs, self._live = live, live.by_id
        self._catalog, self._clock = catalog, clock
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}  # by job whose checkpoint is under way, and how many want it
        self.counters: Counter[str] = Counter()

    # --- writing -----------------------------------------------------------------------------------------------------

    async def keep(self, job_id: str, execution_id: str, checkpoint: Checkpoint, parts: Sequence[Part]) -> bool:
        """Store a checkpoint and the parts that it counts; false if this execution shall stop. May be repeated.

        Returns when all of it is as durable as the job's store. Older checkpoints than the job has are refused, with false.

        Raises:
            ConflictError: The parts do not follow those that count, or something is larger than its limit.
            LimitExceededError: There is no room for the parts in memory.
            StoreUnavailableError: It is not decided yet whose job this is; repeat the call.
        """
        async with self._one_at_a_time(job_id):
            turn = 0
            while (job := await self.current(job_id, execution_id)) is not None:
                stands = standing(job, checkpoint)
                if stands is Standing.OLDER:
                    self.counters["refused"] += 1
                    return False
                if await self._survives(job, execution_id, checkpoint, parts if stands is Standing.NEXT else None):
                    self.counters["kept"] += stands is Standing.NEXT
                    return True
                await pause(self._clock, _RETRY_S[min(turn, len(_RETRY_S) - 1)])
                turn += 1
            self.counters["fenced"] += 1
            return False

    @contextlib.asynccontextmanager
    async def _one_at_a_time(self, job_id: str) -> AsyncIterator[None]:
        """Let the checkpoints of a job follow each other, also those of an execution that is superseded meanwhile."""
        lock, n_wanted = self._locks.get(job_id) or (asyncio.Lock(), 0)
        self._locks[job_id] = lock, n_wanted + 1
        try:
            async with lock:
                yield
        finally:
            lock, n_wanted = self._locks.pop(job_id)
            if n_wanted > 1:
                self._locks[job_id] = lock, n_wanted - 1

    async def current(self, job_id: str, execution_id: str) -> JobRecord | None:
        """Return the job if this is its current execution; waits while that is not known."""
        turn = 0
        give_up_at = self._clock.monotonic() + _UNDECIDED_S
        while (job := self._jobs.current(job_id, execution_id)) is None:
            is_decided = job_id in self._live or await self._catalog.memory.get(job_id) is not None
            if is_decided or self._catalog.is_whole:
                return self._jobs.current(job_id, execution_id)
            if self._clock.monotonic() > give_up_at:
                waiting = "; ".join(f"{name}: {each.explain()}" for name, each in self._catalog.sources.items())
                msg = f"job {job_id}: not every source is ours yet, and it may live there ({waiting}); repeat the request"
                raise StoreUnavailableError(msg)
            await pause(self._clock, _RETRY_S[min(turn, len(_RETRY_S) - 1)])
            turn += 1
        return job

    async def _survives(
        self, job: JobRecord, execution_id: str, checkpoint: Checkpoint, parts: Sequence[Part] | None
    ) -> bool:
        """Write once; false if it is unknown what was written, and the caller has to look again.

        ``parts``: None for a checkpoint that is staged already, whose flush is waited for.
        """
        residence = job.particulars.residence
        tenure = self._catalog.tenure_of(job)
        if not _is_certain(tenure):
            return False
        writer = self._catalog.writer_of(job.id, residence)
        if parts is not None:
            follows = counted(job, checkpoint, parts)
            try:
                if parts:
                    store = self._catalog.store_of(residence)
                    await store.write_parts(residence.partition, fenced(job, parts, tenure.term if tenure else 0))
            except RecordRefusedError:  # these parts can never be written, however often it is tried
                raise
            except StoreError as error:
                if tenure is not None:
                    tenure.note_problem(error, "parts_not_written")
                return False
            now_is = self._jobs.current(job.id, execution_id)  # it may have been given up while the parts were written
            if now_is is None:
                return False
            after = now_is.evolve(checkpoint=follows, last_modified=self._clock.now())
            self._live[job.id] = after
            writer.stage(after)
        try:
            await writer.flushed()
        except ConflictError:  # the lease is somebody else's
            return False
        # A flush that was fenced ends like any other; then the lease is known to be lost, or the job to be let go.
        return _is_certain(tenure) and self._jobs.current(job.id, execution_id) is not None

    async def _look(self, job_id: str) -> JobRecord | None:
        return self._live.get(job_id) or await self._catalog.get(job_id)

    # --- reading -----------------------------------------------------------------------------------------------------

    async def resume_state(self, job_id: str, execution_id: str) -> Checkpoint | None:
        """Return the checkpoint that this execution goes on from, None for the beginning.

        Parts that an earlier execution has written beyond it are deleted, as far as the store answers.

        Raises:
            ConflictError: It is not the job's current execution.
        """
        job = await self.current(job_id, execution_id)
        if job is None:
            msg = f"job {job_id}: execution {execution_id} is not its current one any more; stop it"
            raise ConflictError(msg)
        residence = job.particulars.residence
        tenure = self._catalog.tenure_of(job)
        if job.ordinal > 1 and _is_certain(tenure):
            store, done = self._catalog.store_of(residence), job.checkpoint
            below = part_fence(tenure.term if tenure else 0, job.ordinal)
            with contextlib.suppress(StoreError):
                for stream in STREAMS:
                    first = done.n_parts(stream) if done is not None else 0
                    await store.drop_parts(residence.partition, job_id, stream, first, below=below)
        return job.checkpoint

    async def parts(self, job_id: str, stream: str, after: int, limit: int) -> list[Part]:
        """Return the parts of a job's stream that count and follow number ``after``, in order; empty only at the end.

        Raises:
            JobNotFoundError: There is no such job.
            RecordCorruptError: A part that counts is missing.
        """
        job = await self._look(job_id)
        for _ in range(_LOOKS):
            if job is None:
                raise JobNotFoundError(job_id)
            n_left = job.checkpoint.n_parts(stream) - after - 1 if job.checkpoint is not None else 0
            if n_left <= 0:
                return []
            residence = job.particulars.residence
            store = self._catalog.store_of(residence)
            limit = max(1, min(limit, n_left, _MAX_PAGE))
            found = await store.read_parts(residence.partition, job_id, stream, after, limit)
            if found and [part.seq for part in found] == list(range(after + 1, after + 1 + len(found))):
                return found
            job = await self._look(job_id)  # it may have moved to an archive, or back, while we read
        raise RecordCorruptError(job_id, f"parts.{stream}.{after + 1}", "is missing, though a checkpoint counts it")

    # --- copying -----------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def copied(self, old: JobRecord, new_id: str, home: Residence) -> AsyncIterator[Checkpoint]:
        """Copy the parts of a job that count, page by page, for another job that is accepted inside of the block.

        Yields the checkpoint that it goes on from. What raises inside takes the copy back, as far as the store answers; of
        what stays behind the doctor tells. May be repeated.

        Raises:
            ConflictError: The old job has no checkpoint.
            StoreUnavailableError: A source does not answer; repeat the call later.
            LimitExceededError: There is no room for the parts in memory.
        """
        if old.checkpoint is None:
            msg = f"job {old.id}: has no checkpoint to go on from; run it again from its beginning, without resume"
            raise ConflictError(msg)
        async with self._one_at_a_time(new_id):
            if await self._look(new_id) is not None:  # accepted already: the answer was lost
                yield old.checkpoint
                return
            try:
                await self._copy(old, new_id, home)
                yield old.checkpoint
            except Exception:
                await self._forget(new_id, home)
                raise

    async def _copy(self, old: JobRecord, new_id: str, home: Residence) -> None:
        tenure = self._catalog.tenure_at(new_id, home)
        for stream in STREAMS:
            after = -1
            while page := await self._page_of(old, stream, after):
                after = page[-1].seq
                fence = part_fence(tenure.term if tenure else 0, 0)
                await self._write([part._replace(job_id=new_id, fence=fence) for part in page], home, tenure)

    async def _forget(self, new_id: str, home: Residence) -> None:
        tenure = self._catalog.tenure_at(new_id, home)
        below = part_fence(tenure.term if tenure else 0, 1)
        with contextlib.suppress(StoreError):
            for stream in STREAMS:
                await self._catalog.store_of(home).drop_parts(home.partition, new_id, stream, 0, below=below)

    async def _page_of(self, old: JobRecord, stream: str, after: int) -> list[Part]:
        for turn in range(_COPY_TRIES):
            try:
                return await self.parts(old.id, stream, after, _MAX_PAGE)
            except StoreUnavailableError:
                if turn == _COPY_TRIES - 1:
                    raise
                await pause(self._clock, _RETRY_S[min(turn, len(_RETRY_S) - 1)])
        return []

    async def _write(self, parts: Sequence[Part], home: Residence, tenure: Tenure | None) -> None:
        store = self._catalog.store_of(home)
        for turn in range(_COPY_TRIES):
            if tenure is not None:
                await tenure.ready()
            try:
                return await store.write_parts(home.partition, parts)
            except StoreUnavailableError:
                if turn == _COPY_TRIES - 1:
                    raise
                await pause(self._clock, _RETRY_S[min(turn, len(_RETRY_S) - 1)])
        return None


def _is_certain(tenure: Tenure | None) -> bool:
    """Tell whether we may write now, and what we wrote just before was ours to write."""
    return tenure is None or (tenure.state is TenureState.ACTIVE and tenure.may_act)
