"""Parts of long results, and values of items in collections that users name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from bson import encode as to_bson
from bson.errors import InvalidDocument
from pymongo import DeleteOne, InsertOne, ReplaceOne, errors

from koan_ray.errors import ConfigurationError, RecordRefusedError
from koan_ray.stores.codec import Document, check_collection, decode_part, encode_part, encode_value, value_id
from koan_ray.stores.mongo_database import BATCH, MAX_DOCUMENT, READ_MS, SCAN_MS, Database
from koan_ray.stores.mongo_driver import is_unknown_outcome, refused_operations

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from koan_ray.domain.records import Part

_PAGE_BYTES: Final = 8 * 1024 * 1024  # of parts in one answer
_KEYS: Final = 2000  # entries of an index that are looked at together


class Parts:
    """The parts of jobs by stream and number, each with the fence of its writer."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def write_parts(self, partition: str, parts: Sequence[Part]) -> None:
        """Replace those with no higher fence; see `JobStore.write_parts`. One round trip, unless a later writer was here."""
        if not parts:
            return
        await self._db.ensure(partition)
        with self._db.errors(f"writing {len(parts)} parts"):
            await self._write_parts(partition, parts)

    async def _write_parts(self, partition: str, parts: Sequence[Part]) -> None:
        documents = [encode_part(part) for part in parts]
        operations = [
            ReplaceOne({"_id": document["_id"], "fence": {"$lte": document["fence"]}}, document, upsert=True)
            for document in documents
        ]
        try:
            await self._db.items(partition).bulk_write(operations, ordered=False)
        except errors.BulkWriteError as error:
            duplicates, too_large, unwritable = refused_operations(error)
            if is_unknown_outcome(error):
                raise
            if too_large or unwritable:
                unwritable |= dict.fromkeys(too_large, "what its items have produced is larger than a document may be")
                raise RecordRefusedError({parts[at].job_id: why for at, why in unwritable.items()}) from error
            # There with a higher fence, or put there by another writer at this moment: then ours may be the later one.
            keys = [documents[place]["_id"] for place in duplicates]
            found = self._db.items(partition).find({"_id": {"$in": keys}}, {"fence": 1}, max_time_ms=READ_MS)
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
        with self._db.errors(f"reading parts of job {job_id}"):
            return await self._parts(partition, in_range, limit) or await self._parts(partition, sought, limit)

    async def _parts(self, partition: str, sought: Document, limit: int) -> list[Part]:
        found: list[Part] = []
        size = 0
        cursor = self._db.items(partition).find(sought, sort=[("seq", 1)], limit=limit, max_time_ms=READ_MS)
        async for document in cursor:
            part = decode_part(document)
            size += len(part.body)
            if found and size > _PAGE_BYTES:
                await cursor.close()
                break
            found.append(part)
        return found

    async def drop_parts(self, partition: str, job_id: str, stream: str, from_seq: int, *, below: int) -> None:
        """Delete the parts of a stream from a number on, of those whose fence is lower than ``below``."""
        with self._db.errors(f"dropping parts of job {job_id}"):
            # By key: for a filter that says more than an index does, some servers read the whole collection.
            found = self._db.items(partition).find(_parts_from(job_id, stream, from_seq), {"fence": 1}, max_time_ms=READ_MS)
            keys = [document["_id"] async for document in found if document["fence"] < below]
            if keys:
                dropped = [DeleteOne({"_id": key, "fence": {"$lt": below}}) for key in keys]
                await self._db.items(partition).bulk_write(dropped, ordered=False)

    async def jobs_with_parts(self, partition: str) -> AsyncIterator[list[str]]:
        """Walk the index, which tells the job; what follows of a job that was seen is skipped."""
        by_job = [("job_id", 1)]
        with self._db.errors(f"looking for the parts of partition {partition!r}"):
            after = ""
            while True:
                cursor = self._db.items(partition).find(
                    {"job_id": {"$gt": after}}, {"job_id": 1}, sort=by_job, limit=_KEYS, max_time_ms=SCAN_MS
                )
                ids = list(dict.fromkeys([str(document["job_id"]) async for document in cursor]))
                for start in range(0, len(ids), BATCH):
                    yield ids[start : start + BATCH]
                if not ids:
                    return
                after = ids[-1]


class UserDocuments:
    """Values of items as documents of collections that users name; an id is made of the job and the value's number."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def write_documents(self, collection: str, job_id: str, first: int, bodies: Sequence[bytes]) -> None:
        """Write values, numbered from ``first``; those that are there are replaced.

        Raises:
            ConfigurationError: The collection is not one to write to, or a value cannot be a document or is over 16 MB.
        """
        check_collection(collection)
        documents = [encode_value(job_id, number, body) for number, body in enumerate(bodies, start=first)]
        _check_values(documents, first)
        for start in range(0, len(documents), BATCH):
            with self._db.errors(f"writing values to collection {collection!r}"):
                await self._put_documents(self._db.collection(collection), documents[start : start + BATCH])

    async def _put_documents(self, collection: Any, documents: Sequence[Document]) -> None:
        """Insert, which is the cheap way, and replace those that are there."""
        try:
            await collection.bulk_write([InsertOne(document) for document in documents], ordered=False)
        except errors.BulkWriteError as error:
            duplicates, too_large, unwritable = refused_operations(error)
            if is_unknown_outcome(error) or too_large or unwritable:
                raise
            there = [documents[place] for place in sorted(duplicates)]
            replacing = [ReplaceOne({"_id": each["_id"]}, each, upsert=True) for each in there]
            await collection.bulk_write(replacing, ordered=False)

    async def drop_documents(self, collection: str, job_id: str, from_number: int) -> None:
        """Delete a job's values from a number on."""
        check_collection(collection)
        beyond = {"$gte": value_id(job_id, from_number), "$lt": f"{job_id}0"}  # "0" is what follows "/"
        with self._db.errors(f"deleting values from collection {collection!r}"):
            await self._db.collection(collection).delete_many({"_id": beyond})


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
        if size > MAX_DOCUMENT:
            msg = (
                f"write_documents: value {number} takes {size:,} bytes as a document, the limit is {MAX_DOCUMENT:,}; "
                f"write it to a file instead"
            )
            raise ConfigurationError(msg)
