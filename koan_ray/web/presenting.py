"""Records as the JSON that callers see: secrets replaced, and what their roles do not cover left out."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json

from koan_ray.domain.durations import seconds
from koan_ray.domain.records import ErrorInfo
from koan_ray.domain.records import Progress as ProgressRecord
from koan_ray.domain.status import JobStatus
from koan_ray.domain.texts import first_line, said
from koan_ray.engine.catalog import MEMORY
from koan_ray.errors import KoanRayError
from koan_ray.registry import find
from koan_ray.telemetry import logs
from koan_ray.web.reading import is_archived
from koan_ray.web.redaction import Redactor, clean_schema, clean_text
from koan_ray.web.schemas import Execution, FailedItem, ItemCounts, JobDetail, JobError, JobSummary, Progress
from koan_ray.web.security import Role

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from koan_ray.domain.records import ExecutionRecord, JobRecord
    from koan_ray.domain.retry import RetryPolicy
    from koan_ray.web.security import Principal

_LAST_S = 253_402_300_799.0  # the end of the year 9999
_NONE: Mapping[str, str] = {}
_HIDDEN = ("context", "result", "error.message", "error.stack_trace")


def instant(at: float | None) -> datetime | None:
    """Return an instant as UTC."""
    return None if at is None else moment(at)


def moment(at: float) -> datetime:
    """Return epoch seconds as UTC; what no calendar holds is moved to the nearer end."""
    return datetime.fromtimestamp(min(max(at, 0.0), _LAST_S), UTC)


def summary(job: JobRecord, headline: str | None = None) -> JobSummary:
    """Return a job without its payloads.

    Of its error's message only the ``headline``: what is secret in there is known only to who has read the context.
    """
    found = _summary(job, Redactor())
    if found["error"] is not None:
        found["error"].message = headline
    return JobSummary(**found)


def headline(job: JobRecord) -> str:
    """Return the first line of a complete job's error, without the secrets of its context."""
    redactor = Redactor()
    payload(job, "context", redactor)
    payload(job, "result", redactor)
    return first_line(redactor.text(job.error.message if job.error is not None else "") or "")


def summaries(jobs: Iterable[JobRecord], headlines: Mapping[str, str] = _NONE) -> list[JobSummary]:
    """Return the rows of a list; a job that cannot be shown is left out, and the log says which."""
    found: list[JobSummary] = []
    for job in jobs:
        try:
            found.append(summary(job, headlines.get(job.id)))
        except Exception as error:  # noqa: BLE001 - one odd record must not hide all others
            logs.get_logger().error("job_not_shown", job_id=job.id, problem=said(error, 500))
    return found


def detail(job: JobRecord, who: Principal) -> JobDetail:
    """Return a job with its payloads, if the caller may read them."""
    redactor = Redactor()
    # Whoever asks: what is secret in the context is looked for in the texts.
    context, result = payload(job, "context", redactor), payload(job, "result", redactor)
    may_read = who.may(Role.READER)
    terms = job.terms
    return JobDetail(
        **{**_summary(job, redactor), "error": error_of(job.error, who, redactor)},
        depth=job.particulars.depth,
        timeout_s=terms.timeout_s,
        isolation=terms.isolation.value,
        resources=terms.spec.label,
        retry_policy=retry_policy(terms.retry),
        has_result=job.result is not None,
        context=context if may_read else None,
        result=result if may_read else None,
        hidden=[] if may_read else list(_HIDDEN),
    )


def payload(job: JobRecord, what: str, redactor: Redactor) -> Any:
    """Return the context or result of a job as a JSON value without secrets."""
    encoded = job.context if what == "context" else job.result
    if encoded is None:
        return None
    try:
        value = from_json(encoded)
    except ValueError:
        return None
    value = redactor.value(value, schema_of(job.terms.kind, what))
    # Contents have the names of fields, a schema for people has their aliases.
    return redactor.value(value, schema_of(job.terms.kind, what, by_alias=False)) if _has_aliases(job, what) else value


def _has_aliases(job: JobRecord, what: str) -> bool:
    job_type = find(job.terms.kind)
    if job_type is None:
        return False
    definition = job_type.definition
    try:
        return (definition.context_codec if what == "context" else definition.result_codec).reads_by_name
    except KoanRayError:  # its types cannot be resolved
        return False


def schema_of(kind: str, what: str, *, by_alias: bool = True) -> dict[str, Any] | None:
    """Return the JSON Schema of a kind's context or result, if the kind is defined here and its type has one."""
    job_type = find(kind)
    if job_type is None:
        return None
    definition = job_type.definition
    try:
        adapter = definition.context_adapter if what == "context" else definition.result_adapter
        mode = "validation" if what == "context" else "serialization"
        schema: dict[str, Any] = adapter.json_schema(mode=mode, by_alias=by_alias)  # type: ignore[arg-type]
    except Exception:  # noqa: BLE001 - a type of the user's without a schema; the kind is shown without
        return None
    cleaned: dict[str, Any] = clean_schema(schema)
    return cleaned


def _summary(job: JobRecord, redactor: Redactor) -> dict[str, Any]:
    about, progress = job.particulars, job.progress
    is_final = job.status.is_final
    return {
        "id": job.id,
        "kind": job.terms.kind,
        "name": redactor.text(about.name),
        "description": redactor.text(about.description),
        "status": job.status,
        "reason": redactor.text(job.reason),
        "cancel_requested": job.cancel_requested_at is not None,
        "progress": _share(job.status, progress),
        "progress_message": redactor.text(progress.message) if progress else None,
        "progress_sequence": sequence_of(job),
        "current_step": progress.current_step if progress else None,
        "total_steps": progress.total_steps if progress else None,
        "estimated_completion": instant(progress.estimated_at) if progress and not is_final else None,
        "has_items": job.has_items,
        "items": items_of(job),
        "attempts": job.attempts,
        "max_attempts": job.terms.retry.max_attempts,
        "crashes": job.crashes,
        "error": JobError(type=clean_text(job.error.type)) if job.error is not None else None,
        "correlation_id": redactor.text(about.correlation_id),
        "parent_job_id": about.parent_job_id,
        "retry_of": about.retry_of,
        "metadata": redactor.value(about.metadata or {}),
        "source": about.residence.source or MEMORY,
        "partition": about.residence.partition,
        "archived": is_archived(job),
        "audited": about.residence.audit,
        "created_at": moment(job.created_at),
        "queued_at": instant(job.queued_at),
        "due_at": instant(job.due_at),
        "started_at": instant(job.started_at),
        "completed_at": instant(job.completed_at),
        "duration_s": duration_s(job),
        "last_modified": instant(job.last_modified or None),
    }


def duration_s(job: JobRecord) -> float | None:
    """Return the seconds from the first attempt's begin to the end; None before."""
    if job.started_at is None or job.completed_at is None:
        return None
    return round(max(0.0, job.completed_at - job.started_at), 6)


def sequence_of(job: JobRecord) -> int:
    """Return the sequence of the job's progress; its end is one more than its last report, as watchers are told."""
    last = job.progress.sequence if job.progress else 0
    return last + 1 if job.status.is_final else last


def items_of(job: JobRecord) -> ItemCounts | None:
    """Return how far the items of a batch are; None for other jobs."""
    done = job.checkpoint
    if done is None:
        return None
    return ItemCounts(total=done.total, processed=done.processed, failed=done.failed, skipped=done.skipped)


def _share(status: JobStatus, progress: ProgressRecord | None) -> float:
    if status is JobStatus.COMPLETED:
        return 1.0
    return min(1.0, max(0.0, progress.percentage)) if progress else 0.0


def progress_of(job: JobRecord) -> Progress:
    """Return the latest progress of a job."""
    state = job.progress or ProgressRecord(0, 0.0)
    state = state._replace(sequence=sequence_of(job), updated_at=state.updated_at or job.last_modified)
    return progress_state(job.id, state, job.status)


def progress_state(job_id: str, progress: ProgressRecord, status: JobStatus) -> Progress:
    """Return a progress record of a job with this status."""
    return Progress(
        job_id=job_id,
        sequence=progress.sequence,
        status=status,
        percentage=_share(status, progress),
        message=clean_text(progress.message) if progress.message else None,
        current_step=progress.current_step,
        total_steps=progress.total_steps,
        estimated_completion=None if status.is_final else instant(progress.estimated_at),
        updated_at=instant(progress.updated_at or None),
    )


def error_of(error: ErrorInfo | None, who: Principal, redactor: Redactor) -> JobError | None:
    """Return an error as data; its texts may repeat what a payload holds, and are for readers."""
    if error is None:
        return None
    may_read = who.may(Role.READER)
    return JobError(
        type=clean_text(error.type),
        message=redactor.text(error.message) if may_read else None,
        stack_trace=(redactor.text(error.stack_trace) or None) if may_read else None,
    )


def execution(record: ExecutionRecord, who: Principal, redactor: Redactor) -> Execution:
    """Return one try of a job."""
    metrics = dict(record.metrics)
    if (where := metrics.pop("where", None)) is not None:
        metrics.update(node_id=where.node_id, actor_id=where.actor_id, pid=where.pid)
    took = None if record.completed_at is None else round(max(0.0, record.completed_at - record.started_at), 6)
    return Execution(
        id=record.id,
        job_id=record.job_id,
        attempt_number=record.attempt,
        status=record.status,
        reason=record.reason.value if record.reason else None,
        started_at=moment(record.started_at),
        completed_at=instant(record.completed_at),
        duration_s=took,
        error=error_of(record.error, who, redactor),
        metrics=redactor.value(metrics),
    )


def failed_item(row: dict[str, Any], who: Principal, redactor: Redactor) -> FailedItem:
    """Return an item that is given up, as its batch has noted it down."""
    error = ErrorInfo(str(row.get("error_type", "")), str(row.get("error_message", "")), str(row.get("stack_trace") or ""))
    item = redactor.value(row.get("item"))
    return FailedItem(
        index=int(row.get("index", 0)),
        item=item if who.may(Role.READER) else None,
        error=error_of(error, who, redactor),
        attempts=int(row.get("attempts", 0)),
    )


def retry_policy(policy: RetryPolicy) -> dict[str, Any]:
    """Return a retry policy with durations in seconds."""
    return {
        "max_attempts": policy.max_attempts,
        "strategy": policy.strategy.value,
        "initial_delay_s": seconds(policy.initial_delay, name="initial_delay"),
        "backoff_multiplier": policy.backoff_multiplier,
        "max_delay_s": seconds(policy.max_delay, name="max_delay"),
        "jitter": policy.jitter,
    }


def plain(value: Any) -> Any:
    """Return what the coordinator says of itself as JSON, without credentials."""
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return clean_text(str(value))
