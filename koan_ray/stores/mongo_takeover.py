"""What a new lease holder does with the jobs of its slots: stamps them with its term and reads what is open."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from koan_ray.domain.archival import is_archive
from koan_ray.domain.lease import SLOTS
from koan_ray.domain.status import JobStatus
from koan_ray.errors import RecordCorruptError
from koan_ray.killpoints import killpoint
from koan_ray.stores import mongo_filters
from koan_ray.stores.codec import SCHEMA_VERSION, Document, decode_execution, first_date_from
from koan_ray.stores.mongo_database import BATCH, READ_MS, SCAN_MS, Database

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from koan_ray.domain.records import ExecutionRecord, JobRecord
    from koan_ray.stores.mongo_records import Records

_UNFINISHED: Final = tuple(status.value for status in JobStatus if not status.is_final)


class Takeover:
    """Stamps and reads the jobs and open executions of slots."""

    def __init__(self, db: Database, records: Records) -> None:
        self._db, self._records = db, records

    async def claim(self, slots: Sequence[int], term: int) -> int:
        """Stamp the unfinished jobs of these slots; see `DocumentStore.claim`. Documents of a later version are left alone.

        In pieces, because one update of everything would outlast any timeout; repeated until a pass finds nothing.
        """
        n_claimed = 0
        with self._db.errors("claiming jobs"):
            for partition in await self._db.refresh_partitions():
                while n := await self._claim_pass(partition, slots, term):
                    n_claimed += n
        return n_claimed

    async def _claim_pass(self, partition: str, slots: Sequence[int], term: int) -> int:
        n_claimed = 0
        for status in _UNFINISHED:
            ids = [job_id for _, job_id, _ in await self._older(partition, JobStatus(status), slots, term)]
            for start in range(0, len(ids), BATCH):
                n_claimed += await self._stamp(partition, ids[start : start + BATCH], term)
        return n_claimed

    async def take_over(
        self, slots: Sequence[int], term: int, statuses: Sequence[JobStatus]
    ) -> AsyncIterator[list[JobRecord]]:
        """Stamp and read in batches; see `DocumentStore.take_over`. Holds the ids of all that is to be stamped."""
        with self._db.errors("taking jobs over"):
            found: list[tuple[Any, str, str]] = []
            for partition in await self._db.refresh_partitions():
                for status in statuses:
                    found += await self._older(partition, status, slots, term)
            found.sort()
            for start in range(0, len(found), BATCH):
                chunk = found[start : start + BATCH]
                records: list[JobRecord] = []
                for partition in dict.fromkeys(partition for _, _, partition in chunk):
                    ids = [job_id for _, job_id, name in chunk if name == partition]
                    records += await self._stamp_and_read(partition, ids, term)
                yield sorted(records, key=lambda record: (record.created_at, record.id))

    async def _older(self, partition: str, status: JobStatus, slots: Sequence[int], term: int) -> list[tuple[Any, str, str]]:
        sought = {"status": status.value, "term": {"$lt": term}, "schema_version": SCHEMA_VERSION, **_slots(slots)}
        wanted = {"_id": 1, "created_at": 1}
        cursor = self._db.jobs(partition).find(
            sought, wanted, **self._db.along("status"), batch_size=10_000, max_time_ms=SCAN_MS
        )
        return [(document["created_at"], document["_id"], partition) async for document in cursor]

    async def _stamp_and_read(self, partition: str, ids: list[str], term: int) -> list[JobRecord]:
        await self._stamp(partition, ids, term)
        records = []
        async for document in self._db.jobs(partition).find({"_id": {"$in": ids}, "term": term}, max_time_ms=READ_MS):
            record = await self._records.record_or_report(document, partition)
            if record is not None and not record.status.is_final:
                records.append(record)
        return records

    async def _stamp(self, partition: str, ids: list[str], term: int) -> int:
        """Put a term on those of these jobs that are unfinished and have an older one; returns how many."""
        mine = {"_id": {"$in": ids}, "status": {"$in": list(_UNFINISHED)}, "term": {"$lt": term}}
        killpoint("takeover.before_stamp")
        result = await self._db.jobs(partition).update_many(mine, {"$set": {"term": term}, "$inc": {"rev": 1}})
        killpoint("takeover.after_stamp")
        return int(result.modified_count)

    async def unfinished(self, slots: Sequence[int], term: int) -> AsyncIterator[list[JobRecord]]:
        """Walk the unfinished jobs that carry the term, oldest first, in batches; see `DocumentStore.unfinished`."""
        with self._db.errors("reading the unfinished jobs"):
            scans = [
                self._unfinished_in(partition, status, {"term": term, **_slots(slots)})
                for partition in await self._db.refresh_partitions()
                for status in _UNFINISHED
            ]
            batch: list[JobRecord] = []
            async for record in _merged(scans):
                batch.append(record)
                if len(batch) == BATCH:
                    yield batch
                    batch = []
            if batch:
                yield batch

    async def _unfinished_in(self, partition: str, status: str, whose: Document) -> AsyncIterator[JobRecord]:
        oldest_first = [("created_at", 1), ("_id", 1)]
        sought = {"status": status, **whose}
        cursor = self._db.jobs(partition).find(
            sought, sort=oldest_first, **self._db.along("status"), batch_size=BATCH, max_time_ms=SCAN_MS
        )
        async for document in cursor:
            if (record := await self._records.record_or_report(document, partition)) is not None:
                yield record

    async def last_settled(self, slots: Sequence[int], limit: int) -> AsyncIterator[list[JobRecord]]:
        """Walk the finished jobs from the newest end; see `DocumentStore.last_settled`."""
        newest_first = [("completed_at", -1), ("_id", -1)]
        sought = {"completed_at": {"$gt": first_date_from(0.0)}, **_slots(slots)}
        with self._db.errors("reading the jobs that ended last"):
            for partition in await self._db.refresh_partitions():
                if is_archive(partition):
                    continue
                newest = self._records.walk(partition, mongo_filters.Step(sought, newest_first, "completed"), limit)
                records = [await self._records.record_or_report(document, partition) async for document in newest]
                if batch := [record for record in records if record is not None]:
                    yield batch

    async def open_executions(self, slots: Sequence[int]) -> AsyncIterator[list[ExecutionRecord]]:
        """Walk the executions of these slots that are not closed, in batches; unreadable ones are told and skipped."""
        with self._db.errors("reading the open executions"):
            for partition in await self._db.refresh_partitions():
                cursor = self._db.executions(partition).find(
                    {"open": {"$in": list(slots)}}, **self._db.along("open"), batch_size=BATCH, max_time_ms=SCAN_MS
                )
                batch: list[ExecutionRecord] = []
                async for document in cursor:
                    try:
                        batch.append(decode_execution(document))
                    except RecordCorruptError as error:
                        self._records.report(error)
                    if len(batch) == BATCH:
                        yield batch
                        batch = []
                if batch:
                    yield batch


def _slots(slots: Sequence[int]) -> Document:
    """Return the filter for some slots: none at all if that is every slot."""
    return {} if len(set(slots)) >= SLOTS else {"slot": {"$in": list(slots)}}


async def _merged(scans: list[AsyncIterator[JobRecord]]) -> AsyncIterator[JobRecord]:
    """Merge ordered scans into one, oldest first."""
    firsts = [(await anext(scan, None), scan) for scan in scans]
    heads = [(record, scan) for record, scan in firsts if record is not None]
    while heads:
        place = min(range(len(heads)), key=lambda n: (heads[n][0].created_at, heads[n][0].id))
        record, scan = heads[place]
        yield record
        if (following := await anext(scan, None)) is not None:
            heads[place] = (following, scan)
        else:
            del heads[place]
