"""A job that judges its own failures: should_retry and get_retry_delay see the live exception.

python examples/03_custom_retry.py
"""

from datetime import timedelta

import koan_ray as koan


class RateLimitedError(Exception):
    def __init__(self, retry_after: float) -> None:
        super().__init__(f"too many requests; try again in {retry_after} s")
        self.retry_after = retry_after


class CallApi(koan.Job[str, str]):
    retry = koan.RetryPolicy(max_attempts=3, initial_delay=60)  # a minute, unless the API says otherwise

    def execute(self, context, progress, cancellation) -> str:
        if context == "forbidden":
            raise PermissionError("this key may not do that")
        if self.last_error is None:  # the first attempt
            raise RateLimitedError(retry_after=0.3)
        return "answered"

    def should_retry(self, last_execution: koan.JobExecution) -> bool:
        return not isinstance(last_execution.exception, PermissionError)

    def get_retry_delay(self, last_execution: koan.JobExecution) -> timedelta | None:
        error = last_execution.exception
        return timedelta(seconds=error.retry_after) if isinstance(error, RateLimitedError) else None


if __name__ == "__main__":
    job = CallApi.start("allowed").run().get()
    print(job.wait(timeout=30).get())
    first, second = job.executions().get()
    print(f"waited {(second.started_at - first.completed_at).total_seconds():.1f} s, as the API had asked")

    try:
        CallApi.start("forbidden").run().get().wait(timeout=30).get()
    except koan.JobFailedError as error:
        print(f"not retried: {error.attempts} attempt, {error.error_type}")
