"""The life of jobs in virtual time."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from datetime import timedelta
from functools import wraps
from itertools import pairwise

import pytest

import koan_ray as koan
from koan_ray import testing
from koan_ray.domain.ids import new_id


def scenario(**settings):
    """Run a test in virtual time, with an engine if it takes one."""

    def decorate(test):
        @wraps(test)
        def run():
            async def main():
                async with testing.engine(**{"max_actors": 2, **settings}) as engine:
                    await test(*([engine] if inspect.signature(test).parameters else []))

            testing.run(main())

        run.__signature__ = inspect.Signature()
        return run

    return decorate


class Flaky(koan.Job[int, str]):
    """Fails as often as its context says."""

    retry = koan.RetryPolicy(max_attempts=3, initial_delay=10, jitter=0)

    async def execute(self, context, progress, cancellation) -> str:
        failed = len(await self.executions()) - 1
        if failed < context:
            raise ValueError(f"failure {failed + 1}")
        return "ok"


class Fails(koan.Job[None, None]):
    retry = koan.RetryPolicy(max_attempts=2, initial_delay=1)

    async def execute(self, context, progress, cancellation) -> None:
        raise ValueError("always")


class Sleeps(koan.Job[float, str]):
    async def execute(self, context, progress, cancellation) -> str:
        await asyncio.sleep(context)
        return "slept"


class Adds(koan.Job[int, int]):
    def execute(self, context, progress, cancellation) -> int:
        return context + 1


async def reasons(job) -> list[str]:
    return [execution.reason for execution in await job.executions()]


@scenario()
async def test_the_third_failure_of_three_fails_the_job():
    job = await Flaky.start(9).run()
    with pytest.raises(koan.JobFailedError, match=r"exhausted.*3 attempts.*failure 3") as caught:
        await job.wait()
    assert caught.value.failure == "exhausted"
    assert await reasons(job) == ["retry", "retry", "failed"]
    first, second, third = await job.executions()
    assert (second.started_at - first.completed_at) == timedelta(seconds=10)
    assert (third.started_at - second.completed_at) == timedelta(seconds=20)
    assert first.error_type == "ValueError"
    assert "failure 1" in first.stack_trace


@scenario()
async def test_a_job_that_fails_once_completes_and_forgets_the_error():
    job = await Flaky.start(1).run()
    assert await job.wait() == "ok"
    assert (job.status, job.last_error, job.progress) == (koan.JobStatus.COMPLETED, None, 1.0)
    assert await reasons(job) == ["retry", "succeeded"]


@pytest.mark.parametrize(
    ("strategy", "waits"),
    [
        (koan.RetryStrategy.IMMEDIATE, [0, 0]),
        (koan.RetryStrategy.FIXED_DELAY, [4, 4]),
        (koan.RetryStrategy.LINEAR_BACKOFF, [4, 8]),
        (koan.RetryStrategy.EXPONENTIAL_BACKOFF, [4, 12]),
        (koan.RetryStrategy.NONE, []),
    ],
)
def test_each_strategy_waits_as_it_says(strategy, waits):
    policy = koan.RetryPolicy(max_attempts=3, strategy=strategy, initial_delay=4, backoff_multiplier=3, jitter=0)

    async def main():
        async with testing.engine(max_actors=1):
            recipe = koan.Jobs.recipe().use_policy(retry=policy).build(Flaky)
            job = await recipe.start(9).run()
            with pytest.raises(koan.JobFailedError):
                await job.wait()
            executions = await job.executions()
            between = [b.started_at - a.completed_at for a, b in pairwise(executions)]
            assert [round(wait.total_seconds()) for wait in between] == waits

    testing.run(main())


@scenario()
async def test_a_custom_policy_sees_the_live_exception_and_decides():
    class Judges(koan.Job[str, None]):
        retry = koan.RetryPolicy(max_attempts=3, initial_delay=100)

        async def execute(self, context, progress, cancellation) -> None:
            raise KeyError(context) if context == "fatal" else TimeoutError(context)

        def should_retry(self, last_execution) -> bool:
            assert last_execution.attempt_number >= 1
            return isinstance(last_execution.exception, TimeoutError)

        def get_retry_delay(self, last_execution):
            return timedelta(seconds=7) if last_execution.attempt_number == 1 else None

    fatal, other = await Judges.start("fatal").run(), await Judges.start("later").run()
    with pytest.raises(koan.JobFailedError) as caught:
        await fatal.wait()
    assert (caught.value.attempts, caught.value.failure) == (1, "non_retryable")
    with pytest.raises(koan.JobFailedError) as caught:
        await other.wait()
    assert caught.value.attempts == 3
    first, second, third = await other.executions()
    assert (second.started_at - first.completed_at) == timedelta(seconds=7)
    assert (third.started_at - second.completed_at) >= timedelta(seconds=200)


@scenario()
async def test_a_policy_that_raises_leaves_the_decision_to_max_attempts():
    class Broken(koan.Job[None, None]):
        retry = koan.RetryPolicy(max_attempts=2, initial_delay=1)

        async def execute(self, context, progress, cancellation) -> None:
            raise ValueError("body")

        def should_retry(self, last_execution) -> bool:
            raise RuntimeError("policy")

    job = await Broken.start().run()
    with pytest.raises(koan.JobFailedError, match="ValueError: body"):
        await job.wait()
    assert await reasons(job) == ["retry", "failed"]


@scenario()
async def test_non_retryable_fails_at_once_with_the_error_inside():
    @koan.job
    async def fails(x: int) -> None:
        raise koan.NonRetryable(PermissionError("never"))

    job = await fails.start(1).run()
    with pytest.raises(koan.JobFailedError, match=r"non_retryable.*PermissionError: never"):
        await job.wait()


@scenario()
async def test_a_rescheduled_job_runs_later_and_uses_no_attempt():
    class Later(koan.Job[None, int]):
        retry = koan.RetryPolicy(max_attempts=1)

        async def execute(self, context, progress, cancellation) -> int:
            n = len(await self.executions())
            if n < 4:
                raise koan.Reschedule(after=timedelta(minutes=5))
            return n

    job = await Later.start().run()
    assert await job.wait() == 4
    assert await reasons(job) == ["rescheduled"] * 3 + ["succeeded"]
    assert job.duration >= timedelta(minutes=15)


@scenario()
async def test_a_delayed_job_begins_no_sooner():
    job = await Adds.start(1).delayed(90).run()
    await asyncio.sleep(89)
    assert (await job.refresh()).status is koan.JobStatus.QUEUED
    assert await job.wait() == 2
    assert job.started_at - job.queued_at >= timedelta(seconds=90)


@scenario()
async def test_an_attempt_that_takes_too_long_ends_as_timeout():
    recipe = koan.Jobs.recipe().use_policy(timeout=5, retry=koan.RetryPolicy(max_attempts=2, initial_delay=1)).build(Sleeps)
    job = await recipe.start(60.0).run()
    with pytest.raises(koan.JobFailedError) as caught:
        await job.wait()
    assert caught.value.failure == "timeout"
    assert await reasons(job) == ["timeout", "timeout"]
    assert 5 <= (await job.executions())[0].duration.total_seconds() < 6


@scenario(cancel_grace_s=3.0)
async def test_a_body_that_swallows_its_cancellation_is_killed_after_the_grace_period(engine):
    class Stubborn(koan.Job[None, None]):
        async def execute(self, context, progress, cancellation) -> None:
            for _ in range(2):  # the request, and the simulated kill; a real one leaves no choice
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(3600)
            await asyncio.sleep(3600)

    job = await Stubborn.start().run()
    await asyncio.sleep(1)
    began = engine.clock.monotonic()
    assert await job.cancel("enough") is koan.JobStatus.RUNNING
    with pytest.raises(koan.JobCancelledError, match="enough"):
        await job.wait()
    assert 3.0 <= engine.clock.monotonic() - began < 4.0
    assert (await job.executions())[0].metrics["stopped_by"] == "kill"


@scenario(max_actors=1)
async def test_a_queued_job_is_cancelled_at_once_and_never_begins(engine):
    busy = await Sleeps.start(50.0).run()
    queued = await Sleeps.start(1.0).run()
    assert await queued.cancel() is koan.JobStatus.CANCELLED
    assert await queued.cancel() is koan.JobStatus.CANCELLED
    with pytest.raises(koan.JobCancelledError):
        await queued.wait()
    assert await busy.wait() == "slept"
    assert [job_id for job_id, _ in engine.launcher.bodies] == [busy.id]
    assert await queued.executions() == []


@scenario()
async def test_a_success_that_finds_a_cancel_request_stays_a_success():
    class Finishes(koan.Job[None, str]):
        async def execute(self, context, progress, cancellation) -> str:
            await cancellation.wait()
            return "done anyway"

    job = await Finishes.start().run()
    await asyncio.sleep(1)
    await job.cancel()
    assert await job.wait() == "done anyway"
    assert job.status is koan.JobStatus.COMPLETED


class Tree(koan.Job[int, int]):
    async def execute(self, context, progress, cancellation) -> int:
        if context == 0:
            await asyncio.sleep(5)
            return 1
        children = [await self.start_child(Tree, context - 1).run() for _ in range(2)]
        return sum(await asyncio.gather(*[child.wait() for child in children]))


@scenario(max_actors=1)
async def test_a_tree_finishes_on_a_single_actor():
    assert await (await Tree.start(4).run()).wait() == 16


@scenario()
async def test_cancelling_a_parent_cancels_everything_below_it():
    job = await Tree.start(3).run()
    await asyncio.sleep(2)
    await job.cancel("tree")
    with pytest.raises(koan.JobCancelledError):
        await job.wait()
    await asyncio.sleep(10)
    assert await koan.Jobs.count(status=["queued", "running"]) == 0
    assert await koan.Jobs.count(status="cancelled") >= 4


@scenario()
async def test_children_end_with_their_parent_unless_they_are_abandoned():
    class Stays(Sleeps):
        when_parent_ends = koan.ParentPolicy.ABANDON

    class Parent(koan.Job[None, list]):
        async def execute(self, context, progress, cancellation) -> list:
            return [(await self.start_child(kind, 100.0).run()).id for kind in (Sleeps, Stays)]

    bound, free = await (await Parent.start().run()).wait()
    with pytest.raises(koan.JobCancelledError, match="parent"):
        await (await koan.Jobs.get(bound)).wait()
    assert await (await koan.Jobs.get(free)).wait() == "slept"


@scenario()
async def test_a_child_key_names_one_child_over_all_attempts():
    class Parent(koan.Job[None, str]):
        retry = koan.RetryPolicy(max_attempts=2, initial_delay=1)

        async def execute(self, context, progress, cancellation) -> str:
            child = await self.start_child(Adds, 1, key="a").run()
            await child.wait()
            if self.last_error is None:
                raise ValueError("again")
            return child.id

    job = await Parent.start().run()
    child_id = await job.wait()
    assert [child.id for child in await job.get_children(Adds)] == [child_id]
    with pytest.raises(koan.JobIdConflictError):
        await Adds.start(2).child_of(job, key="a").run()


@scenario(max_depth=3)
async def test_a_tree_that_is_too_deep_is_refused():
    class Deep(koan.Job[None, None]):
        retry = koan.RetryPolicy(max_attempts=1)

        async def execute(self, context, progress, cancellation) -> None:
            await (await self.start_child(Deep).run()).wait()

    with pytest.raises(koan.JobFailedError):
        await (await Deep.start().run()).wait()
    failed = await koan.Jobs.query(status="failed", kind="Deep", order_by="created_at")
    assert "engine.max_depth" in failed[-1].last_error


@scenario(max_queued=10)
async def test_the_queue_has_a_limit_and_refuses_above_it():
    await Sleeps.start_many([9.0] * 10).run()
    with pytest.raises(koan.LimitExceededError, match=r"11 exceeds the limit of 10.*engine\.max_queued"):
        await Sleeps.start(1.0).run()
    await asyncio.sleep(60)
    assert await (await Adds.start(1).run()).wait() == 2


@scenario()
async def test_a_failed_job_can_be_run_again_and_a_completed_one_cannot():
    job = await Flaky.start(9).run()
    with pytest.raises(koan.JobFailedError):
        await job.wait()
    again = await koan.Jobs.retry(job.id)
    assert again.id != job.id
    assert again.context == 9
    with pytest.raises(koan.JobFailedError):
        await again.wait()
    done = await Adds.start(1).run()
    await done.wait()
    with pytest.raises(koan.ConflictError, match="only a failed or cancelled job"):
        await koan.Jobs.retry(done.id)


@scenario()
async def test_a_removed_job_is_gone_and_waiting_for_it_says_so():
    job = await Adds.start(1).run()
    await job.wait()
    await job.remove()
    for operation in (job.wait, job.refresh, job.executions):
        with pytest.raises(koan.JobNotFoundError):
            await operation()
    running = await Sleeps.start(5.0).run()
    with pytest.raises(koan.ConflictError, match="cancel it and wait"):
        await running.remove()


@scenario()
async def test_finished_jobs_expire(engine):
    job = await Adds.start(1).run()
    await job.wait()
    await asyncio.sleep(3590)
    assert (await job.refresh()).status is koan.JobStatus.COMPLETED
    await asyncio.sleep(30)
    with pytest.raises(koan.JobNotFoundError, match="expired"):
        await job.refresh()


@scenario()
async def test_jobs_are_found_by_page_and_by_stream():
    jobs = await Adds.start_many(range(25)).with_metadata(batch=1).run()
    assert [await job.wait() for job in jobs] == list(range(1, 26))
    await (await Adds.start(99).run()).wait()
    page = await koan.Jobs.query(metadata={"batch": 1}, limit=10, order_by="created_at")
    rest = await koan.Jobs.query(metadata={"batch": 1}, limit=20, order_by="created_at", cursor=page.cursor)
    assert [job.context for job in [*page, *rest]] == list(range(25))
    assert rest.cursor is None
    assert sorted([job.context async for job in Adds.stream(limit=7)]) == [*range(25), 99]
    assert await Adds.count(status="completed") == 26
    with pytest.raises(koan.JobNotFoundError, match="is of kind 'Adds', not 'Sleeps'"):
        await Sleeps.get(jobs[0].id)


@scenario()
async def test_progress_arrives_in_order_and_ends_with_the_final_status():
    class Reports(koan.Job[int, None]):
        async def execute(self, context, progress, cancellation) -> None:
            for n in range(context):
                await asyncio.sleep(1)
                progress.report(n + 1, context, f"step {n + 1}")

    job = await Reports.start(5).run()
    await asyncio.sleep(2.5)
    updates = [update async for update in job.progress_stream()]
    assert updates[0].current_step == 2
    assert [u.sequence for u in updates] == sorted({u.sequence for u in updates})
    assert (updates[-1].status, updates[-1].percentage) == (koan.JobStatus.COMPLETED, 1.0)
    assert all(u.estimated_completion is not None for u in updates[:-2])
    late = [update async for update in job.progress_stream()]
    assert [u.status for u in late] == [koan.JobStatus.COMPLETED]


@scenario(max_crashes=3)
async def test_a_job_whose_actors_die_is_poison_after_max_crashes_and_failures_are_counted_apart(engine):
    engine.faults.die_at_begin, engine.faults.limit = 1.0, 2
    job = await Fails.start().run()
    with pytest.raises(koan.JobFailedError) as caught:
        await job.wait()
    assert caught.value.failure == "exhausted"
    assert await reasons(job) == ["lost", "lost", "retry", "failed"]
    engine.faults.limit = 10**6
    poison = await Adds.start(1).run()
    with pytest.raises(koan.JobFailedError) as caught:
        await poison.wait()
    assert caught.value.failure == "poison"
    assert await reasons(poison) == ["lost"] * 3


@scenario()
async def test_jobs_for_which_no_actor_can_be_started_fail_with_the_reason(engine):
    engine.faults.fail_start = 1.0
    job = await Adds.start(1).run()
    with pytest.raises(koan.JobFailedError, match="could be started"):
        await job.wait()
    engine.faults.fail_start = 0.0
    assert await (await Adds.start(1).run()).wait() == 2


@scenario()
async def test_the_same_submission_twice_is_one_job_and_another_context_is_a_conflict(engine):
    from koan_ray.engine.messages import Row, Submission

    await (await Adds.start(1).run()).wait()
    terms = next(iter(engine.session._terms.values()))
    job_id = new_id()

    async def submit(context: bytes):
        row = Row(job_id, 0, 0, context, engine.clock.now())
        about = [koan_ray_particulars()]
        return await engine.coordinator.submit(Submission([terms.id], about, [row], [], {}))

    assert (await submit(b"5")).refused == {}
    assert (await submit(b"5")).refused == {}
    assert isinstance((await submit(b"6")).refused[0], koan.JobIdConflictError)
    assert await (await Adds.get(job_id)).wait() == 6


def koan_ray_particulars():
    from koan_ray.domain.records import Particulars

    return Particulars()


@scenario()
async def test_a_session_of_another_epoch_is_told_that_its_jobs_are_lost(engine):
    job = await Sleeps.start(100.0).run()
    waiting = job.wait()
    await asyncio.sleep(1)
    engine.coordinator.epoch = "another"
    engine.coordinator._live.clear()
    engine.store._jobs.clear()
    with pytest.raises(koan.JobLostError):
        await waiting


@scenario(max_actors=1)
async def test_a_lane_without_an_actor_gets_one_from_a_busy_lane():
    class Small(Adds):
        resources = koan.Resources(num_cpus=0.5)

    many = await Sleeps.start_many([0.5] * 40).run()
    await asyncio.sleep(0.2)
    small = await Small.start(1).run()
    assert await small.wait() == 2
    assert (await many[-1].refresh()).status is not koan.JobStatus.COMPLETED
    assert [await job.wait() for job in many] == ["slept"] * 40


@scenario()
async def test_short_jobs_travel_together_and_long_ones_do_not_hold_them_up(engine):
    jobs = await Adds.start_many(range(200)).run()
    assert [await job.wait() for job in jobs] == list(range(1, 201))
    counters = (await engine.coordinator.status())["counters"]
    assert counters["dispatched"] >= 200
    assert counters["actors_started"] <= 2


def test_with_a_manual_clock_time_stands_still_until_it_is_advanced():
    async def main():
        clock = testing.ManualClock()
        async with testing.engine(clock=clock, max_actors=1) as engine:
            job = await Flaky.start(2).run()
            await engine.drain()
            assert (await job.refresh()).status is koan.JobStatus.QUEUED
            began = clock.monotonic()
            await engine.drain(advance=clock)
            assert (await job.refresh()).status is koan.JobStatus.COMPLETED
            assert 30 <= clock.monotonic() - began < 32

    asyncio.run(main())
