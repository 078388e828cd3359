"""Looks at everything that is stored and tells what must not be: `koan_ray.domain.invariants` over live data. Reads only.

Each partition is walked in batches; what a batch refers to, in other partitions and of its parents, is looked up for the
whole batch. So memory is that of one batch, however many jobs there are, and so is what the store has to hold.

Jobs may move while we look: a job and its executions are two reads, and two writes of the engine. What looks wrong is
therefore read again a little later, and only what is still wrong in the same way is told.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Final, NamedTuple

from koan_ray.domain.ids import made_at
from koan_ray.domain.invariants import Violation, check_job, check_placement
from koan_ray.domain.records import STREAMS
from koan_ray.domain.status import JobStatus
from koan_ray.engine.writer import pause
from koan_ray.errors import RecordCorruptError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Sequence

    from koan_ray.domain.lease import Lease
    from koan_ray.domain.records import ExecutionRecord, JobRecord
    from koan_ray.ports import Clock, DocumentStore

UNREADABLE: Final = "unreadable"
_LOOK_AGAIN_S: Final = 1.0  # a flush takes a few milliseconds
_OVERDUE_TTLS: Final = 4.0  # times ttl: within 1.5 a lease lapses, and the next holder then takes a while to recover
_WATCH_TTLS: Final = 1.5  # as long as another coordinator would watch a beat
_LOOKS: Final = 6
_YOUNG_S: Final = 3600.0  # parts may be there for so long before the job that they are being copied for


class Patient(NamedTuple):
    """A source to be looked at. ``unreadable`` is where its stores put what they cannot decode."""

    name: str
    store: DocumentStore
    audit: DocumentStore  # of its executions; often the same store
    unreadable: list[RecordCorruptError]
    is_dead: Callable[[str], bool] = lambda _holder: False  # tells of a holder whether its process is known to be gone


class Finding(NamedTuple):
    """One thing that is wrong, and where."""

    source: str
    partition: str
    violation: Violation


class _Place(NamedTuple):
    patient: Patient
    partition: str

    def seen_from(self, other: _Place) -> str:
        return self.partition if self.patient is other.patient else f"{self.patient.name}:{self.partition}"


class _Seen(NamedTuple):
    id: str
    status: JobStatus


class Doctor:
    """One look at some sources, whose stores are open.

    Args:
        patients: The sources; a parent is looked for in all of them.
        shard: Of the lease whose holder may have jobs running, as in ``koan/0``.
        ttl_s: Of that lease.
        max_crashes: The engine's limit.
        clock: Time and timers.
    """

    def __init__(self, patients: Sequence[Patient], *, shard: str, ttl_s: float, max_crashes: int, clock: Clock) -> None:
        self.n_jobs = 0
        self._patients, self._shard, self._ttl_s, self._max_crashes = patients, shard, ttl_s, max_crashes
        self._clock = clock
        self._places: list[_Place] = []
        self._leases: dict[str, Lease | None] = {}

    async def findings(self) -> AsyncIterator[Finding]:
        """Look at every job once, and iterate over what is wrong.

        Raises:
            StoreUnavailableError: A source stopped answering; what was told is true, the rest is not known.
        """
        self._places = [_Place(patient, name) for patient in self._patients for name in await patient.store.partitions()]
        for place in self._places:
            async for batch in place.patient.store.scan(place.partition):
                self.n_jobs += len(batch)
                confirmed = await self._examine(place, batch)
                for found in [*_taken(place.patient.unreadable), *confirmed]:
                    yield Finding(place.patient.name, place.partition, found)
            for found in _taken(place.patient.unreadable):
                yield Finding(place.patient.name, place.partition, found)
            async for job_ids in place.patient.store.jobs_with_parts(place.partition):
                for job_id in await self._ownerless(place, job_ids):
                    what = "has left parts behind, and is nowhere"
                    yield Finding(place.patient.name, place.partition, Violation("I12", job_id, what))

    async def _ownerless(self, place: _Place, job_ids: Sequence[str]) -> list[str]:
        """Return those of these jobs that are nowhere, though parts of them are in a place; looks twice."""
        old_enough = self._clock.now() - _YOUNG_S
        suspected = await self._nowhere([job_id for job_id in job_ids if made_at(job_id) < old_enough])
        if not suspected:
            return []
        await pause(self._clock, _LOOK_AGAIN_S)
        still = await self._nowhere(suspected)
        return [job_id for job_id in still if any([await _has_part(place, job_id, stream, 0) for stream in STREAMS])]

    async def _nowhere(self, job_ids: Sequence[str]) -> list[str]:
        left = set(job_ids)
        for place in self._places:
            if left:
                left -= (await place.patient.store.statuses(sorted(left), place.partition)).keys()
        return sorted(left)

    async def _examine(self, place: _Place, batch: Sequence[JobRecord]) -> list[Violation]:
        suspected = await self._violations(place, batch)
        if not suspected:
            return []
        n_unreadable = len(place.patient.unreadable)
        await pause(self._clock, _LOOK_AGAIN_S)
        again = [await _reread(place, job_id) for job_id in dict.fromkeys(found.job_id for found in suspected)]
        still = set(await self._violations(place, [job for job in again if job is not None]))
        del place.patient.unreadable[n_unreadable:]  # told once
        return [found for found in suspected if found in still]

    async def _violations(self, place: _Place, jobs: Sequence[JobRecord]) -> list[Violation]:
        if not jobs:
            return []
        executions = await _executions_of(place, jobs)
        parents, copies = await self._look_around(place, jobs)
        found: list[Violation] = []
        for job in jobs:
            found += check_job(
                job,
                executions.get(job.id, ()),
                parent=parents.get(job.particulars.parent_job_id or ""),
                max_crashes=self._max_crashes,
                overdue_before=await self._overdue_before(place, job),
            )
            found += await _check_parts(place, job)
            if elsewhere := copies.get(job.id):
                found += self._check_copies(place, job, elsewhere)
        return found

    async def _look_around(
        self, here: _Place, jobs: Sequence[JobRecord]
    ) -> tuple[dict[str, _Seen], dict[str, list[tuple[_Seen, _Place]]]]:
        """Return what is known of the jobs' parents, and the copies of the jobs in other places."""
        ids = {job.id for job in jobs}
        parent_ids = {job.particulars.parent_job_id for job in jobs} - {None}
        parents: dict[str, _Seen] = {}
        copies: dict[str, list[tuple[_Seen, _Place]]] = defaultdict(list)
        for place in self._places:
            wanted = [job_id for job_id in (parent_ids if place == here else parent_ids | ids) if job_id is not None]
            if not wanted:
                continue
            for job_id, status in (await place.patient.store.statuses(wanted, place.partition)).items():
                seen = _Seen(job_id, status)
                if job_id in parent_ids and (job_id not in parents or parents[job_id].status.is_final):
                    parents[job_id] = seen
                if job_id in ids and place != here:
                    copies[job_id].append((seen, place))
        return parents, copies

    def _check_copies(self, here: _Place, job: JobRecord, copies: list[tuple[_Seen, _Place]]) -> Iterable[Violation]:
        """Check a job that is in several places, when looking at the first of them."""
        if any(self._places.index(place) < self._places.index(here) for _, place in copies):
            return ()
        return check_placement([(job, here.partition), *((seen, place.seen_from(here)) for seen, place in copies)])

    async def _overdue_before(self, place: _Place, job: JobRecord) -> float | None:
        """Return the instant since which a running job must have been touched; None while its coordinator lives."""
        limit = self._clock.now() - _OVERDUE_TTLS * self._ttl_s
        if job.status is not JobStatus.RUNNING or job.last_modified >= limit:
            return None
        lease = await self._lease_in_force(place.patient)
        return None if lease is not None and job.term >= lease.term else limit

    async def _lease_in_force(self, patient: Patient) -> Lease | None:
        """Return the lease of a source if its holder lives; watched once, and only when something depends on it."""
        if patient.name not in self._leases:
            self._leases[patient.name] = await self._watch(patient)
        return self._leases[patient.name]

    async def _watch(self, patient: Patient) -> Lease | None:
        first = await patient.store.read_lease(self._shard)
        if first is None or first.holder == "" or patient.is_dead(first.holder):
            return None
        for _ in range(_LOOKS):
            await pause(self._clock, _WATCH_TTLS * self._ttl_s / _LOOKS)
            now = await patient.store.read_lease(self._shard)
            if now is not None and now != first:
                return now if now.holder else None
        return None


async def _executions_of(place: _Place, jobs: Sequence[JobRecord]) -> dict[str, list[ExecutionRecord]]:
    """Return the executions of those jobs that keep them, by job, oldest first."""
    audited = [job.id for job in jobs if job.particulars.residence.audit]
    found: dict[str, list[ExecutionRecord]] = defaultdict(list)
    if audited:
        for execution in await place.patient.audit.executions_in(audited, place.partition):
            found[execution.job_id].append(execution)
    return found


async def _check_parts(place: _Place, job: JobRecord) -> list[Violation]:
    """Look for the last part of each stream that the job's checkpoint counts; they are written in their order."""
    found = []
    for stream in STREAMS:
        n_counted = job.checkpoint.n_parts(stream) if job.checkpoint is not None else 0
        if n_counted and not await _has_part(place, job.id, stream, n_counted - 1):
            found.append(Violation("I12", job.id, f"counts {n_counted} parts of {stream!r}, and the last is missing"))
    return found


async def _has_part(place: _Place, job_id: str, stream: str, seq: int) -> bool:
    """Tell whether a part, or one after it, is there; of one that cannot be read the source's list of these tells."""
    try:
        return bool(await place.patient.store.read_parts(place.partition, job_id, stream, seq - 1, 1))
    except RecordCorruptError as error:
        place.patient.unreadable.append(error)
        return True


async def _reread(place: _Place, job_id: str) -> JobRecord | None:
    try:
        copy = await place.patient.store.get_copy(job_id, place.partition)
    except RecordCorruptError:  # an execution of it, most likely, which was told already
        return None
    return copy[0] if copy is not None else None


def _taken(unreadable: list[RecordCorruptError]) -> list[Violation]:
    taken = [Violation(UNREADABLE, error.record_id, f"{error.field}: {error.problem}") for error in unreadable]
    unreadable.clear()
    return taken
