"""Values for which no type is declared, those of items: builtin ones come back as they were, others as plain as JSON is.

A model or a dataclass becomes a dict of its fields, anything else that JSON has a form for becomes that: a path its text, a
member of an enumeration its value.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from typing import Any, Final

from pydantic import BaseModel
from pydantic_core import from_json, to_json

from koan_ray.domain.texts import readable
from koan_ray.exact.plain import is_plain
from koan_ray.exact.tags import MARK, octets, revived, tagged

_OF_BYTES: Final = b'"koan:bytes":'


def encoded(value: Any) -> bytes:
    """Return a value as JSON, for `decoded`.

    Raises:
        Exception: Whatever is in the way: it holds something that JSON has no form for.
    """
    written = _plainly(value)
    if written is not None and MARK not in written:
        return written
    written = to_json(tagged(value, 0, _as_builtin))
    if _OF_BYTES in written:
        _refuse_binary(revived(from_json(written)))
    return written


def _refuse_binary(value: Any) -> None:
    """Refuse bytes that are no text: values are for people and tools to read, and large ones belong elsewhere.

    Raises:
        ValueError: There are some.
    """
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, bytes) and isinstance(octets(item), dict):
            msg = "it holds bytes that are no UTF-8 text; encode them, for example with base64, or store them elsewhere"
            raise ValueError(msg)  # noqa: TRY004 - it is what they hold
        if isinstance(item, dict):
            pending += [part for pair in item.items() for part in pair]
        elif isinstance(item, (list, tuple, set, frozenset)):
            pending += item


def decoded(array: bytes) -> list[Any]:
    """Return the values of an array of JSON."""
    values: list[Any] = json.loads(array)
    return [revived(value) for value in values] if MARK in array else values


def flat(value: Any) -> Any:
    """Return a value as files and collections have it: JSON values, and floats that are no finite numbers.

    Tuples and sets are arrays, instants ISO 8601, bytes text or else base64.

    Raises:
        ValueError: Two keys of a dict would have one name there.
    """
    return value if _plainly(value) is not None else _flat(value)


def _flat(value: Any) -> Any:
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return readable(value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode() if isinstance(octets(value), dict) else value.decode()
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_flat(item) for item in value]
    if isinstance(value, dict):
        made = {_name(key): _flat(item) for key, item in value.items()}
        if len(made) < len(value):
            msg = f"a dict with the keys {', '.join(map(repr, value))[:200]} has two of one name there; give them others"
            raise ValueError(msg)
        return made
    return from_json(to_json(value))


def line(value: Any) -> bytes:
    """Return a value as strict JSON: a float that is no finite number is a text, such as ``"NaN"``."""
    return _plainly(value) or to_json(_flat(value), inf_nan_mode="strings")


def _plainly(value: Any) -> bytes | None:
    """Return a value as JSON if that has a form for all of it."""
    if not is_plain(value):
        return None
    try:
        return to_json(value)
    except ValueError:  # lone surrogates
        return None


def _name(key: Any) -> str:
    return readable(key) if isinstance(key, str) else next(iter(from_json(to_json({key: None}))))


def _as_builtin(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(warnings=False)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return from_json(to_json(value))
