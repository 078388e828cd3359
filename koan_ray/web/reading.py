"""Reads jobs without the coordinator: documents from their sources, and only what lives in its memory from itself.

Every source of the settings is opened once, read-only. A page is merged from one page of each place, in the order of the
query, with the cursor that `koan_ray.domain.query` gives. What runs is brought up to date with the broker's latest states.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from pydantic_core import from_json

from koan_ray import wiring
from koan_ray.domain.archival import is_archive
from koan_ray.domain.query import Page, Query, parse_query
from koan_ray.domain.records import FAILED, told
from koan_ray.domain.status import JobStatus
from koan_ray.engine.catalog import MEMORY, Catalog
from koan_ray.engine.window import outlined
from koan_ray.errors import (
    ConfigurationError,
    JobNotFoundError,
    KoanRayError,
    RecordCorruptError,
    RuntimeUnavailableError,
    StoreUnavailableError,
)
from koan_ray.telemetry import logs

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    from koan_ray.config import Settings
    from koan_ray.domain.records import ExecutionRecord, JobRecord
    from koan_ray.engine.session import Session
    from koan_ray.ports import DocumentStore

_MAX_SCANS = 2  # pages of the coordinator's memory that this process asks for at a time
_RETRY_OPEN_S = 2.0


class Counted(NamedTuple):
    """A number that was counted up to a limit."""

    n: int
    more: bool


class Link:
    """Calls of coordinator and broker, awaited on this process's loop and bounded in time.

    Args:
        session: Returns this process's view of the engine.
        timeout_s: Of one call.
    """

    def __init__(self, session: Callable[[], Session], timeout_s: float) -> None:
        self._session, self._timeout_s = session, timeout_s

    async def coordinator(self, method: str, *args: Any, timeout_s: float | None = None) -> Any:
        """Call a method of the coordinator.

        Raises:
            RuntimeUnavailableError: It did not answer in time.
        """
        return await self._call("coordinator", method, args, timeout_s)

    async def broker(self, method: str, *args: Any, timeout_s: float | None = None) -> Any:
        """Call a method of the broker."""
        return await self._call("broker", method, args, timeout_s)

    async def run_again(self, method: str, job_id: str, *more: Any) -> str:
        """Have a stored job run again; returns the id of the new one. See `Session.run_again`.

        Raises:
            RuntimeUnavailableError: The engine did not answer in time.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                job = await self._session().run_again(method, job_id, *more)
        except TimeoutError:
            msg = f"the coordinator did not answer within {self._timeout_s:g} s ([web.limits] answer_timeout)"
            raise RuntimeUnavailableError(msg) from None
        return str(job.id)

    async def _call(self, whom: str, method: str, args: tuple[Any, ...], timeout_s: float | None) -> Any:
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[Any] = loop.create_future()

        def settle(answer: Any, error: BaseException | None) -> None:
            if answered.done():
                return
            if error is not None:
                answered.set_exception(error)
            else:
                answered.set_result(answer)

        def done(answer: Any, error: BaseException | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed; nobody waits any more
                loop.call_soon_threadsafe(settle, answer, error)

        transport = self._session().transport
        getattr(transport, whom)(method, args, done)
        limit = timeout_s if timeout_s is not None else self._timeout_s
        try:
            async with asyncio.timeout(limit):
                return await answered
        except TimeoutError:
            msg = f"the {whom} did not answer within {limit:g} s ([web.limits] answer_timeout)"
            raise RuntimeUnavailableError(msg) from None


class _Opened:
    """One source, opened when it is first needed and again after it was away."""

    def __init__(self, name: str, store: DocumentStore) -> None:
        self.name = name
        self._store = store
        self._is_open = False
        self._opening = asyncio.Lock()
        self._failed_at = float("-inf")
        self.problem: KoanRayError | None = None

    async def store(self) -> DocumentStore:
        """Return the store.

        Raises:
            StoreUnavailableError: It does not answer; asked again at most every two seconds.
        """
        async with self._opening:
            if not self._is_open:
                now = asyncio.get_running_loop().time()
                if self.problem is not None and now - self._failed_at < _RETRY_OPEN_S:
                    raise self.problem
                try:
                    await self._store.open()
                except KoanRayError as error:
                    self.problem, self._failed_at = error, now
                    raise
                self._is_open, self.problem = True, None
        return self._store

    async def close(self) -> None:
        if self._is_open:
            await self._store.close()
            self._is_open = False


class Reader:
    """All places where jobs are kept, for reading.

    Args:
        settings: They name the sources.
        link: To coordinator and broker.
    """

    def __init__(self, settings: Settings, link: Link) -> None:
        self._link = link
        numbers = wiring.engine_settings(settings)
        urls = {name: url for name, url in numbers.sources if not url.startswith("memory://")}
        self._sources = {
            name: _Opened(name, wiring.open_store(name, url, read_only=True, on_corrupt=_tell_once()))
            for name, url in urls.items()
        }
        self._in_memory = frozenset({MEMORY, *numbers.in_memory})
        self._audit_source = numbers.audit_source
        self._scans = asyncio.Semaphore(_MAX_SCANS)

    @property
    def sources(self) -> list[str]:
        """The names of the sources that this process can read."""
        return list(self._sources)

    async def close(self) -> None:
        """Let go of all connections."""
        await asyncio.gather(*[opened.close() for opened in self._sources.values()])

    # --- many jobs ---------------------------------------------------------------------------------------------------

    async def page(self, filters: Mapping[str, Any], *, memory: bool = True) -> Page:
        """Return one page of jobs, outlined: without contexts and results. ``memory``: those of the coordinator, too.

        Raises:
            ConfigurationError: A filter is unknown or unusable.
            StoreUnavailableError: A source that was asked does not answer.
        """
        query = parse_query(filters)
        self._check(query)
        asked = [self._page_of(opened, query) for opened in self._asked(query)]
        if memory and self._asks_memory(query):
            asked.append(self._page_of_memory(filters))
        page = query.merged(await asyncio.gather(*asked))
        return page._replace(jobs=await self._as_now(page.jobs))

    async def count(self, filters: Mapping[str, Any], at_most: int, *, memory: bool = True) -> Counted:
        """Return how many jobs match, counted up to ``at_most`` in each place."""
        query = parse_query(filters)
        self._check(query)
        asked = [self._count_of(opened, query, at_most + 1) for opened in self._asked(query)]
        if memory and self._asks_memory(query):
            asked.append(self._count_of_memory(filters, at_most + 1))
        n = sum(await asyncio.gather(*asked))
        return Counted(min(n, at_most), n > at_most)

    async def _page_of(self, opened: _Opened, query: Query) -> Page:
        store = await opened.store()
        outline = getattr(store, "outline", None)
        page = await (outline or store.query)(query)
        jobs = [Catalog.placed(job, opened.name) for job in page.jobs]
        return Page(jobs if outline is not None else [outlined(job) for job in jobs], page.cursor)

    async def _page_of_memory(self, filters: Mapping[str, Any]) -> Page:
        plain = {name: value for name, value in filters.items() if name not in ("source", "partition")}
        async with self._scans:
            jobs, cursor = await self._link.coordinator("look", "page", plain)
        return Page([job for job in jobs if job.particulars.residence.source is None], cursor)

    async def _count_of(self, opened: _Opened, query: Query, at_most: int) -> int:
        store = await opened.store()
        bounded = getattr(store, "count_up_to", None)
        return int(await (bounded(query, at_most) if bounded is not None else store.count(query)))

    async def _count_of_memory(self, filters: Mapping[str, Any], at_most: int) -> int:
        plain = {name: value for name, value in filters.items() if name not in ("source", "partition", "limit", "cursor")}
        async with self._scans:
            return min(at_most, int(await self._link.coordinator("count", {**plain, "source": MEMORY})))

    def _check(self, query: Query) -> None:
        if query.source not in (None, *self._in_memory, *self._sources):
            known = ", ".join(map(repr, (*self._sources, *sorted(self._in_memory))))
            msg = f"source: {query.source!r} is none of this API's sources ({known})"
            raise ConfigurationError(msg)

    def _asked(self, query: Query) -> list[_Opened]:
        return [opened for name, opened in self._sources.items() if query.source in (None, name)]

    def _asks_memory(self, query: Query) -> bool:
        return query.source in (None, *self._in_memory) and query.partition in (None, "", "*")

    # --- one job -----------------------------------------------------------------------------------------------------

    async def job(self, job_id: str) -> JobRecord:
        """Return a job, complete, wherever it is.

        Raises:
            JobNotFoundError: It is nowhere.
            StoreUnavailableError: It was not found, and a source that may have it does not answer.
        """
        problem: KoanRayError | None = None
        for _ in range(2 if len(self._sources) > 1 else 1):  # again: it may have moved between two sources meanwhile
            found, problem = await self._in_sources(job_id)
            if found is not None:
                return (await self._as_now([found]))[0]
        record = cast("JobRecord | None", await self._link.coordinator("look", "job", job_id))
        if record is None and problem is not None:
            raise problem
        if record is None:
            sources = (f"source {name!r}" for name in self._sources)
            raise JobNotFoundError(job_id, looked_in=("the engine's memory", *sources))
        return (await self._with_latest([record]))[0]

    async def complete(self, jobs: Sequence[JobRecord]) -> AsyncIterator[JobRecord]:
        """Iterate over jobs of a page with their contexts and results; those that are gone are left out.

        Raises:
            KoanRayError: A place does not answer.
        """
        places: dict[tuple[str | None, str], list[str]] = {}
        for job in jobs:
            residence = job.particulars.residence
            places.setdefault((residence.source, residence.partition if residence.source else ""), []).append(job.id)
        for (source, partition), job_ids in places.items():
            found = self._of_memory(job_ids) if source is None else self._of_source(source, partition, job_ids)
            async for job in found:
                yield job

    async def _of_memory(self, job_ids: list[str]) -> AsyncIterator[JobRecord]:
        while job_ids:
            async with self._scans:
                found = cast("list[JobRecord | None]", await self._link.coordinator("look", "jobs", job_ids))
            for job in found:
                if job is not None:
                    yield job
            job_ids = job_ids[max(1, len(found)) :]

    async def _of_source(self, source: str, partition: str, job_ids: list[str]) -> AsyncIterator[JobRecord]:
        store: Any = await self._sources[source].store()
        if hasattr(store, "complete"):
            async for job in store.complete(job_ids, partition):
                yield job
            return
        for job_id in job_ids:
            if (one := await store.get(job_id)) is not None:
                yield one

    async def _in_sources(self, job_id: str) -> tuple[JobRecord | None, KoanRayError | None]:
        problem: KoanRayError | None = None
        for name, opened in self._sources.items():
            try:
                found = await (await opened.store()).get(job_id)
            except StoreUnavailableError as error:
                problem = error
                continue
            if found is not None:
                return Catalog.placed(found, name), None
        return None, problem

    async def executions(self, job: JobRecord) -> list[ExecutionRecord]:
        """Return a job's executions, oldest first; those that were given back before they began are left out."""
        source = job.particulars.residence.source
        if source is None:
            return cast("list[ExecutionRecord]", await self._link.coordinator("look", "executions", job.id))
        kept_in = self._sources.get(self._audit_source or source)
        if kept_in is None:
            return []
        return told(await (await kept_in.store()).executions(job.id))

    async def failed_items(
        self, job: JobRecord, seq: int, offset: int, limit: int
    ) -> tuple[list[Any], tuple[int, int] | None]:
        """Return dead items of a batch, from entry ``offset`` of page ``seq`` on, and where the next begin; None at the end.

        Raises:
            RecordCorruptError: A page that counts is missing or cannot be read.
        """
        found: list[Any] = []
        n_parts = job.checkpoint.n_parts(FAILED) if job.checkpoint is not None else 0
        while seq < n_parts and len(found) < limit:
            rows = await self._rows(job, seq)
            taken = rows[offset : offset + limit - len(found)]
            found += taken
            offset += len(taken)
            if offset >= len(rows):
                seq, offset = seq + 1, 0
        return found, (seq, offset) if seq < n_parts else None

    async def _rows(self, job: JobRecord, seq: int) -> list[Any]:
        """Return the entries of one page of a batch's dead items."""
        residence = job.particulars.residence
        if residence.source is None:
            parts = await self._link.coordinator("parts", job.id, FAILED, seq - 1, 1)
        else:
            store = await self._sources[residence.source].store()
            parts = await store.read_parts(residence.partition, job.id, FAILED, seq - 1, 1)
        if not parts or parts[0].seq != seq:
            raise RecordCorruptError(job.id, f"{FAILED}.{seq}", "is missing")
        try:
            rows = from_json(parts[0].body)
        except ValueError as error:
            raise RecordCorruptError(job.id, f"{FAILED}.{seq}", f"is no JSON: {error}") from None
        return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []

    async def children(self, job_id: str, limit: int, cursor: str | None = None) -> Page:
        """Return a page of the children of a job, oldest first, in whatever partition they are."""
        filters = {"parent_job_id": job_id, "order_by": "created_at", "limit": limit, "partition": "*"}
        return await self.page(filters if cursor is None else {**filters, "cursor": cursor})

    # --- places ------------------------------------------------------------------------------------------------------

    async def partitions(self, source: str) -> list[str]:
        """Return the partitions of a source.

        Raises:
            StoreUnavailableError: It does not answer.
        """
        return await (await self._sources[source].store()).partitions()

    async def _as_now(self, jobs: list[JobRecord]) -> list[JobRecord]:
        """Add what only coordinator and broker know of jobs that have not ended."""
        return await self._with_reasons(await self._with_latest(jobs))

    async def _with_reasons(self, jobs: list[JobRecord]) -> list[JobRecord]:
        """Say of stored jobs that do not run what they wait for; without the coordinator, what is stored."""
        asked = [job.id for job in jobs if _may_wait(job)]
        if not asked:
            return jobs
        try:
            reasons = await self._link.coordinator("look", "reasons", asked, timeout_s=1.0)
        except KoanRayError:
            return jobs
        return [job.evolve(reason=why) if (why := reasons.get(job.id)) is not None else job for job in jobs]

    async def _with_latest(self, jobs: list[JobRecord]) -> list[JobRecord]:
        """Bring the progress of what runs up to date; without the broker it is as it was written last."""
        running = [job.id for job in jobs if job.status is JobStatus.RUNNING]
        if not running:
            return jobs
        try:
            latest = dict(await self._link.broker("latest", running, timeout_s=1.0))
        except KoanRayError:
            return jobs
        return [
            job.evolve(progress=state)
            if (state := latest.get(job.id)) is not None
            and job.status is JobStatus.RUNNING
            and (job.progress is None or state.sequence > job.progress.sequence)
            else job
            for job in jobs
        ]


def _may_wait(job: JobRecord) -> bool:
    """Tell whether the coordinator may know of something in the way of a job; of those in its memory it has said so."""
    if job.particulars.residence.source is None:
        return False
    return job.status is JobStatus.QUEUED or (job.status is JobStatus.RUNNING and job.has_items)


def is_archived(job: JobRecord) -> bool:
    """Tell whether a job is in an archive."""
    residence = job.particulars.residence
    return residence.source is not None and is_archive(residence.partition)


def _tell_once() -> Callable[[str, KoanRayError], None]:
    """Return what tells the log of a document that cannot be read: each once, up to a thousand."""
    told: set[str] = set()
    log = logs.get_logger()

    def tell(record_id: str, error: KoanRayError) -> None:
        if record_id not in told and len(told) < 1000:
            told.add(record_id)
            log.warning("record_skipped", record_id=record_id, problem=str(error))

    return tell
