"""The life of one execution in the process that runs it: every ending becomes a `Report`.

::

    order ─► decode context ─► call the body ─► encode result ─► ask the job's retry policy ─► report

User code is called here and nowhere else: the body, the validators of its types and its `CustomRetryPolicy`.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import resource
import threading
import traceback
from time import thread_time
from typing import TYPE_CHECKING, Any, Protocol

from koan_ray import ambient
from koan_ray.cancellation import CancellationToken
from koan_ray.definition import ContextRejectedError, ResultRejectedError
from koan_ray.domain.durations import bound, instant, seconds
from koan_ray.domain.progress import estimate_completion, parse_report
from koan_ray.domain.records import (
    MAX_ERROR_MESSAGE,
    MAX_STACK_TRACE,
    ErrorInfo,
    JobView,
    Progress,
    sequence_base,
)
from koan_ray.domain.retry import Advice
from koan_ray.domain.status import ExecutionStatus, JobStatus, Reason
from koan_ray.domain.texts import readable, readable_end, said
from koan_ray.domain.words import MAX_NAME
from koan_ray.errors import ConfigurationError, NonRetryable, Reschedule
from koan_ray.jobs import Job, JobExecution
from koan_ray.killpoints import killpoint
from koan_ray.ports import Report
from koan_ray.progress import JobProgress

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from koan_ray.domain.records import Terms
    from koan_ray.ports import Clock, Order

_MAX_RETRY_DELAY_S = 366 * 86400.0
_log = logging.getLogger("koan_ray.attempt")


class Host(Protocol):
    """The process that an attempt runs in, as the attempt sees it."""

    clock: Clock
    inline_limit: int
    span: Callable[[Order, str], AbstractContextManager[Any]] | None

    def announce(self, attempt: Attempt) -> None:
        """The body has reported something new."""

    def release(self, attempt: Attempt, *, blocking: bool) -> None:
        """The body waits for other jobs; its place is free. ``blocking``: its thread is blocked."""

    def acquire(self, attempt: Attempt, granted: Callable[[], None]) -> bool:
        """Take a place back; false if there is none yet, then ``granted`` is called when there is."""


class Attempt:
    """One execution: its body, its token, its progress, its place in the actor."""

    __slots__ = (
        "_began", "_cpu", "_host", "_lock", "_loop", "_n_reports", "_n_waits", "_runner", "_taken", "began_at", "is_in_body",
        "job_type", "job_view", "order", "progress", "stopped_by", "terms", "token",
    )  # fmt: skip

    def __init__(self, order: Order, terms: Terms, job_type: type[Job[Any, Any]], host: Host) -> None:
        self.order, self.terms, self.job_type, self._host = order, terms, job_type, host
        self.began_at = host.clock.now()
        self._began = host.clock.monotonic()
        self._cpu = thread_time()
        self.token = CancellationToken()
        self.progress = JobProgress(self._announce, self.token, clock=host.clock, began=self._began)
        self.stopped_by: str | None = None
        self.is_in_body = False
        self._n_reports = 0
        self._taken: Progress | None = None
        self._n_waits = 0
        self._lock: threading.Lock | None = None
        self._runner: asyncio.Task[Any] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        about = order.particulars
        self.job_view = JobView(
            order.job_id, terms.kind, JobStatus.RUNNING.value, order.context, order.created_at, about.name,
            about.description, about.metadata, about.correlation_id, about.parent_job_id, about.depth, order.queued_at,
            self.began_at, None, self.began_at, order.attempt, None, None, None, order.error,
        )  # fmt: skip

    @property
    def age_s(self) -> float:
        """How long it has run."""
        return self._host.clock.monotonic() - self._began

    # --- run -------------------------------------------------------------------------------------------------------

    async def perform(self) -> Report:
        """Run an async body in the current task and return how it ended; never raises."""
        self._runner = asyncio.current_task()
        self._loop = asyncio.get_running_loop()
        job = self.job_type._in_hand(self.job_view)  # noqa: SLF001 - instances are made by the engine
        mark = ambient.attempt.set(self)
        try:
            if self.terms.part:
                return await self._perform_part()
            context = self.job_type.definition.decode_context(self.order.context)
            killpoint("body.before")
            self.is_in_body = True
            if self._host.span is None or self.order.particulars.traceparent is None:
                result = await job.execute(context, self.progress, self.token)
            else:
                with self._host.span(self.order, self.terms.kind):
                    result = await job.execute(context, self.progress, self.token)
            self.is_in_body = False
            killpoint("body.after")
            return self._succeeded(job, result)
        except BaseException as error:  # noqa: BLE001 - whatever a body raises becomes its outcome
            self.is_in_body = False
            if self._runner is not None and isinstance(error, asyncio.CancelledError):
                self._runner.uncancel()
            return self._raised(job, error)
        finally:
            ambient.attempt.reset(mark)

    def perform_blocking(self) -> Report:
        """Run a plain body in this thread, in a context of its own, and return how it ended; never raises."""
        return contextvars.copy_context().run(self._perform_blocking)

    def _perform_blocking(self) -> Report:
        job = self.job_type._in_hand(self.job_view)  # noqa: SLF001 - instances are made by the engine
        ambient.attempt.set(self)
        try:
            if self.terms.part:
                return self._perform_part_blocking()
            context = self.job_type.definition.decode_context(self.order.context)
            killpoint("body.before")
            self.is_in_body = True
            if self._host.span is None or self.order.particulars.traceparent is None:
                result = job.execute(context, self.progress, self.token)
            else:
                with self._host.span(self.order, self.terms.kind):
                    result = job.execute(context, self.progress, self.token)
            self.is_in_body = False
            killpoint("body.after")
            return self._succeeded(job, result)
        except BaseException as error:  # noqa: BLE001 - whatever a body raises becomes its outcome
            self.is_in_body = False
            return self._raised(job, error)

    # --- items -----------------------------------------------------------------------------------------------------

    async def conduct(self, job: Any, context: Any, progress: JobProgress, cancellation: CancellationToken) -> Any:
        """Go through the items of a `FiniteJob` and return its result."""
        from koan_ray.engine.lead import Lead  # it stands above: it starts attempts, of chunks

        return await Lead(self, job, context, progress, cancellation, self._host.clock).run()

    async def _perform_part(self) -> Report:
        from koan_ray.engine import chunks  # as above

        self.is_in_body = True
        result = await chunks.process(self.order.context, self.job_type, self.progress, self.token)  # type: ignore[arg-type]
        self.is_in_body = False
        return self._report("succeeded", result=result)

    def _perform_part_blocking(self) -> Report:
        from koan_ray.engine import chunks  # as above

        self.is_in_body = True
        result = chunks.process_blocking(self.order.context, self.job_type, self.progress, self.token)  # type: ignore[arg-type]
        self.is_in_body = False
        return self._report("succeeded", result=result)

    # --- stop ------------------------------------------------------------------------------------------------------

    def stop(self, cause: str) -> bool:
        """Set the token; true if the body should be interrupted at once, because it does not look at its token."""
        self.token._set(cause)  # noqa: SLF001 - set by the engine only
        return not self.token.is_watched

    def interrupt(self) -> None:
        """Raise `CancelledError` in an async body, at the place where it waits; from any thread."""
        if self._loop is not None:
            try:
                self._loop.call_soon_threadsafe(self._interrupt)
            except RuntimeError:  # its loop is closed: nothing runs there any more
                return

    def _interrupt(self) -> None:
        if self.is_in_body and self._runner is not None:
            self.stopped_by = "cancelled_error"
            self._runner.cancel()

    # --- progress --------------------------------------------------------------------------------------------------

    def _announce(self) -> None:
        self._host.announce(self)

    def take_progress(self) -> Progress | None:
        """Number and return the newest report, if there is one that was not taken yet."""
        progress = self.progress
        if not progress._is_new:  # noqa: SLF001 - the engine's half of JobProgress
            return None
        # In this order: a report that comes between is announced again, and none is lost.
        progress._is_new = False  # noqa: SLF001
        latest = progress._latest  # noqa: SLF001
        if latest is None:
            return None
        reported = parse_report(*latest)
        now = self._host.clock.now()
        self._n_reports += 1
        self._taken = Progress(
            sequence_base(self.order.ordinal) + self._n_reports, reported.percentage, reported.message, reported.current,
            reported.total, estimate_completion(reported.percentage, began_at=now - self.age_s, now=now), now,
        )  # fmt: skip
        return self._taken

    # --- Parking: a body that waits for other jobs gives them its place ----------------------------------------------

    def park(self, *, blocking: bool) -> None:
        """Give the place to other jobs while at least one wait of this body goes on."""
        with self._waiting():
            self._n_waits += 1
            if self._n_waits == 1:
                try:
                    self._host.release(self, blocking=blocking)
                except BaseException:
                    self._n_waits -= 1
                    raise

    def resume(self) -> None:
        """Return when the body has its place back, at the end of its last wait."""
        place = threading.Event()
        if not self._unpark(place.set):
            place.wait()

    async def resume_async(self) -> None:
        """Return when the body has its place back, at the end of its last wait."""
        loop = asyncio.get_running_loop()
        place = asyncio.Event()

        def granted() -> None:
            loop.call_soon_threadsafe(place.set)

        if not self._unpark(granted):
            await place.wait()

    @property
    def runs_on(self) -> asyncio.AbstractEventLoop | None:
        """The loop of an async body."""
        return self._loop

    def _unpark(self, granted: Callable[[], None]) -> bool:
        with self._waiting():
            self._n_waits -= 1
            return self._n_waits > 0 or self._host.acquire(self, granted)

    def _waiting(self) -> threading.Lock:
        if self._lock is None:  # most bodies never wait; those that do create it before they could share it
            self._lock = threading.Lock()
        return self._lock

    # --- endings ---------------------------------------------------------------------------------------------------

    def _succeeded(self, job: Job[Any, Any], result: object) -> Report:
        if self._has_timed_out:  # it came back on its own, and too late
            return self._timed_out(job)
        try:
            encoded = self.job_type.definition.encode_result(result, self._host.inline_limit)
        except ResultRejectedError as error:
            return self._report("result_rejected", error=ErrorInfo("ResultRejectedError", said(error, MAX_ERROR_MESSAGE)))
        return self._report("succeeded", result=encoded)

    def _raised(self, job: Job[Any, Any], error: BaseException) -> Report:
        if isinstance(error, ContextRejectedError):
            info = ErrorInfo("InvalidContextError", said(error, MAX_ERROR_MESSAGE))
            return self._report("context_rejected", error=info)
        if isinstance(error, NonRetryable):
            inner = error.error
            if isinstance(inner, BaseException):
                return self._report("non_retryable", error=describe(inner))
            info = ErrorInfo("NonRetryable", said(inner, MAX_ERROR_MESSAGE))
            return self._report("non_retryable", error=info)
        if isinstance(error, Reschedule):
            try:
                return self._report("rescheduled", delay_s=seconds(error.after, name="Reschedule(after=…)"))
            except ConfigurationError as problem:
                return self._failed(job, problem)
        if isinstance(error, asyncio.CancelledError) and self.token.requested:
            self.stopped_by = self.stopped_by or "token"
            if self.token.cause != "timeout":
                return self._report("cancelled")
        if self._has_timed_out:
            return self._timed_out(job)
        return self._failed(job, error)

    @property
    def _has_timed_out(self) -> bool:
        return self.token.cause == "timeout"

    def _timed_out(self, job: Job[Any, Any]) -> Report:
        self.stopped_by = self.stopped_by or "token"
        took = f"the attempt took longer than its timeout of {self.terms.timeout_s:g} s"
        return self._failed(job, TimeoutError(took), outcome="timeout")

    def _failed(self, job: Job[Any, Any], error: BaseException, outcome: str = "failed") -> Report:
        info = describe(error)
        if not self.job_type.definition.judges or self.terms.part:
            return self._report(outcome, error=info)
        try:
            advice = self._ask(job, error, info, outcome)
        except Exception as problem:  # noqa: BLE001 - the policy is user code as well
            found = describe(problem)
            _log.warning("retry_policy_failed: job %s", self.order.job_id, exc_info=True)
            self.stopped_by = self.stopped_by or f"retry policy raised {found.type}"
            added = f" (and its own retry policy raised {found.type}: {found.message[:400]})"
            advice, info = Advice(), info._replace(message=info.message[: MAX_ERROR_MESSAGE - len(added)] + added)
        return self._report(outcome, error=info, advice=advice)

    def _ask(self, job: Job[Any, Any], error: BaseException, info: ErrorInfo, outcome: str) -> Advice:
        """Ask the job's `CustomRetryPolicy`; one that raises has said nothing, and its error is added to the job's."""
        last = JobExecution(
            id=self.order.execution_id,
            job_id=self.order.job_id,
            attempt_number=self.order.attempt,
            started_at=instant(self.began_at),  # type: ignore[arg-type]
            completed_at=instant(self._host.clock.now()),
            status=ExecutionStatus.FAILED,
            reason=Reason.TIMEOUT if outcome == "timeout" else Reason.FAILED,
            error_type=info.type,
            error_message=info.message,
            stack_trace=info.stack_trace,
            exception=error,
        )
        policy: Any = job
        again, delay = None, None
        if hasattr(policy, "should_retry"):
            again = bool(policy.should_retry(last))
        if again is not False and hasattr(policy, "get_retry_delay"):
            wait = policy.get_retry_delay(last)
            delay = None if wait is None else min(bound(wait, name="get_retry_delay"), _MAX_RETRY_DELAY_S)
        return Advice(again, delay)

    def _report(
        self, outcome: str, *, result: bytes | None = None, error: ErrorInfo | None = None, delay_s: float = 0.0,
        advice: Advice | None = None,
    ) -> Report:  # fmt: skip
        order = self.order
        metrics: tuple[tuple[str, Any], ...] = (
            ("cpu_seconds", thread_time() - self._cpu),
            ("peak_rss", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024),
            ("queue_wait", max(0.0, self.began_at - order.queued_at)),
        )
        if self.stopped_by is not None:
            metrics = (*metrics, ("stopped_by", self.stopped_by))
        return Report(
            order.execution_id, order.job_id, outcome, self.began_at, self._host.clock.monotonic() - self._began, result,
            error, delay_s, advice, self.take_progress() or self._taken, metrics,
        )  # fmt: skip


def describe(error: BaseException) -> ErrorInfo:
    """Return an error as data: class name, message, and the end of its stack trace without our own frames.

    All of it readable, so that any store holds it and any page shows it; never raises, whatever the error's own code does.
    """
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    try:
        trace = "".join(traceback.format_exception(type(error), error, frames))
    except BaseException as problem:  # noqa: BLE001 - formatting calls user code too
        trace = f"(the stack trace could not be formatted: {type(problem).__name__})"
    name = readable(type(error).__name__, MAX_NAME)
    return ErrorInfo(name, said(error, MAX_ERROR_MESSAGE), readable_end(trace, MAX_STACK_TRACE))
