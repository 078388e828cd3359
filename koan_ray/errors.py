"""Every error that koan_ray raises, in one tree.

Each constructor takes exactly the values that `args` holds, so that an error survives pickling on its way through Ray.
A message says what happened, to which thing, the value and the limit, and what to do now.
"""

from __future__ import annotations

from typing import Any


class KoanRayError(Exception):
    """Base of everything koan_ray raises on purpose."""


# --- our user can fix these before anything runs ---------------------------------------------------------------------


class ConfigurationError(KoanRayError):
    """A setting, filter or argument is unusable; nothing was started or changed."""


class JobDefinitionError(KoanRayError):
    """A job class cannot be used as written."""


class InvalidContextError(KoanRayError):
    """The context does not fit the job's declared type, or metadata cannot be stored; nothing was submitted."""

    def __init__(self, kind: str, problems: list[tuple[str, str]], what: str = "context") -> None:
        super().__init__(kind, problems, what)
        self.kind, self.problems, self.what = kind, problems, what

    @property
    def fields(self) -> list[str]:
        """Paths of the fields that were refused, such as ``["to", "items.0.price"]``."""
        return [path for path, _ in self.problems]

    def __str__(self) -> str:
        listed = "; ".join(f"{path}: {message}" for path, message in self.problems)
        job = f"job {self.kind!r}: " if self.kind else ""
        return f"{job}the {self.what} was refused: {listed}. Nothing was submitted; correct the {self.what}."


class PayloadTooLargeError(KoanRayError):
    """A context or result is larger than the engine keeps."""

    def __init__(self, kind: str, what: str, size: int, limit: int) -> None:
        super().__init__(kind, what, size, limit)
        self.kind, self.what, self.size, self.limit = kind, what, size, limit

    def __str__(self) -> str:
        return (
            f"job {self.kind!r}: the {self.what} takes {self.size:,} bytes as JSON, the limit is {self.limit:,} "
            f"(engine.inline_limit). Store the data elsewhere and pass a reference to it."
        )


class UnknownKindError(KoanRayError):
    """No job class of this kind is defined in this process."""

    def __init__(self, kind: str, known: list[str]) -> None:
        super().__init__(kind, known)
        self.kind, self.known = kind, known

    def __str__(self) -> str:
        known = ", ".join(repr(name) for name in self.known[:20]) or "none"
        return (
            f"job kind {self.kind!r} is not defined in this process (known: {known}); import its module first, or name it "
            f"with --module or jobs.modules in the settings."
        )


class JobNotFoundError(KoanRayError):
    """No job has this id, or none of the kind asked for, as far as the engine knows.

    Args:
        job_id: What was asked for.
        kind: Of which kind it should have been; None for any.
        actual: The kind that it is of.
        looked_in: Where it was looked for; empty for what is no id, None where that is not known.
    """

    def __init__(
        self, job_id: str, kind: str | None = None, actual: str | None = None, looked_in: tuple[str, ...] | None = None
    ) -> None:
        super().__init__(job_id, kind, actual, looked_in)
        self.job_id, self.kind, self.actual, self.looked_in = job_id, kind, actual, looked_in

    @property
    def is_no_id(self) -> bool:
        """No job can have it: what was asked for is no id."""
        return self.looked_in == ()

    def __str__(self) -> str:
        if self.kind is not None:
            return f"job {self.job_id}: is of kind {self.actual!r}, not {self.kind!r}; use Jobs.get() or the right class."
        if self.is_no_id:
            return (
                f"job {self.job_id!r:.100}: not found. An id is a UUID in lower case, such as "
                f"0198f0c2-7b7e-7cc2-a1f5-2f1d1e6a9b10; this is none, so it was looked for nowhere. Jobs.query(name=…) and "
                f"`koan-ray jobs list` find jobs by other things."
            )
        where = f" in {', '.join(self.looked_in)}" if self.looked_in else ""
        return (
            f"job {self.job_id}: not found{where}. It never existed here, was removed, or has expired "
            f"(memory.completed_retention, memory.faulted_retention)."
        )


# --- what `job.wait()` raises ----------------------------------------------------------------------------------------


class RemoteTraceback(Exception):  # noqa: N818 - the name that concurrent.futures and multiprocessing have for it
    """The stack trace of an error in another process, as text: the cause of the error that it is reported by.

    So that whatever prints an error that nobody has caught (terminals, notebooks, pytest) prints where it came from as well.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text.rstrip()}\n"""'


class JobFailedError(KoanRayError):
    """The job ended as Failed. Its cause is the body's stack trace, if there is one; ``str()`` is one line."""

    def __init__(
        self, job_id: str, kind: str, failure: str, error_type: str, error_message: str, attempts: int, stack_trace: str
    ) -> None:
        super().__init__(job_id, kind, failure, error_type, error_message, attempts, stack_trace)
        self.job_id, self.kind, self.failure = job_id, kind, failure
        self.error_type, self.error_message = error_type, error_message
        self.attempts, self.stack_trace = attempts, stack_trace
        if stack_trace:  # here and not where it is raised: pickling calls this again, and loses causes
            self.__cause__ = RemoteTraceback(stack_trace)

    def __str__(self) -> str:
        times = "1 attempt" if self.attempts == 1 else f"{self.attempts} attempts"
        return (
            f"job {self.kind!r} {self.job_id} failed ({self.failure}) after {times}: {self.error_type}: {self.error_message}"
        )


class JobCancelledError(KoanRayError):
    """The job ended as Cancelled."""

    def __init__(self, job_id: str, kind: str, reason: str | None) -> None:
        super().__init__(job_id, kind, reason)
        self.job_id, self.kind, self.reason = job_id, kind, reason

    def __str__(self) -> str:
        return f"job {self.kind!r} {self.job_id} was cancelled" + (f": {self.reason}" if self.reason else "")


class ItemsChangedError(KoanRayError):
    """A job over items goes on after a loss, and its ``get_items`` gives other items than before."""

    def __init__(self, n_checked: int, n_now: int | None = None) -> None:
        super().__init__(n_checked, n_now)
        self.n_checked, self.n_now = n_checked, n_now

    def __str__(self) -> str:
        found = f"there are only {self.n_now:,} now" if self.n_now is not None else "they are others now"
        return (
            f"get_items() does not give the {self.n_checked:,} items again of which some have ended: {found}. Make it give "
            f"the same items in the same order, or start a new job. For items that never look the same twice, set "
            f"ItemOptions(verify_items=False)."
        )


class TooManyFailedItemsError(KoanRayError):
    """More items of a job have failed than its ``max_failed_items`` allows."""

    def __init__(self, failed: int, ended: int, allowed: str, example: str) -> None:
        super().__init__(failed, ended, allowed, example)
        self.failed, self.ended, self.allowed, self.example = failed, ended, allowed, example

    def __str__(self) -> str:
        return (
            f"{self.failed:,} of {self.ended:,} items have failed, ItemOptions.max_failed_items allows {self.allowed}; the "
            f"last one: {self.example}. See job.failed_items(), and continue with Jobs.retry(id, resume=True)."
        )


class JobLostError(KoanRayError):
    """An in-memory job is gone because the coordinator that held it died."""

    def __init__(self, job_id: str) -> None:
        super().__init__(job_id)
        self.job_id = job_id

    def __str__(self) -> str:
        return (
            f"job {self.job_id} lived in the memory of a coordinator that has died; whether it ran is unknown. "
            f"Submit it again, or use .persist() for jobs that must survive."
        )


# --- conflicts -------------------------------------------------------------------------------------------------------


class ConflictError(KoanRayError):
    """The state that a change relied on is not the state found; nothing was changed."""


class IllegalTransitionError(ConflictError):
    """The state machine has no such move."""

    def __init__(self, job_id: str, source: str, target: str) -> None:
        super().__init__(job_id, source, target)
        self.job_id, self.source, self.target = job_id, source, target

    def __str__(self) -> str:
        return f"job {self.job_id}: cannot go from {self.source} to {self.target}; nothing was changed."


class StaleLeaseError(ConflictError):
    """The lease behind this write has been replaced; nothing was written."""

    def __init__(self, shard: str, held: int, current: int) -> None:
        super().__init__(shard, held, current)
        self.shard, self.held, self.current = shard, held, current

    def __str__(self) -> str:
        return (
            f"shard {self.shard}: lease term {self.held} was replaced by {self.current}; nothing was written. "
            f"Another coordinator has the shard; stand down."
        )


class JobIdConflictError(ConflictError):
    """A job with this id exists and differs from the one submitted."""

    def __init__(self, job_id: str) -> None:
        super().__init__(job_id)
        self.job_id = job_id

    def __str__(self) -> str:
        return f"job {self.job_id}: exists with another kind or context; choose another id or child key."


class KindNotIntroducedError(ConflictError):
    """A stored job cannot be run again: no process has introduced a class of its kind to the engine."""

    def __init__(self, job_id: str, kind: str, known: list[str]) -> None:
        super().__init__(job_id, kind, known)
        self.job_id, self.kind, self.known = job_id, kind, known

    def __str__(self) -> str:
        known = ", ".join(repr(name) for name in self.known[:20]) or "none"
        return (
            f"job {self.job_id}: no process has introduced a class of kind {self.kind!r} to the engine (known: {known}); "
            f"import its module where you ask for this, or name it in jobs.modules of the settings."
        )


# --- limits ----------------------------------------------------------------------------------------------------------


class LimitExceededError(KoanRayError):
    """A stated limit is reached; the request was refused and changed nothing."""

    def __init__(self, what: str, value: int, limit: int, setting: str) -> None:
        super().__init__(what, value, limit, setting)
        self.what, self.value, self.limit, self.setting = what, value, limit, setting

    def __str__(self) -> str:
        return (
            f"{self.what}: {self.value:,} exceeds the limit of {self.limit:,}; nothing was changed. "
            f"Wait for work to finish, or raise {self.setting}."
        )


# --- stores and runtimes, translated at the border -------------------------------------------------------------------


class StoreError(KoanRayError):
    """A store could not do what was asked."""


class StoreUnavailableError(StoreError):
    """The store did not answer; whether the change was made is unknown."""


class RecordCorruptError(StoreError):
    """A stored record cannot be read: it was damaged, or written by a later version. It stays as it is."""

    def __init__(self, record_id: str, field: str, problem: str) -> None:
        super().__init__(record_id, field, problem)
        self.record_id, self.field, self.problem = record_id, field, problem

    def __str__(self) -> str:
        return (
            f"record {self.record_id}: {self.field}: {self.problem}; it was left as it is. Repair or remove it in the store."
        )


class RecordRefusedError(StoreError):
    """A store cannot hold these records as they are, whenever it is asked; those beside them are not concerned."""

    def __init__(self, problems: dict[str, str]) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        shown = "; ".join(f"job {job_id}: {problem}" for job_id, problem in list(self.problems.items())[:5])
        more = f"; and {len(self.problems) - 5:,} more" if len(self.problems) > 5 else ""
        return f"cannot be stored: {shown}{more}. Nothing of it was written; correct the value that is named and repeat it."


class RuntimeUnavailableError(KoanRayError):
    """Ray, or the part of it that was needed, cannot be reached."""


class CoordinatorUnavailableError(RuntimeUnavailableError):
    """The coordinator did not answer; whether the request was carried out is unknown. Requests may be repeated."""


# --- warnings ---------------------------------------------------------------------------------------------------------


class JobWaitsWarning(UserWarning):
    """What was submitted cannot run at present, and waits: its text says for what. Given once for each kind of job."""


# --- control flow that a job may raise; not errors -------------------------------------------------------------------


class NonRetryable(Exception):  # noqa: N818 - the contract's name: control flow, not an error
    """Raise it in a job to fail at once, whatever attempts are left: ``raise NonRetryable(error)``.

    In an `ExceptionGroup`, as an `asyncio.TaskGroup` raises it, one at any depth ends the job, whatever is beside it. As the
    ``__cause__`` of another exception it says nothing.
    """

    def __init__(self, error: BaseException | str) -> None:
        super().__init__(error)
        self.error: BaseException | str = error


class Reschedule(Exception):  # noqa: N818 - the contract's name: control flow, not an error
    """Raise it in a job to run again later without using an attempt: ``raise Reschedule(after=30)``.

    In an `ExceptionGroup` it counts where nothing but `Reschedule` and `asyncio.CancelledError` is beside it, at any depth;
    of several the longest wait does. Beside another error the attempt has failed.

    Args:
        after: How long to wait; a `timedelta` or seconds, not negative, at most a hundred years.
    """

    def __init__(self, after: Any = 0.0) -> None:
        super().__init__(after)
        self.after: Any = after
