"""The seam to the two asynchronous drivers, PyMongo's own and Motor, and their errors in our words.

What the drivers do alike is used as it is. Where they differ (`Driver`), we ask for what both have: `command` instead of
``list_indexes``, for instance, which one awaits and the other does not.
"""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Literal
from urllib.parse import parse_qsl, urlsplit

from bson.codec_options import CodecOptions, DatetimeConversion
from pymongo import ReadPreference, WriteConcern, errors
from pymongo.read_concern import ReadConcern

from koan_ray.domain.texts import readable
from koan_ray.errors import ConfigurationError, StoreError, StoreUnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator

DriverName = Literal["pymongo", "motor"]

# Bounds for what a URL leaves open. A server that is silent for longer counts as away; the engine asks again.
_TIMEOUTS: Final = {"serverSelectionTimeoutMS": 5_000, "connectTimeoutMS": 5_000, "socketTimeoutMS": 10_000}
_WTIMEOUT_MS: Final = 8_000

# Server errors after which nobody knows what was done: no primary, going down, interrupted, timed out.
_UNKNOWN_OUTCOME: Final = frozenset(
    {6, 7, 50, 64, 89, 91, 189, 262, 9001, 10058, 10107, 11600, 11602, 13388, 13435, 13436, 46841}
)
_REFUSED_LOGIN: Final = frozenset({13, 18, 8000})
_TOO_LARGE: Final = frozenset({10334, 17419, 17420})  # of single operations in a bulk write
_DUPLICATE: Final = 11000
# Of single operations in a bulk write: what a server says of a document that it can never hold. Bad value, failed to parse,
# type mismatch, overflow, invalid BSON, path not viable, dollar-prefixed and empty and dotted names, invalid id, validation.
_UNWRITABLE: Final = frozenset({2, 9, 14, 15, 17, 22, 28, 39, 52, 53, 55, 56, 57, 121})


class Connection:
    """One client and its database, with the write concern that our promises need.

    Raises:
        ConfigurationError: The URL is no use, or asks for weaker writes.
    """

    def __init__(self, url: str, driver: DriverName, *, label: str) -> None:
        self.label = label
        self.follows_hints = True
        options = _options(url)
        try:
            self.client = _client_class(driver)(url, **options)
            name = self.client.get_default_database("koan").name
        except (errors.ConfigurationError, errors.InvalidURI, ValueError, TypeError) as error:
            raise ConfigurationError(f"{label}: the URL cannot be used: {_without_secrets(str(error), url)}") from None
        _check_concern(self.client.write_concern.document, label)
        self.db: Any = self.client.get_database(
            name,
            # Dates outside of Python's range are handed over as they are instead of spoiling their whole batch.
            codec_options=CodecOptions(
                tz_aware=True, datetime_conversion=DatetimeConversion.DATETIME_AUTO, unicode_decode_error_handler="replace"
            ),
            write_concern=WriteConcern("majority", j=True, wtimeout=_WTIMEOUT_MS),
            read_concern=ReadConcern("majority"),
            read_preference=ReadPreference.PRIMARY,
        )
        self._bucket_class = _bucket_class(driver)

    def bucket(self, name: str) -> Any:
        """Return the GridFS bucket of this name."""
        return self._bucket_class(self.db, name)

    async def know_server(self) -> None:
        """Find out whether hints help: SecantusDB takes one for the wish to read all of the index, with its documents."""
        self.follows_hints = "secantusVersion" not in await self.db.command("buildInfo")

    async def close(self) -> None:
        """Let go of the connections."""
        closing = self.client.close()  # a coroutine with one driver, None with the other
        if inspect.isawaitable(closing):
            await closing

    @contextmanager
    def errors(self, doing: str) -> Iterator[None]:
        """Translate the driver's errors; ``doing`` says what was tried, as in ``writing 3 jobs``."""
        try:
            yield
        except errors.PyMongoError as error:
            raise translated(error, self.label, doing) from error


def translated(error: errors.PyMongoError, label: str, doing: str) -> StoreError | ConfigurationError:
    """Return the error of ours that says the same."""
    if is_unknown_outcome(error):
        return StoreUnavailableError(f"{label}: no certain answer while {doing}: {_short(error)}")
    if isinstance(error, errors.OperationFailure) and error.code in _REFUSED_LOGIN:
        return ConfigurationError(
            f"{label}: the server refused us while {doing}: {_short(error)}; check user, password, authSource and roles"
        )
    return StoreError(f"{label}: {doing} failed: {_short(error)}")


def is_unknown_outcome(error: errors.PyMongoError) -> bool:
    """Tell whether, after this error, a write may have been made or not."""
    if isinstance(error, errors.BulkWriteError):
        concerns = error.details.get("writeConcernErrors") or []
        return bool(concerns) or any(item.get("code") in _UNKNOWN_OUTCOME for item in error.details.get("writeErrors", []))
    if isinstance(error, errors.OperationFailure):
        unknown = (errors.WTimeoutError, errors.WriteConcernError, errors.ExecutionTimeout)
        return isinstance(error, unknown) or error.code in _UNKNOWN_OUTCOME
    # `InvalidOperation`: the client was closed under our hands.
    return isinstance(error, (errors.ConnectionFailure, errors.InvalidOperation))


def refused_operations(error: errors.BulkWriteError) -> tuple[set[int], set[int], dict[int, str]]:
    """Return the places of operations that found a duplicate key, that were too large, and that no document can hold.

    The last with what the server says of them.

    Raises:
        BulkWriteError: An operation failed for another reason.
    """
    duplicates, too_large, unwritable = set(), set(), {}
    for item in error.details.get("writeErrors", []):
        if item.get("code") == _DUPLICATE:
            duplicates.add(item["index"])
        elif item.get("code") in _TOO_LARGE:
            too_large.add(item["index"])
        elif item.get("code") in _UNWRITABLE:
            unwritable[item["index"]] = readable(f"the server refuses it: {item.get('errmsg', '')}", 500)
        else:
            raise error
    return duplicates, too_large, unwritable


def _client_class(driver: str) -> Any:
    if driver == "motor":
        from motor.motor_asyncio import AsyncIOMotorClient

        return AsyncIOMotorClient
    if driver == "pymongo":
        from pymongo import AsyncMongoClient

        return AsyncMongoClient
    raise ConfigurationError(f"driver: expected 'pymongo' or 'motor', got {driver!r}")


def _bucket_class(driver: str) -> Any:
    if driver == "motor":
        from motor.motor_asyncio import AsyncIOMotorGridFSBucket

        return AsyncIOMotorGridFSBucket
    from gridfs import AsyncGridFSBucket

    return AsyncGridFSBucket


def _options(url: str) -> dict[str, Any]:
    try:
        given = {name.lower() for name, _ in parse_qsl(urlsplit(url).query)}
    except ValueError:
        given = set()
    options: dict[str, Any] = {name: value for name, value in _TIMEOUTS.items() if name.lower() not in given}
    # An unknown outcome is resolved by reading back, which standalone servers allow, too; theirs they do not retry.
    return {**options, "retryWrites": False, "retryReads": True, "appname": "koan_ray"}


def _check_concern(concern: dict[str, Any], label: str) -> None:
    if concern.get("w", "majority") != "majority":
        raise ConfigurationError(
            f"{label}: the URL asks for w={concern['w']}, and an acknowledged job must be on a majority of the servers; "
            f"remove w from the URL or use w=majority"
        )
    if concern.get("j") is False:
        raise ConfigurationError(
            f"{label}: the URL asks for journal=false, and an acknowledged job must survive the server's crash; remove it"
        )


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(', full error:')[0].partition(', Timeout:')[0][:300]}"


def _without_secrets(message: str, url: str) -> str:
    """Return a message about a URL, or nothing of it where user and password could be in it."""
    return "it is malformed (text withheld, because it may hold the password)" if "@" in url else message
