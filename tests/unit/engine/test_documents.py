"""Jobs in documents: where they go, what survives a crash of the coordinator, and who may write."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

import koan_ray as koan
from koan_ray import testing
from koan_ray.domain.status import ExecutionStatus
from koan_ray.errors import ConfigurationError, JobLostError

bodies: Counter[str] = Counter()


class Slow(koan.Job[float, str]):
    retry = koan.RetryPolicy(max_attempts=3, initial_delay=1)

    async def execute(self, context, progress, cancellation) -> str:
        bodies[self.id] += 1
        await asyncio.sleep(context)
        return self.id


class Family(koan.Job[int, int]):
    async def execute(self, context, progress, cancellation) -> int:
        children = [await self.start_child(Slow, 0.1, key=str(n)).run() for n in range(context)]
        return len([await child.wait() for child in children])


@pytest.fixture
def database():
    bodies.clear()
    return testing.MemoryDatabase()


@pytest.fixture(params=[1, 3], ids=["1 shard", "3 shards"], autouse=True)
def shards(request, database):
    database.n_shards = request.param


def documents(database, **settings):
    sources = {"default": lambda: testing.MemoryDocumentStore(database, source="default")}
    return testing.engine(sources=sources, **{"shards": database.n_shards, **settings})


def run(scenario):
    return testing.run(scenario())


def test_a_persisted_job_is_a_document_and_its_executions_are_too(database):
    async def scenario():
        async with documents(database):
            job = await Slow.start(1).persist(partition="hot").audit().with_metadata(tenant=7).run()
            stored = database.jobs["hot"][job.id]
            assert (stored["status"], stored["metadata"], stored["context"]) == ("queued", {"tenant": 7}, 1.0)
            await job.wait()
            stored = database.jobs["hot"][job.id]
            assert (stored["status"], stored["result"]) == ("completed", job.id)
            (execution,) = await job.executions()
            assert execution.status is ExecutionStatus.SUCCEEDED
            assert [document["status"] for document in database.executions["hot"].values()] == ["succeeded"]
            assert [found.id for found in await koan.Jobs.query(metadata={"tenant": 7})] == [job.id]

    run(scenario)


def test_an_engine_whose_store_is_gone_ends_all_the_same(database):
    async def scenario():
        loop = asyncio.get_running_loop()
        async with documents(database):
            job = await Slow.start(1).persist().run()
            database.faults.unavailable = True
            await asyncio.sleep(5)  # it runs, ends, and its end cannot be written
            began = loop.time()
        assert loop.time() - began < 15
        database.faults.unavailable = False
        async with documents(database):
            await (await Slow.start(0).run()).wait()  # its class is known here from now on
            assert await (await koan.Jobs.get(job.id)).wait() == job.id

    run(scenario)


def test_without_audit_no_execution_is_kept_and_without_persist_nothing_is(database):
    async def scenario():
        async with documents(database):
            await (await Slow.start(0).persist().run()).wait()
            await (await Slow.start(0).audit().run()).wait()
            assert len(database.jobs[""]) == 1
            assert not any(database.executions.values())

    run(scenario)


def test_a_child_lives_where_its_parent_lives(database):
    async def scenario():
        async with documents(database):
            job = await Family.start(3).persist(partition="hot").audit().run()
            assert await job.wait() == 3
            assert len(database.jobs["hot"]) == 4
            assert not database.jobs[""]
            assert len(await job.get_children()) == 3

    run(scenario)


def test_a_source_that_is_not_known_is_refused_by_name(database):
    async def scenario():
        async with documents(database):
            with pytest.raises(ConfigurationError, match=r"no such source.*'default'"):
                await Slow.start(0).persist("elsewhere").run()

    run(scenario)


@pytest.mark.parametrize("crash_at", [0.1, 0.5, 0.999, 1.0, 1.001, 1.2])
def test_a_coordinator_that_crashes_repeats_no_work(database, crash_at):
    """The job actors go on; the next coordinator adopts what runs, and takes the results that they hold."""

    async def scenario():
        async with documents(database) as engine:
            jobs = await Slow.start_many([1.0] * 2).persist().audit().run()
            await asyncio.sleep(crash_at)
            engine.crash()
            await asyncio.sleep(0.3)
            await engine.restart()
            assert [await job.wait() for job in jobs] == [job.id for job in jobs]
            assert set(bodies.values()) == {1}
            for job in jobs:
                assert [e.status for e in await job.executions()] == [ExecutionStatus.SUCCEEDED]

    run(scenario)


def test_a_body_that_began_in_the_last_flush_before_a_crash_may_run_twice_and_counts_once(database):
    """Running is written behind: the next coordinator does not know that execution, and refuses what it says."""

    async def scenario():
        async with documents(database) as engine:
            job = await Slow.start(1).persist().audit().run()
            await asyncio.sleep(0.01)
            engine.crash()
            await engine.restart()
            assert await job.wait() == job.id
            assert bodies[job.id] == 2
            assert [e.status for e in await job.executions()] == [ExecutionStatus.SUCCEEDED]

    run(scenario)


def test_a_job_in_memory_is_reported_lost_and_a_stored_one_is_not(database):
    async def scenario():
        async with documents(database) as engine:
            stored, lost = await Slow.start(2).persist().run(), await Slow.start(2).run()
            waits = [stored.wait(), lost.wait()]
            await asyncio.sleep(0.5)
            engine.crash()
            await engine.restart()
            assert await waits[0] == stored.id
            with pytest.raises(JobLostError):
                await waits[1]

    run(scenario)


def test_a_running_job_whose_actor_is_gone_too_was_lost_once(database):
    async def scenario():
        async with documents(database) as engine:
            job = await Slow.start(5).persist().audit().run()
            await asyncio.sleep(1)
            engine.crash()
            for name in list(engine.launcher._actors):
                engine.launcher.kill(name)
            await engine.restart()
            assert await job.wait() == job.id
            assert [e.reason for e in await job.executions()] == ["lost", "succeeded"]

    run(scenario)


@pytest.mark.parametrize("fault", ["lose_replies", "lose_requests", "tear"])
def test_an_unknown_outcome_is_resolved_and_nothing_is_doubled(database, fault):
    async def scenario():
        async with documents(database) as engine:
            for _ in range(6):
                setattr(database.faults, fault, 1)
                job = await Slow.start(0.01).persist().audit().run()
                setattr(database.faults, fault, 1)
                assert await job.wait() == job.id
                assert [e.status for e in await job.executions()] == [ExecutionStatus.SUCCEEDED]
            assert database.faults.n_fired == 12
            assert set(bodies.values()) == {1}
            assert engine.coordinator._catalog.sources["default"].tenures[0].state == "active"

    run(scenario)


def test_a_flush_that_was_torn_by_a_crash_is_mended_by_the_next_coordinator(database):
    async def scenario():
        async with documents(database) as engine:
            job = await Slow.start(0.2).persist().audit().run()
            await asyncio.sleep(0.19)
            database.faults.tear = 1
            await asyncio.sleep(0.02)  # the body ends, and its flush is torn; the writer waits before it repeats it
            assert database.faults.n_fired == 1
            engine.crash()
            assert database.jobs[""][job.id]["status"] == "completed"
            await engine.restart()
            assert [e.status for e in await job.executions()] == [ExecutionStatus.SUCCEEDED]
            assert bodies[job.id] == 1

    run(scenario)


def test_nothing_is_acknowledged_while_the_store_is_away_and_nothing_is_lost(database):
    async def scenario():
        async with documents(database) as engine:
            running = await Slow.start(1).persist().run()
            await asyncio.sleep(0.2)
            database.faults.unavailable = True
            submitting = Slow.start(0).persist().run()
            waiting = running.wait()
            await asyncio.sleep(60)
            assert not submitting.done
            assert not waiting.done
            assert await (await Slow.start(0).run()).wait()  # memory does not care
            database.faults.unavailable = False
            assert await waiting == running.id
            late = await submitting
            assert await late.wait() == late.id
            assert bodies[running.id] == 1
            assert engine.coordinator._catalog.sources["default"].tenures[0].term == 1

    run(scenario)


@pytest.mark.parametrize("namespace", ["koan", "of another team"])
def test_a_second_coordinator_stands_by_and_takes_over_what_the_first_left(database, namespace):
    async def scenario():
        async with documents(database, seed=1) as first:
            job = await Slow.start(30).persist().audit().run()
            await asyncio.sleep(1)
            async with documents(database, seed=2, namespace=namespace) as second:
                assert second.coordinator._catalog.sources["default"].tenures[0].state == "standby"
                first.crash()
                for name in list(first.launcher._actors):
                    first.launcher.kill(name)
                second._types.update(first._types)
                await second.coordinator.introduce(*known(first))
                began = asyncio.get_running_loop().time()
                assert await second.session.wait(job, None) == job.id
                took = asyncio.get_running_loop().time() - began
                assert 15 * 1.4 < took < 15 * 2.5 + 31  # the lease had to lapse
                assert database.leases["koan/0"].term == 2
                await first.restart()

    run(scenario)


def known(engine):
    kinds = engine.coordinator._kinds
    return list(kinds._newest.values()), dict(kinds._code)


def test_a_job_whose_class_nobody_has_waits_visibly_and_runs_when_it_is_known(database):
    async def scenario():
        async with documents(database) as engine:
            job = await Slow.start(1).persist().delayed(5).run()
            terms, code = known(engine)
            engine.crash()
            engine.launcher._kept.clear()
            await engine.restart()
            await asyncio.sleep(10)
            assert (await engine.coordinator.status())["unroutable"] == {"Slow": 1}
            assert (await koan.Jobs.get(job.id)).status is koan.JobStatus.QUEUED
            await engine.coordinator.introduce(terms, code)
            assert await job.wait() == job.id

    run(scenario)
