"""How far a job is, and when it may be done."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

from koan_ray.domain.durations import number
from koan_ray.domain.texts import said

MAX_MESSAGE: Final = 2000  # characters; a report is part of the job's document
MAX_STEPS: Final = 2**63 - 1  # no document holds a larger number
NUMBERS: Final = frozenset({int, float})
WORDS: Final = frozenset({str, type(None)})
SECOND: Final = frozenset({str, int, float, type(None)})

Said = tuple[float | None, str | int | float | None, str | None]  # what `report` was given, of plain types


class Reported(NamedTuple):
    """What a body said, before it is numbered."""

    percentage: float
    message: str | None
    current: int | None
    total: int | None


def plain_report(first: object, second: object, message: object) -> Said:
    """Return what `JobProgress.report` was given as values of plain types, read now and in the body's own thread.

    Never raises, whatever it was given: progress is for eyes and must not fail a job. What is no number says nothing of how
    far the job is (None), what is no text becomes what it says of itself, and one of many digits is cut.
    """
    if type(first) in NUMBERS and type(second) in SECOND and type(message) in WORDS:
        return first, second, message  # type: ignore[return-value]
    far = _plain_number(first)
    steps = second if second is None or isinstance(second, str) else _plain_number(second)
    if isinstance(second, str) or (steps is None and second is not None):  # what is no number is meant to be read
        steps = said(second, MAX_MESSAGE)
    return far, steps, message if type(message) in WORDS else said(message, MAX_MESSAGE)  # type: ignore[return-value]


def _plain_number(value: object) -> float | int | None:
    if isinstance(value, int):  # of a subclass, too: True is all of it
        return int.__int__(value)
    return number(value)


def parse_report(first: float | None, second: str | float | None = None, message: str | None = None) -> Reported:
    """Read the two forms of ``report``: ``(percentage, message)`` and ``(current, total, message)``.

    A percentage outside 0–1 is moved to the nearer end and a NaN counts as 0, as does a total that is none. For the same
    reason that `plain_report` never raises, this does not: a long message is cut, and what cannot be shown is replaced.
    """
    if isinstance(second, str) or second is None:
        words = second if second is not None else message
        return Reported(_share(first), None if words is None else said(words, MAX_MESSAGE), None, None)
    total, current = _whole(second), _whole(first)
    if current is None or total is None or current <= 0 or total <= 0:
        share = 0.0
    else:
        share = 1.0 if current >= total else current / total
    return Reported(share, None if message is None else said(message, MAX_MESSAGE), _step(current), _step(total))


def _whole(value: float | None) -> int | None:
    return None if value is None or (type(value) is float and not math.isfinite(value)) else int(value)


def _step(n: int | None) -> int | None:
    """Return a count of steps, or the largest that a document holds."""
    return None if n is None else max(-MAX_STEPS, min(n, MAX_STEPS))


def _share(value: float | None) -> float:
    if value is None:
        return 0.0
    return 1.0 if value >= 1 else float(max(0.0, value))  # NaN compares false


def estimate_completion(percentage: float, *, began_at: float, now: float) -> float | None:
    """Return when the job will be done if it goes on at its average speed so far, in epoch seconds.

    ``None`` before the first 0.1 %, where the quotient says nothing.
    """
    if percentage >= 1.0:
        return now
    if percentage < 0.001 or now <= began_at:
        return None
    return now + (now - began_at) * (1.0 - percentage) / percentage
