"""Metadata: what a submit takes, a filter finds again; what cannot be kept is refused by name in both."""

from __future__ import annotations

import enum
import json
import math
import uuid
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import PurePosixPath

import numpy as np
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

import koan_ray as koan
from koan_ray.domain.metadata import MetadataError, is_same, plain_metadata
from koan_ray.domain.query import parse_query


class Colour(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


class Word(str):
    __slots__ = ()

    def __str__(self):
        return "another"


class Model(pydantic.BaseModel):
    name: str = "n"
    at: date = date(2024, 1, 2)


@dataclass
class Point:
    x: int = 1
    tags: tuple[str, ...] = ("a",)


class Login(pydantic.BaseModel):
    password: pydantic.SecretStr = pydantic.SecretStr("hunter2")


class Loud:
    def __getattr__(self, name):
        raise RuntimeError(name)

    def __repr__(self):
        raise RuntimeError


Pair = namedtuple("Pair", "a b")  # noqa: PYI024 - what users have
LOOPED: list = []
LOOPED.append(LOOPED)

TAKEN = [
    ("t1", "t1"), (7, 7), (True, True), (None, None), (1.5, 1.5), (-0.0, 0.0), (2**63, 2**63), (2**70, 2**70),
    (uuid.UUID(int=5), "00000000-0000-0000-0000-000000000005"),
    (datetime(2024, 1, 2, 3, 4, tzinfo=UTC), "2024-01-02T03:04:00Z"),
    (date(2024, 1, 2), "2024-01-02"), (time(3, 4), "03:04:00"),
    (timedelta(seconds=90), "PT1M30S"), (Decimal("1.50"), "1.50"), (Colour.RED, "red"), (Level.HIGH, 3),
    (koan.JobStatus.FAILED, "failed"), (Word("same"), "same"), ((1, (2, 3)), [1, [2, 3]]), (Pair(1, 2), [1, 2]), ([], []),
    ({3, 1, 2}, [1, 2, 3]), (frozenset({"b", "a"}), ["a", "b"]), ({(2, 1), (1, 2)}, [[1, 2], [2, 1]]), (b"ab", "ab"),
    ({"b": 1, "a": (1,)}, {"a": [1], "b": 1}), (OrderedDict(a=1), {"a": 1}), ({1: "x", Colour.RED: 2}, {"1": "x", "red": 2}),
    (np.int64(7), 7), (np.float64(1.5), 1.5), (np.float32(0.5), 0.5), (PurePosixPath("/a/b"), "/a/b"), (1j, "1j"),
    (Model(), {"name": "n", "at": "2024-01-02"}), (Point(), {"x": 1, "tags": ["a"]}), ("a\x00\x1b[31m", "a\x00\x1b[31m"),
]  # fmt: skip

REFUSED = [
    (math.nan, "is nan"), (math.inf, "is inf"), ([1, {"a": -math.inf}], r"k\.1\.a: is -inf"), (np.float64("nan"), "is nan"),
    ("caf\udce9.txt", "no Unicode"), ({"caf\udce9.txt": 1}, "no Unicode"), (["\ud800"], r"k\.0: is no Unicode"),
    (b"\xff", "cannot be written as JSON"), (object(), "cannot be written as JSON"), (range(3), "cannot be written as JSON"),
    (pydantic.SecretStr("x"), "is a secret"), (Login(), r"k\.password: is a secret"),
    ({1: 1, "1": 2}, "two of its keys are '1'"),
    (LOOPED, "holds itself"), (10**5000, "has 16,610 bits"), (Loud(), "cannot be read"), (np.array([1, 2]), "as JSON"),
    ({"a": [Decimal(1), {object()}]}, r"k\.a\.1"),
]  # fmt: skip


def _type(value):
    return type(value[0]).__name__


@pytest.mark.parametrize("case", TAKEN, ids=_type)
def test_a_value_is_kept_as_plain_json_and_found_by_itself(case):
    value, expected = case
    plain = plain_metadata({"k": value})["k"]
    assert is_same(plain, expected)
    assert type(plain) is type(expected)
    assert plain_metadata({"k": plain}) == {"k": plain}
    assert is_same(json.loads(json.dumps(plain)), plain)
    assert parse_query({"metadata": {"k": value}}).metadata == {"k": plain}


@pytest.mark.parametrize("case", REFUSED, ids=_type)
def test_what_cannot_be_kept_is_refused_alike_and_by_name(case):
    value, told = case
    with pytest.raises(koan.InvalidContextError, match=told) as submitted:
        koan.Jobs.recipe().with_defaults(metadata={"k": value})
    assert submitted.value.what == "metadata"
    assert submitted.value.fields[0].startswith("k")
    with pytest.raises(koan.ConfigurationError, match=r"^metadata: k.*" + told.removeprefix("k")):
        parse_query({"metadata": {"k": value}})


@pytest.mark.parametrize(
    "key", ["", "$k", "a.b", "a\0", 5, None, "\ud800", (1,), Loud()], ids=lambda key: type(key).__name__
)
def test_a_key_that_no_store_can_have_is_refused_alike(key):
    with pytest.raises(koan.InvalidContextError, match="keys are non-empty text"):
        koan.Jobs.recipe().with_defaults(metadata={key: 1})
    with pytest.raises(koan.ConfigurationError, match=r"^metadata: .*keys are non-empty text"):
        parse_query({"metadata": {key: 1}})


def test_a_truth_value_is_no_number_at_any_depth():
    assert is_same(1, 1.0)
    assert is_same({"a": 1, "b": [2]}, {"b": [2.0], "a": 1.0})
    for one, other in ((True, 1), (0, False), ([True], [1]), ({"a": 1.0}, {"a": True}), ("1", 1), (None, False), ([], {})):
        assert not is_same(one, other)
        assert not is_same(other, one)


_SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**80), 2**80), st.floats(allow_nan=False, allow_infinity=False), st.text(),
    st.uuids(), st.decimals(), st.datetimes(), st.timedeltas(), st.binary(max_size=3), st.just(Colour.RED),
)  # fmt: skip
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.tuples(inner), st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(_VALUES)
def test_any_value_is_plain_json_that_stays_as_it_is_or_is_refused(value):
    try:
        plain = plain_metadata({"k": value})
    except MetadataError:
        return
    assert plain_metadata(plain) == plain
    assert is_same(json.loads(json.dumps(plain)), plain)
