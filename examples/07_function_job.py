"""A function as a job. `progress` and `cancellation` are found by name and optional.

python examples/07_function_job.py
"""

import koan_ray as koan


@koan.job
def word_count(text: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for word in text.lower().split():
        counts[word] = counts.get(word, 0) + 1
    return counts


@koan.job(kind="slow-hello", timeout=30, retry=koan.RetryPolicy(max_attempts=2))
async def hello(name: str, progress: koan.JobProgress) -> str:
    progress.report(0.5, "thinking")
    return f"hello {name}"


if __name__ == "__main__":
    # start_many is the fast way in: contexts stream out while results come back.
    jobs = word_count.start_many(["to be or not to be", "be quick", "not now"]).run().get()
    print([job.wait().get() for job in jobs])

    job = hello.start("world").run().get()
    print(job.kind, "->", job.wait().get())
