"""Live changes of all jobs, from one connection to coordinator and broker to any number of readers.

While somebody reads, two calls are parked: with the coordinator for jobs that have moved, with the broker for progress. What
comes is given to each reader's own buffer: the newest state of each job, at most `_BUFFER` of them; above that the oldest is
dropped and the reader is told of a gap. So a slow reader costs memory for one buffer and holds up nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final

from koan_ray.domain.ids import new_id
from koan_ray.errors import KoanRayError
from koan_ray.telemetry import logs
from koan_ray.web.problems import ProblemError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from koan_ray.domain.records import JobRecord, Progress
    from koan_ray.web.reading import Link

_PARK_S: Final = 10.0
_GATHER_S: Final = 0.05  # between two answers: what changes meanwhile is told once
_RETRY_S: Final = 0.5
_BUFFER: Final = 1_000


class Event:
    """One change, rendered once for all readers."""

    __slots__ = ("_rendered", "job_id", "name", "state")

    def __init__(self, name: str, job_id: str, state: Any) -> None:
        self.name, self.job_id, self.state = name, job_id, state
        self._rendered: str | None = None

    def data(self, render: Callable[[Event], str]) -> str:
        """Return the JSON of this event, made by ``render`` the first time."""
        if self._rendered is None:
            self._rendered = render(self)
        return self._rendered


class Reading:
    """One reader's buffer."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[tuple[str, str], Event] = OrderedDict()
        self._n_lost: int | None = 0  # None: an unknown number
        self._news = asyncio.Event()
        self.is_over = False

    def put(self, event: Event) -> None:
        """Keep a change until it is read; the newest of a job replaces an older one."""
        key = ("progress" if event.name == "progress" else "job", event.job_id)
        self._waiting[key] = event
        self._waiting.move_to_end(key)
        if len(self._waiting) > _BUFFER:
            self._waiting.popitem(last=False)
            self._n_lost = None if self._n_lost is None else self._n_lost + 1
        self._news.set()

    def gap(self, n_lost: int | None) -> None:
        """Tell of changes that nobody has."""
        self._n_lost = None if n_lost is None or self._n_lost is None else self._n_lost + n_lost
        self._news.set()

    def end(self) -> None:
        """Let the reader go."""
        self.is_over = True
        self._news.set()

    async def take(self, timeout_s: float) -> list[Event]:
        """Return what has gathered, waiting up to ``timeout_s`` for the first; a gap comes first."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._news.wait()
        self._news.clear()
        found = list(self._waiting.values())
        self._waiting = OrderedDict()
        if self._n_lost != 0:
            found.insert(0, Event("gap", "", self._n_lost))
            self._n_lost = 0
        return found


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
        self._log = logs.get_logger()
        self._is_closed = False
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
        """Refuse a stream when there are as many as there may be."""
        if self.n_streams >= self._limit:
            raise ProblemError(
                429, f"{self._limit} streams are open, the most that may be ([web.limits] streams)", slug="too-many-streams",
                headers={"Retry-After": "5"},
            )  # fmt: skip

    @property
    def is_closed(self) -> bool:
        """The app is going down: streams end."""
        return self._is_closed

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
            yield reading
        finally:
            self._readings.discard(reading)
            if not self._readings:
                await self._stop()

    async def close(self) -> None:
        """End all streams."""
        self._is_closed = True
        for reading in self._readings:
            reading.end()
        await self._stop()

    async def _stop(self) -> None:
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _listen(self, call: Callable[..., Any], take: Callable[[str, Any], None]) -> None:
        listener_id, epoch, is_behind = new_id(), None, False
        try:
            while True:
                try:
                    news = await call("news", listener_id, epoch, _PARK_S, timeout_s=_PARK_S + 10)
                except KoanRayError as error:
                    self._log.warning("feed_interrupted", problem=str(error))
                    is_behind = True
                    await asyncio.sleep(_RETRY_S)
                    continue
                if is_behind or (epoch is not None and epoch != news.epoch):
                    self._gap(None)
                elif news.n_lost:
                    self._gap(news.n_lost)
                is_behind, epoch = False, news.epoch
                for job_id, state in news.changes:
                    take(job_id, state)
                if news.changes:
                    await asyncio.sleep(_GATHER_S)
        finally:
            with contextlib.suppress(KoanRayError, asyncio.CancelledError):
                await asyncio.shield(call("news", listener_id, "", 0.0, timeout_s=1.0))

    def _moved(self, job_id: str, job: JobRecord | None) -> None:
        self._tell(Event("removed", job_id, None) if job is None else Event("job", job_id, job))

    def _progressed(self, job_id: str, progress: Progress) -> None:
        self._tell(Event("progress", job_id, progress))

    def _tell(self, event: Event) -> None:
        for reading in self._readings:
            reading.put(event)

    def _gap(self, n_lost: int | None) -> None:
        self.n_lost += n_lost or 0
        for reading in self._readings:
            reading.gap(n_lost)
