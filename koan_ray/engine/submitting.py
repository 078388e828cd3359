"""How jobs are accepted: told apart from those that are here already, placed, staged, and answered when they are written.

Idempotence: a submit may be repeated. Under a known id it succeeds when kind and context are the same.
"""

from __future__ import annotations

import asyncio
import json
import math
from typing import TYPE_CHECKING, Any

from koan_ray.domain import transitions
from koan_ray.domain.ids import made_at
from koan_ray.domain.records import End, JobRecord, Particulars, Residence, Terms
from koan_ray.domain.status import JobStatus, ParentPolicy, Reason
from koan_ray.engine.catalog import written
from koan_ray.engine.messages import Accepted, Row, Submission
from koan_ray.engine.writer import pause
from koan_ray.errors import (
    JobIdConflictError,
    JobNotFoundError,
    KoanRayError,
    LimitExceededError,
    StoreUnavailableError,
)
from koan_ray.killpoints import killpoint

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from koan_ray.engine.catalog import Catalog
    from koan_ray.engine.dispatcher import Dispatcher
    from koan_ray.engine.kinds import Kinds
    from koan_ray.engine.live import LiveJobs
    from koan_ray.engine.reasons import Reasons
    from koan_ray.engine.settings import EngineSettings
    from koan_ray.engine.waiters import Waiters
    from koan_ray.engine.writer import Writer
    from koan_ray.ports import Clock

_LOOK_AGAIN_S = 1.0


class Submitting:
    """The way in.

    Args:
        epoch: Of the coordinator; goes with every answer.
        settings: The limits.
        live: The jobs that have not ended.
        kinds: The job classes.
        catalog: Where jobs are kept.
        waiters: Who waits for ends.
        dispatcher: Who runs jobs.
        reasons: Why jobs cannot run.
        clock: Time.
    """

    def __init__(
        self, epoch: str, settings: EngineSettings, live: LiveJobs, kinds: Kinds, catalog: Catalog, waiters: Waiters,
        dispatcher: Dispatcher, reasons: Reasons, clock: Clock,
    ) -> None:  # fmt: skip
        self._reasons = reasons
        self._epoch, self._settings, self._clock = epoch, settings, clock
        self._archived_after_s = min((policy.older_than_s for policy in settings.archival_policies), default=math.inf)
        self._jobs, self._live = live, live.by_id
        self._kinds, self._catalog, self._waiters, self._dispatcher = kinds, catalog, waiters, dispatcher

    async def submit(self, submission: Submission, watcher: str | None = None) -> Accepted:
        """Accept jobs. Rows are independent: a refused one does not hold up the others, except at the queue limit.

        ``watcher``: a session that is to be told of their ends, as if it had asked with `wait`.

        Raises:
            LimitExceededError: The queue would grow beyond ``engine.max_queued``; nothing was accepted.
        """
        terms_ids, particulars, rows, introduced, code = submission
        self.learn(introduced, code)
        needs = [terms_id for terms_id in terms_ids if not self._kinds.has(terms_id)]
        if needs:
            return Accepted(self._epoch, 0.0, {}, needs)
        if len(self._live) + len(rows) > self._settings.max_queued:
            raise LimitExceededError(
                "jobs queued or running", len(self._live) + len(rows), self._settings.max_queued, "engine.max_queued"
            )
        terms = [self._kinds.terms(terms_id) for terms_id in terms_ids]
        known: set[str] = set()
        refused: dict[int, KoanRayError] = {}
        if not all(item.part for item in terms):  # chunks of items are kept nowhere
            particulars, problems = await self._all_placed(particulars)
            refused = await self._ready(particulars, rows, problems)
            known = await self._known(particulars, rows)
        now = self._clock.now()
        writers: set[Writer] = set()
        for place, raw in enumerate(rows):
            if place in refused:
                continue
            row = Row(*raw)
            job_terms, about = terms[row.terms], particulars[row.particulars]
            is_new = row.job_id not in self._live and row.job_id not in known
            has_ties = about.parent_job_id is not None or about.retry_of is not None
            if not is_new or (has_ties and not job_terms.part):
                error = await self._examine(row, job_terms, about)
                if isinstance(error, KoanRayError):
                    refused[place] = error
                if error is not None:
                    writers.add(self._catalog.writer_of(row.job_id, about.residence))
                    continue
            writers.add(self._accept(row, job_terms, about, now))
        may_linger = watcher is not None and len(rows) == 1 and not refused and particulars[0].residence.source is None
        if may_linger and not terms[0].part and (end := await self._linger(rows[0][0])) is not None:
            return Accepted(self._epoch, now, refused, [], ended=(end,))
        is_watched = watcher is not None and self._watch_early(watcher, [row[0] for row in rows])
        # A job is told to be accepted when its flush is written, and nothing else is waited for: by the writers that it was
        # staged with, because one that was abandoned meanwhile has written nothing.
        await written(writers)
        killpoint("submit.after_flush")
        if self._jobs.unstorable:
            self._answer_unstorable(rows, refused)
        if self._jobs.duplicates:
            await self._answer_duplicates(rows, refused)
        return Accepted(self._epoch, now, refused, [], is_watched, waits=self._reasons.of_terms(terms))

    async def _placed(self, about: Particulars) -> Particulars:
        """Fill in where jobs are kept: as asked, or with their parent."""
        residence = about.residence
        if residence.source is None and about.parent_job_id is not None:
            parent = self._live.get(about.parent_job_id) or await self._catalog.get(about.parent_job_id)
            residence = self._catalog.home(parent.particulars.residence) if parent is not None else residence
        residence = self._catalog.place(residence)
        return about if residence == about.residence else about._replace(residence=residence)

    async def _all_placed(self, asked: Sequence[Particulars]) -> tuple[list[Particulars], dict[int, KoanRayError]]:
        """Fill in where jobs are kept; with what is wrong with those that cannot be kept where they ask to be."""
        placed: list[Particulars] = []
        problems: dict[int, KoanRayError] = {}
        for number, about in enumerate(asked):
            try:
                placed.append(await self._placed(about))
            except KoanRayError as error:
                placed.append(about._replace(residence=Residence()))
                problems[number] = error
        return placed, problems

    async def _ready(
        self, particulars: Sequence[Particulars], rows: Sequence[tuple[Any, ...]], problems: Mapping[int, KoanRayError]
    ) -> dict[int, KoanRayError]:
        """Wait until every shard that these jobs fall into takes them, and return by place which rows cannot be accepted.

        Those are rows whose particulars have a problem, whose source cannot be used as configured (`ConfigurationError`), or
        has not become ready within 30 s (`StoreUnavailableError`). Others that were submitted together are not concerned.
        """
        refused = {place: problems[row[2]] for place, row in enumerate(rows) if row[2] in problems} if problems else {}
        sources = [about.residence.source for about in particulars]
        if not any(sources):
            return refused
        tenures = [
            self._catalog.sources[source].of(row[0]) if (source := sources[row[2]]) is not None else None for row in rows
        ]
        waiting = list({tenure for tenure in tenures if tenure is not None and not tenure.is_ready})
        if waiting:
            outcomes = await asyncio.gather(*[tenure.ready() for tenure in waiting], return_exceptions=True)
            failed = {tenure: error for tenure, error in zip(waiting, outcomes, strict=True) if error is not None}
            for place, tenure in enumerate(tenures):
                error = failed.get(tenure) if tenure is not None else None
                if isinstance(error, KoanRayError):
                    refused.setdefault(place, error)
                elif error is not None:
                    raise error
        return refused

    async def _known(self, particulars: Sequence[Particulars], rows: Sequence[tuple[Any, ...]]) -> set[str]:
        """Return the ids of jobs that were submitted before, of those that can have been archived since.

        An insert is checked against its own partition only. An id says how old it is, so this costs new jobs nothing.
        """
        if not any(about.residence.source for about in particulars):
            return set()
        before = self._clock.now() - self._archived_after_s
        old = [row[0] for row in rows if particulars[row[2]].residence.source is not None and made_at(row[0]) <= before]
        while old:
            try:
                return await self._catalog.known(old)
            except StoreUnavailableError:  # like a flush: nothing is answered before the sources are back
                await pause(self._clock, _LOOK_AGAIN_S)
        return set()

    async def _answer_duplicates(self, rows: Sequence[tuple[Any, ...]], refused: dict[int, KoanRayError]) -> None:
        """A submit that was made before, and whose job has ended or is known: the same again is a success."""
        for place, row in enumerate(rows):
            job = self._jobs.duplicates.pop(row[0], None)
            if job is None:
                continue
            stored = await self._catalog.get(job.id)
            if stored is None or stored.terms.kind != job.terms.kind or not _same_json(stored.context, job.context):
                refused[place] = JobIdConflictError(job.id)

    def _answer_unstorable(self, rows: Sequence[tuple[Any, ...]], refused: dict[int, KoanRayError]) -> None:
        for place, row in enumerate(rows):
            if (error := self._jobs.unstorable.pop(row[0], None)) is not None:
                refused[place] = error

    async def _linger(self, job_id: str) -> End | None:
        """Return the end of a job that is known to take no time, so that its submission is answered with its result.

        It spares the caller, who is about to wait for it, a call.
        """
        await self._catalog.memory_writer.flushed()
        job = self._live.get(job_id)
        if job is None or job.status is not JobStatus.RUNNING or not self._dispatcher.is_brief(job.terms.id):
            return None
        return await self._jobs.lingering.linger(job_id)

    def _watch_early(self, session_id: str, job_ids: list[str]) -> bool:
        if any(job_id not in self._live for job_id in job_ids):
            return False  # it has ended meanwhile: the session asks
        try:
            self._waiters.watch(session_id, job_ids)
        except LimitExceededError:
            return False  # it will ask, and be told of the limit then
        return True

    def _accept(self, row: Row, terms: Terms, about: Particulars, now: float) -> Writer:
        # By our own clock: a process that submits, and whose clock is ahead, does not make a job of the future.
        created_at = min(row.created_at, now)
        job = JobRecord(row.job_id, terms, about, row.context, created_at, checkpoint=row.checkpoint)
        job.status, job.queued_at, job.last_modified = JobStatus.QUEUED, now, now  # T1, as `transitions.queued`
        if row.crashes:
            job.attempts = job.crashes = row.crashes  # each has used one
        self._jobs.put(job)
        if row.delay_s > 0:
            job.due_at, job.reason = now + row.delay_s, Reason.DELAY
        if about.residence.source is None:
            self._jobs.enqueue(job)
        writer = self._catalog.writer_of(job.id, about.residence)
        self._jobs.stage(job)
        parent_id = about.parent_job_id
        if parent_id is not None and self._is_closing(parent_id) and terms.when_parent_ends is ParentPolicy.CANCEL:
            self._jobs.move(transitions.cancelled(job, at=now, reason="its parent has ended or is being cancelled"))
            self._dispatcher.dequeued(terms.spec, was_waiting=row.delay_s > 0)
        return writer

    async def _examine(self, row: Row, terms: Terms, about: Particulars) -> KoanRayError | bool | None:
        """Return what is wrong with a row, True for one that is here already, None for one to accept."""
        parent_id = about.parent_job_id
        stored = None if row.job_id in self._live else await self._catalog.get(row.job_id)
        has_parent = parent_id is None or parent_id in self._live or await self._catalog.get(parent_id) is not None
        known = self._live.get(row.job_id) or stored  # while we looked, the same submit may have been accepted
        if known is not None:
            same = known.terms.kind == terms.kind and _same_json(known.context, row.context)
            return True if same else JobIdConflictError(row.job_id)
        if about.depth > self._settings.max_depth:
            return LimitExceededError("depth of a job tree", about.depth, self._settings.max_depth, "engine.max_depth")
        return None if has_parent else JobNotFoundError(parent_id or "")

    def _is_closing(self, parent_id: str) -> bool:
        parent = self._live.get(parent_id)
        return parent is None or parent.status.is_final or parent.cancel_requested_at is not None

    def learn(self, terms: Sequence[Terms], code: Mapping[str, bytes]) -> None:
        """Take in job classes; jobs that have waited for one of their kinds can run from now on."""
        if terms:
            self._dispatcher.look_for_obstacles(item.spec for item in terms)
        for job_id in self._kinds.learn(terms, code):
            job = self._live.get(job_id)
            if job is not None and job.status is JobStatus.QUEUED:
                self._jobs.enqueue(job)


def _same_json(one: bytes, other: bytes) -> bool:
    """Tell whether two contexts are equal; a store may have changed spaces. ``1``, ``1.0`` and ``true`` are three values."""
    return one == other or _canonical(one) == _canonical(other)


def _canonical(encoded: bytes) -> str:
    return json.dumps(json.loads(encoded), sort_keys=True)
