"""What `koan_ray.wiring` puts together."""

from __future__ import annotations

import asyncio
import threading

from koan_ray import testing, wiring
from koan_ray.domain.lease import slots_of
from koan_ray.engine.shards import Shards
from koan_ray.engine.tenure import Source, Tenure
from koan_ray.ports import LoopClock, Silence


def test_a_beat_that_is_ended_twice_still_closes_its_client():
    begun, closing, closed = threading.Event(), threading.Event(), threading.Event()

    async def beat():
        try:
            begun.set()
            await asyncio.sleep(60)
        finally:
            closing.set()
            await asyncio.sleep(0.05)  # as closing a client takes its time
            closed.set()

    end = wiring._beside(beat())
    assert begun.wait(5)
    end()
    assert closing.wait(5)
    end()
    assert closed.wait(5)


class Heart(testing.MemoryDocumentStore):
    """Says how it is used; its closing takes a while."""

    def __init__(self, database):
        super().__init__(database)
        self.is_closing, self.n_early, self.n_beats = False, 0, 0

    async def open(self):
        self.n_early += self.is_closing
        await super().open()

    async def beat(self, lease):
        self.n_beats += 1
        return await super().beat(lease)

    async def close(self):
        self.is_closing = True
        await asyncio.sleep(0.3)
        await super().close()
        self.is_closing = False


async def test_the_beat_of_the_next_term_begins_when_the_last_ones_client_is_closed():
    """They share it, and each runs on a loop of its own."""
    database = testing.MemoryDatabase()
    heart = Heart(database)
    tenure = Tenure(
        Source("default", testing.MemoryDocumentStore(database), heart=heart, aside=wiring._beside), shard="koan/0",
        slots=slots_of(0, 1), holder="me", ttl_s=0.3, clock=LoopClock(asyncio.get_running_loop()), host=Quiet(),
        log=Silence(),
    )  # fmt: skip
    running = asyncio.ensure_future(tenure.run())
    for term in (1, 2, 3):
        async with asyncio.timeout(10):
            while not (tenure.state == "active" and tenure.term == term):  # noqa: ASYNC110 - states have no event
                await asyncio.sleep(0.01)
        n_before = heart.n_beats
        async with asyncio.timeout(10):
            while heart.n_beats < n_before + 2:  # noqa: ASYNC110 - nor have beats
                await asyncio.sleep(0.01)
        tenure._note_replaced()
        await asyncio.sleep(0)
    assert heart.n_early == 0
    await tenure.close()
    running.cancel()


async def test_a_lease_that_cannot_be_given_back_does_not_keep_the_connections_open():
    database = testing.MemoryDatabase()
    store = testing.MemoryDocumentStore(database)
    shards = Shards(
        Source("default", store), n_shards=1, holder="me", ttl_s=15.0,
        clock=LoopClock(asyncio.get_running_loop()), host=Quiet(), log=Silence(),
    )  # fmt: skip
    running = asyncio.ensure_future(shards.tenures[0].run())
    await shards.settled()
    database.faults.unavailable = True
    await shards.close()
    assert not store._is_open
    running.cancel()


class Quiet:
    """A host that has nothing to do."""

    def took_in(self, tenure, jobs): ...
    async def opened(self, tenure): ...
    async def found(self, tenure, jobs, *, is_late=False): ...
    def stood_down(self, tenure): ...
    def written(self, jobs): ...
    def refused(self, job): ...
    def unstorable(self, job, size, limit): ...
    def unwritable(self, job, problem): ...
    def resumed(self, job_ids): ...
