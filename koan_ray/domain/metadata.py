"""Metadata of jobs: any value that a user may give, as the plain JSON value that is stored, shown and looked for.

A submit and a filter use the same function, so that a job is found by the very value that it was given: a `UUID`, a tuple
and a set as well as a text. What JSON cannot say is refused, and nothing becomes something else without a word.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import os
from collections import deque
from collections.abc import Mapping
from enum import Enum
from typing import Any, Final

from pydantic_core import PydanticSerializationError, from_json, to_json

from koan_ray.domain.durations import number
from koan_ray.domain.texts import is_unicode, quoted, said

KEYS: Final = "keys are non-empty text without '.' or NUL, not beginning with '$'"
_MAX_DEPTH: Final = 64
_MAX_BITS: Final = 4096  # of a whole number; Python itself refuses to read and write much longer ones
_LISTS: Final = (list, tuple, deque)
_SETS: Final = (set, frozenset)


class MetadataError(ValueError):
    """A value that no metadata can hold: where it is, from the key on, and why."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path, problem)
        self.path, self.problem = path, problem


def is_metadata_key(key: object) -> bool:
    """Tell whether metadata can have this key, in every store."""
    return (
        isinstance(key, str) and bool(key) and not key.startswith("$") and "." not in key and "\0" not in key
        and is_unicode(key)
    )  # fmt: skip


def plain_metadata(metadata: Mapping[Any, Any]) -> dict[str, Any]:
    """Return metadata as plain JSON values; the same again changes nothing.

    Text, truth values, whole and finite numbers, None, lists and dicts of them stay as they are. Tuples become lists, sets
    lists in an order of their own, members of an `Enum` their values, models and dataclasses dicts; all else is written as
    pydantic writes it, such as a `UUID` or a `Decimal` as text.

    Raises:
        MetadataError: A key cannot be one, or a value cannot be kept: no JSON, not finite, a secret, not Unicode.
    """
    found: dict[str, Any] = {}
    for key, value in metadata.items():
        if not is_metadata_key(key):
            raise MetadataError(quoted(key), KEYS)
        name = str.__str__(key)
        try:
            found[name] = _plain(value, name, 0)
        except MetadataError:
            raise
        except Exception as error:  # noqa: BLE001 - what reads a value may be its owner's code
            raise MetadataError(name, f"{quoted(value)} cannot be read: {type(error).__name__}: {said(error)}") from None
    return found


def is_same(one: Any, other: Any) -> bool:
    """Tell whether two plain values are the same: numbers by what they count, and a truth value is no number."""
    if type(one) is bool or type(other) is bool:
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(is_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(is_same, one, other))
    return bool(one == other)


def _plain(value: Any, path: str, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise MetadataError(path, f"is nested deeper than {_MAX_DEPTH}, or holds itself")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Enum):
        return _plain(value.value, path, depth + 1)
    if isinstance(value, (str, int, float)):
        return _scalar(value, path)
    if isinstance(value, Mapping):
        return _mapping(value, path, depth)
    if isinstance(value, _LISTS):
        return [_plain(item, f"{path}.{place}", depth + 1) for place, item in enumerate(value)]
    if isinstance(value, _SETS):  # whose own order differs from one process to the next
        return sorted((_plain(item, f"{path}.(an item)", depth + 1) for item in value), key=to_json)
    return _other(value, path, depth)


def _scalar(value: str | float, path: str) -> str | float:
    """Return a value of one of these types, and of none below them."""
    if isinstance(value, str):
        return _text(str.__str__(value), path)
    return _whole(int.__int__(value), path) if isinstance(value, int) else _finite(float.__float__(value), path)


def _mapping(value: Mapping[Any, Any], path: str, depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, item in value.items():
        name = _text(str.__str__(key), path) if isinstance(key, str) and not isinstance(key, Enum) else _key(key, path)
        if name in found:
            raise MetadataError(path, f"two of its keys are {quoted(name)} as text; give them different ones")
        found[name] = _plain(item, f"{path}.{name}", depth + 1)
    return found


def _key(key: object, path: str) -> str:
    try:
        (name,) = from_json(to_json({key: None}))
    except (PydanticSerializationError, ValueError) as error:
        raise MetadataError(path, f"its key {quoted(key)} cannot be written as JSON: {error}") from None
    return _text(name, path)


def _other(value: Any, path: str, depth: int) -> Any:
    if hasattr(value, "get_secret_value"):
        raise MetadataError(path, "is a secret, and metadata is shown to everybody; give what may be seen")
    if hasattr(value, "model_dump") and not isinstance(value, type):
        return _plain(value.model_dump(), path, depth + 1)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain({each.name: getattr(value, each.name) for each in dataclasses.fields(value)}, path, depth + 1)
    if isinstance(value, os.PathLike):
        return _plain(os.fspath(value), path, depth + 1)
    try:
        return _plain(from_json(to_json(value)), path, depth + 1)
    except (PydanticSerializationError, ValueError) as error:
        if isinstance(error, MetadataError):
            raise
        counted = _counted(value)
        if counted is None:
            raise MetadataError(path, f"{quoted(value)} cannot be written as JSON: {error}") from None
        return _plain(counted, path, depth + 1)


def _counted(value: Any) -> int | float | None:
    """Return a number of another library's as Python's own."""
    try:
        return operator.index(value)
    except Exception:  # noqa: BLE001 - somebody else's __index__; it may be a fraction
        return number(value)


def _text(value: str, path: str) -> str:
    if not is_unicode(value):
        problem = (
            "is no Unicode, as are names of files in another encoding; give it as text that everybody can read, for "
            "example os.fsencode(name).decode(errors='backslashreplace')"
        )
        raise MetadataError(path, problem)
    return value


def _whole(value: int, path: str) -> int:
    if value.bit_length() > _MAX_BITS:
        raise MetadataError(path, f"has {value.bit_length():,} bits, the limit is {_MAX_BITS:,}; give it as text")
    return value


def _finite(value: float, path: str) -> float:
    if not math.isfinite(value):
        raise MetadataError(path, f"is {value}, which JSON cannot say; leave the key out, or give it as text")
    return value
