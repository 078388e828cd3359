"""What must be true of stored jobs, read off their documents; for ``koan-ray doctor`` and the tests of faults.

The numbers are those of the reliability rules: I4 one outcome for each execution, I5 closed executions at rest, I6 a
completed job's last execution succeeded, I7 nothing runs without an owner, I8 budgets, I9 a cancelled job stays so, I12
items are accounted for, I13 children of a job that has ended, I14 a job is in one place.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, Protocol

from koan_ray.domain.status import ExecutionStatus, JobStatus, ParentPolicy

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from koan_ray.domain.records import ExecutionRecord, JobRecord


class Known(Protocol):
    """What is to be known of another job, or of another copy of one: a record, or less."""

    @property
    def id(self) -> str: ...

    @property
    def status(self) -> JobStatus: ...


class Violation(NamedTuple):
    """One thing that is not as it must be."""

    invariant: str  # such as ``I5``
    job_id: str
    what: str

    def __str__(self) -> str:
        return f"{self.invariant} job {self.job_id}: {self.what}"


def check_job(
    job: JobRecord,
    executions: Sequence[ExecutionRecord],
    *,
    parent: Known | None = None,
    max_crashes: int | None = None,
    overdue_before: float | None = None,
) -> Iterator[Violation]:
    """Yield what is wrong with one job.

    Args:
        job: As stored.
        executions: All of them, oldest first; empty for a job without audit.
        parent: The job it was started under, as far as it is stored.
        max_crashes: The engine's limit, where it is known.
        overdue_before: A running job that was not touched since, and is not owned by a live coordinator, is stuck.
    """
    yield from _check_state(job, max_crashes, overdue_before)
    if job.particulars.residence.audit:
        yield from _check_executions(job, executions)
    if parent is not None and parent.status.is_final:
        may_go_on = job.status.is_final or job.cancel_requested_at is not None
        if not may_go_on and job.terms.when_parent_ends is not ParentPolicy.ABANDON:
            yield Violation("I13", job.id, f"goes on although its parent {parent.id} is {parent.status}")


def check_placement(places: Sequence[tuple[Known, str]]) -> Iterator[Violation]:
    """Yield what is wrong with the copies of one job, each with the name of its partition."""
    finals = {job.status for job, _ in places if job.status.is_final}
    if len(finals) > 1:
        job_id = places[0][0].id
        yield Violation("I2", job_id, f"has ended as {' and as '.join(sorted(finals))}")
    if len(places) > 1 and any(not job.status.is_final for job, _ in places):
        names = ", ".join(repr(name) for _, name in places)
        yield Violation("I14", places[0][0].id, f"is in several partitions ({names}) and has not ended in all of them")


def _check_state(job: JobRecord, max_crashes: int | None, overdue_before: float | None) -> Iterator[Violation]:
    failures = job.attempts - job.crashes
    if failures > job.terms.retry.max_attempts:
        yield Violation("I8", job.id, f"has used {failures} attempts of {job.terms.retry.max_attempts}")
    if max_crashes is not None and job.crashes > max_crashes:
        yield Violation("I8", job.id, f"was lost {job.crashes} times, the limit is {max_crashes}")
    if job.status.is_final and job.completed_at is None:
        yield Violation("I2", job.id, f"is {job.status} and has no completed_at")
    if job.status.is_final and job.execution_id is not None:
        yield Violation("I5", job.id, f"is {job.status} and names {job.execution_id} as running")
    if job.status is JobStatus.RUNNING and job.execution_id is None:
        yield Violation("I7", job.id, "is running and names no execution")
    if job.status is JobStatus.COMPLETED and job.result is None:
        yield Violation("I6", job.id, "is completed and has no result")
    if job.status is JobStatus.QUEUED and job.cancel_requested_at is not None:
        yield Violation("I9", job.id, "is queued although its cancellation was asked for")
    if (done := job.checkpoint) is not None and done.total is not None:
        n_done = done.processed + done.skipped + done.failed
        if n_done > done.total:
            yield Violation("I12", job.id, f"counts {n_done} items that have ended, and there are {done.total}")
    is_overdue = overdue_before is not None and job.last_modified < overdue_before
    if job.status is JobStatus.RUNNING and is_overdue:
        yield Violation("I7", job.id, "is running and nobody has touched it for long")


def _check_executions(job: JobRecord, executions: Sequence[ExecutionRecord]) -> Iterator[Violation]:
    doubled = [execution_id for execution_id, n in Counter(e.id for e in executions).items() if n > 1]
    for execution_id in doubled:
        yield Violation("I4", job.id, f"execution {execution_id} is there more than once")
    left_open = [e.id for e in executions if e.status is ExecutionStatus.RUNNING and e.id != job.execution_id]
    for execution_id in left_open:
        yield Violation("I5", job.id, f"execution {execution_id} was never closed")
    succeeded = [e for e in executions if e.status is ExecutionStatus.SUCCEEDED]
    if len(succeeded) > 1:
        yield Violation("I4", job.id, f"{len(succeeded)} executions have succeeded")
    if job.status.is_final and job.last_execution_id not in {None, *(e.id for e in executions)}:
        yield Violation("I5", job.id, f"its last execution {job.last_execution_id} is not there")
    if job.status is JobStatus.COMPLETED and not (executions and executions[-1].status is ExecutionStatus.SUCCEEDED):
        yield Violation("I6", job.id, "is completed and its last execution has not succeeded")
    if job.status is not JobStatus.COMPLETED and succeeded:
        yield Violation("I6", job.id, f"is {job.status} although an execution has succeeded")
    used = [e for e in executions if e.status in (ExecutionStatus.FAILED, ExecutionStatus.SUCCEEDED)]
    if job.status.is_final and len(used) > job.attempts:
        yield Violation("I8", job.id, f"counts {job.attempts} attempts, and {len(used)} executions used one")
    for earlier, later in pairwise(executions):
        if earlier.attempt > later.attempt:
            yield Violation("I4", job.id, f"attempt {later.attempt} began after attempt {earlier.attempt}")
