"""The one writer of job state: accepts, settles, cancels and finds jobs. What it is made of, and what it answers itself.

::

    submit ──► Submitting ──►┐             ┌──► Dispatcher: which job runs where
                             ├─ LiveJobs ──┤
    tenures ─► Takeover ────►┘      ▲      └──► Writer: group commit, one for each tenure and one for memory
                                    │
    Dispatcher, Recovery ──► Settling: how an execution begins, and what its end makes of its job

What happens to a job is decided by the pure functions of `koan_ray.domain`; these modules apply them, stage the result
with the `Writer` and tell nobody before it is written.

Idempotence: every request may be repeated. A submit under a known id succeeds when kind and context are the same; cancel
and remove of what is already so change nothing; reports for an execution that is not current are counted and dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from typing import TYPE_CHECKING, Any

from koan_ray.domain.measures import MAX_KINDS, Measures
from koan_ray.domain.query import parse_query
from koan_ray.domain.records import (
    Checkpoint,
    DocumentPage,
    JobRecord,
    JobView,
    Part,
    Particulars,
    Terms,
    end_of,
    told,
    view,
)
from koan_ray.domain.status import JobStatus
from koan_ray.domain.words import cancel_reason
from koan_ray.engine.archivist import Archivist
from koan_ray.engine.catalog import Catalog
from koan_ray.engine.checkpoints import Checkpoints
from koan_ray.engine.dispatcher import Dispatcher
from koan_ray.engine.elsewhere import Elsewhere
from koan_ray.engine.kinds import Kinds
from koan_ray.engine.live import LiveJobs
from koan_ray.engine.messages import Accepted, Ends, ExecutionView, Row, Submission, execution_view
from koan_ray.engine.obstacles import Obstacles
from koan_ray.engine.reading import details_of
from koan_ray.engine.reasons import Reasons
from koan_ray.engine.recovery import Recovery
from koan_ray.engine.settling import Settling
from koan_ray.engine.shards import Shards
from koan_ray.engine.sinks import Sinks
from koan_ray.engine.submitting import Submitting
from koan_ray.engine.takeover import Takeover
from koan_ray.engine.tasks import Failures, Tasks
from koan_ray.engine.waiters import Waiters
from koan_ray.engine.window import Window
from koan_ray.engine.writer import Writer
from koan_ray.errors import (
    ConflictError,
    CoordinatorUnavailableError,
    KindNotIntroducedError,
    StoreUnavailableError,
)
from koan_ray.ports import Silence

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Mapping, Sequence

    from koan_ray.engine.feed import News
    from koan_ray.engine.messages import Details
    from koan_ray.engine.settings import EngineSettings
    from koan_ray.engine.tenure import Source, Tenure
    from koan_ray.ports import Clock, JobStore, Launcher, Log, Push, Random, TimerHandle

_SWEEP_S = 10.0
_FIRST_ARCHIVAL_S = 60.0  # after a start, so that one which never lives for an interval archives too
_SETTLE_SOURCES_S = 10.0  # a start waits so long for its sources before it dispatches what lives in memory
_FEW_PARKED = 48  # above this, waits are answered sooner so that all sessions get their turn


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
        self._settings, self._clock, self._sources, self._launcher = settings, clock, sources, launcher
        self._log: Log = log if log is not None else Silence()
        self.failures = Failures(self._log)
        self._tasks = Tasks(self.failures, clock)
        self._kinds = Kinds(launcher.keep_code if sources else lambda _terms, _code: None)
        self._waiters = Waiters(clock, max_sessions=settings.max_sessions, max_watched=settings.max_watched)
        self._jobs = LiveJobs(self._kinds, self._waiters, clock, self._log, tells_moves=tells_moves)
        self._live = self._jobs.by_id
        self._memory_writer = Writer(
            store,
            clock,
            self._jobs.written,
            self._jobs.fenced,
            self._jobs.unwritable,
            meters=self._jobs.meters,
            log=self._log,
        )
        self._catalog = Catalog(
            store, self._memory_writer, {}, settings.default_source, settings.default_partition, settings.in_memory
        )
        self._checkpoints = Checkpoints(self._jobs, self._catalog, clock)
        self._sinks = Sinks(self._checkpoints, self._catalog)
        self._settling = Settling(
            self._jobs, self._kinds, self._catalog, clock, random, self._tasks, max_crashes=settings.max_crashes
        )
        self._dispatcher = Dispatcher(
            self._settling, launcher, clock, settings, epoch, Obstacles(launcher, self._log), self.failures
        )
        self._reasons = Reasons(self._jobs, self._kinds, self._dispatcher)
        self._jobs.attach(self._catalog, self._dispatcher)
        self._submitting = Submitting(
            epoch, settings, self._jobs, self._kinds, self._catalog, self._waiters, self._dispatcher,
            self._reasons, clock,
        )  # fmt: skip
        self._elsewhere = Elsewhere(self._live, self._waiters, self._catalog, clock, self._tasks)
        self._recovery = Recovery(self._settling, launcher, self._dispatcher, clock, self._log)
        self._takeover = Takeover(
            self._jobs, self._kinds, self._catalog, self._recovery, self._waiters, self._elsewhere, self._tasks, self._log
        )
        self._archivist = Archivist(
            settings.archival_policies, lambda: self._catalog.sources, lambda: self._catalog.default,
            self._live.__contains__, clock, self._log, self.failures,
        )  # fmt: skip
        self._window = Window(self._live, lambda: self._catalog, self._kinds.names, self._reasons, clock, epoch)
        self._jobs.feed = self._window.feed
        self._sweeper: TimerHandle | None = None
        self._archiver: TimerHandle | None = None
        self.is_started = False

    @property
    def events(self) -> Dispatcher:
        """What launchers report to."""
        return self._dispatcher

    @property
    def counters(self) -> Counter[str]:
        """What has happened so far, by name."""
        return self._jobs.counters

    @property
    def n_live(self) -> int:
        """Jobs that have not ended, or whose end is not written yet."""
        return len(self._live)

    async def start(self) -> None:
        """Take over what a previous coordinator left, then begin to dispatch.

        Sources that are not ours yet, or do not answer, are waited for a while and then taken in when they come.
        """
        await self._recovery.survey()
        kept = await self._launcher.kept_code() if self._sources else []
        if self._sources and not self._catalog.sources:  # not twice, where a start that has failed is made again
            for terms, blob in kept:
                self._kinds.learn([terms], {terms.code_id: blob})
            sources = {source.name: self._shards(source) for source in self._sources}
            self._catalog.sources = sources
            for tenure in self._tenures():
                self._tasks.keep(f"tenure {tenure.source} {tenure.shard}", tenure.run, tenure.is_over)
        if self._sources:
            settled = asyncio.gather(*[shards.settled() for shards in self._catalog.sources.values()])
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

    def _shards(self, source: Source) -> Shards:
        settings = self._settings
        return Shards(
            source, n_shards=settings.shards, holder=source.holder or self.epoch,
            ttl_s=settings.lease_ttl_s, clock=self._clock, host=self._takeover, log=self._log,
            meters=self._jobs.meters, failures=self.failures,
        )  # fmt: skip

    def _tenures(self) -> list[Tenure]:
        return [tenure for shards in self._catalog.sources.values() for tenure in shards.tenures]

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
        for tenure in self._tenures():
            tenure.vanish(gone)
        self._tasks.cancel()

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
                self._settling.interrupted(active)
        for shards in self._catalog.sources.values():
            await shards.close()

    # --- submit ----------------------------------------------------------------------------------------------------

    async def submit(self, submission: Submission, watcher: str | None = None) -> Accepted:
        """Accept jobs; see `Submitting.submit`."""
        return await self._submitting.submit(submission, watcher)

    async def introduce(self, terms: Sequence[Terms], code: Mapping[str, bytes]) -> str:
        """Take in job classes that a process has, so that stored jobs of their kinds can run; returns the epoch."""
        self._submitting.learn(terms, code)
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
            if job_id not in self._live and (recent := self._waiters.recent.get(job_id)) is not None:
                early.append(recent)
                continue
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
            is_certain = self._catalog.is_whole
        except StoreUnavailableError:
            stored, is_certain = None, False
        if job_id in self._live or (stored is not None and stored.status.is_final) or (stored is None and is_certain):
            return stored
        self._waiters.watch(session_id, [job_id])
        self._elsewhere.watch(job_id)
        return None

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
                raise self._catalog.missing(job_id)
            if stored.status.is_final:
                return stored.status
            tenure = self._catalog.tenure_of(stored)
            if tenure is None or not tenure.may_act or not await tenure.has_all() or job_id not in self._live:
                raise ConflictError(_is_elsewhere(job_id))
            return await self.cancel(job_id, reason)
        self._jobs.cancel(job, cancel_reason(reason))
        await self._jobs.writer_of(job).flushed()
        now_is = self._live.get(job_id) or await self._catalog.get(job_id)
        return now_is.status if now_is is not None else JobStatus.CANCELLED

    async def retry(self, job_id: str, as_id: str, resume: bool = False) -> JobView:  # noqa: FBT001, FBT002 - the wire has places only
        """Run a failed or cancelled job anew, as the new job ``as_id`` that names the old one. May be repeated.

        ``resume``: the new job goes on from a copy of the old one's checkpoint and parts; for jobs over items.

        Raises:
            JobNotFoundError: There is no such job.
            ConflictError: It is not failed or cancelled, its class is no longer known here, or it has no checkpoint.
        """
        old = self._live.get(job_id) or await self._catalog.found(job_id)
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
        old = self._live.get(job_id) or await self._catalog.found(job_id)
        n_failed = old.checkpoint.failed if old.checkpoint is not None else 0
        if not old.status.is_final or not n_failed:
            is_so = (
                "has no failed items, so there are none to run again; to run a failed or cancelled job as a whole, retry it"
                if old.status.is_final
                else f"is {old.status}, and its failed items can be run again when it has ended; wait for that, or cancel it"
            )
            msg = f"job {job_id}: {is_so}"
            raise ConflictError(msg)
        only_failed = Checkpoint(0, json.dumps({"failed_of": job_id}).encode(), n_failed, 0, 0, 0, self._clock.now())
        terms, about, row = self._again(old, as_id)
        return await self._run_again(terms, about, row._replace(checkpoint=only_failed))

    def _again(self, old: JobRecord, as_id: str) -> tuple[Terms, Particulars, Row]:
        """Return what a new job is made of that does what ``old`` did."""
        routed = self._kinds.routed(old)
        if routed is None:
            raise KindNotIntroducedError(old.id, old.terms.kind, self._kinds.names())
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

    async def write_documents(self, job_id: str, execution_id: str, page: DocumentPage) -> None:
        """Write values of a job over items to a collection of its user's; see `Sinks.write`."""
        await self._sinks.write(job_id, execution_id, DocumentPage(*page))

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
                self._waiters.recent.forget(job_id)
                job = await self._catalog.get(job_id)
        self._window.removed(job_id)

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
            self._tasks.spawn(self._archivist.archive_once(), "archival")

    # --- look ------------------------------------------------------------------------------------------------------

    async def get(self, job_id: str) -> JobView:
        """Return a job as it is now.

        Raises:
            JobNotFoundError: There is no such job.
        """
        job = self._live.get(job_id) or await self._catalog.found(job_id)
        return view(self._reasons.shown(job))

    async def details(self, job_id: str) -> Details:
        """Return the bookkeeping of a job.

        Raises:
            JobNotFoundError: There is no such job.
        """
        await self._catalog.flushed()
        job = self._live.get(job_id) or await self._catalog.found(job_id)
        actor = self._dispatcher.place_of(job.execution_id) if job.execution_id is not None else None
        if actor is not None:
            return await details_of(self._reasons.shown(job), self._catalog, actor.name, actor.info)
        return await details_of(self._reasons.shown(job), self._catalog)

    async def query(self, filters: Mapping[str, Any]) -> tuple[list[JobView], str | None]:
        """Return one page of jobs and the cursor of the next."""
        query = parse_query(filters)
        await self._catalog.flushed()
        page = await self._catalog.query(query)
        return [view(self._reasons.shown(self._live.get(job.id, job))) for job in page.jobs], page.cursor

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
        job = self._live.get(job_id) or await self._catalog.found(job_id)
        records = await self._catalog.executions(job)
        return [execution_view(record) for record in told(records)]

    async def status(self) -> dict[str, Any]:
        """Return counts of jobs and actors, limits and counters."""
        return {
            "epoch": self.epoch,
            "pid": os.getpid(),
            "live": len(self._live),
            "limits": {"max_queued": self._settings.max_queued, "max_actors": self._settings.max_actors},
            "jobs": dict(self.counters),
            "sources": {name: shards.snapshot() for name, shards in self._catalog.sources.items()},
            "archival": {"enabled": self._settings.archives, **self._archivist.snapshot()},
            "checkpoints": dict(self._checkpoints.counters),
            "unroutable": self._kinds.unroutable(),
            "failures": self.failures.snapshot(),
            "interrupted": list(self._tasks.interrupted()),
            **self._dispatcher.snapshot(),
        }

    async def measure(self, durations: bool = True) -> Measures:  # noqa: FBT001, FBT002 - the wire has places only
        """Return what is measured, for whoever exports it; with ``durations``, which are told once. See `Meters.read`."""
        found = self._jobs.meters.read(durations=durations)
        mine = self._dispatcher.counters
        for name, n in (("claims_returned", mine["returned"]), ("actors_started", mine["actors_started"]),
                        ("actors_lost", mine["actors_lost"]),
                        ("fenced_reports", self.counters["fenced"] + mine["reports_refused"])):  # fmt: skip
            found.counters[name, ()] = n
        found.counters.update({("unexpected_failures", (where,)): n for where, n in self.failures.counts.items()})
        gauges = found.gauges
        gauges.update(self._dispatcher.levels())
        live = self._kinds.live()
        gauges.update({("jobs_live", (kind,)): n for kind, n in sorted(live.items())[:MAX_KINDS]})
        gauges.update({("unroutable", (kind,)): n for kind, n in sorted(self._kinds.unroutable().items())[:MAX_KINDS]})
        gauges["outbox_backlog", ()] = self._memory_writer.n_behind
        for tenure in self._tenures():
            gauges["outbox_backlog", ()] += tenure.writer.n_behind
            if (age_s := tenure.beat_age_s) is not None:  # the oldest of the source's shards
                key = ("beat_age_seconds", (tenure.source,))
                gauges[key] = max(age_s, gauges.get(key, 0.0))
        running = (self._live.get(active.job_id) for active in self._dispatcher.running())
        gauges.update(self._jobs.meters.roots(job for job in running if job is not None))
        return found

    async def look(self, what: str, *args: Any) -> Any:
        """Answer what a process that presents jobs asks; ``what`` is a method of `koan_ray.engine.window.Window`."""
        return await getattr(self._window, what)(*args)

    async def news(self, listener_id: str, epoch: str | None, park_s: float) -> News[JobRecord | None]:
        """Return the jobs that have changed since this listener asked last; see `koan_ray.engine.feed`."""
        return await self._window.news(listener_id, epoch, park_s)

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
        if push.ended and self._catalog.sources:
            await self._catalog.flushed()
        return known

    def _sweep_later(self) -> None:
        self._sweeper = self._clock.call_later(_SWEEP_S, self._sweep)

    def _sweep(self) -> None:
        self._sweep_later()
        self._tasks.spawn(self.sweep_once(), "sweep")

    async def sweep_once(self) -> int:
        """Forget what has outlived its retention, and sessions that are gone."""
        self._waiters.sweep()
        return await self._catalog.memory.expire(self._clock.now())


def _cancel(future: asyncio.Future[Any]) -> None:
    future.cancel()


def _is_elsewhere(job_id: str) -> str:
    return (
        f"job {job_id}: another coordinator holds the lease of its source, and only that one can change it. "
        f"Ask the engine of the cluster that runs it, or wait until this one has taken over."
    )
