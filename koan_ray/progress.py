"""Progress as users see it: what a body reports with, and what watchers receive."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, overload

from koan_ray import ambient, threads
from koan_ray.domain.durations import instant
from koan_ray.domain.progress import NUMBERS, SECOND, WORDS, Said, estimate_completion, parse_report, plain_report
from koan_ray.domain.status import JobStatus
from koan_ray.errors import ConfigurationError
from koan_ray.ports import LoopClock

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from datetime import datetime
    from types import TracebackType

    from koan_ray.cancellation import CancellationToken
    from koan_ray.domain.records import Progress
    from koan_ray.ports import Clock

# Begins to deliver updates, last the final one or what is in the way of learning it; returns what ends it sooner.
_Watch = Callable[[Callable[[Any], None]], Callable[[], None]]
_log = logging.getLogger("koan_ray.progress")
_CLOCK = LoopClock()
_FAILED = "progress_handler_failed"
_STREAM_BUFFER = 256  # updates a slow reader of a stream may fall behind; then the oldest is dropped


class JobProgress:
    """What `execute` reports its progress with.

    `report` is a local assignment and may be called in a tight loop. The newest report of each job is sent on about
    every ten milliseconds; those between are not seen by anybody, the last one always is.
    """

    __slots__ = ("_announce", "_began", "_clock", "_is_new", "_latest", "_token")

    def __init__(
        self, announce: Callable[[], None], token: CancellationToken, *, clock: Clock | None = None,
        began: float | None = None,
    ) -> None:  # fmt: skip
        self._announce = announce
        self._token = token
        self._clock: Clock = _CLOCK if clock is None else clock
        self._began = self._clock.monotonic() if began is None else began
        self._latest: Said | None = None
        self._is_new = False

    @overload
    def report(self, percentage: float, message: str | None = None) -> None: ...
    @overload
    def report(self, current: int, total: int, message: str | None = None) -> None: ...
    def report(  # type: ignore[misc]  # the two forms share one fast body
        self,
        percentage: float | None = None,
        total: int | str | None = None,
        message: str | None = None,
        *,
        current: int | None = None,
    ) -> None:
        """Say how far the job is: ``report(0.5, "half")`` or ``report(3, 10, "third of ten")``.

        Never raises: a report is for eyes, and fails no job. What is no number leaves the job where it was, and a message
        that is no text is shown as what it says of itself.

        Args:
            percentage: 0 to 1; a value outside is moved to the nearer end.
            current: The step reached, of ``total``.
            total: How many steps there are; not a finite number: nobody knows.
            message: What is going on, for people; at most 2,000 characters of it.
        """
        first = percentage if current is None else current
        if type(first) in NUMBERS and type(total) in SECOND and type(message) in WORDS:
            self._latest = (first, total, message)
        else:
            self._latest = self._plain(first, total, message)
        if not self._is_new:
            self._is_new = True
            self._announce()

    def _plain(self, first: object, total: object, message: object) -> Said:
        """Return a report of odd types as plain values, read now: later its objects may have changed, or raise."""
        far, steps, words = plain_report(first, total, message)
        if far is not None:
            return far, steps, words
        _warn_once(type(first).__name__)
        before, before_total, _ = self._latest or (None, None, None)
        if isinstance(steps, str):
            steps, words = None, steps
        return before, before_total if steps is None and not isinstance(before_total, str) else steps, words

    def _take(self, latest: Said) -> None:
        """Take over what was reported in another process."""
        self._latest = latest
        if not self._is_new:
            self._is_new = True
            self._announce()

    @property
    def estimated_completion(self) -> datetime | None:
        """When the job will be done if it goes on at its average speed so far; None before the first report."""
        if self._latest is None:
            return None
        percentage = parse_report(*self._latest).percentage
        now, age_s = self._clock.now(), self._clock.monotonic() - self._began
        return instant(estimate_completion(percentage, began_at=now - age_s, now=now))

    @property
    def cancellation_requested(self) -> bool:
        """Whether the body shall stop."""
        return self._token.requested


@functools.lru_cache(maxsize=64)
def _warn_once(name: str) -> None:
    _log.warning("progress_unreadable: report() was given a %s first; expected a number, 0 to 1 or the step reached", name)


@dataclass(frozen=True, slots=True)
class JobProgressUpdate:
    """One state of a job as its watchers see it. Sequences grow; the last update carries the final status."""

    job_id: str
    sequence: int
    percentage: float
    message: str | None
    current_step: int | None
    total_steps: int | None
    estimated_completion: datetime | None
    updated_at: datetime | None
    status: JobStatus


def update_from(job_id: str, progress: Progress, status: JobStatus) -> JobProgressUpdate:
    """Present a progress record."""
    return JobProgressUpdate(
        job_id, progress.sequence, progress.percentage, progress.message, progress.current_step, progress.total_steps,
        instant(progress.estimated_at), instant(progress.updated_at or None), status,
    )  # fmt: skip


class Subscription:
    """A handler that is being called with a job's progress, until `close` or the end of the job.

    A context manager: leaving the block closes it. After the last update `closed` is true.
    """

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop, self._forks = stop, ambient.forks
        self.closed = False

    def close(self) -> None:
        """Call the handler no more."""
        if not self.closed:
            self.closed = True
            if self._forks == ambient.forks:  # in a forked copy nothing calls it
                self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def subscribe(handler: Callable[[JobProgressUpdate], Any], watch: _Watch) -> Subscription:
    """Call ``handler`` with each update until the job ends, one at a time and in order.

    A plain function is called on a thread kept for such handlers; a coroutine function on the running loop, or on a loop in
    one of those threads when none runs. What a handler raises is logged and does not end the subscription. A slow one misses
    updates between, never the last. The subscription ends with the loop that its handler is called on.
    """
    given: object = handler
    if not callable(given):
        msg = f"on_progress: expected a function or a coroutine function, got {handler!r:.80}"
        raise ConfigurationError(msg)
    mailbox = _Mailbox(handler)
    subscription = Subscription(mailbox.close)
    mailbox.on_end = subscription.close
    if inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(getattr(handler, "__call__", None)):  # noqa: B004
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            mailbox.schedule = lambda: threads.handlers.call(_FAILED, mailbox.serve_on_own_loop)
        else:
            mailbox.schedule = lambda: mailbox.serve_on(loop)
    else:
        mailbox.schedule = lambda: threads.handlers.call(_FAILED, mailbox.serve)
    mailbox.stop = watch(mailbox.put)
    if subscription.closed:  # it has ended before it was known how to stop it
        mailbox.stop()
    return subscription


class _Mailbox:
    """Updates on their way to one handler; at most one call of it at a time."""

    def __init__(self, handler: Callable[[JobProgressUpdate], Any]) -> None:
        self._handler = handler
        self._lock = threading.RLock()
        self._updates: deque[JobProgressUpdate] = deque(maxlen=_STREAM_BUFFER)
        self._is_serving = False
        self._is_closed = False
        self.schedule: Callable[[], Any] = lambda: None
        self.stop: Callable[[], None] = lambda: None
        self.on_end: Callable[[], None] = lambda: None

    def put(self, update: JobProgressUpdate | BaseException) -> None:
        if isinstance(update, BaseException):
            threads.say(logging.WARNING, "progress_subscription_ended: %s", update)
            self.on_end()
            return
        with self._lock:
            if self._is_closed:
                return
            self._updates.append(update)
            if self._is_serving:
                return
            self._is_serving = True
        try:
            self.schedule()
        except RuntimeError:  # the loop is closed; nobody is left to be told
            self.on_end()

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            self._updates.clear()
        self.stop()

    def serve(self) -> None:
        while (update := self._next()) is not None:
            threads.guarded(f"{_FAILED}: job {update.job_id}", self._handler, update)
            self._after(update)

    def serve_on_own_loop(self) -> None:
        """Call a coroutine function on a loop in this thread, which ends when there is nothing more to tell."""
        serving = self._serve_async(BaseException)
        try:
            asyncio.run(serving)
        except BaseException:  # no loop can be made, for want of files: the next update is its own chance
            serving.close()
            with self._lock:
                self._is_serving = False
            raise

    def serve_on(self, loop: asyncio.AbstractEventLoop) -> None:
        """Call a coroutine function on the loop that was running when the subscription was made."""
        serving = self._serve_async()
        try:
            asyncio.run_coroutine_threadsafe(serving, loop)
        except RuntimeError:
            serving.close()  # or it would complain that nobody awaits it
            raise

    async def _serve_async(self, survived: type[BaseException] = Exception) -> None:
        is_over = True
        try:
            while (update := self._next()) is not None:
                try:
                    await self._handler(update)
                except (asyncio.CancelledError, survived) as error:
                    task = asyncio.current_task()
                    if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                        raise  # the loop ends, and not what the handler awaits
                    threads.survive(f"{_FAILED}: job {update.job_id}", error)
                self._after(update)
            is_over = False
        finally:
            if is_over:
                self.on_end()

    def _next(self) -> JobProgressUpdate | None:
        with self._lock:
            if self._updates:
                return self._updates.popleft()
            self._is_serving = False
            return None

    def _after(self, update: JobProgressUpdate) -> None:
        if update.status.is_final:
            self.on_end()


class ProgressStream:
    """A job's progress as an async iterator that ends with the job; ``for update in stream.blocking()`` in scripts.

    A reader that falls more than 256 updates behind loses the oldest; the last update is never lost.
    """

    def __init__(self, watch: _Watch) -> None:
        self._watch = watch

    async def __aiter__(self) -> AsyncIterator[JobProgressUpdate]:
        loop = asyncio.get_running_loop()
        updates: asyncio.Queue[JobProgressUpdate | BaseException] = asyncio.Queue()

        def put(update: JobProgressUpdate | BaseException) -> None:
            if updates.qsize() >= _STREAM_BUFFER:
                updates.get_nowait()
            updates.put_nowait(update)

        stop: Callable[[], None] | None = None

        def deliver(update: JobProgressUpdate | BaseException) -> None:
            try:
                loop.call_soon_threadsafe(put, update)
            except RuntimeError:  # the loop was closed under its reader
                if stop is not None:
                    stop()

        stop = self._watch(deliver)
        try:
            while True:
                if updates.empty():
                    async with ambient.away_async():
                        update = await updates.get()
                else:
                    update = updates.get_nowait()
                if isinstance(update, BaseException):
                    raise update
                yield update
                if update.status.is_final:
                    return
        finally:
            stop()

    def blocking(self) -> Iterator[JobProgressUpdate]:
        """Iterate without a loop, blocking for each update."""
        updates: queue.SimpleQueue[JobProgressUpdate | BaseException] = queue.SimpleQueue()

        def deliver(update: JobProgressUpdate | BaseException) -> None:
            if updates.qsize() >= _STREAM_BUFFER:
                with contextlib.suppress(queue.Empty):  # the reader was faster
                    updates.get_nowait()
            updates.put(update)

        stop, forks = self._watch(deliver), ambient.forks
        try:
            while True:
                if forks != ambient.forks:
                    raise ambient.left_behind()
                try:
                    update = updates.get_nowait()
                except queue.Empty:
                    with ambient.away():
                        update = updates.get()
                if isinstance(update, BaseException):
                    raise update
                yield update
                if update.status.is_final:
                    return
        finally:
            if forks == ambient.forks:
                stop()
