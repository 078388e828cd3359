"""P1: no-op jobs in memory, `start_many` until all results are here, against plain Ray tasks.

Rounds of ours and of plain tasks alternate; the medians are compared. Every job is a record, an execution with metrics and
a result, and can be queried afterwards; a plain task is none of that.

Where the time goes (py-spy --gil, two cores): all three processes are busy. Driver: building the jobs in hand and reading
the ends, about half; encoding contexts with pydantic, a fifth. Coordinator: `_settle` and `begin` (copying records) about
half, pickling and unpickling of batches a quarter. Job actors: the body's surroundings (`Attempt`, validation of context
and result) about two thirds.
"""

from __future__ import annotations

from benchmarks._harness import Row, end_engine, median, plain_tasks_per_second, start_engine, start_ray, timed


def run(quick: bool) -> list[Row]:
    import koan_ray as koan

    n, rounds = (10_000, 2) if quick else (50_000, 4)

    @koan.job
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
