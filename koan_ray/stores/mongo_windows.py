"""Pages from a server that reads and sorts all that a filter lets through before it counts to the limit.

The embedded document server is one: for the first page of a million jobs it would read a million. It does walk an index for
a range, so we ask for ranges of time that are short at first and grow as long as they are answered quickly, from the end
where the page begins; for the newest, from where those were found the last time. MongoDB stops at the limit by itself.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from koan_ray.stores.codec import Document
    from koan_ray.stores.mongo_filters import Step

_FIRST: Final = timedelta(seconds=0.25)
_QUICK_S: Final = 0.1
_GROWTH: Final = 2.0
_GROWTH_IN_VAIN: Final = 1.25  # so that the first window with anything inside is small against the way to it
_BEGINNING: Final = datetime(2020, 1, 1, tzinfo=UTC)  # what is older is read at once
_INDEXES: Final = {"created_at": ("created", "status"), "completed_at": ("completed",)}


def suits(step: Step) -> bool:
    """Tell whether a step walks along an index of instants.

    That of jobs over items is none of them: it is short, and beside a range of instants the server takes another.
    """
    name = step.sort[0][0]
    return step.hint in _INDEXES.get(name, ()) and "$eq" not in step.filter.get(name, {})


async def find(
    jobs: Any, step: Step, limit: int, max_time_ms: int, newest: dict[str, datetime], fields: Document | None = None
) -> AsyncIterator[Document]:
    """Find what `step` asks for, in its order, up to ``limit`` documents; 0: all. ``fields``: what of them.

    ``newest``: by field, where the newest of these jobs were found before; it is brought up to date.
    """
    name, direction = step.sort[0]
    found, edge = 0, None
    bounds = step.filter.get(name, {})
    place = _start(bounds, direction, newest.get(name))
    width = _FIRST
    while True:
        far = None if place is None else place + direction * width
        if far is not None and _is_beyond(far, bounds, direction):
            far = None
        window = _window(bounds, edge, far, direction)
        asked_at = time.monotonic()
        left = limit - found if limit else 0
        async for document in jobs.find(_with(step, window), fields, sort=step.sort, limit=left, max_time_ms=max_time_ms):
            if not found and direction < 0:
                newest[name] = max(document[name], newest.get(name, document[name]))
            yield document
            found += 1
        if far is None or (limit and found >= limit):
            return
        edge = place = far
        if time.monotonic() - asked_at < _QUICK_S:
            width *= _GROWTH if found else _GROWTH_IN_VAIN


def _start(bounds: Document, direction: int, newest: datetime | None) -> datetime | None:
    """Return the instant to begin at; None if nobody knows it: the oldest.

    The first window for the newest has no end, so that it holds whatever has come since then.
    """
    if direction < 0:
        return bounds.get("$lt") or bounds.get("$lte") or newest or datetime.now(UTC)
    return bounds.get("$gt") or bounds.get("$gte")


def _is_beyond(far: datetime, bounds: Document, direction: int) -> bool:
    """Tell whether what is left lies within ``far``."""
    if direction < 0:
        return far <= (bounds.get("$gte") or bounds.get("$gt") or _BEGINNING)
    return far >= (bounds.get("$lt") or bounds.get("$lte") or datetime.now(UTC))


def _window(bounds: Document, edge: datetime | None, far: datetime | None, direction: int) -> Document:
    """Return the bounds of one window: from the last one's edge, which belonged to it if we go forward, to ``far``."""
    window = dict(bounds)
    ahead, behind = (("$gte", "$gt"), ("$lt", "$lte")) if direction < 0 else (("$lt", "$lte"), ("$gte", "$gt"))
    for limit, (name, other) in ((edge, behind), (far, ahead)):
        if limit is not None:
            window.pop(other, None)
            window[name] = limit
    return window


def _with(step: Step, window: Document) -> Document:
    """Return the step's filter with the window in front, where it is looked for first, and a plain value for one status."""
    name = step.sort[0][0]
    rest = {key: condition for key, condition in step.filter.items() if key != name}
    if isinstance(status := rest.get("status"), dict) and list(status) == ["$eq"]:
        rest["status"] = status["$eq"]
    return {name: window, **rest} if window else rest
