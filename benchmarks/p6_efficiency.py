"""P6: how much of two processors' time goes into the items of a `FiniteJob`.

Items of 5 ms CPU each: efficiency is the CPU time that the bodies took, by their own clock, over two processors for as long
as the job ran. The machine gives two processes on two cores less than twice of what it gives one, so the same bodies are run
by two plain Ray actors with half of the items each and not a word in between; the quotient is what counts.

Skewed items: one in a hundred takes a hundred times as long. Async items wait for 10 ms, a hundred at a time in one actor;
the ideal is 100 / 10 ms. The cost of checkpoints and progress is that of the usual interval against one of an hour.
"""

from __future__ import annotations

import asyncio
import time

from benchmarks._harness import Row, end_engine, median, start_engine, start_ray

_ITEM_S = 0.005


def burn(seconds: float) -> None:
    """Use so much CPU time."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def weight(item: int, *, skewed: bool) -> float:
    """Return how long an item takes; the same on average."""
    if not skewed:
        return _ITEM_S
    return _ITEM_S * 100 / 1.99 if item % 100 == 50 else _ITEM_S / 1.99


def run(quick: bool) -> list[Row]:
    n, rounds = (2000, 1) if quick else (4000, 2)
    start_ray()
    engine = start_engine(max_actors=2)
    even, rarely, skewed, waiting = _ours(n, rounds)
    end_engine(engine)
    floor = _plain(n, rounds)
    return [
        Row("P6 items of 5 ms CPU", f"{even:.2f} s", f"{floor:.2f} s two actors, half each", floor / even, 0.90, 0.97),
        Row("P6 skewed items, 1 % take 100×", f"{skewed:.2f} s", f"{floor:.2f} s the same work, half each", floor / skewed,
            0.85, 0.95),
        Row("P6 async items, 10 ms, 100 at a time", f"{waiting:,.0f} items/s", "10,000 items/s ideal", waiting / 10_000,
            0.80, 0.95),
        Row("P6 cost of checkpoints and progress", f"{even:.2f} s, once a second", f"{rarely:.2f} s, once an hour",
            max(0.0, (even / rarely - 1) * 100), 3, 1, unit="%", lower=True),
    ]  # fmt: skip


def _ours(n: int, rounds: int) -> tuple[float, float, float, float]:
    import koan_ray as koan

    class Burns(koan.FiniteJob[dict, float, int]):
        kind = "bench.Burns"

        def get_items(self, context):
            return range(context["n"])

        def process_item(self, item, index, progress):
            burn(weight(item, skewed=self.context["skewed"]))
            return koan.ItemResult.success()

        def build_result(self, summary) -> float:
            assert summary.total_items == summary.processed_items
            return summary.duration.total_seconds()

    class Rarely(Burns):
        kind = "bench.Rarely"
        items = koan.ItemOptions(checkpoint_every=3600)

    class Waits(koan.FiniteJob[int, float, int]):
        kind = "bench.Waits"
        items = koan.ItemOptions(concurrency=100, max_workers=1)

        def get_items(self, context):
            return range(context)

        async def process_item(self, item, index, progress):
            await asyncio.sleep(0.01)
            return koan.ItemResult.success()

        def build_result(self, summary) -> float:
            return summary.duration.total_seconds()

    def took(job_type, context) -> float:
        return job_type.start(context).run().get().wait().get()

    took(Burns, {"n": 200, "skewed": False})
    took(Rarely, {"n": 200, "skewed": False})
    even, rarely = [], []
    for _ in range(rounds):
        even.append(took(Burns, {"n": n, "skewed": False}))
        rarely.append(took(Rarely, {"n": n, "skewed": False}))
    skewed = [took(Burns, {"n": n, "skewed": True}) for _ in range(rounds)]
    took(Waits, 500)
    n_waits = 20_000 if rounds == 1 else 50_000
    return median(even), median(rarely), median(skewed), n_waits / took(Waits, n_waits)


def _plain(n: int, rounds: int) -> float:
    import ray

    @ray.remote
    class Worker:
        def work(self, n):
            for _ in range(n):
                burn(_ITEM_S)

    workers = [Worker.remote() for _ in range(2)]
    ray.get([worker.work.remote(1) for worker in workers])
    took = []
    for _ in range(rounds):
        began = time.perf_counter()
        ray.get([worker.work.remote(n // 2) for worker in workers])
        took.append(time.perf_counter() - began)
    for worker in workers:
        ray.kill(worker)
    return median(took)
