"""Watching a job: as a stream, and with a handler. A late watcher first gets the latest state.

python examples/05_progress.py
"""

import time

import koan_ray as koan


class Import(koan.Job[int, int]):
    def execute(self, context, progress, cancellation) -> int:
        for row in range(1, context + 1):
            time.sleep(0.02)
            # Cheap: a local assignment. The newest state is sent on every few tens of milliseconds.
            progress.report(row, context, f"row {row}")
            if cancellation.requested:
                break
        return row


if __name__ == "__main__":
    job = Import.start(100).run().get()
    for update in job.progress_stream().blocking():  # `async for` in a coroutine
        print(f"{update.percentage:4.0%} {update.message}  done at {update.estimated_completion}  [{update.status.value}]")

    job = Import.start(150).run().get()
    seen = []
    with job.on_progress(lambda update: seen.append(update.percentage)):
        rows = job.wait().get()
    print(f"imported {rows} rows, a handler saw {(len(seen) > 1 and 'several') or 'too few'} updates")
