"""Group commit."""

from __future__ import annotations

import asyncio

import pytest

from koan_ray import testing
from koan_ray.domain.status import JobStatus
from koan_ray.engine.writer import Writer
from koan_ray.errors import StoreUnavailableError
from koan_ray.stores.memory import MemoryStore
from koan_ray.testing.contracts import execution, job
from koan_ray.testing.loop import VirtualClock


class Shaky(MemoryStore):
    """Counts flushes, takes a moment for each, and fails when told to: before it has written, or after."""

    def __init__(self):
        super().__init__()
        self.batches, self.fails = [], []

    async def apply(self, changes):
        await asyncio.sleep(0.01)
        how = self.fails.pop(0) if self.fails else None
        if how == "before":
            raise StoreUnavailableError("away")
        refused = await super().apply(changes)
        self.batches.append([change.job.id for change in changes])
        if how == "after":
            raise StoreUnavailableError("the answer was lost")
        return refused


async def with_writer(test):
    store, told, fenced = Shaky(), [], []
    clock = VirtualClock(asyncio.get_running_loop())
    await test(store, Writer(store, clock, told.extend, fenced.append, lambda job, why: None), told, fenced)


def test_what_gathers_during_a_flush_goes_together_with_the_next():
    async def test(store, writer, told, fenced):
        first, others = job(rev=0), [job(rev=0) for _ in range(5)]
        writer.stage(first)
        acks = [asyncio.ensure_future(writer.flushed())]
        await asyncio.sleep(0.001)
        for other in others:
            writer.stage(other)
        await acks[0]
        assert [record.id for record in told] == [first.id]
        await writer.flushed()
        assert [len(batch) for batch in store.batches] == [1, 5]

    testing.run(with_writer(test))


def test_the_latest_state_wins_and_is_written_once():
    async def test(store, writer, told, fenced):
        record = job(rev=0)
        running = record.evolve(status=JobStatus.RUNNING)
        writer.stage_behind(record)
        writer.stage_behind(running, execution(running))
        await writer.flushed()
        assert [len(batch) for batch in store.batches] == [1]
        assert (await store.get(record.id)).status is JobStatus.RUNNING
        assert len(await store.executions(record.id)) == 1

    testing.run(with_writer(test))


@pytest.mark.parametrize("fails", [["before"], ["after"], ["before", "before", "after"], ["after", "before"]])
def test_an_interrupted_flush_is_resolved_by_reading_back(fails):
    async def test(store, writer, told, fenced):
        store.fails = list(fails)
        records = [job(rev=0) for _ in range(3)]
        for record in records:
            writer.stage(record)
        await writer.flushed()
        for record in records:
            assert (await store.get(record.id)).rev == 1
        assert len(told) == 3
        assert fenced == []

    testing.run(with_writer(test))


def test_a_record_that_a_newer_writer_has_replaced_is_told_and_not_overwritten():
    async def test(store, writer, told, fenced):
        record = job(rev=0)
        writer.stage(record)
        await writer.flushed()
        store._jobs[record.id] = record.evolve(rev=7, term=9)
        writer.stage(record.evolve(status=JobStatus.RUNNING))
        await writer.flushed()
        assert [lost.id for lost in fenced] == [record.id]
        assert (await store.get(record.id)).term == 9

    testing.run(with_writer(test))
