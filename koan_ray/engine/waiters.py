"""Who waits for which jobs to end.

A session is one process that waits: a driver, a task, a job actor. It parks at most one call here and is told all ends
that concern it at once. Parking a newer call answers the older one, so that a session can add jobs at any time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from koan_ray.engine.parking import Caller
from koan_ray.errors import LimitExceededError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from koan_ray.domain.records import End
    from koan_ray.ports import Clock

_FORGET_AFTER_S = 300.0
_MAX_RECENT = 20_000
_MAX_RECENT_BYTES = 32 * 1024 * 1024  # of results
_REPLY_LIMIT = 20_000  # ends in one reply; the rest follows with the next


class _Session(Caller):
    __slots__ = ("ends", "watched")

    def __init__(self) -> None:
        super().__init__()
        self.watched: set[str] = set()
        self.ends: list[End] = []


class Waiters:
    """Ends on their way to the sessions that wait for them."""

    def __init__(self, clock: Clock, *, max_sessions: int, max_watched: int) -> None:
        self.recent = RecentEnds()
        self._clock = clock
        self._max_sessions, self._max_watched = max_sessions, max_watched
        self._sessions: dict[str, _Session] = {}
        self._by_job: dict[str, list[_Session]] = {}
        self._woken: set[_Session] = set()

    @property
    def n_parked(self) -> int:
        """Calls that are parked now."""
        return sum(session.is_parked for session in self._sessions.values())

    def watch(self, session_id: str, job_ids: Sequence[str]) -> None:
        """Have the session told when these jobs end.

        Raises:
            LimitExceededError: Too many sessions, or too many jobs for one of them; nothing was added.
        """
        session = self._sessions.get(session_id)
        if session is None:
            if len(self._sessions) >= self._max_sessions:
                raise LimitExceededError(
                    "sessions waiting for jobs", len(self._sessions) + 1, self._max_sessions, "engine.max_sessions"
                )
            session = self._sessions[session_id] = _Session()
        if len(session.watched) + len(job_ids) > self._max_watched:
            raise LimitExceededError(
                "jobs one session waits for", len(session.watched) + len(job_ids), self._max_watched,
                "engine.max_watched",
            )  # fmt: skip
        session.seen_at = self._clock.monotonic()
        for job_id in job_ids:
            if job_id not in session.watched:
                session.watched.add(job_id)
                self._by_job.setdefault(job_id, []).append(session)

    def tell(self, session_id: str, end: End) -> None:
        """Tell one session of a job that had ended before it asked."""
        self._sessions[session_id].ends.append(end)

    def ended(self, end: End) -> None:
        """Tell everybody who waits for this job; parked calls are answered at the next `wake`."""
        for session in self._by_job.pop(end.id, ()):
            session.watched.discard(end.id)
            session.ends.append(end)
            self._woken.add(session)

    def is_watched(self, job_id: str) -> bool:
        """Tell whether anybody waits for this job."""
        return job_id in self._by_job

    def wake(self) -> None:
        """Answer the parked calls that have something to say."""
        for session in self._woken:
            session.wake()
        self._woken.clear()

    async def park(self, session_id: str, park_s: float) -> list[End]:
        """Return the session's ends, waiting up to ``park_s`` for the first one."""
        session = self._sessions[session_id]
        session.wake()
        if not session.ends and park_s > 0:
            await session.park(self._clock, park_s)
        ends, session.ends = session.ends[:_REPLY_LIMIT], session.ends[_REPLY_LIMIT:]
        session.seen_at = self._clock.monotonic()
        return ends

    def sweep(self) -> None:
        """Forget sessions that have not called for five minutes; their processes are gone."""
        limit = self._clock.monotonic() - _FORGET_AFTER_S
        for session_id, session in list(self._sessions.items()):
            if not session.is_parked and session.seen_at < limit:
                del self._sessions[session_id]
                for job_id in session.watched:
                    self._by_job[job_id].remove(session)
                    if not self._by_job[job_id]:
                        del self._by_job[job_id]


class RecentEnds:
    """How the documents that were written last ended: whoever asks is mostly about to, and need not wait for the store.

    Bounded in number and in bytes; the oldest go first. An end never changes, so that none can be out of date.
    """

    def __init__(self) -> None:
        self._ends: dict[str, End] = {}
        self._n_bytes = 0

    def get(self, job_id: str) -> End | None:
        """Return the end of a job if it is remembered."""
        return self._ends.get(job_id)

    def add(self, end: End) -> None:
        """Remember an end."""
        if end.id not in self._ends:
            self._ends[end.id] = end
            self._n_bytes += len(end.result or b"")
        while len(self._ends) > _MAX_RECENT or self._n_bytes > _MAX_RECENT_BYTES:
            self.forget(next(iter(self._ends)))

    def forget(self, job_id: str) -> None:
        """A job was removed."""
        end = self._ends.pop(job_id, None)
        self._n_bytes -= len(end.result or b"") if end is not None else 0
