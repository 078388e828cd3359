"""What raises in the engine though nobody expected it is noted, told and survived; nothing that shall run ends of it."""

from __future__ import annotations

import asyncio

import pytest

import koan_ray as koan
from koan_ray import testing
from koan_ray.domain.archival import ArchivalPolicy
from koan_ray.engine.parking import Caller
from koan_ray.engine.tasks import Failures, Tasks
from koan_ray.ports import Silence
from koan_ray.testing.loop import VirtualClock


class Log(Silence):
    def __init__(self):
        self.told = []

    def error(self, event, **fields):
        self.told.append((event, fields))


class Echo(koan.Job[int, int]):
    retry = koan.RetryPolicy(max_attempts=3, initial_delay=1, jitter=0)

    async def execute(self, context, progress, cancellation) -> int:
        return context


class Sleeps(koan.Job[float, float]):
    async def execute(self, context, progress, cancellation) -> float:
        try:
            await asyncio.sleep(context)
        except asyncio.CancelledError:
            await asyncio.sleep(1000)
        return context


def once(holder, name, error=None, only=lambda *_args: True, times=1):
    """Have a method of an object raise the first time, or the first few times, it is called with what ``only`` says."""
    original, left = getattr(holder, name), [times]

    def raises(*args, **more):
        if left[0] and only(*args):
            left[0] -= 1
            raise error or KeyError("nobody expected this")
        return original(*args, **more)

    setattr(holder, name, raises)
    return left


def in_engine(scenario, **settings):
    async def main():
        async with testing.engine(**{"max_actors": 2, **settings}) as engine:
            await scenario(engine)

    testing.run(main())


def on_documents(scenario, store=testing.MemoryDocumentStore, **settings):
    database = testing.MemoryDatabase()
    sources = {"default": lambda: store(database, source="default")}
    in_engine(scenario, sources=sources, lease_ttl_s=3.0, **settings)


async def noted(engine) -> dict[str, int]:
    """How often what has failed, by what the status says."""
    status = await engine.coordinator.status()
    assert status["interrupted"] == []
    return {where: each["n"] for where, each in status["failures"].items()}


# --- tasks ---------------------------------------------------------------------------------------------------------------


def test_a_task_that_raises_is_told_with_its_trace_and_counted():
    async def main():
        log, clock = Log(), testing.ManualClock()
        failures = Failures(log)
        tasks = Tasks(failures, clock)

        async def fails():
            raise ValueError("x\ud800")

        tasks.spawn(fails(), "a pass")
        await asyncio.sleep(0.01)
        ((event, fields),) = log.told
        assert (event, fields["where"], fields["problem"]) == ("engine_failed", "a pass", "ValueError: x\\ud800")
        assert isinstance(fields["exc_info"], ValueError)
        assert failures.snapshot() == {"a pass": {"n": 1, "last": "ValueError: x\\ud800"}}

    asyncio.run(main())


def test_what_shall_always_run_begins_again_after_an_error_and_after_an_end():
    async def main():
        log, is_over, n = Log(), False, 0
        failures = Failures(log)
        loop = asyncio.get_running_loop()
        tasks = Tasks(failures, VirtualClock(loop))

        async def begin():
            nonlocal n
            n += 1
            if n == 1:
                raise KeyError("x")
            await asyncio.sleep(5)

        tasks.keep("a loop", begin, lambda: is_over)
        await asyncio.sleep(0.1)
        assert list(tasks.interrupted()) == ["a loop"]
        await asyncio.sleep(1)
        assert (n, list(tasks.interrupted())) == (2, [])
        await asyncio.sleep(10)  # it ends by itself, which it should not
        assert n == 3
        assert [fields["problem"] for _, fields in log.told] == ["KeyError: 'x'", "RuntimeError: a loop has ended by itself"]
        is_over = True
        await asyncio.sleep(10)
        assert (n, list(tasks.interrupted())) == (3, [])
        tasks.cancel()

    testing.run(main())


def test_a_log_that_raises_ends_nothing():
    class Broken(Silence):
        def error(self, event, **fields):
            raise OSError("disk full")

    failures = Failures(Broken())
    assert not failures.survive("a place", lambda: {}["x"])
    assert failures.counts == {"a place": 1, "log": 1}


# --- dispatch ------------------------------------------------------------------------------------------------------------


def test_an_end_that_cannot_be_settled_costs_its_own_execution_alone():
    async def scenario(engine):
        settling = engine.coordinator._settling
        jobs = await Echo.start_many(range(100)).run()
        bad = jobs[50].id
        once(settling, "ended", only=lambda active, _report: active.job_id == bad)
        assert [await job.wait() for job in jobs] == list(range(100))
        assert await noted(engine) == {"settling": 1}
        assert (await jobs[50].details()).crashes == 1

    in_engine(scenario)


def test_an_end_that_can_never_be_settled_gives_the_job_up_and_no_other():
    async def scenario(engine):
        settling = engine.coordinator._settling
        jobs = await Echo.start_many(range(20)).run()
        bad = jobs[7].id
        once(settling, "ended", only=lambda active, _report: active.job_id == bad, times=100)
        for job in jobs:
            if job.id != bad:
                assert await job.wait() is not None
        with pytest.raises(koan.JobFailedError, match="could not be settled: KeyError"):
            await jobs[7].wait()

    in_engine(scenario)


@pytest.mark.parametrize("method", ["send", "start", "capacity", "nodes", "is_crowded"])
def test_a_launcher_that_raises_stops_no_dispatch(method):
    async def scenario(engine):
        once(engine.launcher, method, times=3)
        jobs = await Echo.start_many(range(30)).run()
        assert [await job.wait() for job in jobs] == list(range(30))
        await asyncio.sleep(5)
        assert sum((await noted(engine)).values()) == 3

    in_engine(scenario, stuck_after_s=2.0)


def test_a_kill_that_raises_keeps_no_other_from_being_killed():
    async def scenario(engine):
        once(engine.launcher, "kill")
        jobs = [await Sleeps.start(500.0).run() for _ in range(2)]
        await asyncio.sleep(1)
        for job in jobs:
            await job.cancel()
        (second,) = [job for job in jobs if job is not jobs[0]]
        with pytest.raises(koan.JobCancelledError):
            await second.wait()
        assert (await noted(engine))["deadlines"] == 1

    in_engine(scenario, cancel_grace_s=1.0)


def test_a_due_job_that_raises_keeps_no_other_asleep():
    async def scenario(engine):
        jobs = [await Echo.start(n).delayed(5).run() for n in range(5)]
        once(engine.coordinator._settling, "became_due")
        await asyncio.sleep(20)
        for job in jobs[1:]:
            assert await job.wait() is not None
        assert (await noted(engine))["due times"] == 1

    in_engine(scenario)


# --- sources -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["take_over", "claim", "read_lease", "take_lease", "open_executions", "beat"])
def test_a_source_that_raises_what_nobody_expects_is_served_again(method):
    class Odd(testing.MemoryDocumentStore):
        pass

    left = [2]
    original = getattr(Odd, method)

    def raises(self, *args, **more):
        if left[0]:
            left[0] -= 1
            raise TypeError("what no driver of ours says")
        return original(self, *args, **more)

    setattr(Odd, method, raises)

    async def scenario(engine):
        job = await Echo.start(1).persist().run()
        assert await job.wait() == 1
        await asyncio.sleep(30)
        job = await Echo.start(2).persist().run()
        assert await job.wait() == 2
        assert (left[0], sum((await noted(engine)).values())) == (0, 2)
        assert (await engine.coordinator.status())["sources"]["default"]["state"] == "active"

    on_documents(scenario, Odd)


def test_a_job_that_cannot_be_archived_keeps_no_other_from_it():
    class Odd(testing.MemoryDocumentStore):
        bad = ""

        async def put_copy(self, job, executions, partition):
            if job.id == self.bad:
                raise TypeError("no document")
            await super().put_copy(job, executions, partition)

    async def scenario(engine):
        jobs = [await Echo.start(n).persist().run() for n in range(5)]
        for job in jobs:
            await job.wait()
        Odd.bad = jobs[0].id
        await asyncio.sleep(20)
        (counts,) = (await koan.Jobs.archive()).values()
        assert (counts["moved"], counts["mismatched"]) == (4, 1)
        assert await noted(engine) == {"archival of default": 1}

    on_documents(scenario, Odd, archival_policies=(ArchivalPolicy("soon", older_than_s=10.0),))


def test_held_back_jobs_are_not_lost_to_one_that_raises():
    async def scenario(engine):
        tenure, resumed = engine.coordinator._tenures()[0], []
        tenure._host.resumed = resumed.extend
        once(tenure._host, "resumed")
        for name in ("a", "b", "c"):
            tenure.hold(name)
        await asyncio.sleep(10)
        assert resumed == ["b", "c"]
        assert await noted(engine) == {"resuming default": 1}

    on_documents(scenario)


# --- parked calls --------------------------------------------------------------------------------------------------------


def test_a_parked_call_that_is_cancelled_does_not_stay_parked():
    async def main():
        caller = Caller()
        parked = asyncio.ensure_future(caller.park(testing.ManualClock(), 10.0))
        await asyncio.sleep(0)
        assert caller.is_parked
        parked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await parked
        assert not caller.is_parked

    asyncio.run(main())


def test_what_has_failed_is_a_counter():
    async def scenario(engine):
        once(engine.launcher, "capacity")
        await asyncio.sleep(3)
        counters = (await engine.coordinator.measure()).counters
        assert counters["unexpected_failures", ("housekeeping of actors",)] == 1

    in_engine(scenario)
