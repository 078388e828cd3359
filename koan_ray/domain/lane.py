"""Which queued job may run next.

A lane holds the due jobs of one actor spec. Deeper jobs go first: a child before the next root, so that few parents are
parked at a time and trees finish instead of spreading; within a depth it is first come, first served. A job goes back to
the head when it was returned unbegun. Jobs that are not due yet wait in `DueTimes`.
"""

from __future__ import annotations

import heapq
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from koan_ray.domain.records import ActorSpec


_WORTH_COMPACTING = 1000


class Lane:
    """The due jobs of one actor spec, deepest first, then oldest first.

    Cancelled jobs are not searched for: whoever takes an id checks that the job is still queued. `dropped` counts them and
    removes them once they are the larger part, so that churn cannot fill the lane.

    A job that must be alone in its process waits beside the others, so that it holds nobody up: `set_aside`.
    """

    __slots__ = ("_aside", "_by_depth", "_depths", "_dropped", "_size", "spec", "waiting_since")

    def __init__(self, spec: ActorSpec) -> None:
        self.spec = spec
        self.waiting_since: float | None = None  # when jobs began to wait with no actor to go to
        self._by_depth: dict[int, deque[str]] = {}
        self._depths: list[int] = []  # negated, a heap
        self._aside: tuple[deque[str], deque[str]] = deque(), deque()  # any process will do; it must be a new one
        self._size = 0  # of all but those aside
        self._dropped = 0

    def __len__(self) -> int:
        return self._size + self.n_aside

    @property
    def n_aside(self) -> int:
        """How many jobs wait to be alone in a process."""
        return len(self._aside[0]) + len(self._aside[1])

    def n_aside_of(self, *, is_new: bool) -> int:
        """How many of them wait for a process in which nothing has run before, or for any."""
        return len(self._aside[is_new])

    @property
    def deepest(self) -> int:
        """The depth of the job that is next; 0 if there is none."""
        return -self._depths[0] if self._depths else 0

    def dropped(self, is_queued: Callable[[str], bool]) -> None:
        """Count a job that left the queue by another way, and remove such jobs once they are the larger part."""
        self._dropped += 1
        if self._dropped <= _WORTH_COMPACTING or self._dropped * 2 <= self._size:
            return
        for depth, queue in self._by_depth.items():
            self._by_depth[depth] = deque(job_id for job_id in queue if is_queued(job_id))
        for aside in self._aside:
            queued = [job_id for job_id in aside if is_queued(job_id)]
            aside.clear()
            aside.extend(queued)
        self._size = sum(map(len, self._by_depth.values()))
        self._dropped = 0

    def has_queued(self, is_queued: Callable[[str], bool]) -> bool:
        """Tell whether a job is left that did not leave the queue by another way; forgets those before it."""
        for aside in self._aside:
            while aside and not is_queued(aside[0]):
                aside.popleft()
                self._dropped = max(0, self._dropped - 1)
            if aside:
                return True
        while self._depths:
            queue = self._by_depth[-self._depths[0]]
            while queue and not is_queued(queue[0]):
                queue.popleft()
                self._size -= 1
                self._dropped = max(0, self._dropped - 1)
            if queue:
                return True
            self._forget(-self._depths[0])
        return False

    def heads(self) -> list[str]:
        """Return the job that is next at each depth; it may have left the queue by another way."""
        return [queue[0] for queue in (*self._by_depth.values(), *self._aside) if queue]

    def push(self, job_id: str, depth: int) -> None:
        """Add a job at the tail of its depth."""
        self._at(depth).append(job_id)
        self._size += 1

    def push_front(self, job_id: str, depth: int) -> None:
        """Put a job back at the head of its depth."""
        self._at(depth).appendleft(job_id)
        self._size += 1

    def set_aside(self, job_id: str, *, is_new: bool) -> None:
        """Let a job wait for a process that has nothing else; ``is_new``: and never had."""
        self._aside[is_new].append(job_id)

    def take_aside(self, *, is_new: bool) -> str:
        """Take out the job that has waited longest for a process of its own."""
        return self._aside[is_new].popleft()

    def take(self, most: int) -> Iterator[str]:
        """Yield up to ``most`` job ids in order, removing each as it is yielded; none of those that are aside."""
        while most > 0 and self._depths:
            depth = -self._depths[0]
            queue = self._by_depth[depth]
            while queue and most > 0:
                self._size -= 1
                most -= 1
                yield queue.popleft()
                if self._depths and -self._depths[0] != depth:
                    break  # a deeper job arrived while the consumer worked
            if not queue:
                self._forget(depth)

    def _at(self, depth: int) -> deque[str]:
        queue = self._by_depth.get(depth)
        if queue is None:
            queue = self._by_depth[depth] = deque()
            heapq.heappush(self._depths, -depth)
        return queue

    def _forget(self, depth: int) -> None:
        if depth in self._by_depth and not self._by_depth[depth]:
            del self._by_depth[depth]
            self._depths.remove(-depth)
            heapq.heapify(self._depths)


class DueTimes:
    """Jobs that wait for their time: each until an instant by the wall clock, or until it has waited for a span.

    Whichever comes first, because either alone fails when the wall clock is set: forward, as after a laptop's sleep or the
    correction of a clock that started wrong, what is overdue by the wall begins at once; back, a wait of two seconds ends
    after two seconds and not after an hour. Back and right again changes nothing, for the span was counted all the while.

    An entry is only a hint: ``is_waiting(due_at, job_id)``, asked with each, says whether it is the job's own still.
    """

    __slots__ = ("_by_span", "_by_wall", "_n_stale")

    def __init__(self) -> None:
        self._by_wall: list[tuple[float, str]] = []
        self._by_span: list[tuple[float, float, str]] = []  # monotonic end of the wait, due time, id
        self._n_stale = 0  # of ``_by_wall``, about

    def __len__(self) -> int:
        return max(0, len(self._by_wall) - self._n_stale)

    def push(self, due_at: float, job_id: str, *, ends_at: float) -> None:
        """Remember that ``job_id`` is due at ``due_at``, and has waited for long enough at monotonic time ``ends_at``."""
        heapq.heappush(self._by_wall, (due_at, job_id))
        heapq.heappush(self._by_span, (ends_at, due_at, job_id))

    def dropped(self, is_waiting: Callable[[float, str], bool]) -> None:
        """Count an entry that lost its meaning, and remove such entries once they are the larger part."""
        self._n_stale += 1
        self._compact(is_waiting)

    def next_in(self, now: float, monotonic: float) -> float | None:
        """Return the seconds until the first wait ends, if no clock is set meanwhile; 0 for one that is over."""
        if not self._by_wall or not self._by_span:
            return None
        return max(0.0, min(self._by_wall[0][0] - now, self._by_span[0][0] - monotonic))

    def take_due(self, now: float, monotonic: float, is_waiting: Callable[[float, str], bool]) -> Iterator[str]:
        """Yield and forget the jobs whose wait is over, those that are due by the wall clock first.

        A job that is yielded must not count as waiting for the same instant any more when the next one is asked for.
        """
        by_wall, by_span = self._by_wall, self._by_span
        while by_wall and by_wall[0][0] <= now:
            due_at, job_id = heapq.heappop(by_wall)
            if is_waiting(due_at, job_id):
                yield job_id
            elif self._n_stale:
                self._n_stale -= 1
        while by_span and by_span[0][0] <= monotonic:
            _, due_at, job_id = heapq.heappop(by_span)
            if is_waiting(due_at, job_id):
                self._n_stale += 1
                yield job_id
        self._compact(is_waiting)

    def _compact(self, is_waiting: Callable[[float, str], bool]) -> None:
        """Remove what has lost its meaning where that is the larger part; a wait that is over leaves its other entry."""
        n = len(self)
        if self._n_stale > _WORTH_COMPACTING and self._n_stale > n:
            self._by_wall = [entry for entry in self._by_wall if is_waiting(*entry)]
            heapq.heapify(self._by_wall)
            self._n_stale, n = 0, len(self._by_wall)
        if len(self._by_span) - n > max(n, _WORTH_COMPACTING):
            self._by_span = [entry for entry in self._by_span if is_waiting(*entry[1:])]
            heapq.heapify(self._by_span)
