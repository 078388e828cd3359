"""Which collections and indexes there are, and making sure of them.

Each index makes every write dearer, so there are seven for jobs, two for executions and one for parts;
`koan_ray.stores.mongo_filters` says which query walks which. The sparse ones hold only documents that have the field, and
the one of jobs over items holds only those: other jobs pay for none of them. None of them is unique but the primary key,
which every server has: it is what keeps a job from being there twice, and the key of a part is made of job, stream and
number (`koan_ray.stores.codec.part_id`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pymongo import errors

from koan_ray.domain.partitions import NAME, check_partition
from koan_ray.errors import ConfigurationError

if TYPE_CHECKING:
    from koan_ray.stores.mongo_driver import Connection

JOBS: Final = "jobs"
EXECUTIONS: Final = "executions"
ITEMS: Final = "items"
LEASES: Final = "leases"
META: Final = "meta"
LEADS: Final = "terms.spec.lead"  # true in jobs over items, absent in others, since there are jobs over items
BLOBS: Final = "blobs"
LATEST_INDEX: Final = "over_items"
RETRIES_INDEX: Final = "retries"
LATEST_INDEXES: Final = frozenset({LATEST_INDEX, RETRIES_INDEX})  # which databases of earlier versions lack
_NO_COLLECTION: Final = 26
_CONFLICTS: Final = frozenset({67, 68, 85, 86})  # cannot create, exists already, conflict of options, conflict of keys


class Index(NamedTuple):
    """One index; ``name`` is what queries ask for."""

    name: str
    keys: tuple[tuple[str, int], ...]
    sparse: bool = False
    only: tuple[str, bool] | None = None  # a field and the value that a document must have to be in it

    @property
    def options(self) -> dict[str, Any]:
        """Return what the server is told of it besides its keys."""
        sparse = {"sparse": True} if self.sparse else {}
        return {**sparse, "partialFilterExpression": dict([self.only])} if self.only else sparse


JOB_INDEXES: Final = (
    Index("created", (("created_at", 1), ("_id", 1))),
    Index("status", (("status", 1), ("created_at", 1), ("_id", 1))),  # also: the unfinished jobs, oldest first
    Index("completed", (("completed_at", 1), ("_id", 1))),
    Index("parent", (("parent_job_id", 1),), sparse=True),
    Index("correlation", (("correlation_id", 1),), sparse=True),
    Index(RETRIES_INDEX, (("retry_of", 1),), sparse=True),
    Index(LATEST_INDEX, ((LEADS, 1), ("created_at", 1), ("_id", 1)), only=(LEADS, True)),
)
EXECUTION_INDEXES: Final = (
    Index("job", (("job_id", 1),)),
    Index("open", (("open", 1),), sparse=True),
)
ITEM_INDEXES: Final = (Index("part", (("job_id", 1), ("stream", 1), ("seq", 1))),)


def collection_name(kind: str, partition: str) -> str:
    """Return the name of a partition's collection.

    Raises:
        ConfigurationError: The partition's name is not 1 to 64 of a-z, 0-9, ``_`` and ``-``; the empty name is the default.
    """
    return f"{kind}.{check_partition(partition)}" if partition else kind


def partitions_in(collections: list[str]) -> list[str]:
    """Return the names of the partitions that have a collection of jobs, the default first."""
    prefix = f"{JOBS}."
    named = [name.removeprefix(prefix) for name in collections if name.startswith(prefix)]
    return ["", *sorted(name for name in named if NAME.fullmatch(name))]


async def ensure_partition(connection: Connection, partition: str) -> None:
    """Create what a partition lacks, and check what it has.

    Raises:
        ConfigurationError: An index is in the way or cannot be made, or documents would be deleted by age.
    """
    for kind, wanted in ((JOBS, JOB_INDEXES), (EXECUTIONS, EXECUTION_INDEXES), (ITEMS, ITEM_INDEXES)):
        await _ensure(connection, collection_name(kind, partition), wanted)


async def _ensure(connection: Connection, name: str, wanted: tuple[Index, ...]) -> None:
    present = await _indexes(connection, name)
    for found in present.values():
        if "expireAfterSeconds" in found:
            raise ConfigurationError(
                f"{connection.label}: index {found['name']!r} of {name} deletes jobs by age; drop it. koan_ray removes "
                f"finished jobs itself, and unfinished ones never."
            )
    missing = [index for index in wanted if not _is_present(connection, name, index, present.get(index.name))]
    for index in missing:
        await _create(connection, name, index)


async def _indexes(connection: Connection, name: str) -> dict[str, dict[str, Any]]:
    try:
        answer = await connection.db.command({"listIndexes": name, "cursor": {"batchSize": 1000}})
    except errors.OperationFailure as error:
        if error.code == _NO_COLLECTION:
            return {}
        raise
    return {index["name"]: index for index in answer["cursor"]["firstBatch"]}


def _is_present(connection: Connection, name: str, index: Index, present: dict[str, Any] | None) -> bool:
    if present is None:
        return False
    keys = tuple((key, int(direction)) for key, direction in present["key"].items())
    restricted = present.get("unique") or present.get("hidden")
    options = {name: value for name in ("sparse", "partialFilterExpression") if (value := present.get(name))}
    if keys != index.keys or options != index.options or restricted:
        raise _in_the_way(connection, name, index, f"an index of this name exists with other keys or options: {keys}")
    return True


async def _create(connection: Connection, name: str, index: Index) -> None:
    try:
        await connection.db[name].create_index(list(index.keys), name=index.name, **index.options)
    except errors.OperationFailure as error:
        if error.code in _CONFLICTS:
            raise _in_the_way(connection, name, index, error.details["errmsg"] if error.details else "") from None
        raise


def _in_the_way(connection: Connection, name: str, index: Index, problem: str) -> ConfigurationError:
    keys = ", ".join(f"{key}: {direction}" for key, direction in index.keys)
    return ConfigurationError(
        f"{connection.label}: index {index.name!r} of {name} ({keys}) is needed and cannot be made: {problem}; drop what is "
        f"in its way"
    )
