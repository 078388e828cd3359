"""Reads stored jobs without an engine: what a coordinator answers about them, from the documents alone.

Nothing is changed and nobody is waited for. What it tells of a running job is as old as the coordinator's last flush.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

from koan_ray.domain.query import ALL_PARTITIONS, Query, parse_query
from koan_ray.domain.records import told, view
from koan_ray.engine.catalog import Catalog
from koan_ray.engine.messages import Details, execution_view
from koan_ray.errors import RuntimeUnavailableError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from koan_ray.domain.records import JobRecord, JobView
    from koan_ray.engine.messages import ExecutionView
    from koan_ray.ports import ActorInfo, DocumentStore, JobStore


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
        job = await self._catalog.found(job_id)
        return view(job)

    async def details(self, job_id: str) -> Details:
        """Return the bookkeeping of a job, as stored.

        Raises:
            JobNotFoundError: There is no such job.
        """
        job = await self._catalog.found(job_id)
        return await details_of(job, self._catalog)

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
        job = await self._catalog.found(job_id)
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


async def details_of(job: JobRecord, catalog: Catalog, actor: str | None = None, where: ActorInfo | None = None) -> Details:
    """Return the bookkeeping of a job.

    Args:
        job: It.
        catalog: Where it is kept, and those that may run it again.
        actor: The actor that it runs in now; without one, that of its last execution, as far as that is kept.
        where: Where this is.
    """
    if actor is None:
        executions = told(await catalog.executions(job))
        metrics = dict(executions[-1].metrics) if executions else {}
        actor, where = metrics.get("actor"), metrics.get("where")
    again = Query(retry_of=job.id, partition=ALL_PARTITIONS, limit=1)
    retries = (await catalog.query(again)).jobs if job.status.is_final else []
    residence = job.particulars.residence
    return Details(
        job.attempts, job.crashes, job.reason, job.due_at, job.particulars.retry_of, retries[0].id if retries else None,
        residence.source, residence.partition, actor, where.node_id if where is not None else None,
    )  # fmt: skip
