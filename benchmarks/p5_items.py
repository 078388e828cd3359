"""P5: a `FiniteJob` over trivial items, against the usual ways to map a function over many items with two processes.

The item is an integer, the function returns its double, and all doubles are summed by whoever asked, so that every side
brings every result back. The reference is Ray's own `ActorPool` over chunks of 1,000, which keeps no account of anything;
`multiprocessing.Pool`, its namesake of `ray.util` and Ray Data are measured for comparison. Start-up counts for nobody:
every side runs once before it is measured.

Beside the rate: what the process that leads, the coordinator and the driver grow by over a million items, without the pages
of Ray's object store, which all processes share.
"""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

from benchmarks._harness import Row, end_engine, median, start_engine, start_ray, timed

_CHUNK = 1000


def double(x: int) -> int:
    return 2 * x


def doubles(items: list[int]) -> list[int]:
    return [double(item) for item in items]


def run(quick: bool) -> list[Row]:
    n, rounds = (200_000, 2) if quick else (1_000_000, 3)
    start_ray()
    plain = {
        "ActorPool": _actor_pool(n, rounds),
        "multiprocessing.Pool": _processes(n, rounds),
        "ray.util.multiprocessing.Pool": _ray_processes(n, rounds),
        "Ray Data map_batches": _ray_data(n, rounds),
    }
    engine = start_engine(max_actors=2)
    ours, grown = _ours(engine, n, rounds)
    end_engine(engine)
    rows = [Row("P5 trivial items of a FiniteJob", _rate(ours), f"{_rate(plain['ActorPool'])} chunked ActorPool",
                ours / plain["ActorPool"], 0.5, 1.0)]  # fmt: skip
    rows += [
        Row("P5 the same", _rate(ours), f"{_rate(plain[name])} {name}", ours / plain[name])
        for name in ("multiprocessing.Pool", "ray.util.multiprocessing.Pool", "Ray Data map_batches")
    ]
    rows.append(Row(f"P5 memory that {n:,} items take", f"{grown:.0f} MB", "coordinator, lead and driver", grown, 200, 100,
                    unit=" MB", lower=True))  # fmt: skip
    return rows


def _rate(rate: float) -> str:
    return f"{rate:,.0f} items/s"


def _ours(engine, n: int, rounds: int) -> tuple[float, float]:
    import koan_ray as koan

    class Doubles(koan.FiniteJob[int, int, int]):
        kind = "bench.Doubles"

        def get_items(self, context):
            return range(context)

        def process_item(self, item, index, progress):
            return koan.ItemResult.success(double(item))

        def build_result(self, summary) -> int:
            assert summary.total_items == summary.processed_items
            return sum(summary.values)

    def once(job_type, n: int) -> None:
        assert job_type.start(n).run().get().wait().get() == n * (n - 1)

    once(Doubles, 50_000)
    before = _rss(engine)
    took = [timed(lambda: once(Doubles, n)) for _ in range(rounds)]
    return n / median(took), max(0.0, _rss(engine) - before)


def _rss(engine) -> float:
    """Return the memory of driver, coordinator and lead, in MB."""
    status = engine.status().get()
    pids = ["self", status["pid"], *(actor["pid"] for actor in status["actors"] if actor["spec"] == "lead")]
    total = 0
    for pid in pids:
        _, resident, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
        total += resident - shared
    return total * 4096 / 1e6


def _actor_pool(n: int, rounds: int) -> float:
    import ray
    from ray.util import ActorPool

    @ray.remote
    class Worker:
        def work(self, items):
            return doubles(items)

    workers = [Worker.remote() for _ in range(2)]

    def once(n: int) -> None:
        pool = ActorPool(workers)
        chunks = (list(range(start, min(start + _CHUNK, n))) for start in range(0, n, _CHUNK))
        total = sum(sum(part) for part in pool.map_unordered(lambda worker, chunk: worker.work.remote(chunk), chunks))
        assert total == n * (n - 1)

    once(20_000)
    rate = n / median(timed(lambda: once(n)) for _ in range(rounds))
    for worker in workers:
        ray.kill(worker)
    return rate


def _processes(n: int, rounds: int) -> float:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return _mapped(pool, n, rounds)


def _ray_processes(n: int, rounds: int) -> float:
    from ray.util.multiprocessing import Pool

    with Pool(2) as pool:
        rate = _mapped(pool, n, rounds)
    time.sleep(1)
    return rate


def _mapped(pool, n: int, rounds: int) -> float:
    def once(n: int) -> None:
        assert sum(pool.imap_unordered(double, range(n), chunksize=_CHUNK)) == n * (n - 1)

    once(20_000)
    return n / median(timed(lambda: once(n)) for _ in range(rounds))


def _ray_data(n: int, rounds: int) -> float:
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False

    def once(n: int) -> None:
        rows = ray.data.range(n).map_batches(lambda batch: {"id": batch["id"] * 2})
        assert sum(int(batch["id"].sum()) for batch in rows.iter_batches(batch_size=65_536)) == n * (n - 1)

    once(20_000)
    return n / median(timed(lambda: once(n)) for _ in range(rounds))
