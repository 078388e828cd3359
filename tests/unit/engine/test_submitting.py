"""Submits that are made twice, at once or long after, and jobs that no document can hold."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

import koan_ray as koan
from koan_ray import testing
from koan_ray.domain.archival import ArchivalPolicy
from koan_ray.domain.ids import made_at, new_id
from koan_ray.domain.records import Particulars, Residence
from koan_ray.domain.status import ExecutionStatus, JobStatus
from koan_ray.engine.messages import Row, Submission
from koan_ray.errors import JobIdConflictError, LimitExceededError

bodies: Counter[str] = Counter()
HOT = Residence("default", "hot", audit=True)


class Once(koan.Job[int, int]):
    async def execute(self, context, progress, cancellation) -> int:
        bodies[self.id] += 1
        return context


class Grows(koan.Job[int, str]):
    retry = koan.RetryPolicy(max_attempts=3, initial_delay=1)

    async def execute(self, context, progress, cancellation) -> str:
        bodies[self.id] += 1
        await asyncio.sleep(1)
        return "x" * context


@pytest.fixture(params=[1, 3], ids=["1 shard", "3 shards"])
def database(request):
    bodies.clear()
    made = testing.MemoryDatabase()
    made.n_shards = request.param
    return made


def engine_on(database, **settings):
    sources = {"default": lambda: testing.MemoryDocumentStore(database, source="default")}
    return testing.engine(sources=sources, shards=database.n_shards, **settings)


async def introduced(engine) -> str:
    """Have the class known; returns the id of its terms."""
    await (await Once.start(0).persist().run()).wait()
    return next(iter(engine.coordinator._kinds._newest.values())).id


def submission(terms_id, job_id, context=b"1", parent=None):
    about = [Particulars(residence=HOT, parent_job_id=parent)]
    return Submission([terms_id], about, [Row(job_id, 0, 0, context, 0.0)], [], {})


def test_an_id_says_when_it_was_made():
    assert made_at("018bcfe5-6801-7cc7-a742-e437be7d4d4d") == pytest.approx(0x018BCFE56801 / 1000)
    assert made_at("00000000-0000-4000-8000-000000000000") == 0.0


def test_a_submit_that_is_repeated_after_its_job_was_archived_does_not_run_it_again(database):
    policy = ArchivalPolicy(name="at-once", older_than_s=1.0)

    async def scenario():
        async with engine_on(database, archival_policies=(policy,)) as engine:
            terms_id, job_id = await introduced(engine), new_id()
            await engine.coordinator.submit(submission(terms_id, job_id))
            await asyncio.sleep(5)
            assert (await engine.coordinator.archive(False))["at-once"]["moved"] == 2
            assert job_id not in database.jobs["hot"]
            answer = await engine.coordinator.submit(submission(terms_id, job_id))
            assert not answer.refused
            other = await engine.coordinator.submit(submission(terms_id, job_id, b"2"))
            assert isinstance(other.refused[0], JobIdConflictError)
            await asyncio.sleep(5)
            assert job_id not in database.jobs["hot"]
            assert bodies[job_id] == 1
            assert (await engine.coordinator.get(job_id)).status == "completed"

    testing.run(scenario())


def test_the_same_submit_at_once_is_accepted_once(database):
    """Both look for the job before either has written it; a child is looked for each time."""

    async def scenario():
        database.faults.delay_s = 0.01
        async with engine_on(database) as engine:
            terms_id, job_id = await introduced(engine), new_id()
            parent = await Grows.start(1).persist(partition="hot").audit().run()
            first = asyncio.ensure_future(engine.coordinator.submit(submission(terms_id, job_id, parent=parent.id)))
            await asyncio.sleep(0.005)
            second = asyncio.ensure_future(engine.coordinator.submit(submission(terms_id, job_id, parent=parent.id)))
            assert not (await first).refused
            assert not (await second).refused
            await parent.wait()
            async with asyncio.timeout(60):
                while engine.coordinator.n_live:  # noqa: ASYNC110 - no event
                    await asyncio.sleep(1)
            assert bodies[job_id] == 1
            assert engine.coordinator._kinds.n_live == 0

    testing.run(scenario())


def test_who_repeats_a_submit_whose_job_has_ended_is_told_of_its_end(database):
    """The first answer was lost; the second watches, and only then is its insert found to be a repetition."""

    async def scenario():
        async with engine_on(database) as engine:
            terms_id, job_id = await introduced(engine), new_id()
            await engine.coordinator.submit(submission(terms_id, job_id), "lost")
            await asyncio.sleep(5)
            assert database.jobs["hot"][job_id]["status"] == "completed"
            engine.coordinator._submitting._archived_after_s = float("inf")  # an id as young as that of a real submit
            answer = await engine.coordinator.submit(submission(terms_id, job_id), "again")
            assert not answer.refused
            asked = () if answer.is_watched else (job_id,)
            (end,) = (await engine.coordinator.wait("again", engine.coordinator.epoch, asked, 30.0)).ended
            assert (end.id, end.status) == (job_id, "completed")
            assert bodies[job_id] == 1

    testing.run(scenario())


def test_a_running_job_whose_class_nobody_knows_here_waits_and_holds_up_nobody(database):
    """Taken over from a coordinator that is gone with its actors: it is lost, queued, and has nothing to run."""

    async def scenario():
        async with engine_on(database) as one:
            stranded = await Grows.start(3).persist().audit().run()
            await asyncio.sleep(0.5)
            one.crash()
            async with engine_on(database, seed=1) as other:
                async with asyncio.timeout(60):
                    while not other.coordinator._catalog.is_whole:  # noqa: ASYNC110 - no event
                        await asyncio.sleep(1)
                assert (await other.coordinator.status())["unroutable"] == {"Grows": 1}
                assert await (await Once.start(1).persist().run()).wait() == 1
                late = await Grows.start(4).persist().run()  # brings the class
                assert await late.wait() == "xxxx"
                async with asyncio.timeout(60):
                    while other.coordinator.n_live:  # noqa: ASYNC110 - no event
                        await asyncio.sleep(1)
                assert (await other.coordinator.get(stranded.id)).result == b'"xxx"'

    testing.run(scenario())


# --- what no document can hold -----------------------------------------------------------------------------------------


def test_a_result_that_no_document_can_hold_fails_its_job_and_costs_no_lease(database):
    async def scenario():
        database.max_document = 5_000
        async with engine_on(database) as engine:
            giant = await Grows.start(10_000).persist(partition="hot").audit().run()
            small = await Grows.start(3).persist(partition="hot").audit().run()
            with pytest.raises(koan.JobFailedError, match=r"document would have 1\d,\d{3} bytes; the limit is 5,000"):
                await giant.wait()
            assert await small.wait() == "xxx"
            assert bodies[giant.id] == 1
            assert {lease.term for lease in database.leases.values()} == {1}
            (execution,) = await giant.executions()
            assert (execution.status, execution.reason) == (ExecutionStatus.FAILED, "unwritable")
            assert database.jobs["hot"][giant.id]["status"] == JobStatus.FAILED
            assert engine.coordinator._kinds.n_live == 0

    testing.run(scenario())


def test_a_submit_that_no_document_can_hold_is_refused_by_size(database):
    async def scenario():
        database.max_document = 5_000
        async with engine_on(database) as engine:
            with pytest.raises(LimitExceededError, match=r"bytes of a job's document: 1\d,\d{3} exceeds the limit of 5,000"):
                await Once.start(1).persist().with_metadata(much="x" * 10_000).run()
            assert await (await Once.start(1).persist().run()).wait() == 1
            assert {lease.term for lease in database.leases.values()} == {1}
            assert engine.coordinator._kinds.n_live == 0

    testing.run(scenario())


def test_a_row_that_cannot_be_kept_where_it_asks_to_be_is_refused_alone(database):
    async def scenario():
        async with engine_on(database) as engine:
            terms_id = await introduced(engine)
            about = [Particulars(), Particulars(residence=Residence("nowhere", "")), Particulars(residence=HOT)]
            ids = [new_id() for _ in range(4)]
            rows = [Row(job_id, 0, place, b"1", 0.0) for job_id, place in zip(ids, (0, 1, 2, 1), strict=True)]
            answer = await engine.coordinator.submit(Submission([terms_id], about, rows, [], {}))
            assert {place: str(error).partition(":")[0] for place, error in answer.refused.items()} == {
                1: "persist(source='nowhere')", 3: "persist(source='nowhere')",
            }  # fmt: skip
            for place in (0, 2):
                assert await (await koan.Jobs.get(ids[place])).wait() == 1
            for place in (1, 3):
                with pytest.raises(koan.JobNotFoundError):
                    await koan.Jobs.get(ids[place])

    testing.run(scenario())


def test_jobs_submitted_at_once_do_not_wait_for_a_source_that_only_one_of_them_needs(database):
    async def scenario():
        async with engine_on(database):
            good = [Once.start(n).run() for n in range(3)]
            bad = Once.start(9).persist("nowhere").run()
            more = [Once.start(n).persist().run() for n in range(3, 6)]
            with pytest.raises(koan.ConfigurationError, match="nowhere"):
                await bad
            assert [await (await job).wait() for job in (*good, *more)] == list(range(6))

    testing.run(scenario())


def test_jobs_for_a_source_that_is_away_hold_up_no_submission_to_another_place():
    """Each place has its own share of the calls that are under way."""
    here, away = testing.MemoryDatabase(), testing.MemoryDatabase()
    away.faults.unavailable = True
    sources = {
        "default": lambda: testing.MemoryDocumentStore(here, source="default"),
        "away": lambda: testing.MemoryDocumentStore(away, source="away"),
    }

    async def scenario():
        async with testing.engine(sources=sources, archival_policies=()) as engine:
            stuck = [Once.start(n).persist("away").run() for n in range(5)]
            began = engine.clock.monotonic()
            good = [Once.start(n).run() for n in range(5)] + [Once.start(n).persist().run() for n in range(5, 10)]
            assert [await (await job).wait() for job in good] == list(range(10))
            assert engine.clock.monotonic() - began < 5
            assert not any(pending.done for pending in stuck)
            away.faults.unavailable = False
            assert [await (await job).wait() for job in stuck] == list(range(5))

    testing.run(scenario())
