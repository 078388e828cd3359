"""Each counter and gauge moves when what it counts happens, on simulated actors and stores in virtual time."""

from __future__ import annotations

import asyncio

import pytest

import koan_ray as koan
from koan_ray import testing
from koan_ray.domain.measures import CAUSES, INSTRUMENTS, RESOLUTIONS, TAKEOVERS, ZEROS
from koan_ray.domain.records import Progress
from koan_ray.domain.status import JobStatus
from koan_ray.engine.broker import Broker
from koan_ray.engine.settings import EngineSettings
from koan_ray.errors import LimitExceededError
from koan_ray.testing.loop import VirtualClock
from koan_ray.testing.simulation import Faults

PROMISED = {
    "fenced_writes": ("transition",), "takeovers": ("reason",), "executions_lost": ("cause",),
    "outcome_unknown": ("op", "resolution"), "claims_returned": (), "poison": ("type",), "progress_dropped": (),
    "readers_evicted": (), "auth_denied": ("route",), "outbox_backlog": (), "oldest_queued_seconds": (),
    "unroutable": ("type",), "loop_lag_seconds": (),
}  # fmt: skip


class Sleeps(koan.Job[float, None]):
    retry = koan.RetryPolicy(max_attempts=2, initial_delay=0.1)

    async def execute(self, context, progress, cancellation) -> None:
        await asyncio.sleep(context)


@pytest.fixture
def database():
    return testing.MemoryDatabase()


def engine_on(database, **settings):
    sources = {"default": lambda: testing.MemoryDocumentStore(database, source="default")}
    return testing.engine(sources=sources, **{"lease_ttl_s": 3.0, "max_actors": 2, **settings})


async def grown(engine, before=ZEROS):
    """What has been counted since."""
    now = (await engine.coordinator.measure()).counters
    return {key: n - before.get(key, 0) for key, n in now.items() if n != before.get(key, 0)}


async def gauges(engine):
    return (await engine.coordinator.measure()).gauges


def test_what_was_promised_has_an_instrument_with_its_labels_and_is_zero_before_it_happens():
    by_name = {each.name: each.labels for each in INSTRUMENTS}
    assert {name: by_name[name] for name in PROMISED} == PROMISED
    assert {labels for name, labels in ZEROS if name == "executions_lost"} == {(cause,) for cause in CAUSES}
    assert {labels for name, labels in ZEROS if name == "takeovers"} == {(reason,) for reason in TAKEOVERS}
    assert {labels for name, labels in ZEROS if name == "fenced_writes"} == {(status.value,) for status in JobStatus}
    assert len([1 for name, _ in ZEROS if name == "outcome_unknown"]) == sum(map(len, RESOLUTIONS.values()))


def test_a_new_engine_reads_zero(database):
    async def scenario():
        async with engine_on(database) as engine:
            await asyncio.sleep(1.5)  # a beat each second
            found = await engine.coordinator.measure()
            assert {key: n for key, n in found.counters.items() if n} == {("takeovers", ("first",)): 1}
            assert set(ZEROS) <= set(found.counters)
            level = found.gauges
            assert level["outbox_backlog", ()] == level["oldest_queued_seconds", ()] == 0
            assert 0 <= level["loop_lag_seconds", ()] < 1
            assert level["beat_age_seconds", ("default",)] == pytest.approx(0.5, abs=0.2)

    testing.run(scenario())


def test_take_overs_are_counted_by_why_the_lease_was_free(database):
    async def scenario():
        async with engine_on(database) as engine:
            engine.crash()
            await engine.restart()
            await Sleeps.start(0.0).persist().run()
            assert (await grown(engine))["takeovers", ("dead",)] == 1
        async with engine_on(database, namespace="later") as engine:
            await Sleeps.start(0.0).persist().run()
            assert (await grown(engine))["takeovers", ("released",)] == 1
            engine.crash()
            engine._dead.clear()  # nobody knows that it is
            await engine.restart()
            await Sleeps.start(0.0).persist().run()
            assert (await grown(engine))["takeovers", ("lapsed",)] == 1

    testing.run(scenario())


def test_lost_executions_and_poison_are_counted():
    async def scenario():
        async with testing.engine(max_crashes=3, faults=Faults(die_at_begin=1.0, limit=10**6)) as engine:
            with pytest.raises(koan.JobFailedError):
                await (await Sleeps.start(0.0).run()).wait()
            found = await grown(engine)
            assert found["poison", ("Sleeps",)] == 1
            assert found["crashes", ()] == 3
            assert sum(n for (name, _), n in found.items() if name == "executions_lost") == 3
            assert all(labels[0] in CAUSES for (name, labels) in found if name == "executions_lost")

    testing.run(scenario())


def test_a_write_that_a_newer_writer_has_replaced_is_counted_by_its_transition(database):
    async def scenario():
        async with engine_on(database) as engine:
            job = await Sleeps.start(5.0).persist().run()
            await asyncio.sleep(1)
            stored = database.jobs[""][job.id]
            assert stored["status"] == "running"
            database.jobs[""][job.id] = {**stored, "rev": stored["rev"] + 5, "term": stored["term"] + 1}
            before = (await engine.coordinator.measure()).counters
            await asyncio.sleep(6)
            assert (await grown(engine, before))["fenced_writes", ("completed",)] == 1

    testing.run(scenario())


@pytest.mark.parametrize(("fault", "resolution"), [("lose_replies", "was_written"), ("lose_requests", "repeated")])
def test_outcomes_that_had_to_be_found_out_are_counted(database, fault, resolution):
    async def scenario():
        async with engine_on(database) as engine:
            setattr(database.faults, fault, 1)
            await (await Sleeps.start(0.0).persist().run()).wait()
            found = await grown(engine)
            assert sum(n for (name, labels), n in found.items() if name == "outcome_unknown" and labels[0] == "flush") == 1
            assert database.faults.n_fired == 1
            if resolution == "repeated":
                assert found["outcome_unknown", ("flush", "repeated")] == 1

    testing.run(scenario())


def test_a_lease_whose_answer_was_lost_is_counted(database):
    async def scenario():
        async with engine_on(database) as engine:
            engine.crash()
            database.faults.lose_replies = 1
            await engine.restart()
            await (await Sleeps.start(0.0).persist().run()).wait()
            assert (await grown(engine))["outcome_unknown", ("take_lease", "was_written")] == 1

    testing.run(scenario())


def test_claims_that_an_actor_gives_back_are_counted():
    async def scenario():
        async with testing.engine(max_actors=2) as engine:
            for job in await Sleeps.start_many([0.001] * 400).run():
                await job.wait()
            jobs = await Sleeps.start_many([30.0] + [0.001] * 400).run()  # those behind the first are given to others
            for job in jobs:
                await job.wait()
            found = await grown(engine)
            assert found["claims_returned", ()] > 0
            assert found["jobs_ended", ("Sleeps", "completed")] == 801

    testing.run(scenario())


def test_what_waits_is_a_level(database):
    async def scenario():
        async with engine_on(database, max_actors=1) as engine:
            jobs = [await Sleeps.start(20.0).run() for _ in range(3)]
            await asyncio.sleep(5)
            assert (await gauges(engine))["oldest_queued_seconds", ()] == pytest.approx(5, abs=0.5)
            for job in jobs:
                await job.wait()
            assert (await gauges(engine))["oldest_queued_seconds", ()] == 0

    testing.run(scenario())


def test_what_a_store_that_is_away_has_not_taken_is_a_level(database):
    async def scenario():
        async with engine_on(database, max_actors=8) as engine:
            jobs = await Sleeps.start_many([3.0] * 7).persist().run()
            await asyncio.sleep(2.5)
            assert (await gauges(engine))["outbox_backlog", ()] == 0
            database.faults.unavailable = True
            await asyncio.sleep(1.5)  # they end, and their ends are written again and again
            level = await gauges(engine)
            assert level["outbox_backlog", ()] == 7
            assert level["beat_age_seconds", ("default",)] >= 1
            database.faults.unavailable = False
            for job in jobs:
                await job.wait()
            assert (await gauges(engine))["outbox_backlog", ()] == 0

    testing.run(scenario())


def test_jobs_without_a_class_are_a_level(database):
    async def scenario():
        async with engine_on(database) as engine:
            await Sleeps.start(1).persist().delayed(60).run()
            engine.crash()
            engine.launcher._kept.clear()
            await engine.restart()
            await asyncio.sleep(10)
            assert (await gauges(engine))["unroutable", ("Sleeps",)] == 1

    testing.run(scenario())


def test_dropped_progress_and_evicted_readers_are_counted():
    async def scenario():
        clock = VirtualClock(asyncio.get_running_loop())
        broker = Broker(EngineSettings(max_watchers=1), clock, "e")
        assert (await broker.measure()).counters == {("progress_dropped", ()): 0, ("readers_evicted", ()): 0}
        await broker.poll("slow", "e", ["job"], [], 0)
        for sequence in (1, 2, 3):
            await broker.push([("job", Progress(sequence, 0.1 * sequence))])
        assert (await broker.measure()).counters["progress_dropped", ()] == 2
        with pytest.raises(LimitExceededError):
            await broker.poll("another", "e", ["job"], [], 0)
        await asyncio.sleep(61)
        await broker.poll("another", "e", ["job"], [], 0)
        assert (await broker.measure()).counters["readers_evicted", ()] == 1

    testing.run(scenario())
