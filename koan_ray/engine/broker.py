"""Fans progress out to those who watch: keeps the latest state of each job, forgets what is between.

Lossy on the way, exact at the end: a watcher learns a job's end from the coordinator, so the broker holds no truth and may
be killed at any time. Job actors tell the states of running bodies again every two seconds, and a session that meets a
broker of another epoch registers anew.

Bounded: `max_tracked` jobs are remembered, the one that was silent longest is forgotten first; a session has at most one
undelivered state for each job it watches; sessions that do not call for a minute are forgotten.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

from koan_ray.domain.measures import Measures
from koan_ray.engine.feed import Feed
from koan_ray.engine.parking import Caller
from koan_ray.engine.tasks import Failures
from koan_ray.errors import LimitExceededError
from koan_ray.ports import Silence

if TYPE_CHECKING:
    from collections.abc import Sequence

    from koan_ray.domain.measures import Key
    from koan_ray.domain.records import Progress
    from koan_ray.engine.feed import News
    from koan_ray.engine.settings import EngineSettings
    from koan_ray.ports import Clock, Log

_FORGET_AFTER_S = 60.0
_FEED_LIMIT = 500  # jobs of one answer to those who watch all


class States(NamedTuple):
    """The answer to a poll: the newest state of each job that has one the session has not seen."""

    epoch: str
    states: list[tuple[str, Progress]]


class _Session(Caller):
    __slots__ = ("unseen", "watched")

    def __init__(self) -> None:
        super().__init__()
        self.watched: set[str] = set()
        self.unseen: dict[str, Progress] = {}


class Broker:
    """Latest progress by job, and who wants to know. All methods run on one event loop."""

    def __init__(self, settings: EngineSettings, clock: Clock, epoch: str, log: Log | None = None) -> None:
        self.epoch = epoch
        self.failures = Failures(log if log is not None else Silence())
        self._clock = clock
        self._max_tracked, self._max_sessions = settings.max_tracked, settings.max_watchers
        self._latest: OrderedDict[str, Progress] = OrderedDict()
        self._sessions: dict[str, _Session] = {}
        self._by_job: dict[str, set[_Session]] = {}
        self.n_forgotten = 0
        self.n_replaced = 0  # states that a watcher has not seen, because a newer one came first
        self.n_evicted = 0  # sessions that did not call
        self._feed: Feed[Progress] = Feed(clock, epoch, _FEED_LIMIT)  # for those who watch all jobs

    async def push(self, states: Sequence[tuple[str, Progress]]) -> None:
        """Take note of newer states; older ones than known are ignored."""
        if self._feed.is_heard:
            self._feed.note(states)
        for job_id, progress in states:
            known = self._latest.get(job_id)
            if known is not None and known.sequence >= progress.sequence:
                continue
            self._latest[job_id] = progress
            self._latest.move_to_end(job_id)
            for session in self._by_job.get(job_id, ()):
                self.n_replaced += job_id in session.unseen
                session.unseen[job_id] = progress
                session.wake()
        while len(self._latest) > self._max_tracked:
            self._latest.popitem(last=False)
            self.n_forgotten += 1

    async def poll(
        self, session_id: str, epoch: str | None, watch: Sequence[str], unwatch: Sequence[str], park_s: float
    ) -> States:
        """Watch and unwatch jobs, and return what the session has not seen, waiting up to ``park_s`` for something.

        Parking a newer call answers the older one. A session that names another ``epoch`` is answered at once.

        Raises:
            LimitExceededError: Too many sessions, or too many jobs for this one; nothing was added.
        """
        if epoch is not None and epoch != self.epoch:
            return States(self.epoch, [])
        session = self._session(session_id, len(watch))
        for job_id in unwatch:
            self._unwatch(session, job_id)
        for job_id in watch:
            session.watched.add(job_id)
            self._by_job.setdefault(job_id, set()).add(session)
            if (known := self._latest.get(job_id)) is not None:
                session.unseen[job_id] = known
        session.wake()
        if not session.unseen and park_s > 0:
            await session.park(self._clock, park_s)
        session.seen_at = self._clock.monotonic()
        unseen, session.unseen = session.unseen, {}
        return States(self.epoch, list(unseen.items()))

    async def news(self, listener_id: str, epoch: str | None, park_s: float) -> News[Progress]:
        """Return the newest state of every job that has one since this listener asked last; see `koan_ray.engine.feed`."""
        return await self._feed.news(listener_id, epoch, park_s)

    async def latest(self, job_ids: Sequence[str]) -> list[tuple[str, Progress]]:
        """Return the latest known state of these jobs; nothing for a job that has none."""
        return [(job_id, self._latest[job_id]) for job_id in job_ids if job_id in self._latest]

    async def measure(self) -> Measures:
        """Return the counters of this broker."""
        dropped, evicted = self.n_forgotten + self.n_replaced, self.n_evicted
        counters: dict[Key, float] = {("progress_dropped", ()): dropped, ("readers_evicted", ()): evicted}
        counters |= {("unexpected_failures", (where,)): n for where, n in self.failures.counts.items()}
        return Measures(counters, {}, {})

    def _session(self, session_id: str, n_more: int) -> _Session:
        now = self._clock.monotonic()
        session = self._sessions.get(session_id)
        if session is None:
            if len(self._sessions) >= self._max_sessions:
                self._forget_silent(now)
            if len(self._sessions) >= self._max_sessions:
                raise LimitExceededError(
                    "sessions watching progress", len(self._sessions) + 1, self._max_sessions, "engine.max_watchers"
                )
            session = self._sessions[session_id] = _Session()
        if len(session.watched) + n_more > self._max_tracked:
            raise LimitExceededError(
                "jobs one session watches", len(session.watched) + n_more, self._max_tracked, "engine.max_tracked"
            )
        session.seen_at = now
        return session

    def _unwatch(self, session: _Session, job_id: str) -> None:
        session.watched.discard(job_id)
        session.unseen.pop(job_id, None)
        if (watchers := self._by_job.get(job_id)) is not None:
            watchers.discard(session)
            if not watchers:
                del self._by_job[job_id]

    def _forget_silent(self, now: float) -> None:
        for session_id, session in list(self._sessions.items()):
            if not session.is_parked and now - session.seen_at > _FORGET_AFTER_S:
                for job_id in list(session.watched):
                    self._unwatch(session, job_id)
                del self._sessions[session_id]
                self.n_evicted += 1
