"""Durations as users write them: a `timedelta`, seconds, or text such as ``"60m"``. The one place where they come in.

Three kinds. A *delay* (`seconds`) is what has to pass: one of more than a thousand years is a slip, such as milliseconds
for seconds, and refused. A *bound* (`bound`) is what must not be exceeded, and *patience* (`patience`) how long somebody
waits: of these, the very longest that a type can hold is a usual way to say "without end", and is taken as that.
"""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime, timedelta
from typing import Final

from koan_ray.domain.texts import quoted
from koan_ray.errors import ConfigurationError

Duration = timedelta | float | int

LONGEST_S: Final = 1000 * 365.25 * 86400.0  # what is due after it still has a date
_FOR_EVER_S: Final = 100 * 365.25 * 86400.0  # of waiting; threads and selectors cannot be told much more
_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_TEXT: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)\s*")
_FIRST: Final = datetime.min.replace(tzinfo=UTC)
_LAST: Final = datetime.max.replace(tzinfo=UTC)


def seconds(value: object, *, name: str) -> float:
    """Return a delay in seconds.

    Args:
        value: A `timedelta`, a number of seconds, or text like ``"90s"``, ``"60m"``, ``"2h"``, ``"30d"``.
        name: What the duration is, for the error message.

    Raises:
        ConfigurationError: It is no duration, not finite, negative, or longer than 1,000 years.
    """
    result = _length(value, name)
    if result > LONGEST_S:
        msg = f"{name}: expected at most 1,000 years ({LONGEST_S:.0f} seconds), got {quoted(value)}; numbers are seconds"
        raise ConfigurationError(msg)
    return result


def bound(value: object, *, name: str) -> float:
    """Return a limit in seconds, such as a timeout; whatever is longer than 1,000 years counts as that.

    Raises:
        ConfigurationError: It is no duration, or negative.
    """
    return min(_length(value, name, is_endless_allowed=True), LONGEST_S)


def patience(value: object, *, name: str) -> float | None:
    """Return how long somebody waits, in seconds; None, for ever, also where it is longer than a century.

    Raises:
        ConfigurationError: It is no duration, or negative.
    """
    if value is None:
        return None
    result = _length(value, name, is_endless_allowed=True)
    return None if result > _FOR_EVER_S else result


def number(value: object) -> float | None:
    """Return anything that is a number as a float, the largest as infinity; None for what is none.

    Whatever says so itself counts: numbers of NumPy, decimals and fractions do, truth values and texts do not.
    """
    if type(value) is float:
        return value
    if isinstance(value, (bool, str, bytes)) or not (hasattr(value, "__float__") or hasattr(value, "__index__")):
        return None
    try:
        return float(value)  # type: ignore[arg-type]
    except OverflowError:  # of an int or a fraction
        return math.inf if value > 0 else -math.inf  # type: ignore[operator]
    except BaseException:  # noqa: BLE001 - a user's __float__ may raise anything, KeyboardInterrupt included
        return None


def _length(value: object, name: str, *, is_endless_allowed: bool = False) -> float:
    result: float | None = None
    if isinstance(value, timedelta):
        result = value.total_seconds()
    elif isinstance(value, str):
        match = _TEXT.fullmatch(value)
        result = float(match[1]) * _UNITS[match[2]] if match else None
    elif (result := number(value)) in (math.inf, -math.inf) and isinstance(value, float) and not is_endless_allowed:
        result = None
    if result is None or math.isnan(result):
        msg = (
            f"{name}: expected a timedelta, a number of seconds, or text such as '90s', '60m', '2h', '30d', "
            f"got {quoted(value)}"
        )
        raise ConfigurationError(msg)
    if result < 0:
        msg = f"{name}: a duration cannot be negative, got {quoted(value)}; use 0 or more seconds"
        raise ConfigurationError(msg)
    return result


def instant(at: float | None) -> datetime | None:
    """Return epoch seconds as an aware UTC `datetime`; what lies outside of the years 1 to 9999 as their edge."""
    if at is None:
        return None
    try:
        return datetime.fromtimestamp(at, UTC)
    except (OverflowError, ValueError, OSError):  # which of them depends on how far it lies outside
        return _LAST if at > 0 else _FIRST
