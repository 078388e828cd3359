"""No event loop anywhere: every operation returns a Pending that has already started, and .get() blocks for it.

python examples/09_plain_script.py
"""

import time

import koan_ray as koan


class Nap(koan.Job[float, str]):
    async def execute(self, context, progress, cancellation) -> str:
        import asyncio

        await asyncio.sleep(context)
        return f"slept {context} s"


if __name__ == "__main__":
    with koan.init() as engine:
        short, long = Nap.start(0.1).run().get(), Nap.start(60.0).run().get()
        print(short.wait().get(timeout=30))

        try:
            long.wait(timeout=0.2).get()
        except TimeoutError:
            print("still asleep; a timeout of wait() does not touch the job")

        long.cancel("that was long enough").get()
        try:
            long.wait().get()
        except koan.JobCancelledError as error:
            print(f"cancelled: {error.reason}")

        began = time.perf_counter()
        jobs = Nap.start_many([0.0] * 1000).run().get()
        done = sum(job.wait().get() is not None for job in jobs)
        print(f"{done} jobs in {time.perf_counter() - began:.2f} s")
        print(f"{engine.status().get()['running']} jobs are running now")
