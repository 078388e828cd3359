"""The doctor finds each thing that must not be in a database, names it, and has nothing to say about a sound one."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from koan_ray import testing
from koan_ray.domain.ids import new_id
from koan_ray.domain.records import FAILED, Checkpoint, Residence
from koan_ray.domain.status import ExecutionStatus, JobStatus, ParentPolicy, Reason
from koan_ray.engine import doctor
from koan_ray.engine.doctor import Doctor, Patient
from koan_ray.errors import RecordCorruptError, StoreUnavailableError
from koan_ray.ports import Change, LoopClock
from koan_ray.stores.codec import encode_execution, encode_job, encode_part
from koan_ray.testing import MemoryDatabase, MemoryDocumentStore
from koan_ray.testing.contracts import audited, execution, job, part

NOW = 1_900_000_000.0
TTL_S = 15.0


class Clock(LoopClock):
    """The loop's time, with a date of its own."""

    now = staticmethod(lambda: NOW)


class Clinic:
    """Databases by source, and what the doctor says of them."""

    def __init__(self, *names):
        self.databases = {name: MemoryDatabase() for name in names or ("default",)}

    @property
    def database(self):
        return self.databases["default"]

    def put(self, record, *executions, partition=None, source="default"):
        """Store a job and executions as they are, sound or not."""
        database = self.databases[source]
        where = record.particulars.residence.partition if partition is None else partition
        database.jobs.setdefault(where, {})[record.id] = encode_job(record)
        documents = database.executions.setdefault(where, {})
        documents.update((e.id, encode_execution(e)) for e in executions)
        return record

    async def findings(self, **options):
        patients = [await self.patient(name, **options) for name in self.databases]
        clock = Clock(asyncio.get_running_loop())
        self.doctor = Doctor(patients, shard="koan/0", ttl_s=TTL_S, max_crashes=3, clock=clock)
        return [found async for found in self.doctor.findings()]

    async def patient(self, name, **options):
        unreadable: list[RecordCorruptError] = []
        store = MemoryDocumentStore(
            self.databases[name], source=name, on_corrupt=lambda _id, error: unreadable.append(error)
        )
        await store.open()
        return Patient(name, store, store, unreadable, **options)

    def look(self, **options):
        return testing.run(self.findings(**options))

    def told(self):
        return [(found.violation.invariant, found.violation.job_id) for found in self.look()]


@pytest.fixture
def clinic():
    return Clinic()


def ended(record, status=ExecutionStatus.SUCCEEDED, *, attempt=1, at=0.0):
    reason = Reason.SUCCEEDED if status is ExecutionStatus.SUCCEEDED else Reason.RETRY
    begun = execution(record, attempt=attempt, at=record.created_at + at)
    return begun.close(status=status, reason=reason, at=begun.started_at + 1)


def completed(**more):
    """Return a sound job that has ended well, and its execution."""
    fields = {"status": JobStatus.COMPLETED, "completed_at": NOW, "result": b"1", "attempts": 1, "ordinal": 1}
    record = audited(**{**fields, **more})
    only = ended(record)
    return record.evolve(last_execution_id=only.id), only


def running(**more):
    record = audited(status=JobStatus.RUNNING, execution_id=new_id(), attempts=1, **{"last_modified": NOW, **more})
    return record, replace(execution(record), id=record.execution_id)


def abandoning(record):
    return record.evolve(terms=record.terms._replace(when_parent_ends=ParentPolicy.ABANDON))


def test_a_sound_database_gives_nothing(clinic):
    parent, only = completed()
    clinic.put(parent, only)
    for n in range(1200):
        clinic.put(*completed(parent_job_id=parent.id, partition=("", "hot")[n % 2]))
    clinic.put(*running())
    clinic.put(job())
    clinic.put(job(status=JobStatus.FAILED, completed_at=NOW, attempts=5, crashes=3))
    clinic.put(
        job(parent_job_id=parent.id, cancel_requested_at=NOW, status=JobStatus.RUNNING, execution_id="e", last_modified=NOW)
    )
    clinic.put(abandoning(job(parent_job_id=parent.id)))
    clinic.put(job(parent_job_id=new_id()))  # its parent is kept elsewhere
    both, only = completed()
    clinic.put(both, only)
    clinic.put(both, only, partition="archive")  # on its way to the archive
    assert clinic.look() == []
    assert clinic.doctor.n_jobs == 1209


def i2_has_ended_in_two_ways(clinic):
    record, only = completed()
    clinic.put(record.evolve(status=JobStatus.CANCELLED), partition="archive")
    return clinic.put(record, only)


def i2_has_no_end(clinic):
    record, only = completed(completed_at=None)
    return clinic.put(record, only)


def i4_succeeded_twice(clinic):
    record, only = completed(attempts=2)
    return clinic.put(record.evolve(attempts=2), ended(record, at=-5.0), only)


def i4_attempts_out_of_order(clinic):
    record, only = completed(attempts=2)
    return clinic.put(record, ended(record, ExecutionStatus.FAILED, attempt=2, at=-5.0), only)


def i5_left_open(clinic):
    record, only = completed()
    return clinic.put(record, execution(record, at=record.created_at - 9), only)


def i5_names_a_running_execution(clinic):
    record, only = completed(execution_id=new_id())
    return clinic.put(record, only)


def i5_last_execution_is_missing(clinic):
    record, only = completed()
    return clinic.put(record.evolve(last_execution_id=new_id()), only)


def i6_without_a_result(clinic):
    record, only = completed(result=None)
    return clinic.put(record, only)


def i6_failed_although_succeeded(clinic):
    record, only = completed(status=JobStatus.FAILED)
    return clinic.put(record, only)


def i7_runs_nothing(clinic):
    return clinic.put(job(status=JobStatus.RUNNING, last_modified=NOW))


def i7_nobody_owns_it(clinic):
    return clinic.put(*running(last_modified=NOW - 61))


def i8_too_many_attempts(clinic):
    return clinic.put(job(attempts=4, status=JobStatus.FAILED, completed_at=NOW))


def i8_too_many_crashes(clinic):
    return clinic.put(job(crashes=4, attempts=4, status=JobStatus.FAILED, completed_at=NOW))


def i9_queued_although_cancelled(clinic):
    return clinic.put(job(cancel_requested_at=NOW))


def i13_goes_on_without_its_parent(clinic):
    parent, only = completed(partition="hot")
    clinic.put(parent, only)
    return clinic.put(job(parent_job_id=parent.id))


def i14_in_two_places(clinic):
    record = job()
    clinic.put(record, partition="hot")
    return clinic.put(record)


SEEDED = [value for name, value in dict(globals()).items() if name.startswith("i") and name[1].isdigit()]


@pytest.mark.parametrize("seed", SEEDED, ids=lambda seed: seed.__name__)
def test_each_thing_that_must_not_be_is_found_and_named(clinic, seed):
    for _ in range(20):
        clinic.put(*completed())
    wrong = seed(clinic)
    clinic.put(*completed())
    told = clinic.told()
    assert (seed.__name__.partition("_")[0].upper(), wrong.id) in told
    assert {job_id for _, job_id in told} == {wrong.id}
    assert len(told) == len(set(told))


def test_a_parent_in_another_source_is_known():
    clinic = Clinic("default", "other")
    parent, only = completed()
    clinic.put(parent, only, source="other")
    child = clinic.put(job(parent_job_id=parent.id))
    assert clinic.told() == [("I13", child.id)]
    assert [(found.source, found.partition) for found in clinic.look()] == [("default", "")]


def test_a_job_in_two_sources_is_told_once_and_both_are_named():
    clinic = Clinic("default", "other")
    record = clinic.put(job())
    clinic.put(record, source="other", partition="hot")
    (found,) = clinic.look()
    assert found.violation.invariant == "I14"
    assert "'', 'other:hot'" in found.violation.what


def test_what_cannot_be_decoded_is_told(clinic):
    bad, good = completed(), completed()
    clinic.put(*bad)
    clinic.put(*good)
    clinic.database.jobs[""][bad[0].id]["created_at"] = "yesterday"
    clinic.database.executions[""][good[1].id]["attempt"] = "first"
    found = clinic.look()
    assert (doctor.UNREADABLE, bad[0].id) in [(f.violation.invariant, f.violation.job_id) for f in found]
    assert (doctor.UNREADABLE, good[1].id) in [(f.violation.invariant, f.violation.job_id) for f in found]
    assert [f.violation.job_id for f in found].count(good[1].id) == 1


def test_a_later_version_is_told_and_not_judged(clinic):
    record = clinic.put(job())
    clinic.database.jobs[""][record.id]["schema_version"] = 99
    clinic.database.jobs[""][record.id]["cancel_requested_at"] = datetime.now(UTC)
    assert clinic.told() == [(doctor.UNREADABLE, record.id)]


def test_what_was_only_on_its_way_is_not_told(clinic):
    record, only = completed()
    clinic.put(record)  # the job is written, its execution is about to be

    async def scenario():
        looking = asyncio.ensure_future(clinic.findings())
        await asyncio.sleep(doctor._LOOK_AGAIN_S / 2)
        clinic.put(record, only)
        return await looking

    assert testing.run(scenario()) == []


def test_what_was_archived_meanwhile_is_not_told(clinic):
    record, _ = completed()
    clinic.put(record)

    async def scenario():
        looking = asyncio.ensure_future(clinic.findings())
        await asyncio.sleep(doctor._LOOK_AGAIN_S / 2)
        clinic.database.jobs[""].clear()
        return await looking

    assert testing.run(scenario()) == []


@pytest.mark.parametrize(
    ("holder", "beats", "term", "is_owned"),
    [
        ("somebody", True, 3, True),
        ("somebody", True, 2, False),  # an earlier holder's, and not taken over
        ("somebody", False, 3, False),
        ("", False, 3, False),
        ("dead", True, 3, False),
    ],
)
def test_what_runs_for_long_is_owned_while_its_coordinator_beats(clinic, holder, beats, term, is_owned):
    clinic.put(*running(last_modified=NOW - 3600, term=term))

    async def scenario():
        store = MemoryDocumentStore(clinic.database)
        await store.open()
        lease = None
        for _ in range(3):
            lease = await store.take_lease("koan/0", holder=holder, seen=lease)

        async def beat():
            while beats:
                await asyncio.sleep(TTL_S / 3)
                await store.beat(lease)

        beating = asyncio.ensure_future(beat())
        found = await clinic.findings(is_dead=lambda name: name == "dead")
        beating.cancel()
        return found

    assert [found.violation.invariant for found in testing.run(scenario())] == ([] if is_owned else ["I7"])


def test_a_source_that_does_not_answer_is_no_sound_one(clinic):
    clinic.put(job())

    async def scenario():
        patient = await clinic.patient("default")
        clinic.database.faults.unavailable = True
        clock = Clock(asyncio.get_running_loop())
        looking = Doctor([patient], shard="koan/0", ttl_s=TTL_S, max_crashes=3, clock=clock).findings()
        with pytest.raises(StoreUnavailableError):
            await anext(looking)

    testing.run(scenario())


def test_nothing_is_written(clinic):
    for seed in SEEDED:
        seed(clinic)
    before = clinic.database.n_writes
    assert len(clinic.look()) >= len(SEEDED)
    assert clinic.database.n_writes == before


async def test_memory_is_that_of_a_batch():
    """A second batch is not read before the first was judged."""
    clinic = Clinic()
    wrong = [clinic.put(job(cancel_requested_at=NOW)) for _ in range(501)]
    patient = await clinic.patient("default")
    clock = Clock(asyncio.get_running_loop())
    looking = Doctor([patient], shard="koan/0", ttl_s=TTL_S, max_crashes=3, clock=clock)
    first = await anext(looking.findings())
    assert first.violation.job_id == min(record.id for record in wrong)
    assert looking.n_jobs == 500


def test_a_change_through_the_store_is_sound(clinic):
    record, only = completed()

    async def scenario():
        store = MemoryDocumentStore(clinic.database)
        await store.open()
        assert await store.apply([Change(record, 0, (only,))]) == []
        return await clinic.findings()

    assert testing.run(scenario()) == []


# --- items -----------------------------------------------------------------------------------------------------------


def long_ago():
    """An id that was made two hours before the doctor comes."""
    return str(uuid.UUID(int=(int((NOW - 7200) * 1000) << 80) | (uuid.UUID(new_id()).int & ((1 << 80) - 1))))


def put_parts(clinic, *parts, partition="", source="default"):
    kept = clinic.databases[source].parts.setdefault(partition, {})
    kept.update((document["_id"], document) for document in map(encode_part, parts))


def test_parts_of_a_job_that_is_nowhere_are_told(clinic):
    lost, young = long_ago(), new_id()
    young = str(uuid.UUID(int=(int(NOW * 1000) << 80) | (uuid.UUID(young).int & ((1 << 80) - 1))))
    here, only = completed()
    elsewhere, its = completed(partition="archive")
    for record, execution_ in ((here, only), (elsewhere, its)):
        clinic.put(record, execution_)
    clinic.database.jobs.setdefault("hot", {})
    put_parts(clinic, part(lost, 0), part(lost, 1), part(young, 0), part(here, 0), part(elsewhere, 0), partition="hot")
    put_parts(clinic, part(here, 0))
    assert clinic.told() == [("I12", lost)]
    (found,) = clinic.look()
    assert (found.partition, found.violation.what) == ("hot", "has left parts behind, and is nowhere")


def test_a_job_that_comes_while_the_doctor_looks_is_not_told(clinic):
    record, only = completed()
    record = replace(record, id=long_ago())
    put_parts(clinic, part(record, 0))

    async def look():
        looking = asyncio.ensure_future(clinic.findings())
        await asyncio.sleep(0.5)
        clinic.put(record.evolve(particulars=record.particulars._replace(residence=Residence())), only)
        return await looking

    assert testing.run(look()) == []


def test_items_that_do_not_add_up_and_parts_that_are_missing_are_told(clinic):
    done = Checkpoint(3, b"[]", 10, 7, 2, 2, NOW, 2, 1)
    record, only = completed(checkpoint=done)
    clinic.put(record, only)
    put_parts(clinic, part(record, 0), part(record, 0, stream=FAILED))
    sound, its = completed(checkpoint=done._replace(failed=1))
    clinic.put(sound, its)
    put_parts(clinic, *(part(sound, n) for n in range(2)), part(sound, 0, stream=FAILED))
    assert clinic.told() == [("I12", record.id)] * 2
    assert [found.violation.what for found in clinic.look()] == [
        "counts 11 items that have ended, and there are 10",
        "counts 2 parts of 'values', and the last is missing",
    ]
