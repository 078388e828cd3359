"""Group commit: all that has gathered is written at once, one flush in flight, acks wait for their flush only.

The latest state of a job wins; a job that moved twice between two flushes is written once. What a crash leaves behind is
decided by the order *stage, flush, tell*: nobody hears of a state that is not written.

A flush that ended in an error of the store has an unknown outcome. It is repeated until the store answers: a change that
was applied the first time is refused then, and reading back tells it from one that a newer writer has overtaken: what we
find carries the rev and the term that we set.

One record never holds up its neighbours. Where a flush ends in anything else, the records that no document can hold are
found, by asking the store's own codec and else by halves, and are reported one by one; all others are written.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

from koan_ray.domain.texts import said
from koan_ray.engine.meters import Meters
from koan_ray.errors import ConfigurationError, RecordCorruptError, RecordRefusedError, StoreError
from koan_ray.ports import Change, Silence

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from koan_ray.domain.records import ExecutionRecord, JobRecord
    from koan_ray.ports import Clock, Log, TimerHandle

_WRITE_BEHIND_S = 0.05
_MAX_BEHIND_S = 0.5
_RETRY_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_MAX_ODD = 3  # times that one record alone ends in an error which is not the store's, before it is given up


class Target(Protocol):
    """The part of a store that a writer uses."""

    async def apply(self, changes: Sequence[Change]) -> list[Change]:
        """See `koan_ray.ports.JobStore`."""

    async def get(self, job_id: str) -> JobRecord | None:
        """See `koan_ray.ports.JobStore`."""

    async def file_executions(self, changes: Sequence[Change]) -> None:
        """See `koan_ray.ports.DocumentStore`."""

    def objection(self, record: JobRecord | ExecutionRecord) -> str | None:
        """See `koan_ray.ports.JobStore`."""


class Writer:
    """The one place that writes records of one store.

    Args:
        store: Where to.
        clock: For the write-behind interval and the waits after an outage.
        on_written: Called after a flush with the records it wrote, in the order they were staged.
        on_fenced: Called with a record that a newer writer has replaced; that writer owns the shard now.
        on_unwritable: Called with a record that no document can hold, and the reason; what is stored of it is unchanged.
        term: Of the lease that these writes are made under.
        meters: Where flushes are measured.
        source: Their label there.
        log: Where what should not happen is told.
    """

    def __init__(
        self,
        store: Target,
        clock: Clock,
        on_written: Callable[[Sequence[JobRecord]], None],
        on_fenced: Callable[[JobRecord], None],
        on_unwritable: Callable[[JobRecord, str], None],
        *,
        term: int = 1,
        meters: Meters | None = None,
        source: str = "memory",
        log: Log | None = None,
    ) -> None:
        self._store, self._clock, self._term = store, clock, term
        self._on_written, self._on_fenced, self._on_unwritable = on_written, on_fenced, on_unwritable
        self._log: Log = log if log is not None else Silence()
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
        self._taken: list[Change] = []  # by the flush that is under way
        self._n_broken = 0  # flushes that ended in an error of ours, one after the other
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
                try:
                    written = await self._flush()
                except Exception as error:  # noqa: BLE001 - an error of ours: told, and all of it begun anew
                    await self._begin_anew(error)
                    continue
                took_s = self._clock.monotonic() - began
                self._meters.took("flush_seconds", took_s, self._source)
                self._behind_s = min(max(_WRITE_BEHIND_S, took_s), _MAX_BEHIND_S)
                self._report_written(written)
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
        self._taken = changes
        unwritable: dict[str, str] = {}
        try:
            # What was taken by a flush that broke off may be written: then it looks refused, and is ours.
            refused = await (self._store.apply(changes) if not self._n_broken else self._write_apart(changes, unwritable))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is found out which records it concerns
            self._n_repeated = len(changes)
            try:
                refused = await self._write_apart(changes, unwritable, error)
            finally:
                self._n_repeated = 0
        self._n_broken, self._taken = 0, []
        if not refused and not unwritable:
            return list(dirty.values())
        for change in refused:
            self._survive(self._on_fenced, change.job)
        for change in changes:
            if change.job.id in unwritable:
                self._report_unwritable(change, unwritable[change.job.id])
        gone = {change.job.id for change in refused}.union(unwritable)
        return [job for job in dirty.values() if job.id not in gone]

    async def _write_apart(
        self, changes: list[Change], unwritable: dict[str, str], failure: Exception | None = None
    ) -> list[Change]:
        """Write what can be written, after ``failure``, and return what a newer writer has replaced.

        The store is asked again until it answers. What no document can hold is left out, and put into ``unwritable`` with
        the reason: records that the store has named, those that its codec objects to, and, of an error that tells neither,
        the one record that is left when the others were written in halves.
        """
        fenced: list[Change] = []
        todo, turn = [changes], 0
        odd: dict[str, int] = {}  # how often a record alone met an error that tells nothing
        n_odd = 0  # the most of them
        while todo:
            group = todo.pop()
            if failure is None:
                if len(group) == 1 and odd.get(group[0].job.id, 0) > n_odd:  # all others are through
                    await pause(self._clock, _RETRY_S[n_odd])
                    n_odd += 1
                failure = await self._attempt(group, fenced)
                if failure is None:
                    continue
            if found := self._objections(group, failure):
                unwritable.update(found)
                rest = [change for change in group if change.job.id not in found]
                todo += [rest] if rest else []
            elif isinstance(failure, (StoreError, ConfigurationError)):  # a login may be refused for a while, too
                todo.append(group)
                await pause(self._clock, _RETRY_S[min(turn, len(_RETRY_S) - 1)])
                turn += 1
            elif len(group) > 1:
                todo += [group[len(group) // 2 :], group[: len(group) // 2]]
            elif odd.get(group[0].job.id, 0) < _MAX_ODD:
                todo.insert(0, group)
                odd[group[0].job.id] = odd.get(group[0].job.id, 0) + 1
                self._log.error("write_failed", job_id=group[0].job.id, problem=_in_words(failure))
            else:
                unwritable[group[0].job.id] = _in_words(failure)
            failure = None
        return fenced

    async def _attempt(self, changes: list[Change], fenced: list[Change]) -> Exception | None:
        """Write changes of which some may be written already; return what was in the way, if anything."""
        try:
            refused = await self._store.apply(changes)
            ours = [change for change in refused if await self._is_ours(change)]
            if ours:  # the first try wrote the job, and perhaps not its executions
                await self._store.file_executions(ours)
        except Exception as error:  # noqa: BLE001 - judged by the caller
            return error
        lost = [change for change in refused if change not in ours]
        fenced += lost
        for resolution, n in (("was_written", len(ours)), ("refused", len(lost)),
                              ("repeated", len(changes) - len(refused))):  # fmt: skip
            if n:
                self._meters.count("outcome_unknown", "flush", resolution, n=n)
        return None

    def _objections(self, changes: list[Change], failure: Exception) -> dict[str, str]:
        """Return which of these no document can hold, as far as can be said, and why."""
        if isinstance(failure, RecordRefusedError):
            named = failure.problems
            return {change.job.id: named[change.job.id] for change in changes if change.job.id in named}
        found: dict[str, str] = {}
        if not isinstance(failure, (StoreError, ConfigurationError)):
            for job, _, executions in changes:
                records: tuple[JobRecord | ExecutionRecord, ...] = (job, *executions)
                if problem := next(filter(None, map(self._objection, records)), None):
                    found[job.id] = problem
        return found

    def _objection(self, record: JobRecord | ExecutionRecord) -> str | None:
        try:
            return self._store.objection(record)
        except Exception as error:  # noqa: BLE001 - a store that cannot even say so: then halves are tried
            self._log.error("objection_failed", record_id=record.id, problem=_in_words(error))
            return None

    async def _is_ours(self, change: Change) -> bool:
        try:
            stored = await self._store.get(change.job.id)
        except RecordCorruptError:  # somebody has written what we did not
            return False
        return stored is not None and (stored.rev, stored.term) == (change.job.rev, change.job.term)

    def _report_unwritable(self, change: Change, problem: str) -> None:
        job = change.job
        self._log.error("record_unwritable", job_id=job.id, kind=job.terms.kind, rev=job.rev, problem=problem)
        if change.expect == 0:  # it was never there, and no later state of it will be
            self._dirty.pop(job.id, None)
            self._executions.pop(job.id, None)
        else:  # its executions go with its next state, those that can be written
            later = self._executions.get(job.id, ())
            known = {execution.id for execution in later}
            kept = [
                execution
                for execution in change.executions
                if execution.id not in known and self._objection(execution) is None
            ]
            if kept:
                self._executions[job.id] = (*kept, *later)
        self._survive(self._on_unwritable, job, problem)

    def _report_written(self, jobs: list[JobRecord]) -> None:
        """Report what was written; should that fail, one by one, so that each hears of its own all the same."""
        if self._survive(self._on_written, jobs):
            return
        for job in jobs:
            self._survive(self._on_written, [job])

    def _survive(self, report: Callable[..., None], *args: object) -> bool:
        """Call one of ours; false, and the log says so, if it raised: a flush does not end with that."""
        try:
            report(*args)
        except Exception as error:  # noqa: BLE001 - see above
            self._log.error("report_failed", report=getattr(report, "__name__", ""), problem=_in_words(error))
            return False
        return True

    async def _begin_anew(self, error: Exception) -> None:
        """Put back what a flush had taken that ended in an error of ours, and wait a moment."""
        self._log.error("flush_broken", problem=_in_words(error), n=len(self._taken))
        for change in self._taken:
            newer = self._dirty.get(change.job.id)
            change.job.rev = change.expect
            if newer is None:
                self._dirty[change.job.id] = change.job
            else:
                newer.rev = change.expect
            later = self._executions.get(change.job.id, ())
            known = {execution.id for execution in later}
            if earlier := [execution for execution in change.executions if execution.id not in known]:
                self._executions[change.job.id] = (*earlier, *later)
        self._taken = []
        self._acks, self._in_flight = [*self._in_flight, *self._acks], []
        await pause(self._clock, _RETRY_S[min(self._n_broken, len(_RETRY_S) - 1)])
        self._n_broken += 1


def _in_words(error: Exception) -> str:
    return said(f"{type(error).__name__}: {said(error)}", 500)


async def pause(clock: Clock, delay_s: float) -> None:
    """Wait by the engine's clock."""
    over = asyncio.Event()
    timer = clock.call_later(delay_s, over.set)
    try:
        await over.wait()
    finally:
        timer.cancel()
