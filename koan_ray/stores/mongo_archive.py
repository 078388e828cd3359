"""Moving finished jobs between partitions: copy, then delete under a guard, with a note of what is under way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pymongo import DeleteMany, ReplaceOne

from koan_ray.domain.status import JobStatus
from koan_ray.killpoints import killpoint
from koan_ray.stores import mongo_schema
from koan_ray.stores.codec import SCHEMA_VERSION, Document, encode_execution, encode_job, first_date_from, to_date
from koan_ray.stores.mongo_database import READ_MS, SCAN_MS, Database

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from koan_ray.domain.records import ExecutionRecord, JobRecord
    from koan_ray.stores.mongo_blobs import Blobs
    from koan_ray.stores.mongo_records import Records

_MOVES: Final = "moves"  # the document of those that are under way
_FINAL: Final = tuple(status.value for status in JobStatus if status.is_final)


class Archive:
    """Finds, copies and deletes finished jobs.

    Args:
        inline_limit: Contexts and results with more bytes are kept outside of their documents.
        keeps_executions: False if the executions of these jobs live in another store.
    """

    def __init__(self, db: Database, records: Records, blobs: Blobs, *, inline_limit: int, keeps_executions: bool) -> None:
        self._db, self._records, self._blobs = db, records, blobs
        self._inline_limit, self._keeps_executions = inline_limit, keeps_executions

    async def settled_before(
        self, partition: str, statuses: Sequence[JobStatus], before: float, limit: int, kinds: Sequence[str] | None = None,
        *, after: tuple[float, str] | None = None,
    ) -> list[JobRecord]:  # fmt: skip
        """Return up to ``limit`` readable jobs that ended before an instant, oldest end first, then by id.

        ``before`` is in epoch seconds; ``after`` is the end, in epoch seconds, and the id of the job to go on after.
        """
        if partition not in await self._db.list_partitions():
            return []
        sought: Document = {
            "completed_at": {"$lt": first_date_from(before)},
            "status": {"$in": [status.value for status in statuses]},
        }
        if kinds is not None:
            sought["kind"] = {"$in": list(kinds)}
        place = None if after is None else (to_date(after[0]), after[1])
        with self._db.errors("looking for settled jobs"):
            oldest_first = [("completed_at", 1), ("_id", 1)]
            while True:
                cursor = self._db.jobs(partition).find(
                    _following(sought, place),
                    sort=oldest_first,
                    **self._db.along("completed"),
                    limit=limit,
                    max_time_ms=SCAN_MS,
                )
                documents = [document async for document in cursor]
                records = [await self._records.record_or_report(document, partition) for document in documents]
                readable = [record for record in records if record is not None]
                if readable or not documents:
                    return readable
                place = documents[-1]["completed_at"], documents[-1]["_id"]

    async def put_copy(self, job: JobRecord, executions: Sequence[ExecutionRecord], partition: str) -> None:
        """Write a copy; the job last, so that whoever finds it finds its executions, too."""
        await self._db.ensure(partition)
        with self._db.errors(f"copying job {job.id}"):
            await self._blobs.write(partition, [job])
            copies = [ReplaceOne({"_id": e.id}, encode_execution(e), upsert=True) for e in executions]
            if self._keeps_executions:
                stale = DeleteMany({"job_id": job.id, "_id": {"$nin": [execution.id for execution in executions]}})
                await self._db.executions(partition).bulk_write([stale, *copies])
            killpoint("archive.between_copies")
            document = encode_job(job, self._inline_limit)
            await self._db.jobs(partition).replace_one({"_id": job.id}, document, upsert=True)

    async def get_copy(self, job_id: str, partition: str) -> tuple[JobRecord, list[ExecutionRecord]] | None:
        """Return a job and its executions, oldest first, from one partition; None if the job is not there.

        Raises:
            RecordCorruptError: One of them cannot be read.
        """
        with self._db.errors(f"reading job {job_id} in partition {partition!r}"):
            document = await self._db.jobs(partition).find_one({"_id": job_id}, max_time_ms=READ_MS)
            if document is None:
                return None
            executions = await self._records.executions_of(partition, job_id, whole=True)
            return await self._records.record(document, partition), executions

    async def note_moves(self, partition: str, job_ids: Sequence[str]) -> None:
        """Note which jobs are about to be deleted from a partition, for `finish_moves` after a crash."""
        with self._db.errors(f"noting {len(job_ids)} moves"):
            noted = {"partition": partition, "jobs": list(job_ids), "schema_version": SCHEMA_VERSION}
            await self._db.collection(mongo_schema.META).update_one({"_id": _MOVES}, {"$set": noted}, upsert=True)

    async def finish_moves(self) -> int:
        """Delete what the noted jobs that are gone have left behind; returns how many executions that were."""
        with self._db.errors("finishing moves"):
            noted = await self._db.collection(mongo_schema.META).find_one({"_id": _MOVES}, max_time_ms=READ_MS)
            if noted is None:
                return 0
            partition, job_ids = noted["partition"], noted["jobs"]
            await self._db.ensure(partition)
            there = {found["_id"] async for found in self._db.jobs(partition).find({"_id": {"$in": job_ids}}, {"_id": 1})}
            left = {"job_id": {"$in": [job_id for job_id in job_ids if job_id not in there]}}
            result = await self._db.executions(partition).delete_many(left)
            await self._db.items(partition).delete_many(left)
            await self._db.collection(mongo_schema.META).delete_one({"_id": _MOVES})
            return int(result.deleted_count)

    async def delete_if(self, job: JobRecord, partition: str) -> bool:
        """Delete a finished job under its guard. Where it is gone already, what an interrupted deletion left goes, too."""
        with self._db.errors(f"deleting job {job.id} from partition {partition!r}"):
            jobs = self._db.jobs(partition)
            guard = {"_id": job.id, "rev": job.rev, "status": {"$in": list(_FINAL)}}
            document = await jobs.find_one_and_delete(guard)
            if document is None and await jobs.find_one({"_id": job.id}, {"_id": 1}) is not None:
                return False
            killpoint("archive.between_deletes")
            await self._db.executions(partition).delete_many({"job_id": job.id})
            await self._db.items(partition).delete_many({"job_id": job.id})
            await self._blobs.delete(partition, document or encode_job(job, self._inline_limit))
            return document is not None


def _following(sought: Document, place: tuple[datetime, str] | None) -> Document:
    """Return a filter for what follows an end and an id."""
    if place is None:
        return sought
    at, job_id = place
    following = [{"completed_at": {"$gt": at}}, {"completed_at": at, "_id": {"$gt": job_id}}]
    return {**sought, "completed_at": {**sought["completed_at"], "$gte": at}, "$or": following}
