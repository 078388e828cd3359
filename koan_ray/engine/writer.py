"""Group commit: all that has gathered is written at once, one flush in flight, acks wait for their flush only.

The latest state of a job wins; a job that moved twice between two flushes is written once. What a crash leaves behind is
decided by the order *stage, flush, tell*: nobody hears of a state that is not written.

A flush that ended in an error of the store has an unknown outcome. It is repeated until the store answers: a change that
was applied the first time is refused then, and reading back tells it from one that a newer writer has overtaken: what we
find carries the rev and the term that we set.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

from koan_ray.engine.meters import Meters
from koan_ray.errors import StaleLeaseError, StoreError
from koan_ray.ports import Change

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from koan_ray.domain.records import ExecutionRecord, JobRecord
    from koan_ray.ports import Clock, TimerHandle

_WRITE_BEHIND_S = 0.05
_MAX_BEHIND_S = 0.5
_RETRY_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class Target(Protocol):
    """The part of a store that a writer uses."""

    async def apply(self, changes: Sequence[Change]) -> list[Change]:
        """See `koan_ray.ports.JobStore`."""

    async def get(self, job_id: str) -> JobRecord | None:
        """See `koan_ray.ports.JobStore`."""

    async def file_executions(self, changes: Sequence[Change]) -> None:
        """See `koan_ray.ports.DocumentStore`."""


class Writer:
    """The one place that writes records of one store.

    Args:
        store: Where to.
        clock: For the write-behind interval and the waits after an outage.
        on_written: Called after a flush with the records it wrote, in the order they were staged.
        on_fenced: Called with a record that a newer writer has replaced; that writer owns the shard now.
        term: Of the lease that these writes are made under.
        meters: Where flushes are measured.
        source: Their label there.
    """

    def __init__(
        self,
        store: Target,
        clock: Clock,
        on_written: Callable[[Sequence[JobRecord]], None],
        on_fenced: Callable[[JobRecord], None] | None = None,
        *,
        term: int = 1,
        meters: Meters | None = None,
        source: str = "memory",
    ) -> None:
        self._store, self._clock, self._term = store, clock, term
        self._on_written, self._on_fenced = on_written, on_fenced
        self._dirty: dict[str, JobRecord] = {}
        self._executions: dict[str, tuple[ExecutionRecord, ...]] = {}
        self._acks: list[asyncio.Future[None]] = []  # of what the next flush will write
        self._in_flight: list[asyncio.Future[None]] = []  # of the flush that is under way
        self._flushing: asyncio.Task[None] | None = None
        self._timer: TimerHandle | None = None
        self._behind_since: float | None = None  # when the oldest state was staged that may wait
        self._behind_s = _WRITE_BEHIND_S
        self._abandoned: BaseException | None = None
        self._n_repeated = 0  # jobs of a flush that was interrupted and is not through yet
        self._meters, self._source = meters or Meters(), source

    @property
    def n_dirty(self) -> int:
        """Jobs whose state is not being written yet."""
        return len(self._dirty)

    @property
    def n_behind(self) -> int:
        """Jobs whose newest state is not stored though its turn has come, or has to wait for that."""
        return len(self._dirty) + self._n_repeated

    def abandon(self, why: BaseException) -> None:
        """Write nothing more; whoever waits for a flush is told ``why``."""
        self._abandoned = why
        self._dirty, self._executions = {}, {}
        if self._flushing is not None:
            self._flushing.cancel()
        acks, self._acks, self._in_flight = [*self._acks, *self._in_flight], [], []
        for ack in acks:
            if not ack.done():
                ack.set_exception(why)

    def stage(self, job: JobRecord, execution: ExecutionRecord | None = None) -> None:
        """Write this state with the next flush, which begins as soon as the loop is free."""
        self._put(job, execution)
        if self._flushing is None:
            self._begin()

    def stage_behind(self, job: JobRecord, execution: ExecutionRecord | None = None) -> None:
        """Write this state soon, or with the next flush if that is sooner; a newer one may overtake it.

        Soon is 50 ms, or as long as the last flush took, up to half a second: where writing is slow, it pays to wait for
        the end of a short job and to write that only.
        """
        self._put(job, execution)
        if self._flushing is None:
            if self._behind_since is None:
                self._behind_since = self._clock.monotonic()
            if self._timer is None:
                self._timer = self._clock.call_later(self._behind_s, self._write_behind)

    def forget_execution(self, job_id: str, execution_id: str) -> bool:
        """Drop an execution that never began, if no flush has taken it yet; false if one has."""
        staged = self._executions.get(job_id, ())
        kept = tuple(execution for execution in staged if execution.id != execution_id)
        if len(kept) == len(staged):
            return False
        if kept:
            self._executions[job_id] = kept
        else:
            del self._executions[job_id]
        return True

    async def flushed(self) -> None:
        """Return when everything staged before this call is written.

        Raises:
            ConflictError: The writer was abandoned before that; another coordinator writes now.
        """
        if self._abandoned is not None:
            raise self._abandoned
        if not self._dirty and self._flushing is None:
            return
        ack: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # With nothing staged since, all that the caller staged is in the flush that is under way.
        (self._acks if self._dirty else self._in_flight).append(ack)
        self._begin()
        await ack

    def _put(self, job: JobRecord, execution: ExecutionRecord | None) -> None:
        if self._abandoned is not None:
            return
        self._dirty[job.id] = job
        if execution is not None:
            staged = self._executions.get(job.id)
            if staged is None:
                self._executions[job.id] = (execution,)
            else:
                self._executions[job.id] = (*(e for e in staged if e.id != execution.id), execution)

    def _write_behind(self) -> None:
        # Left to run out when a flush came sooner: to cancel it and to set another for every job costs more.
        self._timer = None
        if self._behind_since is None or not self._dirty or self._flushing is not None:
            return
        left = self._behind_since + self._behind_s - self._clock.monotonic()
        if left > 0.001:
            self._timer = self._clock.call_later(left, self._write_behind)
        else:
            self._begin()

    def _begin(self) -> None:
        if self._flushing is None:
            self._flushing = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        try:
            while self._dirty or self._acks:
                self._in_flight, self._acks = self._acks, []
                self._behind_since, began = None, self._clock.monotonic()
                written = await self._flush()
                took_s = self._clock.monotonic() - began
                self._meters.took("flush_seconds", took_s, self._source)
                self._behind_s = min(max(_WRITE_BEHIND_S, took_s), _MAX_BEHIND_S)
                self._on_written(written)
                acks, self._in_flight = self._in_flight, []
                for ack in acks:
                    if not ack.done():
                        ack.set_result(None)
        finally:
            self._flushing = None

    async def _flush(self) -> list[JobRecord]:
        dirty, self._dirty = self._dirty, {}
        executions, self._executions = self._executions, {}
        changes = []
        for job in dirty.values():
            expect = job.rev
            job.rev = expect + 1
            job.term = self._term
            changes.append(Change(job, expect, executions.get(job.id, ())))
        try:
            refused = await self._store.apply(changes)
        except StoreError:
            self._n_repeated = len(changes)
            try:
                refused = await self._repeat(changes)
            finally:
                self._n_repeated = 0
        if not refused:
            return list(dirty.values())
        for change in refused:
            self._report_fenced(change)
        gone = {change.job.id for change in refused}
        return [job for job in dirty.values() if job.id not in gone]

    async def _repeat(self, changes: list[Change]) -> list[Change]:
        """Write what an interrupted flush did not, and return what a newer writer has replaced."""
        turn = 0
        while True:
            await pause(self._clock, _RETRY_S[min(turn, len(_RETRY_S) - 1)])
            turn += 1
            try:
                refused = await self._store.apply(changes)
                ours = [change for change in refused if await self._is_ours(change)]
                if ours:  # the first try wrote the job, and perhaps not its executions
                    await self._store.file_executions(ours)
                fenced = [change for change in refused if change not in ours]
                for resolution, n in (("was_written", len(ours)), ("refused", len(fenced)),
                                      ("repeated", len(changes) - len(refused))):  # fmt: skip
                    if n:
                        self._meters.count("outcome_unknown", "flush", resolution, n=n)
                return fenced
            except StoreError:
                continue

    async def _is_ours(self, change: Change) -> bool:
        stored = await self._store.get(change.job.id)
        return stored is not None and (stored.rev, stored.term) == (change.job.rev, change.job.term)

    def _report_fenced(self, change: Change) -> None:
        if self._on_fenced is None:
            raise StaleLeaseError(change.job.id, change.job.term, change.job.term + 1)
        self._on_fenced(change.job)


async def pause(clock: Clock, delay_s: float) -> None:
    """Wait by the engine's clock."""
    over = asyncio.Event()
    timer = clock.call_later(delay_s, over.set)
    try:
        await over.wait()
    finally:
        timer.cancel()
