"""P9: a coordinator is killed while 100,000 durable jobs are queued: how long until jobs are dispatched again.

From SIGKILL to the first job of those that completes under the next coordinator: Ray starts the process again (about two
seconds), it takes the lease at once because the holder's process is known to be dead, stamps and reads what was running,
asks the job actors, and then takes over the queue in batches of 500, oldest first, dispatching each while the next is
stamped. The oldest jobs are due at once when the coordinator is back, the others much later: so that neither they run while
the rest is still being accepted, nor compete with what is measured.

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

_N_DUE = 100


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

    @koan.job(kind="p9.noop")
    def noop(x: int) -> int:
        return x

    @koan.job(kind="p9.held_up")
    def held_up(seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    engine = start_engine(max_actors=2, max_finished=1000, sources={"default": {"url": url}})
    noop.start(0).persist().run().get().wait().get()
    blockers = held_up.start_many([600.0] * 2).run().get()  # in memory: they go with the coordinator
    due = noop.start_many(range(_N_DUE)).persist().run().get()
    waiting = noop.start_many(range(n)).persist().delayed(3600).run().get()
    left = koan.Jobs.count(status="queued", source="default").get()
    del blockers, waiting
    os.kill(engine.status().get()["pid"], signal.SIGKILL)
    began = time.perf_counter()
    due[0].wait().get(timeout=180)
    took = time.perf_counter() - began
    end_engine(engine)
    return [Row("P9 dispatch after a coordinator's death", f"{took:.1f} s", f"{left:,} durable jobs queued", took, 20, 5,
                unit=" s", lower=True)]  # fmt: skip
