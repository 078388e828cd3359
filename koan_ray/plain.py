"""Jobs and executions as plain JSON values, for commands and for pages.

Users rely on the names: they are those of `koan_ray.Job` and `koan_ray.JobExecution`. Instants are ISO 8601 in UTC,
durations end in ``_s`` and are seconds, what is not known is null. Members are added, never renamed.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

from koan_ray.domain.durations import instant
from koan_ray.exact import masked

if TYPE_CHECKING:
    from koan_ray.domain.records import JobView
    from koan_ray.jobs import Job, JobExecution


def view_of(job: Job[Any, Any]) -> JobView:
    """Return what a job in hand holds."""
    return job._view  # noqa: SLF001 - one package


def job_object(job: Job[Any, Any], *, whole: bool = False) -> dict[str, Any]:
    """Return a job as JSON values; ``whole``: with context, result and the last error's stack trace."""
    view = view_of(job)
    about = view.progress
    found: dict[str, Any] = {
        "id": view.id,
        "kind": view.kind,
        "name": view.name,
        "description": view.description,
        "status": view.status,
        "reason": view.reason,
        "progress": job.progress,
        "progress_message": about.message if about else None,
        "current_step": about.current_step if about else None,
        "total_steps": about.total_steps if about else None,
        "items": view.items._asdict() if view.items is not None else None,
        "estimated_completion": _iso(job.estimated_completion),
        "attempts": view.attempts,
        "last_error": str(view.error) if view.error else None,
        "cancel_requested": view.cancel_requested,
        "correlation_id": view.correlation_id,
        "parent_job_id": view.parent_job_id,
        "metadata": view.metadata or {},
        "created_at": _iso_at(view.created_at),
        "queued_at": _iso_at(view.queued_at),
        "started_at": _iso_at(view.started_at),
        "completed_at": _iso_at(view.completed_at),
        "duration_s": job.duration.total_seconds() if job.duration is not None else None,
        "last_modified": _iso_at(view.last_modified or view.created_at),
    }
    if whole:
        found["context"] = masked(json.loads(view.context))
        found["result"] = masked(json.loads(view.result)) if view.result is not None else None
        found["error"] = view.error._asdict() if view.error else None
    return found


def execution_object(execution: JobExecution) -> dict[str, Any]:
    """Return an execution as JSON values."""
    return {
        "id": execution.id,
        "job_id": execution.job_id,
        "attempt_number": execution.attempt_number,
        "status": execution.status.value,
        "reason": execution.reason,
        "started_at": _iso(execution.started_at),
        "completed_at": _iso(execution.completed_at),
        "duration_s": execution.duration.total_seconds() if execution.duration is not None else None,
        "error_type": execution.error_type,
        "error_message": execution.error_message,
        "stack_trace": execution.stack_trace,
        "metrics": dict(execution.metrics),
    }


def _iso(at: Any) -> str | None:
    return None if at is None else cast("str", at.isoformat())


def _iso_at(at: float | None) -> str | None:
    return _iso(instant(at))
