"""The one writer of job state: accepts, settles, cancels and finds jobs.

What happens to a job is decided by the pure functions of `koan_ray.domain`; this module applies them, stages the result
with the `Writer` and tells nobody before it is written. Which job runs where is the `Dispatcher`'s part.

A job is in `_live` from its submit until its final state is written; after that only its store knows it. `_live` is also
the job index: a record's ``particulars.residence`` says where the job is kept, and users' jobs carry none of it. Jobs in
documents begin when their submit is written, so that one whose submit was repeated after a crash is not run twice.

Idempotence: every request may be repeated. A submit under a known id succeeds when kind and context are the same; cancel
and remove of what is already so change nothing; reports for an execution that is not current are counted and dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from koan_ray.domain import transitions
from koan_ray.domain.lease import slots_of
from koan_ray.domain.query import parse_query
from koan_ray.domain.records import (
    Checkpoint,
    End,
    ErrorInfo,
    ExecutionRecord,
    JobRecord,
    JobView,
    Part,
    Particulars,
    Progress,
    Terms,
    end_of,
    view,
)
from koan_ray.domain.retry import Advice, decide
from koan_ray.domain.status import ExecutionStatus, FailureKind, JobStatus, ParentPolicy, Reason
from koan_ray.engine.archivist import Archivist
from koan_ray.engine.catalog import Catalog
from koan_ray.engine.checkpoints import Checkpoints
from koan_ray.engine.dispatcher import Dispatcher
from koan_ray.engine.kinds import Kinds
from koan_ray.engine.recovery import Recovery
from koan_ray.engine.tenure import Source, Tenure, TenureState
from koan_ray.engine.waiters import Waiters
from koan_ray.engine.writer import Writer, pause
from koan_ray.errors import (
    ConflictError,
    CoordinatorUnavailableError,
    JobIdConflictError,
    JobNotFoundError,
    KoanRayError,
    LimitExceededError,
    StoreUnavailableError,
)
from koan_ray.ports import Order, Report, Silence

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence

    from koan_ray.domain.records import ActorSpec
    from koan_ray.engine.pool import Active, Actor
    from koan_ray.engine.settings import EngineSettings
    from koan_ray.ports import Clock, JobStore, Launcher, Log, Push, Random, TimerHandle

_SWEEP_S = 10.0
_FIRST_ARCHIVAL_S = 60.0  # after a start, so that one which never lives for an interval archives too
_LINGER_S = 0.005
_SETTLE_SOURCES_S = 10.0  # a start waits so long for its sources before it dispatches what lives in memory
_ELSEWHERE_S = 1.0  # between two looks at jobs that another coordinator runs
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
    checkpoint: Checkpoint | None = None  # of a retry that goes on where the old job stopped


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
        sources: What keeps documents.
        log: Where changes of state are told.
        tells_moves: Tell the log of every single move of a job.
    """

    def __init__(
        self, settings: EngineSettings, *, store: JobStore, launcher: Launcher, clock: Clock, random: Random, epoch: str,
        sources: Sequence[Source] = (), log: Log | None = None, tells_moves: bool = False,
    ) -> None:  # fmt: skip
        self.epoch = epoch
        self._settings, self._clock, self._random = settings, clock, random
        self._log: Log = log if log is not None else Silence()
        self._tells_moves = tells_moves
        self._live: dict[str, JobRecord] = {}
        self._children: dict[str, set[str]] = {}  # live children by parent
        self._lingering: dict[str, asyncio.Future[End | None]] = {}  # submissions that are answered with an end
        self._linger_is_timed = False
        self._elsewhere: set[str] = set()  # jobs that somebody here waits for and another coordinator runs
        self._duplicates: dict[str, JobRecord] = {}  # refused inserts, by id, until their submit is answered
        self._kinds = Kinds(launcher.keep_code if sources else lambda _terms, _code: None)
        self._memory_writer = Writer(store, clock, self.written, self._fenced)
        self._sources = sources
        self._catalog = Catalog(store, self._memory_writer, {}, settings.default_source, settings.default_partition)
        self._checkpoints = Checkpoints(self, self._catalog, clock)
        self._waiters = Waiters(clock, max_sessions=settings.max_sessions, max_watched=settings.max_watched)
        self._dispatcher = Dispatcher(self, launcher, clock, settings, epoch)
        self._launcher = launcher
        self._recovery = Recovery(self, launcher, self._dispatcher, clock, self._log)
        self._archivist = Archivist(
            settings.archival_policies, lambda: self._catalog.tenures, lambda: self._catalog.default,
            self._live.__contains__, clock, self._log,
        )  # fmt: skip
        self._sweeper: TimerHandle | None = None
        self._archiver: TimerHandle | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self.counters: Counter[str] = Counter()
        self.is_started = False

    @property
    def events(self) -> Dispatcher:
        """What launchers report to."""
        return self._dispatcher

    @property
    def n_live(self) -> int:
        """Jobs that have not ended, or whose end is not written yet."""
        return len(self._live)

    async def start(self) -> None:
        """Take over what a previous coordinator left, then begin to dispatch.

        Sources that are not ours yet, or do not answer, are waited for a while and then taken in when they come.
        """
        await self._recovery.survey()
        if self._sources:
            for terms, blob in await self._launcher.kept_code():
                self._kinds.learn([terms], {terms.code_id: blob})
            tenures = {source.name: self._tenure(source) for source in self._sources}
            self._catalog.tenures = tenures
            for tenure in tenures.values():
                self._spawn(tenure.run())
            settled = asyncio.gather(*[tenure.settled() for tenure in tenures.values()])
            limit = self._clock.call_later(_SETTLE_SOURCES_S, lambda: _cancel(settled))
            with contextlib.suppress(asyncio.CancelledError):
                await settled
            limit.cancel()
        self.is_started = True
        self._dispatcher.open()
        self._sweep_later()
        if self._sources and self._settings.archives:
            self._archive_later(min(_FIRST_ARCHIVAL_S, self._settings.archive_interval_s))
        self._log.info("coordinator_started", epoch=self.epoch, n_live=len(self._live))

    def _tenure(self, source: Source) -> Tenure:
        settings = self._settings
        return Tenure(
            source, shard=f"{settings.namespace}/0", slots=slots_of(0, 1), holder=source.holder or self.epoch,
            ttl_s=settings.lease_ttl_s, clock=self._clock, host=self, log=self._log,
        )  # fmt: skip

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def stop(self) -> None:
        """End all actors and dispatch nothing more."""
        self._cancel_timers()
        self._dispatcher.close()

    def vanish(self) -> None:
        """Stop as a killed process does, without a word to anybody; for simulations."""
        self._cancel_timers()
        self._dispatcher.vanish()
        gone = CoordinatorUnavailableError("this coordinator is gone")
        self._memory_writer.abandon(gone)
        for tenure in self._catalog.tenures.values():
            tenure.vanish(gone)
        for task in self._tasks:
            task.cancel()

    def _cancel_timers(self) -> None:
        for timer in (self._sweeper, self._archiver):
            if timer is not None:
                timer.cancel()

    async def close(self) -> None:
        """End all actors, put their jobs in documents back into the queue, and give the leases back."""
        running = self._dispatcher.running()
        self.stop()
        for active in running:
            job = self._live.get(active.job_id)
            if job is not None and job.particulars.residence.source is not None:
                self.interrupted(active)
        for tenure in self._catalog.tenures.values():
            if tenure.may_act:
                with contextlib.suppress(KoanRayError):
                    await tenure.writer.flushed()
            await tenure.close()

    # --- submit ----------------------------------------------------------------------------------------------------

    async def submit(self, submission: Submission, watcher: str | None = None) -> Accepted:
        """Accept jobs. Rows are independent: a refused one does not hold up the others, except at the queue limit.

        ``watcher``: a session that is to be told of their ends, as if it had asked with `wait`.

        Raises:
            LimitExceededError: The queue would grow beyond ``engine.max_queued``; nothing was accepted.
        """
        terms_ids, particulars, rows, introduced, code = submission
        self._learn(introduced, code)
        needs = [terms_id for terms_id in terms_ids if not self._kinds.has(terms_id)]
        if needs:
            return Accepted(self.epoch, 0.0, {}, needs)
        if len(self._live) + len(rows) > self._settings.max_queued:
            raise LimitExceededError(
                "jobs queued or running", len(self._live) + len(rows), self._settings.max_queued, "engine.max_queued"
            )
        terms = [self._kinds.terms(terms_id) for terms_id in terms_ids]
        if not all(item.part for item in terms):
            particulars = [await self._placed(about) for about in particulars]
        now = self._clock.now()
        refused: dict[int, KoanRayError] = {}
        for place, raw in enumerate(rows):
            row = Row(*raw)
            job_terms, about = terms[row.terms], particulars[row.particulars]
            has_ties = about.parent_job_id is not None or about.retry_of is not None
            if row.job_id in self._live or (has_ties and not job_terms.part):
                error = await self._examine(row, job_terms, about)
                if isinstance(error, KoanRayError):
                    refused[place] = error
                if error is not None:
                    continue
            self._accept(row, job_terms, about, now)
        may_linger = watcher is not None and len(rows) == 1 and not refused and particulars[0].residence.source is None
        if may_linger and not terms[0].part and (end := await self._linger(rows[0][0])) is not None:
            return Accepted(self.epoch, now, refused, [], ended=(end,))
        is_watched = watcher is not None and self._watch_early(watcher, [row[0] for row in rows])
        for residence in {about.residence for about in particulars}:
            # A job is told to be accepted when its flush is written, and nothing else is waited for.
            await self._catalog.writer_of(residence).flushed()
        if self._duplicates:
            await self._answer_duplicates(rows, refused)
        return Accepted(self.epoch, now, refused, [], is_watched)

    async def _placed(self, about: Particulars) -> Particulars:
        """Fill in where jobs are kept: as asked, or with their parent; and see that the place takes jobs."""
        residence = about.residence
        if residence.source is None and about.parent_job_id is not None:
            parent = self._live.get(about.parent_job_id) or await self._catalog.get(about.parent_job_id)
            residence = self._catalog.home(parent.particulars.residence) if parent is not None else residence
        residence = self._catalog.place(residence)
        if (tenure := self._catalog.tenure_of(residence)) is not None:
            await tenure.ready()
        return about if residence == about.residence else about._replace(residence=residence)

    async def _answer_duplicates(self, rows: Sequence[tuple[Any, ...]], refused: dict[int, KoanRayError]) -> None:
        """A submit that was made before, and whose job has ended or is known: the same again is a success."""
        for place, row in enumerate(rows):
            job = self._duplicates.pop(row[0], None)
            if job is None:
                continue
            stored = await self._catalog.get(job.id)
            if stored is None or stored.terms.kind != job.terms.kind or not _same_json(stored.context, job.context):
                refused[place] = JobIdConflictError(job.id)

    async def _linger(self, job_id: str) -> End | None:
        """Return the end of a job that is known to take no time, so that its submission is answered with its result.

        It spares the caller, who is about to wait for it, a call. `_LINGER_S` is the most that this delays an answer.
        """
        await self._memory_writer.flushed()
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
        job = JobRecord(row.job_id, terms, about, row.context, row.created_at, checkpoint=row.checkpoint)
        job.status, job.queued_at, job.last_modified = JobStatus.QUEUED, now, now  # T1, as `transitions.queued`
        self._kinds.begun(terms.id)
        self._live[row.job_id] = job
        parent_id = about.parent_job_id
        if parent_id is not None:
            self._children.setdefault(parent_id, set()).add(row.job_id)
        if row.delay_s > 0:
            job.due_at, job.reason = now + row.delay_s, Reason.DELAY
        if about.residence.source is None:
            self._enqueue(job)
        self._stage(job)
        if parent_id is not None and self._is_closing(parent_id) and terms.when_parent_ends is ParentPolicy.CANCEL:
            self._move(transitions.cancelled(job, at=now, reason="its parent has ended or is being cancelled"))
            self._dispatcher.dequeued(terms.spec, was_waiting=row.delay_s > 0)

    async def _examine(self, row: Row, terms: Terms, about: Particulars) -> KoanRayError | bool | None:
        """Return what is wrong with a row, True for one that is here already, None for one to accept."""
        known = self._live.get(row.job_id) or await self._catalog.get(row.job_id)
        if known is not None:
            same = known.terms.kind == terms.kind and _same_json(known.context, row.context)
            return True if same else JobIdConflictError(row.job_id)
        if about.depth > self._settings.max_depth:
            return LimitExceededError("depth of a job tree", about.depth, self._settings.max_depth, "engine.max_depth")
        parent_id = about.parent_job_id
        if parent_id is not None and parent_id not in self._live and await self._catalog.get(parent_id) is None:
            return JobNotFoundError(parent_id)
        return None

    def _is_closing(self, parent_id: str) -> bool:
        parent = self._live.get(parent_id)
        return parent is None or parent.status.is_final or parent.cancel_requested_at is not None

    def _enqueue(self, job: JobRecord, *, first: bool = False) -> None:
        """Let a queued job be dispatched when it is due."""
        if job.due_at is not None:
            self._dispatcher.enqueue_at(job.id, job.due_at)
        else:
            self._dispatcher.enqueue(job.id, job.terms.spec, job.particulars.depth, first=first)

    def _learn(self, terms: Sequence[Terms], code: Mapping[str, bytes]) -> None:
        for job_id in self._kinds.learn(terms, code):
            job = self._live.get(job_id)
            if job is not None and job.status is JobStatus.QUEUED and (routed := self._kinds.routed(job)) is not None:
                self._kinds.ended(job)
                self._kinds.begun(routed.terms.id)
                self._live[job_id] = routed
                self._enqueue(routed)

    async def introduce(self, terms: Sequence[Terms], code: Mapping[str, bytes]) -> str:
        """Take in job classes that a process has, so that stored jobs of their kinds can run; returns the epoch."""
        self._learn(terms, code)
        return self.epoch

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
            stored = None if job_id in self._live else await self._look_up(session_id, job_id)
            if job_id in self._live:  # perhaps only now: it was taken over while we looked
                self._waiters.watch(session_id, [job_id])
            elif stored is None and job_id not in self._elsewhere:
                unknown.append(job_id)
            elif stored is not None and not self._waiters.is_watched(job_id):
                early.append(end_of(stored))
        for end in early:
            self._waiters.tell(session_id, end)
        if unknown:
            park_s = 0.0
        elif self._waiters.n_parked > _FEW_PARKED:
            park_s = min(park_s, 0.05)
        return Ends(self.epoch, await self._waiters.park(session_id, park_s), unknown)

    async def _look_up(self, session_id: str, job_id: str) -> JobRecord | None:
        """Return a job that has ended; one that another coordinator runs, or may run, is watched from afar."""
        try:
            stored = await self._catalog.get(job_id)
            is_certain = all(tenure.state is TenureState.ACTIVE for tenure in self._catalog.tenures.values())
        except StoreUnavailableError:
            stored, is_certain = None, False
        if job_id in self._live or (stored is not None and stored.status.is_final) or (stored is None and is_certain):
            return stored
        self._waiters.watch(session_id, [job_id])
        if not self._elsewhere:
            self._spawn(self._watch_elsewhere())
        self._elsewhere.add(job_id)
        return None

    async def _watch_elsewhere(self) -> None:
        """Look, while somebody waits, for the ends of jobs that another coordinator runs."""
        await pause(self._clock, _ELSEWHERE_S)
        while self._elsewhere:
            for job_id in list(self._elsewhere):
                if job_id in self._live or not self._waiters.is_watched(job_id):
                    self._elsewhere.discard(job_id)
                    continue
                with contextlib.suppress(StoreUnavailableError):
                    stored = await self._catalog.get(job_id)
                    if stored is not None and stored.status.is_final:
                        self._elsewhere.discard(job_id)
                        self._waiters.ended(end_of(stored))
            self._waiters.wake()
            await pause(self._clock, _ELSEWHERE_S)

    # --- cancel, retry, remove -------------------------------------------------------------------------------------

    async def cancel(self, job_id: str, reason: str | None = None) -> JobStatus:
        """Cancel a job and its children; return its status now. ``CANCELLED`` is final, ``RUNNING`` will end soon.

        Raises:
            JobNotFoundError: There is no such job.
        """
        job = self._live.get(job_id)
        if job is None:
            stored = await self._catalog.get(job_id)
            if stored is None:
                raise JobNotFoundError(job_id)
            if stored.status.is_final:
                return stored.status
            tenure = self._catalog.tenure_of(stored.particulars.residence)
            if tenure is None or not tenure.may_act or not await tenure.has_all() or job_id not in self._live:
                raise ConflictError(_elsewhere(job_id))
            return await self.cancel(job_id, reason)
        self._cancel(job, reason[:_MAX_REASON] if reason else None)
        await self._writer_of(job).flushed()
        now_is = self._live.get(job_id) or await self._catalog.get(job_id)
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
            self._stage(requested)
            if job.execution_id is not None:
                self._dispatcher.stop(job.execution_id, "cancelled")

    async def retry(self, job_id: str, as_id: str, resume: bool = False) -> JobView:  # noqa: FBT001, FBT002 - the wire has places only
        """Run a failed or cancelled job anew, as the new job ``as_id`` that names the old one. May be repeated.

        ``resume``: the new job goes on from a copy of the old one's checkpoint and parts; for jobs over items.

        Raises:
            JobNotFoundError: There is no such job.
            ConflictError: It is not failed or cancelled, its class is no longer known here, or it has no checkpoint.
        """
        old = self._live.get(job_id) or await self._catalog.get(job_id)
        if old is None:
            raise JobNotFoundError(job_id)
        if old.status not in (JobStatus.FAILED, JobStatus.CANCELLED):
            msg = f"job {job_id}: is {old.status}; only a failed or cancelled job can be run again"
            raise ConflictError(msg)
        terms, about, row = self._again(old, as_id)
        if not resume:
            return await self._run_again(terms, about, row)
        async with self._checkpoints.copied(old, as_id, about.residence) as checkpoint:
            return await self._run_again(terms, about, row._replace(checkpoint=checkpoint))

    async def retry_failed_items(self, job_id: str, as_id: str) -> JobView:
        """Run the dead items of a job over items that has ended, as the new job ``as_id``. May be repeated.

        Raises:
            JobNotFoundError: There is no such job.
            ConflictError: It has not ended, has no dead items, or its class is no longer known here.
        """
        old = await self.look(job_id)
        if old is None:
            raise JobNotFoundError(job_id)
        n_failed = old.checkpoint.failed if old.checkpoint is not None else 0
        if not old.status.is_final or not n_failed:
            is_so = "has no failed items" if old.status.is_final else f"is {old.status}; wait for its end or cancel it"
            msg = f"job {job_id}: {is_so}; its failed items cannot be run again"
            raise ConflictError(msg)
        only_failed = Checkpoint(0, json.dumps({"failed_of": job_id}).encode(), n_failed, 0, 0, 0, self._clock.now())
        terms, about, row = self._again(old, as_id)
        return await self._run_again(terms, about, row._replace(checkpoint=only_failed))

    def _again(self, old: JobRecord, as_id: str) -> tuple[Terms, Particulars, Row]:
        """Return what a new job is made of that does what ``old`` did."""
        routed = self._kinds.routed(old)
        if routed is None:
            msg = f"job {old.id}: its class {old.terms.kind!r} is not known here; import its module where you use the engine"
            raise ConflictError(msg)
        residence = self._catalog.place(self._catalog.home(old.particulars.residence))
        about = old.particulars._replace(retry_of=old.id, parent_job_id=None, depth=0, residence=residence)
        return routed.terms, about, Row(as_id, 0, 0, old.context, self._clock.now())

    async def _run_again(self, terms: Terms, about: Particulars, row: Row) -> JobView:
        answer = await self.submit(Submission([terms.id], [about], [row], [], {}))
        for error in answer.refused.values():
            raise error
        return await self.get(row.job_id)

    # --- checkpoints of jobs over items ------------------------------------------------------------------------------

    async def checkpoint(self, job_id: str, execution_id: str, checkpoint: Checkpoint, parts: Sequence[Part]) -> bool:
        """Store how far an execution has come, and what it has produced; false if it shall stop. `Checkpoints.keep`."""
        return await self._checkpoints.keep(job_id, execution_id, Checkpoint(*checkpoint), [Part(*part) for part in parts])

    async def resume_state(self, job_id: str, execution_id: str) -> Checkpoint | None:
        """Return where an execution goes on from; see `Checkpoints.resume_state`."""
        return await self._checkpoints.resume_state(job_id, execution_id)

    async def parts(self, job_id: str, stream: str, after: int = -1, limit: int = 50) -> list[Part]:
        """Return what a job over items has produced, page by page; see `Checkpoints.parts`."""
        return await self._checkpoints.parts(job_id, stream, after, limit)

    async def look(self, job_id: str) -> JobRecord | None:
        """Return a job as it is now, wherever it is."""
        return self._live.get(job_id) or await self._catalog.get(job_id)

    def is_live(self, job_id: str) -> bool:
        """Tell whether a job is unfinished and ours."""
        return job_id in self._live

    def checkpointed(self, job: JobRecord) -> None:
        """Make this the job's state, and write it with the next flush."""
        self._live[job.id] = job
        self._stage(job)

    async def remove(self, job_id: str) -> None:
        """Delete a job that has ended, with its executions. Removing what is not there changes nothing.

        Raises:
            ConflictError: It has not ended.
        """
        await self._catalog.flushed()
        job = self._live.get(job_id) or await self._catalog.get(job_id)
        if job is not None and (job_id in self._live or not job.status.is_final):
            msg = f"job {job_id}: is {job.status}; cancel it and wait for its end before you remove it"
            raise ConflictError(msg)
        async with self._archivist.undisturbed:
            while job is not None:  # again, if it was on its way between two sources
                await self._catalog.remove(job)
                job = await self._catalog.get(job_id)

    # --- archive ---------------------------------------------------------------------------------------------------

    async def archive(self, dry_run: bool) -> dict[str, dict[str, int]]:  # noqa: FBT001 - the wire has places only
        """Apply the archival policies now; returns counts by policy, see `Archivist.archive_once`."""
        await self._catalog.flushed()
        return await self._archivist.archive_once(dry_run=dry_run)

    async def restore(self, job_id: str) -> JobView:
        """Bring a job back from an archive; one that is in none stays where it is. See `Archivist.restore`."""
        if job_id not in self._live and await self._catalog.memory.get(job_id) is None:
            await self._archivist.restore(job_id)
        return await self.get(job_id)

    def _archive_later(self, delay_s: float) -> None:
        self._archiver = self._clock.call_later(delay_s, self._archive_on_time)

    def _archive_on_time(self) -> None:
        self._archive_later(self._settings.archive_interval_s)
        if not self._archivist.is_passing:
            self._spawn(self._archive_and_survive())

    async def _archive_and_survive(self) -> None:
        try:
            await self._archivist.archive_once()
        except Exception as error:  # noqa: BLE001 - told, and the next pass comes
            self._log.error("archival_failed", problem=f"{type(error).__name__}: {error}")

    # --- look ------------------------------------------------------------------------------------------------------

    async def get(self, job_id: str) -> JobView:
        """Return a job as it is now.

        Raises:
            JobNotFoundError: There is no such job.
        """
        job = self._live.get(job_id) or await self._catalog.get(job_id)
        if job is None:
            raise JobNotFoundError(job_id)
        return view(job)

    async def query(self, filters: Mapping[str, Any]) -> tuple[list[JobView], str | None]:
        """Return one page of jobs and the cursor of the next."""
        query = parse_query(filters)
        await self._catalog.flushed()
        page = await self._catalog.query(query)
        return [view(self._live.get(job.id, job)) for job in page.jobs], page.cursor

    async def count(self, filters: Mapping[str, Any]) -> int:
        """Return how many jobs match, whatever limit and cursor say."""
        query = parse_query(filters)
        await self._catalog.flushed()
        return await self._catalog.count(query)

    async def executions(self, job_id: str) -> list[ExecutionView]:
        """Return a job's executions, oldest first.

        Raises:
            JobNotFoundError: There is no such job.
        """
        await self._catalog.flushed()
        job = self._live.get(job_id) or await self._catalog.get(job_id)
        if job is None:
            raise JobNotFoundError(job_id)
        records = await self._catalog.executions(job)
        return [_execution_view(record) for record in records if record.reason is not Reason.RETURNED]

    async def status(self) -> dict[str, Any]:
        """Return counts of jobs and actors, limits and counters."""
        return {
            "epoch": self.epoch,
            "pid": os.getpid(),
            "live": len(self._live),
            "limits": {"max_queued": self._settings.max_queued, "max_actors": self._settings.max_actors},
            "jobs": dict(self.counters),
            "sources": {
                name: {"state": tenure.state.value, "term": tenure.term, "problem": tenure.problem and str(tenure.problem)}
                for name, tenure in self._catalog.tenures.items()
            },
            "archival": {"enabled": self._settings.archives, **self._archivist.snapshot()},
            "checkpoints": dict(self._checkpoints.counters),
            "unroutable": self._kinds.unroutable(),
            **self._dispatcher.snapshot(),
        }

    async def width(self) -> int:
        """Return how many job actors may run bodies at a time."""
        return self._dispatcher.width()

    def pushed(self, push: Push) -> bool:
        """A job actor tells of bodies that went on after their batch was answered; false if it is none of ours."""
        return self._dispatcher.pushed(push)

    async def note(self, push: Push) -> bool | None:
        """As `pushed`, and when it returns, the ends are stored; None for an actor that is not decided on: ask again."""
        if push.actor in self._recovery.limbo:
            return None
        known = self._dispatcher.pushed(push)
        if push.ended and self._catalog.tenures:
            await self._catalog.flushed()
        return known

    # --- what the dispatcher asks ----------------------------------------------------------------------------------

    def queued(self, job_id: str) -> JobRecord | None:
        """Return the job if it waits to be dispatched now."""
        job = self._live.get(job_id)
        if job is None or job.status is not JobStatus.QUEUED or job.due_at is not None:
            return None
        tenure = self._catalog.tenure_of(job.particulars.residence)
        if tenure is not None and not tenure.may_act:
            tenure.hold(job_id)  # nothing is started while the lease may be somebody else's
            return None
        return job

    def begin(self, job: JobRecord, execution_id: str, now: float) -> tuple[ExecutionRecord, Order]:
        """Move a queued job to Running; written behind, so that a job that ends at once is written once."""
        running = transitions.dispatched(job, execution_id, at=now)
        execution = ExecutionRecord(execution_id, job.id, running.attempts, now)
        self._live[job.id] = running
        if not job.terms.part:
            self._writer_of(job).stage_behind(running, execution)
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
        self._settle(active.execution, active.actor, after, status, reason, report=report)

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
            if self._writer_of(job).forget_execution(job.id, active.execution.id):
                self._move(after.evolve(last_execution_id=None), first=True)  # as if it had never been
            else:
                self._settle(active.execution, active.actor, after, ExecutionStatus.CANCELLED, Reason.RETURNED, first=True)

    def interrupted(self, active: Active) -> None:
        """Put a job back whose process was ended for another's sake."""
        job = self._current(active)
        if job is not None:
            after = transitions.interrupted(job, at=self._clock.now())
            self._settle(active.execution, active.actor, after, ExecutionStatus.CANCELLED, Reason.INTERRUPTED, first=True)

    def vanished(self, active: Active, cause: str) -> None:
        """Count a crash, and run the job again or give it up as poison."""
        job = self._current(active)
        if job is not None:
            self._lose(job, active.execution, active.actor, ErrorInfo("ProcessLost", cause), None)

    def killed(self, active: Active, cause: str) -> None:
        """Settle an execution that did not stop and was killed."""
        job = self._current(active)
        if job is None:
            return
        now = self._clock.now()
        metrics = (("stopped_by", "kill"),)
        if cause == "cancelled":
            after = transitions.cancelled(job, at=now)
            self._settle(active.execution, active.actor, after, ExecutionStatus.CANCELLED, Reason.CANCELLED, metrics=metrics)
            return
        took = f"the attempt took longer than {job.terms.timeout_s:g}s and did not stop; its process was killed"
        error = ErrorInfo("TimeoutError", took)
        report = Report(active.execution.id, active.job_id, "timeout", active.execution.started_at, 0.0, error=error)
        after, reason = self._after_failure(job, report, now)
        self._settle(active.execution, active.actor, after, ExecutionStatus.FAILED, reason, error=error, metrics=metrics)

    def progressed(self, active: Active, progress: Progress) -> None:
        """Remember how far a running job is."""
        job = self._current(active)
        if job is not None and (job.progress is None or progress.sequence > job.progress.sequence):
            after = job.evolve(progress=progress, last_modified=self._clock.now())
            self._live[job.id] = after
            if not job.terms.part:
                self._writer_of(job).stage_behind(after)

    def when_stored(self, reports: Sequence[Report], then: Callable[[], None]) -> None:
        """Call ``then`` when what became of these reports is written."""

        async def follow() -> None:
            with contextlib.suppress(KoanRayError):  # not written here: the next coordinator asks the actor
                for report in reports:
                    job = self._live.get(report.job_id)
                    if job is not None:
                        await self._writer_of(job).flushed()
                        break
                then()

        self._spawn(follow())

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

    def _lose(
        self, job: JobRecord, execution: ExecutionRecord, actor: Actor | None, error: ErrorInfo, report: Report | None
    ) -> None:
        now = self._clock.now()
        self.counters["crashes"] += 1
        if job.terms.part:  # whether and how its items are tried again is for the job to say that they belong to
            after = transitions.failed(job, FailureKind.POISON, ErrorInfo("ProcessLost", error.message), at=now)
        elif job.crashes + 1 >= self._settings.max_crashes and job.cancel_requested_at is None:
            doomed = job.evolve(crashes=job.crashes + 1)
            message = f"the process died {doomed.crashes} times while it ran this job; the last time: {error.message}"
            poison = ErrorInfo(error.type, message[:2000])
            after = transitions.failed(doomed, FailureKind.POISON, poison, at=now)
        else:
            after = transitions.lost(job, error, at=now)
        self._settle(execution, actor, after, ExecutionStatus.FAILED, Reason.LOST, report=report, error=error, first=True)

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
    ) -> None:
        """Write how an execution ended together with what that makes of its job."""
        now = self._clock.now()
        if report is not None:
            execution.started_at = report.began_at
            now, error, metrics = report.began_at + report.duration_s, error or report.error, report.metrics
        if actor is not None and actor.info is not None:
            metrics = (*metrics, ("actor", actor.name), ("where", actor.info))
        closed = execution.close(status=status, reason=reason, at=now, error=error, metrics=metrics)
        self._move(after, closed, first=first)

    def _move(self, after: JobRecord, execution: ExecutionRecord | None = None, *, first: bool = False) -> None:
        """Make ``after`` the job's state: queue it again, or let go of its children, and stage it."""
        job_id = after.id
        self._live[job_id] = after
        if after.status is JobStatus.QUEUED:
            self._enqueue(after, first=first)
            if after.terms.spec.lead and job_id in self._children:
                self._close_parts(after)
        elif job_id in self._children:
            self._close_children(after)
        self._stage(after, execution)
        if self._tells_moves:
            self._log.info(
                "job_moved", job_id=job_id, kind=after.terms.kind, status=after.status.value, reason=after.reason,
                attempt=after.attempts, execution_id=execution.id if execution is not None else None, rev=after.rev,
            )  # fmt: skip

    def _writer_of(self, job: JobRecord) -> Writer:
        return self._catalog.writer_of(job.particulars.residence)

    def _stage(self, job: JobRecord, execution: ExecutionRecord | None = None) -> None:
        if not job.terms.part:
            self._writer_of(job).stage(job, execution)
        elif job.status.is_final:  # nothing is written of a chunk, so its end can be told at once
            self.written([job])

    def _close_parts(self, lead: JobRecord) -> None:
        """The execution that sent these chunks is over, and nobody is left to take their outcomes."""
        for child_id in list(self._children.get(lead.id, ())):
            if (child := self._live.get(child_id)) and child.terms.part:
                self._cancel(child, "the job that they belong to begins again")

    def _close_children(self, parent: JobRecord) -> None:
        for child_id in list(self._children.get(parent.id, ())):
            if (child := self._live.get(child_id)) and child.terms.when_parent_ends is ParentPolicy.CANCEL:
                self._cancel(child, f"its parent {parent.status}")

    # --- after a flush ---------------------------------------------------------------------------------------------

    def written(self, jobs: Sequence[JobRecord]) -> None:
        """A flush has written these: tell who waits, let go of what has ended, and let begin what is new."""
        live, waiters = self._live, self._waiters
        for job in jobs:
            if (now_is := live.get(job.id)) is not job:
                # Due or routed while this was on its way: what came of it follows what is written now.
                if now_is is not None and now_is.rev < job.rev:
                    now_is.rev = job.rev
                continue
            if job.completed_at is None:
                if job.rev == 1 and job.particulars.residence.source is not None:
                    self._begin_stored(job)
                continue
            del live[job.id]
            self._kinds.ended(job)
            self.counters["chunks" if job.terms.part else job.status] += 1
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

    def _begin_stored(self, job: JobRecord) -> None:
        """The submit of a job in documents is written: now it may run."""
        if job.status is JobStatus.QUEUED:
            self._enqueue(job)

    def _fenced(self, job: JobRecord) -> None:
        """Another writer has this job now: stop touching it, and let its waiters ask again."""
        self.counters["fenced_writes"] += 1
        self._live.pop(job.id, None)

    # --- what tenures and recovery ask -------------------------------------------------------------------------------

    def refused(self, job: JobRecord) -> None:
        """The insert of a job found its id taken: a submit that was made before, or somebody else's job."""
        if self._live.get(job.id) is job:
            del self._live[job.id]
            self._kinds.ended(job)
        self._duplicates[job.id] = job
        if (tenure := self._catalog.tenure_of(job.particulars.residence)) is not None:
            self._spawn(self._take_back(tenure, job.id))

    async def _take_back(self, tenure: Tenure, job_id: str) -> None:
        """Take in a stored job that was passed over because a repeated submit stood in its place when it was read."""
        with contextlib.suppress(StoreUnavailableError):  # then the sweep or the next coordinator finds it
            stored = await tenure.store.get(job_id)
            if stored is not None and not stored.status.is_final and stored.term == tenure.term:
                await self.found(tenure, [stored])

    def took_in(self, tenure: Tenure, jobs: Sequence[JobRecord]) -> None:
        """Make a source's unfinished jobs ours; they are not dispatched before `opened`."""
        for job in jobs:
            placed = self._kinds.routed(self._catalog.placed(job, tenure)) or self._catalog.placed(job, tenure)
            self._live[job.id] = placed
            self._kinds.begun(placed.terms.id)
            parent_id = placed.particulars.parent_job_id
            if parent_id is not None:
                self._children.setdefault(parent_id, set()).add(job.id)

    async def opened(self, tenure: Tenure) -> None:
        """Adopt what runs, count as lost what nobody runs, close children of parents that have ended, and dispatch."""
        mine = [job for job in self._live.values() if job.particulars.residence.source == tenure.source]
        await self._recovery.adopt(tenure, mine)
        if all(each.state is TenureState.ACTIVE for each in self._catalog.tenures.values()):
            self._recovery.release()
        self._dispatch_taken(mine)
        await self._close_orphans(mine)
        self._log.info("jobs_recovered", source=tenure.source, n=len(mine), unroutable=self._kinds.unroutable())

    async def found(self, tenure: Tenure, jobs: Sequence[JobRecord]) -> None:
        """Take in those of a source's unfinished jobs that are not known here: its queue, and what was inserted late."""
        new = [job for job in jobs if job.id not in self._live]
        if not new:
            return
        self.took_in(tenure, new)
        mine = [self._live[job.id] for job in new]
        if any(job.status is JobStatus.RUNNING for job in mine):
            await self._recovery.adopt(tenure, mine)
        self._dispatch_taken(mine)
        await self._close_orphans(mine)

    def _dispatch_taken(self, jobs: Sequence[JobRecord]) -> None:
        for job in jobs:
            is_waiting = self._live.get(job.id) is job and job.status is JobStatus.QUEUED
            if is_waiting and self._kinds.routed(job) is not None:
                self._enqueue(job)

    async def _close_orphans(self, jobs: Sequence[JobRecord]) -> None:
        """A crash came between the end of a parent and the cancellation of its children."""
        for parent_id in {job.particulars.parent_job_id for job in jobs} - {None, *self._live}:
            parent = await self._catalog.get(parent_id or "")
            if parent is not None and parent.status.is_final:
                self._close_children(parent)

    def resumed(self, job_ids: Sequence[str]) -> None:
        """The lease is certain again: dispatch what was held back."""
        for job_id in job_ids:
            job = self._live.get(job_id)
            if job is not None and job.status is JobStatus.QUEUED:
                self._enqueue(job)

    def stood_down(self, tenure: Tenure) -> None:
        """Another coordinator has the source: let go of everything that lives there; its waiters are told from afar."""
        gone = [job for job in self._live.values() if job.particulars.residence.source == tenure.source]
        for job in gone:
            del self._live[job.id]
            self._kinds.ended(job)
            self._children.pop(job.id, None)
            if job.execution_id is not None:
                self._dispatcher.forget(job.execution_id)
            if self._waiters.is_watched(job.id):
                if not self._elsewhere:
                    self._spawn(self._watch_elsewhere())
                self._elsewhere.add(job.id)

    def current(self, job_id: str, execution_id: str) -> JobRecord | None:
        """Return the live job if this is its current execution."""
        job = self._live.get(job_id)
        return job if job is not None and job.execution_id == execution_id else None

    def unheld(self, job: JobRecord, execution: ExecutionRecord) -> None:
        """Nobody runs or holds this execution: count a crash, and run the job again or give it up as poison."""
        lost = ErrorInfo("ProcessLost", "its coordinator and its job actor are gone")
        job = self.current(job.id, execution.id) or job  # a checkpoint may have come since it was read
        self._lose(job, execution, None, lost, None)

    def given_back(self, job: JobRecord, execution: ExecutionRecord) -> None:
        """It was sent to an actor and never begun."""
        after = transitions.returned(job, at=self._clock.now())
        self._settle(execution, None, after, ExecutionStatus.CANCELLED, Reason.RETURNED, first=True)

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
        return await self._catalog.memory.expire(self._clock.now())


def _same_json(one: bytes, other: bytes) -> bool:
    """Tell whether two contexts are equal; a store may have changed spaces."""
    return one == other or json.loads(one) == json.loads(other)


def _cancel(future: asyncio.Future[Any]) -> None:
    future.cancel()


def _elsewhere(job_id: str) -> str:
    return (
        f"job {job_id}: another coordinator holds the lease of its source, and only that one can change it. "
        f"Ask the engine of the cluster that runs it, or wait until this one has taken over."
    )


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
