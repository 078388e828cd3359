"""Where jobs are kept: this process's memory, and the sources. Finds a job wherever it lives, and pages over all of them.

Which of them a job belongs to is said once, by its residence; users' jobs carry none of it.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from koan_ray.domain.archival import is_archive
from koan_ray.domain.query import Page
from koan_ray.domain.records import Residence
from koan_ray.errors import ConfigurationError, StoreUnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from koan_ray.domain.query import Query
    from koan_ray.domain.records import ExecutionRecord, JobRecord
    from koan_ray.engine.tenure import Tenure
    from koan_ray.engine.writer import Writer
    from koan_ray.ports import JobStore

MEMORY = "memory"  # the name of this process's memory among the sources


class Catalog:
    """All places of one coordinator.

    Args:
        memory: The in-memory store.
        writer: Its writer.
        tenures: The sources, by name.
        default_source: Where ``.persist()`` without a name keeps jobs.
        default_partition: In which partition.
    """

    def __init__(
        self, memory: JobStore, writer: Writer, tenures: Mapping[str, Tenure], default_source: str, default_partition: str
    ) -> None:
        self.memory, self.memory_writer, self.tenures = memory, writer, tenures
        self._default_source, self._default_partition = default_source, default_partition

    # --- one job -----------------------------------------------------------------------------------------------------

    def writer_of(self, residence: Residence) -> Writer:
        """Return the writer of the place that a job belongs to."""
        if residence.source is None:
            return self.memory_writer
        return self.tenures[residence.source].writer

    def store_of(self, residence: Residence) -> JobStore:
        """Return the store of the place that a job belongs to."""
        return self.memory if residence.source is None else self.tenures[residence.source].store

    def tenure_of(self, residence: Residence) -> Tenure | None:
        """Return the tenure of a job's source; None for memory."""
        return None if residence.source is None else self.tenures[residence.source]

    def place(self, asked: Residence) -> Residence:
        """Return where a job that asks for ``asked`` is kept: names filled in and known.

        Raises:
            ConfigurationError: There is no such source.
        """
        if asked.source is None:
            return asked
        name = asked.source or self._default_source
        if name not in self.tenures:
            if name == MEMORY:
                return Residence()
            known = ", ".join(map(repr, self.tenures)) or "none"
            msg = (
                f"persist(source={name!r}): this engine has no such source (known: {known}). Give it a URL, for example "
                f'[sources.{name}] url = "mongodb://localhost:27017/koan" in koan.toml, or run `koan-ray dev`.'
            )
            raise ConfigurationError(msg)
        return Residence(name, asked.partition or self._default_partition, asked.audit)

    def home(self, residence: Residence) -> Residence:
        """Return where a new job lives that goes with an old one: as that did before it was archived."""
        if residence.source is None or not is_archive(residence.partition):
            return residence
        source, partition = residence.origin or (None, self.default.partition)
        return Residence(source or residence.source, partition, residence.audit)

    @property
    def default(self) -> Residence:
        """Where ``.persist()`` without arguments keeps jobs."""
        return Residence(self._default_source, self._default_partition)

    async def get(self, job_id: str) -> JobRecord | None:
        """Return a job as last written, wherever it lives.

        Raises:
            StoreUnavailableError: It is not in memory, and a source that may have it does not answer.
        """
        found = await self.memory.get(job_id)
        tenures = list(self.tenures.values()) if found is None else []
        for tenure in [*tenures, *tenures[:-1]]:  # the first ones again: it may have moved there meanwhile
            found = await tenure.store.get(job_id)
            if found is not None:
                return self.placed(found, tenure)
        return found

    async def executions(self, job: JobRecord) -> list[ExecutionRecord]:
        """Return a job's executions, oldest first."""
        tenure = self.tenure_of(job.particulars.residence)
        if tenure is None:
            return await self.memory.executions(job.id)
        found = await tenure.audit.executions(job.id)
        if len(self.tenures) > 1 and job.status.is_final:
            again = await self.get(job.id)
            if again is not None and (now_at := self.tenure_of(again.particulars.residence)) not in (None, tenure):
                return await now_at.audit.executions(job.id)  # it has moved there meanwhile
        return found

    async def remove(self, job: JobRecord) -> bool:
        """Delete a job that has ended, with its executions."""
        tenure = self.tenure_of(job.particulars.residence)
        if tenure is None:
            return await self.memory.remove(job.id)
        if tenure.audit is not tenure.store:
            await tenure.audit.remove(job.id)
        return await tenure.store.remove(job.id)

    # --- many --------------------------------------------------------------------------------------------------------

    async def flushed(self) -> None:
        """Return when what was staged before this call can be seen in the stores that answer."""
        await self.memory_writer.flushed()
        for tenure in self.tenures.values():
            if tenure.may_act and tenure.writer.n_dirty:
                await tenure.writer.flushed()

    async def query(self, query: Query) -> Page:
        """Return one page over all places that the query names, merged in its order."""
        pages = await asyncio.gather(*[self._page(query, *place) for place in self._asked(query)])
        # By id: while a job moves to an archive or back, it is in both.
        jobs = list({job.id: job for page in pages for job in page.jobs}.values())
        if len(pages) == 1:
            return pages[0]._replace(jobs=jobs)
        jobs.sort(key=query.sort_key, reverse=query.descending)
        more = len(jobs) > query.limit or any(page.cursor is not None for page in pages)
        jobs = jobs[: query.limit]
        return Page(jobs, query.cursor_after(jobs[-1]) if more and jobs else None)

    async def count(self, query: Query) -> int:
        """Return how many jobs match in all places that the query names."""
        return sum(await asyncio.gather(*[store.count(query) for store, _ in self._asked(query)]))

    async def _page(self, query: Query, store: JobStore, tenure: Tenure | None) -> Page:
        page = await store.query(query)
        return page if tenure is None else page._replace(jobs=[self.placed(job, tenure) for job in page.jobs])

    def _asked(self, query: Query) -> list[tuple[JobStore, Tenure | None]]:
        """Return the stores a query is for: one source, or everything; memory has no partitions."""
        if query.source is not None and query.source not in (MEMORY, *self.tenures):
            known = ", ".join(map(repr, (*self.tenures, MEMORY)))
            msg = f"source: {query.source!r} is none of this engine's sources ({known})"
            raise ConfigurationError(msg)
        asked: list[tuple[JobStore, Tenure | None]] = []
        if query.source in (None, MEMORY) and query.partition in (None, "", "*"):
            asked.append((self.memory, None))
        asked += self._stores(query.source)
        if not asked:
            msg = f"partition: {query.partition!r} is no partition here: this engine keeps jobs in memory, which has none"
            raise ConfigurationError(msg)
        return asked

    def _stores(self, source: str | None) -> Iterable[tuple[JobStore, Tenure | None]]:
        for name, tenure in self.tenures.items():
            if source in (None, name):
                if isinstance(tenure.problem, ConfigurationError):
                    msg = f"source {name!r} cannot be read: {tenure.problem}"
                    raise StoreUnavailableError(msg)
                yield tenure.store, tenure

    @staticmethod
    def placed(job: JobRecord, tenure: Tenure) -> JobRecord:
        """Name the source that a record came from; documents do not repeat it."""
        about = job.particulars
        if about.residence.source == tenure.source:
            return job
        residence = about.residence._replace(source=tenure.source)
        return job.evolve(particulars=about._replace(residence=residence))
