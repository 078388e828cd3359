"""Where jobs are kept: this process's memory, and the sources. Finds a job wherever it lives, and pages over all of them.

Which of them a job belongs to is said once, by its residence; users' jobs carry none of it.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from koan_ray.domain.archival import is_archive
from koan_ray.domain.partitions import check_partition
from koan_ray.domain.records import Residence
from koan_ray.errors import ConfigurationError, JobNotFoundError, StoreUnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from koan_ray.domain.query import Page, Query
    from koan_ray.domain.records import ExecutionRecord, JobRecord
    from koan_ray.engine.shards import Shards
    from koan_ray.engine.tenure import Tenure
    from koan_ray.engine.writer import Writer
    from koan_ray.ports import JobStore

MEMORY = "memory"  # the name of this process's memory among the sources


class Catalog:
    """All places of one coordinator.

    Args:
        memory: The in-memory store.
        writer: Its writer.
        sources: What keeps documents, by name.
        default_source: Where ``.persist()`` without a name keeps jobs.
        default_partition: In which partition.
        in_memory: Names of sources with the URL ``memory://``: what is asked to be kept there is kept in memory.
    """

    def __init__(
        self, memory: JobStore, writer: Writer, sources: Mapping[str, Shards], default_source: str, default_partition: str,
        in_memory: Iterable[str] = (),
    ) -> None:  # fmt: skip
        self.memory, self.memory_writer, self.sources = memory, writer, sources
        self._default_source, self._default_partition = default_source, default_partition
        self._in_memory = frozenset({MEMORY, *in_memory})

    # --- one job -----------------------------------------------------------------------------------------------------

    def writer_of(self, job_id: str, residence: Residence) -> Writer:
        """Return the writer of the place that a job belongs to."""
        if residence.source is None:
            return self.memory_writer
        return self.sources[residence.source].of(job_id).writer

    def store_of(self, residence: Residence) -> JobStore:
        """Return the store of the place that a job belongs to."""
        return self.memory if residence.source is None else self.sources[residence.source].store

    def tenure_of(self, job: JobRecord) -> Tenure | None:
        """Return the tenure that a job belongs to; None for memory."""
        return self.tenure_at(job.id, job.particulars.residence)

    def tenure_at(self, job_id: str, residence: Residence) -> Tenure | None:
        """Return the tenure that a job of this id would belong to there; None for memory."""
        return None if residence.source is None else self.sources[residence.source].of(job_id)

    def is_in(self, job: JobRecord, tenure: Tenure) -> bool:
        """Tell whether a job belongs to a tenure."""
        return job.particulars.residence.source == tenure.source and self.sources[tenure.source].of(job.id) is tenure

    @property
    def is_whole(self) -> bool:
        """Every source is ours."""
        return all(shards.is_active for shards in self.sources.values())

    def place(self, asked: Residence) -> Residence:
        """Return where a job that asks for ``asked`` is kept: names filled in and known.

        Raises:
            ConfigurationError: There is no such source.
        """
        if asked.source is None:
            return asked
        name = asked.source or self._default_source
        if name not in self.sources:
            if name in self._in_memory:
                return Residence(None, check_partition(asked.partition or self._default_partition))
            known = ", ".join(map(repr, self.sources)) or "none"
            msg = (
                f"persist(source={name!r}): this engine has no such source (known: {known}). Give it a URL, for example "
                f'[sources.{name}] url = "mongodb://localhost:27017/koan" in koan.toml, or run `koan-ray dev`.'
            )
            raise ConfigurationError(msg)
        return Residence(name, check_partition(asked.partition or self._default_partition), asked.audit)

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
        sources = list(self.sources.values()) if found is None else []
        for shards in [*sources, *sources[:-1]]:  # the first ones again: it may have moved there meanwhile
            found = await shards.store.get(job_id)
            if found is not None:
                return self.placed(found, shards.source)
        return found

    async def found(self, job_id: str) -> JobRecord:
        """Return a job as `get` does, where there has to be one.

        Raises:
            JobNotFoundError: There is no such job.
            StoreUnavailableError: It is not in memory, and a source that may have it does not answer.
        """
        job = await self.get(job_id)
        if job is None:
            raise self.missing(job_id)
        return job

    def missing(self, job_id: str) -> JobNotFoundError:
        """Return what to raise for a job that `get` has not found: where it was looked for is part of it."""
        sources = (f"source {name!r}" for name in self.sources)
        return JobNotFoundError(job_id, looked_in=("the engine's memory", *sources))

    async def known(self, job_ids: Sequence[str]) -> set[str]:
        """Return those of these jobs that a source has, in whatever partition.

        Looks where jobs come from, where they are archived, and where they come from again, as `get` does.

        Raises:
            StoreUnavailableError: A source that may have them does not answer.
        """
        found: set[str] = set()
        sources = list(self.sources.values())
        for shards in [*sources, *sources[:-1]]:
            partitions = sorted(await shards.store.partitions(), key=is_archive)
            for partition in [*partitions, *(name for name in partitions if not is_archive(name))]:
                if left := [job_id for job_id in job_ids if job_id not in found]:
                    found.update(await shards.store.statuses(left, partition))
        return found

    async def executions(self, job: JobRecord) -> list[ExecutionRecord]:
        """Return a job's executions, oldest first."""
        tenure = self.tenure_of(job)
        if tenure is None:
            return await self.memory.executions(job.id)
        found = await tenure.audit.executions(job.id)
        if len(self.sources) > 1 and job.status.is_final:
            again = await self.get(job.id)
            if again is not None and (now_at := self.tenure_of(again)) not in (None, tenure):
                return await now_at.audit.executions(job.id)  # it has moved there meanwhile
        return found

    async def remove(self, job: JobRecord) -> bool:
        """Delete a job that has ended, with its executions."""
        tenure = self.tenure_of(job)
        if tenure is None:
            return await self.memory.remove(job.id)
        if tenure.audit is not tenure.store:
            await tenure.audit.remove(job.id)
        return await tenure.store.remove(job.id)

    # --- many --------------------------------------------------------------------------------------------------------

    async def flushed(self) -> None:
        """Return when what was staged before this call can be seen in the stores that answer."""
        await self.memory_writer.flushed()
        tenures = (tenure for shards in self.sources.values() for tenure in shards.tenures)
        dirty = [tenure.writer for tenure in tenures if tenure.may_act and tenure.writer.n_dirty]
        await written(dirty)

    async def query(self, query: Query) -> Page:
        """Return one page over all places that the query names, merged in its order."""
        return query.merged(await asyncio.gather(*[self._page(query, *place) for place in self._asked(query)]))

    async def count(self, query: Query) -> int:
        """Return how many jobs match in all places that the query names."""
        return sum(await asyncio.gather(*[store.count(query) for store, _ in self._asked(query)]))

    async def _page(self, query: Query, store: JobStore, source: str | None) -> Page:
        page = await store.query(query)
        return page if source is None else page._replace(jobs=[self.placed(job, source) for job in page.jobs])

    def _asked(self, query: Query) -> list[tuple[JobStore, str | None]]:
        """Return the stores a query is for: one source, or everything; memory has partitions if a source is kept there."""
        if query.source is not None and query.source not in (*self._in_memory, *self.sources):
            known = ", ".join(map(repr, (*self.sources, *sorted(self._in_memory))))
            msg = f"source: {query.source!r} is none of this engine's sources ({known})"
            raise ConfigurationError(msg)
        asked: list[tuple[JobStore, str | None]] = []
        has_partitions = len(self._in_memory) > 1
        if query.source in (None, *self._in_memory) and (has_partitions or query.partition in (None, "", "*")):
            asked.append((self.memory, None))
        asked += self._stores(query.source)
        if not asked:
            msg = f"partition: {query.partition!r} is no partition here: this engine keeps jobs in memory, which has none"
            raise ConfigurationError(msg)
        return asked

    def _stores(self, source: str | None) -> Iterable[tuple[JobStore, str | None]]:
        for name, shards in self.sources.items():
            if source in (None, name):
                if isinstance(shards.problem, ConfigurationError):
                    msg = f"source {name!r} cannot be read: {shards.problem}"
                    raise StoreUnavailableError(msg)
                yield shards.store, name

    @staticmethod
    def placed(job: JobRecord, source: str) -> JobRecord:
        """Name the source that a record came from; documents do not repeat it."""
        about = job.particulars
        if about.residence.source == source:
            return job
        residence = about.residence._replace(source=source)
        return job.evolve(particulars=about._replace(residence=residence))


async def written(writers: Iterable[Writer]) -> None:
    """Return when what was staged with each of these writers is written; their flushes go on side by side."""
    flushing = [writer.flushed() for writer in writers]
    if len(flushing) == 1:
        await flushing[0]
    else:
        await asyncio.gather(*flushing)
