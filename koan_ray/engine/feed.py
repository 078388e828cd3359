"""All changes of all jobs, for whoever shows lists that keep up: the newest state of each job since the listener asked last.

Lossy by design: what changes twice between two calls is told once, and when more than ``limit`` jobs have changed all of
them are dropped and counted, so that the listener knows to read its list anew. It has to, if one was dropped, and telling it
the rest would cost a busy engine more than it is worth. A listener that does not call for a minute is forgotten, and without
listeners a change costs nothing but a look at `Feed.is_heard`.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from koan_ray.engine.parking import Caller
from koan_ray.errors import LimitExceededError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from koan_ray.ports import Clock

_MAX_LISTENERS = 64
_FORGET_AFTER_S = 60.0

T = TypeVar("T")


class News(NamedTuple, Generic[T]):
    """The answer to a listener: the newest state of each job that has changed, or how many changes were dropped."""

    epoch: str
    changes: list[tuple[str, T]]
    n_lost: int = 0


class _Listener(Caller, Generic[T]):
    __slots__ = ("n_lost", "unseen")

    def __init__(self) -> None:
        super().__init__()
        self.unseen: OrderedDict[str, T] = OrderedDict()
        self.n_lost = 0


class Feed(Generic[T]):
    """Changes on their way to listeners. All methods run on one event loop.

    Args:
        clock: For parking and forgetting.
        epoch: Of whom it tells; a listener that knows another one has missed an unknown number of changes.
        limit: Jobs that a listener may be behind.
    """

    def __init__(self, clock: Clock, epoch: str, limit: int) -> None:
        self._clock, self._epoch, self._limit = clock, epoch, limit
        self._listeners: dict[str, _Listener[T]] = {}

    @property
    def is_heard(self) -> bool:
        """Somebody listens."""
        return bool(self._listeners)

    def note(self, changes: Sequence[tuple[str, T]]) -> None:
        """Take note of changes, the newest of a job last."""
        self._forget_silent()
        for listener in self._listeners.values():
            if listener.n_lost:
                listener.n_lost += len(changes)
                continue
            unseen = listener.unseen
            for job_id, state in changes:
                unseen[job_id] = state
                unseen.move_to_end(job_id)
            if len(unseen) > self._limit:
                listener.n_lost = len(unseen)
                unseen.clear()
            listener.wake()

    async def news(self, listener_id: str, epoch: str | None, park_s: float) -> News[T]:
        """Return what has changed since the last call, waiting up to ``park_s`` for something; the first call begins it.

        Parking a newer call answers the older one. ``park_s`` 0 with a known ``epoch`` of "" ends listening.

        Raises:
            LimitExceededError: Too many listen.
        """
        if epoch == "":
            self._forget(listener_id)
            return News(self._epoch, [])
        is_new = listener_id not in self._listeners
        listener = self._listener(listener_id)
        listener.wake()
        if not listener.unseen and not listener.n_lost and park_s > 0 and not is_new:
            await listener.park(self._clock, park_s)
        listener.seen_at = self._clock.monotonic()
        changes, listener.unseen = list(listener.unseen.items()), OrderedDict()
        n_lost, listener.n_lost = listener.n_lost, 0
        return News(self._epoch, changes, n_lost)

    def _listener(self, listener_id: str) -> _Listener[T]:
        listener = self._listeners.get(listener_id)
        if listener is None:
            self._forget_silent()
            if len(self._listeners) >= _MAX_LISTENERS:
                raise LimitExceededError(
                    "processes that listen to all jobs", len(self._listeners) + 1, _MAX_LISTENERS, "fewer API processes"
                )
            listener = self._listeners[listener_id] = _Listener()
        listener.seen_at = self._clock.monotonic()
        return listener

    def _forget_silent(self) -> None:
        limit = self._clock.monotonic() - _FORGET_AFTER_S
        for listener_id, listener in list(self._listeners.items()):
            if not listener.is_parked and listener.seen_at < limit:
                self._forget(listener_id)

    def _forget(self, listener_id: str) -> None:
        if (listener := self._listeners.pop(listener_id, None)) is not None:
            listener.wake()
