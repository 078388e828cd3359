"""How an execution begins, and what its end makes of its job: what the dispatcher and recovery ask.

What happens to a job is decided by the pure functions of `koan_ray.domain`; this applies them. Reports for an execution
that is not its job's current one are counted and dropped.

An execution has taken as long as the monotonic clock says, whatever became of the wall clock meanwhile: it ends at its begin
plus that. Its begin lies between its order and now, also where the clock of the actor's node is another. A job ends now,
and never before its execution has.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from koan_ray.domain import transitions
from koan_ray.domain.records import MAX_ERROR_MESSAGE, ErrorInfo, ExecutionRecord, JobRecord, Progress, Terms
from koan_ray.domain.retry import Advice, decide
from koan_ray.domain.status import ExecutionStatus, FailureKind, JobStatus, Reason
from koan_ray.domain.texts import readable
from koan_ray.engine.catalog import written
from koan_ray.errors import KoanRayError
from koan_ray.killpoints import killpoint
from koan_ray.ports import Order, Report

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from koan_ray.domain.records import ActorSpec
    from koan_ray.engine.catalog import Catalog
    from koan_ray.engine.kinds import Kinds
    from koan_ray.engine.live import LiveJobs
    from koan_ray.engine.pool import Active, Actor
    from koan_ray.engine.tasks import Tasks
    from koan_ray.ports import Clock, Random


class Settling:
    """The `Jobs` of the dispatcher, and those of recovery.

    Args:
        live: The jobs that have not ended.
        kinds: The job classes.
        catalog: Where jobs are kept.
        clock: Time.
        random: For jitter.
        tasks: What runs what waits for a flush.
        max_crashes: Losses of the process before a job is given up as poison.
    """

    def __init__(
        self, live: LiveJobs, kinds: Kinds, catalog: Catalog, clock: Clock, random: Random, tasks: Tasks, *,
        max_crashes: int,
    ) -> None:  # fmt: skip
        self._jobs, self._live = live, live.by_id
        self._kinds, self._catalog, self._clock, self._random, self._tasks = kinds, catalog, clock, random, tasks
        self._max_crashes = max_crashes

    # --- what the dispatcher asks ------------------------------------------------------------------------------------

    def queued(self, job_id: str) -> JobRecord | None:
        """Return the job if it waits to be dispatched now."""
        job = self._live.get(job_id)
        if job is None or job.status is not JobStatus.QUEUED or job.due_at is not None:
            return None
        tenure = self._catalog.tenure_of(job)
        if tenure is not None and not tenure.may_act:
            tenure.hold(job_id)  # nothing is started while the lease may be somebody else's
            return None
        return job

    def begin(self, job: JobRecord, execution_id: str, now: float) -> tuple[ExecutionRecord, Order]:
        """Move a queued job to Running; written behind, so that a job that ends at once is written once, or at once."""
        running = transitions.dispatched(job, execution_id, at=now)
        execution = ExecutionRecord(execution_id, job.id, running.attempts, now)
        self._live[job.id] = running
        (self._jobs.stage if job.is_claimed_ahead else self._jobs.stage_behind)(running, execution)
        self._jobs.tell_move(running, execution_id)
        order = Order(
            execution_id, job.id, job.terms.id, job.context, running.attempts, job.ordinal, job.created_at,
            job.queued_at or now, job.particulars, job.error, job.checkpoint,
        )  # fmt: skip
        return execution, order

    def ended(self, active: Active, report: Report) -> None:
        """Settle an execution that ended by itself."""
        job = self._current(active)
        if job is None:
            return
        if report.outcome == "crashed":
            self._lose(
                job,
                active.execution,
                active.actor,
                report.error or ErrorInfo("ProcessLost", "the child process vanished"),
                report,
            )
            return
        if report.progress is not None and report.outcome != "succeeded":
            job = job.evolve(progress=report.progress)
        now = self._clock.now()
        ended_at = active.execution.started_at + report.duration_s
        if ended_at < now:  # noqa: PLR1730 - as ever, unless the clock was set back; `max` is a call, for every job
            ended_at = now
        if report.outcome == "succeeded":
            after = transitions.completed(job, report.result or b"null", at=ended_at, progress=report.progress)
            status, reason = ExecutionStatus.SUCCEEDED, Reason.SUCCEEDED
        elif report.outcome == "cancelled":
            if job.cancel_requested_at is None:  # the body cancelled itself
                job = job.evolve(cancel_requested_at=now, reason="the job raised CancelledError by itself")
            after = transitions.cancelled(job, at=ended_at)
            status, reason = ExecutionStatus.CANCELLED, Reason.CANCELLED
        elif report.outcome == "rescheduled":
            after = transitions.rescheduled(job, at=now, due_at=now + report.delay_s)
            status, reason = ExecutionStatus.CANCELLED, Reason.RESCHEDULED
        else:
            after, reason = self._after_failure(job, report, now, ended_at)
            status = ExecutionStatus.FAILED
        self._settle(active.execution, active.actor, after, status, reason, report=report)

    def _after_failure(self, job: JobRecord, report: Report, now: float, ended_at: float) -> tuple[JobRecord, Reason]:
        error = report.error or ErrorInfo("UnknownError", "")
        reason = Reason.FAILED if report.outcome == "failed" else Reason(report.outcome)
        verdict = decide(job.terms.retry, reason, job.attempts - job.crashes, self._random.random, report.advice or Advice())
        if verdict.retry:
            after = transitions.retry_later(job, error, at=now, due_at=now + verdict.delay_s)
            return after, Reason.RETRY if reason is Reason.FAILED else reason
        return transitions.failed(job, verdict.failure or FailureKind.EXHAUSTED, error, at=ended_at), reason

    def unbegun(self, active: Active) -> None:
        """Put a job back whose order was returned."""
        job = self._current(active)
        if job is not None:
            after = transitions.returned(job, at=self._clock.now())
            if self._jobs.writer_of(job).forget_execution(job.id, active.execution.id):
                self._jobs.move(after.evolve(last_execution_id=None), first=True)  # as if it had never been
            else:
                self._settle(active.execution, active.actor, after, ExecutionStatus.CANCELLED, Reason.RETURNED, first=True)

    def interrupted(self, active: Active) -> None:
        """Put a job back whose process was ended for another's sake."""
        job = self._current(active)
        if job is not None:
            after = transitions.interrupted(job, at=self._clock.now())
            ended_at = self._stopped_at(active)
            self._settle(
                active.execution, active.actor, after, ExecutionStatus.CANCELLED, Reason.INTERRUPTED, first=True,
                ended_at=ended_at,
            )  # fmt: skip

    def vanished(self, active: Active, cause: str) -> None:
        """Count a crash, and run the job again or give it up as poison."""
        job = self._current(active)
        if job is not None:
            lost = ErrorInfo("ProcessLost", readable(cause, MAX_ERROR_MESSAGE))
            self._lose(job, active.execution, active.actor, lost, None, ended_at=self._stopped_at(active))

    def killed(self, active: Active, cause: str) -> None:
        """Settle an execution that did not stop and was killed."""
        job = self._current(active)
        if job is None:
            return
        self._jobs.warn("execution_killed", job, active.execution, actor=active.actor.name, cause=cause)
        now, stopped_at = self._clock.now(), self._stopped_at(active)
        ended_at = max(now, stopped_at)
        metrics = (("stopped_by", "kill"),)
        if cause == "cancelled":
            after = transitions.cancelled(job, at=ended_at)
            self._settle(
                active.execution, active.actor, after, ExecutionStatus.CANCELLED, Reason.CANCELLED, metrics=metrics,
                ended_at=stopped_at,
            )  # fmt: skip
            return
        took = f"the attempt took longer than {job.terms.timeout_s:g}s and did not stop; its process was killed"
        error = ErrorInfo("TimeoutError", took)
        report = Report(active.execution.id, active.job_id, "timeout", active.execution.started_at, 0.0, error=error)
        after, reason = self._after_failure(job, report, now, ended_at)
        self._settle(
            active.execution, active.actor, after, ExecutionStatus.FAILED, reason, error=error, metrics=metrics,
            ended_at=stopped_at,
        )  # fmt: skip

    def _stopped_at(self, active: Active) -> float:
        """Return when an execution was stopped that has not reported its end: its begin, and as long as it has run since."""
        since = active.began_at if active.began_at is not None else active.sent_at
        return active.execution.started_at + max(0.0, self._clock.monotonic() - since)

    def progressed(self, active: Active, progress: Progress) -> None:
        """Remember how far a running job is."""
        job = self._current(active)
        if job is not None and (job.progress is None or progress.sequence > job.progress.sequence):
            after = job.evolve(progress=progress, last_modified=self._clock.now())
            self._live[job.id] = after
            self._jobs.stage_behind(after)

    def when_stored(self, reports: Sequence[Report], then: Callable[[], None]) -> None:
        """Call ``then`` when what became of these reports is written."""

        async def follow() -> None:
            found = (self._live.get(report.job_id) for report in reports)
            writers = {self._jobs.writer_of(job) for job in found if job is not None}
            with contextlib.suppress(KoanRayError):  # not written here: the next coordinator asks the actor
                await written(writers)
                then()

        self._tasks.spawn(follow(), "when stored")

    def when_claimed(self, jobs: Sequence[JobRecord], then: Callable[[], None]) -> None:
        """Call ``then`` when it is stored, by us, that these jobs run."""

        async def follow() -> None:
            try:
                for writer in dict.fromkeys(map(self._jobs.writer_of, jobs)):
                    await writer.flushed()
            except KoanRayError:
                return  # they are another coordinator's now
            then()

        self._tasks.spawn(follow(), "when claimed")

    def may_begin(self, job_id: str, execution_id: str) -> JobRecord | None:
        """Return the job if this body may begin now; `Dispatcher.resume` is called when it may after all."""
        job = self._jobs.current(job_id, execution_id)
        tenure = self._catalog.tenure_of(job) if job is not None else None
        if tenure is not None and not tenure.may_act:
            tenure.hold(job_id)
            return None
        return job

    def code_for(self, code_id: str) -> bytes:
        """Return a shipped class."""
        return self._kinds.code(code_id)

    def terms_for(self, terms_id: str) -> Terms:
        """Return terms by id."""
        return self._kinds.terms(terms_id)

    def due_at(self, job_id: str) -> float | None:
        """Return when a waiting job is due."""
        job = self._live.get(job_id)
        return job.due_at if job is not None and job.status is JobStatus.QUEUED else None

    def became_due(self, job_id: str) -> tuple[ActorSpec, int] | None:
        """Let a waiting job be dispatched."""
        job = self._live.get(job_id)
        if job is None or job.status is not JobStatus.QUEUED:
            return None
        self._live[job_id] = job.evolve(due_at=None)
        return job.terms.spec, job.particulars.depth

    def refuse_all(self, spec: ActorSpec, cause: str) -> None:
        """Fail the queued jobs of a spec for which no actor can be started."""
        now = self._clock.now()
        problem = f"no job actor with {spec.label} could be started: {cause}"
        error = ErrorInfo("ActorStartError", readable(problem, MAX_ERROR_MESSAGE))
        for job in list(self._live.values()):
            if job.terms.spec == spec and job.status is JobStatus.QUEUED:
                self._jobs.move(transitions.failed(job, FailureKind.EXHAUSTED, error, at=now))

    # --- what recovery asks ------------------------------------------------------------------------------------------

    def current(self, job_id: str, execution_id: str) -> JobRecord | None:
        """Return the live job if this is its current execution."""
        return self._jobs.current(job_id, execution_id)

    def unheld(self, job: JobRecord, execution: ExecutionRecord) -> None:
        """Nobody runs or holds this execution: count a crash, and run the job again or give it up as poison."""
        lost = ErrorInfo("ProcessLost", "its coordinator and its job actor are gone")
        job = self._jobs.current(job.id, execution.id) or job  # a checkpoint may have come since it was read
        self._lose(job, execution, None, lost, None)

    def given_back(self, job: JobRecord, execution: ExecutionRecord) -> None:
        """It was sent to an actor and never begun."""
        after = transitions.returned(job, at=self._clock.now())
        self._settle(execution, None, after, ExecutionStatus.CANCELLED, Reason.RETURNED, first=True)

    # --- settle ------------------------------------------------------------------------------------------------------

    def _current(self, active: Active) -> JobRecord | None:
        job = self._live.get(active.job_id)
        if job is None or job.execution_id != active.execution.id:
            self._jobs.tell_fenced(active.job_id, active.execution.id)
            return None
        return job

    def _lose(
        self, job: JobRecord, execution: ExecutionRecord, actor: Actor | None, error: ErrorInfo, report: Report | None, *,
        ended_at: float | None = None,
    ) -> None:  # fmt: skip
        now = max(self._clock.now(), ended_at or 0.0)
        self._jobs.counters["crashes"] += 1
        name = actor.name if actor is not None else None
        self._jobs.warn("execution_lost", job, execution, crashes=job.crashes + 1, actor=name, problem=error.message)
        if job.terms.part:  # whether and how its items are tried again is for the job to say that they belong to
            after = transitions.failed(job, FailureKind.POISON, ErrorInfo("ProcessLost", error.message), at=now)
        elif job.crashes + 1 >= self._max_crashes and job.cancel_requested_at is None:
            doomed = job.evolve(crashes=job.crashes + 1)
            self._jobs.meters.lost(job.terms.kind, error, is_poison=True)
            message = f"the process died {doomed.crashes} times while it ran this job; the last time: {error.message}"
            poison = ErrorInfo(error.type, message[:2000])
            after = transitions.failed(doomed, FailureKind.POISON, poison, at=now)
        else:
            self._jobs.meters.lost(job.terms.kind, error, is_poison=False)
            after = transitions.lost(job, error, at=now)
        self._settle(
            execution, actor, after, ExecutionStatus.FAILED, Reason.LOST, report=report, error=error, first=True,
            ended_at=ended_at,
        )  # fmt: skip

    def _settle(
        self,
        execution: ExecutionRecord,
        actor: Actor | None,
        after: JobRecord,
        status: ExecutionStatus,
        reason: Reason,
        *,
        report: Report | None = None,
        error: ErrorInfo | None = None,
        metrics: tuple[tuple[str, Any], ...] = (),
        first: bool = False,
        ended_at: float | None = None,
    ) -> None:
        """Write how an execution ended together with what that makes of its job.

        ``ended_at``: when it did, where no report says so; now, unless given.
        """
        if report is not None:
            # A report says it by the clock of its node; the order and its answer, by ours.
            began_at, sent_at = report.began_at, execution.started_at
            if began_at > (latest := self._clock.now() - report.duration_s):
                began_at = latest
            began_at = max(began_at, sent_at)
            execution.started_at = began_at
            now, error, metrics = began_at + report.duration_s, error or report.error, report.metrics
            queued_at = after.queued_at
            waited_s = max(0.0, began_at - queued_at) if execution.attempt == 1 and queued_at is not None else None
            if not after.terms.part:
                self._jobs.meters.settled(after.terms.kind, reason, report.duration_s, waited_s)
        else:
            now = ended_at if ended_at is not None else self._clock.now()
            if reason is not Reason.RETURNED and not after.terms.part:
                self._jobs.meters.of(after.terms.kind).reasons[reason] += 1
        if actor is not None and actor.info is not None:
            metrics = (*metrics, ("actor", actor.name), ("where", actor.info))
        closed = execution.close(status=status, reason=reason, at=now, error=error, metrics=metrics)
        self._jobs.move(after, closed, first=first)
        killpoint("settle.before_flush")
