"""Guarded writes of jobs, and of executions, which are never opened again.

A guarded update that meets another ``rev`` changes nothing and is reported, as is an insert of an id that exists. What looks
refused but is stored as we have it counts as written, because the answer to an earlier attempt may have been lost.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final

from pymongo import InsertOne, UpdateOne, errors

from koan_ray.domain.status import ExecutionStatus
from koan_ray.errors import RecordRefusedError
from koan_ray.killpoints import killpoint
from koan_ray.stores.bson_fit import objection, size_of
from koan_ray.stores.codec import (
    STATE_FIELDS,
    Document,
    encode_closing,
    encode_execution,
    encode_job,
    encode_opening,
    encode_update,
)
from koan_ray.stores.mongo_database import MAX_DOCUMENT, Database
from koan_ray.stores.mongo_driver import is_unknown_outcome, refused_operations

if TYPE_CHECKING:
    from collections.abc import Sequence

    from koan_ray.domain.records import ExecutionRecord, JobRecord
    from koan_ray.ports import Change
    from koan_ray.stores.mongo_blobs import Blobs

_RUNNING: Final = ExecutionStatus.RUNNING.value


class Writes:
    """Writes jobs under their guards, and executions.

    Args:
        inline_limit: Contexts and results with more bytes are kept outside of their documents.
        keeps_executions: False if the executions of these jobs live in another store.
    """

    def __init__(self, db: Database, blobs: Blobs, *, inline_limit: int, keeps_executions: bool) -> None:
        self._db, self._blobs = db, blobs
        self._inline_limit, self._keeps_executions = inline_limit, keeps_executions

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
            await self._db.ensure(partition)
            refused += await self._apply_to(partition, group)
        return refused

    async def _apply_to(self, partition: str, changes: list[Change]) -> list[Change]:
        with self._db.errors(f"writing {len(changes)} jobs"):
            await self._blobs.write(partition, [change.job for change in changes])
            killpoint("flush.before_jobs")
            refused = await self._write_jobs(partition, changes)
            if refused:
                await self._blobs.delete_unused(partition, [change.job for change in refused if change.expect == 0])
            gone = {id(change) for change in refused}
            kept = [change for change in changes if id(change) not in gone] if refused else changes
            audited = [change for change in kept if self._is_audited(change.job)]
            if any(change.executions for change in audited):
                killpoint("flush.between")
            await self.write_executions(
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
            result = await self._db.jobs(partition).bulk_write(operations, ordered=False)
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
            duplicates, too_large, unwritable = refused_operations(error)
            if unwritable:  # the others are written, and are recognised as ours when this is repeated without these
                raise RecordRefusedError({changes[at].job.id: why for at, why in unwritable.items()}) from error
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
        stored = {document["_id"]: document async for document in self._db.jobs(partition).find({"_id": {"$in": ids}})}
        return [change for change in doubtful if not self._is_stored(change, stored.get(change.job.id))]

    def _is_stored(self, change: Change, stored: Document | None) -> bool:
        if stored is None:
            return False
        ours = encode_job(change.job, self._inline_limit)
        compared = STATE_FIELDS if change.expect != 0 else {*ours, *STATE_FIELDS}
        return all(ours.get(name) == stored.get(name) for name in compared)

    async def write_executions(
        self, partition: str, executions: Sequence[ExecutionRecord], new: Sequence[ExecutionRecord] = ()
    ) -> int:
        """Write executions; those that are closed already stay as they are. ``new``: none of these should be there yet."""
        guarded = [_execution_operation(execution) for execution in executions]
        if not guarded and not new:
            return 0
        operations = [*guarded, *(InsertOne(encode_execution(execution)) for execution in new)]
        try:
            result = await self._db.executions(partition).bulk_write(operations, ordered=False)
        except errors.BulkWriteError as error:
            if is_unknown_outcome(error):
                raise
            # A duplicate key. Of a guarded one: it is there and not running, so it is closed, and is not rewritten.
            duplicates, too_large, unwritable = refused_operations(error)
            if too_large or unwritable:
                everything = [*executions, *new]
                unwritable |= dict.fromkeys(too_large, "its execution is larger than a document may be")
                raise RecordRefusedError({everything[at].job_id: why for at, why in unwritable.items()}) from error
            known = [new[place - len(guarded)] for place in duplicates if place >= len(guarded)]
            n_changed = sum(int(error.details.get(name, 0)) for name in ("nModified", "nUpserted", "nInserted"))
            return n_changed + await self.write_executions(partition, known)
        return int(result.modified_count) + int(result.upserted_count) + int(result.inserted_count)

    async def file_executions(self, changes: Sequence[Change]) -> None:
        """Write executions of jobs that are written; see `JobStore.file_executions`."""
        by_partition: dict[str, list[ExecutionRecord]] = defaultdict(list)
        for change in changes:
            if change.job.particulars.residence.audit:
                by_partition[change.job.particulars.residence.partition] += change.executions
        with self._db.errors("writing executions"):
            for partition, executions in by_partition.items():
                await self._db.ensure(partition)
                await self.write_executions(partition, executions)

    async def close_executions(self, closed: Sequence[tuple[ExecutionRecord, str]]) -> int:
        """Close executions, each in the partition beside it; returns how many were written; closed ones stay as they are."""
        by_partition: dict[str, list[ExecutionRecord]] = defaultdict(list)
        for execution, partition in closed:
            by_partition[partition].append(execution)
        n_changed = 0
        for partition, executions in by_partition.items():
            await self._db.ensure(partition)
            with self._db.errors(f"closing {len(executions)} executions"):
                n_changed += await self.write_executions(partition, executions)
        return n_changed

    def objection(self, record: JobRecord | ExecutionRecord) -> str | None:
        """Return why no document can hold a record, in words; None if one can, whatever its size."""
        return objection(record, self._inline_limit)

    def excess(self, job: JobRecord) -> tuple[int, int] | None:
        """Return the bytes of a job's document and the limit if it is too large; None if it fits."""
        size = size_of(encode_job(job, self._inline_limit))
        return (size, MAX_DOCUMENT) if size > MAX_DOCUMENT else None


def _too_large(changes: Sequence[Change], operations: Sequence[Any]) -> list[Change]:
    sizes = [size_of(operation._doc) for operation in operations]  # noqa: SLF001 - what the driver would send
    return [change for change, size in zip(changes, sizes, strict=True) if size > MAX_DOCUMENT]


def _execution_operation(execution: ExecutionRecord) -> UpdateOne:
    if execution.status is ExecutionStatus.RUNNING:
        return UpdateOne({"_id": execution.id}, encode_opening(execution), upsert=True)
    return UpdateOne({"_id": execution.id, "status": _RUNNING}, encode_closing(execution), upsert=True)
