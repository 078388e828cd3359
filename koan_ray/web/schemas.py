"""What goes over the wire: the JSON of requests and responses, as pydantic models. Instants are ISO 8601 in UTC.

Fields without a value are ``null`` and never left out. What a caller's roles do not cover is ``null``, too, and named in
``hidden`` of a job: error messages and stack traces may repeat what a payload holds, so they are for readers.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool

from koan_ray.domain.query import ORDERS
from koan_ray.domain.status import ExecutionStatus, JobStatus

MAX_NAME = 500
MAX_TEXT = 10_000
MAX_REASON = 500
MAX_SECONDS = 10 * 365 * 86_400.0
_KIND = r"^[^\x00-\x1f\x7f]{1,200}$"
_PARTITION = r"^([a-z0-9_-]{1,64}|\*)?$"
_SOURCE = r"^[A-Za-z0-9_.-]{1,64}$"
JOB_ID = r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"


def _checked_flag(value: object) -> object:
    if value not in (True, False, "true", "false") or isinstance(value, int | float) is not isinstance(value, bool):
        msg = f"expected true or false, got {value!r:.50}"
        raise ValueError(msg)
    return value


Kind = Annotated[str, Field(pattern=_KIND)]
Flag = Annotated[bool, BeforeValidator(_checked_flag)]  # in a query; pydantic alone takes 0, off, yes, …
JobId = Annotated[str, Field(pattern=JOB_ID, description="A UUID in lower case.")]
Order = Literal["created_at", "-created_at", "queued_at", "-queued_at", "started_at", "-started_at", "completed_at",
                "-completed_at"]  # fmt: skip
assert set(Order.__args__) == {sign + name for name in ORDERS for sign in ("", "-")}  # type: ignore[attr-defined]  # noqa: S101


class Answer(BaseModel):
    """Part of a response."""

    model_config = ConfigDict(json_schema_serialization_defaults_required=True)


class Ask(BaseModel):
    """Part of a request; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")


# --- problems --------------------------------------------------------------------------------------------------------


class FieldProblem(Answer):
    """One thing that is wrong with a request; ``field`` as in ``body.context.to`` or ``query.limit``."""

    field: str
    message: str


class Problem(Answer):
    """An error, as RFC 9457 has it (``application/problem+json``); ``detail`` says what to do about it."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    request_id: str
    errors: list[FieldProblem] = []


# --- jobs ------------------------------------------------------------------------------------------------------------


class JobError(Answer):
    """How an attempt failed. ``message`` and ``stack_trace`` are for the role reader; lists have the first line of one."""

    type: str
    message: str | None = None
    stack_trace: str | None = None


class ItemCounts(Answer):
    """How far the items of a batch are."""

    total: int | None = None
    processed: int = 0
    failed: int = 0
    skipped: int = 0


class Progress(Answer):
    """The latest progress of a job; ``percentage`` from 0 to 1. ``sequence`` grows."""

    job_id: str
    sequence: int
    status: JobStatus
    percentage: float
    message: str | None = None
    current_step: int | None = None
    total_steps: int | None = None
    estimated_completion: datetime | None = None
    updated_at: datetime | None = None


class JobSummary(Answer):
    """A job without its payloads: a row of a list, and what events carry."""

    id: str
    kind: str
    name: str | None
    description: str | None
    status: JobStatus
    reason: str | None = Field(description="Why it waits, has failed or was cancelled.")
    cancel_requested: bool
    progress: float
    progress_message: str | None
    progress_sequence: int
    current_step: int | None
    total_steps: int | None
    estimated_completion: datetime | None
    has_items: bool = Field(description="A batch: a job over items.")
    items: ItemCounts | None = Field(description="Of a batch, from its first checkpoint on; null for other jobs.")
    attempts: int
    max_attempts: int
    crashes: int
    error: JobError | None
    correlation_id: str | None
    parent_job_id: str | None
    retry_of: str | None = Field(description="The job that this one runs anew.")
    metadata: dict[str, Any]
    source: str = Field(description="Where it is kept: the name of a source, or memory.")
    partition: str
    archived: bool
    audited: bool = Field(description="Each execution is kept as a document.")
    created_at: datetime
    queued_at: datetime | None
    due_at: datetime | None
    started_at: datetime | None
    completed_at: datetime | None
    duration_s: float | None
    last_modified: datetime | None


class JobDetail(JobSummary):
    """One job, with what it was started with, for those who may read that."""

    depth: int
    timeout_s: float | None
    isolation: str
    resources: str
    retry_policy: dict[str, Any]
    has_result: bool
    context: Any = Field(None, description="For the role reader; secrets are replaced.")
    result: Any = Field(None, description="For the role reader; secrets are replaced.")
    hidden: list[str] = Field(default=[], description="What the caller's roles do not cover.")


class JobPage(Answer):
    """A page of jobs; ``cursor`` leads to the next, and is null on the last."""

    items: list[JobSummary]
    cursor: str | None


class Payload(Answer):
    """The context or result of a job, as JSON; secrets are replaced."""

    job_id: str
    value: Any


class Execution(Answer):
    """One try of a job."""

    id: str
    job_id: str
    attempt_number: int
    status: ExecutionStatus
    reason: str | None
    started_at: datetime
    completed_at: datetime | None
    duration_s: float | None
    error: JobError | None
    metrics: dict[str, Any]


class Executions(Answer):
    """The tries of a job, oldest first."""

    items: list[Execution]


class TreeNode(Answer):
    """A job and the jobs below it; ``more``: it has children that this answer leaves out."""

    job: JobSummary
    children: list[TreeNode]
    more: bool = False


class Tree(Answer):
    """The tree that a job belongs to, from its root; ``job_id`` is the one that was asked for."""

    job_id: str
    root: TreeNode
    n_jobs: int
    truncated: bool


class FailedItem(Answer):
    """An item of a batch that is given up."""

    index: int
    item: Any = Field(None, description="For the role reader; secrets are replaced.")
    error: JobError | None
    attempts: int


class FailedItems(Answer):
    """A page of the dead items of a batch."""

    items: list[FailedItem]
    cursor: str | None


# --- requests --------------------------------------------------------------------------------------------------------


class JobFilters(Ask):
    """Which jobs; everything that is given must hold."""

    kind: Annotated[list[Kind], Field(max_length=50)] | None = None
    status: Annotated[list[JobStatus], Field(max_length=6)] | None = None
    correlation_id: Annotated[str, Field(max_length=MAX_NAME)] | None = None
    parent_job_id: JobId | None = None
    name: Annotated[str, Field(max_length=MAX_NAME)] | None = None
    text: Annotated[str, Field(min_length=1, max_length=200)] | None = Field(
        None, description="Part of name, description, kind or error message, whatever the case."
    )
    created_after: datetime | None = None
    created_before: datetime | None = None
    completed_after: datetime | None = None
    completed_before: datetime | None = None
    has_items: Flag | None = Field(None, description="True: only jobs over items (batches); false: only others.")
    source: Annotated[str, Field(pattern=_SOURCE)] | None = None
    partition: Annotated[str, Field(pattern=_PARTITION)] | None = Field(
        None, description="Null: all but the archives. '*': all."
    )


class ListQuery(JobFilters):
    """A page of jobs."""

    metadata: Annotated[str, Field(max_length=4000)] | None = Field(
        None, description='A JSON object of values to match, such as {"tenant": 7}.', examples=['{"tenant": 7}']
    )
    order_by: Order = "-created_at"
    limit: Annotated[int, Field(ge=1, le=1000)] = 100
    cursor: Annotated[str, Field(max_length=400)] | None = None


class PageQuery(Ask):
    """A page of what belongs to one job."""

    limit: Annotated[int, Field(ge=1, le=1000)] = 100
    cursor: Annotated[str, Field(max_length=400)] | None = None


class BulkFilters(JobFilters):
    """The filters of a cancel or retry of many jobs; metadata as an object."""

    metadata: dict[Annotated[str, Field(min_length=1, max_length=200)], Any] | None = None


class BulkAsk(Ask):
    """Cancel or retry all jobs that match. First without ``expected``: that only counts."""

    filters: BulkFilters
    expected: Annotated[int, Field(ge=0, le=100_000)] | None = Field(
        None, description="How many the count said; nothing happens if that is no longer so. Null: only count."
    )
    reason: Annotated[str, Field(max_length=MAX_REASON)] | None = None


class BulkAnswer(Answer):
    """How many matched, and what became of them."""

    counted: int
    dry_run: bool
    done: int = 0
    skipped: int = Field(0, description="They had changed in between, or were gone.")
    failed: int = 0
    errors: list[FieldProblem] = Field(default=[], description="Of the first twenty that failed; field is the id.")
    jobs: list[str] = Field(default=[], description="Ids of the first hundred: cancelled jobs, or the new ones.")


class Persist(Ask):
    """Where the job is kept; null for what the settings say."""

    source: Annotated[str, Field(pattern=_SOURCE)] | None = None
    partition: Annotated[str, Field(pattern=r"^[a-z0-9_-]{0,64}$")] | None = None


class SubmitAsk(Ask):
    """Start a job. ``persist`` null or false: in memory; true: as the settings say."""

    kind: Kind
    context: Any = None
    persist: Persist | StrictBool | None = None
    audit: StrictBool = False
    name: Annotated[str, Field(max_length=MAX_NAME)] | None = None
    description: Annotated[str, Field(max_length=MAX_TEXT)] | None = None
    metadata: dict[Annotated[str, Field(min_length=1, max_length=200)], Any] | None = None
    correlation_id: Annotated[str, Field(max_length=MAX_NAME)] | None = None
    delay_s: Annotated[float, Field(ge=0, le=MAX_SECONDS, allow_inf_nan=False)] = 0.0


class CancelAsk(Ask):
    """Cancel a job and its children."""

    reason: Annotated[str, Field(max_length=MAX_REASON)] | None = None


class RetryAsk(Ask):
    """Run a job anew. ``resume``: a batch goes on from its checkpoint; what its items have produced is not done again."""

    resume: StrictBool = False


class ArchiveAsk(Ask):
    """Apply the archival policies now; ``dry_run``: only count."""

    dry_run: StrictBool = False


class LoginAsk(Ask):
    """Exchange a token for a cookie."""

    token: Annotated[str, Field(min_length=1, max_length=500)]


# --- the rest --------------------------------------------------------------------------------------------------------


class Cancelled(Answer):
    """The status after a cancel: ``cancelled`` is final, ``running`` ends soon."""

    job_id: str
    status: JobStatus


class KindSummary(Answer):
    """A job class. ``is_known``: defined in the API's process, so that jobs of it can be started here."""

    kind: str
    description: str | None
    is_known: bool
    is_runnable: bool = Field(description="The engine has its class.")
    n_unroutable: int = Field(description="Stored jobs that wait for its class.")
    context_schema: dict[str, Any] | None
    result_schema: dict[str, Any] | None
    timeout_s: float | None
    retry_policy: dict[str, Any] | None
    isolation: str | None
    resources: str | None


class Kinds(Answer):
    """All job classes that are known, by name."""

    items: list[KindSummary]


class Count(Answer):
    """A number, and whether there are more than it says."""

    n: int
    more: bool


class Bucket(Answer):
    """A slice of time, from ``at``: jobs that ended in it."""

    at: datetime
    completed: int
    failed: int
    cancelled: int
    p50_s: float | None
    p95_s: float | None


class Window(Answer):
    """What ended within the last ``seconds``. ``sampled``: it is an estimate from the ``n`` that ended last."""

    name: str
    seconds: float
    n: int
    sampled: bool
    throughput_per_s: float
    failure_rate: float | None = Field(description="Failed of those that completed or failed.")
    p50_s: float | None
    p95_s: float | None
    buckets: list[Bucket]


class Overview(Answer):
    """How the engine does. Counts by status are of memory and sources together, archives left out."""

    at: datetime
    counts: dict[str, Count]
    queued: int
    waiting: int
    running: int
    live: int
    actors: int
    max_actors: int
    oldest_queued_at: datetime | None
    oldest_queued_s: float | None
    windows: list[Window]
    sources: list[SourceStatus]


class SourceStatus(Answer):
    """A source of documents, as the coordinator and this process see it."""

    name: str
    state: str
    term: int | None
    problem: str | None
    is_readable: bool
    partitions: list[str]


class Sources(Answer):
    """All sources, memory included."""

    items: list[SourceStatus]


class Session(Answer):
    """Who is asking, and what that may do. ``csrf``: for the header ``X-Koan-CSRF`` of requests with the cookie."""

    name: str
    roles: list[str]
    expires_at: datetime | None
    csrf: str | None
    version: str


class Health(Answer):
    """Up, or ready."""

    status: Literal["ok", "ready"]


class ArchiveCounts(Answer):
    """What became of the jobs, by policy: due, moved, gone, changed, mismatched, interrupted."""

    dry_run: bool
    policies: dict[str, dict[str, int]]


# --- events ----------------------------------------------------------------------------------------------------------


class Change(Answer):
    """Event ``job`` of the list: the newest state of a job that has changed."""

    job: JobSummary


class Removed(Answer):
    """Event ``removed`` of the list."""

    job_id: str


class Gap(Answer):
    """Event ``gap``: changes were dropped because the reader is slow or its source restarted. Read the list anew."""

    n_lost: int | None


TreeNode.model_rebuild()
Overview.model_rebuild()
