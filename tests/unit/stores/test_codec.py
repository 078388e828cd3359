"""Records as documents and back."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime

import bson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic_core import to_json

from koan_ray.definition import Definition
from koan_ray.domain.durations import seconds
from koan_ray.domain.lease import slot_of
from koan_ray.domain.records import ActorSpec, ErrorInfo, Progress, Terms
from koan_ray.domain.retry import RetryPolicy, RetryStrategy
from koan_ray.domain.status import ExecutionStatus, Isolation, JobStatus, ParentPolicy, Reason
from koan_ray.errors import RecordCorruptError
from koan_ray.jobs import Job
from koan_ray.ports import ActorInfo
from koan_ray.stores.codec import (
    blobs_named,
    blobs_of,
    decode_execution,
    decode_job,
    encode_closing,
    encode_execution,
    encode_job,
    encode_opening,
    encode_update,
    first_date_from,
    from_date,
    make_terms,
    stored_terms,
    to_date,
)
from koan_ray.testing.contracts import AT, assert_same, audited, execution, job

OPTIONS = bson.CodecOptions(tz_aware=True)
KEYS = st.text(max_size=6) | st.sampled_from(["a.b", "$eq", "$", ".", "", "_id", "x\0y", "é"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-(2**70), 2**70) | st.text(max_size=8)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


def through_bson(document):
    """Return a document as a database gives it back."""
    return bson.decode(bson.encode(document), OPTIONS)


def typed(value):
    """Return a form in which 1, 1.0, True and the order of keys are told apart."""
    if isinstance(value, dict):
        return [(key, typed(item)) for key, item in value.items()]
    return [typed(item) for item in value] if isinstance(value, list) else (type(value).__name__, repr(value))


@given(JSON)
@settings(max_examples=300, deadline=None)
def test_any_json_comes_back_byte_for_byte(value):
    for content in (to_json(value), json.dumps(value).encode(), json.dumps(value, indent=1).encode()):
        record = job(context=content, result=content)
        found = decode_job(through_bson(encode_job(record)))
        assert (found.context, found.result) == (content, content)
        assert typed(json.loads(found.context)) == typed(value)


@pytest.mark.parametrize(
    "content",
    [
        b"\xff", b'"\\ud800"', b"[" * 300 + b"]" * 300, b"[" * 95 + b"]" * 95, b"1e400", b"NaN", b'{"a":1,"a":2}',
        b'{"$where":"1"}',         str(2**63).encode(), str(-(2**63)).encode(), b' { "a" : 1 } ',
    ],
)  # fmt: skip
def test_what_a_document_cannot_hold_is_kept_as_it_is(content):
    document = encode_job(job(context=content))
    assert "context" not in document
    assert decode_job(through_bson(document)).context == content


def test_what_a_document_can_hold_is_a_sub_document():
    document = encode_job(job(context=b'{"to":{"name":"x","n":9223372036854775807}}', result=b"null"))
    assert document["context"] == {"to": {"name": "x", "n": 2**63 - 1}}
    assert document["result"] is None
    assert decode_job(document).result == b"null"
    assert decode_job(encode_job(job())).result is None


@given(st.dictionaries(st.text(min_size=1, max_size=5), JSON, max_size=3))
@settings(max_examples=100, deadline=None)
def test_any_metadata_comes_back(metadata):
    found = decode_job(through_bson(encode_job(job(metadata=metadata)))).particulars.metadata
    assert typed(found) == typed(json.loads(to_json(metadata)))


@given(st.floats(0, 4e9))
def test_instants_are_kept_to_the_millisecond_and_bounds_agree_with_them(at):
    kept = from_date(to_date(at))
    assert abs(kept - at) <= 0.000_501
    assert to_date(kept) == to_date(at)  # what was read back is written the same
    bound = first_date_from(at)
    assert from_date(bound) >= at
    assert (to_date(at) >= bound) == (kept >= at)


@pytest.mark.parametrize("at", [math.inf, -math.inf, 1e18, -1e18])
def test_instants_out_of_range_become_the_edge(at):
    assert bson.decode(bson.encode({"at": to_date(at)}), OPTIONS)["at"] == to_date(at)
    first_date_from(at)


policies = st.builds(
    RetryPolicy, max_attempts=st.integers(1, 50), strategy=st.sampled_from(RetryStrategy), initial_delay=st.floats(0, 1000),
    backoff_multiplier=st.floats(1, 100), max_delay=st.floats(1000, 1e6), jitter=st.floats(0, 1),
)  # fmt: skip
names = st.text(min_size=1, max_size=8)
specs = st.builds(
    ActorSpec, num_cpus=st.floats(0, 64), num_gpus=st.floats(0, 8), memory=st.none() | st.integers(1, 2**40),
    custom=st.dictionaries(names, st.floats(0, 9)).map(lambda d: tuple(sorted(d.items()))),
    label_selector=st.dictionaries(names, names).map(lambda d: tuple(sorted(d.items()))),
    runtime_env=st.none() | st.just('{"pip": ["x"]}'), concurrency=st.integers(1, 100), dedicated=st.booleans(),
)  # fmt: skip


@given(policies, specs, st.none() | st.floats(0.001, 1e6), st.sampled_from(Isolation), st.sampled_from(ParentPolicy))
@settings(max_examples=100, deadline=None)
def test_terms_come_back_all_but_the_shipped_class(retry, spec, timeout_s, isolation, when_parent_ends):
    terms = Terms("id", "kind", "code", retry, timeout_s, spec, isolation, when_parent_ends)
    found = decode_job(through_bson(encode_job(job().evolve(terms=terms)))).terms
    assert found == stored_terms(terms)
    assert found.code_id == ""
    assert seconds(found.retry.initial_delay, name="") == seconds(retry.initial_delay, name="")


def test_terms_have_the_id_that_the_class_would_give_them():
    class Mail(Job[dict, int]):
        def execute(self, context, progress, cancellation):
            return 1

    terms = Definition(Mail).terms("")
    assert make_terms(terms.kind, *terms[3:-1]) == terms


def test_jobs_with_equal_terms_share_them():
    first, second = (decode_job(through_bson(encode_job(job()))) for _ in range(2))
    assert first.terms is second.terms


def full():
    return audited(
        name="n", description="d", metadata={"k": 1}, correlation_id="c", status=JobStatus.FAILED, term=3,
        reason="exhausted", started_at=AT + 1, completed_at=AT + 2, attempts=3, crashes=1, ordinal=4, execution_id="e",
        progress=Progress(1 << 34, 50.0, "half", 1, 2, AT + 3, AT + 1), result=b'{"r":[1]}', error=ErrorInfo("T", "m", "s"),
        cancel_requested_at=AT + 1.5, due_at=AT,
    )  # fmt: skip


def test_a_full_record_comes_back():
    record = full()
    assert_same(decode_job(through_bson(encode_job(record))), record)


def test_an_update_leads_to_the_same_document_as_a_new_one():
    before, after = job(), full()
    document = encode_job(before)
    update = encode_update(after)
    document.update(update["$set"])
    for name in update["$unset"]:
        document.pop(name, None)
    whole = encode_job(after)
    assert {name: document.get(name) for name in update["$set"]} == {name: whole[name] for name in update["$set"]}
    assert not {"context", "metadata", "terms", "created_at", "kind", "slot"} & (
        update["$set"].keys() | update["$unset"].keys()
    )
    back = encode_update(before)
    assert {"result", "error", "progress", "started_at"} <= back["$unset"].keys()


def test_values_that_are_not_there_take_no_room():
    document = encode_job(job())
    assert document.keys() == {
        "_id", "schema_version", "kind", "slot", "created_at", "terms", "context", "status", "rev", "term", "last_modified",
        "queued_at",
    }  # fmt: skip
    assert document["slot"] == slot_of(document["_id"])
    assert len(bson.encode(document)) < 700


def test_text_that_is_no_unicode_does_not_stop_a_batch():
    record = job(
        name="file\udcff", error=ErrorInfo("E", "no such file: \udcff", "\udc80"), progress=Progress(1, 1.0, "\udcff", 2**80)
    )
    found = decode_job(through_bson(encode_job(record)))
    assert found.error.message == "no such file: \\xff"
    assert found.progress.current_step == 2**63 - 1


# --- contents elsewhere ----------------------------------------------------------------------------------------------


def test_large_contents_are_named_by_what_they_are():
    record = job(context=b'"' + b"x" * 100 + b'"', result=b"1")
    document = encode_job(record, 50)
    blobs = dict(blobs_of(record, 50))
    assert blobs_named(document) == list(blobs)
    assert "context" not in document
    assert document["result"] == 1
    assert decode_job(through_bson(document), blobs=blobs).context == record.context
    other = dict(blobs_of(record.evolve(context=b'"' + b"y" * 100 + b'"'), 50))
    assert not other.keys() & blobs.keys()
    with pytest.raises(RecordCorruptError, match="context_blob"):
        decode_job(document)


# --- executions ------------------------------------------------------------------------------------------------------


def test_executions_come_back():
    begun = execution(audited())
    assert "open" in encode_execution(begun)
    ended = begun.close(
        status=ExecutionStatus.FAILED, reason=Reason.LOST, at=AT + 1, error=ErrorInfo("E", "m"),
        metrics=(("wall_s", 1.5), ("n", 2**70), ("a.b", None), ("where", ActorInfo("n", "a", 1))),
    )  # fmt: skip
    for record in (begun, ended):
        found = decode_execution(through_bson(encode_execution(record)))
        assert all(getattr(found, name) == getattr(record, name) for name in type(record).__slots__)
    assert "open" not in encode_execution(ended)
    assert encode_opening(begun) == {"$setOnInsert": encode_execution(begun)}
    closing = encode_closing(ended)
    assert not closing["$set"].keys() & closing["$setOnInsert"].keys()
    assert {**closing["$set"], **closing["$setOnInsert"]} == encode_execution(ended)


def test_where_an_execution_ran_can_be_queried():
    ended = execution(audited()).close(
        status=ExecutionStatus.SUCCEEDED, reason=Reason.SUCCEEDED, at=AT, metrics=(("where", ActorInfo("n", "a", 1)),)
    )
    assert encode_execution(ended)["metrics"] == {"where": {"node_id": "n", "actor_id": "a", "pid": 1}}


# --- damage ----------------------------------------------------------------------------------------------------------

WRONG = st.sampled_from(
    [None, 5, "x", [], {}, b"", 1.5, True, datetime(2020, 1, 1, tzinfo=UTC), bson.ObjectId(), [[1]], {"a": 1}]
)


def problem_of(document):
    try:
        decode_job(document)
    except RecordCorruptError as error:
        return error
    return None


@given(st.sampled_from(sorted(encode_job(full()))), WRONG)
@settings(deadline=None)
def test_a_damaged_job_is_read_or_refused_by_name(field, value):
    document = encode_job(full()) | {field: value}
    error = problem_of(document)
    if error is not None:
        assert error.field.partition(".")[0] == field
        assert error.record_id == str(document["_id"])
        assert error.record_id in str(error)


@given(
    st.sampled_from(["retry", "spec"]), st.sampled_from(["max_attempts", "strategy", "custom", "num_cpus", "jitter"]), WRONG
)
@settings(deadline=None)
def test_damaged_terms_are_read_or_refused(part, field, value):
    document = encode_job(full())
    document["terms"][part][field] = value
    error = problem_of(document)
    assert error is None or error.field.startswith("terms")


@pytest.mark.parametrize("field", sorted(encode_job(job()).keys() - {"_id", "queued_at", "slot"}))
def test_a_missing_field_is_named(field):
    document = encode_job(job())
    del document[field]
    with pytest.raises(RecordCorruptError) as caught:
        decode_job(document)
    assert caught.value.field.partition(".")[0] == field


def test_documents_of_later_versions_are_left_alone():
    with pytest.raises(RecordCorruptError, match="schema_version: is 2"):
        decode_job(encode_job(job()) | {"schema_version": 2})
    with pytest.raises(RecordCorruptError, match="schema_version"):
        decode_execution(encode_execution(execution(job())) | {"schema_version": 2})


def test_fields_that_we_do_not_know_are_ignored():
    record = job()
    assert_same(decode_job(encode_job(record) | {"x_note": 1}), record)
