"""The one writer of job state: accepts, settles, cancels and finds jobs.

What happens to a job is decided by the pure functions of `koan_ray.domain`; this module applies them, stages the result
with the `Writer` and tells nobody before it is written. Which job runs where is the `Dispatcher`'s part.

A job is in `_live` from its submit until its final state is written; after that only the store knows it. `_live` is also
the job index: a record's ``particulars.residence`` says where the job is kept, and users' jobs carry none of it.

Idempotence: every request may be repeated. A submit under a known id succeeds when kind and context are the same; cancel
and remove of what is already so change nothing; reports for an execution that is not current are counted and dropped.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple

from koan_ray.domain import transitions
from koan_ray.domain.query import Query, parse_query
from koan_ray.domain.records import (
    End,
    ErrorInfo,
    ExecutionRecord,
    JobRecord,
    JobView,
    Particulars,
    Progress,
    Terms,
    end_of,
    view,
)
from koan_ray.domain.retry import Advice, decide
from koan_ray.domain.status import ExecutionStatus, FailureKind, JobStatus, ParentPolicy, Reason
from koan_ray.engine.dispatcher import Dispatcher
from koan_ray.engine.waiters import Waiters
from koan_ray.engine.writer import Writer
from koan_ray.errors import (
    ConfigurationError,
    ConflictError,
    JobIdConflictError,
    JobNotFoundError,
    KoanRayError,
    LimitExceededError,
)
from koan_ray.ports import Order, Report

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from koan_ray.domain.records import ActorSpec
    from koan_ray.engine.pool import Active
    from koan_ray.engine.settings import EngineSettings
    from koan_ray.ports import Clock, JobStore, Launcher, Push, Random, TimerHandle

_SWEEP_S = 10.0
_LINGER_S = 0.005
_MAX_CODE = 1000  # shipped classes kept; those of live jobs are always kept
_FEW_PARKED = 48  # above this, waits are answered sooner so that all sessions get their turn
_MAX_REASON = 500


class Row(NamedTuple):
    """One job of a submission."""

    job_id: str
    terms: int  # place in the submission's list of terms
    particulars: int  # place in its list of particulars
    context: bytes
    created_at: float
    delay_s: float = 0.0


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


class Ends(NamedTuple):
    """The answer to a wait."""

    epoch: str
    ended: list[End]
    unknown: list[str]  # of the ids asked for in this call: no such job here


class ExecutionView(NamedTuple):
    """An execution as its users see it, in wire form."""

    record: tuple[Any, ...]
    metrics: dict[str, Any]


class Coordinator:
    """Job state of one engine. All methods run on one event loop.

    Args:
        settings: Limits and intervals.
        store: Where records are kept.
        launcher: Starts job actors.
        clock: Time and timers.
        random: For jitter.
        epoch: Unique for each start; tells clients that the memory of an earlier coordinator is gone.
    """

    def __init__(
        self, settings: EngineSettings, *, store: JobStore, launcher: Launcher, clock: Clock, random: Random, epoch: str
    ) -> None:
        self.epoch = epoch
        self._settings, self._store, self._clock, self._random = settings, store, clock, random
        self._term = 1
        self._live: dict[str, JobRecord] = {}
        self._children: dict[str, set[str]] = {}  # live children by parent
        self._lingering: dict[str, asyncio.Future[End | None]] = {}  # submissions that are answered with an end
        self._linger_is_timed = False
        self._terms: dict[str, Terms] = {}
        self._n_by_terms: Counter[str] = Counter()  # live jobs; their terms and classes are kept
        self._code: OrderedDict[str, bytes] = OrderedDict()
        self._writer = Writer(store, clock, self._written, self._fenced)
        self._waiters = Waiters(clock, max_sessions=settings.max_sessions, max_watched=settings.max_watched)
        self._dispatcher = Dispatcher(self, launcher, clock, settings, epoch)
        self._launcher = launcher
        self._sweeper: TimerHandle | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self.counters: Counter[str] = Counter()

    @property
    def events(self) -> Dispatcher:
        """What launchers report to."""
        return self._dispatcher

    @property
    def n_live(self) -> int:
        """Jobs that have not ended, or whose end is not written yet."""
        return len(self._live)

    async def start(self) -> None:
        """Take over what a previous coordinator left, then begin to dispatch."""
        await self._launcher.adopt(self._dispatcher)
        self._dispatcher.open()
        self._sweep_later()

    def stop(self) -> None:
        """End all actors and dispatch nothing more."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        self._dispatcher.close()

    # --- submit ----------------------------------------------------------------------------------------------------

    async def submit(self, submission: Submission, watcher: str | None = None) -> Accepted:
        """Accept jobs. Rows are independent: a refused one does not hold up the others, except at the queue limit.

        ``watcher``: a session that is to be told of their ends, as if it had asked with `wait`.

        Raises:
            LimitExceededError: The queue would grow beyond ``engine.max_queued``; nothing was accepted.
        """
        terms_ids, particulars, rows, introduced, code = submission
        self._learn(introduced, code)
        needs = [terms_id for terms_id in terms_ids if not self._knows(terms_id)]
        if needs:
            return Accepted(self.epoch, 0.0, {}, needs)
        if len(self._live) + len(rows) > self._settings.max_queued:
            raise LimitExceededError(
                "jobs queued or running", len(self._live) + len(rows), self._settings.max_queued, "engine.max_queued"
            )
        terms = [self._terms[terms_id] for terms_id in terms_ids]
        now = self._clock.now()
        refused: dict[int, KoanRayError] = {}
        for place, raw in enumerate(rows):
            row = Row(*raw)
            job_terms, about = terms[row.terms], particulars[row.particulars]
            if row.job_id in self._live or about.parent_job_id is not None or about.retry_of is not None:
                error = await self._examine(row, job_terms, about)
                if isinstance(error, KoanRayError):
                    refused[place] = error
                if error is not None:
                    continue
            self._accept(row, job_terms, about, now)
        may_linger = watcher is not None and len(rows) == 1 and not refused
        if may_linger and (end := await self._linger(rows[0][0])) is not None:
            return Accepted(self.epoch, now, refused, [], ended=(end,))
        is_watched = watcher is not None and self._watch_early(watcher, [row[0] for row in rows])
        await self._writer.flushed()
        return Accepted(self.epoch, now, refused, [], is_watched)

    async def _linger(self, job_id: str) -> End | None:
        """Return the end of a job that is known to take no time, so that its submission is answered with its result.

        It spares the caller, who is about to wait for it, a call. `_LINGER_S` is the most that this delays an answer.
        """
        await self._writer.flushed()
        job = self._live.get(job_id)
        if job is None or job.status is not JobStatus.RUNNING or not self._dispatcher.is_brief(job.terms.id):
            return None
        ended: asyncio.Future[End | None] = asyncio.get_running_loop().create_future()
        self._lingering[job_id] = ended
        if not self._linger_is_timed:  # one timer for all, which nobody cancels: two of a kind cost more than the waiting
            self._time_linger()
        try:
            return await ended
        finally:
            self._lingering.pop(job_id, None)

    def _time_linger(self) -> None:
        """Give up, after `_LINGER_S`, on the jobs that linger now."""
        waiting = list(self._lingering.values())
        self._linger_is_timed = bool(waiting)
        if waiting:
            self._clock.call_later(_LINGER_S, lambda: self._give_up_linger(waiting))

    def _give_up_linger(self, waiting: list[asyncio.Future[End | None]]) -> None:
        for ended in waiting:
            if not ended.done():
                ended.set_result(None)
        self._time_linger()

    def _watch_early(self, session_id: str, job_ids: list[str]) -> bool:
        if any(job_id not in self._live for job_id in job_ids):
            return False  # it has ended meanwhile: the session asks
        try:
            self._waiters.watch(session_id, job_ids)
        except LimitExceededError:
            return False  # it will ask, and be told of the limit then
        return True

    def _accept(self, row: Row, terms: Terms, about: Particulars, now: float) -> None:
        job = JobRecord(row.job_id, terms, about, row.context, row.created_at, term=self._term)
        job.status, job.queued_at, job.last_modified = JobStatus.QUEUED, now, now  # T1, as `transitions.queued`
        self._n_by_terms[terms.id] += 1
        self._live[row.job_id] = job
        parent_id = about.parent_job_id
        if parent_id is not None:
            self._children.setdefault(parent_id, set()).add(row.job_id)
        if row.delay_s > 0:
            job.due_at, job.reason = now + row.delay_s, Reason.DELAY
            self._dispatcher.enqueue_at(row.job_id, job.due_at)
        else:
            self._dispatcher.enqueue(row.job_id, terms.spec, about.depth)
        self._writer.stage(job)
        if parent_id is not None and self._is_closing(parent_id) and terms.when_parent_ends is ParentPolicy.CANCEL:
            self._move(transitions.cancelled(job, at=now, reason="its parent has ended or is being cancelled"))
            self._dispatcher.dequeued(terms.spec, was_waiting=row.delay_s > 0)

    async def _examine(self, row: Row, terms: Terms, about: Particulars) -> KoanRayError | bool | None:
        """Return what is wrong with a row, True for one that is here already, None for one to accept."""
        known = self._live.get(row.job_id) or await self._store.get(row.job_id)
        if known is not None:
            same = known.terms.kind == terms.kind and known.context == row.context
            return True if same else JobIdConflictError(row.job_id)
        if about.depth > self._settings.max_depth:
            return LimitExceededError("depth of a job tree", about.depth, self._settings.max_depth, "engine.max_depth")
        parent_id = about.parent_job_id
        if parent_id is not None and parent_id not in self._live and await self._store.get(parent_id) is None:
            return JobNotFoundError(parent_id)
        return None

    def _is_closing(self, parent_id: str) -> bool:
        parent = self._live.get(parent_id)
        return parent is None or parent.status.is_final or parent.cancel_requested_at is not None

    def _knows(self, terms_id: str) -> bool:
        terms = self._terms.get(terms_id)
        return terms is not None and terms.code_id in self._code

    def _learn(self, terms: Sequence[Terms], code: Mapping[str, bytes]) -> None:
        for item in terms:
            self._terms.setdefault(item.id, item)
        for code_id, blob in code.items():
            self._code[code_id] = blob
        if len(self._code) > _MAX_CODE or len(self._terms) > _MAX_CODE:
            self._forget_unused()

    def _forget_unused(self) -> None:
        """Drop terms and classes that no live job uses, oldest first; called long before a submission needs them."""
        used = {terms_id for terms_id, n in self._n_by_terms.items() if n > 0}
        for terms_id in [t for t in self._terms if t not in used][: _MAX_CODE // 2]:
            del self._terms[terms_id]
        used_code = {terms.code_id for terms in self._terms.values()}
        for code_id in [c for c in self._code if c not in used_code]:
            del self._code[code_id]
        self._n_by_terms = Counter({terms_id: n for terms_id, n in self._n_by_terms.items() if n > 0})

    # --- wait ------------------------------------------------------------------------------------------------------

    async def wait(self, session_id: str, epoch: str | None, job_ids: Sequence[str], park_s: float) -> Ends:
        """Have the session told of these jobs' ends, and return the ends it has not heard of.

        Returns at once when there are some, else after up to ``park_s``, or when the session calls again. A session that
        names another coordinator's ``epoch`` is answered at once, so that it asks for all its jobs again.
        """
        if epoch is not None and epoch != self.epoch:
            return Ends(self.epoch, [], [])
        self._waiters.watch(session_id, [job_id for job_id in job_ids if job_id in self._live])
        unknown, early = [], []
        for job_id in job_ids:
            if job_id not in self._live:
                stored = await self._store.get(job_id)
                if stored is None:
                    unknown.append(job_id)
                elif not self._waiters.is_watched(job_id):
                    early.append(end_of(stored))
        for end in early:
            self._waiters.tell(session_id, end)
        if unknown:
            park_s = 0.0
        elif self._waiters.n_parked > _FEW_PARKED:
            park_s = min(park_s, 0.05)
        return Ends(self.epoch, await self._waiters.park(session_id, park_s), unknown)

    # --- cancel, retry, remove -------------------------------------------------------------------------------------

    async def cancel(self, job_id: str, reason: str | None = None) -> JobStatus:
        """Cancel a job and its children; return its status now. ``CANCELLED`` is final, ``RUNNING`` will end soon.

        Raises:
            JobNotFoundError: There is no such job.
        """
        job = self._live.get(job_id)
        if job is None:
            stored = await self._store.get(job_id)
            if stored is None:
                raise JobNotFoundError(job_id)
            return stored.status
        self._cancel(job, reason[:_MAX_REASON] if reason else None)
        await self._writer.flushed()
        now_is = self._live.get(job_id) or await self._store.get(job_id)
        return now_is.status if now_is is not None else JobStatus.CANCELLED

    def _cancel(self, job: JobRecord, reason: str | None) -> None:
        now = self._clock.now()
        if job.status in (JobStatus.CREATED, JobStatus.QUEUED):
            self._dispatcher.dequeued(job.terms.spec, was_waiting=job.due_at is not None)
            self._move(transitions.cancelled(job, at=now, reason=reason))  # its children go with it
        elif job.status is JobStatus.RUNNING and job.cancel_requested_at is None:
            for child_id in list(self._children.get(job.id, ())):  # children first: the parent may be waiting for them
                if (child := self._live.get(child_id)) and child.terms.when_parent_ends is ParentPolicy.CANCEL:
                    self._cancel(child, reason or "its parent is being cancelled")
            requested = transitions.cancel_requested(job, at=now, reason=reason)
            self._live[job.id] = requested
            self._writer.stage(requested)
            if job.execution_id is not None:
                self._dispatcher.stop(job.execution_id, "cancelled")

    async def retry(self, job_id: str, as_id: str) -> JobView:
        """Run a failed or cancelled job anew, as the new job ``as_id`` that names the old one. May be repeated.

        Raises:
            JobNotFoundError: There is no such job.
            ConflictError: It is not failed or cancelled, or its class is no longer known here.
        """
        old = self._live.get(job_id) or await self._store.get(job_id)
        if old is None:
            raise JobNotFoundError(job_id)
        if old.status not in (JobStatus.FAILED, JobStatus.CANCELLED):
            msg = f"job {job_id}: is {old.status}; only a failed or cancelled job can be run again"
            raise ConflictError(msg)
        if old.terms.code_id not in self._code:
            msg = f"job {job_id}: its class {old.terms.kind!r} is no longer kept here; submit a new job"
            raise ConflictError(msg)
        about = old.particulars._replace(retry_of=job_id, parent_job_id=None, depth=0)
        now = self._clock.now()
        row = Row(as_id, 0, 0, old.context, now)
        await self.submit(Submission([old.terms.id], [about], [row], [old.terms], {}))
        return await self.get(as_id)

    async def remove(self, job_id: str) -> None:
        """Delete a job that has ended, with its executions. Removing what is not there changes nothing.

        Raises:
            ConflictError: It has not ended.
        """
        await self._writer.flushed()
        if (job := self._live.get(job_id)) is not None:
            msg = f"job {job_id}: is {job.status}; cancel it and wait for its end before you remove it"
            raise ConflictError(msg)
        await self._store.remove(job_id)

    # --- look ------------------------------------------------------------------------------------------------------

    async def get(self, job_id: str) -> JobView:
        """Return a job as it is now.

        Raises:
            JobNotFoundError: There is no such job.
        """
        job = self._live.get(job_id) or await self._store.get(job_id)
        if job is None:
            raise JobNotFoundError(job_id)
        return view(job)

    async def query(self, filters: Mapping[str, Any]) -> tuple[list[JobView], str | None]:
        """Return one page of jobs and the cursor of the next."""
        query = self._parse(filters)
        await self._writer.flushed()
        page = await self._store.query(query)
        return [view(self._live.get(job.id, job)) for job in page.jobs], page.cursor

    async def count(self, filters: Mapping[str, Any]) -> int:
        """Return how many jobs match, whatever limit and cursor say."""
        query = self._parse(filters)
        await self._writer.flushed()
        return await self._store.count(query)

    def _parse(self, filters: Mapping[str, Any]) -> Query:
        query = parse_query(filters)
        if query.source is not None or query.partition:
            place = query.source or query.partition
            msg = f"source/partition {place!r}: this engine keeps jobs in memory only, which has neither; leave them out"
            raise ConfigurationError(msg)
        return query

    async def executions(self, job_id: str) -> list[ExecutionView]:
        """Return a job's executions, oldest first.

        Raises:
            JobNotFoundError: There is no such job.
        """
        await self._writer.flushed()
        if job_id not in self._live and await self._store.get(job_id) is None:
            raise JobNotFoundError(job_id)
        records = await self._store.executions(job_id)
        return [_execution_view(record) for record in records if record.reason is not Reason.RETURNED]

    async def status(self) -> dict[str, Any]:
        """Return counts of jobs and actors, limits and counters."""
        return {
            "epoch": self.epoch,
            "pid": os.getpid(),
            "live": len(self._live),
            "limits": {"max_queued": self._settings.max_queued, "max_actors": self._settings.max_actors},
            "jobs": dict(self.counters),
            **self._dispatcher.snapshot(),
        }

    def pushed(self, push: Push) -> bool:
        """A job actor tells of bodies that went on after their batch was answered; false if it is none of ours."""
        return self._dispatcher.pushed(push)

    async def note(self, push: Push) -> bool:
        """As `pushed`, for callers that wait."""
        return self._dispatcher.pushed(push)

    # --- what the dispatcher asks ----------------------------------------------------------------------------------

    def queued(self, job_id: str) -> JobRecord | None:
        """Return the job if it waits to be dispatched now."""
        job = self._live.get(job_id)
        return job if job is not None and job.status is JobStatus.QUEUED and job.due_at is None else None

    def begin(self, job: JobRecord, execution_id: str, now: float) -> tuple[ExecutionRecord, Order]:
        """Move a queued job to Running; written behind, so that a job that ends at once is written once."""
        running = transitions.dispatched(job, execution_id, at=now, term=self._term)
        execution = ExecutionRecord(execution_id, job.id, running.attempts, now)
        self._live[job.id] = running
        self._writer.stage_behind(running, execution)
        order = Order(
            execution_id, job.id, job.terms.id, job.context, running.attempts, job.ordinal, job.created_at,
            job.queued_at or now, job.particulars, job.error,
        )  # fmt: skip
        return execution, order

    def ended(self, active: Active, report: Report) -> None:
        """Settle an execution that ended by itself."""
        job = self._current(active)
        if job is None:
            return
        if report.outcome == "crashed":
            self._lose(job, active, report.error or ErrorInfo("ProcessLost", "the child process vanished"), report)
            return
        if report.progress is not None and report.outcome != "succeeded":
            job = job.evolve(progress=report.progress)
        now = self._clock.now()
        if report.outcome == "succeeded":
            after = transitions.completed(job, report.result or b"null", at=now, progress=report.progress)
            status, reason = ExecutionStatus.SUCCEEDED, Reason.SUCCEEDED
        elif report.outcome == "cancelled":
            if job.cancel_requested_at is None:  # the body cancelled itself
                job = job.evolve(cancel_requested_at=now, reason="the job raised CancelledError by itself")
            after = transitions.cancelled(job, at=now)
            status, reason = ExecutionStatus.CANCELLED, Reason.CANCELLED
        elif report.outcome == "rescheduled":
            after = transitions.rescheduled(job, at=now, due_at=now + report.delay_s)
            status, reason = ExecutionStatus.CANCELLED, Reason.RESCHEDULED
        else:
            after, reason = self._after_failure(job, report, now)
            status = ExecutionStatus.FAILED
        self._settle(active, after, status, reason, report=report)

    def _after_failure(self, job: JobRecord, report: Report, now: float) -> tuple[JobRecord, Reason]:
        error = report.error or ErrorInfo("UnknownError", "")
        reason = Reason.FAILED if report.outcome == "failed" else Reason(report.outcome)
        verdict = decide(job.terms.retry, reason, job.attempts - job.crashes, self._random.random, report.advice or Advice())
        if verdict.retry:
            after = transitions.retry_later(job, error, at=now, due_at=now + verdict.delay_s)
            return after, Reason.RETRY if reason is Reason.FAILED else reason
        return transitions.failed(job, verdict.failure or FailureKind.EXHAUSTED, error, at=now), reason

    def unbegun(self, active: Active) -> None:
        """Put a job back whose order was returned."""
        job = self._current(active)
        if job is not None:
            after = transitions.returned(job, at=self._clock.now())
            if self._writer.forget_execution(job.id, active.execution.id):
                self._move(after, first=True)
            else:
                self._settle(active, after, ExecutionStatus.CANCELLED, Reason.RETURNED, first=True)

    def interrupted(self, active: Active) -> None:
        """Put a job back whose process was ended for another's sake."""
        job = self._current(active)
        if job is not None:
            after = transitions.interrupted(job, at=self._clock.now())
            self._settle(active, after, ExecutionStatus.CANCELLED, Reason.INTERRUPTED, first=True)

    def vanished(self, active: Active, cause: str) -> None:
        """Count a crash, and run the job again or give it up as poison."""
        job = self._current(active)
        if job is not None:
            self._lose(job, active, ErrorInfo("ProcessLost", cause), None)

    def killed(self, active: Active, cause: str) -> None:
        """Settle an execution that did not stop and was killed."""
        job = self._current(active)
        if job is None:
            return
        now = self._clock.now()
        metrics = (("stopped_by", "kill"),)
        if cause == "cancelled":
            after = transitions.cancelled(job, at=now)
            self._settle(active, after, ExecutionStatus.CANCELLED, Reason.CANCELLED, metrics=metrics)
            return
        took = f"the attempt took longer than {job.terms.timeout_s:g}s and did not stop; its process was killed"
        error = ErrorInfo("TimeoutError", took)
        report = Report(active.execution.id, active.job_id, "timeout", active.execution.started_at, 0.0, error=error)
        after, reason = self._after_failure(job, report, now)
        self._settle(active, after, ExecutionStatus.FAILED, reason, error=error, metrics=metrics)

    def progressed(self, active: Active, progress: Progress) -> None:
        """Remember how far a running job is."""
        job = self._current(active)
        if job is not None and (job.progress is None or progress.sequence > job.progress.sequence):
            after = job.evolve(progress=progress, last_modified=self._clock.now())
            self._live[job.id] = after
            self._writer.stage_behind(after)

    def code_for(self, code_id: str) -> bytes:
        """Return a shipped class."""
        self._code.move_to_end(code_id)
        return self._code[code_id]

    def terms_for(self, terms_id: str) -> Terms:
        """Return terms by id."""
        return self._terms[terms_id]

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
        error = ErrorInfo("ActorStartError", f"no job actor with {spec.label} could be started: {cause}"[:2000])
        for job in list(self._live.values()):
            if job.terms.spec == spec and job.status is JobStatus.QUEUED:
                self._move(transitions.failed(job, FailureKind.EXHAUSTED, error, at=now))

    # --- settle ----------------------------------------------------------------------------------------------------

    def _current(self, active: Active) -> JobRecord | None:
        job = self._live.get(active.job_id)
        if job is None or job.execution_id != active.execution.id:
            self.counters["fenced"] += 1
            return None
        return job

    def _lose(self, job: JobRecord, active: Active, error: ErrorInfo, report: Report | None) -> None:
        now = self._clock.now()
        self.counters["crashes"] += 1
        if job.crashes + 1 >= self._settings.max_crashes and job.cancel_requested_at is None:
            doomed = job.evolve(crashes=job.crashes + 1)
            message = f"the process died {doomed.crashes} times while it ran this job; the last time: {error.message}"
            poison = ErrorInfo(error.type, message[:2000])
            after = transitions.failed(doomed, FailureKind.POISON, poison, at=now)
        else:
            after = transitions.lost(job, error, at=now)
        self._settle(active, after, ExecutionStatus.FAILED, Reason.LOST, report=report, error=error, first=True)

    def _settle(
        self,
        active: Active,
        after: JobRecord,
        status: ExecutionStatus,
        reason: Reason,
        *,
        report: Report | None = None,
        error: ErrorInfo | None = None,
        metrics: tuple[tuple[str, Any], ...] = (),
        first: bool = False,
    ) -> None:
        """Write how an execution ended together with what that makes of its job."""
        now = self._clock.now()
        execution = active.execution
        if report is not None:
            execution.started_at = report.began_at
            now, error, metrics = report.began_at + report.duration_s, error or report.error, report.metrics
        if (info := active.actor.info) is not None:
            metrics = (*metrics, ("actor", active.actor.name), ("where", info))
        closed = execution.close(status=status, reason=reason, at=now, error=error, metrics=metrics)
        self._move(after, closed, first=first)

    def _move(self, after: JobRecord, execution: ExecutionRecord | None = None, *, first: bool = False) -> None:
        """Make ``after`` the job's state: queue it again, or let go of its children, and stage it."""
        job_id = after.id
        self._live[job_id] = after
        if after.status is JobStatus.QUEUED:
            if after.due_at is not None:
                self._dispatcher.enqueue_at(job_id, after.due_at)
            else:
                self._dispatcher.enqueue(job_id, after.terms.spec, after.particulars.depth, first=first)
        elif job_id in self._children:
            self._close_children(after)
        self._writer.stage(after, execution)

    def _close_children(self, parent: JobRecord) -> None:
        for child_id in list(self._children.get(parent.id, ())):
            if (child := self._live.get(child_id)) and child.terms.when_parent_ends is ParentPolicy.CANCEL:
                self._cancel(child, f"its parent {parent.status}")

    # --- after a flush ---------------------------------------------------------------------------------------------

    def _written(self, jobs: Sequence[JobRecord]) -> None:
        live, waiters = self._live, self._waiters
        for job in jobs:
            if job.completed_at is None or live.get(job.id) is not job:
                continue
            del live[job.id]
            self._n_by_terms[job.terms.id] -= 1
            self.counters[job.status] += 1
            parent_id = job.particulars.parent_job_id
            if parent_id is not None and (siblings := self._children.get(parent_id)) is not None:
                siblings.discard(job.id)
                if not siblings:
                    del self._children[parent_id]
            if self._lingering and (lingering := self._lingering.get(job.id)) is not None and not lingering.done():
                lingering.set_result(end_of(job))
            if waiters.is_watched(job.id):
                waiters.ended(end_of(job))
        waiters.wake()

    def _fenced(self, job: JobRecord) -> None:
        """Another writer has this job now: stop touching it, and let its waiters ask again."""
        self.counters["fenced_writes"] += 1
        self._live.pop(job.id, None)

    def _sweep_later(self) -> None:
        self._sweeper = self._clock.call_later(_SWEEP_S, self._sweep)

    def _sweep(self) -> None:
        task = asyncio.get_running_loop().create_task(self.sweep_once())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._sweep_later()

    async def sweep_once(self) -> int:
        """Forget what has outlived its retention, and sessions that are gone."""
        self._waiters.sweep()
        return await self._store.expire(self._clock.now())


def _execution_view(record: ExecutionRecord) -> ExecutionView:
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
