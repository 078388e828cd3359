"""Contexts and results that are too long for their documents: files in GridFS, under names that the documents tell."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from gridfs.errors import FileExists, NoFile
from pymongo import errors

from koan_ray.stores import mongo_schema
from koan_ray.stores.codec import Document, blobs_named, blobs_of
from koan_ray.stores.mongo_database import READ_MS, Database

if TYPE_CHECKING:
    from collections.abc import Iterable

    from koan_ray.domain.records import JobRecord


class Blobs:
    """The contents of one database that are kept outside of their documents.

    Args:
        inline_limit: Contents with more bytes than this are kept here.
    """

    def __init__(self, db: Database, inline_limit: int) -> None:
        self._db, self._inline_limit = db, inline_limit

    async def write(self, partition: str, jobs: Iterable[JobRecord]) -> None:
        """Keep the long contents of these jobs, before their documents that name them."""
        for job in jobs:
            for name, content in blobs_of(job, self._inline_limit):
                await self._write_one(partition, name, content)

    async def _write_one(self, partition: str, name: str, content: bytes) -> None:
        """Keep a content under its name, which is always the same content's."""
        bucket = self._bucket(partition)
        files = self._db.collection(f"{mongo_schema.collection_name(mongo_schema.BLOBS, partition)}.files")
        if await files.find_one({"_id": name}, {"_id": 1}) is not None:
            return  # the entry is written after all its pieces
        try:
            await bucket.upload_from_stream_with_id(name, name, content)
        except (FileExists, errors.DuplicateKeyError):  # an earlier attempt left pieces
            with contextlib.suppress(NoFile):
                await bucket.delete(name)
            await bucket.upload_from_stream_with_id(name, name, content)

    async def read(self, partition: str, name: str) -> bytes | None:
        """Return the content of this name, None if there is none."""
        try:
            stream = await self._bucket(partition).open_download_stream(name)
            return bytes(await stream.read())
        except NoFile:
            return None

    async def delete(self, partition: str, document: Document) -> None:
        """Delete what the document of a job names; what is gone already is no error."""
        for name in blobs_named(document):
            with contextlib.suppress(NoFile):
                await self._bucket(partition).delete(name)

    async def delete_unused(self, partition: str, jobs: Iterable[JobRecord]) -> None:
        """Delete what was written for inserts that were refused, unless the job that is there has the same contents."""
        for job in jobs:
            if written := {name for name, _ in blobs_of(job, self._inline_limit)}:
                stored = await self._db.jobs(partition).find_one({"_id": job.id}, max_time_ms=READ_MS)
                for name in written.difference(blobs_named(stored or {})):
                    with contextlib.suppress(NoFile):
                        await self._bucket(partition).delete(name)

    def _bucket(self, partition: str) -> Any:
        return self._db.connection.bucket(mongo_schema.collection_name(mongo_schema.BLOBS, partition))
