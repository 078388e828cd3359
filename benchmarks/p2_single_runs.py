"""P2: no-op jobs, one `run()` and one `wait()` each, 200 in flight on an event loop, against plain Ray tasks.

Where the time goes (py-spy --gil, 2026-11-24): coordinator 42 % of the time in its GIL, driver 20 %, each job actor 9 %; the
rest is Ray's own code and thread switches. Coordinator: batches out 31 %, answers in 19 %, flushes 11 %. Driver: asyncio's
tasks and our `Pending` about 60 %, answers from the coordinator 19 %.
"""

from __future__ import annotations

import asyncio

from benchmarks._harness import Row, end_engine, median, plain_tasks_per_second, start_engine, start_ray, timed


def run(quick: bool) -> list[Row]:
    import koan_ray as koan

    n, rounds = (3000, 2) if quick else (10_000, 4)

    @koan.job(kind="p2.noop")
    def noop(x: int) -> int:
        return x

    async def once(n: int) -> None:
        permits = asyncio.Semaphore(200)

        async def one(i: int) -> None:
            async with permits:
                await (await noop.start(i).run()).wait()

        await asyncio.gather(*[one(i) for i in range(n)])

    start_ray()
    ours, plain = [], []
    for _ in range(rounds):
        plain.append(plain_tasks_per_second(2000 if quick else 5000))
        engine = start_engine()
        asyncio.run(once(1000))
        ours.append(n / timed(lambda: asyncio.run(once(n))))
        end_engine(engine)
    ratio = median(ours) / median(plain)
    return [Row("P2 run() each, 200 in flight", f"{median(ours):,.0f} jobs/s", f"{median(plain):,.0f} tasks/s", ratio, 2, 6)]
