"""A look at the stored jobs is old when it arrives: jobs of ours may have ended meanwhile, and must not run again."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

import koan_ray as koan
from koan_ray import testing
from koan_ray.domain.invariants import check_job
from koan_ray.errors import StoreUnavailableError
from koan_ray.stores.codec import decode_execution, decode_job

TTL = 15.0


class Once(koan.Job[float, str]):
    """Says how often it was begun."""

    began: Counter[str] = Counter()

    async def execute(self, context, progress, cancellation) -> str:
        self.began[self.id] += 1
        await asyncio.sleep(context)
        return self.id


class Slow(testing.MemoryDocumentStore):
    """Its looks at the unfinished jobs take a while to arrive, and its first take-overs of a queue are interrupted."""

    n_interrupted = 0
    n_looks = 0
    takes_s = 2.0
    n_answers_lost = 0  # of claims that had something to claim

    async def take_over(self, slots, term, statuses):
        if koan.JobStatus.QUEUED in statuses and self.n_interrupted:
            self.n_interrupted -= 1
            raise StoreUnavailableError("interrupted")
        async for jobs in super().take_over(slots, term, statuses):
            yield jobs

    async def claim(self, slots, term):
        n_claimed = await super().claim(slots, term)
        if n_claimed and self.n_answers_lost:
            self.n_answers_lost -= 1
            raise StoreUnavailableError("the answer was lost")
        return n_claimed

    async def unfinished(self, slots, term):
        async for jobs in super().unfinished(slots, term):
            self.n_looks += 1
            await asyncio.sleep(self.takes_s)
            yield jobs


@pytest.fixture
def database():
    Once.began.clear()
    return testing.MemoryDatabase()


def hold_of(engine):
    return engine.coordinator._catalog.sources["default"].tenures[0]


def check(database, acknowledged):
    for job_id in acknowledged:
        job = decode_job(database.jobs[""][job_id], source="default")
        mine = [decode_execution(document) for document in database.executions[""].values()]
        assert list(check_job(job, [execution for execution in mine if execution.job_id == job_id])) == []
        assert job.status is koan.JobStatus.COMPLETED


@pytest.mark.parametrize("takes", [0.1, 0.25, 0.6, 1.0, 3.0])
def test_f19_jobs_that_end_while_an_interrupted_take_over_looks_again_are_not_taken_in(database, takes):
    """The look comes 0.2 s after the start and takes 2 s: it sees the jobs queued, running, or not at all."""

    async def scenario():
        store = Slow(database, source="default")
        store.n_interrupted = 1
        async with testing.engine(sources={"default": lambda: store}, max_actors=2) as engine:
            jobs = await Once.start_many([takes] * 6).persist().audit().run()
            for job in jobs:
                assert await job.wait() == job.id
            await asyncio.sleep(30)
            assert store.n_interrupted == 0
            assert store.n_looks > 0
            assert hold_of(engine).term == 1, "what was taken in again cost the lease"
        assert Once.began == Counter(job.id for job in jobs)
        check(database, [job.id for job in jobs])

    testing.run(scenario())


def test_f19_a_late_insert_is_found_though_the_answer_to_its_claim_was_lost(database):
    """The sweep has stamped it and was not told so: the next one has nothing to claim, and must look all the same."""

    async def scenario():
        store = Slow(database, source="default")
        store.n_answers_lost = 1
        async with testing.engine(sources={"default": lambda: store}) as engine:
            first = await Once.start(0.1).persist().audit().run()
            await first.wait()
            late = {**database.jobs[""][first.id], "_id": "01a211d3-0000-7000-8000-000000000000", "term": 0, "rev": 1}
            late |= {"status": "queued", "attempts": 0, "ordinal": 0, "result": None, "completed_at": None}
            database.jobs[""][late["_id"]] = late
            await asyncio.sleep(4 * TTL)
            assert store.n_answers_lost == 0
            assert hold_of(engine).term == 1
        check(database, [first.id, late["_id"]])
        assert Once.began == {first.id: 1, late["_id"]: 1}

    testing.run(scenario())
