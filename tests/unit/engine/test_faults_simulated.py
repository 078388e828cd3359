"""Faults whose order in time matters, in simulated time: the ids are those of the fault table."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from collections import Counter
from itertools import pairwise
from random import Random

import pytest

import koan_ray as koan
from koan_ray import testing
from koan_ray.domain.invariants import check_job
from koan_ray.domain.lease import slots_of
from koan_ray.domain.status import ExecutionStatus
from koan_ray.engine.tenure import Source, Tenure
from koan_ray.errors import StoreUnavailableError
from koan_ray.ports import Silence
from koan_ray.stores.codec import decode_execution, decode_job
from koan_ray.testing.loop import VirtualClock

TTL = 15.0


class Spans(koan.Job[float, str]):
    """Says when it runs."""

    retry = koan.RetryPolicy(max_attempts=3, initial_delay=1)
    spans: list[tuple[str, float, float]] = []

    async def execute(self, context, progress, cancellation) -> str:
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            await asyncio.sleep(context)
        finally:
            self.spans.append((self.id, began, loop.time()))
        return self.id


@pytest.fixture
def database():
    Spans.spans.clear()
    return testing.MemoryDatabase()


def engine_on(database, **settings):
    return testing.engine(sources={"default": lambda: testing.MemoryDocumentStore(database, source="default")}, **settings)


def hold_of(engine):
    return engine.coordinator._catalog.tenures["default"]


def check(database, acknowledged=()):
    """Every acknowledged job has ended, once, and its documents keep the rules."""
    jobs, executions = {}, {}
    for partition, documents in database.jobs.items():
        for document in documents.values():
            jobs[document["_id"]] = decode_job(document, source="default", partition=partition)
    for documents in database.executions.values():
        for document in documents.values():
            execution = decode_execution(document)
            executions.setdefault(execution.job_id, []).append(execution)
    assert set(acknowledged) <= jobs.keys()
    for job in jobs.values():
        mine = sorted(executions.get(job.id, []), key=lambda e: (e.started_at, e.id))
        assert job.status.is_final, job
        problems = [str(found) for found in check_job(job, mine)]
        assert not problems, f"{problems} {[(e.attempt, e.reason) for e in mine]}"
    return jobs, executions


# --- F15, F16: what an observer may conclude -------------------------------------------------------------------------------


class Hosts:
    """A host that counts."""

    def __init__(self):
        self.opened_terms = []

    def took_in(self, tenure, jobs): ...
    async def opened(self, tenure):
        self.opened_terms.append((tenure._holder, tenure.term))

    async def found(self, tenure, jobs): ...
    def stood_down(self, tenure): ...
    def written(self, jobs): ...
    def refused(self, job): ...
    def resumed(self, job_ids): ...


class Far(testing.MemoryDocumentStore):
    """A client whose way to the database takes its time, and who gives up on it after a while."""

    way_s, patience_s = 0.0, 1000.0

    async def _begin(self, *, writes=False):
        try:
            async with asyncio.timeout(self.patience_s):
                await asyncio.sleep(self.way_s)
                await super()._begin(writes=writes)
        except TimeoutError:
            raise StoreUnavailableError("timed out") from None


def tenure_on(database, holder, host, clock=None, way_s=0.0, patience_s=1000.0):
    loop = asyncio.get_running_loop()
    store = Far(database, source="default")
    store.way_s, store.patience_s = way_s, patience_s
    return Tenure(
        Source("default", store), shard="koan/0", slots=slots_of(0, 1), holder=holder, ttl_s=TTL,
        clock=clock or VirtualClock(loop), host=host, log=Silence(),
    )  # fmt: skip


class StandsStill(testing.StoreFaults):
    """A server that is paused: calls wait, and go on in their order when it runs again."""

    runs: asyncio.Event

    async def before(self, *, writes):
        await self.runs.wait()
        await super().before(writes=writes)


@pytest.mark.parametrize("at", [n + 0.5 for n in range(34)])
@pytest.mark.parametrize("stood_still_s", [1.6 * TTL, 5 * TTL])
def test_f15_one_read_that_took_long_does_not_show_that_a_beat_stood_still(database, stood_still_s, at):
    """The server stood still. Its first answer is to the observer; the holder has given up on a beat and sends the next soon."""

    async def scenario():
        database.faults = StandsStill()
        database.faults.runs = asyncio.Event()
        database.faults.runs.set()
        host = Hosts()
        holder, observer = tenure_on(database, "holder", host, way_s=2, patience_s=8), tenure_on(database, "observer", host)
        tasks = [asyncio.ensure_future(holder.run())]
        await asyncio.sleep(9)
        tasks.append(asyncio.ensure_future(observer.run()))
        await asyncio.sleep(TTL + at)
        database.faults.runs.clear()
        await asyncio.sleep(stood_still_s)
        database.faults.runs.set()
        await asyncio.sleep(10 * TTL)
        for tenure in (holder, observer):
            tenure.vanish(RuntimeError("the test has ended"))
        for task in tasks:
            task.cancel()
        assert host.opened_terms == [("holder", 1)]

    testing.run(scenario())
