"""Leases of shards: one collection for all partitions, changed only by a swap of what was seen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pymongo import ReturnDocument, errors

from koan_ray.domain.lease import Lease
from koan_ray.stores import mongo_schema
from koan_ray.stores.codec import SCHEMA_VERSION, Document
from koan_ray.stores.mongo_database import READ_MS, Database

if TYPE_CHECKING:
    from collections.abc import Sequence


class Leases:
    """The leases in one database; see `koan_ray.ports` for what each promises."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def read_lease(self, shard: str) -> Lease | None:
        """Return the lease of a shard as it is now, None if nobody ever took it."""
        with self._db.errors(f"reading the lease of {shard}"):
            return _lease(await self._db.collection(mongo_schema.LEASES).find_one({"_id": shard}, max_time_ms=READ_MS))

    async def take_lease(self, shard: str, *, holder: str, seen: Lease | None, at_least: int = 1) -> Lease | None:
        """Take the lease that was seen, or the one that is not there yet; None if somebody was faster."""
        with self._db.errors(f"taking the lease of {shard}"):
            if seen is not None:
                term = max(seen.term + 1, at_least)
                return await self._change_lease(seen, {"$set": {"holder": holder, "term": term}, "$inc": {"beat": 1}})
            taken = Lease(shard, holder, at_least, 1)
            document = {"_id": shard, "holder": holder, "term": at_least, "beat": 1, "schema_version": SCHEMA_VERSION}
            try:
                await self._db.collection(mongo_schema.LEASES).insert_one(document)
            except errors.DuplicateKeyError:
                return None
            return taken

    async def latest_term(self, shards: Sequence[str]) -> int:
        """Return the highest term among these shards, 0 if none was ever taken."""
        with self._db.errors("reading the leases"):
            cursor = self._db.collection(mongo_schema.LEASES).find(
                {"_id": {"$in": list(shards)}}, {"term": 1}, max_time_ms=READ_MS
            )
            return max([int(document["term"]) async for document in cursor], default=0)

    async def beat(self, lease: Lease) -> Lease | None:
        """Show that the holder lives; None if it holds the lease no longer."""
        with self._db.errors(f"beating for {lease.shard}"):
            held = {"_id": lease.shard, "holder": lease.holder, "term": lease.term}
            return await self._swap_lease(held, {"$inc": {"beat": 1}})

    async def release(self, lease: Lease) -> None:
        """Give the lease back: its holder becomes the empty text, which nobody has to observe before taking over."""
        with self._db.errors(f"releasing {lease.shard}"):
            held = {"_id": lease.shard, "holder": lease.holder, "term": lease.term}
            await self._swap_lease(held, {"$set": {"holder": ""}, "$inc": {"beat": 1}})

    async def _change_lease(self, seen: Lease, update: Document) -> Lease | None:
        as_seen = {"_id": seen.shard, "holder": seen.holder, "term": seen.term, "beat": seen.beat}
        return await self._swap_lease(as_seen, update)

    async def _swap_lease(self, guard: Document, update: Document) -> Lease | None:
        leases = self._db.collection(mongo_schema.LEASES)
        return _lease(await leases.find_one_and_update(guard, update, return_document=ReturnDocument.AFTER))


def _lease(document: Document | None) -> Lease | None:
    if document is None:
        return None
    return Lease(document["_id"], document["holder"], int(document["term"]), int(document["beat"]))
