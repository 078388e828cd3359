"""Job queries as filters for documents: which documents, in which order, along which index. Values in, values out.

A page is found by walking an index in the order of the query, in up to three steps (`steps`): the rest of the instant that
the previous page ended in, what lies beyond, and the jobs without the instant, which count as oldest. Each step is a range
of one index; one filter with ``$or`` over the three would be answered by reading everything.

Every filter names the index to use. That is not left to the server's planner, because not every server that speaks the
protocol finds it.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from koan_ray.domain.query import milliseconds
from koan_ray.stores.codec import Document, first_date_from, from_date, is_embeddable, to_date
from koan_ray.stores.mongo_schema import LATEST_INDEX, LEADS, RETRIES_INDEX

if TYPE_CHECKING:
    from koan_ray.domain.query import Place, Query

_TEXT_FIELDS: Final = ("name", "description", "kind", "error.message")


class Step(NamedTuple):
    """One range of an index, in order."""

    filter: Document
    sort: list[tuple[str, int]]
    hint: str


def filter_of(query: Query) -> Document:
    """Return the filter that every matching document passes.

    All values stand behind an explicit operator, so that no value can be taken for one. Text is compared by the server,
    whose idea of upper and lower case is simpler than Python's for a few letters (``ß``). Metadata that no document can
    hold as it is (`koan_ray.stores.codec`) are compared by us, in those documents that have some.
    """
    # In front and plain: the embedded server takes the first index that fits, and reads every job of a status otherwise.
    found: Document = {LEADS: True} if query.has_items else {}
    for name, text in (
        ("correlation_id", query.correlation_id),
        ("parent_job_id", query.parent_job_id),
        ("retry_of", query.retry_of),
        ("name", query.name),
    ):
        if text is not None:
            found[name] = {"$eq": text}
    if query.kinds is not None:
        found["kind"] = _one_of(sorted(query.kinds))
    if query.statuses is not None:
        found["status"] = _one_of(sorted(query.statuses))
    for name, after, before in (
        ("created_at", query.created_after, query.created_before),
        ("completed_at", query.completed_after, query.completed_before),
    ):
        if between := _between(after, before):
            found[name] = between
    if query.has_items is False:  # what is false is left out of documents, so these lack the field
        found[LEADS] = {"$ne": True}
    for name, value in query.metadata.items():
        if is_embeddable(value):
            found[f"metadata.{name}"] = _metadata(value)
        else:
            found["metadata_json"] = {"$type": "string"}
    if query.text is not None:
        sought = {"$regex": re.escape(query.text), "$options": "i"}
        found["$or"] = [{name: sought} for name in _TEXT_FIELDS]
    return found


def needs_check(query: Query) -> bool:
    """Tell whether a document that passes the filter may still not match: lists and dictionaries are compared by us.

    The server would take a value for equal to a list that holds it, and tell apart dictionaries by the order of their keys.
    So is what no document can hold.
    """
    return any(isinstance(value, (list, dict)) or not is_embeddable(value) for value in query.metadata.values())


def index_of(query: Query) -> str:
    """Return the name of the index to walk.

    Orders by ``queued_at`` and ``started_at`` have none of their own: each would make every write of a job dearer. They
    sort what the filter lets through.
    """
    if query.parent_job_id is not None:
        return "parent"
    if query.retry_of is not None:
        return RETRIES_INDEX
    if query.correlation_id is not None:
        return "correlation"
    if query.has_items:
        return LATEST_INDEX
    by_completion = query.completed_after is not None or query.completed_before is not None
    if query.order_by == "completed_at" or by_completion:
        return "completed"
    return "status" if query.statuses is not None else "created"


def steps(query: Query) -> list[Step]:
    """Return where to look for the next page, to be walked one after another until it is full."""
    direction = -1 if query.descending else 1
    sort = [(query.order_by, direction), ("_id", direction)]
    base, hint = filter_of(query), index_of(query)
    return [Step(_both(base, bound), sort, hint) for bound in _bounds(query)]


def place_of(document: Document, order_by: str) -> Place:
    """Return where a document stands in an order; one whose instant is none stands with those that have none."""
    at = document.get(order_by)
    return milliseconds(from_date(at)) if isinstance(at, datetime) else 0, str(document["_id"])


def _bounds(query: Query) -> list[Document]:
    if query.after is None:
        return [{}]
    at_ms, job_id = query.after
    name, beyond = query.order_by, "$lt" if query.descending else "$gt"
    if at_ms == 0:  # the page before ended among the jobs without the instant
        rest = [{name: {"$eq": None}, "_id": {beyond: job_id}}]
        return rest if query.descending else [*rest, {name: {"$gt": to_date(0.0)}}]
    date = to_date(at_ms / 1000)
    ranges: list[Document] = [{name: {"$eq": date}, "_id": {beyond: job_id}}, {name: {beyond: date}}]
    return [*ranges, {name: {"$eq": None}}] if query.descending and name != "created_at" else ranges


def _both(base: Document, bound: Document) -> Document:
    """Return the filter for both; the ranges over a field become one, from which the server takes its index bounds."""
    found = dict(base)
    for name, condition in bound.items():
        both = {**found.get(name, {}), **condition}
        if "$lt" in found.get(name, {}) and "$lt" in condition:
            both["$lt"] = min(found[name]["$lt"], condition["$lt"])
        found[name] = both
    return found


def _one_of(values: list[str]) -> Document:
    plain = [str(value) for value in values]
    return {"$eq": plain[0]} if len(plain) == 1 else {"$in": plain}


def _between(after: float | None, before: float | None) -> Document:
    bounds = (("$gte", after), ("$lt", before))
    return {operator: first_date_from(at) for operator, at in bounds if at is not None}


def _metadata(value: Any) -> Document:
    if isinstance(value, dict):
        return {"$type": "object"}
    if isinstance(value, list):
        return {"$type": "array"}
    sought = {"$type": "null"} if value is None else {"$eq": value}
    return {**sought, "$not": {"$type": "array"}}  # which would match by one of its items
