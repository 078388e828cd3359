"""How far a job is, and when it may be done."""

from __future__ import annotations

from typing import NamedTuple

MAX_MESSAGE = 2000  # characters; a report is part of the job's document


class Reported(NamedTuple):
    """What a body said, before it is numbered."""

    percentage: float
    message: str | None
    current: int | None
    total: int | None


def parse_report(first: float, second: object = None, message: str | None = None) -> Reported:
    """Read the two forms of ``report``: ``(percentage, message)`` and ``(current, total, message)``.

    A percentage outside 0–1 is moved to the nearer end and a NaN counts as 0: progress is for eyes and must not fail a job.
    For the same reason a long message is cut.
    """
    if isinstance(second, str) or second is None:
        said = second if second is not None else message
        return Reported(_share(float(first)), _cut(said), None, None)
    total = int(second)  # type: ignore[call-overload]
    current = int(first)
    return Reported(_share(current / total) if total > 0 else 0.0, _cut(message), current, total)


def _cut(message: str | None) -> str | None:
    is_long = isinstance(message, str) and len(message) > MAX_MESSAGE
    return f"{message[: MAX_MESSAGE - 1]}…" if message and is_long else message


def _share(value: float) -> float:
    if value >= 1.0:
        return 1.0
    return max(0.0, value)  # NaN compares false


def estimate_completion(percentage: float, *, began_at: float, now: float) -> float | None:
    """Return when the job will be done if it goes on at its average speed so far, in epoch seconds.

    ``None`` before the first 0.1 %, where the quotient says nothing.
    """
    if percentage >= 1.0:
        return now
    if percentage < 0.001 or now <= began_at:
        return None
    return now + (now - began_at) * (1.0 - percentage) / percentage
