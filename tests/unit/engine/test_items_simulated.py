"""Jobs over items on simulated actors in virtual time: actors, leads and coordinators die, and the counts add up."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

import koan_ray as koan
from koan_ray import testing
from koan_ray.testing.simulation import Faults

N = 300


class Counted(koan.FiniteJob[int, dict, int]):
    """Every seventh item fails, every eleventh is skipped; some need a second attempt."""

    retry = koan.RetryPolicy(max_attempts=50, initial_delay=0.1, max_delay=0.2)
    items = koan.ItemOptions(retry=koan.RetryPolicy(max_attempts=2, initial_delay=0.2), checkpoint_every=0.05, chunk_size=9)
    runs: Counter

    def get_items(self, context):
        yield from range(context)

    async def process_item(self, item, index, progress):
        assert item == index
        type(self).runs[item] += 1
        await asyncio.sleep(0.01)
        if item % 7 == 3:
            raise ValueError(f"no {item}")
        if item % 5 == 4 and type(self).runs[item] == 1:
            raise ConnectionError("again")
        return koan.ItemResult.skipped() if item % 11 == 5 else koan.ItemResult.success(item)

    def build_result(self, summary) -> dict:
        values = list(summary.values)
        assert len(values) == len(set(values)) == summary.processed_items
        counts = summary.processed_items, summary.failed_items, summary.skipped_items
        assert sum(counts) == summary.total_items
        return {"counts": counts, "values": sorted(values)}


async def _checked(job, *, may_lose):
    result = await job.wait()
    failed = {i for i in range(N) if i % 7 == 3}
    dead = await job.failed_items()
    places = [item.index for item in dead]
    assert len(places) == len(set(places)) == result["counts"][1]
    lost = {item.index for item in dead if item.error_type == "ProcessLost"}
    assert failed - lost == set(places) - lost
    assert may_lose or not lost
    assert result["values"] == [i for i in range(N) if i % 7 != 3 and i % 11 != 5 and i not in lost]
    assert sum(result["counts"]) == N


@pytest.mark.parametrize("seed", range(12))
def test_actors_and_leads_that_die_cost_no_item(seed):
    async def scenario():
        faults = Faults(die_at_begin=0.04, die_at_end=0.06, max_delay_s=0.01, limit=25)
        async with testing.engine(max_actors=3, max_crashes=1000, faults=faults, seed=seed) as engine:
            job = await Counted.start(N).run()
            await _checked(job, may_lose=True)
            assert engine.faults.n_fired
            status = await engine.coordinator.status()
            assert status["live"] == 0
            assert await koan.Jobs.count() == 1

    Counted.runs = Counter()
    testing.run(scenario())


@pytest.mark.parametrize("seed", range(8))
def test_coordinators_that_die_cost_no_item(seed):
    database = testing.MemoryDatabase()

    async def scenario():
        async with testing.engine(
            max_actors=3, max_crashes=1000, faults=Faults(max_delay_s=0.005), seed=seed, lease_ttl_s=3.0,
            sources={"default": lambda: testing.MemoryDocumentStore(database, source="default")},
        ) as engine:  # fmt: skip
            job = await Counted.start(N).persist().audit().run()
            for wait_s in (0.3 + seed / 40, 0.7, 1.1):
                await asyncio.sleep(wait_s)
                engine.crash()
                await asyncio.sleep(0.05 * (seed % 3))
                await engine.restart()
            await _checked(job, may_lose=False)

    Counted.runs = Counter()
    testing.run(scenario())
    assert max(Counted.runs.values()) <= 2 + 3  # its attempts, and once more for each crash


def test_a_job_that_is_cancelled_keeps_what_was_done_and_can_be_resumed():
    async def scenario():
        async with testing.engine(max_actors=2):
            job = await Counted.start(N).run()
            await asyncio.sleep(0.12)
            await job.cancel("later")
            with pytest.raises(koan.JobCancelledError):
                await job.wait()
            done = (await koan.Jobs.get(job.id)).items_processed
            assert 0 < done < N
            again = await koan.Jobs.retry(job.id, resume=True)
            await _checked(again, may_lose=False)

    Counted.runs = Counter()
    testing.run(scenario())
    assert max(Counted.runs.values()) <= 3


class Wordy(Counted):
    """Its items produce more than there is room for."""

    items = koan.ItemOptions(checkpoint_every=0.05, chunk_size=9)

    async def process_item(self, item, index, progress):
        await asyncio.sleep(0.01)
        return koan.ItemResult.success(f"{item:05}" * 50)


def test_values_that_the_engine_has_no_room_for_stay_with_the_lead():
    async def scenario():
        async with testing.engine(max_actors=2, max_part_bytes=20_000):
            result = await (await Wordy.start(1000).run()).wait()
            assert result["values"] == [f"{item:05}" * 50 for item in range(1000)]

    testing.run(scenario())


def test_values_are_no_documents_where_everything_shares_a_loop():
    class Sunk(Counted):
        retry = koan.RetryPolicy(max_attempts=1)

        def build_result(self, summary) -> dict:
            return {"n": summary.values.write_documents("sink")}

    async def scenario():
        async with testing.engine(max_actors=2):
            with pytest.raises(koan.JobFailedError, match="needs an engine with threads of its own"):
                await (await Sunk.start(5).run()).wait()

    Sunk.runs = Counter()
    testing.run(scenario())
