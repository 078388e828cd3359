"""P4: persisted and audited no-op jobs, against what the document server takes of the same documents in bulk.

Ours: ``start_many(...).persist().audit()`` until all results are here. The ceiling: the documents of such a run, as they
were stored, written again in bulks of 500 with the same write concern and indexes: an insert of the job
as it was accepted, the update to how it ended, and its closed execution. Rounds alternate; medians.

Where the time goes: in the document server, which syncs every commit to disk and runs beside us on the same two cores. What
is ours is hidden behind the flush that is in flight: the next one takes all that has gathered meanwhile, so that the server
always has work, and a job whose Running state was not flushed before it ended costs one write less.
"""

from __future__ import annotations

import asyncio
import tempfile
import time

from benchmarks._harness import Row, end_engine, median, start_engine, timed

BULK = 500


def run(quick: bool) -> list[Row]:
    from koan_ray.stores.embedded import DocumentServer

    with tempfile.TemporaryDirectory() as directory:
        server = DocumentServer(directory)
        url = asyncio.run(server.start())
        try:
            return measure(url, *((1000, 2) if quick else (2000, 3)))
        finally:
            asyncio.run(server.stop())


def measure(url: str, n: int, rounds: int) -> list[Row]:
    import koan_ray as koan

    @koan.job(kind="p4.noop")
    def noop(x: int) -> int:
        return x

    engine = start_engine(max_actors=2, sources={"default": {"url": url}})
    ours, ceiling = [], []

    def once(partition: str, count: int = n) -> None:
        jobs = noop.start_many(range(count)).persist(partition=partition).audit().run().get()
        for job in jobs:
            job.wait().get()

    once("warm")
    for turn in range(rounds):
        once(f"ours{turn}", 1)  # the first job of a partition makes its collections and indexes
        ours.append(n / timed(lambda turn=turn: once(f"ours{turn}")))
        ceiling.append(n / rewrite(url, f"ours{turn}", f"again{turn}"))
    end_engine(engine)
    ratio = median(ours) / median(ceiling)
    return [Row("P4 persisted + audited jobs", f"{median(ours):,.0f} jobs/s", f"{median(ceiling):,.0f} jobs/s in bulk",
                ratio, 0.6, 0.9)]  # fmt: skip


def rewrite(url: str, source: str, target: str) -> float:
    """Write the documents of a partition once more, in bulk; returns the seconds it took."""
    from pymongo import InsertOne, MongoClient, UpdateOne, WriteConcern

    from koan_ray.stores.codec import STATE_FIELDS
    from koan_ray.stores.mongo import MongoStore

    async def prepare() -> None:
        store = MongoStore(url)
        await store.open()
        await store._db.ensure(target)
        await store.close()

    asyncio.run(prepare())
    with MongoClient(url) as client:
        concern = WriteConcern(w="majority", j=True)
        db = client.get_default_database(write_concern=concern)
        ended = list(db[f"jobs.{source}"].find())
        executions = list(db[f"executions.{source}"].find())
        accepted = [
            {name: value for name, value in job.items() if name not in STATE_FIELDS}
            | {"status": "queued", "rev": 1, "term": job["term"], "queued_at": job["queued_at"],
               "last_modified": job["queued_at"]}
            for job in ended
        ]  # fmt: skip
        updates = [
            UpdateOne({"_id": job["_id"], "rev": 1}, {"$set": {k: v for k, v in job.items() if k in STATE_FIELDS}})
            for job in ended
        ]
        began = time.perf_counter()
        for start in range(0, len(ended), BULK):
            part = slice(start, start + BULK)
            db[f"jobs.{target}"].bulk_write([InsertOne(job) for job in accepted[part]], ordered=False)
            db[f"jobs.{target}"].bulk_write(updates[part], ordered=False)
            db[f"executions.{target}"].bulk_write([InsertOne(e) for e in executions[part]], ordered=False)
        return time.perf_counter() - began
