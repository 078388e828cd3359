"""P7: a job that reports in a tight loop: how much slower it gets, and how late a subscriber hears of it.

The loop does a unit of pure Python (about 20 µs) and reports after each. The same body goes on without reporting every other
quarter of a second; the median over the pairs counts, because this kind of machine is not steady from second to second. The
lag is from `report()` to the subscriber's handler, by the clock of one machine; the reference is a plain Ray streaming
generator that yields the time.

Where the time goes: `report()` is an assignment and a flag, 0.1 µs by timeit. The rest is the ticker, which wakes some
twenty times a second to call the broker, and takes the GIL from the body for that.
"""

from __future__ import annotations

import time

from benchmarks._harness import Row, end_engine, median, start_engine


def run(quick: bool) -> list[Row]:
    import ray

    import koan_ray as koan

    @koan.job(kind="p7.loop")
    def loop(n_slices: int, progress: koan.JobProgress) -> list[tuple[float, float]]:
        def units_per_second(*, reports: bool) -> float:
            n, began = 0, time.perf_counter()
            while time.perf_counter() - began < 0.25:
                total = 0
                for k in range(600):
                    total += k * n
                n += 1
                message = f"{time.time():.6f}"
                if reports:
                    progress.report(0.5, message)
            return n / (time.perf_counter() - began)

        return [(units_per_second(reports=False), units_per_second(reports=True)) for _ in range(n_slices)]

    engine = start_engine(max_actors=1)
    loop.start(1).run().get().wait().get()
    lags: list[float] = []
    job = loop.start(12 if quick else 40).run().get()
    with job.on_progress(lambda update: lags.append(time.time() - float(update.message)) if update.message else None):
        slices = job.wait().get()
    end_engine(engine)

    @ray.remote(num_returns="streaming")
    def generator():
        for _ in range(200):
            yield time.time()
            time.sleep(0.005)

    direct = [time.time() - ray.get(ref) for ref in generator.remote()]
    without, with_reports = (median(column) for column in zip(*slices, strict=True))
    slowdown = (median(a / b for a, b in slices) - 1) * 100
    lag, reference = median(lags) * 1000, median(direct) * 1000
    return [
        Row("P7 slowdown by report() in a loop", f"{with_reports:,.0f} reports/s", f"{without:,.0f} units/s",
            slowdown, 5, 1, unit="%", lower=True),
        Row("P7 lag to a subscriber, p50", f"{lag:.1f} ms", f"{reference:.1f} ms streaming generator", lag, 60, 10,
            unit=" ms", lower=True),
    ]  # fmt: skip
