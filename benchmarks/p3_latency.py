"""P3: `run()` + `wait()` of a no-op job, one at a time, against the round trip of a call to a warm plain actor.

The floor of this shape is two round trips: driver → coordinator → job actor and back. Rounds alternate; medians of p50.

Where the time goes (perf_counter on each side of every hop; one round trip is about 0.75 ms here): four transits of a Ray
call, 0.3–0.4 ms each; two `.remote()` calls, 0.2–0.3 ms each; four hops between a Ray thread and an event loop or a body
thread, 0.05–0.15 ms each; deciding and writing, 0.1 ms. A job whose kind is known to take under a millisecond is answered
together with its submission (`koan_ray.engine.lingering`), which spares a third round trip.
"""

from __future__ import annotations

import time

from benchmarks._harness import Row, end_engine, median, start_engine, start_ray


def run(quick: bool) -> list[Row]:
    import ray

    import koan_ray as koan

    n, rounds = (200, 3) if quick else (500, 7)

    @koan.job(kind="p3.noop")
    def noop(x: int) -> int:
        return x

    @ray.remote(num_cpus=0)
    class Plain:
        def call(self, x):
            return x

    def p50(action) -> float:
        taken = []
        for i in range(n):
            began = time.perf_counter()
            action(i)
            taken.append(time.perf_counter() - began)
        return median(taken) * 1000

    start_ray()
    engine = start_engine(max_actors=1)
    actor = Plain.remote()
    ours, plain = [], []
    for i in range(200):
        ray.get(actor.call.remote(i))
        noop.start(i).run().get().wait().get()
    for _ in range(rounds):
        plain.append(p50(lambda i: ray.get(actor.call.remote(i))))
        ours.append(p50(lambda i: noop.start(i).run().get().wait().get()))
    end_engine(engine)
    ray.kill(actor)
    ratio = median(ours) / median(plain)
    row = Row("P3 run() + wait(), p50", f"{median(ours):.2f} ms", f"{median(plain):.2f} ms a call", ratio, 3, 2, lower=True)
    return [row]
