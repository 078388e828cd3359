"""Random histories: submits, cancels, retries, trees, with actors that die at every step. The seed is in the test id."""

from __future__ import annotations

import asyncio
from collections import Counter
from itertools import pairwise
from random import Random

import pytest

import koan_ray as koan
from koan_ray import testing
from koan_ray.domain.status import ExecutionStatus

MAX_ATTEMPTS, MAX_CRASHES = 3, 4


class Work(koan.Job[dict, int]):
    retry = koan.RetryPolicy(max_attempts=MAX_ATTEMPTS, initial_delay=1, max_delay=4)

    async def execute(self, context, progress, cancellation) -> int:
        await asyncio.sleep(context["takes"])
        progress.report(0.5)
        total = 1
        if context["children"]:
            half = {**context, "children": context["children"] - 1}
            children = [await self.start_child(Work, half, key=str(n)).run() for n in range(2)]
            results = await asyncio.gather(*[child.wait() for child in children], return_exceptions=True)
            total += sum(result for result in results if isinstance(result, int))
        if context["fails"] and self.last_error is None:
            raise ValueError("first attempt")
        if context["later"] and self.last_error is None and len(await self.executions()) == 1:
            raise koan.Reschedule(after=3)
        return total


class Quick(koan.Job[int, int]):
    retry = koan.RetryPolicy(max_attempts=MAX_ATTEMPTS, initial_delay=1)

    def execute(self, context, progress, cancellation) -> int:
        return context


class Shared(Work):
    concurrency = 3
    timeout = 20.0


async def history(seed: int) -> None:
    random = Random(seed)
    faults = testing.Faults(
        die_at_begin=random.choice([0, 0.05]), die_at_end=random.choice([0, 0.05]), fail_start=random.choice([0, 0.1]),
        max_delay_s=random.choice([0, 0.01, 0.3]), limit=random.choice([3, 20]),
    )  # fmt: skip
    settings = {"max_actors": random.choice([1, 2, 4]), "max_crashes": MAX_CRASHES, "cancel_grace_s": 1.0}
    async with testing.engine(faults=faults, seed=seed, **settings) as engine:
        jobs = []
        for _ in range(random.randrange(5, 25)):
            kind = random.choice([Work, Work, Shared, Quick])
            work = {
                "takes": random.choice([0, 0.001, 0.5, 5]), "children": random.choice([0, 0, 1, 2]),
                "fails": random.random() < 0.3, "later": random.random() < 0.2,
            }  # fmt: skip
            builder = kind.start(1 if kind is Quick else work)
            jobs.append(await (builder.delayed(2) if random.random() < 0.2 else builder).run())
            if random.random() < 0.3:
                await random.choice(jobs).cancel("by chance")
            await asyncio.sleep(random.choice([0, 0.01, 1]))
        for job in jobs:
            await asyncio.wait_for(asyncio.gather(job.wait(), return_exceptions=True), timeout=3600)
        await asyncio.sleep(600)  # whatever children are left
        await check(engine)


async def check(engine: testing.TestEngine) -> None:
    runs = Counter(job_id for job_id, _ in engine.launcher.bodies)
    by_execution = Counter(execution_id for _, execution_id in engine.launcher.bodies)
    assert max(by_execution.values(), default=1) == 1, "an execution was begun twice"
    async for job in koan.Jobs.stream():
        record = await engine.store.get(job.id)
        executions = await engine.store.executions(job.id)
        where = f"{job!r} {record.reason} {[e.reason for e in executions]}"
        assert record.status.is_final, where
        assert all(e.status is not ExecutionStatus.RUNNING for e in executions), where
        assert record.attempts - record.crashes <= MAX_ATTEMPTS, where
        assert record.crashes <= MAX_CRASHES, where
        assert runs[job.id] <= len(executions), where
        if record.status is koan.JobStatus.COMPLETED:
            assert executions[-1].status is ExecutionStatus.SUCCEEDED, where
            assert sum(e.status is ExecutionStatus.SUCCEEDED for e in executions) == 1, where
        spans = sorted((e.started_at, e.completed_at) for e in executions)
        assert all(a[1] <= b[0] + 1e-6 for a, b in pairwise(spans)), f"overlap: {where}"
    coordinator, dispatcher = engine.coordinator, engine.coordinator._dispatcher
    assert not coordinator._live
    assert not coordinator._jobs.children
    assert not coordinator._jobs.lingering.waiting
    assert not dispatcher._active
    assert not any(actor.running or actor.batches for actor in dispatcher._pool)
    assert coordinator._kinds.n_live == 0
    assert not coordinator._waiters._by_job
    assert not coordinator._memory_writer._dirty


@pytest.mark.parametrize("seed", range(150))
def test_every_accepted_job_ends_exactly_once_whatever_dies(seed):
    testing.run(history(seed))
