"""Moves jobs that have ended to an archive, and back.

A move is four steps, and a crash after any of them leaves the job in at least one place::

    read the source ──► write the copy ──► read it back and compare ──► delete the source, guarded by its rev

Of a job over items, the parts that its checkpoint counts are copied page by page before the job itself, compared with it,
and deleted after it, so that whoever finds a job finds its parts.

The next pass begins each move from the start: a copy that is there and equal is not written again. Everything is read by
majority. Executions go with their job; where `jobs.audit_source` keeps them in a source of their own, they stay there, and
are found from wherever the job is. An interrupted delete can leave executions behind without their job; they are equal to
those in the archive, nobody sees them, and the next pass deletes them: which jobs a batch is going to move is noted first.

One move at a time, and none while a job is removed or brought back. A holder of the lease that was paused in the middle of
a move can do no harm when it wakes up: a job that was brought back has a higher ``rev``, which its delete does not match.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from koan_ray.domain.archival import age_key, due, fingerprint, is_archive, same_part
from koan_ray.domain.query import Query
from koan_ray.domain.records import STREAMS, Residence
from koan_ray.engine.tasks import Failures
from koan_ray.engine.writer import pause
from koan_ray.errors import ConflictError, JobNotFoundError, RecordCorruptError, StoreUnavailableError
from koan_ray.killpoints import killpoint

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

    from koan_ray.domain.archival import ArchivalPolicy
    from koan_ray.domain.records import ExecutionRecord, JobRecord, Part
    from koan_ray.domain.status import JobStatus
    from koan_ray.engine.shards import Shards
    from koan_ray.ports import Clock, Log

_T = TypeVar("_T")
_TRIES = 3
_RETRY_S = 5.0
_PAGE = 500
_PARTS = 50  # of a job that are read at a time
_BUCKETS_S = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0)


class _Outcome(StrEnum):
    """What became of one move; also the names of the counters."""

    MOVED = "moved"
    GONE = "gone"  # nothing was there any more
    CHANGED = "changed"  # the guard of the delete did not hold; the source stays
    MISMATCHED = "mismatched"  # it could not be written and read back equal; the source stays


class _Place(NamedTuple):
    shards: Shards
    partition: str

    @property
    def is_ours(self) -> bool:
        return self.shards.is_active and self.shards.may_act

    @property
    def keeps_executions(self) -> bool:
        return self.shards.audit is self.shards.store

    def __str__(self) -> str:
        return f"{self.shards.source}/{self.partition}"


class _StoodDownError(Exception):
    """The lease of a source is lost, or not certain at present."""


class Archivist:
    """Applies archival policies to the sources of one coordinator.

    Args:
        policies: The first that covers a job decides over it.
        sources: Returns the sources, by name.
        home: Where jobs are brought back to whose copy does not say where they came from.
        is_live: Tells of a job whether the end of it may not be written yet.
        clock: Time and timers.
        log: Where batches and problems are told.
        failures: Where what nobody expected is noted.
    """

    def __init__(
        self, policies: Sequence[ArchivalPolicy], sources: Callable[[], Mapping[str, Shards]], home: Callable[[], Residence],
        is_live: Callable[[str], bool], clock: Clock, log: Log, failures: Failures | None = None,
    ) -> None:  # fmt: skip
        self._failures = failures or Failures(log)
        self._policies, self._sources, self._home, self._is_live = tuple(policies), sources, home, is_live
        self._clock, self._log = clock, log
        self._passing = asyncio.Lock()
        self.undisturbed = asyncio.Lock()  # held for each step that must see a job stay where it is
        self.counters: Counter[str] = Counter()
        self._buckets = [0] * (len(_BUCKETS_S) + 1)
        self._took_s = 0.0

    def snapshot(self) -> dict[str, Any]:
        """Return counters, and how long batches took: ``counts[n]`` of them at most ``le[n]`` seconds, the last more."""
        took = {"le": list(_BUCKETS_S), "counts": list(self._buckets), "sum": self._took_s, "count": sum(self._buckets)}
        return {"policies": [policy.name for policy in self._policies], **self.counters, "batch_seconds": took}

    @property
    def is_passing(self) -> bool:
        """A pass is being made."""
        return self._passing.locked()

    # --- a pass ------------------------------------------------------------------------------------------------------

    async def archive_once(self, *, dry_run: bool = False) -> dict[str, dict[str, int]]:
        """Apply every policy to every source that is ours; returns counts by policy.

        Shape: ``due``: jobs that were to move; ``moved``, ``gone``, ``changed``, ``mismatched``: what became of them;
        ``interrupted``: sources whose rest was left to the next pass. A dry run changes nothing and counts ``due`` only.
        """
        async with self._passing:
            self.counters["passes"] += not dry_run
            counts: dict[str, dict[str, int]] = {}
            for place, policy in enumerate(self._policies):
                found: Counter[str] = Counter(due=0, moved=0, gone=0, changed=0, mismatched=0, interrupted=0)
                for shards in list(self._sources().values()):
                    if policy.source in (None, shards.source):
                        await self._survive(policy, self._policies[:place], shards, found, dry_run=dry_run)
                counts[policy.name] = dict(found)
            return counts

    async def _survive(
        self,
        policy: ArchivalPolicy,
        earlier: Sequence[ArchivalPolicy],
        shards: Shards,
        found: Counter[str],
        *,
        dry_run: bool,
    ) -> None:
        """Apply one policy to one source; what prevents that is told, and left to the next pass."""
        try:
            target = self._target(policy, shards)
            if not dry_run:
                await self._finish_moves(shards)
            async for source, jobs in self._batches(policy, earlier, shards, target):
                found["due"] += len(jobs)
                if not dry_run and jobs:
                    await self._move_batch(policy, source, target, jobs, found)
        except _StoodDownError:
            found["interrupted"] += 1
        except StoreUnavailableError as error:
            found["interrupted"] += 1
            self._log.warning("archival_interrupted", policy=policy.name, source=shards.source, problem=str(error))
        except ConflictError as error:
            found["interrupted"] += 1
            self._log.error("archival_refused", policy=policy.name, source=shards.source, problem=str(error))
        except Exception as error:  # noqa: BLE001 - the other policies and sources have their turn
            found["interrupted"] += 1
            self._failures.note(f"archival of {shards.source}", error)

    async def _finish_moves(self, shards: Shards) -> None:
        """Delete what a batch has left that was interrupted between a job and its executions."""
        _check_ours(_Place(shards, ""))

        async def finish() -> int:
            async with self.undisturbed:
                return await shards.store.finish_moves()

        if n_left := await self._insist(finish):
            self._log.info("moves_finished", source=shards.source, n_executions=n_left)

    async def _insist(self, act: Callable[[], Awaitable[_T]]) -> _T:
        """Do what may be repeated, as often and as slowly as a move is tried."""
        for _ in range(_TRIES - 1):
            try:
                return await act()
            except StoreUnavailableError:
                await pause(self._clock, _RETRY_S)
        return await act()

    def _target(self, policy: ArchivalPolicy, shards: Shards) -> _Place:
        name = policy.target_source or shards.source
        if name not in self._sources():
            msg = f"archival policy {policy.name!r}: target_source: there is no source {name!r}"
            raise ConflictError(msg)
        return _Place(self._sources()[name], policy.target_partition)

    async def _batches(
        self, policy: ArchivalPolicy, earlier: Sequence[ArchivalPolicy], shards: Shards, target: _Place
    ) -> AsyncIterator[tuple[_Place, list[JobRecord]]]:
        """Iterate over what is due in each partition, oldest first."""
        _check_ours(_Place(shards, ""), target)
        newest = _Newest(policy, shards)
        now = self._clock.now()
        for partition in await shards.store.partitions():
            source, after = _Place(shards, partition), None
            while policy.takes_from(partition):
                _check_ours(source, target)
                page = await shards.store.settled_before(
                    partition, policy.statuses, now - policy.older_than_s, policy.batch, policy.kinds, after=after
                )
                if not page:
                    break
                after = age_key(page[-1])
                jobs = [_named(job, source) for job in page if not self._is_live(job.id)]
                yield source, due(policy, earlier, jobs, now, await newest.of(jobs))

    async def _move_batch(
        self, policy: ArchivalPolicy, source: _Place, target: _Place, jobs: Sequence[JobRecord], found: Counter[str]
    ) -> None:
        began_at, batch = self._clock.monotonic(), Counter[str]()
        job_ids = [job.id for job in jobs]
        await self._insist(lambda: source.shards.store.note_moves(source.partition, job_ids))
        try:
            for job in jobs:
                batch[await self._carry_or_leave(job, source, target)] += 1
        finally:
            took_s = self._clock.monotonic() - began_at
            self._observe(took_s)
            found.update(batch)
            self.counters.update(batch)
            self._log.info(
                "jobs_archived", policy=policy.name, source=str(source), target=str(target), n=batch[_Outcome.MOVED],
                n_mismatched=batch[_Outcome.MISMATCHED], duration_s=round(took_s, 6),
            )  # fmt: skip

    def _observe(self, took_s: float) -> None:
        place = next((n for n, bound in enumerate(_BUCKETS_S) if took_s <= bound), len(_BUCKETS_S))
        self._buckets[place] += 1
        self._took_s += took_s

    # --- one job -----------------------------------------------------------------------------------------------------

    async def _carry_or_leave(self, job: JobRecord, source: _Place, target: _Place) -> _Outcome:
        """Move a job; one that cannot be moved for a reason that nobody expected stays, and its neighbours go."""
        try:
            return await self._carry(job, source, target, _archived)
        except (_StoodDownError, StoreUnavailableError, ConflictError):
            raise
        except Exception as error:  # noqa: BLE001 - of this job, as far as anybody knows
            self._failures.note(f"archival of {source.shards.source}", error)
            self._log.error("archive_mismatched", job_id=job.id, source=str(source), target=str(target), problem=repr(error))
            return _Outcome.MISMATCHED

    async def _carry(
        self, job: JobRecord, source: _Place, target: _Place, dress: Callable[[JobRecord, _Place, _Place], JobRecord]
    ) -> _Outcome:
        """Move a job; the source stays unless an equal copy was read back.

        Args:
            job: As last seen in the source.
            source: From where.
            target: To where.
            dress: Returns the record that is written there; a reader must see no difference.
        """
        problem: Exception | None = None
        for turn in range(_TRIES):
            if turn:
                await pause(self._clock, _RETRY_S)
            try:
                async with self.undisturbed:
                    outcome = await self._try_to_carry(job, source, target, dress)
                if outcome is not None:
                    return outcome
                problem = None
            except RecordCorruptError as error:
                problem = error
            except StoreUnavailableError as error:  # it is unknown what was done: the next try looks
                problem = error
        if isinstance(problem, StoreUnavailableError):
            raise problem
        self._log.error(
            "archive_mismatched", job_id=job.id, source=str(source), target=str(target), tries=_TRIES,
            problem=str(problem or "the copy that was read back is not equal to the job; the job stays where it is"),
        )  # fmt: skip
        return _Outcome.MISMATCHED

    async def _try_to_carry(
        self, job: JobRecord, source: _Place, target: _Place, dress: Callable[[JobRecord, _Place, _Place], JobRecord]
    ) -> _Outcome | None:
        """Move a job as it is found now; None if the copy is not equal."""
        _check_ours(source, target)
        found = await source.shards.store.get_copy(job.id, source.partition)
        if found is None:
            return await self._finish(job, source, target)
        record, executions = _named(found[0], source), found[1]
        copy = dress(record, source, target)
        wanted = fingerprint(copy, _carried(executions, source, target))
        if not await self._has_equal(source, target, copy, wanted):
            _check_ours(source, target)
            killpoint("archive.before_copy")
            await _copy_parts(source, target, copy)
            await target.shards.store.put_copy(copy, _carried(executions, source, target), target.partition)
            killpoint("archive.after_copy")
            if not await self._has_equal(source, target, copy, wanted):
                return None
        _check_ours(source, target)
        killpoint("archive.before_delete")
        if await source.shards.store.delete_if(record, source.partition):
            killpoint("archive.after_delete")
            return _Outcome.MOVED
        is_gone = await source.shards.store.get_copy(job.id, source.partition) is None
        return _Outcome.MOVED if is_gone else _Outcome.CHANGED

    async def _finish(self, job: JobRecord, source: _Place, target: _Place) -> _Outcome:
        """The source is gone: deleted by an earlier try whose answer was lost, or removed by somebody."""
        if await target.shards.store.get_copy(job.id, target.partition) is None:
            await target.shards.store.delete_if(job, target.partition)  # parts that were copied before it was removed
            return _Outcome.GONE
        await source.shards.store.delete_if(job, source.partition)  # executions and parts that an interrupted delete left
        return _Outcome.MOVED

    async def _has_equal(self, source: _Place, target: _Place, copy: JobRecord, wanted: str) -> bool:
        """Tell whether the target holds a copy that no reader can tell from the source, and no older one than asked for."""
        try:
            found = await target.shards.store.get_copy(copy.id, target.partition)
        except RecordCorruptError:
            return False
        if found is None or found[0].rev < copy.rev or fingerprint(*found) != wanted:
            return False
        return await _has_equal_parts(source, target, copy)

    # --- back --------------------------------------------------------------------------------------------------------

    async def restore(self, job_id: str) -> bool:
        """Bring a job back to where it came from; false if it is in no archive.

        It stays there for as long as if it had ended now. May be repeated.

        Raises:
            JobNotFoundError: There is no such job.
            ConflictError: Its copy could not be read back equal, or changed meanwhile; it is still in the archive.
            StoreUnavailableError: Sources do not answer or are not ours at present; repeat the call later.
        """
        found = await self._find_archived(job_id)
        if found is None:
            if not any([await shards.store.get(job_id) for shards in self._sources().values()]):
                raise JobNotFoundError(job_id)
            return False
        job, source = found
        target = self._origin(job, source)
        await source.shards.of(job_id).ready()
        await target.shards.of(job_id).ready()
        try:
            outcome = await self._carry(job, source, target, self._restored)
        except _StoodDownError:
            msg = f"job {job_id}: the lease of {source} or {target} is not certain at present; repeat the call later"
            raise StoreUnavailableError(msg) from None
        if outcome is _Outcome.GONE:
            raise JobNotFoundError(job_id)
        if outcome is not _Outcome.MOVED:
            msg = f"job {job_id}: could not be brought back from {source} to {target}: {outcome}; it is still there"
            raise ConflictError(msg)
        self.counters["restored"] += 1
        self._log.info("job_restored", job_id=job_id, source=str(source), target=str(target))
        return True

    async def _find_archived(self, job_id: str) -> tuple[JobRecord, _Place] | None:
        for shards in self._sources().values():
            for partition in filter(is_archive, await shards.store.partitions()):
                place = _Place(shards, partition)
                found = await shards.store.get_copy(job_id, partition)
                if found is not None and found[0].status.is_final:
                    return _named(found[0], place), place
        return None

    def _origin(self, job: JobRecord, source: _Place) -> _Place:
        """Return where an archived job came from; the default partition of its own source where that is not known."""
        home = self._home()
        name, partition = job.particulars.residence.origin or (None, home.partition)
        shards = self._sources().get(name or source.shards.source, source.shards)
        return _Place(shards, home.partition if is_archive(partition) else partition)

    def _restored(self, job: JobRecord, _source: _Place, target: _Place) -> JobRecord:
        """Return a job as it is written where it came from; its rev is higher, so that no late delete can match it."""
        about = job.particulars
        residence = Residence(target.shards.source, target.partition, about.residence.audit)
        return job.evolve(
            rev=job.rev + 1, term=target.shards.of(job.id).term, last_modified=self._clock.now(),
            particulars=about._replace(residence=residence),
        )  # fmt: skip


class _Newest:
    """By kind and status, the oldest job of a source that stays because it is among the newest; asked once for a pass."""

    def __init__(self, policy: ArchivalPolicy, shards: Shards) -> None:
        self._policy, self._shards = policy, shards
        self._bounds: dict[tuple[str, JobStatus], tuple[float, str]] = {}

    async def of(self, jobs: Sequence[JobRecord]) -> Mapping[tuple[str, JobStatus], tuple[float, str]]:
        """Return the bounds of every kind and status among the ``jobs``."""
        if self._policy.keep:
            for key in {(job.terms.kind, job.status) for job in jobs} - self._bounds.keys():
                self._bounds[key] = await self._bound(*key)
        return self._bounds

    async def _bound(self, kind: str, status: JobStatus) -> tuple[float, str]:
        left, last, more = self._policy.keep, (0.0, ""), True
        query = Query(
            kinds=frozenset({kind}), statuses=frozenset({status}), order_by="completed_at", partition=self._policy.partition
        )
        while left > 0 and more:
            query = replace(query, limit=min(left, _PAGE))
            page = await self._shards.store.query(query)
            if page.jobs:
                last = age_key(page.jobs[-1])
                query = replace(query, after=query.sort_key(page.jobs[-1]))
            left, more = left - len(page.jobs), page.cursor is not None
        return (0.0, "") if left > 0 else last  # fewer than that: all of them stay


def _archived(job: JobRecord, source: _Place, target: _Place) -> JobRecord:
    """Return a job as it is written to an archive; it says where it came from."""
    about = job.particulars
    origin = (None if target.shards is source.shards else source.shards.source, source.partition)
    residence = Residence(target.shards.source, target.partition, about.residence.audit, origin)
    return job.evolve(particulars=about._replace(residence=residence))


def _named(job: JobRecord, place: _Place) -> JobRecord:
    about = job.particulars
    residence = about.residence._replace(source=place.shards.source, partition=place.partition)
    return job if residence == about.residence else job.evolve(particulars=about._replace(residence=residence))


def _carried(executions: Sequence[ExecutionRecord], source: _Place, target: _Place) -> Sequence[ExecutionRecord]:
    """Return the executions that go with their job.

    Raises:
        ConflictError: They would be lost: they are kept with the job here, and the target keeps none.
    """
    if source.keeps_executions and not target.keeps_executions and executions:
        msg = f"{source} keeps executions with their jobs and {target} does not; archive within {source.shards.source!r}"
        raise ConflictError(msg)
    return executions


async def _pages(place: _Place, job: JobRecord, stream: str) -> AsyncIterator[list[Part]]:
    """Iterate over the parts of a stream that count.

    Raises:
        RecordCorruptError: One is missing.
    """
    after, n_counted = -1, job.checkpoint.n_parts(stream) if job.checkpoint is not None else 0
    while after < n_counted - 1:
        page = await place.shards.store.read_parts(
            place.partition, job.id, stream, after, min(_PARTS, n_counted - after - 1)
        )
        if [part.seq for part in page] != list(range(after + 1, after + 1 + len(page))) or not page:
            raise RecordCorruptError(job.id, f"parts.{stream}.{after + 1}", f"is missing in {place}")
        after = page[-1].seq
        yield page


async def _copy_parts(source: _Place, target: _Place, job: JobRecord) -> None:
    for stream in STREAMS:
        async for page in _pages(source, job, stream):
            _check_ours(source, target)
            await target.shards.store.write_parts(target.partition, page)


async def _has_equal_parts(source: _Place, target: _Place, job: JobRecord) -> bool:
    """Tell whether the target has all parts that count as the source has them; holds two pages at a time."""
    for stream in STREAMS:
        async for ours in _pages(source, job, stream):
            theirs: list[Part] = []
            while len(theirs) < len(ours):
                after, n_left = ours[len(theirs)].seq - 1, len(ours) - len(theirs)
                page = await target.shards.store.read_parts(target.partition, job.id, stream, after, n_left)
                if not page:
                    return False
                theirs += page
            if not all(same_part(one, other) for one, other in zip(ours, theirs, strict=True)):
                return False
    return True


def _check_ours(*places: _Place) -> None:
    if not all(place.is_ours for place in places):
        raise _StoodDownError
