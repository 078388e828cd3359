"""Several shards of a source: who holds them, and what becomes of jobs when their number changes."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace

import pytest

import koan_ray as koan
from koan_ray import testing, wiring
from koan_ray.domain.lease import MAX_SHARDS, SLOTS, shard_of, slots_of
from koan_ray.errors import ConfigurationError
from tests.unit.engine.test_faults_simulated import check

bodies: Counter[str] = Counter()


class Long(koan.Job[float, str]):
    retry = koan.RetryPolicy(max_attempts=3, initial_delay=1)

    async def execute(self, context, progress, cancellation) -> str:
        bodies[self.id] += 1
        await asyncio.sleep(context)
        return self.id


class Crowd(koan.Job[int, int]):
    async def execute(self, context, progress, cancellation) -> int:
        children = [await self.start_child(Long, 0.1, key=str(n)).run() for n in range(context)]
        return len([await child.wait() for child in children])


@pytest.fixture
def database():
    bodies.clear()
    return testing.MemoryDatabase()


def engine_on(database, shards, **settings):
    sources = {"default": lambda: testing.MemoryDocumentStore(database, source="default")}
    return testing.engine(sources=sources, shards=shards, **settings)


def shards_of(engine):
    return engine.coordinator._catalog.sources["default"]


@pytest.mark.parametrize("n_shards", [1, 2, 3, 7, MAX_SHARDS])
def test_every_slot_belongs_to_one_shard(n_shards):
    assert sorted(slot for n in range(n_shards) for slot in slots_of(n, n_shards)) == list(range(SLOTS))
    job_id = "0190a5b6-7c8d-7e9f-8a0b-1c2d3e4f50ff"
    assert 0xFF in slots_of(shard_of(job_id, n_shards), n_shards)


@pytest.mark.parametrize("count", [0, 65])
def test_the_number_of_shards_has_limits(count):
    with pytest.raises(ConfigurationError, match=r"engine\.shards"):
        koan.Settings(engine={"shards": count})


def test_the_number_of_shards_comes_from_the_environment_too(monkeypatch):
    monkeypatch.setenv("KOAN_RAY_ENGINE__SHARDS", "5")
    assert wiring.engine_settings(koan.Settings()).shards == 5


def test_each_shard_has_a_lease_and_writes_its_jobs_under_its_term(database):
    async def scenario():
        async with engine_on(database, 3) as engine:
            jobs = await Long.start_many([0.0] * 40).persist().audit().run()
            for job in jobs:
                await job.wait()
            shards = shards_of(engine)
            assert sorted(database.leases) == ["koan/0", "koan/1", "koan/2"]
            assert {lease.holder for lease in database.leases.values()} == {engine.coordinator.epoch}
            assert {shards.of(job.id) for job in jobs} == set(shards.tenures)
            told = (await engine.coordinator.status())["sources"]["default"]
            assert told["state"] == "active"
            assert told["shards"].keys() == database.leases.keys()
            assert {shard["state"] for shard in told["shards"].values()} == {"active"}
        assert {lease.holder for lease in database.leases.values()} == {""}
        check(database, [job.id for job in jobs])

    testing.run(scenario())


def test_flushes_of_shards_do_not_wait_for_each_other(database):
    async def scenario():
        async with engine_on(database, 3, max_actors=4) as engine:
            database.faults.delay_s = 0.2
            apply, at_once, most = testing.MemoryDocumentStore.apply, 0, 0
            store = shards_of(engine).store

            async def counted(changes):
                nonlocal at_once, most
                at_once += 1
                most = max(most, at_once)
                try:
                    return await apply(store, changes)
                finally:
                    at_once -= 1

            store.apply = counted
            jobs = await Long.start_many([0.0] * 40).persist().run()
            assert most == 3
            for job in jobs:
                await job.wait()

    testing.run(scenario())


@pytest.mark.parametrize("counts", [(1, 3, 2, 1), (3, 1, 5, 64, 2), (2, 2, 3, 3)])
def test_the_number_of_shards_may_change_at_any_restart(database, counts):
    """Terms go on growing, so that each stamp reaches the documents of every shard there ever was; no body runs twice."""

    async def scenario():
        async with engine_on(database, counts[0], max_actors=3) as engine:
            running = await Long.start_many([60.0] * 3).persist().audit().run()
            queued = await Long.start_many([0.5] * 30).persist().audit().run()
            await asyncio.sleep(3)
            for count in counts[1:]:
                engine.crash()
                await asyncio.sleep(0.3)
                engine._settings = replace(engine._settings, shards=count)
                await engine.restart()
                assert shards_of(engine).is_active
                terms = [tenure.term for tenure in shards_of(engine).tenures]
                assert terms[0] <= min(terms)
                assert max(document["term"] for document in database.jobs[""].values()) <= terms[0]
                await asyncio.sleep(3)
            for job in [*running, *queued]:
                assert await job.wait() == job.id
        assert set(bodies.values()) == {1}
        check(database, [job.id for job in [*running, *queued]])

    testing.run(scenario())


@pytest.mark.parametrize(("first", "second"), [(3, 3), (1, 3), (3, 1)])
def test_a_source_belongs_to_one_coordinator_as_a_whole(database, first, second):
    """Whatever number of shards either was configured with; all of it goes over when the holder is dead."""

    async def scenario():
        async with engine_on(database, first) as one:
            jobs = await Long.start_many([40.0] * 12).persist().audit().run()
            async with engine_on(database, second, seed=1) as other:
                await asyncio.sleep(60)
                states = {tenure.state for tenure in shards_of(other).tenures}
                assert not states & {"active", "recovering"}
                assert not any(tenure.may_act for tenure in shards_of(other).tenures)
                assert shards_of(one).may_act
                one.crash()
                async with asyncio.timeout(60):
                    while not shards_of(other).is_active:  # noqa: ASYNC110 - states have no event
                        await asyncio.sleep(1)
                late = await Long.start_many([0.0] * 20).persist().audit().run()
                for job in late:
                    await job.wait()
                async with asyncio.timeout(600):
                    while other.coordinator.n_live:  # noqa: ASYNC110 - nor has this
                        await asyncio.sleep(1)
        check(database, [job.id for job in [*jobs, *late]])

    testing.run(scenario())


def test_one_shard_that_is_fenced_is_taken_again_alone(database):
    async def scenario():
        async with engine_on(database, 3) as engine:
            jobs = await Long.start_many([20.0] * 2).persist().audit().run()
            shards = shards_of(engine)
            terms = [tenure.term for tenure in shards.tenures]
            victim = shards.tenures[2]
            victim._note_replaced()
            await asyncio.sleep(0.1)
            assert [tenure.state == "active" for tenure in shards.tenures] == [True, True, False]
            async with asyncio.timeout(30):
                while not shards.is_active:  # noqa: ASYNC110 - states have no event
                    await asyncio.sleep(0.5)
            assert [tenure.term for tenure in shards.tenures] == [*terms[:2], terms[2] + 1]
            for job in jobs:
                assert await job.wait() == job.id
        check(database, [job.id for job in jobs])

    testing.run(scenario())


def test_when_the_leading_lease_is_lost_nothing_acts_on_the_others(database):
    async def scenario():
        async with engine_on(database, 3) as engine:
            await (await Long.start(0.0).persist().run()).wait()
            shards = shards_of(engine)
            lead, *others = shards.tenures
            database.leases["koan/0"] = database.leases["koan/0"]._replace(holder="rival", term=lead.term + 1)
            await asyncio.sleep(6)  # the next beat finds out
            assert not any(tenure.may_act for tenure in shards.tenures)
            assert all(tenure.lease is None for tenure in others)
            assert not engine.coordinator.n_live

    testing.run(scenario())


def test_an_actor_that_runs_jobs_of_several_shards_is_adopted_once_with_all_of_them(database):
    class Together(koan.Job[float, str]):
        concurrency = 8

        async def execute(self, context, progress, cancellation) -> str:
            bodies[self.id] += 1
            await asyncio.sleep(context)
            return self.id

    async def scenario():
        async with engine_on(database, 5, max_actors=1) as engine:
            jobs = await Together.start_many([10.0] * 8).persist().audit().run()
            await asyncio.sleep(1)
            engine.crash()
            await engine.restart()
            assert [await job.wait() for job in jobs] == [job.id for job in jobs]
        assert set(bodies.values()) == {1}
        check(database, [job.id for job in jobs])

    testing.run(scenario())


def test_trees_cancellation_and_retry_cross_shards(database):
    async def scenario():
        async with engine_on(database, 3) as engine:
            family = await Crowd.start(40).persist().audit().run()
            assert await family.wait() == 40
            children = await family.get_children()
            assert len({shard_of(child.id, 3) for child in children}) == 3
            doomed = await Long.start_many([100.0] * 12).persist().audit().run()
            await asyncio.sleep(1)
            for job in doomed:
                await job.cancel()
            await asyncio.sleep(10)  # those that ran have ended
            again = [await koan.Jobs.retry(job.id) for job in doomed]
            assert await koan.Jobs.count(status=["queued", "running"]) == 12
            for job in again:
                await job.cancel()
            async with asyncio.timeout(60):
                while engine.coordinator.n_live:  # noqa: ASYNC110 - no event
                    await asyncio.sleep(1)
        check(database, [job.id for job in [*doomed, *again]])

    testing.run(scenario())
