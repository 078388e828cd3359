"""Values that JSON has no form for, as tags: JSON objects with one member, whose name begins with ``koan:``."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID
from zoneinfo import ZoneInfo

from pydantic import Secret, SecretBytes, SecretStr, TypeAdapter

if TYPE_CHECKING:
    from collections.abc import Callable

PREFIX: Final = "koan:"
MARK: Final = b'"koan:'  # in what may hold a tag
_STARS: Final = "**********"
_MOST_LEVELS: Final = 200  # JSON that is nested deeper is not read by pydantic


def is_tag(value: object) -> bool:
    """Tell whether a JSON value is a tag, or looks like one."""
    return isinstance(value, dict) and len(value) == 1 and str(next(iter(value))).startswith(PREFIX)


# --- writing ---------------------------------------------------------------------------------------------------------


def tagged(value: Any, level: int = 0, other: Callable[[Any], Any] | None = None) -> Any:  # noqa: PLR0911 - by type
    """Return a value of builtin types as JSON values from which `revived` makes the same again.

    Args:
        value: The value.
        level: How deep it is within another.
        other: Makes a value of builtin types of a value of any other type.

    Raises:
        TypeError: It holds something of another type, for example a model or a member of an enumeration.
    """
    kind = type(value)
    if kind is int or kind is bool or value is None:
        return value
    if level > _MOST_LEVELS:
        msg = f"it is nested more than {_MOST_LEVELS} levels deep"
        raise TypeError(msg)
    if kind is list:
        return [tagged(item, level + 1, other) for item in value]
    if kind is dict:
        if all(type(key) is str and not unwritable(key) for key in value) and not is_tag(value):
            return {key: tagged(item, level + 1, other) for key, item in value.items()}
        pairs = [[tagged(key, level + 1, other), tagged(item, level + 1, other)] for key, item in value.items()]
        return {"koan:dict": pairs}
    for known, write in _LEAVES:
        if kind is known:
            return write(value)
    if kind in _MANY:
        return {_MANY[kind]: [tagged(item, level + 1, other) for item in value]}
    if isinstance(value, (SecretStr, SecretBytes)):
        return secret(value)
    if is_number_of_numpy(value):
        return floating(float(value))
    if other is not None:
        return tagged(other(value), level + 1, other)
    msg = f"a {kind.__name__} has no form in JSON"
    raise TypeError(msg)


def floating(value: float) -> Any:
    """Return a float; one that is no finite number as a tag."""
    if math.isfinite(value):
        return value
    return {"koan:float": "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}


def text(value: str) -> Any:
    """Return a text; one with lone surrogates, which cannot be encoded, as a tag."""
    return {"koan:str": base64.b64encode(value.encode("utf-8", "surrogatepass")).decode()} if unwritable(value) else value


def unwritable(value: str) -> bool:
    """Tell whether a text holds lone surrogates."""
    if value.isascii():
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return True
    return False


def octets(value: bytes) -> Any:
    """Return bytes; what is no UTF-8 as a tag."""
    try:
        value.decode()
    except UnicodeDecodeError:
        return _bytes(value)
    return value


def instant(value: datetime) -> Any:
    """Return a date and time; one with a zone by name, or with an hour that comes twice, as a tag."""
    return _clock(value, "koan:datetime") if _is_zoned(value) else value


def clock_time(value: time) -> Any:
    """Return a time; with a zone by name, or whose hour comes twice, as a tag."""
    return _clock(value, "koan:time") if _is_zoned(value) else value


_AS_ISO = TypeAdapter(timedelta)


def span(value: timedelta) -> Any:
    """Return a timedelta; one that ISO 8601, as pydantic reads it, does not hold exactly, as a tag."""
    try:
        if _AS_ISO.validate_json(_AS_ISO.dump_json(value)) == value:
            return value
    except ValueError:
        pass
    return _timedelta(value)


def secret(value: Any) -> Any:
    """Return a secret as the tag by which everything that shows contents knows it."""
    inner = value.get_secret_value()
    return {"koan:secret": tagged(inner)}


def _bytes(value: bytes) -> Any:
    return {"koan:bytes": base64.b64encode(value).decode()}


def _timedelta(value: timedelta) -> Any:
    return {"koan:timedelta": [value.days, value.seconds, value.microseconds]}


def _is_zoned(value: datetime | time) -> bool:
    if value.fold or (isinstance(value.tzinfo, ZoneInfo) and value.tzinfo.key != "UTC"):
        return True
    offset = value.utcoffset()
    return offset is not None and offset.total_seconds() % 60 != 0  # pydantic reads hours and minutes


def _clock(value: datetime | time, name: str) -> Any:
    zone = value.tzinfo.key if isinstance(value.tzinfo, ZoneInfo) else None
    if not zone and not value.fold:
        return {name: value.isoformat()}
    bare = value.replace(tzinfo=None) if zone else value
    return {name: [bare.isoformat(), zone, value.fold]}


_LEAVES: Final[list[tuple[type, Callable[[Any], Any]]]] = [
    (str, text),
    (float, floating),
    (bytes, _bytes),
    (datetime, lambda value: _clock(value, "koan:datetime")),
    (date, lambda value: {"koan:date": value.isoformat()}),
    (time, lambda value: _clock(value, "koan:time")),
    (timedelta, _timedelta),
    (Decimal, lambda value: {"koan:decimal": str(value)}),
    (UUID, lambda value: {"koan:uuid": str(value)}),
]
_MANY: Final[dict[type, str]] = {tuple: "koan:tuple", set: "koan:set", frozenset: "koan:frozenset"}


def is_number_of_numpy(value: object) -> bool:
    """Tell whether a value is NumPy's float of 64 bits, which is a float that says so in other words."""
    return isinstance(value, float) and type(value).__module__ == "numpy"


# --- reading ---------------------------------------------------------------------------------------------------------


def revived(value: Any) -> Any:
    """Return JSON values with what their tags stand for. A tag that is not known stays as it is."""
    if isinstance(value, list):
        return [revived(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        name, content = next(iter(value.items()))
        read = _READERS.get(name)
        if read is not None:
            try:
                return read(content)
            except (ValueError, TypeError, AttributeError, ArithmeticError, LookupError):
                return value
    return {name: revived(item) for name, item in value.items()}


def unveiled(value: Any) -> Any:
    """Return what the tag of a secret holds; anything else as it is."""
    if isinstance(value, dict) and len(value) == 1 and "koan:secret" in value:
        return revived(value["koan:secret"])
    return value


def masked(value: Any) -> Any:
    """Return JSON values for people: secrets as stars."""
    if isinstance(value, list):
        return [masked(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    if len(value) == 1 and "koan:secret" in value:
        return _STARS
    return {name: masked(item) for name, item in value.items()}


def _read_clock(kind: type[Any]) -> Callable[[Any], Any]:
    def read(content: Any) -> Any:
        if isinstance(content, str):
            return kind.fromisoformat(content)
        written, zone, fold = content
        value = kind.fromisoformat(written).replace(fold=fold)
        return value.replace(tzinfo=ZoneInfo(zone)) if zone else value

    return read


def _read_dict(content: Any) -> Any:
    return {revived(key): revived(item) for key, item in content}


def _read_secret(content: Any) -> Any:
    inner = revived(content)
    return SecretBytes(inner) if isinstance(inner, bytes) else SecretStr(inner) if isinstance(inner, str) else Secret(inner)


_READERS: Final[dict[str, Callable[[Any], Any]]] = {
    "koan:dict": _read_dict,
    "koan:tuple": lambda content: tuple(map(revived, content)),
    "koan:set": lambda content: set(map(revived, content)),
    "koan:frozenset": lambda content: frozenset(map(revived, content)),
    "koan:str": lambda content: base64.b64decode(content, validate=True).decode("utf-8", "surrogatepass"),
    "koan:bytes": lambda content: base64.b64decode(content, validate=True),
    "koan:float": lambda content: {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}[content],
    "koan:datetime": _read_clock(datetime),
    "koan:date": date.fromisoformat,
    "koan:time": _read_clock(time),
    "koan:timedelta": lambda content: timedelta(*content),
    "koan:decimal": Decimal,
    "koan:uuid": UUID,
    "koan:secret": _read_secret,
    "koan:choice": lambda content: revived(content[1]),
}
