"""Filters, order and cursors of job queries, checked and applied without any store.

A store with an index compiles a `Query`; the in-memory store uses `matches` and `sort_key` as they are, and the contract
suite compares the two.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from koan_ray.domain.durations import number
from koan_ray.domain.metadata import MetadataError, is_same, plain_metadata
from koan_ray.domain.status import JobStatus
from koan_ray.domain.texts import quoted, readable, said
from koan_ray.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from koan_ray.domain.records import JobRecord

ORDERS: Final = ("created_at", "queued_at", "started_at", "completed_at")
MAX_LIMIT: Final = 1000
FILTERS: Final = (
    "kind", "status", "correlation_id", "parent_job_id", "name", "text", "metadata", "created_after", "created_before",
    "completed_after", "completed_before", "has_items", "order_by", "limit", "cursor", "source", "partition",
)  # fmt: skip


ALL_PARTITIONS: Final = "*"
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MOST_MS: Final = 10**15  # of a cursor: some thirty thousand years


Place = tuple[int, str]  # in an order: the instant in whole milliseconds, 0 for none, and the id


class Page(NamedTuple):
    """One page of records and where the next begins; ``cursor`` is None on the last page."""

    jobs: list[JobRecord]
    cursor: str | None


@dataclass(frozen=True, slots=True)
class Query:
    """A checked query. Instants in epoch seconds; bounds are ``after <= instant < before``.

    ``has_items``: only jobs over items, or only others.
    """

    kinds: frozenset[str] | None = None
    statuses: frozenset[JobStatus] | None = None
    correlation_id: str | None = None
    parent_job_id: str | None = None
    retry_of: str | None = None  # asked by the engine itself, and no filter of users
    name: str | None = None
    text: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    created_after: float | None = None
    created_before: float | None = None
    completed_after: float | None = None
    completed_before: float | None = None
    has_items: bool | None = None
    order_by: str = "created_at"
    descending: bool = True
    limit: int = 100
    after: Place | None = None
    source: str | None = None
    partition: str | None = None

    def matches(self, job: JobRecord) -> bool:
        """Tell whether a record passes every filter."""
        about = job.particulars
        return (
            (self.statuses is None or job.status in self.statuses)
            and (self.kinds is None or job.terms.kind in self.kinds)
            and (self.parent_job_id is None or about.parent_job_id == self.parent_job_id)
            and (self.retry_of is None or about.retry_of == self.retry_of)
            and (self.correlation_id is None or about.correlation_id == self.correlation_id)
            and (self.name is None or about.name == self.name)
            and (self.has_items is None or job.has_items is self.has_items)
            and (self.partition in (None, ALL_PARTITIONS) or about.residence.partition == self.partition)
            and _between(job.created_at, self.created_after, self.created_before)
            and _between(job.completed_at, self.completed_after, self.completed_before)
            and (not self.metadata or _contains(about.metadata or {}, self.metadata))
            and (self.text is None or self._has_text(job))
        )

    def _has_text(self, job: JobRecord) -> bool:
        sought = (self.text or "").casefold()
        about = job.particulars
        fields = (about.name, about.description, job.terms.kind, job.error.message if job.error else None)
        return any(sought in value.casefold() for value in fields if value)

    def sort_key(self, job: JobRecord) -> Place:
        """Return what a record is ordered by: the instant, then the id; jobs without the instant count as oldest.

        The instant in whole milliseconds, which is what documents keep. With anything finer, a page over memory and
        documents would end at a place that one of them does not have, and skip or repeat what lies around it.
        """
        return milliseconds(getattr(job, self.order_by) or 0.0), job.id

    def is_after_cursor(self, job: JobRecord) -> bool:
        """Tell whether a record comes after the place where the previous page ended."""
        return self.after is None or self._is_beyond(self.sort_key(job), self.after)

    def _is_beyond(self, one: Place, other: Place) -> bool:
        return one < other if self.descending else one > other

    def cursor_after(self, job: JobRecord) -> str:
        """Return the cursor of the page that begins behind ``job``."""
        return self._cursor_at(self.sort_key(job))

    def _cursor_at(self, place: Place) -> str:
        raw = json.dumps([self._order, *place])
        return base64.urlsafe_b64encode(raw.encode()).decode().rstrip("=")

    @property
    def _order(self) -> str:
        return ("-" if self.descending else "") + self.order_by

    def merged(self, pages: Sequence[Page]) -> Page:
        """Return one page, in the order of the query, from a page of each place that was asked.

        A job that is on its way from one place to another may be in both; it is returned once. What a place has not read
        yet may belong before what another one returned, so the page ends where the first of them has stopped reading. It
        may therefore be shorter than the limit, and empty; only a page without a cursor is the last.
        """
        jobs = list({job.id: job for page in pages for job in page.jobs}.values())
        if len(pages) == 1:
            return pages[0]._replace(jobs=jobs)
        jobs.sort(key=self.sort_key, reverse=self.descending)
        stops = [_parse_cursor(page.cursor, self._order) for page in pages if page.cursor is not None]
        stop = (max if self.descending else min)(stops) if stops else None
        if stop is not None:
            jobs = [job for job in jobs if not self._is_beyond(self.sort_key(job), stop)]
        if len(jobs) > self.limit:
            jobs = jobs[: self.limit]
            return Page(jobs, self.cursor_after(jobs[-1]))
        return Page(jobs, None if stop is None else self._cursor_at(stop))


def milliseconds(at: float) -> int:
    """Return an instant in epoch seconds as the nearest whole millisecond, the finest that a document keeps."""
    return round(at * 1000)


def parse_query(filters: Mapping[str, Any]) -> Query:
    """Check filters as a user wrote them.

    Raises:
        ConfigurationError: A filter is unknown or has an unusable value; the message names it and what is allowed.
    """
    given = plain_filters(filters)
    order = given.pop("order_by", "-created_at")
    cursor = given.pop("cursor", None)
    kinds, statuses = given.pop("kind", None), given.pop("status", None)
    return Query(
        kinds=None if kinds is None else frozenset(kinds),
        statuses=None if statuses is None else frozenset(map(JobStatus, statuses)),
        order_by=order.removeprefix("-"),
        descending=order.startswith("-"),
        after=_parse_cursor(cursor, order) if cursor is not None else None,
        **given,
    )


def plain_filters(filters: Mapping[str, Any]) -> dict[str, Any]:
    """Return filters as plain values, which mean the same in every process; those that are None are left out.

    Values are made plain as a submit makes them: texts readable, metadata JSON, instants epoch seconds.

    Raises:
        ConfigurationError: A filter is unknown or has an unusable value.
    """
    for name in filters:
        if name not in FILTERS:
            near = difflib.get_close_matches(said(name), FILTERS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(FILTERS)}"
            msg = f"unknown filter {quoted(name)}; {hint}"
            raise ConfigurationError(msg)
    return {name: _READ[name](name, value) for name, value in filters.items() if value is not None}


def _order(_name: str, value: object) -> str:
    if not isinstance(value, str) or value.removeprefix("-") not in ORDERS:
        msg = f"order_by: expected one of {', '.join(ORDERS)}, with '-' in front for newest first, got {quoted(value)}"
        raise ConfigurationError(msg)
    return str.__str__(value)


def _limit(_name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_LIMIT:
        msg = f"limit: expected a whole number from 1 to {MAX_LIMIT}, got {quoted(value)}; use Jobs.stream() for more"
        raise ConfigurationError(msg)
    return int(value)


def _metadata(_name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        msg = f"metadata: expected a dict of values to match, got {quoted(value)}"
        raise ConfigurationError(msg)
    try:
        return plain_metadata(value)
    except MetadataError as error:
        msg = f"metadata: {error.path}: {error.problem}; a job cannot have it either"
        raise ConfigurationError(msg) from None


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        msg = f"{name}: expected text, got {quoted(value)}"
        raise ConfigurationError(msg)
    return readable(value)


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        msg = f"{name}: expected True or False, got {quoted(value)}"
        raise ConfigurationError(msg)
    return value


def _kinds(name: str, value: object) -> list[str]:
    return sorted({_text(name, getattr(item, "kind", item)) for item in _several(value)})


def _statuses(_name: str, value: object) -> list[str]:
    try:
        return sorted({JobStatus(said(item).lower()).value for item in _several(value)})
    except ValueError:
        msg = f"status: expected one or several of {', '.join(JobStatus)}, got {quoted(value)}"
        raise ConfigurationError(msg) from None


def _several(value: object) -> Iterable[object]:
    return value if isinstance(value, (list, tuple, set, frozenset)) else [value]


def _instant(name: str, value: object) -> float:
    if (at := number(value)) is not None and not math.isnan(at):
        return at  # infinity is before or after everything
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            msg = f"{name}: expected an ISO 8601 instant, got {quoted(value)}"
            raise ConfigurationError(msg) from None
    if not isinstance(value, datetime) or value.tzinfo is None:
        msg = f"{name}: expected a datetime with a time zone, got {quoted(value)}; use datetime.now(timezone.utc)"
        raise ConfigurationError(msg)
    return (value - _EPOCH).total_seconds()


def _cursor(_name: str, value: object) -> str:
    return said(value)


_READ: Final[Mapping[str, Callable[[str, object], Any]]] = {
    "kind": _kinds, "status": _statuses, "metadata": _metadata, "order_by": _order, "limit": _limit, "cursor": _cursor,
    "has_items": _flag,
    **dict.fromkeys(("correlation_id", "parent_job_id", "name", "text", "source", "partition"), _text),
    **dict.fromkeys(("created_after", "created_before", "completed_after", "completed_before"), _instant),
}  # fmt: skip


def _parse_cursor(cursor: str, order: str) -> Place:
    try:
        raw = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))
        made_for, at_ms, job_id = json.loads(raw)
        if made_for != order or not isinstance(job_id, str) or not isinstance(at_ms, int) or isinstance(at_ms, bool):
            raise ValueError
        if abs(at_ms) > _MOST_MS:
            raise ValueError
        return at_ms, job_id
    except (binascii.Error, ValueError, TypeError, OverflowError, RecursionError):
        msg = f"cursor: {quoted(cursor)} does not belong to a query ordered by {order!r}; pass a page's cursor unchanged"
        raise ConfigurationError(msg) from None


def _between(at: float | None, after: float | None, before: float | None) -> bool:
    if after is None and before is None:
        return True
    return at is not None and (after is None or at >= after) and (before is None or at < before)


def _contains(metadata: Mapping[str, Any], sought: Mapping[str, Any]) -> bool:
    return all(name in metadata and is_same(metadata[name], value) for name, value in sought.items())
