"""The record that a lead keeps of its items: checkpoints, and the parts with what the items have produced.

A checkpoint and the parts that it counts go to the coordinator together, one at a time; what ends meanwhile goes with the
next. While nobody answers, the same checkpoint is sent again, and what has gathered behind it holds up fresh items once it
is too much (`Record.is_full`). Where the engine has no room for parts, which is so only for jobs in memory, values stay in
this process and the job cannot be continued by another.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any, NamedTuple

from koan_ray.domain.items import Ranges
from koan_ray.domain.records import FAILED, MAX_CHECKPOINT, VALUES, Checkpoint, Part
from koan_ray.engine import produce
from koan_ray.engine.itemsource import Mark
from koan_ray.errors import LimitExceededError, RecordCorruptError, RuntimeUnavailableError, StoreUnavailableError
from koan_ray.exact import loose, revived, tagged

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from koan_ray.domain.items import Batch, Outcomes
    from koan_ray.engine.session import Session
    from koan_ray.ports import Clock, Order

_AGAIN_S = 0.5
_MUCH = 4 * 1_048_576  # bytes of values and dead items that ask for a checkpoint before its time
_FULL = 32 * 1_048_576  # bytes of them that keep fresh items from being begun
_KEPT_DEAD = 100
_PAGE = 20  # parts in an answer


class Resumed:
    """What a checkpoint says; without one, what is so in the beginning."""

    def __init__(self, checkpoint: Checkpoint | None) -> None:
        state: dict[str, Any] = json.loads(checkpoint.body) if checkpoint is not None else {}
        mark, cursor = state.get("mark"), state.get("cursor")
        self.done = Ranges(state.get("done", ()))
        self.attempts = {int(index): n for index, n in state.get("attempts", {}).items()}
        self.suspects: list[list[int]] = state.get("suspects", [])
        self.mark = Mark(*mark) if mark and mark[0] else None
        self.cursor: tuple[int, Any] | None = (cursor[0], revived(cursor[1])) if cursor else None
        self.spent_s: float = state.get("spent_s", 0.0)
        self.reasons: dict[str, int] = state.get("reasons", {})
        self.n_values: int = state.get("n_values", 0)
        self.failed_of: str | None = state.get("failed_of")
        self.job_id: str | None = state.get("job")  # whose checkpoint it is
        self.forgiven: int = state.get("forgiven", 0)
        self.counts = (checkpoint.processed, checkpoint.skipped, checkpoint.failed) if checkpoint is not None else (0, 0, 0)

    def apply(self, batch: Batch, job_id: str) -> None:
        """Let a batch go on from here."""
        batch.processed, batch.skipped, batch.failed = self.counts
        batch.forgiven = self.forgiven if self.job_id == job_id else batch.failed
        batch.attempts, batch.reasons = dict(self.attempts), dict(self.reasons)
        batch.remember(self.suspects)


class _Snapshot(NamedTuple):
    checkpoint: Checkpoint
    parts: list[Part]


class Record:
    """What has become of the items of one execution, on its way to where it is kept.

    Args:
        session: The way to the coordinator.
        order: The execution.
        batch: The items.
        resumed: Where the execution began.
        clock: Time.
        every_s: Between two checkpoints.
        total: Says how many items there are, as far as that is known.
        standing: Says what else goes into a checkpoint: where the source stands, and the time spent.
        name: Turns a place into the index that people know.
        on_news: Called when a checkpoint was kept, or cannot be.
    """

    def __init__(
        self, session: Session, order: Order, batch: Batch, resumed: Resumed, clock: Clock, *, every_s: float,
        total: Callable[[], int | None], standing: Callable[[], dict[str, Any]], name: Callable[[int], int],
        on_news: Callable[[], None],
    ) -> None:  # fmt: skip
        self._session, self._order, self._batch, self._resumed, self._clock = session, order, batch, resumed, clock
        self._every_s, self._total, self._standing, self._name, self._on_news = every_s, total, standing, name, on_news
        checkpoint = order.checkpoint
        self.n_values = resumed.n_values
        self.is_superseded = False  # another execution of this job runs; whatever this one does changes nothing
        self.fatal: BaseException | None = None
        self._values: list[tuple[bytes, int]] = []  # arrays that are in no part yet, with their lengths
        self._pending_bytes = 0
        self._spool = produce.Spool()
        self._pages: list[Part] = []  # of values that were read before somebody iterates over them
        self._n_parts = {VALUES: 0, FAILED: 0}
        if checkpoint is not None:
            self._n_parts = {VALUES: checkpoint.value_parts, FAILED: checkpoint.failed_parts}
        self._sequence = checkpoint.sequence if checkpoint is not None else 0
        self._writing: asyncio.Task[None] | None = None
        self._unwritten: _Snapshot | None = None
        self._keeps_parts = True
        self._written_at = clock.monotonic()
        self._written_ended, self._written_losses = batch.ended, batch.n_losses

    def close(self) -> None:
        """Let go of what is here."""
        self._spool.close()

    # --- in --------------------------------------------------------------------------------------------------------

    @property
    def is_full(self) -> bool:
        """So much waits to be kept that nothing should be begun."""
        return self._pending_bytes > _FULL

    def take(self, outcomes: Outcomes) -> None:
        """Take in what a chunk has produced."""
        self._pending_bytes += sum(failure.size for failure in outcomes.failures)
        for body, n in outcomes.values:
            self.n_values += n
            self._pending_bytes += len(body)
            self._values.append((body, n))
        if not self._keeps_parts:
            self._spill()

    def _spill(self) -> None:
        """Keep values here, and of the dead items the last ones."""
        for body, _ in self._values:
            self._spool.add(body)
        self._values, self._pending_bytes = [], 0
        del self._batch.dead[:-_KEPT_DEAD]

    # --- out -------------------------------------------------------------------------------------------------------

    def write_in_time(self) -> None:
        """Begin a checkpoint when it is time for one and anything has ended since the last, or when much has gathered.

        Also when a process has vanished: what kills a process may kill whatever leads the items, too, before it is time.
        """
        if self._writing is not None or not self._keeps_parts:
            return
        is_time = self._clock.monotonic() - self._written_at >= self._every_s
        has_news = self._batch.ended > self._written_ended or self._unwritten is not None
        is_urgent = self._pending_bytes >= _MUCH or self._batch.n_losses > self._written_losses
        if (is_time and has_news) or (is_urgent and self._unwritten is None):
            self._begin()

    async def write(self) -> None:
        """Keep everything now.

        Raises:
            CancelledError: Another execution of the job runs.
        """
        while self._keeps_parts and not self.is_superseded:
            if self._writing is None:
                has_news = self._values or self._batch.dead or self._batch.ended > self._written_ended
                if self._unwritten is None and not has_news:
                    break
                self._begin()
            if self._writing is not None:
                await asyncio.wait({self._writing})
                await asyncio.sleep(0)  # its callback is called before we go on
            if self._unwritten is not None and self._keeps_parts:
                await asyncio.sleep(_AGAIN_S)
        self.raise_if_over()

    def raise_if_over(self) -> None:
        """Raise what makes going on senseless, if anything does."""
        if self.fatal is not None:
            raise self.fatal
        if self.is_superseded:
            raise asyncio.CancelledError

    def _begin(self) -> None:
        self._writing = asyncio.ensure_future(self._write())
        self._writing.add_done_callback(self._written)

    def _written(self, done: asyncio.Task[None]) -> None:
        self._writing = None
        if not done.cancelled() and (error := done.exception()) is not None:
            self.fatal, self._keeps_parts = error, False
        self._on_news()

    async def _write(self) -> None:
        snapshot = self._unwritten = self._unwritten or self._snapshot()
        order = self._order
        try:
            was_taken = await self._session.checkpoint(order.job_id, order.execution_id, snapshot.checkpoint, snapshot.parts)
        except LimitExceededError:  # of the engine's memory
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
                self.is_superseded = True
            for part in snapshot.parts:
                self._n_parts[part.stream] = part.seq + 1
            self._sequence = snapshot.checkpoint.sequence
        self._unwritten = None
        self._written_at = self._clock.monotonic()

    def _snapshot(self) -> _Snapshot:
        batch = self._batch
        values, self._values, self._pending_bytes = self._values, [], 0
        dead, batch.dead = batch.dead, []
        parts = [
            *self._parts(VALUES, produce.in_arrays((body[1:-1], n) for body, n in values)),
            *self._parts(FAILED, produce.dead_as_array(dead, self._name)),
        ]
        self._written_ended, self._written_losses = batch.ended, batch.n_losses
        checkpoint = Checkpoint(
            self._sequence + 1, self._body(), self._total(), batch.processed, batch.skipped, batch.failed, self._clock.now()
        )
        return _Snapshot(checkpoint, parts)

    def _parts(self, stream: str, bodies: list[tuple[bytes, int]]) -> Iterator[Part]:
        for seq, (body, n) in enumerate(bodies, start=self._n_parts[stream]):
            yield Part(self._order.job_id, stream, seq, body, n)

    def _body(self) -> bytes:
        batch, standing = self._batch, self._standing()
        if (cursor := standing.get("cursor")) is not None:
            standing["cursor"] = [cursor[0], tagged(cursor[1])]
        state = {
            "v": 1,
            "done": [list(pair) for pair in batch.done],
            "attempts": {str(index): n for index, n in batch.attempts.items()},
            "suspects": batch.suspicions(),
            "reasons": batch.reasons,
            "n_values": self.n_values,
            "failed_of": self._resumed.failed_of,
            "job": self._order.job_id,
            "forgiven": batch.forgiven,
            **standing,
        }
        body = json.dumps(state, separators=(",", ":")).encode()
        if len(body) > MAX_CHECKPOINT:  # these can be spared; how many ranges there are is limited by `Batch.has_room`
            body = json.dumps({**state, "reasons": {}, "attempts": {}, "suspects": []}, separators=(",", ":")).encode()
        return body

    # --- values, from the beginning ----------------------------------------------------------------------------------

    async def fetch(self) -> None:
        """Read the values that are kept, all at once; for who cannot block while iterating."""
        self._pages = [part async for part in self._kept(VALUES, self._order.job_id)]

    async def dead_of(self, job_id: str) -> list[int]:
        """Return the indexes of the dead items of a job."""
        rows = [row async for part in self._kept(FAILED, job_id) for row in json.loads(part.body)]
        return sorted({row["index"] for row in rows})

    async def _kept(self, stream: str, job_id: str) -> AsyncIterator[Part]:
        after = -1
        while page := await self._session.parts(job_id, stream, after, _PAGE):
            for part in page:
                yield part
            after = page[-1].seq

    def values(self, *, ordered: bool) -> Iterator[Any]:
        """Iterate over all values, page by page; blocks while a page is read."""
        if ordered:
            yield from map(revived, produce.in_order(json.loads(body) for body in self._arrays()))
        else:
            for body in self._arrays():
                yield from loose.decoded(body)

    def _arrays(self) -> Iterator[bytes]:
        n_parts, after = self._n_parts[VALUES], -1
        for part in self._pages:
            yield part.body
            after = part.seq
        while after + 1 < n_parts:
            page = self._session.parts(self._order.job_id, VALUES, after, _PAGE).get()
            if not page:
                raise RecordCorruptError(self._order.job_id, "values", f"part {after + 1} of {n_parts} is missing")
            for part in page:
                yield part.body
            after = page[-1].seq
        for place in range(len(self._spool)):
            yield self._spool.body(place)
        for body, _ in self._values:
            yield body
