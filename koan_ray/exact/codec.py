"""The values of one declared type as JSON that reads back as the same values."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Final

from pydantic_core import PydanticSerializationError, ValidationError, to_json

from koan_ray.domain.texts import said
from koan_ray.exact import plain, tagging
from koan_ray.exact.compare import Difference, difference
from koan_ray.exact.tags import MARK

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from pydantic_core import SchemaSerializer

_MOST_SEARCHED: Final = 10_000  # values that are looked at to find the one that cannot be written


class NotExactError(Exception):
    """A value would not read back as it is. Becomes a refusal with its path; never raised to users."""

    def __init__(self, path: str, what: str) -> None:
        super().__init__(path, what)
        self.path, self.what = path, what

    def __str__(self) -> str:
        return f"{self.path}: {self.what}" if self.path else self.what


class Codec:
    """Writes and reads the values of a type.

    Args:
        adapter: The type.
    """

    def __init__(self, adapter: TypeAdapter[Any]) -> None:
        self._adapter = adapter
        schema = adapter.core_schema
        if type(schema) is not dict:  # its class is not complete until now
            adapter.rebuild(force=True)
            schema = adapter.core_schema
        self._schema: Any = schema
        self._is_plain = plain.check_of(schema)
        found = list(tagging.nodes(schema))
        self._has_secrets = any(map(tagging.is_secret, found))
        # Written under the names of fields, and read under them as well as under their aliases.
        self._by_name: dict[str, Any] = {"by_name": True} if any("validation_alias" in node for node in found) else {}
        self._serializer: Any = adapter.serializer
        read = adapter.validator.validate_json
        self._read: Callable[[bytes], Any] = partial(read, **self._by_name) if self._by_name else read

    def plainly(self, value: Any) -> bytes | None:
        """Return a value as JSON if it fits the type and is written as it is, which is quick to see; None otherwise."""
        if self._is_plain is None or not self._is_plain(value):
            return None
        try:
            encoded: bytes = self._serializer.to_json(value)
        except (PydanticSerializationError, ValueError):  # lone surrogates
            return None
        return None if MARK in encoded else encoded

    def write(self, value: Any) -> bytes:
        """Return a valid value of the type as JSON that reads back as the same.

        Raises:
            NotExactError: There is none.
        """
        first: NotExactError | None = None
        for way in self._ways:
            try:
                encoded = way(value)
                got = self.read(encoded)
            except Exception as error:  # noqa: BLE001 - serializers and validators of users may raise anything
                problem = self._unreadable(value, error)
            else:
                found = difference(value, got)
                if found is None:
                    return encoded
                problem = _refusal(found)
            # What is said of an attempt that was read back names a place.
            if first is None or (not first.path and problem.path):
                first = problem
        assert first is not None  # noqa: S101 - there is at least one way
        raise first

    def read(self, encoded: bytes) -> Any:
        """Return the value that was written.

        Raises:
            ValidationError: It does not fit the type.
        """
        if MARK in encoded and (tags := self._tagging) is not None:
            return tags.reader.validate_json(encoded, **self._by_name)
        return self._read(encoded)

    @property
    def reads_by_name(self) -> bool:
        """Whether contents are under other names than the type's own JSON Schema has."""
        return bool(self._by_name)

    @cached_property
    def _tagging(self) -> tagging.Tagging | None:
        try:
            return tagging.tagging_of(self._schema)
        except Exception:  # noqa: BLE001 - a schema that cannot be built anew: its odd values are refused
            return None

    @cached_property
    def _ways(self) -> list[Callable[[Any], bytes]]:
        """How a value can be written, by the simplest first. The same value is always written the same way."""
        ways: list[Callable[[Any], bytes]] = []
        tags = self._tagging
        if not self._has_secrets or tags is None:
            ways = [self._as_always, self._for_reading]
        if tags is not None:
            writers = [tags.writer, tags.choosing_writer]
            ways += [partial(self._with_tags, writer) for writer in writers if writer is not None]
        return ways

    def _as_always(self, value: Any) -> bytes:
        encoded: bytes = self._serializer.to_json(value, warnings=False)
        return encoded

    def _for_reading(self, value: Any) -> bytes:
        encoded: bytes = self._serializer.to_json(value, warnings=False, by_alias=False, round_trip=True)
        return encoded

    def _with_tags(self, writer: SchemaSerializer, value: Any) -> bytes:
        return writer.to_json(value, warnings=False, by_alias=False, round_trip=True)

    def _unreadable(self, value: Any, error: Exception) -> NotExactError:
        if isinstance(error, RecursionError):
            return NotExactError("", "is nested too deeply to be written as JSON")
        if isinstance(error, ValidationError):
            item = error.errors(include_url=False, include_context=False)[0]
            path = ".".join(map(str, item["loc"]))
            return NotExactError(path, f"does not read back from JSON: {item['msg']}")
        return NotExactError(_culprit(value), f"cannot be written as JSON: {type(error).__name__}: {said(error)}")


def _refusal(found: Difference) -> NotExactError:
    return NotExactError(found.where, found.what)


def _culprit(value: Any) -> str:
    """Return the path of the first value that cannot be written as JSON; empty where that is not found."""
    pending: list[tuple[tuple[str, ...], Any]] = [((), value)]
    for n, (path, item) in enumerate(pending):
        if n > _MOST_SEARCHED or len(path) > 50:
            break
        inner = _parts(item)
        if inner is not None:
            pending += [((*path, name), part) for name, part in inner]
            continue
        try:
            to_json(item)
        except Exception:  # noqa: BLE001 - whatever it is, it is this one
            return ".".join(path)
    return ""


def _parts(value: Any) -> list[tuple[str, Any]] | None:
    if isinstance(value, dict):
        return [(repr(key)[:60] if not isinstance(key, str) else key, item) for key, item in value.items()]
    if isinstance(value, (list, tuple, set, frozenset)):
        return [(str(place), item) for place, item in enumerate(value)]
    fields = getattr(type(value), "__pydantic_fields__", None) or getattr(type(value), "__dataclass_fields__", None)
    if fields is not None:
        return [(name, getattr(value, name, None)) for name in fields]
    return None
