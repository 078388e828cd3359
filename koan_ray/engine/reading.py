"""Reads stored jobs without an engine: what a coordinator answers about them, from the documents alone.

Nothing is changed and nobody is waited for. What it tells of a running job is as old as the coordinator's last flush.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

from koan_ray.domain.query import parse_query
from koan_ray.domain.records import told, view
from koan_ray.engine.catalog import Catalog
from koan_ray.engine.messages import execution_view
from koan_ray.errors import RuntimeUnavailableError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from koan_ray.domain.records import JobView
    from koan_ray.engine.messages import ExecutionView
    from koan_ray.ports import DocumentStore, JobStore


class Shelf(NamedTuple):
    """A source that is only read; what a `Catalog` needs of `Shards` and their tenures for that."""

    source: str
    store: DocumentStore
    audit: DocumentStore
    problem: None = None

    def of(self, _job_id: str) -> Shelf:
        """All shards are read alike."""
        return self


class Reader:
    """Answers questions about stored jobs; the methods are the coordinator's.

    Args:
        shelves: The sources, opened.
        nothing: An empty store, in place of a coordinator's memory.
    """

    def __init__(self, shelves: Sequence[Shelf], nothing: JobStore) -> None:
        sources = cast("Any", {shelf.source: shelf for shelf in shelves})
        self._catalog = Catalog(nothing, cast("Any", None), sources, "", "")  # no writer: nothing is written

    async def get(self, job_id: str) -> JobView:
        """Return a job as stored.

        Raises:
            JobNotFoundError: There is no such job.
        """
        job = await self._catalog.get(job_id)
        if job is None:
            raise self._catalog.missing(job_id)
        return view(job)

    async def query(self, filters: Mapping[str, Any]) -> tuple[list[JobView], str | None]:
        """Return one page of jobs and the cursor of the next."""
        page = await self._catalog.query(parse_query(filters))
        return [view(job) for job in page.jobs], page.cursor

    async def count(self, filters: Mapping[str, Any]) -> int:
        """Return how many jobs match, whatever limit and cursor say."""
        return await self._catalog.count(parse_query(filters))

    async def executions(self, job_id: str) -> list[ExecutionView]:
        """Return a job's executions, oldest first.

        Raises:
            JobNotFoundError: There is no such job.
        """
        job = await self._catalog.get(job_id)
        if job is None:
            raise self._catalog.missing(job_id)
        records = await self._catalog.executions(job)
        return [execution_view(record) for record in told(records)]

    async def latest(self, _job_ids: Sequence[str]) -> list[Any]:
        """Return the newest progress of running jobs: nobody is there to be asked."""
        return []

    async def refuse(self, method: str) -> None:
        """Refuse what only an engine can do.

        Raises:
            RuntimeUnavailableError: Always.
        """
        msg = (
            f"{method}: needs an engine, and none was found; these jobs are read from their documents. Start one with "
            f"`koan-ray dev`, or give the address of its cluster with --address."
        )
        raise RuntimeUnavailableError(msg)
