"""P8: a million queued jobs: what one costs the coordinator in memory, and whether dispatch gets slower.

Memory: the coordinator's RSS before and after a million jobs were accepted (each with its own id and context), with
dispatch held up by blockers on both actors. Dispatch: completed jobs a second over a window while a million wait, against
a window in which jobs are taken from the queue as fast as they are fed.

Where the memory goes: a slotted record, its id, its context bytes, the entry in the index, and its id in the lane; what jobs
of one submission share (terms, particulars) is held once.
"""

from __future__ import annotations

import time

from benchmarks._harness import Row, end_engine, start_engine


def run(quick: bool) -> list[Row]:
    import psutil

    import koan_ray as koan

    n = 100_000 if quick else 1_000_000

    @koan.job
    def noop(x: int) -> int:
        return x

    @koan.job
    async def blocker(x: int) -> int:
        import asyncio

        await asyncio.sleep(x)
        return x

    def completed(engine) -> int:
        return engine.status().get()["jobs"].get("completed", 0)

    def rate(engine, seconds: float) -> float:
        began, before = time.perf_counter(), completed(engine)
        time.sleep(seconds)
        return (completed(engine) - before) / (time.perf_counter() - began)

    engine = start_engine(max_actors=2, max_queued=2 * n, max_finished=1000)
    noop.start_many(range(5000)).run().get()[-1].wait().get()
    blockers = blocker.start_many([3600] * 2).run().get()
    while sum(job.refresh().get().status is koan.JobStatus.RUNNING for job in blockers) < 2:
        time.sleep(0.05)
    process = psutil.Process(engine.status().get()["pid"])
    before = process.memory_info().rss
    accepted = noop.start_many(range(n)).run().get()
    per_job = (process.memory_info().rss - before) / n
    for job in blockers:
        job.cancel().get()
    time.sleep(2)
    many = rate(engine, 2 if quick else 8)
    left = engine.status().get()["queued"]
    del accepted
    while engine.status().get()["queued"] > 1000:
        time.sleep(0.2)
    small = noop.start_many(range(60_000 if quick else 200_000)).run()
    time.sleep(0.3)
    thousand = rate(engine, 1.0)
    small.get()[-1].wait().get()
    end_engine(engine)
    ratio = many / thousand
    return [
        Row("P8 memory of a queued job", f"{per_job:,.0f} bytes", f"{n:,} jobs", per_job, 2048, 800, unit=" B", lower=True),
        Row("P8 dispatch with all of them queued", f"{many:,.0f} jobs/s ({left:,} left)", f"{thousand:,.0f} jobs/s",
            ratio, 0.7, 0.95),
    ]  # fmt: skip
