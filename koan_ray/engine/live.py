"""The jobs that have not ended, and how one of them moves: into the queue, to its end, with its children.

A job is here from its submit until its final state is written; after that only its store knows it. This is also the job
index: a record's ``particulars.residence`` says where the job is kept, and users' jobs carry none of it. Jobs in documents
begin when their submit is written, so that one whose submit was repeated after a crash is not run twice.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from koan_ray.domain import transitions
from koan_ray.domain.records import MAX_ERROR_MESSAGE, ErrorInfo, ExecutionRecord, end_of
from koan_ray.domain.status import ExecutionStatus, FailureKind, JobStatus, ParentPolicy, Reason
from koan_ray.domain.texts import readable
from koan_ray.engine.lingering import Lingering
from koan_ray.engine.meters import Meters
from koan_ray.errors import LimitExceededError, RecordRefusedError
from koan_ray.killpoints import killpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from koan_ray.domain.records import JobRecord
    from koan_ray.engine.catalog import Catalog
    from koan_ray.engine.dispatcher import Dispatcher
    from koan_ray.engine.feed import Feed
    from koan_ray.engine.kinds import Kinds
    from koan_ray.engine.waiters import Waiters
    from koan_ray.engine.writer import Writer
    from koan_ray.errors import KoanRayError
    from koan_ray.ports import Clock, Log


class LiveJobs:
    """What one coordinator has in hand.

    Args:
        kinds: The job classes; told which of them are in use.
        waiters: Who is told of ends.
        clock: Time.
        log: Where a fenced write is told.
        tells_moves: Tell it of every single move of a job as well.
    """

    _catalog: Catalog
    _dispatcher: Dispatcher
    feed: Feed[JobRecord | None] | None = None  # of all changes, for those who show lists

    def __init__(self, kinds: Kinds, waiters: Waiters, clock: Clock, log: Log, *, tells_moves: bool) -> None:
        self.by_id: dict[str, JobRecord] = {}
        self.children: dict[str, set[str]] = {}  # live children by parent
        self.counters: Counter[str] = Counter()
        self.meters = Meters()
        self.duplicates: dict[str, JobRecord] = {}  # refused inserts, by id, until their submit is answered
        self.unstorable: dict[str, KoanRayError] = {}  # inserts that no document can hold, as long as that
        self.lingering = Lingering(clock)
        self._kinds, self._waiters, self._clock = kinds, waiters, clock
        self._warn = log
        self._log = log if tells_moves else None

    def attach(self, catalog: Catalog, dispatcher: Dispatcher) -> None:
        """Name the places where jobs are kept, and who runs them; both know us, so they come later."""
        self._catalog, self._dispatcher = catalog, dispatcher

    # --- in and out ------------------------------------------------------------------------------------------------

    def put(self, job: JobRecord) -> None:
        """Take a job in that is new here."""
        self.by_id[job.id] = job
        self._kinds.begun(job.terms.id)
        parent_id = job.particulars.parent_job_id
        if parent_id is not None:
            self.children.setdefault(parent_id, set()).add(job.id)

    def drop(self, job: JobRecord) -> None:
        """Let go of a job that is another coordinator's now."""
        del self.by_id[job.id]
        self._kinds.ended(job)
        self.children.pop(job.id, None)
        if job.execution_id is not None:
            self._dispatcher.forget(job.execution_id)

    def current(self, job_id: str, execution_id: str) -> JobRecord | None:
        """Return the live job if this is its current execution."""
        job = self.by_id.get(job_id)
        return job if job is not None and job.execution_id == execution_id else None

    # --- moves -----------------------------------------------------------------------------------------------------

    def enqueue(self, job: JobRecord, *, first: bool = False) -> None:
        """Let a queued job be dispatched when it is due, and when a class of its kind is known."""
        if not job.terms.code_id:
            routed = self._route(job)
            if routed is None:
                return
            job = routed
        if job.due_at is not None:
            self._dispatcher.enqueue_at(job.id, job.due_at, since=job.last_modified)
        else:
            self._dispatcher.enqueue(job.id, job.terms.spec, job.particulars.depth, first=first)

    def _route(self, job: JobRecord) -> JobRecord | None:
        """Give a job that came from a source the class of its kind; None, and it waits for one, if there is none."""
        routed = self._kinds.routed(job)
        if routed is not None and self.by_id.get(job.id) is job:
            self._kinds.ended(job)
            self._kinds.begun(routed.terms.id)
            self.by_id[job.id] = routed
        return routed

    def resume(self, job: JobRecord) -> None:
        """Let a claimed job go on to its actor."""
        self._dispatcher.resume(job.id)

    def move(self, after: JobRecord, execution: ExecutionRecord | None = None, *, first: bool = False) -> None:
        """Make ``after`` the job's state: queue it again, or let go of its children, and stage it."""
        job_id = after.id
        self.by_id[job_id] = after
        if after.status is JobStatus.QUEUED:
            self.enqueue(after, first=first)
            if after.terms.spec.lead and job_id in self.children:
                self._close_parts(after)
        elif job_id in self.children:
            self.close_children(after)
        self.stage(after, execution)
        if self._log is not None:
            self.tell_move(after, execution.id if execution is not None else None)

    def tell_move(self, after: JobRecord, execution_id: str | None) -> None:
        """Tell the log where a job went. ``rev`` is what the write expects to find; `written` tells of its guard."""
        if self._log is not None:
            self._log.info(
                "job_moved", job_id=after.id, kind=after.terms.kind, status=after.status.value, reason=after.reason,
                attempt=after.attempts, execution_id=execution_id, rev=after.rev, term=after.term,
            )  # fmt: skip

    def warn(self, event: str, job: JobRecord, execution: ExecutionRecord, **more: Any) -> None:
        """Tell the log of something that went wrong with an execution, whether it is told of moves or not."""
        self._warn.warning(
            event, job_id=job.id, execution_id=execution.id, kind=job.terms.kind, attempt=execution.attempt, **more
        )

    def tell_fenced(self, job_id: str, execution_id: str) -> None:
        """Count a report for an execution that is not current, and tell the log."""
        self.counters["fenced"] += 1
        if self._log is not None:
            guard = "execution is not current"
            self._log.info("report_fenced", job_id=job_id, execution_id=execution_id, guard=guard)

    def stage(self, job: JobRecord, execution: ExecutionRecord | None = None) -> None:
        """Have this state written with the next flush. Nothing is written of a chunk of items: its end is told at once."""
        if not job.terms.part:
            self.writer_of(job).stage(job, execution)
        elif job.status.is_final:
            self.written([job])

    def stage_behind(self, job: JobRecord, execution: ExecutionRecord | None = None) -> None:
        """Have this state written soon."""
        if not job.terms.part:
            self.writer_of(job).stage_behind(job, execution)

    def writer_of(self, job: JobRecord) -> Writer:
        """Return what writes this job."""
        return self._catalog.writer_of(job.id, job.particulars.residence)

    def cancel(self, job: JobRecord, reason: str | None) -> None:
        """Cancel a job that waits; ask one that runs to stop, after its children: it may be waiting for them."""
        now = self._clock.now()
        if job.status in (JobStatus.CREATED, JobStatus.QUEUED):
            self._dispatcher.dequeued(job.terms.spec, was_waiting=job.due_at is not None)
            self.move(transitions.cancelled(job, at=now, reason=reason))  # its children go with it
        elif job.status is JobStatus.RUNNING and job.cancel_requested_at is None:
            for child_id in list(self.children.get(job.id, ())):
                if (child := self.by_id.get(child_id)) and child.terms.when_parent_ends is ParentPolicy.CANCEL:
                    self.cancel(child, reason or "its parent is being cancelled")
            requested = transitions.cancel_requested(job, at=now, reason=reason)
            self.by_id[job.id] = requested
            self.stage(requested)
            if job.execution_id is not None:
                self._dispatcher.stop(job.execution_id, "cancelled")

    def close_children(self, parent: JobRecord) -> None:
        """Cancel the children of a job that has ended, but those that may outlive it."""
        for child_id in list(self.children.get(parent.id, ())):
            if (child := self.by_id.get(child_id)) and child.terms.when_parent_ends is ParentPolicy.CANCEL:
                self.cancel(child, f"its parent {parent.status}")

    def _close_parts(self, lead: JobRecord) -> None:
        """The execution that sent these chunks is over, and nobody is left to take their outcomes."""
        for child_id in list(self.children.get(lead.id, ())):
            if (child := self.by_id.get(child_id)) and child.terms.part:
                self.cancel(child, "the job that they belong to begins again")

    # --- after a flush ---------------------------------------------------------------------------------------------

    def written(self, jobs: Sequence[JobRecord]) -> None:
        """A flush has written these: tell who waits, let go of what has ended, and let begin what is new."""
        live, waiters, lingering = self.by_id, self._waiters, self.lingering
        self._tell_written(jobs)
        for job in jobs:
            if (now_is := live.get(job.id)) is not job:
                # Due or routed while this was on its way: what came of it follows what is written now.
                if now_is is not None and now_is.rev < job.rev:
                    now_is.rev = job.rev
                continue
            if job.completed_at is None:
                if job.rev == 1 and job.particulars.residence.source is not None and job.status is JobStatus.QUEUED:
                    self.enqueue(job)  # the submit of a job in documents is written: now it may run
                continue
            killpoint("settle.after_flush")
            del live[job.id]
            self._kinds.ended(job)
            if job.terms.part:
                self.counters["chunks"] += 1
            else:
                self.counters[job.status] += 1
                self.meters.of(job.terms.kind).ends[job.status] += 1
            if job.particulars.parent_job_id is not None:
                self._leave_parent(job)
            if lingering.waiting and job.id in lingering.waiting:
                lingering.ended(end_of(job))
            if waiters.is_watched(job.id):
                waiters.ended(end_of(job))
            if job.particulars.residence.source is not None:
                waiters.recent.add(end_of(job))
        waiters.wake()

    def _tell_written(self, jobs: Sequence[JobRecord]) -> None:
        """Tell those who show lists, and the log."""
        if self.feed is not None and self.feed.is_heard:
            self.feed.note([(job.id, job) for job in jobs if not job.terms.part])
        if self._log is not None:
            for job in jobs:
                self._log.info(
                    "job_written", job_id=job.id, status=job.status.value, rev=job.rev, term=job.term, guard="applied"
                )

    def unstored(self, job: JobRecord, size: int, limit: int) -> None:
        """No document can be as large as this state: refuse the submit, or fail the job for what it has added since."""
        refusal = LimitExceededError("bytes of a job's document", size, limit, "nothing: shorten it")
        problem = f"its document would have {size:,} bytes; the limit is {limit:,}. Keep large results elsewhere"
        self._give_up(job, refusal, ErrorInfo("DocumentTooLarge", f"job {job.id}: {problem} and return where."))

    def unwritable(self, job: JobRecord, problem: str) -> None:
        """No document can hold this state, whatever its size: refuse the submit, or fail the job for what it has added."""
        refusal = RecordRefusedError({job.id: problem})
        what = f"job {job.id}: what it has produced cannot be stored: {problem}. Return and report plain values."
        self._give_up(job, refusal, ErrorInfo("RecordRefusedError", readable(what, MAX_ERROR_MESSAGE)))

    def _give_up(self, job: JobRecord, refusal: KoanRayError, error: ErrorInfo) -> None:
        now_is = self.by_id.get(job.id)
        if job.rev == 1:
            self.unstorable[job.id] = refusal
            if now_is is not None:
                self._let_go(now_is)
        elif now_is is not None:
            now_is.rev = job.rev - 1  # as it is stored
            if now_is is job:
                self._fail_unstored(job, error)

    def _fail_unstored(self, job: JobRecord, error: ErrorInfo) -> None:
        """Fail a job that no document can hold, without what was added to it: result, progress, or error.

        Where that is not enough, without its checkpoint; where nothing is, it ends here, and its document stays as it is.
        """
        now, execution_id = self._clock.now(), job.execution_id or job.last_execution_id
        if job.execution_id is not None:
            self._dispatcher.forget(job.execution_id)
        is_again = job.status is JobStatus.FAILED and job.reason == FailureKind.UNWRITABLE
        if is_again and job.checkpoint is None:
            self._warn.error("end_not_stored", job_id=job.id, kind=job.terms.kind, problem=error.message)
            self.written([job])
            return
        stored = job.evolve(
            status=JobStatus.RUNNING, result=None, progress=None, error=None, reason=None, completed_at=None, due_at=None,
            cancel_requested_at=None, checkpoint=None if is_again else job.checkpoint,
        )  # fmt: skip
        closed = None
        if execution_id is not None:
            execution = ExecutionRecord(execution_id, job.id, job.attempts, job.started_at or job.created_at)
            closed = execution.close(status=ExecutionStatus.FAILED, reason=Reason.UNWRITABLE, at=now, error=error)
        self.move(transitions.failed(stored, FailureKind.UNWRITABLE, error, at=now), closed)

    def _let_go(self, job: JobRecord) -> None:
        """Forget a job that was never stored."""
        del self.by_id[job.id]
        self._kinds.ended(job)
        self._leave_parent(job)

    def _leave_parent(self, job: JobRecord) -> None:
        parent_id = job.particulars.parent_job_id
        if parent_id is not None and (siblings := self.children.get(parent_id)) is not None:
            siblings.discard(job.id)
            if not siblings:
                del self.children[parent_id]

    def fenced(self, job: JobRecord) -> None:
        """Another writer has this job now: stop touching it, and let its waiters ask again."""
        self.counters["fenced_writes"] += 1
        self.meters.count("fenced_writes", job.status.value)
        self._warn.warning(
            "write_fenced", job_id=job.id, execution_id=job.execution_id, status=job.status.value, rev=job.rev,
            term=job.term, guard="refused",
        )  # fmt: skip
        self.by_id.pop(job.id, None)

    def refused(self, job: JobRecord) -> None:
        """The insert of a job found its id taken: a submit that was made before, or somebody else's job."""
        if self.by_id.get(job.id) is job:
            self._let_go(job)
        self.duplicates[job.id] = job
