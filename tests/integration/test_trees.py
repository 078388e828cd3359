"""Parents that wait for children hold no capacity."""

from __future__ import annotations

import asyncio

import pytest

import koan_ray as koan

pytestmark = pytest.mark.ray


class Down(koan.Job[int, int]):
    """A chain of async bodies."""

    async def execute(self, context, progress, cancellation) -> int:
        if context == 0:
            return 0
        return 1 + await (await self.start_child(Down, context - 1).run()).wait()


class DownPlain(koan.Job[int, int]):
    """A chain of plain bodies."""

    def execute(self, context, progress, cancellation) -> int:
        if context == 0:
            return 0
        return 1 + self.start_child(DownPlain, context - 1).run().get().wait().get()


class DownBlocking(koan.Job[int, int]):
    """A chain of async bodies that block their loop."""

    async def execute(self, context, progress, cancellation) -> int:
        if context == 0:
            return 0
        return 1 + self.start_child(DownBlocking, context - 1).run().get().wait().get()


class Leaf(koan.Job[int, int]):
    def execute(self, context, progress, cancellation) -> int:
        return context


class Small(koan.Job[int, int]):
    """Other resources: its actor is none that a parent could run in."""

    resources = koan.Resources(num_cpus=0.5)

    def execute(self, context, progress, cancellation) -> int:
        return context


class FanOut(koan.Job[int, int]):
    async def execute(self, context, progress, cancellation) -> int:
        children = [await self.start_child(Leaf, i).run() for i in range(context)]
        return sum(await asyncio.gather(*[child.wait() for child in children]))


class FanOutSmall(koan.Job[int, int]):
    def execute(self, context, progress, cancellation) -> int:
        children = [self.start_child(Small, i).run().get() for i in range(context)]
        return sum(child.wait().get() for child in children)


class Keyed(koan.Job[int, list]):
    """Fails once after it has started its child."""

    retry = koan.RetryPolicy(max_attempts=2, strategy=koan.RetryStrategy.IMMEDIATE)

    async def execute(self, context, progress, cancellation) -> list:
        child = await self.start_child(Leaf, context, key="only").run()
        await child.wait()
        if self.last_error is None:
            raise ValueError("once")
        return [child.id, len(await self.get_children())]


class Endless(koan.Job[int, None]):
    async def execute(self, context, progress, cancellation) -> None:
        if context:
            await (await self.start_child(Endless, context - 1).run()).wait()
        await asyncio.sleep(600)


@pytest.mark.parametrize("job_type", [Down, DownPlain, DownBlocking])
def test_a_chain_of_twenty_parents_ends_on_two_actors(engine, job_type):
    job = job_type.start(20).run().get(timeout=30)
    assert job.wait(timeout=60).get() == 20
    assert engine.status().get()["counters"]["actors_started"] <= 4


def test_two_hundred_parents_with_five_children_each_end(engine):
    jobs = FanOut.start_many([5] * 200).run().get(timeout=30)
    assert [job.wait(timeout=90).get() for job in jobs] == [10] * 200


def test_children_with_other_resources_run_on_the_place_of_their_waiting_parents(engine):
    jobs = FanOutSmall.start_many([3] * 6).run().get(timeout=30)
    assert [job.wait(timeout=90).get() for job in jobs] == [3] * 6


def test_a_parent_that_runs_again_joins_the_child_of_the_same_key(engine):
    job = Keyed.start(5).run().get(timeout=30)
    child_id, n_children = job.wait(timeout=30).get()
    assert n_children == 1
    child = Leaf.get(child_id).get()
    assert child.get_parent(Keyed).get() == job
    assert len(child.executions().get()) == 1


def test_cancelling_a_parent_cancels_the_tree(engine, eventually):
    job = Endless.start(3).run().get(timeout=30)
    eventually(lambda: koan.Jobs.count(kind="Endless", status="running").get() == 4, within=20)
    job.cancel("tree").get()
    with pytest.raises(koan.JobCancelledError):
        job.wait(timeout=20).get()
    eventually(lambda: koan.Jobs.count(kind="Endless", status="cancelled").get() == 4)
