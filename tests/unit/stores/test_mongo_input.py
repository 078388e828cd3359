"""What MongoStore refuses before it talks to anybody, and how it names errors."""

from __future__ import annotations

import pytest
from pymongo import errors

from koan_ray.domain.query import parse_query
from koan_ray.errors import ConfigurationError, StoreError, StoreUnavailableError
from koan_ray.stores.mongo import MongoStore
from koan_ray.stores.mongo_driver import is_unknown_outcome, translated
from koan_ray.stores.mongo_filters import filter_of, steps

SECRET = "s3cr3t"


@pytest.mark.parametrize("driver", ["pymongo", "motor"])
@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("mongodb://h/?w=1", "w=1"), ("mongodb://h/?w=0", "w=0"), ("mongodb://h/?w=2", "w=2"),
        ("mongodb://h/?journal=false", "journal"), ("mongodb://", "URL"), ("http://h", "URL"), ("mongodb://h:port/", "URL"),
        (f"mongodb://u:{SECRET}@h:port/", "URL"), (f"mongodb://u:{SECRET}@@h/", "URL"),
        (f"mongodb://u:{SECRET}@h/?w=1", "w=1"),
    ],
)  # fmt: skip
async def test_unusable_urls_are_refused_without_telling_secrets(driver, url, says):
    with pytest.raises(ConfigurationError, match=says) as caught:
        await MongoStore(url, source="jobs", driver=driver).open()
    assert SECRET not in str(caught.value)
    assert "'jobs'" in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


async def test_an_unknown_driver_is_refused():
    with pytest.raises(ConfigurationError, match="'pymongo' or 'motor'"):
        await MongoStore("mongodb://h", driver="psycopg").open()


async def test_a_store_that_is_not_open_says_so():
    with pytest.raises(StoreUnavailableError, match="open"):
        await MongoStore("mongodb://h").get("x")


@pytest.mark.parametrize(
    ("error", "is_unknown"),
    [
        (errors.AutoReconnect("x"), True), (errors.NetworkTimeout("x"), True), (errors.NotPrimaryError("x"), True),
        (errors.ServerSelectionTimeoutError("x"), True), (errors.WaitQueueTimeoutError("x"), True),
        (errors.WTimeoutError("x", 64), True), (errors.ExecutionTimeout("x", 50), True),
        (errors.WriteConcernError("x", 100), True),
        (errors.OperationFailure("shutting down", 91), True), (errors.InvalidOperation("closed"), True),
        (errors.OperationFailure("bad value", 2), False), (errors.DuplicateKeyError("x", 11000), False),
        (errors.BulkWriteError({"writeErrors": [], "writeConcernErrors": [{"code": 64}]}), True),
        (errors.BulkWriteError({"writeErrors": [{"code": 11000, "index": 0}], "writeConcernErrors": []}), False),
        (errors.BulkWriteError({"writeErrors": [{"code": 10107, "index": 0}], "writeConcernErrors": []}), True),
    ],
)  # fmt: skip
def test_errors_say_whether_the_outcome_is_unknown(error, is_unknown):
    assert is_unknown_outcome(error) is is_unknown
    ours = translated(error, "source 'jobs'", "writing 3 jobs")
    assert isinstance(ours, StoreUnavailableError) is is_unknown
    assert isinstance(ours, StoreError)
    assert "writing 3 jobs" in str(ours)


def test_a_refused_login_is_ours_to_configure():
    assert isinstance(translated(errors.OperationFailure("no", 18), "x", "connecting"), ConfigurationError)


@pytest.mark.parametrize("value", [{"$ne": 1}, {"$where": "1"}, [{"$gt": ""}], "$x", {"a": {"$regex": ".*"}}])
def test_no_value_of_a_filter_becomes_an_operator(value):
    sought = filter_of(parse_query({"metadata": {"k": value}}))
    if isinstance(value, str):
        assert sought["metadata.k"].keys() <= {"$eq", "$type", "$not"}
    else:  # no document holds it as it is: it is compared by us
        assert sought == {"metadata_json": {"$type": "string"}}
    sought = filter_of(parse_query({"name": "$ne", "kind": "$where", "correlation_id": "$gt", "text": ".*(a+)+$"}))
    assert all(condition.keys() <= {"$eq"} for name, condition in sought.items() if name != "$or")
    assert sought["$or"][0]["name"]["$regex"] == r"\.\*\(a\+\)\+\$"


def test_the_ranges_over_one_field_become_one():
    first = parse_query({"created_after": 5, "created_before": 9})
    rest = steps(type(first)(created_before=9.0, after=(7000, "id")))
    assert [step.filter["created_at"].keys() for step in rest] == [{"$lt", "$eq"}, {"$lt"}]
    assert rest[1].filter["created_at"]["$lt"].timestamp() == 7
