"""A job that fails is tried again: how often and how soon is the class's RetryPolicy.

python examples/02_retry.py
"""

import tempfile
from datetime import timedelta
from pathlib import Path

import koan_ray as koan


class Fetch(koan.Job[str, str]):
    """Fails until its counter file has been touched three times, like a service that comes up slowly."""

    retry = koan.RetryPolicy(
        max_attempts=5,
        strategy=koan.RetryStrategy.EXPONENTIAL_BACKOFF,
        initial_delay=timedelta(seconds=0.2),
        backoff_multiplier=2.0,
        max_delay=10,
    )

    def execute(self, context, progress, cancellation) -> str:
        counter = Path(context)
        counter.write_text(counter.read_text() + "x")
        if len(counter.read_text()) < 3:
            raise ConnectionError("service is not up yet")
        return "fetched"


class Validate(koan.Job[int, int]):
    """Some failures cannot be helped by another attempt: NonRetryable ends the job at once."""

    def execute(self, context, progress, cancellation) -> int:
        if context < 0:
            raise koan.NonRetryable(ValueError("negative amounts are never valid"))
        return context


if __name__ == "__main__":
    with tempfile.NamedTemporaryFile() as counter:
        job = Fetch.start(counter.name).run().get()
        print(job.wait().get())
        for execution in job.executions().get():
            what = f"{execution.status.value} ({execution.reason})"
            print(f"attempt {execution.attempt_number}: {what}", execution.error_message or "")

    try:
        Validate.start(-1).run().get().wait().get()
    except koan.JobFailedError as error:
        print(f"failed after {error.attempts} attempt: {error.failure}: {error.error_message}")
