"""The progress of jobs on its way to the watchers of this process.

Three sources, merged by sequence: the job's state when the watch began (from the coordinator), newer states (polled from
the broker, at most one parked call and one newer), and the end (from the coordinator, whatever became of the broker).
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from koan_ray import threads
from koan_ray.domain.records import Progress
from koan_ray.domain.status import JobStatus
from koan_ray.errors import LimitExceededError, RuntimeUnavailableError
from koan_ray.progress import JobProgressUpdate, update_from

if TYPE_CHECKING:
    from collections.abc import Callable

    from koan_ray.domain.records import End, JobView
    from koan_ray.engine.broker import States
    from koan_ray.engine.session import Session

    Deliver = Callable[[JobProgressUpdate | BaseException], None]

_PARK_S = 20.0
_MAX_POLLS = 2
_MAX_WATCHES = 10_000
_RETRY_S = 0.5
_NOTHING = Progress(0, 0.0)


class _Watch:
    """One watcher of one job: lets only newer states through, and the last one once."""

    __slots__ = ("_deliver", "_last", "_lock", "job_id", "over")

    def __init__(self, job_id: str, deliver: Deliver) -> None:
        self.job_id = job_id
        self.over = False
        self._deliver = deliver
        self._last: Progress | None = None
        self._lock = threading.RLock()

    def state(self, progress: Progress, status: JobStatus) -> None:
        with self._lock:
            if self.over or (self._last is not None and progress.sequence <= self._last.sequence):
                return
            self._last = progress
            threads.guarded("progress_not_delivered", self._deliver, update_from(self.job_id, progress, status))

    def end(self, status: JobStatus, progress: Progress | None, at: float | None) -> None:
        with self._lock:
            if self.over:
                return
            self.over = True
            last = max((p for p in (self._last, progress) if p is not None), key=lambda p: p.sequence, default=_NOTHING)
            share = 1.0 if status is JobStatus.COMPLETED else last.percentage
            final = last._replace(sequence=last.sequence + 1, percentage=share, estimated_at=None, updated_at=at or 0.0)
            threads.guarded("progress_not_delivered", self._deliver, update_from(self.job_id, final, status))

    def fail(self, error: BaseException) -> None:
        with self._lock:
            if not self.over:
                self.over = True
                threads.guarded("progress_not_delivered", self._deliver, error)


class Watching:
    """All watches of one session."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._lock = threads.lock()
        self._by_job: dict[str, list[_Watch]] = {}
        self._to_watch: list[str] = []
        self._to_unwatch: list[str] = []
        self._n_polls = 0
        self._epoch: str | None = None
        self._closed = False

    def watch(self, job_id: str, deliver: Deliver) -> Callable[[], None]:
        """Call ``deliver`` with the job's states until its end; returns what ends it sooner."""
        watch = _Watch(job_id, deliver)

        def got(view: JobView | None, error: BaseException | None) -> None:
            if view is None:
                watch.fail(error or RuntimeUnavailableError("no answer"))
                self._drop(watch)
                return
            status = JobStatus(view.status)
            if status.is_final:
                watch.end(status, view.progress, view.completed_at)
                self._drop(watch)
                return
            watch.state(view.progress or _NOTHING._replace(updated_at=view.last_modified), status)
            self._session.on_end(job_id, lambda end: self._ended(watch, end))
            self._poll()

        with self._lock:
            if not self._closed:
                self._add(watch)
        try:
            if self._closed:
                watch.fail(_over())
            else:
                self._session.transport.coordinator("get", (job_id,), got)
        except BaseException:  # an interrupt: nobody has this watch in hand
            self._stop(watch)
            raise
        return lambda: self._stop(watch)

    def _add(self, watch: _Watch) -> None:
        """Keep a watch. Needs the lock."""
        watching = self._by_job.get(watch.job_id)
        if len(self._by_job if watching is None else watching) >= _MAX_WATCHES:
            raise LimitExceededError("jobs watched by this process", len(self._by_job), _MAX_WATCHES, "fewer streams")
        if watching is None:
            watching = self._by_job[watch.job_id] = []
            self._to_watch.append(watch.job_id)
        watching.append(watch)

    def close(self) -> None:
        """End all watches."""
        with self._lock:
            self._closed = True
            watches = [watch for watching in self._by_job.values() for watch in watching]
            self._by_job.clear()
        for watch in watches:
            watch.fail(_over())

    def _stop(self, watch: _Watch) -> None:
        watch.over = True
        self._drop(watch)

    def _drop(self, watch: _Watch) -> None:
        with self._lock:
            watching = self._by_job.get(watch.job_id, [])
            if watch in watching:
                watching.remove(watch)
                if not watching:
                    self._by_job.pop(watch.job_id, None)
                    self._to_unwatch.append(watch.job_id)

    def _ended(self, watch: _Watch, end: End | BaseException) -> None:
        if isinstance(end, BaseException):
            watch.fail(end)
        else:
            watch.end(JobStatus(end.status), end.progress, end.completed_at)
        self._drop(watch)

    def _poll(self) -> None:
        with self._lock:
            if self._closed or not self._by_job:
                return
            if self._n_polls and not (self._to_watch and self._n_polls < _MAX_POLLS):
                return
            self._n_polls += 1
            watch, self._to_watch = [j for j in self._to_watch if j in self._by_job], []
            unwatch, self._to_unwatch = [j for j in self._to_unwatch if j not in self._by_job], []
            args: tuple[Any, ...] = (self._session.id, self._epoch, watch, unwatch, _PARK_S)
        try:
            self._session.transport.broker("poll", args, self._polled)
        except Exception as error:  # noqa: BLE001 - the transport has not taken it
            self._polled(None, error)

    def _polled(self, answer: States | None, error: BaseException | None) -> None:
        with self._lock:
            self._n_polls -= 1
            if answer is None or answer.epoch != self._epoch:
                self._to_watch = list(self._by_job)  # a broker that does not know us
            if answer is not None:
                self._epoch = answer.epoch
            found = [
                (watch, state)
                for job_id, state in (answer.states if answer else ())
                for watch in self._by_job.get(job_id, ())
            ]
        if error is not None:
            if isinstance(error, LimitExceededError):
                self._fail_all(error)
            else:  # the broker is gone for now: ends still arrive, states after it is back
                self._session.later(_RETRY_S, self._poll)
            return
        try:
            for watch, state in found:
                threads.guarded("progress_not_delivered", watch.state, state, JobStatus.RUNNING)
        finally:
            self._poll()

    def _fail_all(self, error: BaseException) -> None:
        with self._lock:
            watches = [watch for watching in self._by_job.values() for watch in watching]
        for watch in watches:
            watch.fail(error)
            self._drop(watch)


def _over() -> RuntimeUnavailableError:
    return RuntimeUnavailableError("the engine was shut down; watch the job again after koan.init()")
