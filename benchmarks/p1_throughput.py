"""P1: no-op jobs in memory, `start_many` until all results are here, against plain Ray tasks.

Rounds of ours and of plain tasks alternate; the medians are compared. Every job is a record, an execution with metrics and
a result, and can be queried afterwards; a plain task is none of that.

Where the time goes (py-spy --gil, 200 samples a second, 2026-11-24): the coordinator's loop holds its GIL 72 % of the time
and is the limit; the driver 15 %, each job actor 16 %. Of the coordinator: choosing and sending batches 32 %
(`Dispatcher._pump`, of which Ray's call 9 %), taking in their answers 28 % (`batch_answered`), flushes 18 % (`Writer._run`),
submits 10 %. Copying records (`JobRecord.evolve`) is 8 % of it.
"""

from __future__ import annotations

from benchmarks._harness import Row, end_engine, median, plain_tasks_per_second, start_engine, start_ray, timed


def run(quick: bool) -> list[Row]:
    import koan_ray as koan

    n, rounds = (10_000, 2) if quick else (50_000, 4)

    @koan.job(kind="p1.noop")
    def noop(x: int) -> int:
        return x

    def once(n: int) -> None:
        jobs = noop.start_many(range(n)).run().get()
        for job in jobs:
            job.wait().get()

    start_ray()
    ours, plain = [], []
    for _ in range(rounds):
        plain.append(plain_tasks_per_second(2000 if quick else 5000))
        engine = start_engine()
        once(3000)
        ours.append(n / timed(lambda: once(n)))
        end_engine(engine)
    ratio = median(ours) / median(plain)
    return [Row("P1 start_many → all results", f"{median(ours):,.0f} jobs/s", f"{median(plain):,.0f} tasks/s", ratio, 8, 30)]
