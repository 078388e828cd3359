"""What moves to an archive, and where that is.

Of several policies the first that covers a job decides over it, so that one which keeps a kind longer stands before one
which takes everything. A job is judged by itself: when it has ended it may go, whatever its parent and children do.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final

from koan_ray.domain.partitions import is_partition
from koan_ray.domain.records import view
from koan_ray.domain.status import JobStatus
from koan_ray.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from koan_ray.domain.records import ExecutionRecord, JobRecord, Part

ARCHIVE: Final = "archive"  # the partition that finished jobs move to unless told otherwise
RETENTION_S: Final = 30 * 86_400.0
SETTLED: Final = tuple(status for status in JobStatus if status.is_final)

_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def is_archive(partition: str) -> bool:
    """Tell whether a partition is one that the archivist moves jobs to: ``archive``, or a name that begins with that."""
    return partition == ARCHIVE or partition.startswith(f"{ARCHIVE}-")


@dataclass(frozen=True, slots=True)
class ArchivalPolicy:
    """Which jobs move, when, and where to.

    Args:
        name: For logs and counts.
        statuses: Final ones.
        kinds: None: every kind.
        older_than_s: Seconds since the end of a job, or since it was brought back from an archive.
        source: From which source; None: every one.
        partition: From which partition; None: every one that is no archive.
        target_partition: ``archive``, or a name that begins with ``archive-``.
        target_source: To which source; None: it stays in its own.
        keep: So many of the newest of each kind and status stay in their source whatever their age.
        batch: Jobs that are read at a time.

    Raises:
        ConfigurationError: A field is unusable; the message names the policy and the field.
    """

    name: str = "default"
    statuses: tuple[JobStatus, ...] = SETTLED
    kinds: tuple[str, ...] | None = None
    older_than_s: float = RETENTION_S
    source: str | None = None
    partition: str | None = None
    target_partition: str = ARCHIVE
    target_source: str | None = None
    keep: int = 0
    batch: int = 500

    def __post_init__(self) -> None:
        for field, problem in self._problems():
            msg = f"archival policy {self.name!r}: {field}: {problem}, got {getattr(self, field)!r}"
            raise ConfigurationError(msg)

    def _problems(self) -> Iterable[tuple[str, str]]:
        if not _NAME.fullmatch(self.name):
            yield "name", "expected 1 to 64 of A-Z, a-z, 0-9, '_', '.' and '-'"
        if not self.statuses or not set(self.statuses) <= set(SETTLED):
            yield "statuses", f"expected one or several of {', '.join(SETTLED)}: only jobs that have ended are archived"
        if self.kinds is not None and not self.kinds:
            yield "kinds", "is empty; leave it out for every kind"
        if not (math.isfinite(self.older_than_s) and self.older_than_s >= 0):
            yield "older_than_s", "expected seconds, 0 or more"
        if self.partition is not None and (is_archive(self.partition) or not is_partition(self.partition)):
            yield "partition", "expected up to 64 of a-z, 0-9, '_' and '-', and no archive"
        if not (is_archive(self.target_partition) and is_partition(self.target_partition)):
            yield "target_partition", f"expected {ARCHIVE!r} or a name that begins with '{ARCHIVE}-'"
        if self.keep < 0:
            yield "keep", "expected a count, 0 or more"
        if self.batch < 1:
            yield "batch", "expected a count, 1 or more"

    def covers(self, job: JobRecord) -> bool:
        """Tell whether a job is this policy's to decide over, were it old enough."""
        residence = job.particulars.residence
        return (
            job.status in self.statuses
            and (self.kinds is None or job.terms.kind in self.kinds)
            and self.source in (None, residence.source)
            and self.takes_from(residence.partition)
        )

    def takes_from(self, partition: str) -> bool:
        """Tell whether jobs of a partition are meant."""
        return not is_archive(partition) and self.partition in (None, partition)

    def is_due(self, job: JobRecord, now: float) -> bool:
        """Tell whether a job is old enough: it has ended, or was brought back, long ago."""
        touched_at = max(job.completed_at or now, job.last_modified)
        return touched_at < now - self.older_than_s


def due(
    policy: ArchivalPolicy,
    earlier: Sequence[ArchivalPolicy],
    jobs: Iterable[JobRecord],
    now: float,
    kept_from: Mapping[tuple[str, JobStatus], tuple[float, str]],
) -> list[JobRecord]:
    """Return which of the ``jobs`` move now.

    Args:
        policy: The one that is applied.
        earlier: Those before it, whose jobs are not its own.
        jobs: Candidates.
        now: Epoch seconds.
        kept_from: By kind and status, `age_key` of the oldest job that stays because it is among the newest.
    """
    return [
        job
        for job in jobs
        if policy.covers(job)
        and policy.is_due(job, now)
        and not any(other.covers(job) for other in earlier)
        and not (policy.keep and age_key(job) >= kept_from[job.terms.kind, job.status])
    ]


def age_key(job: JobRecord) -> tuple[float, str]:
    """Return what jobs are ordered by from old to new."""
    return job.completed_at or 0.0, job.id


def fingerprint(job: JobRecord, executions: Iterable[ExecutionRecord]) -> str:
    """Return a hash of everything that a reader can see of a job and its executions, wherever they are kept.

    Its parts are not in it: there may be too many; they are compared one by one (`same_part`).

    Left out is the engine's bookkeeping: ``rev``, ``term``, ``last_modified`` and the residence. JSON counts by its value:
    a store may give back other spaces, or keys in another order.
    """
    seen = view(job)._replace(context=b"", result=None, last_modified=0.0, metadata=None)
    about, terms = job.particulars, job.terms
    parts = [
        seen, _json(job.context), _json(job.result), about.metadata, about.traceparent, about.retry_of,
        about.residence.audit, terms.kind, repr(terms[3:]), job.due_at, job.cancel_requested_at, job.crashes, job.ordinal,
        job.execution_id, job.last_execution_id, _checkpoint(job),
        sorted((_seen(execution) for execution in executions), key=lambda row: row[0]),
    ]  # fmt: skip
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=repr)
    return blake2b(canonical.encode(errors="surrogatepass"), digest_size=32).hexdigest()


def _checkpoint(job: JobRecord) -> list[Any]:
    return [] if job.checkpoint is None else [job.checkpoint._replace(body=b""), _json(job.checkpoint.body)]


def same_part(one: Part, other: Part) -> bool:
    """Tell whether two parts say the same; which execution wrote them is the engine's bookkeeping."""
    if one.body != other.body and _json(one.body) != _json(other.body):
        return False
    return one._replace(body=b"", fence=0) == other._replace(body=b"", fence=0)


def _seen(execution: ExecutionRecord) -> tuple[Any, ...]:
    return (
        execution.id, execution.job_id, execution.attempt, execution.started_at, execution.status, execution.reason,
        execution.completed_at, execution.error, dict(execution.metrics),
    )  # fmt: skip


def _json(content: bytes | None) -> Any:
    try:
        return None if content is None else [json.loads(content)]
    except ValueError:
        return content.hex() if content is not None else None
