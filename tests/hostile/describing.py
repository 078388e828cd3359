"""What a value is, as text that two processes can compare: types and every bit of it, NaN and -0.0 included.

Used in bodies, so that what the body saw does not travel by the way that is being tested.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import Any

import pydantic

_LEAVES = (bytes, bytearray, int, bool, type(None))


def described(value: Any, depth: int = 0) -> str:
    """Return a text that is equal for equal values of equal types only."""
    if depth > 40:
        return "(deep)"
    name = type(value).__name__
    inner = depth + 1
    if isinstance(value, float):
        return f"{name}:{'nan' if math.isnan(value) else value.hex()}"
    if isinstance(value, enum.Enum):
        return f"{name}.{value.name}"
    if isinstance(value, pydantic.BaseModel):
        fields = {each: getattr(value, each) for each in type(value).model_fields}
        extra = value.__pydantic_extra__ or {}
        private = value.__pydantic_private__ or {}
        return f"{name}({_pairs({**fields, **extra, **private}, inner)})"
    if isinstance(value, (pydantic.SecretStr, pydantic.SecretBytes)):
        return f"{name}({value.get_secret_value()!r})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return f"{name}({_pairs({f.name: getattr(value, f.name) for f in dataclasses.fields(value)}, inner)})"
    if isinstance(value, dict):
        members = sorted(f"{described(key, inner)}: {described(each, inner)}" for key, each in value.items())
        return f"{name}{{{', '.join(members)}}}"
    if isinstance(value, (set, frozenset)):
        return f"{name}{{{', '.join(sorted(described(each, inner) for each in value))}}}"
    if isinstance(value, (list, tuple)):
        return f"{name}[{', '.join(described(each, inner) for each in value)}]"
    if isinstance(value, str):  # text of a subclass of str may become plain text: it is equal
        return f"str:{str.__str__(value)!r}"
    if isinstance(value, _LEAVES):
        return f"{name}:{value!r}"
    if hasattr(value, "utcoffset") and hasattr(value, "fold"):  # a zone by name and the same offset are one instant
        return f"{name}:{value.isoformat()}"
    return f"{name}:{value!r}"


def _pairs(members: dict[str, Any], depth: int) -> str:
    return ", ".join(f"{key}={described(value, depth)}" for key, value in members.items())
