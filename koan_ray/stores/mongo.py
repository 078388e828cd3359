"""Jobs in MongoDB, or in a server that speaks its protocol.

Uses single-document writes with a guard, bulk writes, sorted and filtered finds; no transactions, change streams, or
scripts. Everything acknowledged is on a majority of the servers and in their journals, and every read that decides
something is a majority read.

Each partition has a collection of jobs, one of executions and one of parts (``jobs.<partition>``); the leases have one for
all. The shape of the documents is told in `koan_ray.stores.codec`, the indexes in `koan_ray.stores.mongo_schema`.

`MongoStore` is what the others see: it answers single reads and queries, and hands all else on to the room that does it; the
package's docstring says which. All rooms work in one `Database`.

What is refused and what is not. A guarded update that meets another ``rev`` changes nothing and is reported, as is an insert
of an id that exists. What looks refused but is ours already, because the answer to an earlier attempt was lost, counts as
written: the stored fields are compared. So ``apply`` may be repeated as it is after a `StoreUnavailableError`.
"""

from __future__ import annotations

import contextlib
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from koan_ray.domain.archival import is_archive
from koan_ray.domain.query import ALL_PARTITIONS, Page
from koan_ray.stores import mongo_filters, mongo_schema
from koan_ray.stores.mongo_archive import Archive
from koan_ray.stores.mongo_blobs import Blobs
from koan_ray.stores.mongo_database import READ_MS, Database
from koan_ray.stores.mongo_leases import Leases
from koan_ray.stores.mongo_parts import Parts, UserDocuments
from koan_ray.stores.mongo_records import Records, oldest_first
from koan_ray.stores.mongo_scan import Scans
from koan_ray.stores.mongo_takeover import Takeover
from koan_ray.stores.mongo_writes import Writes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Sequence

    from koan_ray.domain.lease import Lease
    from koan_ray.domain.query import Query
    from koan_ray.domain.records import ExecutionRecord, JobRecord, Part
    from koan_ray.domain.status import JobStatus
    from koan_ray.errors import RecordCorruptError
    from koan_ray.ports import Change
    from koan_ray.stores.codec import Document
    from koan_ray.stores.mongo_driver import DriverName

_COMPLETE_BATCH: Final = 20  # jobs with their contents, which may be a megabyte each
_OUTLINE: Final[Document] = dict.fromkeys(
    ("context", "context_json", "context_blob", "result", "result_json", "result_blob", "items.state", "items.state_json"), 0
)  # what a list does not read


class MongoStore:
    """One database of jobs. Passed by `koan_ray.testing.contracts.DocumentStoreContract` with either driver.

    Args:
        url: ``mongodb://…``; the path names the database, ``koan`` if there is none.
        source: The name of the source, which records read from here carry.
        driver: ``pymongo`` or ``motor``.
        inline_limit: Contexts and results with more bytes are kept in GridFS.
        keeps_executions: False if the executions of these jobs live in another store.
        on_corrupt: Told of documents that a scan or query skipped, with their ids; a single read raises instead.
        read_only: Write nothing when opening: no collection, no index, no mark. Writes are the caller's not to make.
    """

    def __init__(
        self,
        url: str,
        *,
        source: str | None = None,
        driver: DriverName = "pymongo",
        inline_limit: int = 256 * 1024,
        keeps_executions: bool = True,
        on_corrupt: Callable[[str, RecordCorruptError], None] | None = None,
        read_only: bool = False,
    ) -> None:
        label = f"source {source!r}" if source is not None else "the document store"
        self._db = Database(url, driver, label=label, read_only=read_only)
        self._blobs = Blobs(self._db, inline_limit)
        self._records = Records(self._db, self._blobs, source=source, on_corrupt=on_corrupt)
        self._writes = Writes(self._db, self._blobs, inline_limit=inline_limit, keeps_executions=keeps_executions)
        self._leases = Leases(self._db)
        self._takeover = Takeover(self._db, self._records)
        self._parts = Parts(self._db)
        self._user_documents = UserDocuments(self._db)
        self._scans = Scans(self._db, self._records)
        self._archive = Archive(
            self._db, self._records, self._blobs, inline_limit=inline_limit, keeps_executions=keeps_executions
        )

    # --- opening and closing -------------------------------------------------------------------------------------------

    async def open(self) -> None:
        await self._db.open()

    async def close(self) -> None:
        await self._db.close()

    # --- guarded writes, in mongo_writes -------------------------------------------------------------------------------

    async def apply(self, changes: Sequence[Change]) -> list[Change]:
        return await self._writes.apply(changes)

    async def file_executions(self, changes: Sequence[Change]) -> None:
        await self._writes.file_executions(changes)

    async def close_executions(self, closed: Sequence[tuple[ExecutionRecord, str]]) -> int:
        return await self._writes.close_executions(closed)

    def excess(self, job: JobRecord) -> tuple[int, int] | None:
        return self._writes.excess(job)

    def objection(self, record: JobRecord | ExecutionRecord) -> str | None:
        return self._writes.objection(record)

    # --- reading and queries -------------------------------------------------------------------------------------------

    async def get(self, job_id: str) -> JobRecord | None:
        """Return the record of a job, whatever its partition.

        A job may be on its way to the archive: it is copied there before it is deleted here, so we look here, there, and
        here again in case it came back.
        """
        with self._db.errors(f"reading job {job_id}"):
            for partition in _in_order(self._db.partitions):
                if (found := await self._find(job_id, partition)) is not None:
                    return found
            known = set(self._db.partitions)
            for partition in await self._db.refresh_partitions():
                if partition not in known and (found := await self._find(job_id, partition)) is not None:
                    return found
        return None

    async def _find(self, job_id: str, partition: str) -> JobRecord | None:
        document = await self._db.jobs(partition).find_one({"_id": job_id}, max_time_ms=READ_MS)
        return None if document is None else await self._records.record(document, partition)

    async def executions(self, job_id: str) -> list[ExecutionRecord]:
        """Return a job's executions from where the job is, or from everywhere if it is not here.

        A copy gets its executions before its job, and what is deleted loses its job first; so executions that were read
        before their job is seen beside them are all there are. What an interrupted delete left without its job is no answer.
        """
        found: dict[str, ExecutionRecord] = {}
        with self._db.errors(f"reading the executions of job {job_id}"):
            for partition in _in_order(await self._db.refresh_partitions()):
                here = await self._records.executions_of(partition, job_id)
                if await self._db.jobs(partition).find_one({"_id": job_id}, {"_id": 1}, max_time_ms=READ_MS) is not None:
                    return here
                found.update((execution.id, execution) for execution in here)
        return oldest_first(found.values())

    async def query(self, query: Query) -> Page:
        """Return one page; ``partition="*"`` asks for all partitions, None for all but the archives."""
        return await self._query(query, None)

    async def outline(self, query: Query) -> Page:
        """Return one page as `query` does, of records without context, result and checkpoint body: for lists.

        ``b"null"`` stands in for context and body, and there is no result.
        """
        return await self._query(query, _OUTLINE)

    async def complete(self, job_ids: Sequence[str], partition: str) -> AsyncIterator[JobRecord]:
        """Iterate over those of these jobs that a partition holds, with their contents; unreadable ones are left out."""
        with self._db.errors(f"reading {len(job_ids)} jobs"):
            sought = {"_id": {"$in": list(job_ids)}}
            batch = {"batch_size": _COMPLETE_BATCH, "max_time_ms": READ_MS}
            async for document in self._db.jobs(partition).find(sought, **self._db.along("_id_"), **batch):
                if (record := await self._records.record_or_report(document, partition)) is not None:
                    yield record

    async def _query(self, query: Query, fields: Document | None) -> Page:
        with self._db.errors("answering a query"):
            found = []
            for partition in await self._asked_for(query):
                found += await self._page(query, partition, fields)
            found.sort(key=query.sort_key, reverse=query.descending)
            more = len(found) > query.limit
            found = found[: query.limit]
            return Page(found, query.cursor_after(found[-1]) if more else None)

    async def _page(self, query: Query, partition: str, fields: Document | None) -> list[JobRecord]:
        """Return up to one record more than a page of one partition."""
        found: list[JobRecord] = []
        checks = mongo_filters.needs_check(query)
        steps = deque(mongo_filters.steps(query))
        while steps:
            wanted = 0 if checks else query.limit + 1 - len(found)
            n_read, last = 0, None
            async with contextlib.aclosing(self._records.walk(partition, steps.popleft(), wanted, fields)) as documents:
                async for document in documents:
                    n_read, last = n_read + 1, document
                    if fields is not None:
                        document.setdefault("context", None)
                        document.get("items", {}).setdefault("state", None)
                    record = await self._records.record_or_report(document, partition)
                    if record is not None and (not checks or query.matches(record)):
                        found.append(record)
                    if len(found) > query.limit:
                        return found
            if last is not None and n_read == wanted:  # some of them cannot be read: the page goes on behind the last
                steps = deque(mongo_filters.steps(replace(query, after=mongo_filters.place_of(last, query.order_by))))
        return found

    async def count(self, query: Query) -> int:
        with self._db.errors("counting jobs"):
            return sum([await self._count(query, partition) for partition in await self._asked_for(query)])

    async def count_up_to(self, query: Query, at_most: int) -> int:
        """Return how many records match, and ``at_most`` where there are more: the index is walked no further."""
        with self._db.errors("counting jobs"):
            n = 0
            for partition in await self._asked_for(query):
                if n < at_most:
                    n += await self._count(query, partition, at_most - n)
            return n

    async def _count(self, query: Query, partition: str, at_most: int | None = None) -> int:
        sought, hint = mongo_filters.filter_of(query), mongo_filters.index_of(query)
        jobs = self._db.jobs(partition)
        if not mongo_filters.needs_check(query):
            limit = {} if at_most is None else {"limit": at_most}
            return int(await jobs.count_documents(sought, maxTimeMS=READ_MS, **limit, **self._db.along(hint)))
        n = 0
        cursor = jobs.find(sought, max_time_ms=READ_MS, **self._db.along(hint))
        async for document in cursor:
            record = await self._records.record_or_report(document, partition)
            n += record is not None and query.matches(record)
            if n == at_most:
                await cursor.close()
                break
        return n

    async def _asked_for(self, query: Query) -> list[str]:
        if query.partition == ALL_PARTITIONS:
            return await self._db.refresh_partitions()
        if query.partition is None:
            return [partition for partition in await self._db.refresh_partitions() if not is_archive(partition)]
        partition = query.partition
        mongo_schema.collection_name(mongo_schema.JOBS, partition)
        if partition not in self._db.partitions and partition not in await self._db.refresh_partitions():
            return []
        return [partition]

    async def partitions(self) -> list[str]:
        return await self._db.list_partitions()

    # --- deleting ------------------------------------------------------------------------------------------------------

    async def remove(self, job_id: str) -> bool:
        """Delete a job, its executions first: what an interruption leaves is a job, and removing it again finishes it."""
        with self._db.errors(f"removing job {job_id}"):
            was_there = False
            for partition in await self._db.refresh_partitions():
                await self._db.executions(partition).delete_many({"job_id": job_id})
                document = await self._db.jobs(partition).find_one_and_delete({"_id": job_id})
                if document is not None:
                    was_there = True
                    await self._blobs.delete(partition, document)
                await self._db.items(partition).delete_many({"job_id": job_id})
            return was_there

    async def expire(self, now: float) -> int:
        """Delete nothing: what is stored stays until the archivist or a person removes it."""
        return 0

    # --- leases, in mongo_leases ---------------------------------------------------------------------------------------

    async def read_lease(self, shard: str) -> Lease | None:
        return await self._leases.read_lease(shard)

    async def take_lease(self, shard: str, *, holder: str, seen: Lease | None, at_least: int = 1) -> Lease | None:
        return await self._leases.take_lease(shard, holder=holder, seen=seen, at_least=at_least)

    async def latest_term(self, shards: Sequence[str]) -> int:
        return await self._leases.latest_term(shards)

    async def beat(self, lease: Lease) -> Lease | None:
        return await self._leases.beat(lease)

    async def release(self, lease: Lease) -> None:
        await self._leases.release(lease)

    # --- taking over, in mongo_takeover --------------------------------------------------------------------------------

    async def claim(self, slots: Sequence[int], term: int) -> int:
        return await self._takeover.claim(slots, term)

    def take_over(self, slots: Sequence[int], term: int, statuses: Sequence[JobStatus]) -> AsyncIterator[list[JobRecord]]:
        return self._takeover.take_over(slots, term, statuses)

    def unfinished(self, slots: Sequence[int], term: int) -> AsyncIterator[list[JobRecord]]:
        return self._takeover.unfinished(slots, term)

    def last_settled(self, slots: Sequence[int], limit: int) -> AsyncIterator[list[JobRecord]]:
        return self._takeover.last_settled(slots, limit)

    def open_executions(self, slots: Sequence[int]) -> AsyncIterator[list[ExecutionRecord]]:
        return self._takeover.open_executions(slots)

    # --- parts and the documents of users, in mongo_parts --------------------------------------------------------------

    async def write_parts(self, partition: str, parts: Sequence[Part]) -> None:
        await self._parts.write_parts(partition, parts)

    async def read_parts(self, partition: str, job_id: str, stream: str, after: int = -1, limit: int = 50) -> list[Part]:
        return await self._parts.read_parts(partition, job_id, stream, after, limit)

    async def drop_parts(self, partition: str, job_id: str, stream: str, from_seq: int, *, below: int) -> None:
        await self._parts.drop_parts(partition, job_id, stream, from_seq, below=below)

    def jobs_with_parts(self, partition: str) -> AsyncIterator[list[str]]:
        return self._parts.jobs_with_parts(partition)

    async def write_documents(self, collection: str, job_id: str, first: int, bodies: Sequence[bytes]) -> None:
        await self._user_documents.write_documents(collection, job_id, first, bodies)

    async def drop_documents(self, collection: str, job_id: str, from_number: int) -> None:
        await self._user_documents.drop_documents(collection, job_id, from_number)

    # --- looking at everything, in mongo_scan --------------------------------------------------------------------------

    def scan(self, partition: str) -> AsyncIterator[list[JobRecord]]:
        return self._scans.scan(partition)

    async def statuses(self, job_ids: Sequence[str], partition: str) -> dict[str, JobStatus]:
        return await self._scans.statuses(job_ids, partition)

    async def executions_in(self, job_ids: Sequence[str], partition: str) -> list[ExecutionRecord]:
        return await self._scans.executions_in(job_ids, partition)

    # --- archiving, in mongo_archive -----------------------------------------------------------------------------------

    async def settled_before(
        self, partition: str, statuses: Sequence[JobStatus], before: float, limit: int, kinds: Sequence[str] | None = None,
        *, after: tuple[float, str] | None = None,
    ) -> list[JobRecord]:  # fmt: skip
        return await self._archive.settled_before(partition, statuses, before, limit, kinds, after=after)

    async def put_copy(self, job: JobRecord, executions: Sequence[ExecutionRecord], partition: str) -> None:
        await self._archive.put_copy(job, executions, partition)

    async def get_copy(self, job_id: str, partition: str) -> tuple[JobRecord, list[ExecutionRecord]] | None:
        return await self._archive.get_copy(job_id, partition)

    async def note_moves(self, partition: str, job_ids: Sequence[str]) -> None:
        await self._archive.note_moves(partition, job_ids)

    async def finish_moves(self) -> int:
        return await self._archive.finish_moves()

    async def delete_if(self, job: JobRecord, partition: str) -> bool:
        return await self._archive.delete_if(job, partition)


def _in_order(partitions: Iterable[str]) -> list[str]:
    active = [name for name in partitions if not is_archive(name)]
    archives = [name for name in partitions if is_archive(name)]
    return [*active, *archives, *active] if archives else active
