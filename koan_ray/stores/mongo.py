"""Jobs in MongoDB, or in a server that speaks its protocol.

Uses single-document writes with a guard, bulk writes, sorted and filtered finds; no transactions, change streams, or
scripts. Everything acknowledged is on a majority of the servers and in their journals, and every read that decides
something is a majority read.

Each partition has a collection of jobs, one of executions and one of parts (``jobs.<partition>``); the leases have one for
all. The shape
of the documents is told in `koan_ray.stores.codec`, the indexes in `koan_ray.stores.mongo_schema`.

What is refused and what is not. A guarded update that meets another ``rev`` changes nothing and is reported, as is an insert
of an id that exists. What looks refused but is ours already, because the answer to an earlier attempt was lost, counts as
written: the stored fields are compared. So ``apply`` may be repeated as it is after a `StoreUnavailableError`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final

from bson import encode as to_bson
from bson.errors import InvalidDocument
from gridfs.errors import FileExists, NoFile
from pymongo import DeleteMany, DeleteOne, InsertOne, ReplaceOne, ReturnDocument, UpdateOne, errors

from koan_ray.domain.archival import is_archive
from koan_ray.domain.lease import SLOTS, Lease
from koan_ray.domain.query import ALL_PARTITIONS, Page
from koan_ray.domain.status import ExecutionStatus, JobStatus
from koan_ray.errors import ConfigurationError, RecordCorruptError, StoreUnavailableError
from koan_ray.killpoints import killpoint
from koan_ray.stores import mongo_filters, mongo_schema, mongo_windows
from koan_ray.stores.codec import (
    SCHEMA_VERSION,
    STATE_FIELDS,
    Document,
    blobs_named,
    blobs_of,
    check_collection,
    decode_execution,
    decode_job,
    decode_part,
    encode_closing,
    encode_execution,
    encode_job,
    encode_opening,
    encode_part,
    encode_update,
    encode_value,
    first_date_from,
    to_date,
    value_id,
)
from koan_ray.stores.mongo_driver import Connection, is_unknown_outcome, refused_operations

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
    from datetime import datetime

    from koan_ray.domain.query import Query
    from koan_ray.domain.records import ExecutionRecord, JobRecord, Part
    from koan_ray.ports import Change
    from koan_ray.stores.mongo_driver import DriverName

_BATCH: Final = 500
_BATCH_BYTES: Final = 16 * 1024 * 1024  # of contexts and results, in one batch of a scan
_PAGE_BYTES: Final = 8 * 1024 * 1024  # of parts in one answer
_KEYS: Final = 2000  # entries of an index that are looked at together
_MOVES: Final = "moves"  # the document of those that are under way
_READ_MS: Final = 8_000  # the server gives up on a read after this long
_SCAN_MS: Final = 120_000  # and on one of the scans at a start
_MAX_DOCUMENT: Final = 16 * 1024 * 1024
_STATUSES: Final = frozenset(status.value for status in JobStatus)
_UNFINISHED: Final = tuple(status.value for status in JobStatus if not status.is_final)
_FINAL: Final = tuple(status.value for status in JobStatus if status.is_final)
_RUNNING: Final = ExecutionStatus.RUNNING.value
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
        self._url, self._source, self._driver = url, source, driver
        self._inline_limit, self._keeps_executions = inline_limit, keeps_executions
        self._on_corrupt, self._read_only = on_corrupt, read_only
        self._label = f"source {source!r}" if source is not None else "the document store"
        self._connection: Connection | None = None
        self._opening = asyncio.Lock()
        self._ensuring = asyncio.Lock()
        self._newest: dict[str, dict[str, datetime]] = defaultdict(dict)  # by partition; see `mongo_windows`
        self._partitions: dict[str, None] = {}  # those whose collections are known to be in order

    # --- opening and closing -----------------------------------------------------------------------------------------

    async def open(self) -> None:
        async with self._opening:
            if self._connection is not None:
                return
            connection = Connection(self._url, self._driver, label=self._label)
            try:
                with connection.errors("connecting"):
                    await connection.db.command("ping")
                    await connection.know_server()
                    await self._prepare(connection)
            except BaseException:
                await connection.close()
                raise
            self._connection = connection

    async def close(self) -> None:
        async with self._opening:
            connection, self._connection = self._connection, None
            self._partitions.clear()
            if connection is not None:
                await connection.close()

    async def _prepare(self, connection: Connection) -> None:
        if self._read_only:
            return
        await self._check_acknowledgement(connection)
        for partition in mongo_schema.partitions_in(await connection.db.list_collection_names()):
            await mongo_schema.ensure_partition(connection, partition)
            self._partitions[partition] = None

    async def _check_acknowledgement(self, connection: Connection) -> None:
        """Make the first write with our write concern: can the server keep it?"""
        mark = {"$setOnInsert": {"schema_version": SCHEMA_VERSION}}
        try:
            await connection.db[mongo_schema.META].update_one({"_id": "koan_ray"}, mark, upsert=True)
        except errors.DuplicateKeyError:
            pass  # two opened a new database at once
        except errors.WTimeoutError:
            raise
        except errors.WriteConcernError as error:
            raise ConfigurationError(
                f"{self._label}: the server cannot acknowledge writes by a majority ({error}); durable jobs need that"
            ) from None

    @property
    def _db(self) -> Any:
        return self._open_connection().db

    def _open_connection(self) -> Connection:
        if self._connection is None:
            raise StoreUnavailableError(f"{self._label}: is not open; call open() first")
        return self._connection

    def _along(self, index: str) -> dict[str, Any]:
        """Return the option that names the index to walk, for a server that profits from it."""
        if self._read_only and index == mongo_schema.LATEST_INDEX:
            return {}  # no writer of this version may have been here yet, and to name what is missing is an error
        return {"hint": index} if self._open_connection().follows_hints else {}

    def _jobs(self, partition: str) -> Any:
        return self._db[mongo_schema.collection_name(mongo_schema.JOBS, partition)]

    def _executions(self, partition: str) -> Any:
        return self._db[mongo_schema.collection_name(mongo_schema.EXECUTIONS, partition)]

    def _items(self, partition: str) -> Any:
        return self._db[mongo_schema.collection_name(mongo_schema.ITEMS, partition)]

    async def _ensure(self, partition: str) -> None:
        """Make sure of a partition's collections before the first write to it."""
        if partition in self._partitions:
            return
        mongo_schema.collection_name(mongo_schema.JOBS, partition)
        async with self._ensuring:
            if partition not in self._partitions and not self._read_only:
                with self._errors(f"preparing partition {partition!r}"):
                    await mongo_schema.ensure_partition(self._open_connection(), partition)
            self._partitions[partition] = None

    def _errors(self, doing: str) -> contextlib.AbstractContextManager[None]:
        return self._open_connection().errors(doing)

    # --- guarded writes ----------------------------------------------------------------------------------------------

    async def apply(self, changes: Sequence[Change]) -> list[Change]:
        """Write what is guarded right; see `JobStore.apply`.

        Cost: for each partition one round trip for the jobs and one for the executions, and one more where something was
        refused. A change whose document would be larger than MongoDB's 16 MB is among the refused.
        """
        by_partition: dict[str, list[Change]] = defaultdict(list)
        for change in changes:
            by_partition[change.job.particulars.residence.partition].append(change)
        refused: list[Change] = []
        for partition, group in by_partition.items():
            await self._ensure(partition)
            refused += await self._apply_to(partition, group)
        return refused

    async def _apply_to(self, partition: str, changes: list[Change]) -> list[Change]:
        with self._errors(f"writing {len(changes)} jobs"):
            await self._write_blobs(partition, [change.job for change in changes])
            killpoint("flush.before_jobs")
            refused = await self._write_jobs(partition, changes)
            if refused:
                await self._delete_unused_blobs(partition, [change.job for change in refused if change.expect == 0])
            gone = {id(change) for change in refused}
            kept = [change for change in changes if id(change) not in gone] if refused else changes
            audited = [change for change in kept if self._is_audited(change.job)]
            if any(change.executions for change in audited):
                killpoint("flush.between")
            await self._write_executions(
                partition,
                [execution for change in audited if change.expect > 1 for execution in change.executions],
                # Of a job that was only queued so far no execution can be there: an insert costs a quarter of an upsert.
                new=[execution for change in audited if change.expect <= 1 for execution in change.executions],
            )
            killpoint("flush.after_executions")
        return refused

    def _is_audited(self, job: JobRecord) -> bool:
        return self._keeps_executions and job.particulars.residence.audit

    async def _write_jobs(self, partition: str, changes: list[Change]) -> list[Change]:
        operations = [self._operation(change) for change in changes]
        doubtful: list[int] = []
        too_large: set[int] = set()
        try:
            result = await self._jobs(partition).bulk_write(operations, ordered=False)
            n_matched = result.matched_count
        except errors.DocumentTooLarge:
            # The driver noticed, and may have sent some already; those are recognised as ours.
            giants = _too_large(changes, operations)
            if not giants:
                raise
            gone = {id(change) for change in giants}
            return giants + await self._write_jobs(partition, [change for change in changes if id(change) not in gone])
        except errors.BulkWriteError as error:
            if is_unknown_outcome(error):
                raise
            duplicates, too_large = refused_operations(error)
            doubtful += duplicates
            n_matched = error.details.get("nMatched", 0)
        updates = [place for place, change in enumerate(changes) if change.expect != 0 and place not in too_large]
        if n_matched < len(updates):
            doubtful += updates
        refused = await self._not_ours(partition, [changes[place] for place in sorted(doubtful)])
        return [changes[place] for place in sorted(too_large)] + refused

    def _operation(self, change: Change) -> Any:
        if change.expect == 0:
            return InsertOne(encode_job(change.job, self._inline_limit))
        return UpdateOne({"_id": change.job.id, "rev": change.expect}, encode_update(change.job, self._inline_limit))

    async def _not_ours(self, partition: str, doubtful: list[Change]) -> list[Change]:
        """Return those changes whose state is not what is stored."""
        if not doubtful:
            return []
        ids = [change.job.id for change in doubtful]
        stored = {document["_id"]: document async for document in self._jobs(partition).find({"_id": {"$in": ids}})}
        return [change for change in doubtful if not self._is_stored(change, stored.get(change.job.id))]

    def _is_stored(self, change: Change, stored: Document | None) -> bool:
        if stored is None:
            return False
        ours = encode_job(change.job, self._inline_limit)
        compared = STATE_FIELDS if change.expect != 0 else {*ours, *STATE_FIELDS}
        return all(ours.get(name) == stored.get(name) for name in compared)

    async def _write_executions(
        self, partition: str, executions: Sequence[ExecutionRecord], new: Sequence[ExecutionRecord] = ()
    ) -> int:
        """Write executions; those that are closed already stay as they are. ``new``: none of these should be there yet."""
        guarded = [_execution_operation(execution) for execution in executions]
        if not guarded and not new:
            return 0
        operations = [*guarded, *(InsertOne(encode_execution(execution)) for execution in new)]
        try:
            result = await self._executions(partition).bulk_write(operations, ordered=False)
        except errors.BulkWriteError as error:
            if is_unknown_outcome(error):
                raise
            # A duplicate key. Of a guarded one: it is there and not running, so it is closed, and is not rewritten.
            duplicates, _ = refused_operations(error)
            known = [new[place - len(guarded)] for place in duplicates if place >= len(guarded)]
            n_changed = sum(int(error.details.get(name, 0)) for name in ("nModified", "nUpserted", "nInserted"))
            return n_changed + await self._write_executions(partition, known)
        return int(result.modified_count) + int(result.upserted_count) + int(result.inserted_count)

    def excess(self, job: JobRecord) -> tuple[int, int] | None:
        size = len(to_bson(encode_job(job, self._inline_limit)))
        return (size, _MAX_DOCUMENT) if size > _MAX_DOCUMENT else None

    # --- reading -----------------------------------------------------------------------------------------------------

    async def get(self, job_id: str) -> JobRecord | None:
        """Return the record of a job, whatever its partition.

        A job may be on its way to the archive: it is copied there before it is deleted here, so we look here, there, and
        here again in case it came back.
        """
        with self._errors(f"reading job {job_id}"):
            for partition in _in_order(self._partitions):
                if (found := await self._find(job_id, partition)) is not None:
                    return found
            known = set(self._partitions)
            for partition in await self._refresh_partitions():
                if partition not in known and (found := await self._find(job_id, partition)) is not None:
                    return found
        return None

    async def _find(self, job_id: str, partition: str) -> JobRecord | None:
        document = await self._jobs(partition).find_one({"_id": job_id}, max_time_ms=_READ_MS)
        return None if document is None else await self._record(document, partition)

    async def executions(self, job_id: str) -> list[ExecutionRecord]:
        """Return a job's executions from where the job is, or from everywhere if it is not here.

        A copy gets its executions before its job, and what is deleted loses its job first; so executions that were read
        before their job is seen beside them are all there are. What an interrupted delete left without its job is no answer.
        """
        found: dict[str, ExecutionRecord] = {}
        with self._errors(f"reading the executions of job {job_id}"):
            for partition in _in_order(await self._refresh_partitions()):
                here = await self._executions_in(partition, job_id)
                if await self._jobs(partition).find_one({"_id": job_id}, {"_id": 1}, max_time_ms=_READ_MS) is not None:
                    return here
                found.update((execution.id, execution) for execution in here)
        return _oldest_first(found.values())

    async def _executions_in(self, partition: str, job_id: str) -> list[ExecutionRecord]:
        cursor = self._executions(partition).find({"job_id": job_id}, **self._along("job"), max_time_ms=_READ_MS)
        return _oldest_first([decode_execution(document) async for document in cursor])

    async def query(self, query: Query) -> Page:
        """Return one page; ``partition="*"`` asks for all partitions, None for all but the archives."""
        return await self._query(query, None)

    async def outline(self, query: Query) -> Page:
        """Return one page as `query` does, of records without context, result and checkpoint body: for lists.

        ``b"null"`` stands in for context and body, and there is no result.
        """
        return await self._query(query, _OUTLINE)

    async def _query(self, query: Query, fields: Document | None) -> Page:
        with self._errors("answering a query"):
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
        for step in mongo_filters.steps(query):
            wanted = 0 if checks else query.limit + 1 - len(found)
            async with contextlib.aclosing(self._walk(partition, step, wanted, fields)) as documents:
                async for document in documents:
                    if fields is not None:
                        document.setdefault("context", None)
                        document.get("items", {}).setdefault("state", None)
                    record = await self._record_or_report(document, partition)
                    if record is not None and (not checks or query.matches(record)):
                        found.append(record)
                    if len(found) > query.limit:
                        return found
        return found

    async def _walk(
        self, partition: str, step: mongo_filters.Step, limit: int, fields: Document | None = None
    ) -> AsyncGenerator[Document]:
        """Find documents in the order of an index, up to ``limit``; 0: all. ``fields``: what of them."""
        jobs = self._jobs(partition)
        if not self._open_connection().follows_hints and mongo_windows.suits(step):
            async for document in mongo_windows.find(jobs, step, limit, _READ_MS, self._newest[partition], fields):
                yield document
            return
        cursor = jobs.find(step.filter, fields, sort=step.sort, limit=limit, max_time_ms=_READ_MS, **self._along(step.hint))
        async for document in cursor:
            yield document

    async def count(self, query: Query) -> int:
        with self._errors("counting jobs"):
            return sum([await self._count(query, partition) for partition in await self._asked_for(query)])

    async def count_up_to(self, query: Query, at_most: int) -> int:
        """Return how many records match, and ``at_most`` where there are more: the index is walked no further."""
        with self._errors("counting jobs"):
            n = 0
            for partition in await self._asked_for(query):
                if n < at_most:
                    n += await self._count(query, partition, at_most - n)
            return n

    async def _count(self, query: Query, partition: str, at_most: int | None = None) -> int:
        sought, hint = mongo_filters.filter_of(query), mongo_filters.index_of(query)
        jobs = self._jobs(partition)
        if not mongo_filters.needs_check(query):
            limit = {} if at_most is None else {"limit": at_most}
            return int(await jobs.count_documents(sought, maxTimeMS=_READ_MS, **limit, **self._along(hint)))
        n = 0
        cursor = jobs.find(sought, max_time_ms=_READ_MS, **self._along(hint))
        async for document in cursor:
            record = await self._record_or_report(document, partition)
            n += record is not None and query.matches(record)
            if n == at_most:
                await cursor.close()
                break
        return n

    async def _asked_for(self, query: Query) -> list[str]:
        if query.partition == ALL_PARTITIONS:
            return await self._refresh_partitions()
        if query.partition is None:
            return [partition for partition in await self._refresh_partitions() if not is_archive(partition)]
        partition = query.partition
        mongo_schema.collection_name(mongo_schema.JOBS, partition)
        if partition not in self._partitions and partition not in await self._refresh_partitions():
            return []
        return [partition]

    async def partitions(self) -> list[str]:
        with self._errors("listing partitions"):
            return await self._refresh_partitions()

    async def _refresh_partitions(self) -> list[str]:
        """Return the partitions there are, also those that somebody else has begun."""
        for name in mongo_schema.partitions_in(await self._db.list_collection_names()):
            await self._ensure(name)
        return list(self._partitions)

    async def _record(self, document: Document, partition: str) -> JobRecord:
        blobs = {name: await self._read_blob(partition, name) for name in blobs_named(document)}
        found = {name: content for name, content in blobs.items() if content is not None}
        return decode_job(document, source=self._source, partition=partition, blobs=found)

    async def _record_or_report(self, document: Document, partition: str) -> JobRecord | None:
        try:
            return await self._record(document, partition)
        except RecordCorruptError as error:
            self._report(error)
            return None

    def _report(self, error: RecordCorruptError) -> None:
        if self._on_corrupt is not None:
            self._on_corrupt(error.record_id, error)

    # --- deleting ----------------------------------------------------------------------------------------------------

    async def remove(self, job_id: str) -> bool:
        """Delete a job, its executions first: what an interruption leaves is a job, and removing it again finishes it."""
        with self._errors(f"removing job {job_id}"):
            was_there = False
            for partition in await self._refresh_partitions():
                await self._executions(partition).delete_many({"job_id": job_id})
                document = await self._jobs(partition).find_one_and_delete({"_id": job_id})
                if document is not None:
                    was_there = True
                    await self._delete_blobs(partition, document)
                await self._items(partition).delete_many({"job_id": job_id})
            return was_there

    async def expire(self, now: float) -> int:
        """Delete nothing: what is stored stays until the archivist or a person removes it."""
        return 0

    # --- leases ------------------------------------------------------------------------------------------------------

    async def read_lease(self, shard: str) -> Lease | None:
        with self._errors(f"reading the lease of {shard}"):
            return _lease(await self._db[mongo_schema.LEASES].find_one({"_id": shard}, max_time_ms=_READ_MS))

    async def take_lease(self, shard: str, *, holder: str, seen: Lease | None, at_least: int = 1) -> Lease | None:
        with self._errors(f"taking the lease of {shard}"):
            if seen is not None:
                term = max(seen.term + 1, at_least)
                return await self._change_lease(seen, {"$set": {"holder": holder, "term": term}, "$inc": {"beat": 1}})
            taken = Lease(shard, holder, at_least, 1)
            document = {"_id": shard, "holder": holder, "term": at_least, "beat": 1, "schema_version": SCHEMA_VERSION}
            try:
                await self._db[mongo_schema.LEASES].insert_one(document)
            except errors.DuplicateKeyError:
                return None
            return taken

    async def latest_term(self, shards: Sequence[str]) -> int:
        with self._errors("reading the leases"):
            cursor = self._db[mongo_schema.LEASES].find({"_id": {"$in": list(shards)}}, {"term": 1}, max_time_ms=_READ_MS)
            return max([int(document["term"]) async for document in cursor], default=0)

    async def beat(self, lease: Lease) -> Lease | None:
        with self._errors(f"beating for {lease.shard}"):
            held = {"_id": lease.shard, "holder": lease.holder, "term": lease.term}
            return await self._swap_lease(held, {"$inc": {"beat": 1}})

    async def release(self, lease: Lease) -> None:
        """Give the lease back: its holder becomes the empty text, which nobody has to observe before taking over."""
        with self._errors(f"releasing {lease.shard}"):
            held = {"_id": lease.shard, "holder": lease.holder, "term": lease.term}
            await self._swap_lease(held, {"$set": {"holder": ""}, "$inc": {"beat": 1}})

    async def _change_lease(self, seen: Lease, update: Document) -> Lease | None:
        as_seen = {"_id": seen.shard, "holder": seen.holder, "term": seen.term, "beat": seen.beat}
        return await self._swap_lease(as_seen, update)

    async def _swap_lease(self, guard: Document, update: Document) -> Lease | None:
        leases = self._db[mongo_schema.LEASES]
        return _lease(await leases.find_one_and_update(guard, update, return_document=ReturnDocument.AFTER))

    # --- taking over -------------------------------------------------------------------------------------------------

    async def claim(self, slots: Sequence[int], term: int) -> int:
        """Stamp the unfinished jobs of these slots; see `DocumentStore.claim`. Documents of a later version are left alone.

        In pieces, because one update of everything would outlast any timeout; repeated until a pass finds nothing.
        """
        n_claimed = 0
        with self._errors("claiming jobs"):
            for partition in await self._refresh_partitions():
                while n := await self._claim_pass(partition, slots, term):
                    n_claimed += n
        return n_claimed

    async def take_over(
        self, slots: Sequence[int], term: int, statuses: Sequence[JobStatus]
    ) -> AsyncIterator[list[JobRecord]]:
        """Stamp and read in batches; see `DocumentStore.take_over`. Holds the ids of all that is to be stamped."""
        with self._errors("taking jobs over"):
            found: list[tuple[Any, str, str]] = []
            for partition in await self._refresh_partitions():
                for status in statuses:
                    found += await self._older(partition, status, slots, term)
            found.sort()
            for start in range(0, len(found), _BATCH):
                chunk = found[start : start + _BATCH]
                records: list[JobRecord] = []
                for partition in dict.fromkeys(partition for _, _, partition in chunk):
                    ids = [job_id for _, job_id, name in chunk if name == partition]
                    records += await self._stamp_and_read(partition, ids, term)
                yield sorted(records, key=lambda record: (record.created_at, record.id))

    async def _older(self, partition: str, status: JobStatus, slots: Sequence[int], term: int) -> list[tuple[Any, str, str]]:
        sought = {"status": status.value, "term": {"$lt": term}, "schema_version": SCHEMA_VERSION, **_slots(slots)}
        wanted = {"_id": 1, "created_at": 1}
        cursor = self._jobs(partition).find(sought, wanted, **self._along("status"), batch_size=10_000, max_time_ms=_SCAN_MS)
        return [(document["created_at"], document["_id"], partition) async for document in cursor]

    async def _stamp_and_read(self, partition: str, ids: list[str], term: int) -> list[JobRecord]:
        await self._stamp(partition, ids, term)
        records = []
        async for document in self._jobs(partition).find({"_id": {"$in": ids}, "term": term}, max_time_ms=_READ_MS):
            record = await self._record_or_report(document, partition)
            if record is not None and not record.status.is_final:
                records.append(record)
        return records

    async def _claim_pass(self, partition: str, slots: Sequence[int], term: int) -> int:
        n_claimed = 0
        for status in _UNFINISHED:
            ids = [job_id for _, job_id, _ in await self._older(partition, JobStatus(status), slots, term)]
            for start in range(0, len(ids), _BATCH):
                n_claimed += await self._stamp(partition, ids[start : start + _BATCH], term)
        return n_claimed

    async def _stamp(self, partition: str, ids: list[str], term: int) -> int:
        """Put a term on those of these jobs that are unfinished and have an older one; returns how many."""
        mine = {"_id": {"$in": ids}, "status": {"$in": list(_UNFINISHED)}, "term": {"$lt": term}}
        killpoint("takeover.before_stamp")
        result = await self._jobs(partition).update_many(mine, {"$set": {"term": term}, "$inc": {"rev": 1}})
        killpoint("takeover.after_stamp")
        return int(result.modified_count)

    async def unfinished(self, slots: Sequence[int], term: int) -> AsyncIterator[list[JobRecord]]:
        with self._errors("reading the unfinished jobs"):
            scans = [
                self._unfinished_in(partition, status, {"term": term, **_slots(slots)})
                for partition in await self._refresh_partitions()
                for status in _UNFINISHED
            ]
            batch: list[JobRecord] = []
            async for record in _merged(scans):
                batch.append(record)
                if len(batch) == _BATCH:
                    yield batch
                    batch = []
            if batch:
                yield batch

    async def _unfinished_in(self, partition: str, status: str, whose: Document) -> AsyncIterator[JobRecord]:
        oldest_first = [("created_at", 1), ("_id", 1)]
        sought = {"status": status, **whose}
        cursor = self._jobs(partition).find(
            sought, sort=oldest_first, **self._along("status"), batch_size=_BATCH, max_time_ms=_SCAN_MS
        )
        async for document in cursor:
            if (record := await self._record_or_report(document, partition)) is not None:
                yield record

    async def last_settled(self, slots: Sequence[int], limit: int) -> AsyncIterator[list[JobRecord]]:
        """Walk the finished jobs from the newest end; see `DocumentStore.last_settled`."""
        newest_first = [("completed_at", -1), ("_id", -1)]
        sought = {"completed_at": {"$gt": first_date_from(0.0)}, **_slots(slots)}
        with self._errors("reading the jobs that ended last"):
            for partition in await self._refresh_partitions():
                if is_archive(partition):
                    continue
                newest = self._walk(partition, mongo_filters.Step(sought, newest_first, "completed"), limit)
                records = [await self._record_or_report(document, partition) async for document in newest]
                if batch := [record for record in records if record is not None]:
                    yield batch

    async def file_executions(self, changes: Sequence[Change]) -> None:
        """Write executions of jobs that are written; see `JobStore.file_executions`."""
        by_partition: dict[str, list[ExecutionRecord]] = defaultdict(list)
        for change in changes:
            if change.job.particulars.residence.audit:
                by_partition[change.job.particulars.residence.partition] += change.executions
        with self._errors("writing executions"):
            for partition, executions in by_partition.items():
                await self._ensure(partition)
                await self._write_executions(partition, executions)

    async def open_executions(self, slots: Sequence[int]) -> AsyncIterator[list[ExecutionRecord]]:
        with self._errors("reading the open executions"):
            for partition in await self._refresh_partitions():
                cursor = self._executions(partition).find(
                    {"open": {"$in": list(slots)}}, **self._along("open"), batch_size=_BATCH, max_time_ms=_SCAN_MS
                )
                batch: list[ExecutionRecord] = []
                async for document in cursor:
                    try:
                        batch.append(decode_execution(document))
                    except RecordCorruptError as error:
                        self._report(error)
                    if len(batch) == _BATCH:
                        yield batch
                        batch = []
                if batch:
                    yield batch

    async def close_executions(self, closed: Sequence[tuple[ExecutionRecord, str]]) -> int:
        by_partition: dict[str, list[ExecutionRecord]] = defaultdict(list)
        for execution, partition in closed:
            by_partition[partition].append(execution)
        n_changed = 0
        for partition, executions in by_partition.items():
            await self._ensure(partition)
            with self._errors(f"closing {len(executions)} executions"):
                n_changed += await self._write_executions(partition, executions)
        return n_changed

    # --- parts -------------------------------------------------------------------------------------------------------

    async def write_parts(self, partition: str, parts: Sequence[Part]) -> None:
        """Replace those with no higher fence; see `JobStore.write_parts`. One round trip, unless a later writer was here."""
        if not parts:
            return
        await self._ensure(partition)
        with self._errors(f"writing {len(parts)} parts"):
            await self._write_parts(partition, parts)

    async def _write_parts(self, partition: str, parts: Sequence[Part]) -> None:
        documents = [encode_part(part) for part in parts]
        operations = [
            ReplaceOne({"_id": document["_id"], "fence": {"$lte": document["fence"]}}, document, upsert=True)
            for document in documents
        ]
        try:
            await self._items(partition).bulk_write(operations, ordered=False)
        except errors.BulkWriteError as error:
            duplicates, too_large = refused_operations(error)
            if is_unknown_outcome(error) or too_large:
                raise
            # There with a higher fence, or put there by another writer at this moment: then ours may be the later one.
            keys = [documents[place]["_id"] for place in duplicates]
            found = self._items(partition).find({"_id": {"$in": keys}}, {"fence": 1}, max_time_ms=_READ_MS)
            fences = {document["_id"]: document["fence"] async for document in found}
            again = [parts[n] for n in duplicates if fences.get(documents[n]["_id"], 0) <= parts[n].fence]
            if again:
                await self._write_parts(partition, again)

    async def read_parts(self, partition: str, job_id: str, stream: str, after: int = -1, limit: int = 50) -> list[Part]:
        """Return what follows; see `JobStore.read_parts`.

        Numbers have no gaps, so the page is a range of them: some servers read all that a filter lets through before they
        count to the limit.
        """
        sought = _parts_from(job_id, stream, after + 1)
        in_range = {**sought, "seq": {**sought["seq"], "$lt": after + 1 + limit}}
        with self._errors(f"reading parts of job {job_id}"):
            return await self._parts(partition, in_range, limit) or await self._parts(partition, sought, limit)

    async def _parts(self, partition: str, sought: Document, limit: int) -> list[Part]:
        found: list[Part] = []
        size = 0
        cursor = self._items(partition).find(sought, sort=[("seq", 1)], limit=limit, max_time_ms=_READ_MS)
        async for document in cursor:
            part = decode_part(document)
            size += len(part.body)
            if found and size > _PAGE_BYTES:
                await cursor.close()
                break
            found.append(part)
        return found

    async def drop_parts(self, partition: str, job_id: str, stream: str, from_seq: int, *, below: int) -> None:
        with self._errors(f"dropping parts of job {job_id}"):
            # By key: for a filter that says more than an index does, some servers read the whole collection.
            found = self._items(partition).find(_parts_from(job_id, stream, from_seq), {"fence": 1}, max_time_ms=_READ_MS)
            keys = [document["_id"] async for document in found if document["fence"] < below]
            if keys:
                dropped = [DeleteOne({"_id": key, "fence": {"$lt": below}}) for key in keys]
                await self._items(partition).bulk_write(dropped, ordered=False)

    # --- values in collections of users ------------------------------------------------------------------------------

    async def write_documents(self, collection: str, job_id: str, first: int, bodies: Sequence[bytes]) -> None:
        check_collection(collection)
        documents = [encode_value(job_id, number, body) for number, body in enumerate(bodies, start=first)]
        _check_values(documents, first)
        for start in range(0, len(documents), _BATCH):
            with self._errors(f"writing values to collection {collection!r}"):
                await self._put_documents(self._db[collection], documents[start : start + _BATCH])

    async def _put_documents(self, collection: Any, documents: Sequence[Document]) -> None:
        """Insert, which is the cheap way, and replace those that are there."""
        try:
            await collection.bulk_write([InsertOne(document) for document in documents], ordered=False)
        except errors.BulkWriteError as error:
            duplicates, too_large = refused_operations(error)
            if is_unknown_outcome(error) or too_large:
                raise
            there = [documents[place] for place in sorted(duplicates)]
            replacing = [ReplaceOne({"_id": each["_id"]}, each, upsert=True) for each in there]
            await collection.bulk_write(replacing, ordered=False)

    async def drop_documents(self, collection: str, job_id: str, from_number: int) -> None:
        check_collection(collection)
        beyond = {"$gte": value_id(job_id, from_number), "$lt": f"{job_id}0"}  # "0" is what follows "/"
        with self._errors(f"deleting values from collection {collection!r}"):
            await self._db[collection].delete_many({"_id": beyond})

    async def jobs_with_parts(self, partition: str) -> AsyncIterator[list[str]]:
        """Walk the index, which tells the job; what follows of a job that was seen is skipped."""
        by_job = [("job_id", 1)]
        with self._errors(f"looking for the parts of partition {partition!r}"):
            after = ""
            while True:
                cursor = self._items(partition).find(
                    {"job_id": {"$gt": after}}, {"job_id": 1}, sort=by_job, limit=_KEYS, max_time_ms=_SCAN_MS
                )
                ids = list(dict.fromkeys([str(document["job_id"]) async for document in cursor]))
                for start in range(0, len(ids), _BATCH):
                    yield ids[start : start + _BATCH]
                if not ids:
                    return
                after = ids[-1]

    # --- looking at everything ---------------------------------------------------------------------------------------

    async def scan(self, partition: str) -> AsyncIterator[list[JobRecord]]:
        """Walk the jobs by their ids, from page to page, so that no cursor has to live long; see `DocumentStore.scan`.

        Ids that are not text cannot be ours, nor paged with the others; they are told first.
        """
        jobs = self._jobs(partition)
        by_id = [("_id", 1)]
        with self._errors(f"reading all jobs of partition {partition!r}"):
            strange = {"_id": {"$not": {"$type": "string"}}}
            async for document in jobs.find(strange, {"_id": 1}, sort=by_id, **self._along("_id_"), max_time_ms=_SCAN_MS):
                self._report(RecordCorruptError(str(document["_id"]), "_id", "expected text"))
            batch, size = [], 0
            async for document in self._by_id(jobs):
                if (record := await self._record_or_report(document, partition)) is not None:
                    batch.append(record)
                    size += len(record.context) + len(record.result or b"")
                if len(batch) == _BATCH or size > _BATCH_BYTES:
                    yield batch
                    batch, size = [], 0
            if batch:
                yield batch

    async def _by_id(self, jobs: Any) -> AsyncIterator[Document]:
        """Read all documents in the order of their ids."""
        order = [("_id", 1)]
        if not self._open_connection().follows_hints:  # it would read everything again for each page
            texts = {"_id": {"$type": "string"}}
            async for document in jobs.find(texts, sort=order, batch_size=_BATCH, max_time_ms=_SCAN_MS):
                yield document
            return
        after, n_read = "", _BATCH
        while n_read == _BATCH:
            n_read = 0
            page = jobs.find({"_id": {"$gt": after}}, sort=order, hint="_id_", limit=_BATCH, max_time_ms=_SCAN_MS)
            async for document in page:
                after, n_read = document["_id"], n_read + 1
                yield document

    async def statuses(self, job_ids: Sequence[str], partition: str) -> dict[str, JobStatus]:
        with self._errors(f"reading the statuses of {len(job_ids)} jobs"):
            sought = {"_id": {"$in": list(job_ids)}}
            cursor = self._jobs(partition).find(sought, {"status": 1}, **self._along("_id_"), max_time_ms=_READ_MS)
            told = {document["_id"]: document.get("status") async for document in cursor}
        return {job_id: JobStatus(status) for job_id, status in told.items() if status in _STATUSES}

    async def executions_in(self, job_ids: Sequence[str], partition: str) -> list[ExecutionRecord]:
        found = []
        with self._errors(f"reading the executions of {len(job_ids)} jobs"):
            sought = {"job_id": {"$in": list(job_ids)}}
            async for document in self._executions(partition).find(sought, max_time_ms=_SCAN_MS):
                try:
                    found.append(decode_execution(document))
                except RecordCorruptError as error:
                    self._report(error)
        return sorted(found, key=lambda execution: (execution.started_at, execution.id))

    # --- archiving ---------------------------------------------------------------------------------------------------

    async def settled_before(
        self, partition: str, statuses: Sequence[JobStatus], before: float, limit: int, kinds: Sequence[str] | None = None,
        *, after: tuple[float, str] | None = None,
    ) -> list[JobRecord]:  # fmt: skip
        if partition not in await self.partitions():
            return []
        sought: Document = {
            "completed_at": {"$lt": first_date_from(before)},
            "status": {"$in": [status.value for status in statuses]},
        }
        if kinds is not None:
            sought["kind"] = {"$in": list(kinds)}
        place = None if after is None else (to_date(after[0]), after[1])
        with self._errors("looking for settled jobs"):
            oldest_first = [("completed_at", 1), ("_id", 1)]
            while True:
                cursor = self._jobs(partition).find(
                    _following(sought, place),
                    sort=oldest_first,
                    **self._along("completed"),
                    limit=limit,
                    max_time_ms=_SCAN_MS,
                )
                documents = [document async for document in cursor]
                records = [await self._record_or_report(document, partition) for document in documents]
                readable = [record for record in records if record is not None]
                if readable or not documents:
                    return readable
                place = documents[-1]["completed_at"], documents[-1]["_id"]

    async def put_copy(self, job: JobRecord, executions: Sequence[ExecutionRecord], partition: str) -> None:
        """Write a copy; the job last, so that whoever finds it finds its executions, too."""
        await self._ensure(partition)
        with self._errors(f"copying job {job.id}"):
            await self._write_blobs(partition, [job])
            copies = [ReplaceOne({"_id": e.id}, encode_execution(e), upsert=True) for e in executions]
            if self._keeps_executions:
                stale = DeleteMany({"job_id": job.id, "_id": {"$nin": [execution.id for execution in executions]}})
                await self._executions(partition).bulk_write([stale, *copies])
            killpoint("archive.between_copies")
            document = encode_job(job, self._inline_limit)
            await self._jobs(partition).replace_one({"_id": job.id}, document, upsert=True)

    async def get_copy(self, job_id: str, partition: str) -> tuple[JobRecord, list[ExecutionRecord]] | None:
        with self._errors(f"reading job {job_id} in partition {partition!r}"):
            document = await self._jobs(partition).find_one({"_id": job_id}, max_time_ms=_READ_MS)
            if document is None:
                return None
            return await self._record(document, partition), await self._executions_in(partition, job_id)

    async def note_moves(self, partition: str, job_ids: Sequence[str]) -> None:
        with self._errors(f"noting {len(job_ids)} moves"):
            noted = {"partition": partition, "jobs": list(job_ids), "schema_version": SCHEMA_VERSION}
            await self._db[mongo_schema.META].update_one({"_id": _MOVES}, {"$set": noted}, upsert=True)

    async def finish_moves(self) -> int:
        with self._errors("finishing moves"):
            noted = await self._db[mongo_schema.META].find_one({"_id": _MOVES}, max_time_ms=_READ_MS)
            if noted is None:
                return 0
            partition, job_ids = noted["partition"], noted["jobs"]
            await self._ensure(partition)
            there = {found["_id"] async for found in self._jobs(partition).find({"_id": {"$in": job_ids}}, {"_id": 1})}
            left = {"job_id": {"$in": [job_id for job_id in job_ids if job_id not in there]}}
            result = await self._executions(partition).delete_many(left)
            await self._items(partition).delete_many(left)
            await self._db[mongo_schema.META].delete_one({"_id": _MOVES})
            return int(result.deleted_count)

    async def delete_if(self, job: JobRecord, partition: str) -> bool:
        """Delete a finished job under its guard. Where it is gone already, what an interrupted deletion left goes, too."""
        with self._errors(f"deleting job {job.id} from partition {partition!r}"):
            jobs = self._jobs(partition)
            guard = {"_id": job.id, "rev": job.rev, "status": {"$in": list(_FINAL)}}
            document = await jobs.find_one_and_delete(guard)
            if document is None and await jobs.find_one({"_id": job.id}, {"_id": 1}) is not None:
                return False
            killpoint("archive.between_deletes")
            await self._executions(partition).delete_many({"job_id": job.id})
            await self._items(partition).delete_many({"job_id": job.id})
            await self._delete_blobs(partition, document or encode_job(job, self._inline_limit))
            return document is not None

    # --- contents outside of their documents -------------------------------------------------------------------------

    async def _write_blobs(self, partition: str, jobs: Iterable[JobRecord]) -> None:
        for job in jobs:
            for name, content in blobs_of(job, self._inline_limit):
                await self._write_blob(partition, name, content)

    async def _write_blob(self, partition: str, name: str, content: bytes) -> None:
        """Keep a content under its name, which is always the same content's."""
        bucket = self._bucket(partition)
        files = self._db[f"{mongo_schema.collection_name(mongo_schema.BLOBS, partition)}.files"]
        if await files.find_one({"_id": name}, {"_id": 1}) is not None:
            return  # the entry is written after all its pieces
        try:
            await bucket.upload_from_stream_with_id(name, name, content)
        except (FileExists, errors.DuplicateKeyError):  # an earlier attempt left pieces
            with contextlib.suppress(NoFile):
                await bucket.delete(name)
            await bucket.upload_from_stream_with_id(name, name, content)

    async def _read_blob(self, partition: str, name: str) -> bytes | None:
        try:
            stream = await self._bucket(partition).open_download_stream(name)
            return bytes(await stream.read())
        except NoFile:
            return None

    async def _delete_blobs(self, partition: str, document: Document) -> None:
        for name in blobs_named(document):
            with contextlib.suppress(NoFile):
                await self._bucket(partition).delete(name)

    async def _delete_unused_blobs(self, partition: str, jobs: Iterable[JobRecord]) -> None:
        """Delete what was written for inserts that were refused, unless the job that is there has the same contents."""
        for job in jobs:
            if written := {name for name, _ in blobs_of(job, self._inline_limit)}:
                stored = await self._jobs(partition).find_one({"_id": job.id}, max_time_ms=_READ_MS)
                for name in written.difference(blobs_named(stored or {})):
                    with contextlib.suppress(NoFile):
                        await self._bucket(partition).delete(name)

    def _bucket(self, partition: str) -> Any:
        return self._open_connection().bucket(mongo_schema.collection_name(mongo_schema.BLOBS, partition))


def _in_order(partitions: Iterable[str]) -> list[str]:
    active = [name for name in partitions if not is_archive(name)]
    archives = [name for name in partitions if is_archive(name)]
    return [*active, *archives, *active] if archives else active


def _following(sought: Document, place: tuple[datetime, str] | None) -> Document:
    """Return a filter for what follows an end and an id."""
    if place is None:
        return sought
    at, job_id = place
    following = [{"completed_at": {"$gt": at}}, {"completed_at": at, "_id": {"$gt": job_id}}]
    return {**sought, "completed_at": {**sought["completed_at"], "$gte": at}, "$or": following}


def _parts_from(job_id: str, stream: str, seq: int) -> Document:
    """Return the filter for parts from a number on; without a hint, for which some servers walk the whole index."""
    return {"job_id": job_id, "stream": stream, "seq": {"$gte": seq}}


def _check_values(documents: Sequence[Document], first: int) -> None:
    for number, document in enumerate(documents, start=first):
        try:
            size = len(to_bson(document))
        except (InvalidDocument, OverflowError, UnicodeEncodeError) as error:
            msg = f"write_documents: value {number} cannot be a document: {error}; give it another form in process_item()"
            raise ConfigurationError(msg) from None
        if size > _MAX_DOCUMENT:
            msg = (
                f"write_documents: value {number} takes {size:,} bytes as a document, the limit is {_MAX_DOCUMENT:,}; "
                f"write it to a file instead"
            )
            raise ConfigurationError(msg)


def _oldest_first(executions: Iterable[ExecutionRecord]) -> list[ExecutionRecord]:
    return sorted(executions, key=lambda execution: (execution.started_at, execution.id))


def _too_large(changes: Sequence[Change], operations: Sequence[Any]) -> list[Change]:
    sizes = [len(to_bson(operation._doc)) for operation in operations]  # noqa: SLF001 - what the driver would send
    return [change for change, size in zip(changes, sizes, strict=True) if size > _MAX_DOCUMENT]


def _execution_operation(execution: ExecutionRecord) -> UpdateOne:
    if execution.status is ExecutionStatus.RUNNING:
        return UpdateOne({"_id": execution.id}, encode_opening(execution), upsert=True)
    return UpdateOne({"_id": execution.id, "status": _RUNNING}, encode_closing(execution), upsert=True)


def _slots(slots: Sequence[int]) -> Document:
    """Return the filter for some slots: none at all if that is every slot."""
    return {} if len(set(slots)) >= SLOTS else {"slot": {"$in": list(slots)}}


def _lease(document: Document | None) -> Lease | None:
    if document is None:
        return None
    return Lease(document["_id"], document["holder"], int(document["term"]), int(document["beat"]))


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
