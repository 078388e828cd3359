"""Reading everything in a partition, for whoever checks it or moves it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from koan_ray.domain.status import JobStatus
from koan_ray.errors import RecordCorruptError
from koan_ray.stores.codec import Document, decode_execution
from koan_ray.stores.mongo_database import BATCH, READ_MS, SCAN_MS, Database

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from koan_ray.domain.records import ExecutionRecord, JobRecord
    from koan_ray.stores.mongo_records import Records

_BATCH_BYTES: Final = 16 * 1024 * 1024  # of contexts and results, in one batch of a scan
_STATUSES: Final = frozenset(status.value for status in JobStatus)


class Scans:
    """Walks over all jobs of a partition, and looks up many at once."""

    def __init__(self, db: Database, records: Records) -> None:
        self._db, self._records = db, records

    async def scan(self, partition: str) -> AsyncIterator[list[JobRecord]]:
        """Walk the jobs by their ids, from page to page, so that no cursor has to live long; see `DocumentStore.scan`.

        Ids that are not text cannot be ours, nor paged with the others; they are told first.
        """
        jobs = self._db.jobs(partition)
        by_id = [("_id", 1)]
        with self._db.errors(f"reading all jobs of partition {partition!r}"):
            strange = {"_id": {"$not": {"$type": "string"}}}
            async for document in jobs.find(strange, {"_id": 1}, sort=by_id, **self._db.along("_id_"), max_time_ms=SCAN_MS):
                self._records.report(RecordCorruptError(str(document["_id"]), "_id", "expected text"))
            batch, size = [], 0
            async for document in self._by_id(jobs):
                if (record := await self._records.record_or_report(document, partition)) is not None:
                    batch.append(record)
                    size += len(record.context) + len(record.result or b"")
                if len(batch) == BATCH or size > _BATCH_BYTES:
                    yield batch
                    batch, size = [], 0
            if batch:
                yield batch

    async def _by_id(self, jobs: Any) -> AsyncIterator[Document]:
        """Read all documents in the order of their ids."""
        order = [("_id", 1)]
        if not self._db.connection.follows_hints:  # it would read everything again for each page
            texts = {"_id": {"$type": "string"}}
            async for document in jobs.find(texts, sort=order, batch_size=BATCH, max_time_ms=SCAN_MS):
                yield document
            return
        after, n_read = "", BATCH
        while n_read == BATCH:
            n_read = 0
            page = jobs.find({"_id": {"$gt": after}}, sort=order, hint="_id_", limit=BATCH, max_time_ms=SCAN_MS)
            async for document in page:
                after, n_read = document["_id"], n_read + 1
                yield document

    async def statuses(self, job_ids: Sequence[str], partition: str) -> dict[str, JobStatus]:
        """Return the statuses of those of these jobs that are there, by id; one that is no status is left out."""
        with self._db.errors(f"reading the statuses of {len(job_ids)} jobs"):
            sought = {"_id": {"$in": list(job_ids)}}
            cursor = self._db.jobs(partition).find(sought, {"status": 1}, **self._db.along("_id_"), max_time_ms=READ_MS)
            told = {document["_id"]: document.get("status") async for document in cursor}
        return {job_id: JobStatus(status) for job_id, status in told.items() if status in _STATUSES}

    async def executions_in(self, job_ids: Sequence[str], partition: str) -> list[ExecutionRecord]:
        """Return the executions of these jobs, oldest first; unreadable ones are told and left out."""
        found = []
        with self._db.errors(f"reading the executions of {len(job_ids)} jobs"):
            sought = {"job_id": {"$in": list(job_ids)}}
            async for document in self._db.executions(partition).find(sought, max_time_ms=SCAN_MS):
                try:
                    found.append(decode_execution(document))
                except RecordCorruptError as error:
                    self._records.report(error)
        return sorted(found, key=lambda execution: (execution.started_at, execution.id))
