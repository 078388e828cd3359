"""koan_ray: durable, observable jobs on Ray.

::

    import koan_ray as koan
    from pydantic import BaseModel


    class EmailContext(BaseModel):
        to: str


    class EmailJob(koan.Job[EmailContext, bool]):
        async def execute(self, context, progress, cancellation) -> bool:
            progress.report(0.5, "Sending")
            await send_email(context.to)
            return True


    job = await EmailJob.start(EmailContext(to="user@example.com")).run()  # or .run().get() without a loop
    assert await job.wait()

Names are loaded when they are first used, so that ``import koan_ray`` and ``koan-ray --help`` stay quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from koan_ray.cancellation import CancellationToken
    from koan_ray.client import Engine, Jobs, init, shutdown
    from koan_ray.config import Settings
    from koan_ray.definition import CustomRetryPolicy, Resources
    from koan_ray.domain.retry import RetryPolicy, RetryStrategy
    from koan_ray.domain.status import Claim, ExecutionStatus, Isolation, JobStatus, ParentPolicy
    from koan_ray.errors import (
        ConfigurationError,
        ConflictError,
        CoordinatorUnavailableError,
        IllegalTransitionError,
        InvalidContextError,
        ItemsChangedError,
        JobCancelledError,
        JobDefinitionError,
        JobFailedError,
        JobIdConflictError,
        JobLostError,
        JobNotFoundError,
        JobWaitsWarning,
        KoanRayError,
        LimitExceededError,
        NonRetryable,
        PayloadTooLargeError,
        RecordCorruptError,
        Reschedule,
        RuntimeUnavailableError,
        StaleLeaseError,
        StoreError,
        StoreUnavailableError,
        TooManyFailedItemsError,
        UnknownKindError,
    )
    from koan_ray.finite import DeadItem, FiniteJob, FiniteSummary, ItemOptions, ItemResult
    from koan_ray.jobs import Job, JobDetails, JobExecution, job
    from koan_ray.listing import JobPage, JobStream
    from koan_ray.pending import Pending
    from koan_ray.progress import JobProgress, JobProgressUpdate, ProgressStream, Subscription
    from koan_ray.recipe import JobRecipe, RecipeBuilder
    from koan_ray.run import JobManyBuilder, JobRunBuilder

_HOMES = {
    "cancellation": ("CancellationToken",),
    "client": ("Engine", "Jobs", "init", "shutdown"),
    "config": ("Settings",),
    "definition": ("CustomRetryPolicy", "Resources"),
    "domain.retry": ("RetryPolicy", "RetryStrategy"),
    "domain.status": ("Claim", "ExecutionStatus", "Isolation", "JobStatus", "ParentPolicy"),
    "errors": (
        "ConfigurationError", "ConflictError", "CoordinatorUnavailableError", "IllegalTransitionError",
        "InvalidContextError", "ItemsChangedError", "JobCancelledError", "JobDefinitionError", "JobFailedError",
        "JobIdConflictError", "JobLostError", "JobNotFoundError", "JobWaitsWarning", "KoanRayError", "LimitExceededError",
        "NonRetryable", "PayloadTooLargeError", "RecordCorruptError", "Reschedule", "RuntimeUnavailableError",
        "StaleLeaseError", "StoreError", "StoreUnavailableError", "TooManyFailedItemsError", "UnknownKindError",
    ),
    "finite": ("DeadItem", "FiniteJob", "FiniteSummary", "ItemOptions", "ItemResult"),
    "jobs": ("Job", "JobDetails", "JobExecution", "job"),
    "listing": ("JobPage", "JobStream"),
    "pending": ("Pending",),
    "progress": ("JobProgress", "JobProgressUpdate", "ProgressStream", "Subscription"),
    "recipe": ("JobRecipe", "RecipeBuilder"),
    "run": ("JobManyBuilder", "JobRunBuilder"),
}  # fmt: skip
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__version__ = "0.1.0"
__all__ = [
    "CancellationToken",
    "Claim",
    "ConfigurationError",
    "ConflictError",
    "CoordinatorUnavailableError",
    "CustomRetryPolicy",
    "DeadItem",
    "Engine",
    "ExecutionStatus",
    "FiniteJob",
    "FiniteSummary",
    "IllegalTransitionError",
    "InvalidContextError",
    "Isolation",
    "ItemOptions",
    "ItemResult",
    "ItemsChangedError",
    "Job",
    "JobCancelledError",
    "JobDefinitionError",
    "JobDetails",
    "JobExecution",
    "JobFailedError",
    "JobIdConflictError",
    "JobLostError",
    "JobManyBuilder",
    "JobNotFoundError",
    "JobPage",
    "JobProgress",
    "JobProgressUpdate",
    "JobRecipe",
    "JobRunBuilder",
    "JobStatus",
    "JobStream",
    "JobWaitsWarning",
    "Jobs",
    "KoanRayError",
    "LimitExceededError",
    "NonRetryable",
    "ParentPolicy",
    "PayloadTooLargeError",
    "Pending",
    "ProgressStream",
    "RecipeBuilder",
    "RecordCorruptError",
    "Reschedule",
    "Resources",
    "RetryPolicy",
    "RetryStrategy",
    "RuntimeUnavailableError",
    "Settings",
    "StaleLeaseError",
    "StoreError",
    "StoreUnavailableError",
    "Subscription",
    "TooManyFailedItemsError",
    "UnknownKindError",
    "init",
    "job",
    "shutdown",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        msg = f"module 'koan_ray' has no attribute {name!r}"
        raise AttributeError(msg)
    value = getattr(importlib.import_module(f"koan_ray.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
