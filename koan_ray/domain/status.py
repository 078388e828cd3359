"""The public states of a job and of an execution, and the reasons behind them."""

from __future__ import annotations

from enum import StrEnum


class JobStatus(StrEnum):
    """Where a job is in its life. Waiting for a retry or a due time is ``QUEUED`` with a reason."""

    CREATED = "created"
    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """A final status never changes."""
        return self in _FINAL


_FINAL = frozenset({JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED})


class ExecutionStatus(StrEnum):
    """How one try of a job stands."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Reason(StrEnum):
    """Why an execution ended as it did, or why a queued job waits."""

    SUCCEEDED = "succeeded"
    RETRY = "retry"  # failed; another attempt follows
    FAILED = "failed"  # failed; no attempt is left
    TIMEOUT = "timeout"  # took longer than the job's timeout
    NON_RETRYABLE = "non_retryable"
    RESULT_REJECTED = "result_rejected"
    CONTEXT_REJECTED = "context_rejected"
    LOST = "lost"  # the process vanished
    CANCELLED = "cancelled"
    RESCHEDULED = "rescheduled"  # later by choice, no attempt used
    INTERRUPTED = "interrupted"  # stopped by the engine for another's sake, no attempt used
    RETURNED = "returned"  # dispatched, given back before its body was called; not shown to users
    UNKNOWN_KIND = "unknown_kind"  # the class could not be loaded where the job was to run
    UNWRITABLE = "unwritable"  # it ended, and no document can hold what it ended with
    DELAY = "delay"  # not yet due


class FailureKind(StrEnum):
    """Why a job is Failed."""

    EXHAUSTED = "exhausted"
    NON_RETRYABLE = "non_retryable"
    POISON = "poison"
    TIMEOUT = "timeout"
    DEADLINE = "deadline"
    RESULT_REJECTED = "result_rejected"
    CONTEXT_REJECTED = "context_rejected"
    UNKNOWN_KIND = "unknown_kind"
    UNWRITABLE = "unwritable"  # no document can hold what the job has produced


class Isolation(StrEnum):
    """What an attempt shares its process with."""

    POOLED = "pooled"
    PROCESS = "process"
    DEDICATED = "dedicated"


class Claim(StrEnum):
    """Whether a body may begin before it is stored that it runs."""

    WRITE_BEHIND = "write_behind"  # it may; what a crash in the first moments leaves is a body that no document names
    WRITE_AHEAD = "write_ahead"  # it may not


class ParentPolicy(StrEnum):
    """What happens to a child that is still going when its parent reaches a final status."""

    CANCEL = "cancel"
    ABANDON = "abandon"
