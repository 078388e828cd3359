"""What a process that uses jobs holds of the engine: a driver, a Ray task, a job actor.

It has no thread of its own for the usual work. Calls go out from the thread that asks, answers come in on the
transport's threads, and both directions gather: while `_MAX_SUBMITS` submissions are on their way, further ones wait and
go together with the next; one parked `wait` call brings the ends of all jobs that this process waits for.

In rooms of their own: reading the source of a `start_many` (`startmany`), telling those who wait (`waits`), what happens at
a time (`timeouts`), and following progress (`watching`).
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
import warnings
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic_core import to_json

from koan_ray import threads
from koan_ray.domain.durations import instant
from koan_ray.domain.ids import checked_id, child_id, new_id
from koan_ray.domain.query import parse_query, plain_filters
from koan_ray.domain.records import FAILED, JobView, Particulars, Residence, Terms
from koan_ray.domain.status import ExecutionStatus, JobStatus
from koan_ray.domain.words import cancel_reason
from koan_ray.engine.messages import Submission
from koan_ray.engine.startmany import ROWS, ManyFeed
from koan_ray.engine.timeouts import Timeouts
from koan_ray.engine.waits import Wait, conclude, seen, show, tell
from koan_ray.engine.watching import Watching
from koan_ray.errors import (
    ConfigurationError,
    JobDefinitionError,
    JobLostError,
    JobNotFoundError,
    JobWaitsWarning,
    KindNotIntroducedError,
    PayloadTooLargeError,
    RuntimeUnavailableError,
    StoreUnavailableError,
)
from koan_ray.finite import DeadItem
from koan_ray.jobs import Job, JobDetails, JobExecution
from koan_ray.listing import JobPage
from koan_ray.pending import Pending
from koan_ray.registry import everything, find, on_register
from koan_ray.run import RunSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from koan_ray.definition import Definition
    from koan_ray.domain.records import Checkpoint, DocumentPage, End, Part, Progress
    from koan_ray.engine.messages import Accepted, Details, Ends, ExecutionView
    from koan_ray.engine.waits import Chunk
    from koan_ray.ports import Transport
    from koan_ray.progress import JobProgressUpdate

_MAX_SUBMITS = 2
_MAX_WAITS = 2
_PARK_S = 20.0
_WAIT_AGAIN_S = 0.5  # after a wait call that failed
_CHECKPOINT_S = 120.0  # a checkpoint, or a page of values, is asked to be stored for so long
_CHECKPOINT_AGAIN_S = 0.5
_MAX_UNASKED = 1000
_MAX_EARLY = 10_000
_GATHER_KINDS_S = 0.2
_INTRODUCE_AGAIN_S = 1.0  # after there was no coordinator
_MAX_WORDS = 1_048_576  # bytes of metadata, of a description, of a correlation id
_PAGE = 20  # parts in an answer
_PLAIN = Particulars()
_NO_SETTINGS = RunSettings()
_NO_VIEW: Any = None


class _Submit(NamedTuple):
    pending: Pending[Any]
    job_type: type[Job[Any, Any]]
    terms: Terms
    about: Particulars
    row: tuple[Any, ...]


class _Batch:
    """Submissions that travel together. Holds a place among `_MAX_SUBMITS` until it is answered, whatever happens then."""

    __slots__ = ("is_sent", "source", "submits")

    def __init__(self, source: str | None, submits: list[_Submit]) -> None:
        self.source, self.submits = source, submits
        self.is_sent = False  # the transport has it and will answer


class _WaitCall:
    """A call for the ends of jobs. Holds a place among `_MAX_WAITS` until it is answered."""

    __slots__ = ("ids", "is_sent")

    def __init__(self, ids: list[str]) -> None:
        self.ids = ids
        self.is_sent = False


class Session:
    """One process's view of the engine; implements `koan_ray.ambient.EnginePort`.

    Args:
        transport: To coordinator and broker.
        inline_limit: Bytes of one context.
        ship: Turns a job class into ``(code_id, bytes)``.
        trace: Returns ``(trace id, traceparent)`` of the current span, if any.
        reads_inline: Read the contexts of a `start_many` in the caller's thread, all at once; for tests in virtual time.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        inline_limit: int,
        ship: Callable[[type[Any]], tuple[str, bytes]],
        trace: Callable[[], tuple[str | None, str | None]],
        reads_inline: bool = False,
    ) -> None:
        self.id = new_id()
        self.epoch: str | None = None
        self._transport, self._inline_limit, self._ship, self._trace = transport, inline_limit, ship, trace
        self._reads_inline = reads_inline
        self._lock = threads.lock()
        self._closed: BaseException | None = None
        # By the source that their jobs are to be kept in: while one is away, submissions to others go on.
        self._submits: dict[str | None, list[_Submit]] = {}
        self._batches: set[_Batch] = set()  # on their way
        self._terms: dict[tuple[Any, ...], Terms] = {}
        self._code: dict[str, bytes] = {}
        self._by_id: dict[str, Terms] = {}
        self._parts_of: dict[str, Terms] = {}  # of jobs over items, by id of their terms
        self._sent: set[str] = set()  # ids of terms that the coordinator has
        self._warned: set[tuple[str, str]] = set()  # ids of terms, and what they cannot run for
        self._waits: dict[str, list[Wait]] = {}
        self._to_watch: list[str] = []
        self._wait_calls: set[_WaitCall] = set()  # on their way
        self._is_hurt = False  # an interrupt of its caller may have left something half done
        # True while this process waits for what it submits one by one: then ends are sent without being asked for, which
        # spares a round trip. Ends that nobody has waited for yet update their jobs in hand; `_n_unasked` counts them.
        self._is_eager = False
        self._n_unasked = 0
        self._early: dict[str, End] = {}  # ends that came before the answer to their submission
        self._to_introduce: list[type[Job[Any, Any]]] = []
        self._is_introducing = False
        self._introduced_to: str | None = None  # the coordinator that knows our classes
        self._feeds: weakref.WeakSet[ManyFeed] = weakref.WeakSet()
        self._timeouts = Timeouts()
        self._watching = Watching(self)

    @property
    def reads_inline(self) -> bool:
        """Sources of jobs and items are read in the caller's thread."""
        return self._reads_inline

    @property
    def transport(self) -> Transport:
        """To coordinator and broker."""
        return self._transport

    def close(self, why: str) -> None:
        """Fail everything that is under way, and refuse what comes."""
        error = RuntimeUnavailableError(why)
        with self._lock:
            self._closed = error
            on_register(None)
            submits = [submit for batch in self._batches for submit in batch.submits] + self._unsent()
            self._submits, self._batches = {}, set()
            waits, self._waits = self._waits, {}
            feeds = list(self._feeds)
        for submit in submits:
            submit.pending.fail(error)
        for feed in feeds:
            feed.give_up(error)
        for waiting in waits.values():
            self._notify(waiting, error)
        self._watching.close()
        self._timeouts.close()

    def disown(self, error: BaseException) -> None:
        """In a forked copy of the process that has this session: refuse all that comes, with ``error``.

        Takes no lock, which a thread that is not here may hold, and answers nobody: those who wait are there.
        """
        self._closed = error
        on_register(None)
        self._lock = threading.RLock()
        self._timeouts = Timeouts()
        self._watching = Watching(self)

    # --- submit ----------------------------------------------------------------------------------------------------

    def submit(self, job_type: type[Job[Any, Any]], context: Any, settings: RunSettings) -> Pending[Any]:
        """Submit one job whose context is encoded already."""
        pending: Pending[Any] = Pending()
        try:
            self._check_open()
            terms = self._terms_of(job_type, settings)
            about = self._about(job_type, settings)
            self._check_size(job_type, context)
        except Exception as error:  # noqa: BLE001 - told where the outcome is looked for
            pending.fail(error)
            return pending
        parent = settings.parent
        job_id = child_id(parent.id, parent.key) if parent is not None and parent.key is not None else new_id()
        row = (job_id, 0, 0, context, time.time(), settings.delay_s)
        self._enqueue(_Submit(pending, job_type, terms, about, row))
        return pending

    def _enqueue(self, submit: _Submit) -> None:
        """Send a submission, now or with the next."""
        if self._lock._is_owned():  # noqa: SLF001 - a finalizer or a signal handler, in the middle of a call of this thread
            self._timeouts.add(0.0, lambda: self._enqueue(submit))
            return
        try:
            with self._lock:
                self._submits.setdefault(submit.about.residence.source, []).append(submit)
                batch = self._next_submits()
            if batch is not None:
                self._send_submits(batch)
            if self._is_hurt or self._closed is not None:
                self._mend()
        except BaseException:
            self._interrupted()
            raise

    def start_part(
        self, lead: Terms, job_type: type[Job[Any, Any]], about: Particulars, payload: bytes,
        told: Callable[[End | BaseException], None], crashes: int = 0,
    ) -> str:  # fmt: skip
        """Have a chunk of a job's items done by another actor, and ``told`` called once with its end; returns its id.

        With ``crashes``, it is alone in its process, from 2 on in one in which nothing has run before.
        """
        terms = self._part_terms(lead, job_type)
        job_id = new_id()
        with self._lock:
            self._waits[job_id] = [Wait(None, None, told, is_part=True)]

        def accepted(answer: Accepted | None, error: BaseException | None) -> None:
            problem = error if answer is None else answer.refused.get(0)
            with self._lock:
                if problem is not None:
                    self._waits.pop(job_id, None)
                elif answer is not None and not answer.is_watched:
                    self._to_watch.append(job_id)
                call = self._next_wait()
            if problem is not None:
                threads.guarded("end_not_delivered", told, problem)
            if call is not None:
                self._send_wait(call)

        row = (job_id, 0, 0, payload, time.time(), 0.0, None, crashes)
        try:
            self._send(Submission([terms.id], [about], [row], [], {}), accepted, self.id)
        except BaseException:
            with self._lock:
                self._waits.pop(job_id, None)
            raise
        return job_id

    def _part_terms(self, lead: Terms, job_type: type[Job[Any, Any]]) -> Terms:
        key = (job_type, lead.id)
        known = self._terms.get(key)
        if known is None:
            code_id, self._code[lead.code_id] = self._ship(job_type)
            known = self._terms[key] = job_type.definition.part_terms(lead._replace(code_id=code_id))
            self._code[code_id] = self._code[lead.code_id]
            self._by_id[known.id] = known
        return known

    def latest(self, job_ids: list[str]) -> Pending[list[tuple[str, Progress]]]:
        """Return the newest progress of those of these jobs that have reported any."""
        pending: Pending[Any] = Pending()

        def answered(states: Any, error: BaseException | None) -> None:
            pending.fail(error) if error is not None else pending.resolve(states)

        self._transport.broker("latest", (job_ids,), answered)
        return pending

    def ask(self, method: str, *args: Any) -> Pending[Any]:
        """Call a method of the coordinator."""
        return self._ask(method, args, lambda answer: answer)

    def failed_items(self, job_id: str) -> Pending[list[DeadItem]]:
        """Return the dead items of a job over items, in the order of their ends."""
        pending: Pending[Any] = Pending()
        found: list[DeadItem] = []

        def got(page: list[Part] | None, error: BaseException | None) -> None:
            if page is None:
                pending.fail(error or RuntimeUnavailableError("no answer"))
                return
            if not page:
                pending.resolve(found)
                return
            found.extend(DeadItem(**row) for part in page for row in json.loads(part.body))
            self._call(pending, "parts", (job_id, FAILED, page[-1].seq, _PAGE), got)

        if (known := _checked(job_id, pending)) is not None:
            self._call(pending, "parts", (known, FAILED, -1, _PAGE), got)
        return pending

    def export_failed_items(self, job_id: str, path: Any) -> Pending[int]:
        """Write the dead items of a job over items to a file of JSON lines, page by page; resolves to their number."""
        pending: Pending[int] = Pending()

        def write() -> None:
            after, n = -1, 0
            try:
                with Path(path).open("wb") as file:
                    while page := self.parts(job_id, FAILED, after, _PAGE).get():
                        for part in page:
                            file.writelines(to_json(row) + b"\n" for row in json.loads(part.body))
                            n += part.count
                        after = page[-1].seq
            except BaseException as error:  # noqa: BLE001 - becomes the outcome
                pending.fail(error)
            else:
                pending.resolve(n)

        threading.Thread(target=write, name="koan-export", daemon=True).start()
        return pending

    def retry_failed_items(self, job_id: str) -> Pending[Any]:
        """Run the dead items of a job over items as a new job."""
        return self.run_again("retry_failed_items", job_id)

    def _next_submits(self) -> _Batch | None:
        """Return what is to be sent now, None if nothing is. Needs the lock."""
        for source, waiting in self._submits.items():
            if len(self._batches) < _MAX_SUBMITS or sum(batch.source == source for batch in self._batches) < _MAX_SUBMITS:
                batch = _Batch(source, waiting[:ROWS])
                self._batches.add(batch)  # first: what an interrupt hits between is sent twice, and not never
                del waiting[:ROWS]
                if not waiting:
                    del self._submits[source]
                return batch
        return None

    def _unsent(self) -> list[_Submit]:
        return [submit for waiting in self._submits.values() for submit in waiting]

    def _send_submits(self, batch: _Batch) -> None:
        def accepted(answer: Accepted | None, error: BaseException | None) -> None:
            if batch not in self._batches:
                return  # sent twice, or the session was closed
            try:
                self._accepted(batch.submits, answer, error)
            except BaseException as problem:  # noqa: BLE001 - told where the outcome is looked for
                for submit in batch.submits:
                    submit.pending.fail(problem)
                threads.survive("submission_not_delivered", problem)
            finally:
                with self._lock:
                    self._batches.discard(batch)
                    more = self._next_submits()
                if more is not None:
                    self._send_submits(more)

        try:
            self._send(_submission_of(batch.submits), accepted, self.id if self._is_eager else None)
            batch.is_sent = True
        except Exception as problem:  # noqa: BLE001 - the transport has not taken it
            accepted(None, problem)

    def _accepted(self, submits: list[_Submit], answer: Accepted | None, error: BaseException | None) -> None:
        """Give those who submitted their jobs, or what was wrong with them: to each its own."""
        jobs: dict[int, Job[Any, Any]] = {}
        problems: dict[int, BaseException] = {}
        if answer is not None:
            problems.update(answer.refused)
            for place, submit in enumerate(submits):
                if place not in problems:
                    view = self._view(submit.terms, submit.about, submit.row, answer)
                    try:
                        jobs[place] = submit.job_type._in_hand(view)  # noqa: SLF001 - one package
                    except BaseException as problem:  # noqa: BLE001 - a class of a user's
                        problems[place] = problem
            if answer.is_watched:
                self._expect(jobs.values())
            for end in answer.ended if 0 in jobs else ():
                tell(Wait(None, jobs[0]), end)
        for place, submit in enumerate(submits):
            if place in jobs:
                submit.pending.resolve(jobs[place])
            else:
                submit.pending.fail(problems.get(place) or error or RuntimeUnavailableError("no answer"))

    def _interrupted(self) -> None:
        """Have put right what an interrupt of a caller has left half done, on a thread that it does not reach."""
        self._is_hurt = True  # before anything else that can be interrupted: the next call looks at it, too
        self._timeouts.add(0.0, self._mend)

    def _mend(self) -> None:
        """Send what has not left, and ask anew for all ends. Whatever of it was done already does no harm twice."""
        self._is_hurt = False
        with self._lock:
            if self._closed is not None:
                submits, self._submits, self._batches = self._unsent(), {}, set()
                waits, self._waits = self._waits, {}
                batches, call = [], None
            else:
                submits, waits = [], {}
                batches = [batch for batch in self._batches if not batch.is_sent]
                while (more := self._next_submits()) is not None:
                    batches.append(more)
                self._wait_calls = {call for call in self._wait_calls if call.is_sent}
                self._to_watch = list(self._waits)
                call = self._next_wait()
        for submit in submits:
            submit.pending.fail(self._closed or RuntimeError())
        for waiting in waits.values():
            self._notify(waiting, self._closed or RuntimeError())
        for batch in batches:
            self._send_submits(batch)
        if call is not None:
            self._send_wait(call)

    def _send(
        self,
        submission: Submission,
        done: Callable[[Accepted | None, BaseException | None], None],
        watcher: str | None = None,
    ) -> None:
        """Send a submission, with the terms and classes that the coordinator was not sent yet or does not have any more."""
        new = [terms_id for terms_id in submission.terms if terms_id not in self._sent]
        if new:
            submission = self._with_terms(submission, new)

        def answered(answer: Accepted | None, error: BaseException | None) -> None:
            try:
                if answer is not None and answer.needs:
                    self._transport.coordinator("submit", (self._with_terms(submission, answer.needs), watcher), answered)
                    return
                if answer is not None:
                    self._sent.update(new)
                    self.epoch = answer.epoch
                    if answer.waits:
                        self._warn(answer.waits)
            except Exception as problem:  # noqa: BLE001 - told where the outcome is looked for
                answer, error = None, problem
            done(answer, error)

        self._transport.coordinator("submit", (submission, watcher), answered)

    def _warn(self, waits: Iterable[tuple[str, str]]) -> None:
        """Warn of jobs that cannot run at present, once for each kind and reason."""
        for terms_id, why in waits:
            terms = self._by_id.get(terms_id)
            if terms is None or terms.part or (terms_id, why) in self._warned:
                continue
            self._warned.add((terms_id, why))
            with contextlib.suppress(Exception):  # a filter may make errors of warnings, and this is no place for one
                warnings.warn(f"job {terms.kind!r}: {why}", JobWaitsWarning, stacklevel=2)

    def _with_terms(self, submission: Submission, terms_ids: list[str]) -> Submission:
        # Of a job over items, also what its chunks need: it is known at once then whether they can run.
        parts = [self._parts_of[terms_id] for terms_id in terms_ids if terms_id in self._parts_of]
        introduced = [*parts, *(self._by_id[terms_id] for terms_id in terms_ids)]
        return submission._replace(
            introduced=introduced, code={terms.code_id: self._code[terms.code_id] for terms in introduced}
        )

    def introduce_kinds(self) -> None:
        """Tell the coordinator of all job classes that are defined here, now and later, so that stored jobs can run.

        Classes that cannot be shipped are left out; the error is told where such a class is used.
        """
        on_register(self._introduce)
        self._gather(everything())

    def _introduce(self, job_type: type[Job[Any, Any]]) -> None:
        with self._lock:
            self._to_introduce.append(job_type)
            if self._is_introducing or self._closed is not None:
                return
            self._is_introducing = True
        try:
            # A moment later: the class statement that is under way must not wait, and has to come to its end first.
            self._timeouts.add(_GATHER_KINDS_S, self._introduce_gathered)
        except BaseException:  # an interrupt, or no thread can be started: with the next class
            self._is_introducing = False
            raise

    def _introduce_gathered(self) -> None:
        with self._lock:
            gathered, self._to_introduce = self._to_introduce, []
            self._is_introducing = False
        found: list[Terms] = []
        for job_type in gathered:
            try:
                found.append(self._terms_of(job_type, _NO_SETTINGS))
            except BaseException:  # noqa: BLE001, S112 - a class that cannot be shipped fails where it is started
                continue
        if self._closed is not None:
            return

        def introduced(epoch: str | None, error: BaseException | None) -> None:
            if epoch is not None:
                self._introduced_to = epoch
            elif isinstance(error, RuntimeUnavailableError) and self._closed is None:
                self._timeouts.add(_INTRODUCE_AGAIN_S, lambda: self._gather(gathered))

        code = {terms.code_id: self._code[terms.code_id] for terms in found}
        self._transport.coordinator("introduce", (found, code), introduced)

    def _introduce_again(self) -> None:
        self._gather(everything())

    def _gather(self, job_types: Iterable[type[Job[Any, Any]]]) -> None:
        for job_type in job_types:
            self._introduce(job_type)

    def submit_many(self, job_type: type[Job[Any, Any]], contexts: Iterable[Any], settings: RunSettings) -> Pending[Any]:
        """Submit a job for each context, reading them on a thread while earlier ones are on their way."""
        pending: Pending[Any] = Pending()
        try:
            self._check_open()
            if settings.parent is not None and settings.parent.key is not None:
                msg = "start_many: a child key names one job; start the children one by one, or leave the key out"
                raise ConfigurationError(msg)
            feed = ManyFeed(
                self,
                pending,
                job_type,
                self._terms_of(job_type, settings),
                self._about(job_type, settings),
                settings.delay_s,
            )
            iterator = iter(contexts)
        except Exception as error:  # noqa: BLE001 - told where the outcome is looked for
            pending.fail(error)
            return pending
        self._feeds.add(feed)
        if self._closed is not None:
            feed.give_up(self._closed)
        elif self._reads_inline:
            feed.run(iterator)
        else:
            threading.Thread(target=feed.run, args=(iterator,), name="koan-start-many", daemon=True).start()
        return pending

    def _terms_of(self, job_type: type[Job[Any, Any]], settings: RunSettings) -> Terms:
        key = (job_type, settings.retry, settings.timeout_s)
        known = self._terms.get(key)
        if known is None:
            definition: Definition = job_type.definition
            _ = definition.context_adapter, definition.result_adapter  # refuses types that pydantic cannot handle
            _check_instances(job_type)
            code_id, blob = self._ship(job_type)
            self._code[code_id] = blob
            known = self._terms[key] = definition.terms(code_id, retry=settings.retry, timeout_s=settings.timeout_s)
            self._by_id[known.id] = known
            if known.spec.lead:
                self._parts_of[known.id] = definition.part_terms(known)
        return known

    def _about(self, job_type: type[Job[Any, Any]], settings: RunSettings) -> Particulars:
        asked = settings.persistence
        residence = Residence() if asked is None else Residence(asked.source or "", asked.partition or "", settings.audit)
        trace_id, traceparent = self._trace()
        parent = settings.parent
        correlation = settings.correlation_id or (parent.correlation_id if parent is not None else None) or trace_id
        if not (correlation or parent or asked or settings.metadata or settings.name or settings.description):
            return _PLAIN
        self._check_words(job_type, settings, correlation)
        return Particulars(
            settings.name, settings.description, dict(settings.metadata) or None, correlation, traceparent,
            parent.id if parent is not None else None, parent.depth + 1 if parent is not None else 0, None, residence,
        )  # fmt: skip

    def _check_open(self) -> None:
        if self._closed is not None:
            raise self._closed

    def _check_words(self, job_type: type[Job[Any, Any]], settings: RunSettings, correlation: str | None) -> None:
        """Refuse what would make a document too large: metadata and texts are part of it, whatever their size."""
        limit = min(self._inline_limit, _MAX_WORDS)
        for what, words in (("metadata", dict(settings.metadata)), ("description", settings.description or ""),
                            ("correlation id", correlation or "")):  # fmt: skip
            if words and (size := len(json.dumps(words))) > limit:
                raise PayloadTooLargeError(job_type.kind, what, size, limit)

    def _check_size(self, job_type: type[Job[Any, Any]], context: bytes) -> None:
        if len(context) > self._inline_limit:
            raise PayloadTooLargeError(job_type.kind, "context", len(context), self._inline_limit)

    def _view(self, terms: Terms, about: Particulars, row: tuple[Any, ...], accepted: Accepted) -> JobView:
        created_at = min(row[4], accepted.queued_at)  # as the coordinator does, whose clock it is that counts
        return JobView(
            row[0], terms.kind, "queued", row[3], created_at, about.name, about.description, about.metadata,
            about.correlation_id, about.parent_job_id, about.depth, accepted.queued_at, None, None, accepted.queued_at,
            epoch=accepted.epoch,
        )  # fmt: skip

    def later(self, delay_s: float, action: Callable[[], None]) -> None:
        """Call ``action`` after a while, on a thread kept for that."""
        self._timeouts.add(delay_s, action)

    # --- wait ------------------------------------------------------------------------------------------------------

    def wait(self, job: Job[Any, Any], timeout: float | None) -> Pending[Any]:
        """Resolve to the job's result when it ends."""
        pending: Pending[Any] = Pending(yields_place=True)
        if job._is_removed:  # noqa: SLF001 - one package
            pending.fail(JobNotFoundError(job.id))
        elif job.status.is_final:
            self._n_unasked = 0
            conclude(pending, job)
        elif self._closed is not None:
            pending.fail(self._closed)
        else:
            self._is_eager, self._n_unasked = True, 0
            self._await_end(job.id, Wait(pending, job), job._chunk)  # noqa: SLF001 - one package
            if JobStatus(seen(job).status).is_final:  # it ended between the look and the registration
                conclude(pending, job)
            if timeout is not None and not pending.done:
                self._timeouts.add(timeout, lambda: self._time_out(job.id, pending, timeout))
        return pending

    def on_end(self, job_id: str, told: Callable[[End | BaseException], None]) -> None:
        """Call ``told`` once with the end of a job, or with what is in the way of learning it."""
        self._await_end(job_id, Wait(None, None, told))

    def _await_end(self, job_id: str, wait: Wait, chunk: Chunk | None = None) -> None:
        if self._lock._is_owned():  # noqa: SLF001 - as in `_enqueue`
            self._timeouts.add(0.0, lambda: self._await_end(job_id, wait, chunk))
            return
        try:
            with self._lock:
                if self._closed is None:
                    call = self._register(job_id, wait, chunk)
            if self._closed is not None:
                self._notify([wait], self._closed)
                return
            if call is not None:
                self._send_wait(call)
            if self._is_hurt:
                self._mend()
        except BaseException:
            self._interrupted()
            raise

    def _register(self, job_id: str, wait: Wait, chunk: Chunk | None) -> _WaitCall | None:
        """Take in that this job is waited for; returns the call to make now, if any. Needs the lock."""
        waiting = self._waits.get(job_id)
        if waiting is not None:
            waiting.append(wait)
            return None
        self._waits[job_id] = [wait]
        self._to_watch.append(job_id)
        if chunk is not None:
            neighbours, chunk.jobs = chunk.jobs, []
            for job in neighbours:
                view = seen(job)
                if view.id not in self._waits and not JobStatus(view.status).is_final:
                    self._waits[view.id] = [Wait(None, job)]
                    self._to_watch.append(view.id)
        return self._next_wait()

    def _expect(self, jobs: Iterable[Job[Any, Any]]) -> None:
        """Take in that the ends of these jobs will be told without being asked for."""
        told: list[tuple[list[Wait], End | BaseException]] = []
        with self._lock:
            for job in jobs:
                job_id = seen(job).id
                early = self._early.pop(job_id, None)
                if early is not None:
                    told.append(([Wait(None, job)], early))
                else:
                    self._waits.setdefault(job_id, []).append(Wait(None, job))
                self._n_unasked += 1
            if self._n_unasked > _MAX_UNASKED:
                self._is_eager = False
            call = self._next_wait()
        for waiting, end in told:
            self._notify(waiting, end)
        if call is not None:
            self._send_wait(call)

    def _notify(self, waiting: Iterable[Wait], outcome: End | BaseException) -> None:
        """Give all who wait for a job its end; what goes wrong with one is no matter of the others."""
        for wait in waiting:
            try:
                tell(wait, outcome)
            except BaseException as problem:  # noqa: BLE001 - a class of a user's
                if wait.pending is not None:
                    wait.pending.fail(problem)
                threads.survive("end_not_delivered", problem)

    def _time_out(self, job_id: str, pending: Pending[Any], timeout: float) -> None:
        with self._lock:  # it stays watched: the end is told once and costs little
            waiting = self._waits.get(job_id, [])
            waiting[:] = [wait for wait in waiting if wait.pending is not pending]
        pending.fail(TimeoutError(f"job {job_id} has not ended within {timeout:g} s; it goes on"))

    def _next_wait(self) -> _WaitCall | None:
        """Return the next wait call, None if none is needed now. Needs the lock."""
        if self._closed is not None or not (self._waits or self._is_eager):
            return None
        if not self._wait_calls or (self._to_watch and len(self._wait_calls) < _MAX_WAITS):
            call = _WaitCall(self._to_watch[:ROWS])
            self._wait_calls.add(call)
            del self._to_watch[:ROWS]
            return call
        return None

    def _send_wait(self, call: _WaitCall) -> None:
        park_s = 0.0 if self._to_watch else _PARK_S
        epoch = self.epoch
        args = (self.id, epoch, call.ids, park_s)
        try:
            self._transport.coordinator("wait", args, lambda ends, error: self._waited(call, epoch, ends, error))
            call.is_sent = True
        except Exception as problem:  # noqa: BLE001 - the transport has not taken it
            self._waited(call, epoch, None, problem)

    def _waited(self, call: _WaitCall, epoch: str | None, ends: Ends | None, error: BaseException | None) -> None:
        with self._lock:
            if call not in self._wait_calls:
                return  # made twice, after an interrupt
            self._wait_calls.discard(call)
            following = None
            if ends is None:
                failed = call.ids or list(self._waits)
                told: list[tuple[list[Wait], End | BaseException]]
                told = [(self._waits.pop(job_id, []), error or RuntimeUnavailableError("no answer")) for job_id in failed]
                if self._waits:  # not at once: a transport that refuses calls would be asked for ever
                    self._timeouts.add(_WAIT_AGAIN_S, self._wait_again)
            else:
                told = self._ended(epoch, ends)
                following = self._next_wait()
        try:
            for waiting, outcome in told:
                self._notify(waiting, outcome)
        finally:
            if following is not None:  # after the telling: whoever waits goes on while this call is made
                self._send_wait(following)

    def _wait_again(self) -> None:
        with self._lock:
            call = self._next_wait()
        if call is not None:
            self._send_wait(call)

    def _ended(self, epoch: str | None, ends: Ends) -> list[tuple[list[Wait], End | BaseException]]:
        """Return who is to be given which end. Needs the lock."""
        told: list[tuple[list[Wait], End | BaseException]] = []
        if self._introduced_to not in (None, ends.epoch):
            self._introduced_to = None
            self._timeouts.add(0.0, self._introduce_again)
        if epoch not in (None, ends.epoch):
            # A coordinator that does not know this session: ask anew. Compared with what the call was made with:
            # the answer to a submission may have told us of the new one meanwhile.
            self._to_watch = list(self._waits)
        self.epoch = ends.epoch
        for end in ends.ended:
            waiting = self._waits.pop(end.id, None)
            if waiting is not None:
                told.append((waiting, end))
            if waiting is None or (self._batches and not waiting[0].is_part):
                # Also when somebody was told: a submission on its way may join the same job, as children do.
                self._keep_early(end)
        for job_id in ends.unknown:
            waiting = self._waits.pop(job_id, [])
            told.append((waiting, self._missing(job_id, waiting, ends.epoch)))
        return told

    def _keep_early(self, end: End) -> None:
        self._early[end.id] = end
        if len(self._early) > _MAX_EARLY:
            del self._early[next(iter(self._early))]

    def _missing(self, job_id: str, waiting: list[Wait], epoch: str) -> BaseException:
        epochs = {seen(wait.job).epoch for wait in waiting if wait.job is not None} - {""}
        return JobLostError(job_id) if not epochs or epoch not in epochs else JobNotFoundError(job_id)

    # --- the rest: one call each -------------------------------------------------------------------------------------

    def refresh(self, job: Job[Any, Any]) -> Pending[Any]:
        """Update a job in hand, with the newest progress where it runs."""
        pending: Pending[Any] = Pending()

        def progressed(states: list[tuple[str, Progress]] | None, _error: BaseException | None) -> None:
            for _, state in states or ():
                known = seen(job).progress
                if known is None or state.sequence > known.sequence:
                    show(job, seen(job)._replace(progress=state))
            pending.resolve(job)

        def got(view: JobView | None, error: BaseException | None) -> None:
            if view is None:
                lost = isinstance(error, JobNotFoundError) and seen(job).epoch not in ("", self.epoch)
                pending.fail(JobLostError(job.id) if lost else error or RuntimeUnavailableError("no answer"))
                return
            show(job, view._replace(epoch=seen(job).epoch))
            if view.status == JobStatus.RUNNING:
                self._transport.broker("latest", ([view.id],), progressed)
            else:
                pending.resolve(job)

        self._call(pending, "get", (job.id,), got)
        return pending

    def cancel(self, job_id: str, reason: str | None) -> Pending[Any]:
        """Cancel a job; resolves to its status now."""
        return self._ask_of(job_id, "cancel", (cancel_reason(reason),), JobStatus)

    def remove(self, job_id: str) -> Pending[None]:
        """Delete a job that has ended."""
        return self._ask_of(job_id, "remove", (), lambda nothing: nothing)

    def executions(self, job_id: str) -> Pending[list[JobExecution]]:
        """Return a job's executions, oldest first."""
        return self._ask_of(job_id, "executions", (), lambda found: [_present(one) for one in found])

    def details(self, job_id: str) -> Pending[JobDetails]:
        """Return what the engine keeps of a job besides what its users see."""

        def present(found: Details) -> JobDetails:
            return JobDetails(**{**found._asdict(), "due_at": instant(found.due_at)})

        return self._ask_of(job_id, "details", (), present)

    def get(self, job_id: str, job_type: type[Job[Any, Any]] | None = None) -> Pending[Any]:
        """Return a job; of ``job_type`` if given."""

        def present(view: JobView) -> Job[Any, Any]:
            if job_type is not None and view.kind != job_type.kind:
                raise JobNotFoundError(job_id, job_type.kind, view.kind)
            return self._present(view, job_type)

        return self._ask_of(job_id, "get", (), present)

    def query(self, filters: Mapping[str, Any], job_type: type[Job[Any, Any]] | None = None) -> Pending[Any]:
        """Return a page of jobs."""

        def present(page: tuple[list[JobView], str | None]) -> JobPage[Any]:
            return JobPage([self._present(view, job_type) for view in page[0]], page[1])

        return self._ask_for("query", _limited_to(job_type, filters), present)

    def children(self, job_id: str, job_type: type[Job[Any, Any]] | None) -> Pending[Any]:
        """Return all children of a job, oldest first."""
        pending: Pending[Any] = Pending()
        found: list[Job[Any, Any]] = []
        filters = _limited_to(job_type, {"parent_job_id": job_id, "order_by": "created_at", "limit": 1000})

        def got(page: tuple[list[JobView], str | None] | None, error: BaseException | None) -> None:
            if page is None:
                pending.fail(error or RuntimeUnavailableError("no answer"))
                return
            found.extend(self._present(view, job_type) for view in page[0])
            if page[1] is None:
                pending.resolve(found)
            else:
                self._call(pending, "query", ({**filters, "cursor": page[1]},), got)

        self._call(pending, "query", (filters,), got)
        return pending

    def parent(self, job: Job[Any, Any], job_type: type[Job[Any, Any]] | None) -> Pending[Any]:
        """Return a job's parent, None if it has none."""
        if job.parent_job_id is None:
            pending: Pending[Any] = Pending()
            pending.resolve(None)
            return pending
        return self.get(job.parent_job_id, job_type)

    def count(self, filters: Mapping[str, Any]) -> Pending[int]:
        """Return how many jobs match."""
        return self._ask_for("count", filters, int)

    def _ask_for(self, method: str, filters: Mapping[str, Any], present: Callable[[Any], Any]) -> Pending[Any]:
        """Ask for jobs by filters, which are checked and made plain here: their values may be of classes of the user's."""
        try:
            plain = plain_filters(filters)
            parse_query(plain)
        except ConfigurationError as error:
            refused: Pending[Any] = Pending()
            refused.fail(error)
            return refused
        return self._ask(method, (plain,), present)

    def retry(self, job_id: str, *, resume: bool = False) -> Pending[Any]:
        """Run a failed or cancelled job anew; with ``resume`` from a copy of its checkpoint."""
        return self.run_again("retry", job_id, resume)

    def run_again(self, method: str, job_id: str, *more: Any) -> Pending[Any]:
        """Have a stored job run again by ``retry`` or ``retry_failed_items``; resolves to the new job.

        Where the engine does not know its class, yet or any more, and this process has it, it is introduced first.
        """
        pending: Pending[Any] = Pending()
        known = _checked(job_id, pending)
        if known is None:
            return pending
        args = (known, new_id(), *more)
        introduced: set[str] = set()

        def answered(view: JobView | None, error: BaseException | None) -> None:
            if isinstance(error, KindNotIntroducedError) and error.kind not in introduced:
                introduced.add(error.kind)
                job_type = find(error.kind)
                if job_type is not None and self._reads_inline:
                    introduce(job_type, error)
                    return
                if job_type is not None:  # on another thread: to ship a class takes a while, and runs users' code
                    threads.handlers.call("kind_not_introduced", lambda: introduce(job_type, error))
                    return
            if view is None:
                pending.fail(error or RuntimeUnavailableError("no answer"))
            else:
                pending.resolve(self._present(view, None))

        def introduce(job_type: type[Job[Any, Any]], refusal: BaseException) -> None:
            try:
                terms = self._terms_of(job_type, _NO_SETTINGS)
            except BaseException as problem:  # noqa: BLE001 - told where the outcome is looked for
                problem.__cause__ = problem.__cause__ or refusal
                pending.fail(problem)
                return
            self._call(pending, "introduce", ([terms], {terms.code_id: self._code[terms.code_id]}), asked_again)

        def asked_again(_epoch: str | None, error: BaseException | None) -> None:
            if error is not None:
                pending.fail(error)
            else:
                self._call(pending, method, args, answered)

        self._call(pending, method, args, answered)
        return pending

    # --- checkpoints of jobs over items ------------------------------------------------------------------------------

    def checkpoint(self, job_id: str, execution_id: str, checkpoint: Checkpoint, parts: Sequence[Part]) -> Pending[bool]:
        """Store a checkpoint and the parts that it counts; resolves to False if this execution shall stop.

        Made again while there is no coordinator, or no source that can be written, for up to two minutes.
        """
        return self._ask_again("checkpoint", (job_id, execution_id, tuple(checkpoint), list(map(tuple, parts))))

    def write_documents(self, job_id: str, execution_id: str, page: DocumentPage) -> Pending[None]:
        """Write values of a job over items to a collection; see `Sinks.write`. Made again as a checkpoint is."""
        return self._ask_again("write_documents", (job_id, execution_id, tuple(page)))

    def _ask_again(self, method: str, args: tuple[Any, ...]) -> Pending[Any]:
        """Call a method until somebody answers who can do it, for up to `_CHECKPOINT_S`."""
        pending: Pending[Any] = Pending()
        give_up_at = time.monotonic() + _CHECKPOINT_S

        def answered(answer: Any, error: BaseException | None) -> None:
            is_away = isinstance(error, (RuntimeUnavailableError, StoreUnavailableError))
            if is_away and self._closed is None and time.monotonic() < give_up_at:
                self.later(_CHECKPOINT_AGAIN_S, ask)
            elif error is not None:
                pending.fail(error)
            else:
                pending.resolve(answer)

        def ask() -> None:
            self._call(pending, method, args, answered)

        ask()
        return pending

    def resume_state(self, job_id: str, execution_id: str) -> Pending[Checkpoint | None]:
        """Return the checkpoint that an execution goes on from, None for the beginning."""
        return self._ask("resume_state", (job_id, execution_id), lambda found: found)

    def parts(self, job_id: str, stream: str, after: int = -1, limit: int = 50) -> Pending[list[Part]]:
        """Return the parts of a job's stream that follow number ``after``, in order; empty only at the end."""
        return self._ask_of(job_id, "parts", (stream, after, limit), lambda found: found)

    def archive(self, *, dry_run: bool) -> Pending[dict[str, dict[str, int]]]:
        """Apply the archival policies now."""
        return self._ask("archive", (dry_run,), lambda counts: counts)

    def restore(self, job_id: str) -> Pending[Any]:
        """Bring a job back from an archive."""
        return self._ask_of(job_id, "restore", (), lambda view: self._present(view, None))

    def status(self) -> Pending[dict[str, Any]]:
        """Return what the coordinator says of itself."""
        return self._ask("status", (), lambda status: status)

    def watch(self, job: Job[Any, Any], deliver: Callable[[JobProgressUpdate | BaseException], None]) -> Callable[[], None]:
        """Call ``deliver`` with the job's progress until its end; returns what ends it sooner."""
        return self.watch_id(job.id, deliver)

    def watch_id(self, job_id: str, deliver: Callable[[JobProgressUpdate | BaseException], None]) -> Callable[[], None]:
        """As `watch`, for a job of which the id is known."""
        self._check_open()
        return self._watching.watch(job_id, deliver)

    def _present(self, view: JobView, job_type: type[Job[Any, Any]] | None) -> Job[Any, Any]:
        known: type[Job[Any, Any]] = job_type or find(view.kind) or Job
        view = view._replace(epoch=self.epoch or "")
        try:
            return known._in_hand(view)  # noqa: SLF001 - one package
        except Exception:  # noqa: BLE001 - of a class without instances: as of one that is not defined here
            return Job._in_hand(view)  # noqa: SLF001

    def _ask_of(self, job_id: str, method: str, more: tuple[Any, ...], present: Callable[[Any], Any]) -> Pending[Any]:
        """Ask something of one job; what is no id belongs to none, as the outcome says.

        Raises:
            ConfigurationError: It is not even text.
        """
        pending: Pending[Any] = Pending()
        known = _checked(job_id, pending)
        return pending if known is None else self._ask(method, (known, *more), present)

    def _ask(self, method: str, args: tuple[Any, ...], present: Callable[[Any], Any]) -> Pending[Any]:
        pending: Pending[Any] = Pending()

        def answered(answer: Any, error: BaseException | None) -> None:
            if error is not None:
                pending.fail(error)
                return
            try:
                pending.resolve(present(answer))
            except BaseException as problem:  # noqa: BLE001 - becomes the outcome
                pending.fail(problem)

        self._call(pending, method, args, answered)
        return pending

    def _call(
        self,
        pending: Pending[Any],
        method: str,
        args: tuple[Any, ...],
        done: Callable[[Any, BaseException | None], None],
    ) -> None:
        if self._closed is not None:
            pending.fail(self._closed)
            return

        def answered(answer: Any, error: BaseException | None) -> None:
            try:
                done(answer, error)
            except BaseException as problem:  # noqa: BLE001 - told where the outcome is looked for
                pending.fail(problem)
                threads.survive("answer_not_delivered", problem)

        self._transport.coordinator(method, args, answered)


def _submission_of(submits: list[_Submit]) -> Submission:
    terms: dict[str, int] = {}
    abouts: dict[int, int] = {}
    rows = []
    for submit in submits:
        place = terms.setdefault(submit.terms.id, len(terms))
        about = abouts.setdefault(id(submit.about), len(abouts))
        job_id, _, _, context, created_at, delay_s = submit.row
        rows.append((job_id, place, about, context, created_at, delay_s))
    by_about = {id(submit.about): submit.about for submit in submits}
    return Submission(list(terms), [by_about[a] for a in abouts], rows, [], {})


def _limited_to(job_type: type[Job[Any, Any]] | None, filters: Mapping[str, Any]) -> dict[str, Any]:
    return dict(filters) if job_type is None else {**filters, "kind": job_type.kind}


def _check_instances(job_type: type[Job[Any, Any]]) -> None:
    """Refuse a class of which no job in hand, and no ``self`` for its body, can be made.

    Raises:
        JobDefinitionError: It is abstract, or of a kind that Python makes no plain instances of.
    """
    missing = sorted(getattr(job_type, "__abstractmethods__", ()))
    if missing:
        msg = (
            f"job {job_type.kind!r}: {job_type.__qualname__} is abstract ({', '.join(missing)} not defined); start a class "
            f"that defines all of it"
        )
        raise JobDefinitionError(msg)
    try:
        job_type._in_hand(_NO_VIEW)  # noqa: SLF001 - one package
    except Exception as error:  # noqa: BLE001 - whatever its base or its metaclass has against it
        msg = (
            f"job {job_type.kind!r}: no instance of {job_type.__qualname__} can be made ({error}); derive it from plain "
            f"classes besides Job"
        )
        raise JobDefinitionError(msg) from None


def _checked(job_id: object, pending: Pending[Any]) -> str | None:
    """Return an id; None where it is none, which ``pending`` has as its outcome then."""
    try:
        return checked_id(job_id)
    except JobNotFoundError as error:
        pending.fail(error)
        return None


def _present(found: ExecutionView) -> JobExecution:
    (execution_id, job_id, attempt, started_at, completed_at, status, reason, error_type, message, trace) = found.record
    return JobExecution(
        execution_id, job_id, attempt, instant(started_at), instant(completed_at), ExecutionStatus(status), reason,  # type: ignore[arg-type]
        error_type, message, trace, found.metrics,
    )  # fmt: skip
