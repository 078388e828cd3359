"""Live changes of all jobs, from one connection to coordinator and broker to any number of readers.

While somebody reads, two calls are parked: with the coordinator for jobs that have moved, with the broker for progress. What
comes with one answer is a batch, rendered once and given to each reader's own buffer; a slow reader loses the oldest batches
and is told of a gap, and holds up nobody. How often is asked bounds what a busy engine costs: a list on a screen needs no
ten thousand changes a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from koan_ray.domain.ids import new_id
from koan_ray.errors import KoanRayError
from koan_ray.telemetry import logs
from koan_ray.web.ending import is_server_ending
from koan_ray.web.problems import ProblemError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from koan_ray.domain.records import JobRecord, Progress
    from koan_ray.web.reading import Link

_PARK_S: Final = 10.0
_PACE_S: Final = (0.05, 0.002)  # between two answers, and more for each reader: what changes meanwhile is told once
_BUSY_PACE_S: Final = (0.5, 0.01)  # when there is more than anybody can read; whoever shows a list reads it anew then
_BUSY: Final = 50  # changes of one answer
_RETRY_S: Final = 0.5
_BATCHES: Final = 16  # that a reader may be behind
_LOOKS_EVERY_S: Final = 0.1  # whether the server ends, while streams are open


class Event:
    """One change; its JSON is made once for all readers."""

    __slots__ = ("_rendered", "job_id", "name", "number", "state")

    def __init__(self, name: str, job_id: str, state: Any, number: int = 0) -> None:
        self.name, self.job_id, self.state, self.number = name, job_id, state, number
        self._rendered: str | None = None

    def data(self, render: Callable[[Event], str]) -> str:
        """Return the JSON of this event, made by ``render`` the first time."""
        if self._rendered is None:
            self._rendered = render(self)
        return self._rendered


class Batch:
    """Changes that came together. Readers of everything send the same text, so that many cost little more than one."""

    __slots__ = ("_text", "events")

    def __init__(self, events: list[Event]) -> None:
        self.events = events
        self._text: str | None = None

    def text(self, render: Callable[[Event], str]) -> str:
        """Return all events as they go over the wire, made by ``render`` the first time."""
        if self._text is None:
            self._text = "".join(map(render, self.events))
        return self._text


class Reading:
    """One reader's buffer: the newest `_BATCHES` batches."""

    def __init__(self) -> None:
        self._waiting: deque[Batch] = deque()
        self._n_lost: int | None = 0  # None: an unknown number
        self._news = asyncio.Event()
        self.is_over = False

    def put(self, batch: Batch) -> None:
        """Keep changes until they are read; above the limit the oldest are dropped."""
        if len(self._waiting) >= _BATCHES:
            self.gap(len(self._waiting.popleft().events))
        self._waiting.append(batch)
        self._news.set()

    def gap(self, n_lost: int | None) -> None:
        """Tell of changes that this reader does not get."""
        self._n_lost = None if n_lost is None or self._n_lost is None else self._n_lost + n_lost
        self._news.set()

    def end(self) -> None:
        """Let the reader go."""
        self.is_over = True
        self._news.set()

    async def take(self, timeout_s: float) -> list[Batch]:
        """Return what has gathered, waiting up to ``timeout_s`` for the first; a gap comes first."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._news.wait()
        self._news.clear()
        found, self._waiting = list(self._waiting), deque()
        n_lost, self._n_lost = self._n_lost, 0
        return found if n_lost == 0 else [Batch([Event("gap", "", n_lost)]), *found]


class Hub:
    """All readers of one process.

    Args:
        link: To coordinator and broker.
        limit: Streams of server-sent events at a time.
    """

    def __init__(self, link: Link, limit: int) -> None:
        self._link, self._limit = link, limit
        self._readings: set[Reading] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._enders: set[Callable[[], None]] = set()  # of streams that are open
        self._looking: asyncio.Task[None] | None = None
        self._log = logs.get_logger()
        self._is_closed = False
        self.last_number = int(time.time() * 1000)  # grows over restarts, so that a reader never sees an older number
        self.n_streams = 0
        self.n_lost = 0

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        """Count a stream while it lasts.

        Raises:
            ProblemError: There are as many as there may be.
        """
        self.check()
        self.n_streams += 1
        try:
            yield
        finally:
            self.n_streams -= 1

    def check(self) -> None:
        """Refuse a stream when there are as many as there may be, or when the app goes down."""
        if self._is_closed:
            problem = "the server is going down; connect again to the next one"
            raise ProblemError(503, problem, slug="going-down", headers={"Retry-After": "2"})
        if self.n_streams >= self._limit:
            raise ProblemError(
                429, f"{self._limit} streams are open, the most that may be ([web.limits] streams)", slug="too-many-streams",
                headers={"Retry-After": "5"},
            )  # fmt: skip

    @property
    def is_closed(self) -> bool:
        """The app is going down: streams end."""
        return self._is_closed

    @contextlib.contextmanager
    def ending(self, end: Callable[[], None]) -> Iterator[None]:
        """Have ``end`` called if the app or the server around it goes down while the block lasts; now if it does so already.

        A server ends the app when the last response has ended, and streams end with the app: somebody has to look.
        """
        self._enders.add(end)
        if self._is_closed:
            end()
        elif self._looking is None:
            self._looking = asyncio.create_task(self._look())
        try:
            yield
        finally:
            self._enders.discard(end)
            if not self._enders and self._looking is not None:
                self._looking.cancel()
                self._looking = None

    async def _look(self) -> None:
        while not is_server_ending():  # noqa: ASYNC110 - nobody would set an event
            await asyncio.sleep(_LOOKS_EVERY_S)
        self._looking = None
        self.end()

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[Reading]:
        """Hand out a buffer that receives every change until the block is left."""
        reading = Reading()
        self._readings.add(reading)
        if not self._tasks and not self._is_closed:
            self._tasks = [
                asyncio.create_task(self._listen(self._link.coordinator, self._moved)),
                asyncio.create_task(self._listen(self._link.broker, self._progressed)),
            ]
        try:
            with self.ending(reading.end):
                yield reading
        finally:
            self._readings.discard(reading)
            if not self._readings:
                await self._stop()

    def open(self) -> None:
        """Let streams begin; again, for an app that is started after it was ended."""
        self._is_closed = False

    def end(self) -> None:
        """Have all streams end now, and let none begin."""
        self._is_closed = True
        for end in list(self._enders):
            end()

    async def close(self) -> None:
        """End all streams, and listen to nobody."""
        self.end()
        await self._stop()

    async def _stop(self) -> None:
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _listen(self, call: Callable[..., Any], make: Callable[[str, Any], Event]) -> None:
        listener_id, epoch, is_behind = new_id(), None, False
        try:
            while True:
                try:
                    news = await call("news", listener_id, epoch, _PARK_S, timeout_s=_PARK_S + 10)
                except Exception as error:  # noqa: BLE001 - whatever it is, streams go on and learn of a gap
                    self._log.warning("feed_interrupted", problem=f"{type(error).__name__}: {error}")
                    is_behind = True
                    await asyncio.sleep(_RETRY_S)
                    continue
                if is_behind or (epoch is not None and epoch != news.epoch):
                    self._gap(None)
                elif news.n_lost:
                    self._gap(news.n_lost)
                is_behind, epoch = False, news.epoch
                if news.changes:
                    self._tell([make(job_id, state) for job_id, state in news.changes])
                if news.changes or news.n_lost:
                    is_busy = news.n_lost or len(news.changes) > _BUSY
                    await asyncio.sleep(self._pace_s(_BUSY_PACE_S if is_busy else _PACE_S))
        finally:
            with contextlib.suppress(KoanRayError, asyncio.CancelledError):
                await asyncio.shield(call("news", listener_id, "", 0.0, timeout_s=1.0))

    def _pace_s(self, pace: tuple[float, float]) -> float:
        """Return how long to gather changes: to tell one more reader takes half a millisecond each time."""
        least_s, for_each_s = pace
        return max(least_s, len(self._readings) * for_each_s)

    def _moved(self, job_id: str, job: JobRecord | None) -> Event:
        return Event("removed" if job is None else "job", job_id, job, self._next_number())

    def _progressed(self, job_id: str, progress: Progress) -> Event:
        return Event("progress", job_id, progress, self._next_number())

    def _next_number(self) -> int:
        self.last_number += 1
        return self.last_number

    def _tell(self, events: list[Event]) -> None:
        batch = Batch(events)
        for reading in self._readings:
            reading.put(batch)

    def _gap(self, n_lost: int | None) -> None:
        self.n_lost += n_lost or 0
        for reading in self._readings:
            reading.gap(n_lost)
