"""What the engine knows of a job, and what it keeps of each execution.

Records are values: a transition returns a new one (`JobRecord.evolve`) and never changes the old. They are slotted
classes and not pydantic models because a million of them may be queued (`benchmarks`, P8); pydantic validates at the
border. What many jobs have in common is held once and shared: `Terms` for a job class, `Particulars` for a submission.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, NamedTuple

from koan_ray.domain.status import Claim, ExecutionStatus, Isolation, JobStatus, ParentPolicy, Reason

if TYPE_CHECKING:
    from collections.abc import Iterable

    from koan_ray.domain.retry import RetryPolicy

MAX_ERROR_MESSAGE = 2000
MAX_STACK_TRACE = 4000
MAX_CHECKPOINT = 256 * 1024  # bytes of a checkpoint's body
MAX_PART = 1024 * 1024  # bytes of a part's body
VALUES = "values"  # what the items of a job returned
FAILED = "failed"  # the items that are dead, with their errors
STREAMS = (VALUES, FAILED)


class ActorSpec(NamedTuple):
    """What a job actor must be like; jobs with equal specs share a pool of warm actors.

    Shape: ``custom``, ``label_selector`` are sorted tuples of pairs, ``runtime_env`` is canonical JSON, so that equal
    specs are equal and hashable.      Units: ``memory`` in bytes.
    """

    num_cpus: float = 1.0
    num_gpus: float = 0.0
    memory: int | None = None
    custom: tuple[tuple[str, float], ...] = ()
    label_selector: tuple[tuple[str, str], ...] = ()
    runtime_env: str | None = None
    concurrency: int = 1
    dedicated: bool = False
    lead: bool = False  # for jobs that have chunks of items done by other actors: holds nothing, counts for nothing

    @property
    def label(self) -> str:
        """A short name for dashboards and logs, such as ``cpu=1 gpu=0.5``."""
        if self.lead:
            return "lead"
        parts = [f"cpu={self.num_cpus:g}"]
        parts += [f"gpu={self.num_gpus:g}"] if self.num_gpus else []
        parts += [f"{name}={amount:g}" for name, amount in self.custom]
        parts += [f"concurrency={self.concurrency}"] if self.concurrency > 1 else []
        parts += ["dedicated"] if self.dedicated else []
        return " ".join(parts)


class Terms(NamedTuple):
    """What a job class asks of the engine; held once for all its jobs and named by ``id`` on the wire."""

    id: str  # hash of the rest
    kind: str
    code_id: str  # names the shipped class; see koan_ray.runtime.code
    retry: RetryPolicy
    timeout_s: float | None
    spec: ActorSpec
    isolation: Isolation = Isolation.POOLED
    when_parent_ends: ParentPolicy = ParentPolicy.CANCEL
    claim: Claim = Claim.WRITE_BEHIND
    part: bool = False  # a chunk of another job's items: seen by nobody, stored nowhere, never run twice


def identified(terms: Terms) -> Terms:
    """Return terms with the id that follows from the rest."""
    return terms._replace(id=blake2b(repr(terms[1:]).encode(), digest_size=12).hexdigest())


class Residence(NamedTuple):
    """Where a job is kept; the coordinator's bookkeeping, never a field of a user's `Job`.

    On its way in from a session, an empty name means the settings' default, and a child without a source asks for its
    parent's residence.
    """

    source: str | None = None  # None: the coordinator's memory
    partition: str = ""
    audit: bool = False
    origin: tuple[str | None, str] | None = None  # of an archived job: the source and partition that it came from


class Particulars(NamedTuple):
    """What one submission says about its jobs; shared by all jobs of a ``start_many``."""

    name: str | None = None
    description: str | None = None
    metadata: dict[str, Any] | None = None
    correlation_id: str | None = None
    traceparent: str | None = None
    parent_job_id: str | None = None
    depth: int = 0  # 0 for a job without a parent
    retry_of: str | None = None
    residence: Residence = Residence()


class ErrorInfo(NamedTuple):
    """An error as data: never rebuilt into an exception, so a stored one can run nothing."""

    type: str
    message: str
    stack_trace: str = ""

    def __str__(self) -> str:
        return f"{self.type}: {self.message}" if self.message else self.type


class Progress(NamedTuple):
    """The latest report of a job. ``sequence`` grows over all executions of the job; see `sequence_base`."""

    sequence: int
    percentage: float
    message: str | None = None
    current_step: int | None = None
    total_steps: int | None = None
    estimated_at: float | None = None  # estimated completion, epoch seconds
    updated_at: float = 0.0


def sequence_base(ordinal: int) -> int:
    """Return the number that the progress sequences of a job's ``ordinal``-th execution (from 0) start after.

    Executions cannot know how far a lost predecessor counted, so each has a range of its own; below 2**53 for two
    million executions, so that JSON readers keep it exact.
    """
    return ordinal << 32


class DocumentPage(NamedTuple):
    """Values of a job over items, on their way to a collection of their user's.

    Shape: ``bodies`` are JSON values, the first of them number ``first`` of the job, from 0. ``source`` None is the default.
    ``is_last``: no value follows, and what an earlier execution has written beyond is deleted.
    """

    source: str | None
    collection: str
    first: int
    bodies: list[bytes]
    is_last: bool


class Part(NamedTuple):
    """One page of what a job over items has produced; pages are only ever added, and read in their order.

    Shape: ``seq`` counts from 0 without gaps for each ``(job_id, stream)``; ``body`` is a JSON array of ``count`` entries,
    at most `MAX_PART` bytes. A page counts once a checkpoint says so (`Checkpoint.n_parts`); what lies beyond was written
    by an execution that ended before its checkpoint, and is overwritten or never read.
    """

    job_id: str
    stream: str  # of STREAMS
    seq: int
    body: bytes
    count: int  # type: ignore[assignment]  # of its entries; nobody counts the fields of a part
    fence: int = 0  # of the execution that wrote it; see `part_fence`


def part_fence(term: int, ordinal: int) -> int:
    """Return what the parts of a job's ``ordinal``-th execution carry, under the lease of ``term``: later ones have more.

    A write that was on its way when its execution or its coordinator was given up must not replace what the next one
    wrote under the same number. The ordinal alone is not enough: an execution whose dispatch was never stored has the
    same one as its successor, which runs under a later term.
    """
    return term << 32 | ordinal


class Checkpoint(NamedTuple):
    """How far a job over items has come; stored with the job, so that another execution goes on from there.

    Shape: ``body`` is JSON that the engine does not look into, at most `MAX_CHECKPOINT` bytes. ``sequence`` grows over all
    executions of a job. ``value_parts`` and ``failed_parts`` are set by the coordinator.
    """

    sequence: int
    body: bytes
    total: int | None
    processed: int
    skipped: int
    failed: int
    updated_at: float
    value_parts: int = 0  # pages of "values" that count: those below this number
    failed_parts: int = 0  # of "failed"

    def n_parts(self, stream: str) -> int:
        """Return how many pages of a stream count."""
        return self.value_parts if stream == VALUES else self.failed_parts if stream == FAILED else 0


class ItemCounts(NamedTuple):
    """How many items of a job have ended, and how, as of its last checkpoint."""

    total: int | None  # None while it is not known
    processed: int
    skipped: int
    failed: int


@dataclass(slots=True, eq=False)
class JobRecord:
    """The engine's knowledge of one job. Treat it as immutable; ``rev`` alone is set by the writer at a flush."""

    id: str
    terms: Terms
    particulars: Particulars
    context: bytes  # JSON
    created_at: float
    status: JobStatus = JobStatus.CREATED
    rev: int = 0  # 0: not stored yet
    term: int = 0
    reason: str | None = None  # Reason while queued, FailureKind when failed, a person's words when cancelled
    queued_at: float | None = None
    due_at: float | None = None
    started_at: float | None = None
    completed_at: float | None = None
    attempts: int = 0  # attempts used, the running one included
    crashes: int = 0
    ordinal: int = 0  # executions begun, whatever became of them
    execution_id: str | None = None  # the fence: the execution that runs now
    progress: Progress | None = None
    result: bytes | None = None  # JSON
    error: ErrorInfo | None = None
    cancel_requested_at: float | None = None
    last_modified: float = 0.0
    last_execution_id: str | None = None  # the newest, whatever became of it
    checkpoint: Checkpoint | None = None  # of a job over items

    @property
    def is_claimed_ahead(self) -> bool:
        """Its body waits until its Running state is stored; nothing of a job in memory is."""
        return self.terms.claim is Claim.WRITE_AHEAD and self.particulars.residence.source is not None

    @property
    def has_items(self) -> bool:
        """It is a job over items, however far it has come."""
        return self.terms.spec.lead

    def evolve(self, **changes: Any) -> JobRecord:
        """Return a copy with ``changes`` applied."""
        twin = JobRecord(
            self.id, self.terms, self.particulars, self.context, self.created_at, self.status, self.rev, self.term,
            self.reason, self.queued_at, self.due_at, self.started_at, self.completed_at, self.attempts, self.crashes,
            self.ordinal, self.execution_id, self.progress, self.result, self.error, self.cancel_requested_at,
            self.last_modified, self.last_execution_id, self.checkpoint,
        )  # fmt: skip
        for name, value in changes.items():
            setattr(twin, name, value)
        return twin


@dataclass(slots=True, eq=False)
class ExecutionRecord:
    """One try of a job. Open while it runs; closed exactly once and never rewritten."""

    id: str
    job_id: str
    attempt: int
    started_at: float
    status: ExecutionStatus = ExecutionStatus.RUNNING
    reason: Reason | None = None
    completed_at: float | None = None
    error: ErrorInfo | None = None
    metrics: tuple[tuple[str, Any], ...] = ()

    def close(
        self,
        *,
        status: ExecutionStatus,
        reason: Reason,
        at: float,
        error: ErrorInfo | None = None,
        metrics: tuple[tuple[str, Any], ...] = (),
    ) -> ExecutionRecord:
        """Return this execution as it ended."""
        return ExecutionRecord(
            self.id,
            self.job_id,
            self.attempt,
            self.started_at,
            status,
            reason,
            max(at, self.started_at),
            error,
            metrics,
        )


def told(executions: Iterable[ExecutionRecord]) -> list[ExecutionRecord]:
    """Return the executions that users are told of, in their order: all but those given back before they began."""
    return [execution for execution in executions if execution.reason is not Reason.RETURNED]


class JobView(NamedTuple):
    """A job as its users see it, in wire form; `koan_ray.Job` presents it."""

    id: str
    kind: str
    status: str
    context: bytes
    created_at: float
    name: str | None = None
    description: str | None = None
    metadata: dict[str, Any] | None = None
    correlation_id: str | None = None
    parent_job_id: str | None = None
    depth: int = 0
    queued_at: float | None = None
    started_at: float | None = None
    completed_at: float | None = None
    last_modified: float = 0.0
    attempts: int = 0
    reason: str | None = None
    progress: Progress | None = None
    result: bytes | None = None
    error: ErrorInfo | None = None
    cancel_requested: bool = False
    epoch: str = ""  # of the coordinator in whose memory the job was last seen
    items: ItemCounts | None = None  # of a job over items


def view(job: JobRecord) -> JobView:
    """Return what users may see of ``job``."""
    about = job.particulars
    return JobView(
        job.id, job.terms.kind, job.status.value, job.context, job.created_at, about.name, about.description,
        about.metadata, about.correlation_id, about.parent_job_id, about.depth, job.queued_at, job.started_at,
        job.completed_at, job.last_modified, job.attempts, job.reason, job.progress, job.result, job.error,
        job.cancel_requested_at is not None, items=item_counts(job),
    )  # fmt: skip


def item_counts(job: JobRecord) -> ItemCounts | None:
    """Return the counts of a job over items."""
    done = job.checkpoint
    return None if done is None else ItemCounts(done.total, done.processed, done.skipped, done.failed)


class End(NamedTuple):
    """What a waiter learns when a job reaches a final status: the view's fields that changed since submit."""

    id: str
    status: str
    reason: str | None = None
    result: bytes | None = None
    error: ErrorInfo | None = None
    queued_at: float | None = None
    started_at: float | None = None
    completed_at: float | None = None
    last_modified: float = 0.0
    attempts: int = 0
    progress: Progress | None = None
    cancel_requested: bool = False
    items: ItemCounts | None = None


def end_of(job: JobRecord) -> End:
    """Return how ``job`` ended."""
    return End(
        job.id, job.status.value, job.reason, job.result, job.error, job.queued_at, job.started_at, job.completed_at,
        job.last_modified, job.attempts, job.progress, job.cancel_requested_at is not None, item_counts(job),
    )  # fmt: skip
