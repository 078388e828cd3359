"""Durations as users write them: a `timedelta`, seconds, or text such as ``"60m"``."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime, timedelta
from typing import Final

from koan_ray.errors import ConfigurationError

Duration = timedelta | float | int

_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_TEXT: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)\s*")


def seconds(value: object, *, name: str) -> float:
    """Return a duration in seconds.

    Args:
        value: A `timedelta`, a number of seconds, or text like ``"90s"``, ``"60m"``, ``"2h"``, ``"30d"``.
        name: What the duration is, for the error message.

    Raises:
        ConfigurationError: It is no duration, not finite, or negative.
    """
    result: float | None = None
    if isinstance(value, timedelta):
        result = value.total_seconds()
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        result = float(value)
    elif isinstance(value, str) and (match := _TEXT.fullmatch(value)):
        result = float(match[1]) * _UNITS[match[2]]
    if result is None or not math.isfinite(result):
        msg = f"{name}: expected a timedelta, a number of seconds, or text such as '90s', '60m', '2h', '30d', got {value!r}"
        raise ConfigurationError(msg)
    if result < 0:
        msg = f"{name}: a duration cannot be negative, got {value!r}; use 0 or more seconds"
        raise ConfigurationError(msg)
    return result


def instant(at: float | None) -> datetime | None:
    """Return epoch seconds as an aware UTC `datetime`."""
    return None if at is None else datetime.fromtimestamp(at, UTC)
