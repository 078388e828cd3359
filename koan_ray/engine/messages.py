"""What sessions and the coordinator say to each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from koan_ray.domain.records import ErrorInfo

if TYPE_CHECKING:
    from koan_ray.domain.records import Checkpoint, End, ExecutionRecord, Particulars, Terms
    from koan_ray.errors import KoanRayError


class Row(NamedTuple):
    """One job of a submission."""

    job_id: str
    terms: int  # place in the submission's list of terms
    particulars: int  # place in its list of particulars
    context: bytes
    created_at: float
    delay_s: float = 0.0
    checkpoint: Checkpoint | None = None  # of a retry that goes on where the old job stopped
    crashes: int = 0  # of a chunk of items: see `koan_ray.domain.items.Chunk.crashes`


class Submission(NamedTuple):
    """Jobs to accept, with what they share held once."""

    terms: list[str]  # ids
    particulars: list[Particulars]
    rows: list[tuple[Any, ...]]  # of Row; bare tuples, because a million of them cross process borders
    introduced: list[Terms]  # those that the coordinator has not been sent yet
    code: dict[str, bytes]  # their classes


class Accepted(NamedTuple):
    """The answer to a submission; when it arrives, the accepted jobs are as durable as their store."""

    epoch: str
    queued_at: float
    refused: dict[int, KoanRayError]  # by place in the rows; the others were accepted
    needs: list[str]  # ids of terms; if not empty, nothing was accepted: send again and introduce these
    is_watched: bool = False  # the session will be told of the ends without asking
    ended: tuple[End, ...] = ()  # of a job that has ended already
    waits: tuple[tuple[str, str], ...] = ()  # ids of terms whose jobs cannot run at present, and why


class Ends(NamedTuple):
    """The answer to a wait."""

    epoch: str
    ended: list[End]
    unknown: list[str]  # of the ids asked for in this call: no such job here


class Details(NamedTuple):
    """The bookkeeping of one job, in wire form; `koan_ray.JobDetails` presents it."""

    attempts: int
    crashes: int
    reason: str | None
    due_at: float | None
    retry_of: str | None
    retried_by: str | None
    source: str | None
    partition: str
    actor: str | None
    node: str | None


class ExecutionView(NamedTuple):
    """An execution as its users see it, in wire form."""

    record: tuple[Any, ...]
    metrics: dict[str, Any]


def execution_view(record: ExecutionRecord) -> ExecutionView:
    """Return the part of an execution that its users see."""
    metrics = dict(record.metrics)
    if (info := metrics.pop("where", None)) is not None:
        metrics.update(node_id=info.node_id, actor_id=info.actor_id, pid=info.pid)
    error = record.error or ErrorInfo("", "")
    row = (
        record.id, record.job_id, record.attempt, record.started_at, record.completed_at, record.status.value,
        record.reason.value if record.reason else None, error.type or None, error.message or None,
        error.stack_trace or None,
    )  # fmt: skip
    return ExecutionView(row, metrics)
