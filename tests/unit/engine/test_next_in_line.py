"""A chunk that waits in a full actor for its turn keeps no place from jobs with other needs."""

from __future__ import annotations

import asyncio

import koan_ray as koan
from koan_ray import testing
from koan_ray.domain.records import ActorSpec
from koan_ray.engine.pool import Active, Actor, ActorState, Pool


class Long(koan.FiniteJob[int, int, int]):
    items = koan.ItemOptions(concurrency=1, chunk_size=1)

    def get_items(self, context):
        return range(context)

    async def process_item(self, item, index, progress):
        await asyncio.sleep(100)
        return koan.ItemResult.success()

    def build_result(self, summary):
        return summary.processed_items


class Other(koan.Job[int, int]):
    resources = koan.Resources(num_cpus=0.5)

    async def execute(self, context, progress, cancellation) -> int:
        return context


async def _working(engine):
    """Return the states and bodies of the actors that work on items."""
    status = await engine.coordinator.status()
    return [(each["state"], each["running"], each["parked"]) for each in status["actors"] if each["spec"] == "cpu=1"]


def test_the_actor_of_a_chunk_that_is_next_is_given_to_a_job_with_other_needs():
    """The only actor never is without a chunk that waits in it; if that counted as a parked body, it would be kept."""

    async def scenario():
        async with testing.engine(max_actors=1) as engine:
            jobs = [await Long.start(20).run() for _ in range(2)]  # of one, all chunks that are out would be in the actor
            await asyncio.sleep(5)
            assert await _working(engine) == [("ready", 2, 1)]
            await Other.start(1).run()
            await asyncio.sleep(3)
            assert await _working(engine) == [("retiring", 1, 0)]  # what waited has come back
            for job in jobs:
                await job.cancel()

    testing.run(scenario())


def test_an_actor_whose_next_chunk_is_about_to_begin_does_not_lend_its_cpu():
    """Between the end of one chunk and the word that the next has begun, it would seem to do nothing but wait."""
    spec, another = ActorSpec(), ActorSpec(num_cpus=0.5)
    actor, pool = Actor("one", spec, at=0.0, lent=False), Pool()
    actor.state = ActorState.READY
    pool.add(actor)
    waits = Active.__new__(Active)
    waits.parked, waits.is_next = True, True
    actor.running["next"] = waits
    assert pool.n_counted_for(another) == 1
    waits.is_next = False  # a body that waits for other jobs
    assert pool.n_counted_for(another) == 0
