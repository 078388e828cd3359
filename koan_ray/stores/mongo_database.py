"""The open database that all rooms of the store work in: its collections by partition, hints, and errors in our words."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from pymongo import errors

from koan_ray.errors import ConfigurationError, StoreUnavailableError
from koan_ray.stores import mongo_schema
from koan_ray.stores.codec import SCHEMA_VERSION
from koan_ray.stores.mongo_driver import Connection

if TYPE_CHECKING:
    import contextlib

    from koan_ray.stores.mongo_driver import DriverName

BATCH: Final = 500  # documents that are read or written together
READ_MS: Final = 8_000  # the server gives up on a read after this long
SCAN_MS: Final = 120_000  # and on one of the scans at a start
MAX_DOCUMENT: Final = 16 * 1024 * 1024  # bytes, MongoDB's limit


class Database:
    """One database, opened and closed, and what is known of its partitions.

    Whatever needs the server raises `StoreUnavailableError` while it is not open.

    Args:
        url: ``mongodb://…`` with the name of the database as its path.
        driver: ``pymongo`` or ``motor``.
        label: What messages call it, as in ``source 'jobs'``.
        read_only: Write nothing when opening, and prepare no partition.
    """

    def __init__(self, url: str, driver: DriverName, *, label: str, read_only: bool) -> None:
        self._url, self._driver, self._label, self._read_only = url, driver, label, read_only
        self._connection: Connection | None = None
        self._opening = asyncio.Lock()
        self._ensuring = asyncio.Lock()
        self.partitions: dict[str, None] = {}  # those whose collections are known to be in order, in order of discovery

    async def open(self) -> None:
        """Connect, make the first write, and bring the partitions that are there in order; nothing if it is open.

        Raises:
            ConfigurationError: The URL is no use, the login is refused, or the server cannot keep our write concern.
            StoreUnavailableError: The server cannot be reached.
        """
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
        """Let go of the connections; it may be opened again."""
        async with self._opening:
            connection, self._connection = self._connection, None
            self.partitions.clear()
            if connection is not None:
                await connection.close()

    async def _prepare(self, connection: Connection) -> None:
        if self._read_only:
            return
        await self._check_acknowledgement(connection)
        for partition in mongo_schema.partitions_in(await connection.db.list_collection_names()):
            await mongo_schema.ensure_partition(connection, partition)
            self.partitions[partition] = None

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
    def connection(self) -> Connection:
        """The open connection."""
        if self._connection is None:
            raise StoreUnavailableError(f"{self._label}: is not open; call open() first")
        return self._connection

    def errors(self, doing: str) -> contextlib.AbstractContextManager[None]:
        """Translate the driver's errors; ``doing`` says what was tried, as in ``writing 3 jobs``."""
        return self.connection.errors(doing)

    def along(self, index: str) -> dict[str, Any]:
        """Return the option that names the index to walk, for a server that profits from it."""
        if self._read_only and index in mongo_schema.LATEST_INDEXES:
            return {}  # no writer of this version may have been here yet, and to name what is missing is an error
        return {"hint": index} if self.connection.follows_hints else {}

    def collection(self, name: str) -> Any:
        """Return the collection of exactly this name."""
        return self.connection.db[name]

    def jobs(self, partition: str) -> Any:
        """Return a partition's collection of jobs."""
        return self.collection(mongo_schema.collection_name(mongo_schema.JOBS, partition))

    def executions(self, partition: str) -> Any:
        """Return a partition's collection of executions."""
        return self.collection(mongo_schema.collection_name(mongo_schema.EXECUTIONS, partition))

    def items(self, partition: str) -> Any:
        """Return a partition's collection of parts."""
        return self.collection(mongo_schema.collection_name(mongo_schema.ITEMS, partition))

    async def ensure(self, partition: str) -> None:
        """Make sure of a partition's collections before the first write to it."""
        if partition in self.partitions:
            return
        mongo_schema.collection_name(mongo_schema.JOBS, partition)
        async with self._ensuring:
            if partition not in self.partitions and not self._read_only:
                with self.errors(f"preparing partition {partition!r}"):
                    await mongo_schema.ensure_partition(self.connection, partition)
            self.partitions[partition] = None

    async def refresh_partitions(self) -> list[str]:
        """Return the partitions there are, also those that somebody else has begun."""
        for name in mongo_schema.partitions_in(await self.connection.db.list_collection_names()):
            await self.ensure(name)
        return list(self.partitions)

    async def list_partitions(self) -> list[str]:
        """Return the partitions there are, with the errors translated."""
        with self.errors("listing partitions"):
            return await self.refresh_partitions()
