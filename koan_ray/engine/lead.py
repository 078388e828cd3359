"""Goes through the items of a `FiniteJob`: the body of its execution.

::

    get_items ──► Source ──► Batch ──► chunks ──► job actors
                              ▲  │                   │
                              │  └─► checkpoints     │
                              └───── outcomes ◄──────┘

The lead runs in an actor of its own kind, which holds no CPU and counts for nothing, so that it can wait for its chunks
however few actors there are, and so that an item that kills its process does not kill the lead. What is decided about items
is decided by `koan_ray.domain.items.Batch`; this module moves them: it reads, sends, waits, and writes down.

A chunk is a job that nobody sees (`Terms.part`). When its process vanishes, the lead is told at once and decides what
becomes of its items; when the coordinator vanishes, the chunks that were out are lost and are sent again.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import random
import threading
from collections import deque
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from koan_ray import ambient
from koan_ray.domain.durations import seconds
from koan_ray.domain.items import RETURNED, Batch, Limit, Ranges, Sizer
from koan_ray.domain.records import MAX_ERROR_MESSAGE, ErrorInfo, Particulars
from koan_ray.domain.status import FailureKind, JobStatus
from koan_ray.domain.texts import readable, said
from koan_ray.engine import chunks
from koan_ray.engine.awaiting import awaited, is_awaitable
from koan_ray.engine.bodyloop import run_here
from koan_ray.engine.itemrecord import Record, Resumed
from koan_ray.engine.itemsource import Source, only
from koan_ray.engine.raised import name_of
from koan_ray.errors import JobLostError, KoanRayError, NonRetryable, RemoteTraceback, TooManyFailedItemsError
from koan_ray.finite import FiniteSummary
from koan_ray.values import Values

if TYPE_CHECKING:
    from koan_ray.cancellation import CancellationToken
    from koan_ray.domain.items import Chunk
    from koan_ray.domain.records import DocumentPage, End
    from koan_ray.engine.attempt import Attempt
    from koan_ray.engine.session import Session
    from koan_ray.finite import FiniteJob
    from koan_ray.ports import Clock
    from koan_ray.progress import JobProgress

_SHORTEST_S = 0.15  # work in a chunk, at first
_LONGEST_S = 0.5  # and once the job has run for a while, and of async items, whose last ones of a chunk leave places empty
_OVERRUN = 2.0  # times the target, after which a chunk gives back what it has not begun
_CHUNK_BYTES = 1_048_576  # of a chunk's items as bytes, unless a single item is larger
_ITEM_BYTES = 16 * 1_048_576  # of one item as bytes
_AHEAD_BYTES = 16 * 1_048_576  # of items that are read and not sent
_AHEAD_LEAST = 64
_AHEAD_MOST = 500_000
_CHUNK_MOST = 100_000  # items; also small ones take a hundred bytes each in memory, here and in the actor
_LOOK_EVERY_S = 1.0
_WIDTH_EVERY = 5  # looks
_SHOWN_CHUNKS = 100  # of those that are out for a while, whose items are asked what they say
_REPORT_EVERY_S = 0.1  # while items end
_REPORT_AT_LEAST_S = 0.5  # what waits, and what long items say, is told as well
_RATE_OVER_S = 5.0
_LEAST_REST_S = 0.001
_AGAIN_S = 0.5  # after a chunk could not be sent, or was sent back for no reason of its own
_GRACE_S = 2.0  # for chunks to come back when the job shall stop


class Lead:
    """One execution of a job over items.

    Args:
        attempt: The execution.
        job: The job in hand, whose methods are the user's.
        context: Its context.
        progress: Where to report.
        token: Says when to stop.
        clock: Time.
    """

    def __init__(
        self, attempt: Attempt, job: FiniteJob[Any, Any, Any], context: Any, progress: JobProgress,
        token: CancellationToken, clock: Clock,
    ) -> None:  # fmt: skip
        self._attempt, self._job, self._context = attempt, job, context
        self._progress, self._token, self._clock = progress, token, clock
        self._order = order = attempt.order
        self._options = options = job.items
        self._session: Session = ambient.engine()  # type: ignore[assignment]
        self._is_async = job.definition.is_part_async
        self._resumed = Resumed(order.checkpoint)
        limit = options.max_failed_items
        self._batch = Batch(
            options.retry, limit=Limit(share=limit) if isinstance(limit, float) else Limit(most=limit), max_losses=3,
            random=random.random, done=self._resumed.done,
        )  # fmt: skip
        self._resumed.apply(self._batch, order.job_id)
        self._cursor = self._resumed.cursor
        self._cursors: deque[tuple[int, Any]] = deque()  # of the ends of chunks, in the order of the items
        shortest_s = _LONGEST_S if self._is_async else _SHORTEST_S
        least = options.concurrency if self._is_async else 1
        self._sizer = Sizer(shortest_s, _LONGEST_S, fixed=options.chunk_size, least=least)
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._told: deque[tuple[int, End | BaseException]] = deque()
        self._ids: dict[int, str] = {}  # of the jobs of the chunks that are out
        self._about = Particulars(
            correlation_id=order.particulars.correlation_id, parent_job_id=order.job_id, depth=order.particulars.depth
        )
        self._source: Source | None = None
        self._has_cursor = hasattr(job, "resume_from")
        self._names: list[int] | None = None  # the indexes that people know, where only some items are done again
        self._width = 1
        self._looked_at: set[int] = set()  # chunks that were out at the last look
        self._said: str | None = None  # by an item that takes long
        self._item_bytes = 64.0
        self._not_before = 0.0  # when chunks may be sent again
        self._began = clock.monotonic()
        self._every_s = seconds(options.checkpoint_every, name="checkpoint_every")
        self._record = Record(
            self._session, order, self._batch, self._resumed, clock,
            every_s=self._every_s, total=self._total, standing=self._standing,
            name=self._name, on_news=self._wake.set,
        )  # fmt: skip
        self._reported_at, self._reported_ended = float("-inf"), -1
        self._rates: deque[tuple[float, int]] = deque([(self._began, self._batch.ended)])

    # --- the whole -------------------------------------------------------------------------------------------------

    async def run(self) -> Any:
        """Go through the items, and return what ``build_result`` makes of them."""
        stopping = asyncio.ensure_future(self._token.wait())
        stopping.add_done_callback(lambda _done: self._wake.set())
        looking = asyncio.ensure_future(self._look_around())
        try:
            await self._prepare()
            await self._go_through()
            await self._record.write()
            self._report(final=True)
            return await self._build()
        except BaseException:
            await self._leave()
            raise
        finally:
            stopping.cancel()
            looking.cancel()
            if self._source is not None:
                self._source.stop()
            self._record.close()

    async def _prepare(self) -> None:
        self._width = await self._session.ask("width")
        if self._resumed.failed_of is not None:
            self._names = await self._record.dead_of(self._resumed.failed_of)
            self._has_cursor = False  # the dead items are anywhere
        cursor = self._resumed.cursor
        verifies = self._options.verify_items and not self._has_cursor
        expected = self._resumed.mark if verifies else None
        self._source = Source(
            self._make_items, self._wake_up, skip=Ranges(self._batch.done), expected=expected,
            start=cursor[0] if cursor is not None else 0, takes_fingerprint=verifies,
            inline=self._session.reads_inline,
        )  # fmt: skip

    def _make_items(self) -> Any:
        job: Any = self._job
        if self._resumed.cursor is not None:
            items = job.resume_from(self._context, self._resumed.cursor[1])
        else:
            items = job.get_items(self._context)
        return items if self._names is None else only(items, self._names)

    async def _go_through(self) -> None:
        batch, source = self._batch, self._source
        assert source is not None  # noqa: S101 - made by `_prepare`
        while True:
            self._take_told()
            self._record.raise_if_over()
            if self._token.requested:
                raise asyncio.CancelledError
            self._raise_if_failing()
            self._take_items(source)
            if source.error is not None and not (batch.out or batch.n_fresh):
                raise source.error
            if batch.is_over:
                self._raise_if_failing()  # a share can be told for sure only now
                return
            self._send_chunks()
            self._report()
            self._record.write_in_time()
            await self._rest()

    def _take_items(self, source: Source) -> None:
        batch = self._batch
        for start, items in source.take():
            batch.offer(start, items)
        if source.is_complete and not source.n_ready:
            batch.seen, batch.is_complete = max(batch.seen, source.seen), True
        else:
            ahead = self._ahead()
            missing = ahead - batch.n_fresh
            if missing * 4 >= ahead:  # a thread is not woken for each chunk's worth of items
                source.want(missing)

    def _ahead(self) -> int:
        """Return how many items to have ready: for the next chunks, within bounds of memory."""
        if not self._batch.has_room or self._record.is_full:
            return 0
        wanted = min(self._sizer.size(None, self._width), _CHUNK_MOST) * 3
        most = min(_AHEAD_MOST, int(_AHEAD_BYTES / self._item_bytes))
        return max(1, min(max(wanted, _AHEAD_LEAST), most))

    def _slots(self) -> int:
        """Return how many chunks may be out: one more for each actor than it can process, so that none waits for us."""
        most = self._options.max_workers
        return 2 * self._width if most is None or most >= 2 * self._width else most

    def _raise_if_failing(self) -> None:
        batch = self._batch
        if batch.is_failing:
            last = self._last_dead
            example = f"{last.error} (item {self._name(last.place)})" if last is not None else "see failed_items()"
            limit = self._options.max_failed_items
            allowed = f"{limit:.1%}" if isinstance(limit, float) else f"{limit:,}"
            problem = TooManyFailedItemsError(batch.failed, batch.ended, allowed, example)
            if last is not None and last.error.stack_trace:
                problem.__cause__ = RemoteTraceback(last.error.stack_trace)
            raise NonRetryable(problem)

    @property
    def _last_dead(self) -> Any:
        return self._batch.dead[-1] if self._batch.dead else None

    async def _rest(self) -> None:
        """Wait until there is something to do."""
        now = self._clock.monotonic()
        wait_s = min(self._every_s, max(_LEAST_REST_S, self._report_due() - now))
        due = self._batch.next_due()
        if due is not None and due > now:  # one that is due already waits for a chunk to come back
            wait_s = min(wait_s, due - now)
        if self._wake.is_set():
            self._wake.clear()
            await asyncio.sleep(0)
            return
        timer = self._loop.call_later(wait_s, self._wake.set)
        try:
            await self._wake.wait()
        finally:
            timer.cancel()
            self._wake.clear()

    def _wake_up(self) -> None:
        """Look again; from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._wake.set)
        except RuntimeError:  # the loop is closed, and with it the job
            return

    async def _look_around(self) -> None:
        """Keep up with how many actors there are, and with what long items say of themselves."""
        n = 0
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            n += 1
            long = [self._ids[number] for number in self._ids if number in self._looked_at][:_SHOWN_CHUNKS]
            self._looked_at = set(self._ids)
            with contextlib.suppress(KoanRayError):  # what we know stands
                if n % _WIDTH_EVERY == 0:
                    self._width = await self._session.ask("width")
                states = await self._session.latest(long) if long else []
                newest = max(states, key=lambda state: state[1].updated_at, default=None)
                self._said = newest[1].message if newest is not None else None

    # --- chunks ----------------------------------------------------------------------------------------------------

    def _send_chunks(self) -> None:
        batch, now = self._batch, self._clock.monotonic()
        if now < self._not_before:
            return
        slots = self._slots()
        source = self._source
        while len(batch.out) < slots:
            left = None
            if batch.is_complete or (source is not None and source.total is not None):
                total = batch.seen if batch.is_complete or source is None else source.total
                left = batch.n_fresh + max(0, (total or 0) - batch.seen)
            most = max(1, min(_CHUNK_MOST, int(_CHUNK_BYTES / self._item_bytes)))
            chunk = batch.take(min(self._sizer.size(left, self._width), most), now)
            if chunk is None:
                return
            self._note_cursor(chunk)
            payload = self._packed(chunk)
            if payload is not None:
                self._send(chunk, payload)

    def _note_cursor(self, chunk: Chunk) -> None:
        """Remember where the source stands after the last item of a fresh chunk, where the job can tell."""
        if self._has_cursor and isinstance(chunk.indexes, range) and not chunk.losses:
            end = chunk.indexes.stop
            if not self._cursors or end > self._cursors[-1][0]:
                job: Any = self._job
                self._cursors.append((end, job.get_cursor(chunk.items[-1])))

    def _packed(self, chunk: Chunk) -> bytes | None:
        """Return the items of a chunk as bytes; fewer where they are too many bytes, None where none can travel."""
        number = chunk.number
        while True:
            try:
                packed = chunks.dump(chunk.items)
            except Exception:  # noqa: BLE001 - anything may be an item
                self._refuse_unpicklable(chunk)
                if not chunk.items:
                    return None
                continue
            self._item_bytes = max(1.0, self._item_bytes * 0.7 + len(packed) / len(chunk) * 0.3)
            if len(packed) <= _CHUNK_BYTES or (len(chunk) == 1 and len(packed) <= _ITEM_BYTES):
                return packed
            if len(chunk) == 1:
                text = f"the item takes {len(packed):,} bytes, the limit is {_ITEM_BYTES:,}; give a reference to it instead"
                self._batch.refuse(number, 0, ErrorInfo("PayloadTooLargeError", text), chunks.shown(chunk.items[0]))
                return None
            self._batch.give_back(number, max(1, len(chunk) * _CHUNK_BYTES // (2 * len(packed))))

    def _refuse_unpicklable(self, chunk: Chunk) -> None:
        for place in reversed(range(len(chunk))):
            try:
                chunks.dump([chunk.items[place]])
            except Exception as problem:  # noqa: BLE001 - as above
                text = (
                    f"the item, a {type(chunk.items[place]).__name__}, cannot be sent to a job actor: "
                    f"{type(problem).__name__}: {said(problem, 1000)}; let get_items() give plain values and open resources "
                    f"in process_item()"
                )
                error = ErrorInfo("UnserializableItemError", readable(text, MAX_ERROR_MESSAGE))
                self._batch.refuse(chunk.number, place, error, chunks.shown(chunk.items[place]))

    def _send(self, chunk: Chunk, packed: bytes) -> None:
        number = chunk.number
        limit_s = self._sizer.target_s(self._width) * _OVERRUN if self._options.chunk_size is None else None
        order = chunks.ChunkOrder(
            self._order.execution_id, self._attempt.job_view, self._named(chunk.indexes), packed, limit_s
        )

        def told(outcome: End | BaseException) -> None:
            self._told.append((number, outcome))
            self._wake_up()

        lead, job_type = self._attempt.terms, type(self._job)
        self._ids[number] = self._session.start_part(lead, job_type, self._about, chunks.write(order), told, chunk.crashes)

    def _take_told(self) -> None:
        while self._told:
            number, outcome = self._told.popleft()
            self._ids.pop(number, None)
            if isinstance(outcome, BaseException):
                self._unsent(number, outcome)
            elif outcome.status == JobStatus.COMPLETED and outcome.result is not None:
                self._ended(number, outcome.result)
            elif outcome.status == JobStatus.CANCELLED:
                self._unsent(number, None)
            else:
                self._broke(number, outcome)

    def _unsent(self, number: int, error: BaseException | None) -> None:
        """A chunk is nowhere: its engine has died, or it was cancelled for no reason of ours. Send it again."""
        self._batch.give_back(number)
        if not isinstance(error, JobLostError):
            self._not_before = self._clock.monotonic() + _AGAIN_S
            self._loop.call_later(_AGAIN_S, self._wake.set)

    def _ended(self, number: int, result: bytes) -> None:
        outcomes = chunks.read_outcomes(result)
        chunk = self._batch.reported(number, outcomes, self._clock.monotonic())
        if chunk is None:
            return
        codes = outcomes.codes
        self._sizer.ended(len(codes) - codes.count(RETURNED), outcomes.duration_s)
        self._record.take(outcomes)

    def _broke(self, number: int, end: End) -> None:
        error = end.error or ErrorInfo("UnknownError", "the chunk ended without an error")
        if error.type == "ProcessLost":
            self._batch.lost(number, error, chunks.shown)
        elif end.reason == FailureKind.UNKNOWN_KIND or error.type == "ActorStartError":
            raise NonRetryable(RuntimeError(f"no actor can process the items: {error}"))
        else:
            self._batch.broken(number, error, chunks.shown)

    def _name(self, place: int) -> int:
        return place if self._names is None else self._names[place]

    def _named(self, places: Any) -> Any:
        return places if self._names is None else [self._names[place] for place in places]

    # --- progress --------------------------------------------------------------------------------------------------

    def _report(self, *, final: bool = False) -> None:
        now = self._clock.monotonic()
        batch = self._batch
        ended, total = batch.ended, self._total()
        if not final and now < self._report_due():
            return
        self._reported_at, self._reported_ended = now, ended
        self._rates.append((now, ended))
        while len(self._rates) > 2 and now - self._rates[0][0] > _RATE_OVER_S:
            self._rates.popleft()
        since, before = self._rates[0]
        rate = (ended - before) / (now - since) if now > since else 0.0
        message = _told_of(batch, total, rate)
        if self._said and not final:
            message = f"{message}; {self._said}"
        if total:
            self._progress.report(ended, total, message)
        else:
            self._progress.report(0.0, message)

    def _report_due(self) -> float:
        has_news = self._batch.ended != self._reported_ended
        return self._reported_at + (_REPORT_EVERY_S if has_news else _REPORT_AT_LEAST_S)

    def _total(self) -> int | None:
        total = self._batch.total
        if self._names is not None:
            return len(self._names)
        if total is None and self._source is not None:
            total = self._source.total
        return total

    def _standing(self) -> dict[str, Any]:
        """Say, for a checkpoint, where the source stands, and how long the job has run."""
        ended = self._batch.done.mark
        while self._cursors and self._cursors[0][0] <= ended:
            self._cursor = self._cursors.popleft()
        mark = self._source.mark if self._source is not None else None
        return {"mark": mark, "cursor": self._cursor, "spent_s": round(self._spent_s(), 3)}

    def _spent_s(self) -> float:
        return self._resumed.spent_s + self._clock.monotonic() - self._began

    # --- the end ---------------------------------------------------------------------------------------------------

    async def _leave(self) -> None:
        """Stop what is out, take in what it has done, and write that down; within a grace, and without raising."""
        loop = self._loop
        until = loop.time() + _GRACE_S
        for job_id in list(self._ids.values()):
            self._session.cancel(job_id, "the job that they belong to stops")
        # Whatever is raised here, also when our time is over: there is an error already, which is the one to be told.
        with contextlib.suppress(BaseException):
            while self._ids and loop.time() < until and not self._record.is_superseded:
                self._take_told()
                if self._ids:
                    self._wake.clear()
                    timer = loop.call_later(0.05, self._wake.set)
                    await self._wake.wait()
                    timer.cancel()
        with contextlib.suppress(BaseException):
            self._take_told()
            async with asyncio.timeout_at(until + _GRACE_S / 2):
                await self._record.write()
        self._report(final=True)

    async def _build(self) -> Any:
        """Call ``build_result``, in a thread, because it may read many values."""
        batch = self._batch
        values = Values(
            lambda: self._record.values(ordered=self._options.ordered), self._record.n_values,
            None if self._session.reads_inline else self._write_documents,
        )  # fmt: skip
        summary = FiniteSummary(
            batch.ended, batch.processed, batch.failed, batch.skipped, timedelta(seconds=self._spent_s()), values,
            dict(batch.reasons),
        )  # fmt: skip
        if self._session.reads_inline:
            await self._record.fetch()
            result = self._job.build_result(summary)
            return await awaited(result) if is_awaitable(result) else result
        outcome: asyncio.Future[Any] = self._loop.create_future()
        context = contextvars.copy_context()
        threading.Thread(
            target=context.run, args=(self._build_in_thread, summary, outcome), name="koan-result", daemon=True
        ).start()
        return await outcome

    def _write_documents(self, page: DocumentPage) -> None:
        """Have a page of values written, and return when it is stored."""
        self._session.write_documents(self._order.job_id, self._order.execution_id, page).get()

    def _build_in_thread(self, summary: FiniteSummary, outcome: asyncio.Future[Any]) -> None:
        try:
            result = self._job.build_result(summary)
            if is_awaitable(result):
                result = run_here(awaited(result))
        except BaseException as error:  # noqa: BLE001 - whatever user code raises becomes the outcome
            self._loop.call_soon_threadsafe(_conclude, outcome, None, error)
        else:
            self._loop.call_soon_threadsafe(_conclude, outcome, result, None)


def _told_of(batch: Batch, total: int | None, rate: float) -> str:
    parts = [f"{batch.ended:,} of {total:,} items" if total is not None else f"{batch.ended:,} items"]
    parts += [f"{n:,} {what}" for n, what in ((batch.failed, "failed"), (batch.skipped, "skipped")) if n]
    if batch.n_waiting:
        parts.append(f"{batch.n_waiting:,} waiting for another attempt")
    parts.append(f"{rate:,.0f}/s" if rate >= 10 or rate == 0 else f"{rate:.1f}/s")
    return ", ".join(parts)


def _conclude(outcome: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if outcome.done():
        return
    if error is None:
        outcome.set_result(result)
    elif isinstance(error, Exception) and not isinstance(error, StopIteration):  # which a future refuses
        outcome.set_exception(error)
    else:
        outcome.set_exception(RuntimeError(f"build_result() raised {name_of(error)}: {said(error, 2000)}"))
