"""What becomes of jobs when somebody, or NTP, sets the wall clock; and when a laptop sleeps."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

import koan_ray as koan
from koan_ray import testing
from koan_ray.domain import transitions
from koan_ray.domain.lane import DueTimes
from koan_ray.domain.records import ActorSpec, ErrorInfo, JobRecord, Particulars, Terms
from koan_ray.domain.retry import RetryPolicy
from koan_ray.domain.status import FailureKind, JobStatus
from koan_ray.ports import Change
from koan_ray.stores.memory import MemoryStore

HOUR = 3600.0
began: list[str] = []
clock_of_the_test: list[testing.ManualClock] = []


class Notes(koan.Job[str, str]):
    """Notes that it was begun."""

    async def execute(self, context, progress, cancellation) -> str:
        began.append(context)
        return context


class FailsOnce(koan.Job[str, str]):
    retry = koan.RetryPolicy(max_attempts=2, initial_delay=2, jitter=0)

    async def execute(self, context, progress, cancellation) -> str:
        began.append(context)
        if began.count(context) == 1:
            raise ValueError("the first time")
        return context


class ComesLater(koan.Job[str, str]):
    async def execute(self, context, progress, cancellation) -> str:
        began.append(context)
        if began.count(context) == 1:
            raise koan.Reschedule(after=2)
        return context


class SetsTheClock(koan.Job[float, str]):
    """Takes 5 s, in the middle of which the wall clock jumps by its context."""

    async def execute(self, context, progress, cancellation) -> str:
        clock = clock_of_the_test[0]
        progress.report(0.5)
        clock.advance(2)
        clock.jump(context)
        clock.advance(3)
        told = progress.estimated_completion.timestamp() - clock.now()
        return f"{told:.0f}"


@pytest.fixture(autouse=True)
def _nothing_began():
    began.clear()


def with_clock(scenario):
    """Run a scenario with an engine whose time is a `ManualClock`."""

    async def main():
        clock = testing.ManualClock()
        clock_of_the_test[:] = [clock]
        async with testing.engine(clock=clock, max_actors=2) as engine:
            await engine.drain()

            async def passes(seconds: float) -> None:
                """Let time pass, a quarter of a second at a time, with all that happens meanwhile."""
                for _ in range(int(seconds * 4)):
                    clock.advance(0.25)
                    await engine.drain()

            await scenario(clock, passes)

    asyncio.run(main())


def test_what_is_overdue_after_a_jump_forward_starts_within_a_second():
    async def scenario(clock, passes):
        await Notes.start("in half an hour").delayed(HOUR / 2).run()
        await Notes.start("in two hours").delayed(2 * HOUR).run()
        await passes(2)
        assert began == []
        clock.jump(HOUR)  # also what the end of a laptop's sleep looks like
        await passes(1.25)
        assert began == ["in half an hour"]
        clock.jump(HOUR)
        await passes(1.25)
        assert began == ["in half an hour", "in two hours"]

    with_clock(scenario)


@pytest.mark.parametrize("job_type", [FailsOnce, ComesLater], ids=["a retry", "a reschedule"])
def test_two_seconds_are_two_seconds_when_the_clock_was_set_back(job_type):
    async def scenario(clock, passes):
        await job_type.start("x").run()
        await passes(0.5)
        assert began == ["x"]
        clock.jump(-HOUR)
        await passes(1)
        assert began == ["x"]
        await passes(1)
        assert began == ["x", "x"]

    with_clock(scenario)


def test_a_delay_is_as_long_as_it_was_when_the_clock_is_set_back_and_right_again():
    async def scenario(clock, passes):
        await Notes.start("in ten seconds").delayed(10).run()
        await passes(4)
        clock.jump(-HOUR)
        await passes(4)
        await Notes.start("submitted meanwhile").delayed(3).run()
        clock.jump(HOUR)
        await passes(1.25)
        assert began == ["submitted meanwhile"]  # due an hour ago, by the clock that is right now
        await passes(1)
        assert began == ["submitted meanwhile", "in ten seconds"]

    with_clock(scenario)


def test_a_jump_forward_and_back_again_within_a_moment_starts_nothing_early():
    async def scenario(clock, passes):
        await Notes.start("in ten seconds").delayed(10).run()
        await passes(1)
        clock.jump(HOUR)
        clock.jump(-HOUR)
        await passes(8)
        assert began == []
        await passes(1.25)
        assert began == ["in ten seconds"]

    with_clock(scenario)


@pytest.mark.parametrize("jump_s", [-HOUR, 0.0, HOUR])
def test_durations_are_measured_and_instants_keep_their_order(jump_s):
    async def scenario(clock, passes):
        job = await SetsTheClock.start(jump_s).run()
        await passes(1)
        await job.refresh()
        assert job.status is koan.JobStatus.COMPLETED
        assert job.result == "5"  # half is done in five seconds: the other half takes five more
        (execution,) = await job.executions()
        assert execution.duration == timedelta(seconds=5)
        assert timedelta(seconds=5) <= job.duration - timedelta(seconds=max(0.0, jump_s)) <= timedelta(seconds=5.25)
        assert job.created_at <= job.queued_at <= job.started_at <= job.completed_at

    with_clock(scenario)


@pytest.mark.parametrize("jump_s", [-HOUR, HOUR])
def test_a_job_that_waits_for_its_turn_while_the_clock_is_set_keeps_the_order_of_its_instants(jump_s):
    async def scenario(clock, passes):
        job = await Notes.start("x").delayed(2).run()
        clock.jump(jump_s)
        await passes(2)
        await job.refresh()
        assert job.status is koan.JobStatus.COMPLETED
        assert job.created_at <= job.queued_at <= job.started_at <= job.completed_at
        (execution,) = await job.executions()
        assert execution.duration >= timedelta()

    with_clock(scenario)


def test_what_is_kept_in_memory_is_not_forgotten_before_its_time():
    async def scenario(clock, passes):
        before = await Notes.start("before").run()
        await passes(1)
        clock.jump(30 * 24 * HOUR)
        await passes(15)
        assert (await koan.Jobs.get(before.id)).status is koan.JobStatus.COMPLETED
        clock.jump(-60 * 24 * HOUR)
        after = await Notes.start("after").run()
        await passes(1)
        clock.advance(HOUR)
        await passes(15)
        for job in (before, after):
            with pytest.raises(koan.JobNotFoundError):
                await koan.Jobs.get(job.id)

    with_clock(scenario)


def test_a_wait_times_out_by_its_own_clock_and_leases_and_actors_do_not_notice():
    async def scenario(clock, passes):
        job = await Notes.start("later").delayed(60).run()
        status = await koan.ambient.engine().ask("status")
        n_actors = len(status["actors"])
        clock.jump(-HOUR)
        await passes(5)
        status = await koan.ambient.engine().ask("status")
        assert (len(status["actors"]), status["counters"]["actors_killed"]) == (n_actors, 0)
        assert (await job.refresh()).status is koan.JobStatus.QUEUED

    with_clock(scenario)


# --- after a restart, when only the document knows ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("jump_s", "at_once", "after_3_s"),
    [(0.0, [], ["x"]), (-HOUR, [], ["x"]), (HOUR, ["x"], ["x"])],
    ids=["right", "set back", "set forward"],
)
def test_after_a_restart_no_wait_takes_longer_than_it_was_to_take_in_all(jump_s, at_once, after_3_s):
    async def main():
        clock, database = testing.ManualClock(), testing.MemoryDatabase()
        sources = {"default": lambda: testing.MemoryDocumentStore(database, source="default")}
        async with testing.engine(clock=clock, sources=sources) as engine:
            submitting = asyncio.ensure_future(_started(Notes.start("x").delayed(3).persist()))
            await engine.drain()
            await submitting
            engine.crash()
            clock.jump(jump_s)
            restarting = asyncio.ensure_future(engine.restart())
            while not restarting.done():
                clock.advance(0.05)
                await engine.drain()
            clock.advance(0.25)
            await engine.drain()
            assert began == at_once
            for _ in range(13):
                clock.advance(0.25)
                await engine.drain()
            assert began == after_3_s

    asyncio.run(main())


async def _started(builder):
    return await builder.run()


# --- the parts -----------------------------------------------------------------------------------------------------------


def record(**changes) -> JobRecord:
    terms = Terms("t", "Kind", "code", RetryPolicy(), None, ActorSpec())
    return JobRecord("1", terms, Particulars(), b"null", 100.0, JobStatus.QUEUED, queued_at=101.0).evolve(**changes)


def test_instants_of_a_job_never_go_back_whatever_clock_writes_them():
    running = transitions.dispatched(record(), "e", at=50.0)
    assert running.started_at == 101.0
    ends = [
        transitions.completed(running, b"1", at=60.0),
        transitions.failed(running, FailureKind.EXHAUSTED, ErrorInfo("E", ""), at=60.0),
        transitions.cancelled(running, at=60.0),
        transitions.cancelled(record(), at=60.0),
    ]
    assert [job.completed_at for job in ends] == [101.0] * 4
    assert transitions.queued(record(status=JobStatus.CREATED), at=60.0).queued_at == 100.0


def test_waits_that_are_over_leave_nothing_behind():
    due, waiting = DueTimes(), {str(n): float(n) for n in range(5000)}
    for name, at in waiting.items():
        due.push(at, name, ends_at=at)

    def taken(now, monotonic):
        names = []
        for name in due.take_due(now, monotonic, lambda at, name: waiting.get(name) == at):
            del waiting[name]
            names.append(name)
        return names

    assert len(taken(2999.0, 0.0)) == 3000  # the wall was set forward
    assert len(due) == 2000
    assert len(due._by_span) <= 2 * 2000
    assert len(taken(0.0, 3999.0)) == 1000  # and back
    assert len(due) == 1000
    assert due.next_in(0.0, 3990.0) == 10.0
    assert len(taken(9999.0, 9999.0)) == 1000
    assert (len(due), due._by_wall, due.next_in(0.0, 0.0)) == (0, [], None)
    assert len(due._by_span) <= 1000


def test_a_store_with_a_clock_of_its_own_counts_retention_by_it():
    async def main():
        monotonic = [0.0]
        store = MemoryStore(completed_retention_s=60, monotonic=lambda: monotonic[0])
        job = record(status=JobStatus.COMPLETED, rev=1, completed_at=1e9)
        await store.apply([Change(job, 0)])
        assert await store.expire(2e9) == 0
        monotonic[0] = 60.0
        assert await store.expire(0.0) == 1

    asyncio.run(main())
