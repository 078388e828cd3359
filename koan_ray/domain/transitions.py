"""One constructor for each way a job may move; whatever is not listed is refused.

::

    Created ──► Queued ──► Running ──► Completed | Failed | Cancelled
       │          │  ▲        │
       │          │  └────────┘  retry, reschedule, interrupt, loss
       └──────────┴──► Cancelled | Failed(deadline, unknown kind)

The functions return the job's next record; the coordinator's writer stores it under compare-and-set on ``rev``.
A cancel request found by a failure, retry, reschedule or loss turns the move into `cancelled`; a success stays a success.

Of one job ``created_at``, ``queued_at``, ``started_at`` and ``completed_at`` never go back, whatever clock wrote them: an
instant by a clock that was set back since counts as the one before it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from koan_ray.domain.records import ErrorInfo
from koan_ray.domain.status import ExecutionStatus, FailureKind, JobStatus, Reason
from koan_ray.errors import IllegalTransitionError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from koan_ray.domain.records import ExecutionRecord, JobRecord, Progress

NEXT: Final[Mapping[JobStatus, frozenset[JobStatus]]] = {  # a status with no row is final
    JobStatus.CREATED: frozenset({JobStatus.QUEUED, JobStatus.CANCELLED}),
    JobStatus.QUEUED: frozenset({JobStatus.RUNNING, JobStatus.CANCELLED, JobStatus.FAILED}),
    JobStatus.RUNNING: frozenset({JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.QUEUED}),
}
_NOWHERE: Final[frozenset[JobStatus]] = frozenset()


def _change(job: JobRecord, to: JobStatus, at: float, **changes: Any) -> JobRecord:
    if to not in NEXT.get(job.status, _NOWHERE):
        raise IllegalTransitionError(job.id, job.status, to)
    return job.evolve(status=to, last_modified=at, **changes)


def _end(job: JobRecord, at: float) -> float:
    """Return when a job has ended: not before it began, was accepted, or was made."""
    return max(at, job.started_at or job.queued_at or job.created_at)


def queued(job: JobRecord, *, at: float, due_at: float | None = None) -> JobRecord:
    """T1, T2: the job is accepted and waits; until ``due_at`` when it was delayed."""
    if job.status is not JobStatus.CREATED:
        raise IllegalTransitionError(job.id, job.status, JobStatus.QUEUED)
    reason = Reason.DELAY if due_at is not None else None
    return _change(job, JobStatus.QUEUED, at, queued_at=max(at, job.created_at), due_at=due_at, reason=reason)


def dispatched(job: JobRecord, execution_id: str, *, at: float) -> JobRecord:
    """T3: a new execution begins; ``execution_id`` is the only one whose reports count from now on."""
    if job.status is not JobStatus.QUEUED or job.cancel_requested_at is not None:
        raise IllegalTransitionError(job.id, job.status, JobStatus.RUNNING)
    nxt = job.evolve()  # assigned one by one: this is the hottest transition, and keywords cost
    nxt.status = JobStatus.RUNNING
    nxt.execution_id = nxt.last_execution_id = execution_id
    nxt.attempts = job.attempts + 1
    nxt.ordinal = job.ordinal + 1
    if job.started_at is None:
        nxt.started_at = at if job.queued_at is None or at >= job.queued_at else job.queued_at
    nxt.due_at = None
    nxt.reason = None
    nxt.last_modified = at
    return nxt


def completed(job: JobRecord, result: bytes, *, at: float, progress: Progress | None = None) -> JobRecord:
    """T5: the body returned ``result``. A cancel request that came too late does not change that."""
    if job.status is not JobStatus.RUNNING:
        raise IllegalTransitionError(job.id, job.status, JobStatus.COMPLETED)
    nxt = job.evolve()
    nxt.status = JobStatus.COMPLETED
    nxt.execution_id = None
    nxt.result = result
    nxt.error = None
    nxt.reason = None
    nxt.progress = progress or job.progress
    nxt.completed_at = at if job.started_at is None or at >= job.started_at else job.started_at
    nxt.last_modified = at
    return nxt


def failed(job: JobRecord, kind: FailureKind, error: ErrorInfo, *, at: float) -> JobRecord:
    """T6, T11, T13: no attempt is left, or another cannot help."""
    if job.cancel_requested_at is not None:
        return cancelled(job, at=at, error=error)
    return _change(
        job, JobStatus.FAILED, at, reason=kind, error=error, execution_id=None, completed_at=_end(job, at), due_at=None
    )  # fmt: skip


def retry_later(job: JobRecord, error: ErrorInfo, *, at: float, due_at: float) -> JobRecord:
    """T7: the attempt failed and another is due at ``due_at``."""
    return _back(job, Reason.RETRY, at=at, due_at=due_at, error=error)


def rescheduled(job: JobRecord, *, at: float, due_at: float) -> JobRecord:
    """T9: later, by the job's own choice; the attempt is given back."""
    return _back(job, Reason.RESCHEDULED, at=at, due_at=due_at, attempts=job.attempts - 1)


def interrupted(job: JobRecord, *, at: float) -> JobRecord:
    """T9: stopped by the engine for another's sake; the attempt is given back."""
    return _back(job, Reason.INTERRUPTED, at=at, attempts=job.attempts - 1)


def returned(job: JobRecord, *, at: float) -> JobRecord:
    """T9: dispatched but not begun; as if it had never been dispatched, but for the ordinal."""
    nxt = _back(job, None, at=at, attempts=job.attempts - 1)
    if job.ordinal == 1 and nxt.status is JobStatus.QUEUED:
        nxt.started_at = None
    return nxt


def lost(job: JobRecord, error: ErrorInfo, *, at: float) -> JobRecord:
    """T11: the process vanished. Crashes have a budget of their own: failures are ``attempts - crashes``."""
    return _back(job, Reason.LOST, at=at, error=error, crashes=job.crashes + 1)


def cancel_requested(job: JobRecord, *, at: float, reason: str | None = None) -> JobRecord:
    """T10: the running job shall stop. Asked twice, the first request stands."""
    if job.status is not JobStatus.RUNNING:
        raise IllegalTransitionError(job.id, job.status, JobStatus.CANCELLED)
    if job.cancel_requested_at is not None:
        return job
    return job.evolve(cancel_requested_at=at, reason=reason, last_modified=at)


def cancelled(job: JobRecord, *, at: float, reason: str | None = None, error: ErrorInfo | None = None) -> JobRecord:
    """T8, T12: the job ends as cancelled."""
    requested = job.cancel_requested_at if job.cancel_requested_at is not None else at
    why = job.reason if job.cancel_requested_at is not None else reason
    return _change(
        job, JobStatus.CANCELLED, at, execution_id=None, completed_at=_end(job, at), due_at=None,
        cancel_requested_at=requested,
        reason=why, error=error or job.error,
    )  # fmt: skip


def _back(job: JobRecord, reason: Reason | None, *, at: float, due_at: float | None = None, **changes: Any) -> JobRecord:
    """Return the running job to the queue, or end it when somebody asked for its cancellation meanwhile."""
    if job.status is not JobStatus.RUNNING:
        raise IllegalTransitionError(job.id, job.status, JobStatus.QUEUED)
    if job.cancel_requested_at is not None:
        return cancelled(job, at=at)
    return _change(job, JobStatus.QUEUED, at, reason=reason, due_at=due_at, execution_id=None, **changes)


def closure(execution: ExecutionRecord, job: JobRecord, *, at: float) -> ExecutionRecord:
    """Return an execution that a crash left open as its job says that it ended.

    A job is written before its executions, so the job's state is the newer truth: a completed job's last execution
    succeeded, one that failed or waits for another attempt failed with the job's error. What the job does not know of was
    overtaken without a word, and counts as lost.
    """
    ended_at = job.completed_at if job.completed_at is not None else at
    if execution.id != job.last_execution_id or job.status is JobStatus.RUNNING:
        lost_error = ErrorInfo("ProcessLost", "its end was never reported")
        return execution.close(status=ExecutionStatus.FAILED, reason=Reason.LOST, at=at, error=lost_error)
    if job.status is JobStatus.COMPLETED:
        return execution.close(status=ExecutionStatus.SUCCEEDED, reason=Reason.SUCCEEDED, at=ended_at)
    if job.status is JobStatus.CANCELLED:
        return execution.close(status=ExecutionStatus.CANCELLED, reason=Reason.CANCELLED, at=ended_at)
    if job.status is JobStatus.QUEUED:
        reason = Reason(job.reason) if job.reason in set(Reason) else Reason.RETURNED
        given_back = reason in (Reason.RESCHEDULED, Reason.INTERRUPTED, Reason.RETURNED)
        status = ExecutionStatus.CANCELLED if given_back else ExecutionStatus.FAILED
        return execution.close(status=status, reason=reason, at=job.last_modified, error=None if given_back else job.error)
    poison = job.reason == FailureKind.POISON
    return execution.close(
        status=ExecutionStatus.FAILED, reason=Reason.LOST if poison else Reason.FAILED, at=ended_at, error=job.error
    )
