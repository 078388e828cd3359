"""Who waits for the end of a job in this process, and how it is told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from koan_ray import threads
from koan_ray.domain.records import ErrorInfo
from koan_ray.domain.status import JobStatus
from koan_ray.errors import JobCancelledError, JobFailedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from koan_ray.domain.records import End, JobView
    from koan_ray.jobs import Job
    from koan_ray.pending import Pending

_get, _set = object.__getattribute__, object.__setattr__  # see `seen`


class Wait(NamedTuple):
    """Who is told of the end of one job."""

    pending: Pending[Any] | None  # None: the job in hand is brought up to date, and nobody is told
    job: Job[Any, Any] | None
    told: Callable[[End | BaseException], None] | None = None  # instead of a pending
    is_part: bool = False  # for a chunk of items, which nobody else can know


class Chunk:
    """Jobs that were accepted together. Who waits for one of them will wait for the others: all are watched at once."""

    __slots__ = ("jobs",)

    def __init__(self) -> None:
        self.jobs: list[Job[Any, Any]] = []


def tell(wait: Wait, outcome: End | BaseException) -> None:
    """Bring the job in hand up to date with its end, and give whoever waits the outcome, or the error of the wait."""
    if wait.told is not None:
        threads.guarded("end_not_delivered", wait.told, outcome)
    elif isinstance(outcome, BaseException):
        if wait.pending is not None:
            wait.pending.fail(outcome)
    elif wait.job is not None:
        job, end = wait.job, outcome
        view = _get(job, "_view")._replace(
            status=end.status, reason=end.reason, result=end.result, error=end.error, queued_at=end.queued_at,
            started_at=end.started_at, completed_at=end.completed_at, last_modified=end.last_modified,
            attempts=end.attempts, progress=end.progress, cancel_requested=end.cancel_requested, items=end.items,
        )  # fmt: skip
        _set(job, "_view", view)
        if wait.pending is not None:
            conclude(wait.pending, job)


def conclude(pending: Pending[Any], job: Job[Any, Any]) -> None:
    """Give a pending wait the outcome of its job, which has ended."""
    view: JobView = _get(job, "_view")
    if view.status == JobStatus.COMPLETED:
        pending.resolve_with(_result, job)  # decoded where it is looked at: its validators are the user's
    elif view.status == JobStatus.CANCELLED:
        pending.fail(JobCancelledError(view.id, view.kind, view.reason))
    else:
        info = view.error or ErrorInfo("", "")
        reason = view.reason or ""
        pending.fail(JobFailedError(view.id, view.kind, reason, info.type, info.message, view.attempts, info.stack_trace))


# A job in hand is of the user's class, whose attribute access may be its own: frozen, counted, or plain wrong.
# Read and written past all of that, it is what we made.


def seen(job: Job[Any, Any]) -> JobView:
    """Return what this job was last seen as."""
    view: JobView = _get(job, "_view")
    return view


def show(job: Job[Any, Any], view: JobView) -> None:
    """Bring a job in hand up to date."""
    _set(job, "_view", view)


def _result(job: Job[Any, Any]) -> Any:
    return job.result
