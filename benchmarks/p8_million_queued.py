"""P8: a million queued jobs: what one costs the coordinator in memory, and whether dispatch gets slower.

Memory: the coordinator's RSS before and after a million jobs were accepted (each with its own id and context), with
dispatch held up by blockers on both actors.

Dispatch: completed jobs a second with a million in the queue, against queues of 20,000. Nothing is submitted while the clock
runs, because accepting jobs costs the coordinator time that it does not dispatch in: against a queue that is fed, the
million comes out twice as fast. So the small queues are handed in beforehand, are due a little later all at once, and are
timed from the first tenth of their jobs to the last; the figure is the median of several. They are not smaller, because
actors hold two batches of up to 500 jobs each, and a thousand would be gone from the queue at once.

Where the memory goes: a slotted record, its id, its context bytes, the entry in the index, and its id in the lane; what jobs
of one submission share (terms, particulars) is held once.
"""

from __future__ import annotations

import time

from benchmarks._harness import Row, end_engine, median, start_engine

_FEW, _WARM = 20_000, 5_000


def run(quick: bool) -> list[Row]:
    import psutil

    import koan_ray as koan

    n = 100_000 if quick else 1_000_000

    @koan.job(kind="p8.noop")
    def noop(x: int) -> int:
        return x

    @koan.job(kind="p8.blocker")
    async def blocker(x: int) -> int:
        import asyncio

        await asyncio.sleep(x)
        return x

    def completed() -> int:
        return engine.status().get()["jobs"].get("completed", 0)

    def until(count: int) -> tuple[float, int]:
        """Return when at least ``count`` jobs were completed, and how many they were."""
        while (seen := completed()) < count:
            time.sleep(0.002)
        return time.perf_counter(), seen

    def rate(first: int, last: int) -> float:
        """Return completed jobs a second from the ``first`` to the ``last``."""
        (began, before), (ended, after) = until(first), until(last)
        return (after - before) / (ended - began)

    def rate_of_few() -> float:
        """Return the rate for a queue of `_FEW`."""
        before = completed()
        noop.start_many(range(_FEW)).delayed(3.0).run().get()
        assert completed() == before, "submitting took longer than the delay"
        found = rate(before + _FEW // 10, before + _FEW * 9 // 10)
        until(before + _FEW)
        return found

    engine = start_engine(max_actors=2, max_queued=2 * n, max_finished=1000)
    noop.start_many(range(_WARM)).run().get()[-1].wait().get()
    blockers = blocker.start_many([3600] * 2).run().get()
    while sum(job.refresh().get().status is koan.JobStatus.RUNNING for job in blockers) < 2:
        time.sleep(0.05)
    process = psutil.Process(engine.status().get()["pid"])
    before = process.memory_info().rss
    accepted = noop.start_many(range(n)).run().get()
    per_job = (process.memory_info().rss - before) / n
    for job in blockers:
        job.cancel().get()
    n_timed = min(n // 2, 200_000)
    before = completed() + _FEW // 10
    many = rate(before, before + n_timed)
    left = engine.status().get()["queued"]
    del accepted
    until(_WARM + n)
    few = median([rate_of_few() for _ in range(5 if quick else 15)])
    end_engine(engine)
    return [
        Row("P8 memory of a queued job", f"{per_job:,.0f} bytes", f"{n:,} jobs", per_job, 2048, 800, unit=" B", lower=True),
        Row("P8 dispatch with all of them queued", f"{many:,.0f} jobs/s ({left:,} left)",
            f"{few:,.0f} jobs/s (of {_FEW:,})", many / few, 0.7, 0.95),
    ]  # fmt: skip
