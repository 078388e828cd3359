"""P9: a coordinator is killed while 100,000 durable jobs are queued: how long until jobs are dispatched again.

From SIGKILL to the first job that completes under the next coordinator: Ray starts the process again (about two seconds), it
takes the lease at once because the holder's process is known to be dead, stamps and reads what was running, asks the job
actors, and then takes over the queue in batches of 500, oldest first, dispatching each while the next is stamped.

Where the time goes: in the document server's search for the jobs to stamp (it goes through all of them once), and in the
stamps of the first batch.
"""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import time

from benchmarks._harness import Row, end_engine, start_engine


def run(quick: bool) -> list[Row]:
    from koan_ray.stores.embedded import DocumentServer

    with tempfile.TemporaryDirectory() as directory:
        server = DocumentServer(directory)
        url = asyncio.run(server.start())
        try:
            return measure(url, 10_000 if quick else 100_000)
        finally:
            asyncio.run(server.stop())


def measure(url: str, n: int) -> list[Row]:
    import koan_ray as koan

    @koan.job
    def noop(x: int) -> int:
        return x

    @koan.job
    def held_up(seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    engine = start_engine(max_actors=2, max_finished=1000, sources={"default": {"url": url}})
    noop.start(0).persist().run().get().wait().get()
    blockers = held_up.start_many([5.0] * 2).run().get()  # in memory: they go with the coordinator
    accepted = noop.start_many(range(n)).persist().delayed(1.0).run()
    jobs = accepted.get()
    del blockers
    # Whatever has run by now is done; what is measured are those that are still queued.
    left = koan.Jobs.count(status="queued", source="default").get()
    os.kill(engine.status().get()["pid"], signal.SIGKILL)
    began = time.perf_counter()
    while True:
        try:
            status = engine.status().get(timeout=5)
        except (koan.KoanRayError, TimeoutError):
            continue
        if status["jobs"].get("completed", 0) > 0:
            break
        time.sleep(0.02)
    took = time.perf_counter() - began
    del jobs
    end_engine(engine)
    return [Row("P9 dispatch after a coordinator's death", f"{took:.1f} s", f"{left:,} durable jobs queued", took, 20, 5,
                unit=" s", lower=True)]  # fmt: skip
