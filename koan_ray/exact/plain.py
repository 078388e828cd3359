"""Types whose values JSON holds as they are, known once from their core schema; and whether a value is of such a type.

The check looks at exact types, so that an instance of a subclass, a value that was set without validation, a float that is
no finite number or a huge whole number takes the long way. A value that passes needs no validation either: a plain type has
no constraints, validators or serializers of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any, Final

from pydantic import BaseModel

from koan_ray.exact.tags import unwritable

Check = Callable[[Any], bool]

_MOST: Final = 2**63
_MOST_LEVELS: Final = 50
_NO_MATTER: Final = frozenset({"type", "metadata", "ref"})
_SIMPLE: Final = frozenset({str, bool, type(None)})
_OF_MODEL: Final = _NO_MATTER | {"cls", "schema", "config", "custom_init", "root_model", "frozen", "strict"}
_OF_CONFIG: Final = frozenset({"title", "extra_fields_behavior", "strict", "validate_assignment", "validate_by_name"})


def check_of(schema: Any) -> Check | None:
    """Return the check by which values of a type are known as plain; None for a type that has none."""
    try:
        return _check(schema, 0)
    except (KeyError, TypeError, AttributeError):  # a schema of another version of pydantic
        return None


def _check(schema: Any, level: int) -> Check | None:
    kind = schema["type"]
    if level > _MOST_LEVELS or "serialization" in schema:
        return None
    if kind in _LEAVES:
        return _LEAVES[kind] if schema.keys() <= _NO_MATTER else None
    if kind == "default":
        return _check(schema["schema"], level + 1)
    if kind == "nullable":
        return _nullable_check(_check(schema["schema"], level + 1))
    if kind == "list" and schema.keys() <= _NO_MATTER | {"items_schema"}:
        return _list_check(_check(schema.get("items_schema", _ANY), level + 1))
    if kind == "dict" and schema.keys() <= _NO_MATTER | {"keys_schema", "values_schema"}:
        return _dict_check(schema, level)
    if kind == "model" and schema.keys() <= _OF_MODEL:
        return _model_check(schema, level)
    return None


def _nullable_check(inner: Check | None) -> Check | None:
    return None if inner is None else lambda value: value is None or inner(value)


def _list_check(inner: Check | None) -> Check | None:
    return None if inner is None else lambda value: type(value) is list and all(map(inner, value))


def _dict_check(schema: Mapping[str, Any], level: int) -> Check | None:
    keys, inner = schema.get("keys_schema", _ANY), _check(schema.get("values_schema", _ANY), level + 1)
    if inner is None or keys.keys() - _NO_MATTER or keys["type"] not in ("str", "any"):
        return None
    return lambda value: type(value) is dict and all(map(_is_key, value)) and all(map(inner, value.values()))


def _model_check(schema: Mapping[str, Any], level: int) -> Check | None:
    cls, inner, config = schema["cls"], schema["schema"], schema.get("config", {})
    if schema.get("custom_init") or schema.get("root_model") or cls.__private_attributes__ or config.keys() - _OF_CONFIG:
        return None
    extra = config.get("extra_fields_behavior", "ignore")
    if inner["type"] != "model-fields" or extra == "allow" or (inner.get("computed_fields") and extra != "ignore"):
        return None
    if inner.keys() - _NO_MATTER - {"fields", "model_name", "computed_fields", "extra_behavior"}:
        return None
    if inner.get("extra_behavior", "ignore") == "allow" or cls.__getattribute__ is not BaseModel.__getattribute__:
        return None
    checks: list[tuple[str, Check]] = []
    for name, field in inner["fields"].items():
        check = _check(field["schema"], level + 1) if field.keys() <= {"type", "schema", "metadata", "frozen"} else None
        if check is None:
            return None
        checks.append((name, check))
    n_fields = len(checks)

    def is_plain(value: Any) -> bool:
        if type(value) is not cls:
            return False
        state = value.__dict__
        if len(state) < n_fields:
            return False
        for name, check in checks:  # noqa: SIM110 - this is the hot path, and a generator takes twice the time
            if not check(state.get(name, _check)):
                return False
        return True

    return is_plain


def is_plain(value: Any, level: int = 0) -> bool:  # noqa: PLR0911 - by type, and the hot path of values of items
    """Tell whether a value of any type consists of what JSON holds as it is."""
    kind: Any = type(value)
    if kind in _SIMPLE:
        return True
    if kind is int:
        number: int = value
        return -_MOST < number < _MOST
    if kind is float:
        return isfinite(value)
    if level > _MOST_LEVELS:
        return False
    if kind is list:
        for item in value:  # noqa: SIM110 - a generator takes twice the time
            if type(item) not in _SIMPLE and not is_plain(item, level + 1):
                return False
        return True
    if kind is dict:
        for key, item in value.items():
            if type(key) is not str or (type(item) not in _SIMPLE and not is_plain(item, level + 1)):
                return False
        return True
    return False


def _is_str(value: Any) -> bool:
    return type(value) is str


def _is_key(value: Any) -> bool:
    """Tell whether JSON holds a key as it is: lone surrogates in a text are an error, but in a key they are replaced."""
    return type(value) is str and (value.isascii() or not unwritable(value))


_ANY: Final[dict[str, Any]] = {"type": "any"}
_LEAVES: Final[dict[str, Check]] = {
    "any": is_plain,
    "str": _is_str,
    "int": lambda value: type(value) is int and -_MOST < value < _MOST,
    "float": lambda value: type(value) is float and isfinite(value),
    "bool": lambda value: value is True or value is False,
    "none": lambda value: value is None,
}
