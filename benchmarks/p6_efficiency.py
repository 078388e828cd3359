"""P6: how much of two processors' time goes into the items of a `FiniteJob`.

Items of 5 ms CPU each: efficiency is the CPU time that the bodies took, by their own clock, over two processors for as long
as the job ran. The machine gives two processes on two cores less than twice of what it gives one, so the same bodies are run
by two plain Ray actors with half of the items each and not a word in between; the quotient is what counts.

Skewed items: one in a hundred takes a hundred times as long. Async items wait for 10 ms, a hundred at a time in one actor;
the ideal is 100 / 10 ms.

Two figures tell what the account of the items costs, in CPU time of lead, coordinator and broker as a share of what the
bodies take: all that the three do (chunks, dispatch, progress, checkpoints, idling), and how much of it is progress
and checkpoints, as the difference to the same job without them.
"""

from __future__ import annotations

import asyncio
import time
from functools import cache

import psutil

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
    n, rounds = (1000, 2) if quick else (3000, 3)
    start_ray()
    engine = start_engine(max_actors=2)
    plain = _Plain()
    even, skewed, floors = [], [], []
    _took(_burns(), {"n": 200, "skewed": False})
    for _ in range(rounds):  # in turns, because this kind of machine is not steady from one minute to the next
        even.append(_took(_burns(), {"n": n, "skewed": False}))
        floors.append(plain.took(n))
        skewed.append(_took(_burns(), {"n": n, "skewed": True}))
    plain.end()
    n_waits = 20_000 if quick else 50_000
    _took(_waits(), 500)
    waiting = n_waits / _took(_waits(), n_waits)
    all_shares, shares = _cost_of_account(engine, 2000, 2 if quick else 4)
    end_engine(engine)
    efficiency = median(floor / ours for floor, ours in zip(floors, even, strict=True))
    on_skewed = median(floor / ours for floor, ours in zip(floors, skewed, strict=True))
    share, all_share = median(shares) * 100, median(all_shares) * 100
    floor = f"{median(floors):.2f} s"
    return [
        Row("P6 items of 5 ms CPU", f"{median(even):.2f} s", f"{floor} two actors, half each", efficiency, 0.90, 0.97),
        Row("P6 skewed items, 1 % take 100×", f"{median(skewed):.2f} s", f"{floor} the same work", on_skewed, 0.85, 0.95),
        Row("P6 async items, 10 ms, 100 at a time", f"{waiting:,.0f} items/s", "10,000 items/s ideal", waiting / 10_000,
            0.80, 0.95),
        Row("P6 CPU of progress and checkpoints", f"{share:.1f} %", "of the items' own", share, 3, 1, unit="%", lower=True),
        Row("P6 CPU of all the account", f"{all_share:.1f} %", "of the items' own", all_share, unit="%"),
    ]  # fmt: skip


def _cost_of_account(engine, n: int, rounds: int) -> tuple[list[float], list[float]]:
    """Return what lead, coordinator and broker take of the items' CPU time: all of it, and for progress and checkpoints."""
    everything, difference = [], []
    _took_watched(_burns(), {"n": 200, "skewed": False})
    for _ in range(rounds):
        taken = []
        for is_silent in (False, True):
            before = _cpu_s(engine)
            _took_watched(_silent_burns() if is_silent else _burns(), {"n": n, "skewed": False})
            taken.append((_cpu_s(engine) - before) / (n * _ITEM_S))
        everything.append(taken[0])
        difference.append(taken[0] - taken[1])
    return everything, difference


def _took(job_type, context) -> float:
    return job_type.start(context).run().get().wait().get()


def _took_watched(job_type, context) -> float:
    job = job_type.start(context).run().get()
    with job.on_progress(lambda _update: None):
        return job.wait().get()


def _cpu_s(engine) -> float:
    """Return the CPU time that coordinator, broker and lead have taken."""
    import ray

    from koan_ray.runtime.ray import options

    status = engine.status().get()
    broker = ray.get_actor(options.BROKER_NAME, namespace=engine.settings.engine.namespace)
    leads = [actor["pid"] for actor in status["actors"] if actor["spec"] == "lead"]
    pids = [status["pid"], ray.get(broker.pid.remote()), *leads]
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return sum(time.user + time.system for time in times)


@cache
def _burns():
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

    return Burns


@cache
def _silent_burns():
    from datetime import timedelta

    import koan_ray as koan

    class SilentBurns(_burns()):
        kind = "bench.SilentBurns"
        items = koan.ItemOptions(checkpoint_every=timedelta(hours=1))

        def get_items(self, context):
            from koan_ray.engine import lead  # we are in its process

            lead._REPORT_EVERY_S = lead._REPORT_AT_LEAST_S = 3600.0
            return range(context["n"])

        def build_result(self, summary) -> float:
            from koan_ray.engine import lead

            lead._REPORT_EVERY_S, lead._REPORT_AT_LEAST_S = 0.1, 0.5
            return summary.duration.total_seconds()

    return SilentBurns


@cache
def _waits():
    import koan_ray as koan

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

    return Waits


class _Plain:
    """The same work in two plain actors, which hold no CPU while it is the others' turn."""

    def __init__(self) -> None:
        import ray

        @ray.remote(num_cpus=0)
        class Worker:
            def work(self, n):
                for _ in range(n):
                    burn(_ITEM_S)

        self._workers = [Worker.remote() for _ in range(2)]
        self.took(2)

    def took(self, n: int) -> float:
        import ray

        began = time.perf_counter()
        ray.get([worker.work.remote(n // 2) for worker in self._workers])
        return time.perf_counter() - began

    def end(self) -> None:
        import ray

        for worker in self._workers:
            ray.kill(worker)
