"""The life of one execution in the process that runs it: every ending becomes a `Report`.

::

    order ─► decode context ─► call the body ─► encode result ─► ask the job's retry policy ─► report

User code is called here and nowhere else: the body, the validators of its types and its `CustomRetryPolicy`.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import resource
import threading
import traceback
from time import thread_time
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from koan_ray import ambient
from koan_ray.cancellation import CancellationToken
from koan_ray.definition import ContextRejectedError, ResultRejectedError
from koan_ray.domain.durations import instant, seconds
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
from koan_ray.domain.texts import readable_end, said
from koan_ray.engine.awaiting import NEVER, awaited, drop, is_awaitable
from koan_ray.engine.bodyloop import run_here
from koan_ray.engine.raised import is_vast, isa, meaning, name_of
from koan_ray.jobs import Job, JobExecution
from koan_ray.killpoints import killpoint
from koan_ray.ports import Report
from koan_ray.progress import JobProgress

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from contextlib import AbstractContextManager

    from koan_ray.domain.records import Terms
    from koan_ray.ports import Clock, Order

_MAX_RETRY_DELAY_S: Final = 366 * 86400.0
_log: Final = logging.getLogger("koan_ray.attempt")
_PEAK_FOR_S: Final = 0.001
_MOST_FRAMES: Final = 100  # of a stack trace, whose end is kept


_making: Final = threading.Lock()  # for a moment, by all attempts: one of its own for each would cost more


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
        "__weakref__", "_began", "_cpu", "_given", "_host", "_job", "_lock", "_loop", "_n_reports", "_n_waits", "_runner",
        "_taken", "began_at", "context", "is_in_body", "job_type", "job_view", "order", "progress", "stopped_by", "terms",
        "token",
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
        self._job: Job[Any, Any] | None = None
        self._given: Any = None  # what a body gave in a thread, to be awaited on a loop
        self.context: contextvars.Context | None = None  # that a plain body was called in
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

    def perform(self) -> Coroutine[Any, Any, Report]:
        """Run the body in the current task, or await what `perform_blocking` was given, and return its end; never raises."""
        return cast("Coroutine[Any, Any, Report]", self._perform(on_loop=True))

    def perform_blocking(self) -> Report | None:
        """Run a plain body in this thread, in a context of its own, and return how it ended; never raises.

        None: the body has given something to await, as an async one behind a plain decorator does. It has not begun then;
        `perform` goes on with it in a task, which is best given `context`. The class is known for it from now on.
        """
        pipeline = self._perform(on_loop=False)
        try:
            self.context = contextvars.copy_context()
            self.context.run(pipeline.send, None)  # it suspends on a loop only
        except StopIteration as ended:
            return cast("Report | None", ended.value)
        except BaseException as problem:  # noqa: BLE001 - no memory or stack is left, or a signal came in between
            return self.unreportable(problem)
        return self.unreportable(RuntimeError("a plain body has suspended"))  # pragma: no cover - it cannot

    def perform_here(self) -> Report:
        """Run a body of either kind in this thread, an async one on a loop of its own; never raises."""
        try:
            is_async = self.job_type.definition.runs_on_loop(self.terms)
            report = None if is_async else self.perform_blocking()
            return report if report is not None else run_here(self.perform())
        except BaseException as problem:  # noqa: BLE001 - the body has broken its loop
            return self.unreportable(problem)

    async def _perform(self, *, on_loop: bool) -> Report | None:
        """Go from the order through context, body and result to the report: the one life of an execution."""
        mark, span = ambient.attempt.set(self), None
        try:
            if self._host.span is not None and self.order.particulars.traceparent is not None:
                span = _Span(self._host.span, self.order, self.terms.kind)
            given = self._begin(on_loop=on_loop)
            if type(given) not in NEVER and is_awaitable(given):
                if not on_loop:
                    self._given = given
                    self._learn(is_async=True)
                    return None
                given = await given
                if is_awaitable(given):
                    given = await awaited(given)
            elif on_loop:
                self._learn(is_async=False)
            self.is_in_body = False
            killpoint("body.after")
            return self._succeeded(given)
        except BaseException as error:
            self.is_in_body = False
            if span is not None:
                span.close(error)
            if on_loop and isa(error, GeneratorExit) and not self._is_current():
                raise  # its task is being thrown away, with a loop that is lost
            return self._ended_by(error)
        finally:
            if span is not None:
                span.close(None)
            try:  # noqa: SIM105 - a quarter of a microsecond less, for every job
                ambient.attempt.reset(mark)
            except ValueError:  # thrown away from elsewhere, as above
                pass

    def _begin(self, *, on_loop: bool) -> Any:
        """Call the body and return what it gives; where a thread has called it already, what it gave."""
        if on_loop:
            self._runner, self._loop = asyncio.current_task(), asyncio.get_running_loop()
        if self._given is not None:
            given, self._given = self._given, None
            self._cpu = thread_time()  # this thread's from now on
            self.is_in_body = True
            return given
        if self.terms.part:
            from koan_ray.engine import chunks  # it stands above: it describes errors as we do

            self.is_in_body = True
            process: Any = chunks.process if on_loop else chunks.process_blocking
            return process(self.order.context, self.job_type, self.progress, self.token)
        job = self._job = self.job_type._in_hand(self.job_view)  # noqa: SLF001 - instances are made by the engine
        context = self.job_type.definition.decode_context(self.order.context)
        killpoint("body.before")
        self.is_in_body = True
        return job.execute(context, self.progress, self.token)

    def _is_current(self) -> bool:
        try:
            return self._runner is not None and asyncio.current_task() is self._runner
        except RuntimeError:
            return False

    def forget(self) -> None:
        """Let go of what a body gave and nobody will await."""
        drop(self._given)
        self._given = None

    def _learn(self, *, is_async: bool) -> None:
        """Remember of the class where its bodies, or its items, are to run: it is no longer asked, but taken at its word."""
        definition = self.job_type.definition
        if self.terms.part:
            definition.is_part_async = is_async
        else:
            definition.is_async = is_async

    # --- items -----------------------------------------------------------------------------------------------------

    async def conduct(self, job: Any, context: Any, progress: JobProgress, cancellation: CancellationToken) -> Any:
        """Go through the items of a `FiniteJob` and return its result."""
        from koan_ray.engine.lead import Lead  # it stands above: it starts attempts, of chunks

        return await Lead(self, job, context, progress, cancellation, self._host.clock).run()

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
        with _making:  # the ticker and the body's end ask at the same time, and each report has a number of its own
            # In this order: a report that comes between is announced again, and none is lost.
            progress._is_new = False  # noqa: SLF001
            latest = progress._latest  # noqa: SLF001
            if latest is None:
                return None
            self._n_reports += 1
            sequence = sequence_base(self.order.ordinal) + self._n_reports
        reported = parse_report(*latest)
        now = self._host.clock.now()
        self._taken = Progress(
            sequence, reported.percentage, reported.message, reported.current,
            reported.total, estimate_completion(reported.percentage, began_at=now - self.age_s, now=now), now,
        )  # fmt: skip
        return self._taken

    def _last_progress(self) -> Progress | None:
        try:
            return self.take_progress() or self._taken
        except BaseException:  # noqa: BLE001 - reports are users' values, and progress never fails a job
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
        if self._lock is None:  # most bodies never wait
            with _making:  # those that do may wait in several threads
                if self._lock is None:
                    self._lock = threading.Lock()
        return self._lock

    # --- endings ---------------------------------------------------------------------------------------------------

    def _succeeded(self, result: object) -> Report:
        if self.terms.part:
            return self._report("succeeded", result=cast("bytes", result))
        if self._has_timed_out:  # it came back on its own, and too late
            return self._timed_out()
        try:
            encoded = self.job_type.definition.encode_result(result, self._host.inline_limit)
        except ResultRejectedError as error:
            return self._report("result_rejected", error=ErrorInfo("ResultRejectedError", said(error, MAX_ERROR_MESSAGE)))
        return self._report("succeeded", result=encoded)

    def _ended_by(self, error: BaseException) -> Report:
        try:
            if self._runner is not None and isa(error, asyncio.CancelledError):
                self._runner.uncancel()
            return self._raised(error)
        except BaseException as problem:  # noqa: BLE001 - a user's code has a part in the report as well
            return self.unreportable(problem)

    def _raised(self, error: BaseException) -> Report:
        if isa(error, ContextRejectedError):
            return self._report("context_rejected", error=ErrorInfo("InvalidContextError", said(error, MAX_ERROR_MESSAGE)))
        what = meaning(error)
        if what.outcome == "non_retryable":
            return self._report("non_retryable", error=describe_any(what.error, "NonRetryable"))
        if what.outcome == "rescheduled":
            return self._report("rescheduled", delay_s=what.delay_s)
        if what.outcome == "cancelled" and self.token.requested:
            self.stopped_by = self.stopped_by or "token"
            if self.token.cause != "timeout":
                return self._report("cancelled")
        if self._has_timed_out:
            return self._timed_out()
        return self._failed(cast("BaseException", what.error))

    @property
    def _has_timed_out(self) -> bool:
        return self.token.cause == "timeout"

    def _timed_out(self) -> Report:
        self.stopped_by = self.stopped_by or "token"
        took = f"the attempt took longer than its timeout of {self.terms.timeout_s:g} s"
        return self._failed(TimeoutError(took), outcome="timeout")

    def _failed(self, error: BaseException, outcome: str = "failed") -> Report:
        info = describe(error)
        if self._job is None or not self.job_type.definition.judges:
            return self._report(outcome, error=info)
        try:
            advice = self._ask(self._job, error, info, outcome)
        except BaseException as problem:  # noqa: BLE001 - the policy is user code as well, and may raise again what it is shown
            found = describe(problem)
            # Not with exc_info: writing it down calls the exception's own code, which may raise anything.
            _log.warning("retry_policy_failed: job %s\n%s", self.order.job_id, found.stack_trace)
            self.stopped_by = self.stopped_by or f"retry policy raised {found.type}"
            added = f" (and its own retry policy raised {found.type}: {found.message[:400]})"
            advice, info = Advice(), info._replace(message=info.message[: MAX_ERROR_MESSAGE - len(added)] + added)
        return self._report(outcome, error=info, advice=advice)

    def unreportable(self, problem: BaseException) -> Report:
        """Return a failure with what is known, where the report itself could not be made."""
        self.is_in_body = False
        name = name_of(problem)
        text = f"the attempt ended, and how could not be reported: {name} was raised meanwhile; {said(problem, 500)}"
        order, duration_s = self.order, self._host.clock.monotonic() - self._began
        info = ErrorInfo(name, text)
        return Report(
            order.execution_id, order.job_id, "failed", self.began_at, duration_s, error=info, progress=self._taken
        )

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
            again = bool(_answered(policy.should_retry(last), "should_retry"))
        if again is not False and hasattr(policy, "get_retry_delay"):
            wait = _answered(policy.get_retry_delay(last), "get_retry_delay")
            delay = None if wait is None else min(seconds(wait, name="get_retry_delay"), _MAX_RETRY_DELAY_S)
        return Advice(again, delay)

    def _report(
        self, outcome: str, *, result: bytes | None = None, error: ErrorInfo | None = None, delay_s: float = 0.0,
        advice: Advice | None = None,
    ) -> Report:  # fmt: skip
        order, ended = self.order, self._host.clock.monotonic()
        metrics: tuple[tuple[str, Any], ...] = (
            ("cpu_seconds", thread_time() - self._cpu),
            ("peak_rss", _peak_rss(ended)),
            ("queue_wait", max(0.0, self.began_at - order.queued_at)),
        )
        if self.stopped_by is not None:
            metrics = (*metrics, ("stopped_by", self.stopped_by))
        return Report(
            order.execution_id, order.job_id, outcome, self.began_at, ended - self._began, result,
            error, delay_s, advice, self._last_progress(), metrics,
        )  # fmt: skip


_peak = (float("-inf"), 0)  # when it was read, and bytes


def _peak_rss(now: float) -> int:
    """Return the most memory that the process has had, as of a millisecond ago: to read it takes longer than many bodies."""
    global _peak  # noqa: PLW0603 - of the process
    if not 0.0 <= now - _peak[0] < _PEAK_FOR_S:
        _peak = now, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return _peak[1]


def describe(error: BaseException) -> ErrorInfo:
    """Return an error as data: class name, message, and the end of its stack trace without our own frames; never raises."""
    try:
        trace = _trace(error)
    except BaseException as problem:  # noqa: BLE001 - formatting calls user code too
        trace = f"(the stack trace could not be formatted: {name_of(problem)})"
    return ErrorInfo(name_of(error), said(error, MAX_ERROR_MESSAGE), readable_end(trace, MAX_STACK_TRACE))


def describe_any(error: object, name: str) -> ErrorInfo:
    """Return as data what somebody has given as an error: an exception, or anything else under ``name``; never raises."""
    return (
        describe(cast("BaseException", error))
        if isa(error, BaseException)
        else ErrorInfo(name, said(error, MAX_ERROR_MESSAGE))
    )


def _trace(error: BaseException) -> str:
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    if not is_vast(error):
        return "".join(traceback.format_exception(type(error), error, frames, limit=-_MOST_FRAMES))
    lines = traceback.format_tb(frames, limit=-_MOST_FRAMES)
    return "".join(["Traceback (most recent call last):\n", *lines, f"{name_of(error)}: {said(error, MAX_ERROR_MESSAGE)}\n"])


def _answered(answer: object, name: str) -> object:
    if is_awaitable(answer):
        drop(answer)
        msg = f"{name} must be synchronous (def, not async def), and returned something to await"
        raise TypeError(msg)
    return answer


class _Span:
    """A span around a body. Exporters, samplers and propagators are users' code: they never change a job's outcome."""

    __slots__ = ("_manager",)

    def __init__(self, span: Callable[[Order, str], AbstractContextManager[Any]], order: Order, kind: str) -> None:
        self._manager: AbstractContextManager[Any] | None = None
        try:
            manager = span(order, kind)
            manager.__enter__()
            self._manager = manager
        except BaseException:  # noqa: BLE001, S110 - the body runs without a span
            pass

    def close(self, error: BaseException | None) -> None:
        """End the span, once; the first call counts."""
        manager, self._manager = self._manager, None
        if manager is not None:
            with contextlib.suppress(BaseException):  # it raises again what it is given, too
                manager.__exit__(
                    None if error is None else type(error), error, None if error is None else error.__traceback__
                )
