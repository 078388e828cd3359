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
import inspect
import json
import random
import threading
from collections import deque
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from koan_ray import ambient
from koan_ray.domain.durations import seconds
from koan_ray.domain.items import PRODUCED, RETURNED, Batch, Limit, Ranges, Sizer
from koan_ray.domain.records import FAILED, MAX_CHECKPOINT, VALUES, Checkpoint, ErrorInfo, Part, Particulars
from koan_ray.domain.status import FailureKind, JobStatus
from koan_ray.engine import chunks, produce
from koan_ray.engine.itemsource import Mark, Source
from koan_ray.errors import (
    JobLostError,
    KoanRayError,
    LimitExceededError,
    NonRetryable,
    RecordCorruptError,
    RuntimeUnavailableError,
    StoreUnavailableError,
    TooManyFailedItemsError,
)
from koan_ray.finite import FiniteSummary, Values

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from koan_ray.cancellation import CancellationToken
    from koan_ray.domain.items import Chunk
    from koan_ray.domain.records import End
    from koan_ray.engine.attempt import Attempt
    from koan_ray.engine.session import Session
    from koan_ray.finite import FiniteJob
    from koan_ray.ports import Clock
    from koan_ray.progress import JobProgress

_TARGET_S = 0.15  # work in a chunk
_TARGET_ASYNC_S = 0.5  # the last items of a chunk leave places empty, so there are fewer chunks
_OVERRUN = 2.0  # times the target, after which a chunk gives back what it has not begun
_CHUNK_BYTES = 1_048_576  # of a chunk's items as bytes, unless a single item is larger
_ITEM_BYTES = 16 * 1_048_576  # of one item as bytes
_AHEAD_BYTES = 16 * 1_048_576  # of items that are read and not sent
_AHEAD_LEAST = 64
_AHEAD_MOST = 1_000_000
_LOOK_EVERY_S = 1.0
_WIDTH_EVERY = 5  # looks
_SHOWN_CHUNKS = 100  # of those that are out for a while, whose items are asked what they say
_REPORT_EVERY_S = 0.1
_RATE_OVER_S = 5.0
_AGAIN_S = 0.5  # after a chunk could not be sent, or was sent back for no reason of its own
_GRACE_S = 2.0  # for chunks to come back when the job shall stop
_PENDING_BYTES = 4 * 1_048_576  # of values and dead items that ask for a checkpoint before its time
_PENDING_MOST = 32 * 1_048_576  # of values and dead items that keep fresh items from being begun
_KEPT_DEAD = 100
_PAGE = 20  # parts in an answer


class _Snapshot(NamedTuple):
    checkpoint: Checkpoint
    parts: list[Part]


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
        self._resumed = _Resumed.read(order.checkpoint) if order.checkpoint is not None else _Resumed()
        limit = options.max_failed_items
        self._batch = Batch(
            options.retry, limit=Limit(share=limit) if isinstance(limit, float) else Limit(most=limit), max_losses=3,
            random=random.random, done=self._resumed.done,
        )  # fmt: skip
        self._resumed.apply(self._batch, order.job_id)
        self._cursor = self._resumed.cursor
        self._cursors: deque[tuple[int, Any]] = deque()  # of the ends of chunks, in the order of the items
        target_s = _TARGET_ASYNC_S if self._is_async else _TARGET_S
        self._limit_s = target_s * _OVERRUN if options.chunk_size is None else None
        least = options.concurrency if self._is_async else 1
        self._sizer = Sizer(target_s, fixed=options.chunk_size, least=least)
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
        self._values: list[tuple[bytes, int]] = []  # not in a part yet
        self._pending_bytes = 0
        self._n_values = self._resumed.n_values
        self._spool = produce.Spool()
        self._pages: list[Part] = []  # of values that were read before `build_result` is called
        self._n_parts = {VALUES: 0, FAILED: 0}
        if order.checkpoint is not None:
            self._n_parts = {VALUES: order.checkpoint.value_parts, FAILED: order.checkpoint.failed_parts}
        self._sequence = order.checkpoint.sequence if order.checkpoint is not None else 0
        self._writing: asyncio.Task[None] | None = None
        self._unwritten: _Snapshot | None = None
        self._keeps_parts = True
        self._is_superseded = False
        self._fatal: BaseException | None = None
        self._written_at = clock.monotonic()
        self._written_ended = self._batch.ended
        self._reported_at = float("-inf")
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
            await self._write_down()
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
            self._spool.close()

    async def _prepare(self) -> None:
        self._width = await self._session.ask("width")
        if self._resumed.failed_of is not None:
            await self._load_names(self._resumed.failed_of)
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
        return items if self._names is None else _only(items, self._names)

    async def _go_through(self) -> None:
        batch, source = self._batch, self._source
        assert source is not None  # noqa: S101 - made by `_prepare`
        while True:
            self._take_told()
            if self._token.requested or self._is_superseded:
                raise asyncio.CancelledError
            if self._fatal is not None:
                raise self._fatal
            self._raise_if_failing()
            self._take_items(source)
            if source.error is not None and not (batch.out or batch.n_fresh):
                raise source.error
            if batch.is_over:
                self._raise_if_failing()  # a share can be told for sure only now
                return
            self._send_chunks()
            self._report()
            self._write_down_in_time()
            await self._rest()

    def _take_items(self, source: Source) -> None:
        batch = self._batch
        for start, items in source.take():
            batch.offer(start, items)
        if source.is_complete and not source.n_ready:
            batch.seen, batch.is_complete = max(batch.seen, source.seen), True
        else:
            source.want(self._ahead() - batch.n_fresh)

    def _ahead(self) -> int:
        """Return how many items to have ready: for the next chunks, within bounds of memory."""
        if not self._batch.has_room or self._pending_bytes > _PENDING_MOST:
            return 0
        wanted = self._sizer.size(None, self._width) * (self._slots() + 2)
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
            raise NonRetryable(TooManyFailedItemsError(batch.failed, batch.ended, allowed, example))

    @property
    def _last_dead(self) -> Any:
        return self._batch.dead[-1] if self._batch.dead else None

    async def _rest(self) -> None:
        """Wait until there is something to do."""
        now = self._clock.monotonic()
        every_s = seconds(self._options.checkpoint_every, name="checkpoint_every")
        wait_s = min(_REPORT_EVERY_S, every_s)
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
            most = int(_CHUNK_BYTES / self._item_bytes)
            chunk = batch.take(min(self._sizer.size(left, self._width), max(1, most)), now)
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
                    f"{type(problem).__name__}: {problem}; let get_items() give plain values and open resources in "
                    f"process_item()"
                )
                error = ErrorInfo("UnserializableItemError", text[:2000])
                self._batch.refuse(chunk.number, place, error, chunks.shown(chunk.items[place]))

    def _send(self, chunk: Chunk, packed: bytes) -> None:
        number = chunk.number
        limit_s = self._limit_s
        order = chunks.ChunkOrder(
            self._order.execution_id, self._attempt.job_view, self._named(chunk.indexes), packed, limit_s
        )

        def told(outcome: End | BaseException) -> None:
            self._told.append((number, outcome))
            self._wake_up()

        lead, job_type = self._attempt.terms, type(self._job)
        self._ids[number] = self._session.start_part(lead, job_type, self._about, chunks.write(order), told)

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
        self._pending_bytes += sum(failure.size for failure in outcomes.failures)
        if outcomes.values:
            n = codes.count(PRODUCED)
            self._n_values += n
            self._pending_bytes += len(outcomes.values)
            self._values.append((outcomes.values, n))
        if not self._keeps_parts:
            self._spill()

    def _spill(self) -> None:
        """Keep values here, and of the dead items the last ones: the engine has no room for what this job produces."""
        for body, _ in self._values:
            self._spool.add(body)
        self._values, self._pending_bytes = [], 0
        del self._batch.dead[:-_KEPT_DEAD]

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
        if not final and now - self._reported_at < _REPORT_EVERY_S:
            return
        self._reported_at = now
        batch = self._batch
        ended, total = batch.ended, self._total()
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

    def _total(self) -> int | None:
        total = self._batch.total
        if self._names is not None:
            return len(self._names)
        if total is None and self._source is not None:
            total = self._source.total
        return total

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def _write_down_in_time(self) -> None:
        """Begin a checkpoint when it is time for one, and anything has ended since the last."""
        if self._writing is not None or not self._keeps_parts:
            return
        every_s = seconds(self._options.checkpoint_every, name="checkpoint_every")
        is_time = self._clock.monotonic() - self._written_at >= every_s
        has_much = self._pending_bytes >= _PENDING_BYTES
        if (is_time and self._batch.ended > self._written_ended) or has_much or (is_time and self._unwritten is not None):
            self._begin_writing()

    def _begin_writing(self) -> None:
        self._writing = asyncio.ensure_future(self._write())
        self._writing.add_done_callback(self._written)

    def _written(self, done: asyncio.Task[None]) -> None:
        self._writing = None
        if not done.cancelled() and (error := done.exception()) is not None:
            self._fatal, self._keeps_parts = error, False
        self._wake.set()

    async def _write_down(self) -> None:
        """Write everything down now."""
        while self._keeps_parts and not self._is_superseded:
            if self._writing is None:
                if self._unwritten is None and not (
                    self._values or self._batch.dead or self._batch.ended > self._written_ended
                ):
                    return
                self._begin_writing()
            assert self._writing is not None  # noqa: S101 - begun above
            await asyncio.wait({self._writing})
            await asyncio.sleep(0)  # its callback is called before we go on
            if self._unwritten is not None and self._keeps_parts:
                await asyncio.sleep(_AGAIN_S)
        if self._fatal is not None:
            raise self._fatal
        if self._is_superseded:
            raise asyncio.CancelledError

    async def _write(self) -> None:
        snapshot = self._unwritten = self._unwritten or self._snapshot()
        try:
            was_taken = await self._session.checkpoint(
                self._order.job_id, self._order.execution_id, snapshot.checkpoint, snapshot.parts
            )
        except LimitExceededError:  # of the engine's memory: what is here stays here
            self._keeps_parts = False
            for part in snapshot.parts:
                if part.stream == VALUES:
                    self._spool.add(part.body)
            self._spill()
        except (RuntimeUnavailableError, StoreUnavailableError):  # again, with the same parts
            self._written_at = self._clock.monotonic()
            return
        else:
            if not was_taken:
                self._is_superseded = True
            for part in snapshot.parts:
                self._n_parts[part.stream] = part.seq + 1
            self._sequence = snapshot.checkpoint.sequence
        self._unwritten = None
        self._written_at = self._clock.monotonic()

    def _snapshot(self) -> _Snapshot:
        batch = self._batch
        values, self._values, self._pending_bytes = self._values, [], 0
        dead, batch.dead = batch.dead, []
        job_id = self._order.job_id
        parts = [
            Part(job_id, VALUES, self._n_parts[VALUES] + place, body, n)
            for place, (body, n) in enumerate(produce.joined(values))
        ]
        parts += [
            Part(job_id, FAILED, self._n_parts[FAILED] + place, body, n)
            for place, (body, n) in enumerate(produce.dead_as_array(dead, self._name))
        ]
        self._written_ended = batch.ended
        checkpoint = Checkpoint(
            self._sequence + 1, self._body(), self._total(), batch.processed, batch.skipped, batch.failed, self._clock.now()
        )
        return _Snapshot(checkpoint, parts)

    def _body(self) -> bytes:
        mark = self._batch.done.mark
        while self._cursors and self._cursors[0][0] <= mark:
            self._cursor = self._cursors.popleft()
        state = {
            "v": 1,
            "done": [list(pair) for pair in self._batch.done],
            "attempts": {str(index): n for index, n in self._batch.attempts.items()},
            "mark": list(self._source.mark) if self._source is not None and self._source.mark is not None else None,
            "spent_s": round(self._spent_s(), 3),
            "reasons": self._batch.reasons,
            "n_values": self._n_values,
            "failed_of": self._resumed.failed_of,
            "cursor": self._cursor,
            "job": self._order.job_id,
            "forgiven": self._batch.forgiven,
        }
        body = json.dumps(state, separators=(",", ":")).encode()
        if len(body) > MAX_CHECKPOINT:  # a fingerprint and reasons are no loss; the ranges are limited by `Batch.has_room`
            state |= {"reasons": {}, "attempts": {}}
            body = json.dumps(state, separators=(",", ":")).encode()
        return body

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
            while self._ids and loop.time() < until and not self._is_superseded:
                self._take_told()
                if self._ids:
                    self._wake.clear()
                    timer = loop.call_later(0.05, self._wake.set)
                    await self._wake.wait()
                    timer.cancel()
        with contextlib.suppress(BaseException):
            self._take_told()
            async with asyncio.timeout_at(until + _GRACE_S / 2):
                await self._write_down()
        self._report(final=True)

    async def _build(self) -> Any:
        """Call ``build_result``, in a thread, because it may read many values."""
        batch = self._batch
        summary = FiniteSummary(
            batch.ended, batch.processed, batch.failed, batch.skipped, timedelta(seconds=self._spent_s()),
            Values(self._read_values, self._n_values), dict(batch.reasons),
        )  # fmt: skip
        if self._session.reads_inline:
            self._pages = [part async for part in self._stored_values()]
            result = self._job.build_result(summary)
            return await result if inspect.iscoroutine(result) else result
        outcome: asyncio.Future[Any] = self._loop.create_future()
        context = contextvars.copy_context()
        threading.Thread(
            target=context.run, args=(self._build_in_thread, summary, outcome), name="koan-result", daemon=True
        ).start()
        return await outcome

    def _build_in_thread(self, summary: FiniteSummary, outcome: asyncio.Future[Any]) -> None:
        try:
            result = self._job.build_result(summary)
            if inspect.iscoroutine(result):
                result = asyncio.run(result)
        except BaseException as error:  # noqa: BLE001 - whatever user code raises becomes the outcome
            self._loop.call_soon_threadsafe(_conclude, outcome, None, error)
        else:
            self._loop.call_soon_threadsafe(_conclude, outcome, result, None)

    def _read_values(self) -> Iterator[Any]:
        if self._options.ordered:
            yield from produce.in_order(self._arrays())
        else:
            for array in self._arrays():
                yield from array

    async def _stored_values(self) -> AsyncIterator[Part]:
        after = -1
        while page := await self._session.parts(self._order.job_id, VALUES, after, _PAGE):
            for part in page:
                yield part
            after = page[-1].seq

    def _arrays(self) -> Iterator[list[Any]]:
        n_parts, after = self._n_parts[VALUES], -1
        for part in self._pages:
            yield json.loads(part.body)
            after = part.seq
        while after + 1 < n_parts:
            page = self._session.parts(self._order.job_id, VALUES, after, _PAGE).get()
            if not page:
                raise RecordCorruptError(self._order.job_id, "values", f"part {after + 1} of {n_parts} is missing")
            for part in page:
                yield json.loads(part.body)
            after = page[-1].seq
        for place in range(len(self._spool)):
            yield self._spool.read(place)
        for body, _ in self._values:
            yield json.loads(body)

    async def _load_names(self, job_id: str) -> None:
        """Learn which items of another job are to be done again."""
        found: list[int] = []
        after = -1
        while page := await self._session.parts(job_id, FAILED, after, _PAGE):
            for part in page:
                found += [row["index"] for row in json.loads(part.body)]
            after = page[-1].seq
        self._names = sorted(set(found))


class _Resumed:
    """What a checkpoint says."""

    def __init__(self) -> None:
        self.done = Ranges()
        self.attempts: dict[int, int] = {}
        self.mark: Mark | None = None
        self.cursor: tuple[int, Any] | None = None
        self.spent_s = 0.0
        self.reasons: dict[str, int] = {}
        self.n_values = 0
        self.failed_of: str | None = None
        self.counts = (0, 0, 0)
        self.job_id: str | None = None  # whose checkpoint it is
        self.forgiven = 0

    @classmethod
    def read(cls, checkpoint: Checkpoint) -> _Resumed:
        state = json.loads(checkpoint.body)
        found = cls()
        found.done = Ranges(state.get("done", ()))
        found.attempts = {int(index): n for index, n in state.get("attempts", {}).items()}
        mark, cursor = state.get("mark"), state.get("cursor")
        found.mark = Mark(*mark) if mark and mark[0] else None
        found.cursor = (cursor[0], cursor[1]) if cursor else None
        found.spent_s, found.reasons = state.get("spent_s", 0.0), state.get("reasons", {})
        found.n_values, found.failed_of = state.get("n_values", 0), state.get("failed_of")
        found.job_id, found.forgiven = state.get("job"), state.get("forgiven", 0)
        found.counts = (checkpoint.processed, checkpoint.skipped, checkpoint.failed)
        return found

    def apply(self, batch: Batch, job_id: str) -> None:
        batch.processed, batch.skipped, batch.failed = self.counts
        batch.forgiven = self.forgiven if self.job_id == job_id else batch.failed
        batch.attempts, batch.reasons = dict(self.attempts), dict(self.reasons)


def _told_of(batch: Batch, total: int | None, rate: float) -> str:
    parts = [f"{batch.ended:,} of {total:,} items" if total is not None else f"{batch.ended:,} items"]
    parts += [f"{n:,} {what}" for n, what in ((batch.failed, "failed"), (batch.skipped, "skipped")) if n]
    if batch.n_waiting:
        parts.append(f"{batch.n_waiting:,} waiting for another attempt")
    parts.append(f"{rate:,.0f}/s" if rate >= 10 or rate == 0 else f"{rate:.1f}/s")
    return ", ".join(parts)


def _only(source: Any, indexes: list[int]) -> Any:
    """Return only the items with these indexes, in their order; reads no further than the last of them."""
    if hasattr(source, "__aiter__"):
        return _only_async(source, indexes)
    return _only_plain(source.iter_rows() if hasattr(source, "iter_rows") else source, indexes)


def _only_plain(source: Any, indexes: list[int]) -> Iterator[Any]:
    wanted = iter(indexes)
    following = next(wanted, None)
    for index, item in enumerate(source):
        if following is None:
            return
        if index == following:
            yield item
            following = next(wanted, None)


async def _only_async(source: Any, indexes: list[int]) -> Any:
    wanted = iter(indexes)
    following = next(wanted, None)
    index = 0
    async for item in source:
        if following is None:
            return
        if index == following:
            yield item
            following = next(wanted, None)
        index += 1


def _conclude(outcome: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if outcome.done():
        return
    if error is None:
        outcome.set_result(result)
    elif isinstance(error, Exception):
        outcome.set_exception(error)
    else:
        outcome.set_exception(RuntimeError(f"build_result() raised {type(error).__name__}: {error}"))
