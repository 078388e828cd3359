"""Where two values differ: by structure and type, whatever their classes take for equal.

``1``, ``1.0`` and ``True`` are three values, not a number equals not a number, and a subclass is not its base. The
``__eq__`` of users is called for classes of which nothing else is known, and then it may raise. The walk is as long as the
second value, which was read from JSON, is large.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import pickle
from collections import deque
from collections.abc import Mapping
from datetime import datetime, time
from decimal import Decimal
from typing import Any, Final, NamedTuple
from zoneinfo import ZoneInfo

from pydantic import BaseModel, Secret, SecretBytes, SecretStr

from koan_ray.exact.tags import is_number_of_numpy

_PLAIN: Final = frozenset({int, str, bool, bytes, type(None)})
_OF_SECRETS: Final = (SecretStr, SecretBytes, Secret)
_MISSING: Final = object()


class Difference(NamedTuple):
    """The first place at which two values differ."""

    path: tuple[str, ...]
    what: str

    @property
    def where(self) -> str:
        """The path as text; empty for the whole value."""
        return ".".join(self.path)


def difference(given: Any, got: Any) -> Difference | None:
    """Return where ``got`` is not what was given, and how; None where they are the same."""
    try:
        return _difference(given, got, ())
    except RecursionError:
        return Difference((), "is nested too deeply to be compared")


def _difference(given: Any, got: Any, path: tuple[str, ...]) -> Difference | None:  # noqa: PLR0911, PLR0912, C901 - by type
    if given is got:
        return None
    kind = type(given)
    if kind is not type(got):
        if is_number_of_numpy(given) and type(got) is float:
            return _difference(float(given), got, path)
        if kind is int and type(got) is float and given == got:  # which is read only where a float is declared
            return None
        return Difference(path, _other_type(given, got))
    if kind in _PLAIN:
        return None if given == got else _changed(path, given, got)
    if kind is float:
        return None if _same_float(given, got) else _changed(path, given, got)
    if isinstance(given, BaseModel):
        return _of_models(given, got, path)
    if isinstance(given, Mapping):
        return _of_mappings(given, got, path)
    if isinstance(given, (list, tuple, deque)):
        return _of_sequences(given, got, path)
    if isinstance(given, (set, frozenset)):
        return None if _bag(given) == _bag(got) else Difference(path, "reads back with other elements")
    if isinstance(given, _OF_SECRETS):
        inner = _difference(given.get_secret_value(), got.get_secret_value(), path)
        return None if inner is None else Difference(path, "is a secret that reads back as another")
    if dataclasses.is_dataclass(given):
        return _of_attributes(given, got, path, [field.name for field in dataclasses.fields(given)])
    if isinstance(given, (datetime, time)):
        return None if _same_clock(given, got) else _changed(path, given, got)
    if isinstance(given, Decimal):
        return None if given.as_tuple() == got.as_tuple() else _changed(path, given, got)
    if isinstance(given, complex):
        same = _same_float(given.real, got.real) and _same_float(given.imag, got.imag)
        return None if same else _changed(path, given, got)
    return _of_objects(given, got, path)


def _of_models(given: BaseModel, got: BaseModel, path: tuple[str, ...]) -> Difference | None:
    mine, others = given.__dict__, got.__dict__
    for name, field in type(given).__pydantic_fields__.items():
        found = _between(mine.get(name, _MISSING), others.get(name, _MISSING), (*path, name))
        if found is not None and field.exclude:
            return Difference(
                (*path, name), "is excluded from what is written; declare it without exclude, or leave its default"
            )
        if found is not None:
            return found
    found = _difference(given.__pydantic_extra__, got.__pydantic_extra__, path)
    if found is not None:
        return found
    private, restored = given.__pydantic_private__ or {}, got.__pydantic_private__ or {}
    for name in private.keys() | restored.keys():
        found = _between(private.get(name, _MISSING), restored.get(name, _MISSING), (*path, name))
        if found is not None:
            return Difference(found.path, "is a private attribute, which is not written; make it a field, or compute it")
    return None


def _between(one: Any, other: Any, path: tuple[str, ...]) -> Difference | None:
    if other is _MISSING and one is not _MISSING:
        return Difference(path, "is lost on the way")
    if one is _MISSING and other is not _MISSING:
        return Difference(path, "is not set, and reads back with a value")
    return _difference(one, other, path)


def _of_mappings(given: Mapping[Any, Any], got: Mapping[Any, Any], path: tuple[str, ...]) -> Difference | None:
    if len(given) != len(got):
        return Difference(path, f"has {len(given):,} keys, of which {len(got):,} read back")
    for (key, value), (other_key, other) in zip(given.items(), got.items(), strict=True):
        found = _difference(key, other_key, path)
        if found is not None:
            return Difference((*path, _shown(key)), f"is a key that {found.what}")
        found = _difference(value, other, (*path, str(key)))
        if found is not None:
            return found
    return None


def _of_sequences(given: Any, got: Any, path: tuple[str, ...]) -> Difference | None:
    if len(given) != len(got):
        return Difference(path, f"has {len(given):,} elements, and reads back with {len(got):,}")
    for place, (one, other) in enumerate(zip(given, got, strict=True)):
        found = _difference(one, other, (*path, str(place)))
        if found is not None:
            return found
    return None


def _of_attributes(given: Any, got: Any, path: tuple[str, ...], names: list[str]) -> Difference | None:
    for name in names:
        found = _between(_attribute(given, name), _attribute(got, name), (*path, name))
        if found is not None:
            return found
    return None


def _attribute(of: Any, name: str) -> Any:
    try:
        return getattr(of, name)
    except Exception:  # noqa: BLE001 - a descriptor of a user's
        return _MISSING


def _of_objects(given: Any, got: Any, path: tuple[str, ...]) -> Difference | None:
    """Compare instances of classes of which nothing is known: by their ``__eq__``, or by what they consist of."""
    if isinstance(given, enum.Enum) and not isinstance(given, enum.Flag):  # members of one class are the same or are not
        return Difference(path, f"reads back as another member, {type(got).__name__}.{got.name}")
    own: Any = type(given).__eq__
    if own is object.__eq__:
        mine, others = getattr(given, "__dict__", None), getattr(got, "__dict__", None)
        if isinstance(mine, dict) and isinstance(others, dict):
            return _of_mappings(mine, others, path)
        slots = [name for cls in type(given).__mro__ for name in _names(cls.__dict__.get("__slots__", ()))]
        return _of_attributes(given, got, path, slots)
    problem = ""
    try:
        if bool(given == got):
            return None
    except Exception as error:  # noqa: BLE001 - an __eq__ of a user's
        problem = f"cannot be compared: its __eq__ raised {type(error).__name__}"
    if _same_state(given, got):  # arrays, whose comparison has no truth value, and what holds something that is no number
        return None
    return Difference(path, problem) if problem else _changed(path, given, got)


def _same_state(given: Any, got: Any) -> bool:
    try:
        return pickle.dumps(given, protocol=5) == pickle.dumps(got, protocol=5)
    except Exception:  # noqa: BLE001 - what a user's class does when it is pickled
        return False


def _names(slots: Any) -> list[str]:
    return [slots] if isinstance(slots, str) else [name for name in slots if name not in ("__dict__", "__weakref__")]


def _bag(values: Any) -> dict[Any, Any]:
    return {_token(value): None for value in values}


def _token(value: Any) -> Any:
    if isinstance(value, tuple):
        return (type(value), *map(_token, value))
    return (type(value), "nan" if isinstance(value, (float, Decimal)) and value != value else value)  # noqa: PLR0124


def _same_float(one: float, other: float) -> bool:
    if one == other:
        return math.copysign(1.0, one) == math.copysign(1.0, other)
    return one != one and other != other  # noqa: PLR0124 - not a number


def _same_clock(one: Any, other: Any) -> bool:
    if one.replace(tzinfo=None) != other.replace(tzinfo=None) or one.fold != other.fold:
        return False
    return one.utcoffset() == other.utcoffset() and _zone(one.tzinfo) == _zone(other.tzinfo)


def _zone(of: Any) -> str | None:
    return of.key if isinstance(of, ZoneInfo) and of.key != "UTC" else None


# --- words -----------------------------------------------------------------------------------------------------------


def _other_type(given: Any, got: Any) -> str:
    mine, other = type(given).__name__, type(got).__name__
    if mine == other:
        mine, other = f"{type(given).__module__}.{mine}", f"{type(got).__module__}.{other}"
    return f"is a {mine} and reads back as {other}; declare the type that it has (of several alike, with a discriminator)"


def _changed(path: tuple[str, ...], given: Any, got: Any) -> Difference:
    how = f": {_shown(given)} becomes {_shown(got)}" if isinstance(given, (int, float, datetime, time, Decimal)) else ""
    return Difference(path, f"reads back changed{how}; let its validators accept what its serializers write")


def _shown(value: Any) -> str:
    return repr(value)[:60] if type(value) in (int, float, bool, str, datetime, time, Decimal) else type(value).__name__
