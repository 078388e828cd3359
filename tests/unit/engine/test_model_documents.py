"""Random histories with documents: coordinators and actors that die at every step, a store that loses and tears writes.

Whatever happens, every acknowledged job ends exactly once, its executions are closed, and the documents keep the rules.
The seed is in the test id.
"""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections import Counter
from random import Random

import pytest

import koan_ray as koan
from koan_ray import testing
from koan_ray.domain import ids
from koan_ray.domain.invariants import check_job
from koan_ray.domain.records import Residence
from koan_ray.errors import KoanRayError
from koan_ray.stores.codec import decode_execution, decode_job
from tests.unit.engine.test_model import MAX_CRASHES, Quick, Shared, Work


async def trouble(engine, database, random: Random, n: int) -> Counter[str]:
    """Let coordinators crash and the store fail, and end with both in order."""
    fired: Counter[str] = Counter()
    faults = database.faults
    for _ in range(n):
        await asyncio.sleep(random.choice([0.003, 0.05, 0.4, 3.0]) * random.random())
        what = random.choice(["crash", "crash", "lose_replies", "lose_requests", "tear", "outage"])
        before = faults.n_fired
        if what == "crash":
            engine.crash()
            await asyncio.sleep(random.choice([0.0, 0.2, 4.0]))
            await engine.restart()
        elif what == "outage":
            faults.unavailable = True
            await asyncio.sleep(random.choice([0.5, 30.0]))
            faults.unavailable = False
        else:
            setattr(faults, what, random.choice([1, 3]))
            await asyncio.sleep(random.random())
            setattr(faults, what, 0)
        fired[what] += 1 if what == "crash" else faults.n_fired - before
    return fired


async def history(seed: int, shards: int) -> Counter[str]:
    random = Random(seed)
    database = testing.MemoryDatabase()
    database.faults.delay_s = random.choice([0, 0, 0.005])
    actor_faults = testing.Faults(
        die_at_begin=random.choice([0, 0.03]), die_at_end=random.choice([0, 0.03]), limit=random.choice([0, 4]),
        max_delay_s=random.choice([0, 0.01, 0.1]),
    )  # fmt: skip
    settings = {
        "max_actors": random.choice([1, 2, 4]),
        "max_crashes": MAX_CRASHES + 20,
        "cancel_grace_s": 1.0,
        "shards": shards,
    }
    sources = {"default": lambda: testing.MemoryDocumentStore(database, source="default")}
    async with testing.engine(faults=actor_faults, seed=seed, sources=sources, **settings) as engine:
        causing = asyncio.create_task(trouble(engine, database, random, random.randrange(1, 6)))
        accepted: list[koan.Job] = []
        for _ in range(random.randrange(4, 16)):
            kind = random.choice([Work, Work, Shared, Quick])
            work = {
                "takes": random.choice([0, 0.001, 0.5, 5]), "children": random.choice([0, 0, 1, 2]),
                "fails": random.random() < 0.3, "later": random.random() < 0.2,
            }  # fmt: skip
            context = 1 if kind is Quick else work
            accepted.append(await kind.start(context).persist(partition=random.choice([None, "hot"])).audit().run())
            if random.random() < 0.2:
                random.choice(accepted).cancel()
            await asyncio.sleep(random.choice([0, 0.01, 1.0]) * random.random())
        fired = await causing
        outcomes = await asyncio.gather(*[job.wait() for job in accepted], return_exceptions=True)
        for outcome in outcomes:
            assert not isinstance(outcome, Exception) or isinstance(outcome, KoanRayError), repr(outcome)
            assert type(outcome).__name__ not in ("JobLostError", "JobNotFoundError"), repr(outcome)
        for _ in range(100):
            if not engine.coordinator._live:
                break
            await asyncio.sleep(1)
        assert not engine.coordinator._live
    check(database, {job.id for job in accepted}, f"seed {seed}, {dict(fired)}")
    return fired


def check(database, acknowledged: set[str], where: str) -> None:
    jobs = {
        record.id: record
        for partition, documents in database.jobs.items()
        for record in (decode_job(document, source="default", partition=partition) for document in documents.values())
    }
    assert acknowledged <= jobs.keys(), where
    executions: dict[str, list] = {job_id: [] for job_id in jobs}
    for documents in database.executions.values():
        for document in documents.values():
            execution = decode_execution(document)
            executions[execution.job_id].append(execution)
    for job in jobs.values():
        assert job.status.is_final, f"{where}: {job.id} is {job.status}"
        mine = sorted(executions[job.id], key=lambda e: (e.started_at, e.id))
        parent = jobs.get(job.particulars.parent_job_id or "")
        assert job.particulars.residence == Residence("default", job.particulars.residence.partition, audit=True)
        problems = [str(found) for found in check_job(job, mine, parent=parent)]
        assert not problems, f"{where}: {problems} {[(e.attempt, e.reason) for e in mine]} {job}"


def seeded_ids(seed: int):
    """Ids say in which shard a job is, so they are part of the history."""
    random, at = Random(seed), itertools.count(1_700_000_000_000)

    def uuid7() -> uuid.UUID:
        value = next(at) << 80 | 7 << 76 | random.getrandbits(12) << 64 | 2 << 62 | random.getrandbits(62)
        return uuid.UUID(int=value)

    return uuid7


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("seed", range(120))
def test_every_acknowledged_job_ends_once_whatever_crashes(seed, shards, monkeypatch):
    monkeypatch.setattr(ids, "uuid7", seeded_ids(seed))
    testing.run(history(seed, shards))
