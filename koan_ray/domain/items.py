"""Which items of a batch have ended, which run, which wait, and what goes to an actor next.

::

                    offer                 take                    reported
    source items ─────────► FRESH ─────────────────► IN A CHUNK ────────────────► ENDED: processed, skipped, failed
                              ▲                       │   │   │
                              └── not begun ──────────┘   │   └── failed, attempts left ──► WAITING ── due ──► take
                                                          └── its process vanished ──► SUSPECT, in smaller chunks ──► take

Every item is in exactly one of these places, and it leaves the last one never. A chunk is known by its number; what is
reported for a number that is not out (late, or twice) changes nothing, so no item ends twice.

Ended items are kept as ranges, because items are taken in order and end nearly in order: the ledger of ten million items
is as large as what is out of order. What could make it larger is limited, see `Batch.has_room`.
"""

from __future__ import annotations

import heapq
import math
import re
from bisect import bisect_left, bisect_right
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from koan_ray.domain.records import ErrorInfo
from koan_ray.domain.retry import RetryPolicy, RetryStrategy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

# What became of an item of a chunk, one byte each.
RETURNED, PROCESSED, PRODUCED, SKIPPED, RETRY, FAILED = range(6)
_NOT_BEGUN = re.compile(b"\x00+")
_ENDED = re.compile(b"[^\x00\x04]+")

_MAX_WAITING = 2_000  # items that wait for their next attempt; more are not begun before some of them have ended
_MAX_RANGES = 4_000  # of ended items; a checkpoint must hold them
_PIECES = 8  # that a chunk is cut into when its process vanished
_ALONE = 2  # times that an item must have been alone in a process that vanished before it is held to be the cause
_GROWTH = 32  # from one size of chunks to the next
_RAMP = 4  # a chunk should take a quarter of the time that the job has run, within bounds
_WORTH_S = 0.02  # work that is worth a chunk of its own, whose way takes some milliseconds
_SURE_AFTER = 100  # items that must have ended before a share of failed ones says something


class Ranges:
    """A set of whole numbers as sorted, disjoint, half-open ranges that do not touch."""

    __slots__ = ("_ends", "_starts")

    def __init__(self, ranges: Iterable[Sequence[int]] = ()) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        for start, end in ranges:
            self.add(start, end)

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._starts, self._ends, strict=True)

    def __contains__(self, number: int) -> bool:
        place = bisect_right(self._starts, number) - 1
        return place >= 0 and number < self._ends[place]

    @property
    def size(self) -> int:
        """How many numbers are in it."""
        return sum(self._ends) - sum(self._starts)

    @property
    def mark(self) -> int:
        """The first number from 0 that is not in it."""
        return self._ends[0] if self._starts and self._starts[0] == 0 else 0

    @property
    def end(self) -> int:
        """One more than the last number in it."""
        return self._ends[-1] if self._ends else 0

    def add(self, start: int, end: int) -> None:
        """Put the numbers of [start, end) into it."""
        if start >= end:
            return
        starts, ends = self._starts, self._ends
        if ends and ends[-1] == start:  # the usual case: items end nearly in order
            ends[-1] = end
            return
        first = bisect_left(ends, start)  # ranges before it end before `start`
        last = bisect_right(starts, end)  # ranges from it on begin after `end`
        if first < last:
            start, end = min(start, starts[first]), max(end, ends[last - 1])
        starts[first:last] = [start]
        ends[first:last] = [end]

    def gaps(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the ranges of [start, end) that are not in it."""
        place = bisect_right(self._ends, start)
        while start < end and place < len(self._starts):
            if start < self._starts[place]:
                yield start, min(end, self._starts[place])
            start = self._ends[place]
            place += 1
        if start < end:
            yield start, end


class Failure(NamedTuple):
    """Why an item of a chunk failed; ``place`` counts from the first item of the chunk."""

    place: int
    error: ErrorInfo
    shown: bytes  # the item for people, as JSON

    @property
    def size(self) -> int:
        """About how many bytes it takes."""
        return len(self.shown) + len(self.error.message) + len(self.error.stack_trace) + 100


class Outcomes(NamedTuple):
    """What an actor says of a chunk.

    Shape: ``codes`` has a byte for each item; ``values`` are JSON arrays, each with its length, of the values of the items
    whose code is ``PRODUCED``, in their order; ``failures`` has an entry for each ``RETRY`` and ``FAILED``.
    """

    codes: bytes
    values: tuple[tuple[bytes, int], ...]
    failures: tuple[Failure, ...]
    reasons: tuple[tuple[str, int], ...]  # why items were skipped, and how many
    duration_s: float


class DeadItem(NamedTuple):
    """An item that has failed for good."""

    place: int  # among all items, from 0
    shown: bytes  # JSON
    error: ErrorInfo
    attempts: int


class Suspicion(NamedTuple):
    """Processes have vanished with these items inside."""

    start: int
    end: int  # one more than the last
    losses: int
    alone: int  # of them, those in which there was nothing else


class Chunk:
    """Items on their way to an actor together."""

    __slots__ = ("alone", "indexes", "items", "losses", "number")

    def __init__(self, indexes: Sequence[int], items: list[Any], *, losses: int = 0, alone: int = 0) -> None:
        self.indexes, self.items = indexes, items
        self.losses = losses  # processes that vanished with these items inside
        self.alone = alone  # of them, those in which there was nothing else
        self.number = 0

    @property
    def crashes(self) -> int:
        """What the engine must know of the losses: 0 none, 1 be alone in your process, 2 in one that is new.

        New, because what an item leaves behind may end the process in which another is alone: a process is evidence enough
        to end an item only if nothing but this item has ever been in it.
        """
        return 1 + self.alone if self.losses else 0

    def __len__(self) -> int:
        return len(self.items)

    def part(self, start: int, end: int) -> Chunk:
        """Return some of the items as a chunk of their own."""
        return Chunk(self.indexes[start:end], self.items[start:end], losses=self.losses, alone=self.alone)


class Limit(NamedTuple):
    """How many items may fail before the whole job does: a count, or a share of all items."""

    most: int | None = None
    share: float | None = None

    def is_exceeded(self, failed: int, ended: int, total: int | None) -> bool:
        """Tell whether more items have failed than may."""
        if self.most is not None:
            return failed > self.most
        if self.share is None or failed == 0:
            return False
        if total is None and ended < _SURE_AFTER:
            return False
        return failed > self.share * max(ended, total or 0)


class Sizer:
    """How many items make a chunk: as many as take `target_s`, by a moving average of the time that an item takes.

    The target is short at first, so that a short job is shared out well, and grows to ``longest_s`` in a job that goes on,
    because each chunk costs its way. The number of items grows from ``least``, at each step to `_GROWTH` times what was
    proven, so that nothing long is begun by a guess. Near the end of the items chunks get smaller, so that all actors end at
    about the same time, but not smaller than is worth their way.
    """

    __slots__ = ("_fixed", "_least", "_longest_s", "_n", "_proven", "_shortest_s", "_spent_s", "_taken_s")

    def __init__(self, shortest_s: float, longest_s: float, *, fixed: int | None = None, least: int = 1) -> None:
        self._shortest_s, self._longest_s, self._fixed, self._least = shortest_s, longest_s, fixed, least
        self._spent_s = 0.0  # in all chunks
        self._taken_s = 0.0
        self._n = 0.0
        self._proven = 0

    @property
    def item_s(self) -> float | None:
        """How long an item takes; None before any has ended."""
        return self._taken_s / self._n if self._n else None

    def ended(self, n: int, duration_s: float) -> None:
        """Learn from a chunk in which ``n`` items ended."""
        if n > 0:
            self._spent_s += duration_s
            self._taken_s = self._taken_s * 0.8 + max(duration_s, 1e-7)
            self._n = self._n * 0.8 + n
            self._proven = max(self._proven, n)

    def target_s(self, workers: int) -> float:
        """Return how long a chunk should take."""
        return max(self._shortest_s, min(self._longest_s, self._spent_s / workers / _RAMP))

    def size(self, left: int | None, workers: int) -> int:
        """Return how many items the next chunk should have, at least 1.

        ``left``: items that are not taken yet, None while that is not known.
        """
        if self._fixed is not None:
            return self._fixed
        item_s = self.item_s
        size = self._least
        if item_s is not None:
            size = max(size, int(min(self.target_s(workers) / item_s, max(size, self._proven * _GROWTH))))
        if left is not None:
            worth = int(_WORTH_S / item_s) if item_s is not None else 1
            size = min(size, max(self._least, worth, math.ceil(left / (2 * workers))))
        return max(1, size)


class Batch:
    """All items of a job from the first to the last, and the record of how they ended.

    Args:
        retry: When a failed item is tried again.
        limit: How many may fail.
        max_losses: Processes that may vanish with an item before it is held to be the cause.
        random: For the jitter of waits.
        done: Items that have ended before, by an earlier execution of the job.
    """

    def __init__(
        self, retry: RetryPolicy, *, limit: Limit, max_losses: int, random: Callable[[], float],
        done: Ranges | None = None,
    ) -> None:  # fmt: skip
        self._retry, self._limit, self._max_losses, self._random = retry, limit, max_losses, random
        self.done = done if done is not None else Ranges()
        self.processed = self.skipped = self.failed = 0
        self.forgiven = 0  # of the failed ones, those of an earlier job that this one goes on from
        self.reasons: dict[str, int] = {}  # of skipped items
        self.attempts: dict[int, int] = {}  # failed ones, of items that have not ended
        self.seen = 0  # items that the source has given, from the first
        self.is_complete = False  # the source has no more
        self.dead: list[DeadItem] = []  # that have ended since they were last taken from here
        self._fresh: deque[Chunk] = deque()
        self._n_fresh = 0
        self._suspects: deque[Chunk] = deque()
        self._waiting: list[tuple[float, int, Any]] = []  # due, index, item: a heap
        self._lost: dict[int, tuple[int, int]] = {}  # losses, and of them alone, of items that wait
        self._suspicions: list[Suspicion] = []  # of an earlier execution, of items that the source has yet to give
        self.n_losses = 0  # processes that have vanished with a chunk
        self.out: dict[int, Chunk] = {}
        self._n_taken = 0

    # --- counts ----------------------------------------------------------------------------------------------------

    @property
    def ended(self) -> int:
        """Items that have ended, whichever way."""
        return self.processed + self.skipped + self.failed

    @property
    def total(self) -> int | None:
        """How many items there are; None before the source has given the last one."""
        return self.seen if self.is_complete else None

    @property
    def is_over(self) -> bool:
        """Every item has ended."""
        return self.is_complete and not (self._fresh or self._suspects or self._waiting or self.out)

    @property
    def is_failing(self) -> bool:
        """More items have failed than may."""
        return self._limit.is_exceeded(self.failed - self.forgiven, self.ended, self.total)

    @property
    def n_fresh(self) -> int:
        """Items that the source has given and no actor has been sent."""
        return self._n_fresh

    @property
    def n_waiting(self) -> int:
        """Items that wait for their next attempt."""
        return len(self._waiting)

    @property
    def has_room(self) -> bool:
        """Fresh items may be begun; not while too many wait, or too many gaps are between those that have ended."""
        return len(self._waiting) < _MAX_WAITING and len(self.done) < _MAX_RANGES

    def next_due(self) -> float | None:
        """Return when the next waiting item may run."""
        return self._waiting[0][0] if self._waiting else None

    # --- from the source -------------------------------------------------------------------------------------------

    def offer(self, start: int, items: list[Any]) -> None:
        """Take in items of the source, from the index ``start`` on; those that have ended are passed over."""
        end = start + len(items)
        self.seen = max(self.seen, end)
        for first, last in self.done.gaps(start, end):
            for begin, stop, losses, alone in self._known_of(first, last):
                chunk = Chunk(range(begin, stop), items[begin - start : stop - start], losses=losses, alone=alone)
                if losses:
                    self._suspects.append(chunk)
                else:
                    self._add_fresh(chunk)

    def _known_of(self, first: int, last: int) -> Iterator[Suspicion]:
        """Yield the ranges of [first, last), each with its losses, which are forgotten here: the chunks have them."""
        while self._suspicions and self._suspicions[0].start < last:
            known = heapq.heappop(self._suspicions)
            if known.end > last:
                heapq.heappush(self._suspicions, known._replace(start=last))
            start, end = max(known.start, first), min(known.end, last)
            if start < end:
                if first < start:
                    yield Suspicion(first, start, 0, 0)
                yield known._replace(start=start, end=end)
                first = end
        if first < last:
            yield Suspicion(first, last, 0, 0)

    def _add_fresh(self, chunk: Chunk) -> None:
        last = self._fresh[-1] if self._fresh else None
        if last is not None and isinstance(last.indexes, range) and last.indexes.stop == chunk.indexes[0]:
            last.items += chunk.items
            last.indexes = range(last.indexes.start, last.indexes.start + len(last.items))
        else:
            self._fresh.append(chunk)
        self._n_fresh += len(chunk)

    # --- to actors and back ----------------------------------------------------------------------------------------

    def take(self, size: int, now: float) -> Chunk | None:
        """Return the next chunk, of at most ``size`` items; None when nothing may run now.

        Suspects go first and as they were cut, then items whose wait is over, each suspect for itself, then fresh ones.
        """
        chunk = self._suspects.popleft() if self._suspects else self._take_due(size, now) or self._take_fresh(size)
        if chunk is not None:
            self._n_taken += 1
            chunk.number = self._n_taken
            self.out[chunk.number] = chunk
        return chunk

    def _take_due(self, size: int, now: float) -> Chunk | None:
        due: list[tuple[float, int, Any]] = []
        while self._waiting and self._waiting[0][0] <= now and len(due) < size:
            if self._waiting[0][1] in self._lost:
                if due:
                    break
                _, index, item = heapq.heappop(self._waiting)
                losses, alone = self._lost.pop(index)
                return Chunk([index], [item], losses=losses, alone=alone)
            due.append(heapq.heappop(self._waiting))
        return Chunk([index for _, index, _ in due], [item for _, _, item in due]) if due else None

    def _take_fresh(self, size: int) -> Chunk | None:
        if not self._fresh or not self.has_room:
            return None
        first = self._fresh[0]
        if len(first) <= size:
            self._fresh.popleft()
        else:
            self._fresh[0] = first.part(size, len(first))
            first = first.part(0, size)
        self._n_fresh -= len(first)
        return first

    def give_back(self, number: int, keep: int = 0) -> None:
        """Nothing of a chunk was begun: its items, after the first ``keep``, are to be taken again."""
        if keep:
            chunk = self.out[number]
            rest = chunk.part(keep, len(chunk))
            chunk.items, chunk.indexes = chunk.items[:keep], chunk.indexes[:keep]
        elif (found := self.out.pop(number, None)) is not None:
            rest = found
        else:
            return
        if rest.losses:
            self._suspects.appendleft(rest)
        else:
            self._fresh.appendleft(rest)
            self._n_fresh += len(rest)

    def refuse(self, number: int, place: int, error: ErrorInfo, shown: bytes) -> None:
        """End an item of a chunk as dead before it is sent, and take it out of the chunk."""
        chunk = self.out[number]
        index = chunk.indexes[place]
        chunk.items = chunk.items[:place] + chunk.items[place + 1 :]
        chunk.indexes = [*chunk.indexes[:place], *chunk.indexes[place + 1 :]]
        self._bury(index, shown, error, self.attempts.pop(index, 0))
        if not chunk.items:
            del self.out[number]

    def reported(self, number: int, outcomes: Outcomes, now: float) -> Chunk | None:
        """Take note of what became of a chunk; None, changing nothing, if it is not out."""
        chunk = self.out.pop(number, None)
        if chunk is None:
            return None
        codes = outcomes.codes
        self.processed += codes.count(PROCESSED) + codes.count(PRODUCED)
        self.skipped += codes.count(SKIPPED)
        for reason, n in outcomes.reasons:
            if reason in self.reasons or len(self.reasons) < _SURE_AFTER:
                self.reasons[reason] = self.reasons.get(reason, 0) + n
        for failure in outcomes.failures:
            self._failed(chunk, failure, may_retry=codes[failure.place] == RETRY, now=now)
        self._note_ended(chunk, codes)
        for found in _returned(codes):
            rest = chunk.part(*found)
            (self._suspects if rest.losses else self._fresh).appendleft(rest)
            self._n_fresh += 0 if rest.losses else len(rest)
        return chunk

    def _note_ended(self, chunk: Chunk, codes: bytes) -> None:
        if isinstance(chunk.indexes, range):
            first = chunk.indexes[0]
            for run in _ENDED.finditer(codes):
                self.done.add(first + run.start(), first + run.end())
        else:
            for index, code in zip(chunk.indexes, codes, strict=True):
                if code not in (RETURNED, RETRY):
                    self.done.add(index, index + 1)
        if self.attempts:
            for index in chunk.indexes:
                if index in self.attempts and index in self.done:
                    del self.attempts[index]

    def _failed(self, chunk: Chunk, failure: Failure, *, may_retry: bool, now: float) -> None:
        index = chunk.indexes[failure.place]
        attempts = self.attempts.get(index, 0) + 1
        policy = self._retry
        if may_retry and attempts < policy.max_attempts and policy.strategy is not RetryStrategy.NONE:
            self.attempts[index] = attempts
            due = now + policy.delay_s(attempts, self._random)
            heapq.heappush(self._waiting, (due, index, chunk.items[failure.place]))
            if chunk.losses:
                self._lost[index] = chunk.losses, chunk.alone
        else:
            self._bury(index, failure.shown, failure.error, attempts)

    def _bury(self, index: int, shown: bytes, error: ErrorInfo, attempts: int) -> None:
        self.failed += 1
        self.done.add(index, index + 1)
        self.dead.append(DeadItem(index, shown, error, attempts))

    def broken(self, number: int, error: ErrorInfo, shown: Callable[[Any], bytes]) -> None:
        """A chunk could not be processed at all, by no fault of its process: find the item that is to blame."""
        chunk = self.out.pop(number, None)
        if chunk is not None and len(chunk) == 1:
            index = chunk.indexes[0]
            self._bury(index, shown(chunk.items[0]), error, self.attempts.pop(index, 0) + 1)
        elif chunk is not None:
            self._cut(chunk)

    def lost(self, number: int, error: ErrorInfo, shown: Callable[[Any], bytes]) -> Chunk | None:
        """The process of a chunk vanished: look for the item that is to blame in smaller chunks, or bury it.

        An item is held to be the cause when ``max_losses`` processes have vanished with it, the last two with nothing else
        inside: neighbours of a poison item, and items that were hit by chance, go on. What was lost before travels alone
        (`Chunk.crashes`), so how many poison items there are makes no difference to another item: to be ended as dead
        without being the cause, it must be hit twice more while it is alone, the second time in a process in which nothing
        else has ever been, so by chance.
        """
        chunk = self.out.pop(number, None)
        if chunk is None:
            return None
        self.n_losses += 1
        was_alone = len(chunk) == 1 and chunk.losses > 0
        chunk.losses += 1
        if was_alone:
            chunk.alone += 1
            if chunk.losses >= self._max_losses and chunk.alone >= min(_ALONE, self._max_losses):
                index = chunk.indexes[0]
                self.attempts.pop(index, None)
                self._bury(index, shown(chunk.items[0]), error, chunk.losses)
                return chunk
        self._cut(chunk)
        return chunk

    def suspicions(self) -> list[Suspicion]:
        """Return the losses of items that have not ended, in the order of the items, for an execution that comes after."""
        found = list(self._suspicions)
        found += [Suspicion(index, index + 1, *lost) for index, lost in self._lost.items()]
        for chunk in (*self._suspects, *self.out.values()):
            if chunk.losses and isinstance(chunk.indexes, range):
                found.append(Suspicion(chunk.indexes.start, chunk.indexes.stop, chunk.losses, chunk.alone))
            elif chunk.losses:
                found += [Suspicion(index, index + 1, chunk.losses, chunk.alone) for index in chunk.indexes]
        return sorted(found)

    def remember(self, suspicions: Iterable[Sequence[int]]) -> None:
        """Let items be as suspect as an earlier execution has left them; before any are offered."""
        self._suspicions = sorted(Suspicion(*each) for each in suspicions)

    def _cut(self, chunk: Chunk) -> None:
        size = math.ceil(len(chunk) / _PIECES)
        for start in reversed(range(0, len(chunk), size)):
            self._suspects.appendleft(chunk.part(start, min(start + size, len(chunk))))


def _returned(codes: bytes) -> list[tuple[int, int]]:
    """Return the places that were not begun as ranges, the last one first: put in front one by one, they are in order."""
    return [found.span() for found in _NOT_BEGUN.finditer(codes)][::-1]
