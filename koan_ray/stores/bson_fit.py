"""Whether a record fits into a document: asked without a database, of the very bytes that a driver would send."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bson import encode

from koan_ray.domain.records import ExecutionRecord
from koan_ray.domain.texts import said
from koan_ray.stores.codec import Document, encode_execution, encode_job

if TYPE_CHECKING:
    from koan_ray.domain.records import JobRecord


def size_of(document: Document) -> int:
    """Return the bytes of a document; raises whatever is in the way of writing it as BSON."""
    return len(encode(document))


def objection(record: JobRecord | ExecutionRecord, inline_limit: int | None = None) -> str | None:
    """Return why no document can hold a record, in words; None if one can, whatever its size."""
    try:
        size_of(encode_execution(record) if isinstance(record, ExecutionRecord) else encode_job(record, inline_limit))
    except Exception as problem:  # noqa: BLE001 - whatever a value does to the codec or to BSON is this record's own
        return said(f"{type(problem).__name__}: {said(problem)}", 500)
    return None
