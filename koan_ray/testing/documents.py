"""A database of documents in this process, and stores that are clients of it: for simulation and chaos without a server.

`MemoryDatabase` holds encoded documents, so that records go through `koan_ray.stores.codec` as they do in a real database.
Any number of `MemoryDocumentStore` share one, as coordinators share a server. What goes wrong is said per database
(`StoreFaults`) or by closing the clients.
"""

from __future__ import annotations

import asyncio
import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from koan_ray.domain.archival import is_archive
from koan_ray.domain.lease import Lease
from koan_ray.domain.partitions import check_partition
from koan_ray.domain.query import Page
from koan_ray.domain.status import ExecutionStatus, JobStatus
from koan_ray.errors import RecordCorruptError, StoreUnavailableError
from koan_ray.stores.bson_fit import objection, size_of
from koan_ray.stores.codec import (
    SCHEMA_VERSION,
    STATE_FIELDS,
    Document,
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
    part_id,
    value_id,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Sequence

    from koan_ray.domain.query import Query
    from koan_ray.domain.records import ExecutionRecord, JobRecord, Part
    from koan_ray.ports import Change

_BATCH: Final = 500
_PAGE_BYTES: Final = 8 * 1024 * 1024  # of parts in one answer
_STATUSES: Final = frozenset(JobStatus)
_UNFINISHED: Final = frozenset(status.value for status in JobStatus if not status.is_final)


@dataclass
class StoreFaults:
    """What goes wrong with a database; may be changed at any time.

    Args:
        unavailable: Nobody answers: every call raises, and nothing is done.
        lose_replies: So many of the next writes are made, and then the answer is lost.
        lose_requests: So many of the next writes are not made; the caller cannot tell this from a lost answer.
        tear: So many of the next batches write their jobs and not their executions, and lose the answer; of parts, the
            first half.
        tear_delete: So many of the next guarded deletions delete the job and not what belongs to it, and lose the answer.
        delay_s: Every call takes this long, before anything is done, in the loop's time.
        reply_delay_s: Every write takes this long after it was done.
    """

    unavailable: bool = False
    lose_replies: int = 0
    lose_requests: int = 0
    tear: int = 0
    tear_delete: int = 0
    delay_s: float = 0.0
    reply_delay_s: float = 0.0
    n_fired: int = 0

    async def before(self, *, writes: bool) -> None:
        """Let happen what happens before a call has an effect."""
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        if self.unavailable:
            self.fire("nobody answers")
        if writes and self.lose_requests > 0:
            self.lose_requests -= 1
            self.fire("the request was lost")

    async def after(self) -> None:
        """Let happen what happens between the effect of a write and its answer."""
        if self.reply_delay_s:
            await asyncio.sleep(self.reply_delay_s)
        if self.lose_replies > 0:
            self.lose_replies -= 1
            self.fire("the answer was lost")

    def fire(self, what: str) -> None:
        """Count a fault and raise it."""
        self.n_fired += 1
        raise StoreUnavailableError(f"the document store: {what}")


@dataclass
class MemoryDatabase:
    """What is stored: documents by partition and key, and the leases. Survives its clients, not its process."""

    jobs: dict[str, dict[str, Document]] = field(default_factory=lambda: {"": {}})
    executions: dict[str, dict[str, Document]] = field(default_factory=dict)
    parts: dict[str, dict[str, Document]] = field(default_factory=dict)
    collections: dict[str, dict[str, Document]] = field(default_factory=dict)  # of users: values of items
    leases: dict[str, Lease] = field(default_factory=dict)
    moves: tuple[str, list[str]] | None = None
    faults: StoreFaults = field(default_factory=StoreFaults)
    n_writes: int = 0
    max_document: int | None = None  # bytes, roughly


class MemoryDocumentStore:
    """One client of a `MemoryDatabase`. Passed by `koan_ray.testing.contracts.DocumentStoreContract`.

    Each call has its whole effect at one instant, like a bulk write that nothing interrupts; ``tear`` in the faults lets a
    batch stop between its jobs and their executions. Queries look at every document.

    Args:
        database: What it is a client of; a new one by default.
        source: The name of the source, which records read from here carry.
        keeps_executions: False if the executions of these jobs live in another store.
        on_corrupt: Told of documents that a scan or query skipped.
    """

    def __init__(
        self,
        database: MemoryDatabase | None = None,
        *,
        source: str | None = None,
        keeps_executions: bool = True,
        on_corrupt: Callable[[str, RecordCorruptError], None] | None = None,
    ) -> None:
        self.database = database if database is not None else MemoryDatabase()
        self._source, self._keeps_executions, self._on_corrupt = source, keeps_executions, on_corrupt
        self._is_open = False

    @property
    def faults(self) -> StoreFaults:
        """What goes wrong with the database."""
        return self.database.faults

    async def open(self) -> None:
        await self.faults.before(writes=False)
        self._is_open = True

    async def close(self) -> None:
        self._is_open = False

    async def _begin(self, *, writes: bool = False) -> None:
        if not self._is_open:
            raise StoreUnavailableError("the document store: is not open; call open() first")
        await self.faults.before(writes=writes)
        self.database.n_writes += writes

    # --- guarded writes ----------------------------------------------------------------------------------------------

    async def apply(self, changes: Sequence[Change]) -> list[Change]:
        for change in changes:
            check_partition(change.job.particulars.residence.partition)
        for change in changes:  # as a driver, which encodes all before it sends anything
            size_of(encode_job(change.job))
        await self._begin(writes=True)
        refused = [change for change in changes if not self._apply_one(change)]
        if self.faults.tear > 0:
            self.faults.tear -= 1
            self.faults.fire("the batch stopped between jobs and executions")
        gone = {id(change) for change in refused}
        self._file([change for change in changes if id(change) not in gone])
        await self.faults.after()
        return refused

    def _file(self, changes: Iterable[Change]) -> None:
        for change in changes:
            residence = change.job.particulars.residence
            if self._keeps_executions and residence.audit:
                for execution in change.executions:
                    self._write_execution(execution, residence.partition)

    async def file_executions(self, changes: Sequence[Change]) -> None:
        await self._begin(writes=True)
        self._file(changes)
        await self.faults.after()

    def _apply_one(self, change: Change) -> bool:
        job, partition = change.job, change.job.particulars.residence.partition
        if self.excess(job) is not None:
            return False
        jobs = self._jobs(partition)
        stored = jobs.get(job.id)
        if (stored["rev"] if stored is not None else 0) == change.expect:
            if stored is None:
                jobs[job.id] = copy.deepcopy(encode_job(job))
            else:
                _update(stored, encode_update(job))
        elif stored is None or not _is_same(stored, change):
            return False
        return True

    def objection(self, record: JobRecord | ExecutionRecord) -> str | None:
        return objection(record)

    def excess(self, job: JobRecord) -> tuple[int, int] | None:
        limit = self.database.max_document
        size = len(str(encode_job(job))) if limit is not None else 0
        return (size, limit) if limit is not None and size > limit else None

    def _write_execution(self, execution: ExecutionRecord, partition: str) -> bool:
        executions = self.database.executions.setdefault(partition, {})
        stored = executions.get(execution.id)
        if stored is None:
            executions[execution.id] = copy.deepcopy(encode_execution(execution))
            return True
        if stored["status"] != ExecutionStatus.RUNNING.value or "$set" not in _execution_update(execution):
            return False
        _update(stored, _execution_update(execution))
        return True

    def _jobs(self, partition: str) -> dict[str, Document]:
        return self.database.jobs.setdefault(partition, {})

    # --- reading -----------------------------------------------------------------------------------------------------

    async def get(self, job_id: str) -> JobRecord | None:
        await self._begin()
        for partition in self._active_first():
            if (document := self.database.jobs[partition].get(job_id)) is not None:
                return self._record(document, partition)
        return None

    def _active_first(self) -> list[str]:
        return sorted(self.database.jobs, key=is_archive)

    async def executions(self, job_id: str) -> list[ExecutionRecord]:
        await self._begin()
        holding = [partition for partition in self._active_first() if job_id in self.database.jobs[partition]]
        for partition in [*holding[:1], *(() if holding else self._active_first())]:
            if found := self._executions_in(partition, job_id):
                return found
        return []

    def _executions_in(self, partition: str, job_id: str) -> list[ExecutionRecord]:
        documents = self.database.executions.get(partition, {}).values()
        found = []
        for document in documents:
            if document["job_id"] == job_id:
                try:
                    found.append(decode_execution(document))
                except RecordCorruptError as error:
                    if self._on_corrupt is not None:
                        self._on_corrupt(error.record_id, error)
        return sorted(found, key=lambda execution: (execution.started_at, execution.id))

    async def query(self, query: Query) -> Page:
        await self._begin()
        found = [record for record in self._matching(query) if query.is_after_cursor(record)]
        found.sort(key=query.sort_key, reverse=query.descending)
        more = len(found) > query.limit
        found = found[: query.limit]
        return Page(found, query.cursor_after(found[-1]) if more else None)

    async def count(self, query: Query) -> int:
        await self._begin()
        return len(self._matching(query))

    def _matching(self, query: Query) -> list[JobRecord]:
        if query.partition is None:
            asked = [name for name in self.database.jobs if not is_archive(name)]
        else:
            asked = list(self.database.jobs) if query.partition == "*" else [query.partition]
        return [record for name in asked for record in self._records(name) if query.matches(record)]

    def _records(self, partition: str) -> Iterable[JobRecord]:
        for document in list(self.database.jobs.get(partition, {}).values()):
            try:
                yield self._record(document, partition)
            except RecordCorruptError as error:
                if self._on_corrupt is not None:
                    self._on_corrupt(error.record_id, error)

    def _record(self, document: Document, partition: str) -> JobRecord:
        return decode_job(document, source=self._source, partition=partition)

    async def partitions(self) -> list[str]:
        await self._begin()
        return list(self.database.jobs)

    # --- deleting ----------------------------------------------------------------------------------------------------

    async def remove(self, job_id: str) -> bool:
        await self._begin(writes=True)
        was_there = [self._delete(job_id, partition) for partition in list(self.database.jobs)]
        await self.faults.after()
        return any(was_there)

    def _delete(self, job_id: str, partition: str) -> bool:
        executions = self.database.executions.get(partition, {})
        for execution_id in [key for key, document in executions.items() if document["job_id"] == job_id]:
            del executions[execution_id]
        parts = self.database.parts.get(partition, {})
        for key in [key for key, document in parts.items() if document["job_id"] == job_id]:
            del parts[key]
        return self._jobs(partition).pop(job_id, None) is not None

    async def expire(self, now: float) -> int:
        return 0

    # --- parts -------------------------------------------------------------------------------------------------------

    async def write_parts(self, partition: str, parts: Sequence[Part]) -> None:
        check_partition(partition)
        await self._begin(writes=True)
        self._jobs(partition)  # a partition is there when anything was written to it
        is_torn = self.faults.tear > 0
        for part in parts[: len(parts) // 2] if is_torn else parts:
            self._write_part(part, partition)
        if is_torn:
            self.faults.tear -= 1
            self.faults.fire("the batch stopped between two parts")
        await self.faults.after()

    def _write_part(self, part: Part, partition: str) -> None:
        kept = self.database.parts.setdefault(partition, {})
        key = part_id(part.job_id, part.stream, part.seq)
        if key not in kept or kept[key]["fence"] <= part.fence:
            kept[key] = copy.deepcopy(encode_part(part))

    async def read_parts(self, partition: str, job_id: str, stream: str, after: int = -1, limit: int = 50) -> list[Part]:
        await self._begin()
        documents = sorted(self._parts_of(partition, job_id, stream, after + 1), key=lambda document: document["seq"])
        found: list[Part] = []
        size = 0
        for document in documents[:limit]:
            part = decode_part(document)
            size += len(part.body)
            if found and size > _PAGE_BYTES:
                break
            found.append(part)
        return found

    async def drop_parts(self, partition: str, job_id: str, stream: str, from_seq: int, *, below: int) -> None:
        await self._begin(writes=True)
        for document in self._parts_of(partition, job_id, stream, from_seq):
            if document["fence"] < below:
                del self.database.parts[partition][document["_id"]]
        await self.faults.after()

    def _parts_of(self, partition: str, job_id: str, stream: str, from_seq: int) -> list[Document]:
        wanted = (job_id, stream)
        documents = self.database.parts.get(partition, {}).values()
        return [each for each in documents if (each["job_id"], each["stream"]) == wanted and each["seq"] >= from_seq]

    async def write_documents(self, collection: str, job_id: str, first: int, bodies: Sequence[bytes]) -> None:
        check_collection(collection)
        documents = [encode_value(job_id, number, body) for number, body in enumerate(bodies, start=first)]
        await self._begin(writes=True)
        self.database.collections.setdefault(collection, {}).update({each["_id"]: each for each in documents})
        await self.faults.after()

    async def drop_documents(self, collection: str, job_id: str, from_number: int) -> None:
        check_collection(collection)
        await self._begin(writes=True)
        kept = self.database.collections.get(collection, {})
        for key in [key for key in kept if value_id(job_id, from_number) <= key < f"{job_id}0"]:
            del kept[key]
        await self.faults.after()

    async def jobs_with_parts(self, partition: str) -> AsyncIterator[list[str]]:
        await self._begin()
        ids = sorted({document["job_id"] for document in self.database.parts.get(partition, {}).values()})
        for start in range(0, len(ids), _BATCH):
            yield ids[start : start + _BATCH]

    # --- leases ------------------------------------------------------------------------------------------------------

    async def read_lease(self, shard: str) -> Lease | None:
        await self._begin()
        return self.database.leases.get(shard)

    async def take_lease(self, shard: str, *, holder: str, seen: Lease | None, at_least: int = 1) -> Lease | None:
        await self._begin(writes=True)
        if self.database.leases.get(shard) != seen:
            return None
        taken = Lease(shard, holder, max(at_least, seen.term + 1 if seen else 1), seen.beat + 1 if seen else 1)
        self.database.leases[shard] = taken
        await self.faults.after()
        return taken

    async def latest_term(self, shards: Sequence[str]) -> int:
        await self._begin()
        return max((self.database.leases[shard].term for shard in shards if shard in self.database.leases), default=0)

    async def beat(self, lease: Lease) -> Lease | None:
        return await self._change_lease(lease, lease.holder)

    async def release(self, lease: Lease) -> None:
        await self._change_lease(lease, "")

    async def _change_lease(self, lease: Lease, holder: str) -> Lease | None:
        await self._begin(writes=True)
        stored = self.database.leases.get(lease.shard)
        if stored is None or (stored.holder, stored.term) != (lease.holder, lease.term):
            return None
        changed = self.database.leases[lease.shard] = stored._replace(holder=holder, beat=stored.beat + 1)
        await self.faults.after()
        return changed

    # --- taking over -------------------------------------------------------------------------------------------------

    async def claim(self, slots: Sequence[int], term: int) -> int:
        await self._begin(writes=True)
        mine = [document for jobs in self.database.jobs.values() for document in jobs.values() if _is_mine(document, slots)]
        older = [document for document in mine if document["term"] < term]
        for document in older:
            document["term"] = term
            document["rev"] += 1
        await self.faults.after()
        return len(older)

    async def take_over(
        self, slots: Sequence[int], term: int, statuses: Sequence[JobStatus]
    ) -> AsyncIterator[list[JobRecord]]:
        await self._begin(writes=True)
        found = [
            (record, partition)
            for partition in list(self.database.jobs)
            for record in self._records(partition)
            if record.status in statuses and record.term < term and _is_mine(self._jobs(partition)[record.id], slots)
        ]
        found.sort(key=lambda pair: (pair[0].created_at, pair[0].id))
        for start in range(0, len(found), _BATCH):
            await self._begin(writes=True)
            batch = []
            for record, partition in found[start : start + _BATCH]:
                document = self._jobs(partition)[record.id]
                if document["term"] < term and document["status"] in _UNFINISHED:
                    document["term"] = term
                    document["rev"] += 1
                    batch.append(self._record(document, partition))
            await self.faults.after()
            yield batch

    async def unfinished(self, slots: Sequence[int], term: int) -> AsyncIterator[list[JobRecord]]:
        await self._begin()
        wanted = set(slots)
        records = [
            record
            for partition, jobs in self.database.jobs.items()
            for record in self._records(partition)
            if not record.status.is_final and record.term == term and jobs[record.id]["slot"] in wanted
        ]
        records.sort(key=lambda record: (record.created_at, record.id))
        for start in range(0, len(records), _BATCH):
            yield records[start : start + _BATCH]

    async def last_settled(self, slots: Sequence[int], limit: int) -> AsyncIterator[list[JobRecord]]:
        await self._begin()
        wanted = set(slots)
        for partition, jobs in list(self.database.jobs.items()):
            if not is_archive(partition):
                ended = [
                    record
                    for record in self._records(partition)
                    if record.completed_at is not None and jobs[record.id]["slot"] in wanted
                ]
                ended.sort(key=lambda record: (record.completed_at, record.id), reverse=True)
                if ended:
                    yield ended[:limit]

    async def open_executions(self, slots: Sequence[int]) -> AsyncIterator[list[ExecutionRecord]]:
        await self._begin()
        wanted = set(slots)
        for executions in self.database.executions.values():
            found = [decode_execution(document) for document in executions.values() if document.get("open") in wanted]
            for start in range(0, len(found), _BATCH):
                yield found[start : start + _BATCH]

    async def close_executions(self, closed: Sequence[tuple[ExecutionRecord, str]]) -> int:
        await self._begin(writes=True)
        n_changed = sum([self._write_execution(execution, partition) for execution, partition in closed])
        await self.faults.after()
        return n_changed

    # --- looking at everything ----------------------------------------------------------------------------------------

    async def scan(self, partition: str) -> AsyncIterator[list[JobRecord]]:
        await self._begin()
        records = sorted(self._records(partition), key=lambda record: record.id)
        for start in range(0, len(records), _BATCH):
            yield records[start : start + _BATCH]

    async def statuses(self, job_ids: Sequence[str], partition: str) -> dict[str, JobStatus]:
        await self._begin()
        jobs = self.database.jobs.get(partition, {})
        told = {job_id: jobs[job_id].get("status") for job_id in job_ids if job_id in jobs}
        return {job_id: JobStatus(status) for job_id, status in told.items() if status in _STATUSES}

    async def executions_in(self, job_ids: Sequence[str], partition: str) -> list[ExecutionRecord]:
        await self._begin()
        wanted = set(job_ids)
        found = []
        for document in self.database.executions.get(partition, {}).values():
            if document.get("job_id") in wanted:
                try:
                    found.append(decode_execution(document))
                except RecordCorruptError as error:
                    if self._on_corrupt is not None:
                        self._on_corrupt(error.record_id, error)
        return sorted(found, key=lambda execution: (execution.started_at, execution.id))

    # --- archiving ---------------------------------------------------------------------------------------------------

    async def settled_before(
        self, partition: str, statuses: Sequence[JobStatus], before: float, limit: int, kinds: Sequence[str] | None = None,
        *, after: tuple[float, str] | None = None,
    ) -> list[JobRecord]:  # fmt: skip
        await self._begin()
        found = [
            (record.completed_at, record.id, record)
            for record in self._records(partition)
            if record.completed_at is not None
            and record.completed_at < before
            and record.status in statuses
            and (kinds is None or record.terms.kind in kinds)
            and (after is None or (record.completed_at, record.id) > after)
        ]
        return [record for _, _, record in sorted(found, key=lambda item: item[:2])][:limit]

    async def put_copy(self, job: JobRecord, executions: Sequence[ExecutionRecord], partition: str) -> None:
        check_partition(partition)
        await self._begin(writes=True)
        self._jobs(partition)[job.id] = copy.deepcopy(encode_job(job))
        if self._keeps_executions:
            kept = self.database.executions.setdefault(partition, {})
            for execution_id in [key for key, document in kept.items() if document["job_id"] == job.id]:
                del kept[execution_id]
            kept.update((execution.id, copy.deepcopy(encode_execution(execution))) for execution in executions)
        await self.faults.after()

    async def get_copy(self, job_id: str, partition: str) -> tuple[JobRecord, list[ExecutionRecord]] | None:
        await self._begin()
        document = self.database.jobs.get(partition, {}).get(job_id)
        if document is None:
            return None
        return self._record(document, partition), self._executions_in(partition, job_id)

    async def note_moves(self, partition: str, job_ids: Sequence[str]) -> None:
        await self._begin(writes=True)
        self.database.moves = (partition, list(job_ids))
        await self.faults.after()

    async def finish_moves(self) -> int:
        await self._begin()
        if self.database.moves is None:
            return 0
        await self._begin(writes=True)
        partition, job_ids = self.database.moves
        gone = set(job_ids) - self._jobs(partition).keys()
        n_left = sum(document["job_id"] in gone for document in self.database.executions.get(partition, {}).values())
        for job_id in gone:
            self._delete(job_id, partition)
        self.database.moves = None
        await self.faults.after()
        return n_left

    async def delete_if(self, job: JobRecord, partition: str) -> bool:
        await self._begin(writes=True)
        document = self.database.jobs.get(partition, {}).get(job.id)
        if document is not None and (document["rev"] != job.rev or document["status"] in _UNFINISHED):
            return False
        if self.faults.tear_delete > 0:
            self.faults.tear_delete -= 1
            self._jobs(partition).pop(job.id, None)
            self.faults.fire("the deletion stopped between the job and its executions")
        was_there = self._delete(job.id, partition)
        await self.faults.after()
        return was_there


def _execution_update(execution: ExecutionRecord) -> Document:
    is_open = execution.status is ExecutionStatus.RUNNING
    return encode_opening(execution) if is_open else encode_closing(execution)


def _update(stored: Document, update: dict[str, Any]) -> None:
    stored.update(copy.deepcopy(update.get("$set", {})))
    for name in update.get("$unset", {}):
        stored.pop(name, None)


def _is_same(stored: Document, change: Change) -> bool:
    """Tell whether a change is stored already, because the answer to an earlier attempt was lost."""
    ours = encode_job(change.job)
    compared = STATE_FIELDS if change.expect != 0 else {*ours, *STATE_FIELDS}
    return all(ours.get(name) == stored.get(name) for name in compared)


def _is_mine(document: Document, slots: Sequence[int]) -> bool:
    is_known = document["schema_version"] == SCHEMA_VERSION
    return is_known and document["status"] in _UNFINISHED and document["slot"] in slots
