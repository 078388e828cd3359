"""Documents of jobs and executions as records: with their long contents, and with those told that cannot be read."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from gridfs.errors import CorruptGridFile

from koan_ray.errors import RecordCorruptError
from koan_ray.stores import mongo_filters, mongo_windows
from koan_ray.stores.codec import Document, blobs_named, decode_execution, decode_job
from koan_ray.stores.mongo_database import READ_MS, Database

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable
    from datetime import datetime

    from koan_ray.domain.records import ExecutionRecord, JobRecord
    from koan_ray.stores.mongo_blobs import Blobs


class Records:
    """Reads documents of one database as records.

    Args:
        source: The name of the source, which the records carry.
        on_corrupt: Told of documents that a scan or query skips, with their ids.
    """

    def __init__(
        self,
        db: Database,
        blobs: Blobs,
        *,
        source: str | None,
        on_corrupt: Callable[[str, RecordCorruptError], None] | None,
    ) -> None:
        self._db, self._blobs, self._source, self._on_corrupt = db, blobs, source, on_corrupt
        self._newest: dict[str, dict[str, datetime]] = defaultdict(dict)  # by partition; see `mongo_windows`

    async def record(self, document: Document, partition: str) -> JobRecord:
        """Return a document's job with its long contents.

        Raises:
            RecordCorruptError: It cannot be read as a job.
        """
        try:
            blobs = {name: await self._blobs.read(partition, name) for name in blobs_named(document)}
        except CorruptGridFile as error:
            raise RecordCorruptError(str(document.get("_id")), "context or result", f"cannot be read: {error}") from error
        found = {name: content for name, content in blobs.items() if content is not None}
        return decode_job(document, source=self._source, partition=partition, blobs=found)

    async def record_or_report(self, document: Document, partition: str) -> JobRecord | None:
        """Return a document's job, or tell of it and return None if it cannot be read."""
        try:
            return await self.record(document, partition)
        except RecordCorruptError as error:
            self.report(error)
            return None

    def report(self, error: RecordCorruptError) -> None:
        """Tell whoever wants to know of a document that is skipped."""
        if self._on_corrupt is not None:
            self._on_corrupt(error.record_id, error)

    async def executions_of(self, partition: str, job_id: str, *, whole: bool = False) -> list[ExecutionRecord]:
        """Return a job's executions in one partition, oldest first; unreadable ones are told and left out.

        Raises:
            RecordCorruptError: One of them cannot be read, and ``whole`` asks for all of them.
        """
        cursor = self._db.executions(partition).find({"job_id": job_id}, **self._db.along("job"), max_time_ms=READ_MS)
        found = []
        async for document in cursor:
            try:
                found.append(decode_execution(document))
            except RecordCorruptError as error:
                if whole:
                    raise
                self.report(error)
        return oldest_first(found)

    async def walk(
        self, partition: str, step: mongo_filters.Step, limit: int, fields: Document | None = None
    ) -> AsyncGenerator[Document]:
        """Find documents in the order of an index, up to ``limit``; 0: all. ``fields``: what of them."""
        jobs = self._db.jobs(partition)
        if not self._db.connection.follows_hints and mongo_windows.suits(step):
            async for document in mongo_windows.find(jobs, step, limit, READ_MS, self._newest[partition], fields):
                yield document
            return
        cursor = jobs.find(
            step.filter, fields, sort=step.sort, limit=limit, max_time_ms=READ_MS, **self._db.along(step.hint)
        )
        async for document in cursor:
            yield document


def oldest_first(executions: Iterable[ExecutionRecord]) -> list[ExecutionRecord]:
    """Return executions in the order of their starts, then ids."""
    return sorted(executions, key=lambda execution: (execution.started_at, execution.id))
