"""Job actors that fall silent."""

from __future__ import annotations

import asyncio

import koan_ray as koan
from koan_ray import testing
from koan_ray.ports import Push
from koan_ray.testing import ManualClock


class Sleeps(koan.Job[float, float]):
    async def execute(self, context, progress, cancellation) -> float:
        await asyncio.sleep(context)
        return context


class Waits(koan.Job[None, None]):
    async def execute(self, context, progress, cancellation) -> None:
        await asyncio.get_running_loop().create_future()


class Suspended(ManualClock):
    """Time passes in which nothing happens that was due."""

    absent_s = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.absent_s


def silence(engine, n: int = 1) -> list[str]:
    """Keep back all that the first ``n`` actors say after their first batch; returns their names as they fall silent."""
    launcher, silent = engine.launcher, []
    later = launcher.later

    def hold(actor, action) -> None:
        if actor.name not in silent and len(silent) < n and actor._live:
            silent.append(actor.name)
        if actor.name not in silent:
            later(actor, action)

    launcher.later = hold
    return silent


def test_an_actor_that_says_nothing_while_a_body_runs_is_killed_and_the_job_runs_again():
    async def scenario():
        async with testing.engine(max_actors=1, stuck_after_s=30.0) as engine:
            job = await Sleeps.start(100.0).run()
            await asyncio.sleep(1)
            silent = silence(engine)
            assert await job.wait() == 100.0
            first, second = await job.executions()
            assert (first.reason, second.reason) == ("lost", "succeeded")
            assert 25 <= first.duration.total_seconds() <= 40
            assert len(silent) == 1

    testing.run(scenario())


def test_an_actor_that_speaks_may_run_a_body_for_any_time():
    async def scenario():
        async with testing.engine(max_actors=1, stuck_after_s=30.0) as engine:
            job = await Sleeps.start(5000.0).run()
            await job.wait()
            assert [e.reason for e in await job.executions()] == ["succeeded"]
            assert (await engine.coordinator.status())["counters"]["actors_lost"] == 0

    testing.run(scenario())


async def test_a_coordinator_that_was_absent_itself_takes_no_actor_for_stuck():
    clock = Suspended()
    async with testing.engine(clock=clock, max_actors=1, stuck_after_s=30.0) as engine:
        job = await Waits.start().run()
        await engine.drain()
        clock.advance(2.0)
        await engine.drain()
        clock.absent_s = 300.0
        clock.advance(2.0)
        await engine.drain()
        await job.refresh()
        assert job.status is koan.JobStatus.RUNNING
        assert len(await job.executions()) == 1
        await job.cancel()
        await engine.drain()


def test_a_lone_body_that_outlives_its_timeout_in_a_silent_actor_has_timed_out():
    async def scenario():
        class Limited(Sleeps):
            timeout = 5.0
            retry = koan.RetryPolicy(max_attempts=1)

        async with testing.engine(max_actors=1, stuck_after_s=30.0) as engine:
            silence(engine)
            job = await Limited.start(100.0).run()
            await asyncio.sleep(60)
            await job.refresh()
            assert job.status is koan.JobStatus.FAILED
            (execution,) = await job.executions()
            assert execution.reason == "timeout"
            assert execution.metrics["stopped_by"] == "kill"

    testing.run(scenario())


class Elsewhere(koan.Job[None, None]):
    resources = koan.Resources(label_selector={"region": "nowhere"})

    async def execute(self, context, progress, cancellation) -> None:
        pass


def test_actors_that_the_cluster_has_no_room_for_keep_no_other_from_starting_and_go_when_nobody_wants_them():
    async def scenario():
        async with testing.engine(max_actors=2) as engine:
            start, lent_ones = engine.launcher.start, []

            def refuse(name, spec, events, *, lent=False):
                lent_ones.append(lent)
                start(name, spec, events, lent=lent)
                if spec.label_selector:
                    engine.launcher._actors[name].events = None
                    engine.launcher._actors[name].is_dead = True  # says nothing

            engine.launcher.start = refuse
            waiting = await Elsewhere.start_many([None] * 5).run()
            await asyncio.sleep(0.5)
            others = await Sleeps.start_many([1.0] * 4).run()
            assert [await job.wait() for job in others] == [1.0] * 4
            assert lent_ones == [False] * 4  # two of each
            assert {(await job.refresh()).status for job in waiting} == {koan.JobStatus.QUEUED}
            for job in waiting:
                await job.cancel()
            ended = []
            engine.launcher.retire = ended.append
            await asyncio.sleep(2.0)
            assert len(ended) == 2

    testing.run(scenario())


def test_what_an_actor_says_by_itself_is_newer_than_what_its_batch_is_answered_with():
    async def scenario():
        async with testing.engine(max_actors=1) as engine:
            await Sleeps.start(100.0).run()
            await asyncio.sleep(0.001)
            dispatcher = engine.coordinator._dispatcher
            (active,) = dispatcher.running()
            assert active.actor.batches
            dispatcher.pushed(Push(active.actor.name, [], [active.execution.id], [], []))
            await asyncio.sleep(1)  # the answer comes, and was made when the body had not parked
            assert not active.actor.batches
            assert active.parked

    testing.run(scenario())
