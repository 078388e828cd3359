"""Jobs of classes with ``claim = "write_ahead"``: no body begins before it is stored that it runs."""

from __future__ import annotations

import asyncio
from random import Random

import pytest

import koan_ray as koan
from koan_ray import testing
from koan_ray.domain.invariants import check_job
from koan_ray.stores.codec import decode_execution, decode_job, encode_job
from koan_ray.testing.contracts import audited

TTL = 15.0


class Ahead(koan.Job[float, str]):
    retry = koan.RetryPolicy(max_attempts=3, initial_delay=1)
    claim = "write_ahead"

    async def execute(self, context, progress, cancellation) -> str:
        await asyncio.sleep(abs(context))
        if context < 0 and self.last_error is None:
            raise ValueError("the first time it fails")
        return self.id


class Behind(koan.Job[float, str]):
    async def execute(self, context, progress, cancellation) -> str:
        await asyncio.sleep(context)
        return self.id


@pytest.fixture
def database():
    return testing.MemoryDatabase()


class Gate:
    """Stands before the launcher of an engine: notes what is sent, and what of it the database did not know by then."""

    def __init__(self, engine, database):
        self.sent, self.early = [], []
        send = engine.launcher.send

        def look_and_send(name, batch, orders, *, label):
            for order in orders.orders:
                self.sent.append(order.job_id)
                job = database.jobs[""].get(order.job_id, {})
                execution = database.executions.get("", {}).get(order.execution_id, {})
                known = (job.get("status"), job.get("execution_id"), execution.get("status"))
                if known != ("running", order.execution_id, "running"):
                    self.early.append((order.job_id, known))
            send(name, batch, orders, label=label)

        engine.launcher.send = look_and_send


def engine_on(database, **settings):
    connect = lambda: testing.MemoryDocumentStore(database, source="default")  # noqa: E731
    return testing.engine(sources={"default": connect}, **settings)


def check(database, acknowledged, **limits):
    executions = [decode_execution(document) for document in database.executions.get("", {}).values()]
    for job_id in acknowledged:
        job = decode_job(database.jobs[""][job_id], source="default")
        mine = sorted((e for e in executions if e.job_id == job_id), key=lambda e: (e.started_at, e.id))
        assert job.status.is_final, job
        assert list(check_job(job, mine, **limits)) == []


# --- the attribute ---------------------------------------------------------------------------------------------------


def test_the_attribute_is_checked_and_part_of_the_terms():
    assert Ahead.definition.terms("").claim is koan.Claim.WRITE_AHEAD
    assert Behind.definition.terms("").claim is koan.Claim.WRITE_BEHIND
    with pytest.raises(koan.JobDefinitionError, match=r"claim must be one of .*WRITE_AHEAD.*got 'ahead'"):

        class Wrong(koan.Job[int, int]):
            claim = "ahead"

            def execute(self, context, progress, cancellation) -> int: ...

    @koan.job(claim="write_ahead")
    def charge(context: int) -> int:
        return context

    assert charge.definition.claim is koan.Claim.WRITE_AHEAD


def test_a_document_keeps_the_claim_and_one_without_it_is_written_behind():
    record = audited()
    document = encode_job(record)
    assert "claim" not in document["terms"]
    assert decode_job(document).terms.claim is koan.Claim.WRITE_BEHIND
    document = encode_job(record.evolve(terms=record.terms._replace(claim=koan.Claim.WRITE_AHEAD)))
    assert document["terms"]["claim"] == "write_ahead"
    assert decode_job(document).terms.claim is koan.Claim.WRITE_AHEAD


# --- the order of things ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delay_s", [0.0, 0.03, 0.4])
def test_no_order_goes_out_before_its_job_is_stored_as_running_with_its_execution(database, delay_s):
    async def scenario():
        database.faults.delay_s = delay_s
        async with engine_on(database, max_actors=3) as engine:
            gate = Gate(engine, database)
            jobs = await Ahead.start_many([0.0, 0.1, -0.1, 0.7] * 15).persist().audit().run()
            for job in jobs:
                assert await job.wait() == job.id
            assert len(gate.sent) >= 75, "60 jobs, of which 15 run twice"
            assert gate.early == []
        check(database, [job.id for job in jobs])

    testing.run(scenario())


def test_without_it_orders_do_go_out_before(database):
    """Else the test above would prove nothing."""

    async def scenario():
        async with engine_on(database) as engine:
            gate = Gate(engine, database)
            await (await Behind.start(0.1).persist().audit().run()).wait()
            assert len(gate.early) == 1

    testing.run(scenario())


def test_jobs_in_memory_ignore_it():
    async def scenario():
        async with testing.engine() as engine:
            job = await Ahead.start(0.1).run()
            assert await job.wait() == job.id
            assert (await engine.coordinator.status())["claimed"] == 0

    testing.run(scenario())


@pytest.mark.parametrize("seed", range(8))
def test_no_order_goes_out_early_whatever_the_store_and_the_coordinator_do(database, seed):
    """Answers and requests are lost, flushes torn, coordinators die at any moment; every order is checked as it is sent."""
    random = Random(seed)

    async def scenario():
        async with engine_on(database, seed=seed, max_actors=2, max_crashes=100) as engine:
            gate = Gate(engine, database)
            jobs = await Ahead.start_many([random.choice([0.0, 0.2, -0.2, 2.0]) for _ in range(40)]).persist().audit().run()
            for turn in range(12):
                await asyncio.sleep(random.uniform(0.01, 1.0))
                kind = random.choice(["lose_replies", "lose_requests", "tear", "crash", "crash"])
                if turn == 6:
                    database.faults.reply_delay_s = 0.05
                if kind == "crash":
                    kinds = engine.coordinator._kinds
                    known = list(kinds._newest.values()), dict(kinds._code)
                    engine.crash()
                    await engine.restart()
                    await engine.coordinator.introduce(*known)
                else:
                    setattr(database.faults, kind, random.randint(1, 3))
            for job in jobs:
                assert await job.wait() == job.id
            assert database.faults.n_fired > 0
            assert gate.early == []
        check(database, [job.id for job in jobs])

    testing.run(scenario())


# --- in between ------------------------------------------------------------------------------------------------------


def bodies_of(engine, job_id):
    return [body for body in engine.launcher.bodies if body[0] == job_id]


@pytest.mark.parametrize("after_s", [0.1 * n + 0.05 for n in range(10)])
def test_a_job_that_is_cancelled_between_claim_and_order_never_begins(database, after_s):
    """A write takes 0.5 s, so the job is claimed for that long; its cancellation is answered with what became of it."""

    async def scenario():
        async with engine_on(database, max_actors=1) as engine:
            await (await Behind.start(0.0).run()).wait()  # an actor is there
            database.faults.delay_s = 0.5
            submitting = Ahead.start(5.0).persist().audit().run()
            job = await submitting
            await asyncio.sleep(after_s)
            n_claimed = (await engine.coordinator.status())["claimed"]
            had_begun = bool(bodies_of(engine, job.id))
            answer = await job.cancel()
            if not had_begun:
                assert answer is koan.JobStatus.CANCELLED
                assert bodies_of(engine, job.id) == []
            with pytest.raises(koan.JobCancelledError):
                await job.wait()
            await asyncio.sleep(5)
            assert len(bodies_of(engine, job.id)) == had_begun
            seen.append((n_claimed, had_begun))
        check(database, [job.id])

    seen = []
    testing.run(scenario())
    assert seen == [(int(after_s < 0.5), after_s > 0.5)]


def test_a_store_that_does_not_answer_holds_up_its_own_jobs_only(database):
    async def scenario():
        async with engine_on(database, max_actors=1) as engine:
            await (await Behind.start(0.0).run()).wait()
            ahead = await Ahead.start_many([0.1] * 30).persist().audit().delayed(1).run()
            database.faults.unavailable = True
            await asyncio.sleep(1.5)
            assert (await engine.coordinator.status())["claimed"] == 1, "more are claimed than could begin"
            began = asyncio.get_running_loop().time()
            for job in await Behind.start_many([0.1] * 10).run():
                assert await job.wait() == job.id
            assert asyncio.get_running_loop().time() - began < 2
            assert not any(bodies_of(engine, job.id) for job in ahead)
            database.faults.unavailable = False
            for job in ahead:
                assert await job.wait() == job.id
        check(database, [job.id for job in ahead])

    testing.run(scenario())


def test_a_claim_that_is_stored_when_the_lease_is_uncertain_waits_until_it_is_certain(database):
    """The flush that stored it was the last word of the store; the order goes out when a beat is acknowledged again."""

    class Mute(testing.MemoryDocumentStore):
        hears_beats = True

        async def beat(self, lease):
            if not self.hears_beats:
                raise koan.StoreUnavailableError("no answer to a beat")
            return await super().beat(lease)

    async def scenario():
        store = Mute(database, source="default")
        async with testing.engine(sources={"default": lambda: store}, max_actors=1, lease_ttl_s=TTL) as engine:
            gate = Gate(engine, database)
            await (await Behind.start(0.0).run()).wait()
            job = await Ahead.start(0.1).persist().audit().delayed(11.9).run()
            store.hears_beats = False
            tenure = engine.coordinator._catalog.sources["default"].tenures[0]
            tenure._beat_at = asyncio.get_running_loop().time()
            database.faults.reply_delay_s = 1.0
            await asyncio.sleep(13.5)
            database.faults.reply_delay_s = 0.0
            assert database.jobs[""][job.id]["status"] == "running", "it is claimed and stored"
            assert not tenure.may_act
            assert not bodies_of(engine, job.id)
            store.hears_beats = True
            assert await job.wait() == job.id
            assert gate.early[1:] == []  # the first is of the job in memory
            assert tenure.term == 1
        check(database, [job.id])

    testing.run(scenario())


def test_a_claim_whose_source_was_lost_is_forgotten(database):
    async def scenario():
        async with engine_on(database, max_actors=1) as engine:
            await (await Behind.start(0.0).run()).wait()
            database.faults.delay_s = 1.0
            job = await Ahead.start(0.1).persist().audit().run()
            await asyncio.sleep(0.2)
            assert (await engine.coordinator.status())["claimed"] == 1
            seen = database.leases["koan/0"]
            database.leases["koan/0"] = seen._replace(holder="another", term=seen.term + 1, beat=seen.beat + 1)
            await asyncio.sleep(2 * TTL / 3)
            assert (await engine.coordinator.status())["claimed"] == 0
            database.faults.delay_s = 0.0
            await asyncio.sleep(4 * TTL)
            assert await job.wait() == job.id
        check(database, [job.id])

    testing.run(scenario())


def test_an_engine_that_is_closed_puts_what_it_claimed_back_into_the_queue(database):
    async def scenario():
        async with engine_on(database, max_actors=1) as engine:
            await (await Behind.start(0.0).run()).wait()
            database.faults.delay_s = 0.3
            job = await Ahead.start(0.1).persist().audit().run()
            await asyncio.sleep(0.1)
            assert (await engine.coordinator.status())["claimed"] == 1
        assert database.jobs[""][job.id]["status"] == "queued"
        assert bodies_of(engine, job.id) == []
        assert {e["status"] for e in database.executions[""].values() if e["job_id"] == job.id} <= {"cancelled"}

    testing.run(scenario())


def test_a_long_queue_is_looked_through_once_and_not_for_every_claim(database):
    async def scenario():
        async with engine_on(database, max_actors=2) as engine:
            core, n_looks = engine.coordinator._settling, 0
            queued = core.queued

            def count(job_id):
                nonlocal n_looks
                n_looks += 1
                return queued(job_id)

            core.queued = count
            jobs = await Ahead.start_many([0.05] * 600).persist().run()
            assert [await job.wait() for job in jobs] == [job.id for job in jobs]
            assert n_looks < 6 * len(jobs)
            places = {job.id: n for n, job in enumerate(jobs)}
            began = [places[job_id] for job_id, _ in engine.launcher.bodies]
            assert max(abs(n - place) for n, place in enumerate(began)) < 4, "first come, first served"

    testing.run(scenario())


def test_jobs_that_are_cancelled_while_they_are_set_aside_hold_up_none(database):
    async def scenario():
        async with engine_on(database, max_actors=1) as engine:
            await (await Behind.start(0.0).run()).wait()
            jobs = await Ahead.start_many([0.5] * 12).persist().audit().run()
            await asyncio.sleep(0.1)
            for job in jobs[1:-1]:
                assert await job.cancel() is koan.JobStatus.CANCELLED
            assert await jobs[-1].wait() == jobs[-1].id
            assert len(engine.launcher.bodies) == 3
        check(database, [job.id for job in jobs])

    testing.run(scenario())
