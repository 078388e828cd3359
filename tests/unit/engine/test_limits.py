"""Nothing is unbounded: sessions, waits, watches and tracked jobs have limits, and say so."""

from __future__ import annotations

import asyncio

import pytest

import koan_ray as koan
from koan_ray import testing
from koan_ray.domain.records import End, Progress
from koan_ray.engine.broker import Broker
from koan_ray.engine.settings import EngineSettings
from koan_ray.engine.waiters import Waiters


def test_waiting_sessions_and_their_jobs_are_limited():
    async def main():
        waiters = Waiters(testing.ManualClock(), max_sessions=2, max_watched=3)
        waiters.watch("a", ["1", "2"])
        waiters.watch("b", ["1"])
        with pytest.raises(koan.LimitExceededError, match=r"engine\.max_sessions"):
            waiters.watch("c", ["1"])
        with pytest.raises(koan.LimitExceededError, match=r"engine\.max_watched"):
            waiters.watch("a", ["3", "4"])
        waiters.ended(End("1", "completed"))
        assert [end.id for end in await waiters.park("a", 0)] == ["1"]
        assert [end.id for end in await waiters.park("b", 0)] == ["1"]

    asyncio.run(main())


def test_sessions_that_do_not_call_are_forgotten():
    clock = testing.ManualClock()
    waiters = Waiters(clock, max_sessions=1, max_watched=3)
    waiters.watch("a", ["1"])
    clock.advance(301)
    waiters.sweep()
    assert not waiters.is_watched("1")
    waiters.watch("b", ["1"])


def test_a_newer_call_answers_the_older_one():
    async def main():
        waiters = Waiters(testing.ManualClock(), max_sessions=9, max_watched=9)
        waiters.watch("a", ["1"])
        older = asyncio.ensure_future(waiters.park("a", 100))
        await asyncio.sleep(0)
        newer = asyncio.ensure_future(waiters.park("a", 100))
        assert await older == []
        waiters.ended(End("1", "failed"))
        waiters.wake()
        assert [end.status for end in await newer] == ["failed"]

    asyncio.run(main())


def test_the_broker_forgets_the_job_that_was_silent_longest_and_limits_its_watchers():
    async def main():
        clock = testing.ManualClock()
        broker = Broker(EngineSettings(max_tracked=3, max_watchers=1), clock, "e1")
        await broker.push([(str(n), Progress(1, 0.1)) for n in range(5)])
        assert [job_id for job_id, _ in await broker.latest(list("01234"))] == ["2", "3", "4"]
        assert broker.n_forgotten == 2
        assert (await broker.poll("a", None, ["4"], [], 0)).states == [("4", Progress(1, 0.1))]
        with pytest.raises(koan.LimitExceededError, match=r"engine\.max_watchers"):
            await broker.poll("b", None, ["4"], [], 0)
        with pytest.raises(koan.LimitExceededError, match=r"engine\.max_tracked"):
            await broker.poll("a", "e1", ["1", "2", "3"], [], 0)
        clock.advance(61)
        assert (await broker.poll("b", None, ["4"], [], 0)).epoch == "e1"

    asyncio.run(main())


def test_the_broker_keeps_only_the_newest_state_and_answers_another_epoch_at_once():
    async def main():
        broker = Broker(EngineSettings(), testing.ManualClock(), "e2")
        assert await broker.poll("a", "e1", [], [], 100) == ("e2", [])
        parked = asyncio.ensure_future(broker.poll("a", "e2", ["1"], [], 100))
        await asyncio.sleep(0)
        await broker.push([("1", Progress(2, 0.2)), ("1", Progress(3, 0.3)), ("1", Progress(1, 0.1))])
        assert (await parked).states == [("1", Progress(3, 0.3))]
        assert (await broker.poll("a", "e2", [], ["1"], 0)).states == []
        await broker.push([("1", Progress(4, 0.4))])
        assert (await broker.poll("a", "e2", [], [], 0)).states == []

    asyncio.run(main())


def test_bodies_that_wait_for_other_jobs_are_limited_in_each_actor(local_engine_with_one_place):
    class Waits(koan.Job[int, int]):
        retry = koan.RetryPolicy(max_attempts=1)

        async def execute(self, context, progress, cancellation) -> int:
            if context == 0:
                return 0
            return 1 + await (await self.start_child(Waits, context - 1).run()).wait()

    assert Waits.start(2).run().get().wait(timeout=20).get() == 2
    with pytest.raises(koan.JobFailedError, match=r"."):
        Waits.start(8).run().get().wait(timeout=20).get()
    told = [job.last_error for job in koan.Jobs.query(kind="Waits", status="failed").get()]
    assert any("engine.max_parked" in (error or "") for error in told)


@pytest.fixture
def local_engine_with_one_place():
    with koan.init(runtime="local", engine={"max_actors": 1, "max_parked": 3}) as engine:
        yield engine
