"""A record that cannot be written ends its own job, and nobody else's."""

from __future__ import annotations

import asyncio

import pytest

import koan_ray as koan
from koan_ray import testing
from koan_ray.domain.ids import new_id
from koan_ray.domain.records import Particulars, Progress, Residence
from koan_ray.domain.status import FailureKind, JobStatus
from koan_ray.engine.messages import Row, Submission
from koan_ray.engine.writer import Writer
from koan_ray.errors import ConfigurationError, RecordRefusedError
from koan_ray.stores.memory import MemoryStore
from koan_ray.testing.contracts import execution, job
from koan_ray.testing.loop import VirtualClock


class Plain(koan.Job[int, int]):
    async def execute(self, context, progress, cancellation) -> int:
        return context


class Slow(koan.Job[int, int]):
    async def execute(self, context, progress, cancellation) -> int:
        await asyncio.sleep(5)
        return context


# --- the writer --------------------------------------------------------------------------------------------------------


class Odd(MemoryStore):
    """Fails as a driver does whose encoder meets what it cannot write; what it has is one by one, or none of a batch."""

    def __init__(self):
        super().__init__()
        self.bad, self.named, self.unexplained, self.fails = set(), {}, set(), []
        self.n_applied = 0

    def objection(self, record):
        return "OverflowError: too large" if record.id in self.bad else None

    async def apply(self, changes):
        self.n_applied += 1
        if self.fails:
            raise self.fails.pop(0)
        for change in changes:
            if {record.id for record in (change.job, *change.executions)} & (self.bad | self.unexplained):
                raise OverflowError("somewhere in all this")
        wrong = {change.job.id: self.named[change.job.id] for change in changes if change.job.id in self.named}
        refused = await super().apply([change for change in changes if change.job.id not in wrong])
        if wrong:
            raise RecordRefusedError(wrong)
        return refused


async def with_writer(test):
    store, told, unwritable, fenced = Odd(), [], {}, []
    clock = VirtualClock(asyncio.get_running_loop())
    writer = Writer(store, clock, told.extend, fenced.append, lambda record, why: unwritable.update({record.id: why}))
    await test(store, writer, told, unwritable)
    assert fenced == []


@pytest.mark.parametrize("how", ["its codec objects", "the store names it", "nobody says which"])
@pytest.mark.parametrize("place", [0, 7, 19])
def test_one_record_that_cannot_be_written_is_found_and_all_others_are_written(how, place):
    async def test(store, writer, told, unwritable):
        records = [job(rev=0) for _ in range(20)]
        bad = records[place]
        if how == "its codec objects":
            store.bad.add(bad.id)
        elif how == "the store names it":
            store.named[bad.id] = "a dotted name"
        else:
            store.unexplained.add(bad.id)
        for record in records:
            writer.stage(record)
        await writer.flushed()
        assert list(unwritable) == [bad.id]
        assert {record.id for record in told} == {record.id for record in records} - {bad.id}
        for record in records:
            assert (await store.get(record.id) is None) == (record is bad)
        assert store.n_applied < 20

    testing.run(with_writer(test))


def test_many_records_that_cannot_be_written_are_found_at_once():
    async def test(store, writer, told, unwritable):
        records = [job(rev=0) for _ in range(400)]
        store.bad.update(record.id for record in records[::2])
        for record in records:
            writer.stage(record)
        await writer.flushed()
        assert len(unwritable) == len(told) == 200
        assert store.n_applied == 2

    testing.run(with_writer(test))


def test_an_execution_that_cannot_be_written_is_its_jobs_and_the_others_of_the_job_are_kept():
    async def test(store, writer, told, unwritable):
        record = job(rev=0, status=JobStatus.RUNNING)
        writer.stage(record)
        await writer.flushed()
        good, bad = execution(record), execution(record, attempt=2)
        store.bad.add(bad.id)
        after = record.evolve(status=JobStatus.QUEUED)
        writer.stage(after, good)
        writer.stage(after, bad)
        await writer.flushed()
        assert list(unwritable) == [record.id]
        after.rev = 1  # as it is stored; what the engine's own does
        writer.stage(after.evolve(status=JobStatus.FAILED))
        await writer.flushed()
        assert [kept.id for kept in await store.executions(record.id)] == [good.id]

    testing.run(with_writer(test))


@pytest.mark.parametrize(
    "error", [ConfigurationError("the login was refused"), RuntimeError("a driver's own"), ValueError("for once")]
)
def test_an_error_that_passes_costs_no_record(error):
    async def test(store, writer, told, unwritable):
        store.fails = [error, error]
        records = [job(rev=0) for _ in range(5)]
        for record in records:
            writer.stage(record)
        async with asyncio.timeout(30):
            await writer.flushed()
        assert (len(told), unwritable) == (5, {})

    testing.run(with_writer(test))


def test_a_flush_that_ends_in_an_error_of_ours_is_begun_anew_with_all_that_it_had_taken(monkeypatch):
    async def test(store, writer, told, unwritable):
        write_apart, n_broken = writer._write_apart, [2]

        async def breaks(changes, found, failure=None):
            if failure is not None and n_broken[0]:
                n_broken[0] -= 1
                raise AssertionError("of ours")
            return await write_apart(changes, found, failure)

        monkeypatch.setattr(writer, "_write_apart", breaks)
        store.fails = [ValueError("once"), ValueError("twice")]
        records = [job(rev=0) for _ in range(5)]
        for record in records:
            writer.stage(record, execution(record))
        waiting = [asyncio.ensure_future(writer.flushed()) for _ in range(3)]
        await asyncio.sleep(0.01)
        newer = records[0].evolve(status=JobStatus.RUNNING)
        writer.stage(newer)
        await asyncio.gather(*waiting)
        await writer.flushed()
        assert {record.id for record in told} == {record.id for record in records}
        for record in records:
            assert len(await store.executions(record.id)) == 1
        assert (await store.get(newer.id)).status is JobStatus.RUNNING
        assert unwritable == {}

    testing.run(with_writer(test))


def test_a_store_that_cannot_say_what_it_objects_to_is_asked_by_halves(monkeypatch):
    async def test(store, writer, told, unwritable):
        records = [job(rev=0) for _ in range(9)]
        store.unexplained.add(records[4].id)
        monkeypatch.setattr(Odd, "objection", lambda self, record: 1 / 0)
        for record in records:
            writer.stage(record)
        await writer.flushed()
        assert list(unwritable) == [records[4].id]
        assert len(told) == 8

    testing.run(with_writer(test))


def test_a_report_that_raises_is_logged_and_keeps_nobody_waiting():
    async def scenario():
        store, heard = MemoryStore(), []

        def report(records):
            if any(record.terms.kind == "odd" for record in records):
                raise RuntimeError("of ours")
            heard.extend(records)

        writer = Writer(store, VirtualClock(asyncio.get_running_loop()), report, heard.append, heard.append)
        records = [job(rev=0, kind=kind) for kind in ("mail", "odd", "mail")]
        for record in records:
            writer.stage(record)
        await writer.flushed()
        assert heard == [records[0], records[2]]
        writer.stage(job(rev=0))
        await writer.flushed()
        assert len(heard) == 3

    testing.run(scenario())


# --- the engine --------------------------------------------------------------------------------------------------------


@pytest.fixture
def database():
    return testing.MemoryDatabase()


def engine_on(database):
    return testing.engine(sources={"default": lambda: testing.MemoryDocumentStore(database, source="default")})


ODD = {
    "a number as description": {"description": 5},
    "a name that is bytes": {"name": b"n", "metadata": {"a": object()}},
    "a whole number beyond BSON": {"metadata": {"a": {1, 2}}},
}


@pytest.mark.parametrize("odd", list(ODD.values()), ids=list(ODD))
def test_a_submit_that_cannot_be_stored_is_refused_and_those_beside_it_are_accepted(database, odd):
    async def scenario():
        async with engine_on(database) as engine:
            await (await Plain.start(0).persist().run()).wait()
            terms_id = next(iter(engine.coordinator._kinds._newest.values())).id
            home = Residence("default", "", audit=True)
            about = [Particulars(residence=home), Particulars(residence=home)._replace(**odd)]
            rows = [Row(new_id(), 0, int(n == 7), b"1", 0.0) for n in range(20)]
            async with asyncio.timeout(60):
                answer = await engine.coordinator.submit(Submission([terms_id], about, rows, [], {}))
            assert list(answer.refused) == [7]
            assert isinstance(answer.refused[7], RecordRefusedError)
            await asyncio.sleep(10)
            assert engine.coordinator.n_live == 0
            for place, row in enumerate(rows):
                stored = database.jobs[""].get(row.job_id)
                assert (stored is None) == (place == 7)
                assert stored is None or stored["status"] == JobStatus.COMPLETED

    testing.run(scenario())


def test_an_end_that_cannot_be_stored_fails_its_job_and_those_beside_it_are_told(database):
    async def scenario():
        async with engine_on(database) as engine:
            jobs = await Slow.start_many(range(20)).persist().audit().run()
            await asyncio.sleep(1)
            odd = jobs[3]
            live = engine.coordinator._live
            while live[odd.id].status is not JobStatus.RUNNING:  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.1)
            record = live[odd.id]
            live[odd.id] = record.evolve(progress=Progress(1, 0.5, message=5))
            engine.coordinator._jobs.stage(live[odd.id])
            with pytest.raises(koan.JobFailedError, match="cannot be stored") as caught:
                await odd.wait(60)
            assert caught.value.failure == "unwritable"
            for place, other in enumerate(jobs):
                if other is not odd:
                    assert await other.wait(600) == place
            stored = database.jobs[""][odd.id]
            assert (stored["status"], stored["reason"]) == (JobStatus.FAILED, FailureKind.UNWRITABLE)
            assert [tried.reason for tried in await odd.executions()] == ["unwritable"]
            assert engine.coordinator._kinds.n_live == 0
            assert {lease.term for lease in database.leases.values()} == {1}
            again = await koan.Jobs.retry(odd.id)
            assert await again.wait() == 3

    testing.run(scenario())


def test_a_job_whose_every_end_is_refused_is_ended_here_all_the_same(database, monkeypatch):
    async def scenario():
        async with engine_on(database) as engine:
            odd, other = await Slow.start(1).persist().run(), await Slow.start(2).persist().run()
            await asyncio.sleep(1)
            fits = testing.MemoryDocumentStore.objection
            monkeypatch.setattr(
                testing.MemoryDocumentStore, "objection", lambda self, at: "no" if at.id == odd.id else fits(self, at)
            )
            apply = testing.MemoryDocumentStore.apply

            async def refuse(self, changes):
                if any(change.job.id == odd.id for change in changes):
                    raise ValueError
                return await apply(self, changes)

            monkeypatch.setattr(testing.MemoryDocumentStore, "apply", refuse)
            with pytest.raises(koan.JobFailedError):
                await odd.wait(60)
            assert await other.wait(60) == 2
            assert engine.coordinator.n_live == 0

    testing.run(scenario())
