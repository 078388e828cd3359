"""Records as documents and back: values in, values out, no database.

A document is meant to be read and queried by people, too: context, result and metadata are sub-documents, instants are
dates. Instants are kept in whole milliseconds, as BSON dates are. Of the terms of a job everything is kept but the shipped
class: ``code_id`` is empty in a record read back, and ``Terms.id`` is computed from what is left.

JSON that a document cannot hold unchanged is kept as text in ``context_json``, ``result_json`` or ``metadata_json``: keys
with ``.`` or NUL or a leading ``$``, whole numbers beyond 64 bits, deep nesting, text that would be written differently.
Those metadata that can be held are there as well then, so that jobs are found by them.
Contents above a limit live elsewhere, and the document names them (``context_blob``, ``result_blob``).

Fields without a value are left out. Fields that this version does not know stay untouched, because updates name the fields
that they change.
"""

from __future__ import annotations

import hashlib
import math
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from pydantic_core import PydanticSerializationError, from_json, to_json

from koan_ray.domain.durations import seconds
from koan_ray.domain.lease import slot_of
from koan_ray.domain.metadata import is_metadata_key
from koan_ray.domain.partitions import NAME
from koan_ray.domain.records import (
    FAILED,
    ActorSpec,
    Checkpoint,
    ErrorInfo,
    ExecutionRecord,
    JobRecord,
    Part,
    Particulars,
    Progress,
    Residence,
    Terms,
    identified,
)
from koan_ray.domain.retry import RetryPolicy, RetryStrategy
from koan_ray.domain.status import Claim, ExecutionStatus, Isolation, JobStatus, ParentPolicy, Reason
from koan_ray.domain.texts import quoted, readable, said
from koan_ray.errors import ConfigurationError, RecordCorruptError
from koan_ray.ports import ActorInfo

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

SCHEMA_VERSION: Final = 1
Document = dict[str, Any]

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST_MS: Final = -62_135_596_800_000  # 0001-01-01, the first instant that a datetime can hold
_LAST_MS: Final = 253_402_300_799_999  # 9999-12-31T23:59:59.999
_MAX_DEPTH: Final = 90  # MongoDB refuses documents nested deeper than 100, ours around the value included
_MAX_INT: Final = 2**63 - 1
_NO_BLOBS: Final[Mapping[str, bytes]] = {}
_ABOUT_FIELDS: Final = ("name", "description", "correlation_id", "traceparent", "parent_job_id", "retry_of")
_TERMS_CACHED: Final = 1024

M = TypeVar("M", bound=StrEnum)
D = TypeVar("D")


# --- instants --------------------------------------------------------------------------------------------------------


def to_date(at: float) -> datetime:
    """Return epoch seconds as the nearest millisecond; what lies outside of the years 1 to 9999 becomes their edge."""
    return _date(round(min(max(at * 1000, _FIRST_MS), _LAST_MS)))


def from_date(date: datetime) -> float:
    """Return a date as epoch seconds; ``to_date`` of the answer is the same date again."""
    return (date - _EPOCH).total_seconds()


def first_date_from(at: float) -> datetime:
    """Return the earliest date that reads back as ``at`` or later: a bound that agrees with comparing the records."""
    date = to_date(at)
    return date + timedelta(milliseconds=1) if from_date(date) < at and date < _date(_LAST_MS) else date


def _date(ms: int) -> datetime:
    return _EPOCH + timedelta(milliseconds=ms)


# --- JSON ------------------------------------------------------------------------------------------------------------


def blob_id(job_id: str, field: str, content: bytes) -> str:
    """Return the name of a content that is kept outside of its document: always the same one for the same content.

    The content is part of the name, so that a job that is refused cannot have replaced what another one's document names.
    """
    return f"{job_id}/{field}/{hashlib.blake2b(content, digest_size=8).hexdigest()}"


def blobs_of(job: JobRecord, inline_limit: int) -> list[tuple[str, bytes]]:
    """Return the contents of a job that its document only names, to be written before it."""
    contents = (("context", job.context), ("result", job.result))
    return [
        (blob_id(job.id, name, content), content) for name, content in contents if content and len(content) > inline_limit
    ]


def blobs_named(document: Mapping[str, Any]) -> list[str]:
    """Return the names of the contents that are kept outside of a document."""
    named = (document.get("context_blob"), document.get("result_blob"))
    return [name for name in named if isinstance(name, str)]


def _payload(job_id: str, field: str, content: bytes, inline_limit: int | None) -> Document:
    if inline_limit is not None and len(content) > inline_limit:
        return {f"{field}_blob": blob_id(job_id, field, content)}
    try:
        value = from_json(content)
    except ValueError:
        return {f"{field}_json": _as_text(content)}
    # Writing the value again must give the same bytes: a second submission is recognised by comparing contexts.
    if to_json(value) != content or not _embeds(value):
        return {f"{field}_json": _as_text(content)}
    return {field: value}


def _as_text(content: bytes) -> str | bytes:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content


def _embeds(value: Any, depth: int = 0) -> bool:
    """Tell whether a JSON value can be part of a document."""
    if isinstance(value, dict):
        return depth < _MAX_DEPTH and all(_is_field(key) and _embeds(item, depth + 1) for key, item in value.items())
    if isinstance(value, list):
        return depth < _MAX_DEPTH and all(_embeds(item, depth + 1) for item in value)
    return math.isfinite(value) if isinstance(value, float) else not isinstance(value, int) or abs(value) <= _MAX_INT


def is_embeddable(value: Any) -> bool:
    """Tell whether a document holds this value of a metadata key as it is, so that it can be looked for."""
    return _embeds(value)


def _is_field(key: str) -> bool:
    return bool(key) and key[0] != "$" and "." not in key and "\0" not in key


# --- jobs ------------------------------------------------------------------------------------------------------------


def encode_job(job: JobRecord, inline_limit: int | None = None) -> Document:
    """Return the whole document of a job.

    Args:
        job: The record.
        inline_limit: Contexts and results with more bytes than this are named instead of held; see `blobs_of`.
    """
    about = job.particulars
    document: Document = {
        "_id": job.id,
        "schema_version": SCHEMA_VERSION,
        "kind": job.terms.kind,
        "slot": slot_of(job.id),
        "created_at": to_date(job.created_at),
        "terms": _encode_terms(job.terms),
        **_payload(job.id, "context", job.context, inline_limit),
    }
    document.update((name, _text(value)) for name in _ABOUT_FIELDS if (value := getattr(about, name)) is not None)
    if about.metadata is not None:
        document.update(_encode_metadata(about.metadata))
    if about.depth:
        document["depth"] = about.depth
    if about.residence.audit:
        document["audit"] = True
    if about.residence.origin is not None:
        source, partition = about.residence.origin
        document["archived_from"] = (
            {"partition": partition} if source is None else {"source": source, "partition": partition}
        )
    document.update(_encode_state(job, inline_limit))
    return document


def encode_update(job: JobRecord, inline_limit: int | None = None) -> Document:
    """Return the update that brings a job's document to the state of ``job``; what never changes is not sent again."""
    state = _encode_state(job, inline_limit)
    absent = {name: "" for name in STATE_FIELDS if name not in state}
    return {"$set": state, "$unset": absent} if absent else {"$set": state}


# Everything of a job that changes during its life; the rest is written once.
STATE_FIELDS: Final = (
    "status", "rev", "term", "reason", "queued_at", "due_at", "started_at", "completed_at", "attempts", "crashes", "ordinal",
    "execution_id", "last_execution_id", "progress", "result", "result_json", "result_blob", "error", "cancel_requested_at",
    "last_modified", "items",
)  # fmt: skip
_ITEM_COUNTS: Final = ("sequence", "total", "processed", "skipped", "failed", "value_parts", "failed_parts")
_TEXTS: Final = ("reason", "execution_id", "last_execution_id")
_INSTANTS: Final = ("queued_at", "due_at", "started_at", "completed_at", "cancel_requested_at")


def _encode_state(job: JobRecord, inline_limit: int | None) -> Document:
    state: Document = {"status": job.status.value, "rev": job.rev, "term": job.term}
    state["last_modified"] = to_date(job.last_modified)
    state.update((name, to_date(at)) for name in _INSTANTS if (at := getattr(job, name)) is not None)
    state.update((name, n) for name in ("attempts", "crashes", "ordinal") if (n := getattr(job, name)))
    state.update((name, _text(text)) for name in _TEXTS if (text := getattr(job, name)) is not None)
    if job.progress is not None:
        state["progress"] = _encode_progress(job.progress)
    if job.result is not None:
        state.update(_payload(job.id, "result", job.result, inline_limit))
    if job.error is not None:
        state["error"] = _encode_error(job.error)
    if job.checkpoint is not None:
        state["items"] = _encode_checkpoint(job.id, job.checkpoint)
    return state


def _encode_checkpoint(job_id: str, done: Checkpoint) -> Document:
    counts = {name: n for name in _ITEM_COUNTS if (n := getattr(done, name)) is not None}
    return {**counts, "updated_at": to_date(done.updated_at), **_payload(job_id, "state", done.body, None)}


def _encode_metadata(metadata: Mapping[str, Any]) -> Document:
    plain = {name: value for name, value in metadata.items() if is_metadata_key(name) and _embeds(value)}
    if len(plain) == len(metadata):
        return {"metadata": plain}
    whole = {"metadata_json": to_json(metadata).decode()}  # what counts; the rest beside it is there to be found by
    return {**whole, "metadata": plain} if plain else whole


def _encode_progress(progress: Progress) -> Document:
    document: Document = {"sequence": progress.sequence, "percentage": progress.percentage}
    if progress.message is not None:
        document["message"] = _text(progress.message)
    for name, step in (("current_step", progress.current_step), ("total_steps", progress.total_steps)):
        if step is not None:
            document[name] = min(max(step, -_MAX_INT), _MAX_INT)  # a body may count in what it likes
    if progress.estimated_at is not None:
        document["estimated_at"] = to_date(progress.estimated_at)
    document["updated_at"] = to_date(progress.updated_at)
    return document


def _encode_error(error: ErrorInfo) -> Document:
    return {name: _text(value) for name, value in error._asdict().items()}


def _text(text: str) -> str:
    """Return text that UTF-8 can hold; what comes from users is so already.

    Raises:
        TypeError: It is no text. Written as it is, it could not be read back.
    """
    given: object = text
    if not isinstance(given, str):
        msg = f"expected text, got {quoted(given)}"
        raise TypeError(msg)
    return text if text.isascii() else readable(text)


def _encode_terms(terms: Terms) -> Document:
    # The retry policy is written out in full: a later version with other defaults must not change what was agreed.
    retry, spec = terms.retry, terms.spec
    document: Document = {
        "retry": {
            "max_attempts": retry.max_attempts,
            "strategy": RetryStrategy(retry.strategy).value,
            "initial_delay_s": seconds(retry.initial_delay, name="retry.initial_delay"),
            "backoff_multiplier": float(retry.backoff_multiplier),
            "max_delay_s": seconds(retry.max_delay, name="retry.max_delay"),
            "jitter": retry.jitter,
        },
        "spec": _encode_spec(spec),
        "isolation": terms.isolation.value,
        "when_parent_ends": terms.when_parent_ends.value,
    }
    if terms.timeout_s is not None:
        document["timeout_s"] = terms.timeout_s
    if terms.claim is not Claim.WRITE_BEHIND:
        document["claim"] = terms.claim.value
    return document


def _encode_spec(spec: ActorSpec) -> Document:
    document: Document = {"num_cpus": spec.num_cpus, "concurrency": spec.concurrency}
    # Pairs and no sub-documents: names of resources and labels may contain dots.
    for name, pairs in (("custom", spec.custom), ("label_selector", spec.label_selector)):
        if pairs:
            document[name] = [list(pair) for pair in pairs]
    plain = ("num_gpus", "memory", "runtime_env", "dedicated", "lead")
    document.update((name, value) for name in plain if (value := getattr(spec, name)))
    return document


def decode_job(
    document: Mapping[str, Any], *, source: str | None = None, partition: str = "", blobs: Mapping[str, bytes] = _NO_BLOBS
) -> JobRecord:
    """Return the record that a document holds.

    Args:
        document: As the database returned it, with aware dates.
        source: The name of the source that it was read from.
        partition: The partition that it was read from.
        blobs: The contents of `blobs_named`.

    Raises:
        RecordCorruptError: The document is of a later version, or a field is missing or not what it should be.
    """
    return _decoded(document, lambda fields: _decode_job(fields, source, partition, blobs))


def _decode_job(fields: _Fields, source: str | None, partition: str, blobs: Mapping[str, bytes]) -> JobRecord:
    progress, error, items = fields.sub("progress"), fields.sub("error"), fields.sub("items")
    context = fields.payload("context", blobs)
    if context is None:
        raise fields.problem("context", "is missing")
    return JobRecord(
        fields.text("_id"), _decode_terms(fields), _decode_particulars(fields, source, partition), context,
        fields.instant("created_at"), fields.member("status", JobStatus), fields.whole("rev"), fields.whole("term"),
        fields.maybe_text("reason"), fields.maybe_instant("queued_at"), fields.maybe_instant("due_at"),
        fields.maybe_instant("started_at"), fields.maybe_instant("completed_at"), fields.whole("attempts", 0),
        fields.whole("crashes", 0), fields.whole("ordinal", 0), fields.maybe_text("execution_id"),
        _decode_progress(progress) if progress else None, fields.payload("result", blobs),
        _decode_error(error) if error else None, fields.maybe_instant("cancel_requested_at"),
        fields.instant("last_modified"), fields.maybe_text("last_execution_id"),
        _decode_checkpoint(items) if items else None,
    )  # fmt: skip


def _decode_particulars(fields: _Fields, source: str | None, partition: str) -> Particulars:
    texts = {name: fields.maybe_text(name) for name in _ABOUT_FIELDS}
    came = fields.sub("archived_from")
    origin = (came.maybe_text("source"), came.maybe_text("partition") or "") if came is not None else None
    residence = Residence(source, partition, fields.document.get("audit") is True, origin)
    return Particulars(metadata=fields.metadata(), depth=fields.whole("depth", 0), residence=residence, **texts)


def _decode_progress(fields: _Fields) -> Progress:
    return Progress(
        fields.whole("sequence"), fields.number("percentage"), fields.maybe_text("message"),
        fields.maybe_whole("current_step"), fields.maybe_whole("total_steps"), fields.maybe_instant("estimated_at"),
        fields.instant("updated_at"),
    )  # fmt: skip


def _decode_checkpoint(fields: _Fields) -> Checkpoint:
    body = fields.payload("state", _NO_BLOBS)
    if body is None:
        raise fields.problem("state", "is missing")
    return Checkpoint(
        fields.whole("sequence"), body, fields.maybe_whole("total"), fields.whole("processed"), fields.whole("skipped"),
        fields.whole("failed"), fields.instant("updated_at"), fields.whole("value_parts", 0),
        fields.whole("failed_parts", 0),
    )  # fmt: skip


def _decode_error(fields: _Fields) -> ErrorInfo:
    return ErrorInfo(fields.text("type"), fields.text("message"), fields.maybe_text("stack_trace") or "")


_terms_cache: dict[bytes, Terms] = {}


def _decode_terms(fields: _Fields) -> Terms:
    """Return the terms of a job; jobs with equal terms share one object, as they do before they are stored."""
    try:
        key = to_json((fields.text("kind"), fields.document.get("terms")))
    except PydanticSerializationError:
        return _read_terms(fields)  # which finds out what is wrong
    found = _terms_cache.get(key)
    if found is None:
        found = _read_terms(fields)
        if len(_terms_cache) >= _TERMS_CACHED:
            _terms_cache.clear()
        _terms_cache[key] = found
    return found


def _read_terms(fields: _Fields) -> Terms:
    terms = fields.needed_sub("terms")
    timeout_s = terms.number("timeout_s") if "timeout_s" in terms.document else None
    return make_terms(
        fields.text("kind"), _read_retry(terms.needed_sub("retry")), timeout_s, _read_spec(terms.needed_sub("spec")),
        terms.member("isolation", Isolation), terms.member("when_parent_ends", ParentPolicy),
        terms.member("claim", Claim) if "claim" in terms.document else Claim.WRITE_BEHIND,
    )  # fmt: skip


def make_terms(
    kind: str,
    retry: RetryPolicy,
    timeout_s: float | None,
    spec: ActorSpec,
    isolation: Isolation,
    when_parent_ends: ParentPolicy,
    claim: Claim = Claim.WRITE_BEHIND,
) -> Terms:
    """Return terms without a shipped class, with the id that `koan_ray.definition.Definition.terms` would give them."""
    return identified(Terms("", kind, "", retry, timeout_s, spec, isolation, when_parent_ends, claim))


def stored_terms(terms: Terms) -> Terms:
    """Return what a document keeps of ``terms``: all but the shipped class."""
    return identified(terms._replace(code_id=""))


def _read_retry(fields: _Fields) -> RetryPolicy:
    try:
        return RetryPolicy(
            max_attempts=fields.whole("max_attempts"),
            strategy=fields.member("strategy", RetryStrategy),
            initial_delay=timedelta(seconds=fields.number("initial_delay_s")),
            backoff_multiplier=fields.number("backoff_multiplier"),
            max_delay=timedelta(seconds=fields.number("max_delay_s")),
            jitter=fields.number("jitter"),
        )
    except (ConfigurationError, OverflowError) as error:
        raise fields.problem("", str(error)) from None


def _read_spec(fields: _Fields) -> ActorSpec:
    return ActorSpec(
        fields.number("num_cpus"), fields.number("num_gpus", 0.0), fields.maybe_whole("memory"),
        tuple((name, float(amount)) for name, amount in fields.pairs("custom", (int, float))),
        tuple((name, value) for name, value in fields.pairs("label_selector", str)),
        fields.maybe_text("runtime_env"), fields.whole("concurrency"), fields.document.get("dedicated") is True,
        fields.document.get("lead") is True,
    )  # fmt: skip


# --- executions ------------------------------------------------------------------------------------------------------


def encode_execution(execution: ExecutionRecord) -> Document:
    """Return the whole document of an execution."""
    return {**_encode_begin(execution), **_encode_end(execution)}


def encode_opening(execution: ExecutionRecord) -> Document:
    """Return the update that adds an open execution, and changes nothing where it is stored already."""
    return {"$setOnInsert": encode_execution(execution)}


def encode_closing(execution: ExecutionRecord) -> Document:
    """Return the update that closes an execution, and adds it where it is not stored."""
    return {"$set": _encode_end(execution), "$unset": {"open": ""}, "$setOnInsert": _encode_begin(execution)}


def _encode_begin(execution: ExecutionRecord) -> Document:
    return {
        "_id": execution.id,
        "job_id": execution.job_id,
        "slot": slot_of(execution.job_id),
        "schema_version": SCHEMA_VERSION,
        "attempt": execution.attempt,
        "started_at": to_date(execution.started_at),
    }


def _encode_end(execution: ExecutionRecord) -> Document:
    state: Document = {"status": execution.status.value}
    if execution.status is ExecutionStatus.RUNNING:
        state["open"] = slot_of(execution.job_id)  # there only while it is open: its sparse index holds nothing else
    if execution.reason is not None:
        state["reason"] = execution.reason.value
    if execution.completed_at is not None:
        state["completed_at"] = to_date(execution.completed_at)
    if execution.error is not None:
        state["error"] = _encode_error(execution.error)
    if execution.metrics:
        plain = {name: _encode_metric(value) for name, value in execution.metrics}
        state.update(_payload(execution.id, "metrics", to_json(plain, inf_nan_mode="strings"), None))
    return state


def _encode_metric(value: Any) -> Any:
    return value._asdict() if isinstance(value, ActorInfo) else value


def decode_execution(document: Mapping[str, Any]) -> ExecutionRecord:
    """Return the execution that a document holds.

    Raises:
        RecordCorruptError: As `decode_job`.
    """
    return _decoded(document, _decode_execution)


def _decode_execution(fields: _Fields) -> ExecutionRecord:
    error = fields.sub("error")
    return ExecutionRecord(
        fields.text("_id"), fields.text("job_id"), fields.whole("attempt"), fields.instant("started_at"),
        fields.member("status", ExecutionStatus),
        fields.member("reason", Reason) if "reason" in fields.document else None,
        fields.maybe_instant("completed_at"), _decode_error(error) if error else None, _decode_metrics(fields),
    )  # fmt: skip


def _decode_metrics(fields: _Fields) -> tuple[tuple[str, Any], ...]:
    encoded = fields.payload("metrics", _NO_BLOBS)
    if encoded is None:
        return ()
    try:
        metrics = dict(from_json(encoded))
    except (ValueError, TypeError):
        raise fields.problem("metrics", "expected a sub-document") from None
    if isinstance(metrics.get("where"), dict):
        where = _Fields(metrics["where"], fields.record_id, "metrics.where.")
        metrics["where"] = ActorInfo(where.text("node_id"), where.text("actor_id"), where.whole("pid"))
    return tuple(metrics.items())


# --- parts -----------------------------------------------------------------------------------------------------------


def part_id(job_id: str, stream: str, seq: int) -> str:
    """Return the key of a part: one for each number, so that none is there twice."""
    return f"{job_id}/{stream}/{seq:010d}"


def encode_part(part: Part) -> Document:
    """Return the whole document of a part.

    Dead items are kept as sub-documents, which people query. Values are kept as the text that they are: there may be
    millions, and to take them apart and put them together again would be most of the work.
    """
    document: Document = {
        "_id": part_id(part.job_id, part.stream, part.seq),
        "job_id": part.job_id,
        "stream": part.stream,
        "seq": part.seq,
        "schema_version": SCHEMA_VERSION,
        "fence": part.fence,
        "count": part.count,
    }
    if part.stream == FAILED:
        return {**document, **_payload(part.job_id, "items", part.body, None)}
    return {**document, "items_json": _as_text(part.body)}


def decode_part(document: Mapping[str, Any]) -> Part:
    """Return the part that a document holds.

    Raises:
        RecordCorruptError: As `decode_job`.
    """
    return _decoded(document, _decode_part)


def _decode_part(fields: _Fields) -> Part:
    body = fields.payload("items", _NO_BLOBS)
    if body is None:
        raise fields.problem("items", "is missing")
    return Part(
        fields.text("job_id"), fields.text("stream"), fields.whole("seq"), body, fields.whole("count"),
        fields.whole("fence", 0),
    )  # fmt: skip


# --- reading with suspicion ------------------------------------------------------------------------------------------


def _decoded(document: Mapping[str, Any], decode: Callable[[_Fields], D]) -> D:
    """Return what ``decode`` makes of a document; whatever it stumbles over is the document's fault, and said to be."""
    fields = _Fields(document, said(document.get("_id"), 100))
    try:
        fields.check_version()
        return decode(fields)
    except RecordCorruptError:
        raise
    except Exception as problem:
        raise fields.problem("", f"cannot be read: {type(problem).__name__}: {said(problem, 500)}") from problem


class _Fields:
    """The fields of a document or sub-document, each checked as it is read."""

    __slots__ = ("_path", "document", "record_id")

    def __init__(self, document: Mapping[str, Any], record_id: str, path: str = "") -> None:
        self.document, self.record_id, self._path = document, record_id, path

    def problem(self, name: str, what: str) -> RecordCorruptError:
        return RecordCorruptError(self.record_id, (self._path + name).rstrip("."), what)

    def check_version(self) -> None:
        version = self.whole("schema_version")
        if version != SCHEMA_VERSION:
            raise self.problem("schema_version", f"is {version}, and this version of koan_ray reads {SCHEMA_VERSION}")

    def text(self, name: str) -> str:
        value = self.document.get(name)
        if not isinstance(value, str):
            raise self._unexpected(name, "text")
        return value

    def maybe_text(self, name: str) -> str | None:
        return None if self.document.get(name) is None else self.text(name)

    def whole(self, name: str, default: int | None = None) -> int:
        value = self.document.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._unexpected(name, "a whole number")
        return int(value)  # bson has an int of its own for 64 bits

    def maybe_whole(self, name: str) -> int | None:
        return None if self.document.get(name) is None else self.whole(name)

    def number(self, name: str, default: float | None = None) -> float:
        value = self.document.get(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise self._unexpected(name, "a number")
        return float(value)

    def instant(self, name: str) -> float:
        value = self.document.get(name)
        if not isinstance(value, datetime) or value.tzinfo is None:
            raise self._unexpected(name, "a date")
        return from_date(value)

    def maybe_instant(self, name: str) -> float | None:
        return None if self.document.get(name) is None else self.instant(name)

    def member(self, name: str, members: type[M]) -> M:
        try:
            return members(str(self.document.get(name)))
        except ValueError:
            raise self._unexpected(name, f"one of {', '.join(members)}") from None

    def pairs(self, name: str, of: type | tuple[type, ...]) -> list[tuple[str, Any]]:
        value = self.document.get(name, [])
        if not isinstance(value, list) or not all(_is_pair(item, of) for item in value):
            raise self._unexpected(name, "a list of pairs")
        return [(pair[0], pair[1]) for pair in value]

    def sub(self, name: str) -> _Fields | None:
        return None if self.document.get(name) is None else self.needed_sub(name)

    def needed_sub(self, name: str) -> _Fields:
        value = self.document.get(name)
        if not isinstance(value, dict):
            raise self._unexpected(name, "a sub-document")
        return _Fields(value, self.record_id, f"{self._path}{name}.")

    def payload(self, name: str, blobs: Mapping[str, bytes]) -> bytes | None:
        if (blob := self.document.get(f"{name}_blob")) is not None:
            if blob not in blobs:
                raise self.problem(f"{name}_blob", f"the content {blob!r} is missing")
            return blobs[blob]
        if (text := self.document.get(f"{name}_json")) is not None:
            return text.encode() if isinstance(text, str) else bytes(text)
        return self._json(name) if name in self.document else None

    def metadata(self) -> dict[str, Any] | None:
        if (text := self.maybe_text("metadata_json")) is not None:
            try:
                return cast("dict[str, Any]", from_json(text))
            except ValueError as error:
                raise self.problem("metadata_json", str(error)) from None
        if self.document.get("metadata") is None:
            return None
        self.needed_sub("metadata")
        return cast("dict[str, Any]", self.plain("metadata"))

    def plain(self, name: str) -> Any:
        """Return a JSON value without types of the database's."""
        return from_json(self._json(name))

    def _json(self, name: str) -> bytes:
        try:
            return to_json(self.document[name])
        except (PydanticSerializationError, ValueError) as error:
            raise self.problem(name, f"cannot be read as JSON: {error}") from None

    def _unexpected(self, name: str, expected: str) -> RecordCorruptError:
        if name not in self.document:
            return self.problem(name, f"is missing; expected {expected}")
        return self.problem(name, f"expected {expected}, got {str(self.document[name])[:80]!r}")


def _is_pair(item: object, of: type | tuple[type, ...]) -> bool:
    return isinstance(item, list) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], of)


# --- values in collections of users ------------------------------------------------------------------------------------


_OURS: Final = frozenset({"jobs", "executions", "items", "parts", "leases", "meta", "blobs", "fs", "system"})


def check_collection(name: str) -> None:
    """Refuse a name that no collection of a user's may have.

    Raises:
        ConfigurationError: It is not 1 to 64 of a-z, 0-9, ``_`` and ``-``, or koan_ray or the server uses it.
    """
    if not NAME.fullmatch(name):
        msg = f"write_documents: collection: expected 1 to 64 of a-z, 0-9, '_' and '-', got {name!r:.100}"
        raise ConfigurationError(msg)
    if name in _OURS:
        taken = ", ".join(sorted(_OURS))
        msg = (
            f"write_documents: collection {name!r} is not for values: koan_ray or the server uses {taken}; take another name"
        )
        raise ConfigurationError(msg)


def value_id(job_id: str, number: int) -> str:
    """Return the key of a value: one for each number, in their order."""
    return f"{job_id}/{number:012d}"


def encode_value(job_id: str, number: int, body: bytes) -> Document:
    """Return the document of a value.

    Raises:
        ConfigurationError: It has a member that no document of ours may have.
    """
    value = from_json(body)
    document = value if isinstance(value, dict) else {"value": value}
    for name in document:
        if name == "_id" or name.startswith("$"):
            msg = (
                f"write_documents: value {number} has a member {name!r:.100}, which a document cannot have here; "
                f"give it another name, without '$' in front and other than '_id'"
            )
            raise ConfigurationError(msg)
    return {"_id": value_id(job_id, number), **document}
