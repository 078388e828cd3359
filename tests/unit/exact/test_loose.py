"""Values of items: builtin ones come back as they were, in a job and in what they are written to."""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import json
import math
import pathlib
import uuid
from typing import Any

import pytest
from pydantic import BaseModel, SecretStr

import koan_ray as koan
from koan_ray.exact import difference, loose
from koan_ray.values import Values


class Point(BaseModel):
    x: float
    at: Any = None


@dataclasses.dataclass
class Pair:
    a: int
    b: Any


KEPT = [
    1, 2**70, 1.5, math.nan, -math.inf, "text", "koan:float", None, True, (1, (2,)), {1, 2}, b"text",
    {1: "a", "1": "b"},
    {"koan:float": "NaN"}, {"a": [math.nan, (1, 2)]}, dt.datetime(2020, 1, 1, tzinfo=dt.UTC), dt.timedelta(microseconds=1),
    decimal.Decimal("1.50"), uuid.UUID(int=3), "caf\udce9", {"k": SecretStr("x")},
]  # fmt: skip


def no_constant(word):
    raise AssertionError(f"{word} is no JSON")


@pytest.mark.parametrize("value", KEPT, ids=lambda value: ascii(value)[:40])
def test_a_value_of_builtin_types_comes_back_as_it_was(value):
    written = loose.encoded(value)
    json.loads(written, parse_constant=no_constant)
    assert difference([value], loose.decoded(b"[" + written + b"]")) is None


def test_a_model_and_a_dataclass_come_back_as_dicts_that_keep_what_they_hold():
    value = [Point(x=math.inf, at=(1, 2)), Pair(1, Pair(2, pathlib.Path("/x")))]
    (got,) = loose.decoded(b"[" + loose.encoded(value) + b"]")
    assert got == [{"x": math.inf, "at": (1, 2)}, {"a": 1, "b": {"a": 2, "b": "/x"}}]


@pytest.mark.parametrize("value", [b"\xff", [{"a": (b"\xff",)}], {b"\xff": 1}])
def test_bytes_that_are_no_text_are_refused(value):
    with pytest.raises(ValueError, match="bytes that are no UTF-8 text; encode them"):
        loose.encoded(value)


def test_files_have_strict_json(tmp_path):
    rows = [{"loss": math.nan, "shape": (1, 2), "day": dt.date(2020, 1, 1)}, -math.inf, b"\xff", {1: "a"}, "caf\udce9"]
    Values(lambda: iter(rows), len(rows)).write_json_lines(tmp_path / "v")
    lines = [json.loads(line, parse_constant=no_constant) for line in (tmp_path / "v").read_text().splitlines()]
    assert lines == [
        {"loss": "NaN", "shape": [1, 2], "day": "2020-01-01"}, "-Infinity", "/w==", {"1": "a"}, "caf\\xe9",
    ]  # fmt: skip


def test_keys_that_would_become_one_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="has two of one name there"):
        Values(lambda: iter([{1: "a", "1": "b"}]), 1).write_json_lines(tmp_path / "v")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ordered", [False, True])
def test_a_job_over_items_gives_its_values_back_as_they_were(local_engine, ordered):
    class Everything(koan.FiniteJob[None, list[str], Any]):
        kind = "loose.everything"
        items = koan.ItemOptions(ordered=ordered, chunk_size=3)

        def get_items(self, context):
            return range(len(KEPT))

        def process_item(self, item, index, progress):
            return koan.ItemResult.success(KEPT[item])

        def build_result(self, summary) -> list[str]:
            return sorted(ascii(value) for value in summary.values)

    result = Everything.start().run().get(10).wait(20).get()
    assert result == sorted(ascii(value) for value in KEPT if value is not None)


class Tour(koan.FiniteJob[None, int, int]):
    """Goes on behind a cursor that is a tuple."""

    kind = "loose.tour"
    retry = koan.RetryPolicy(max_attempts=2, initial_delay=0)
    items = koan.ItemOptions(checkpoint_every=0.05, chunk_size=1)
    cursors: list[Any] = []

    def get_items(self, context):
        return iter(range(20))

    def resume_from(self, context, cursor):
        Tour.cursors.append(cursor)
        return iter(range(cursor[0] + 1, 20))

    def get_cursor(self, item):
        return (item, b"\xff", math.nan)

    def process_item(self, item, index, progress):
        return koan.ItemResult.success(item)

    def build_result(self, summary) -> int:
        if not Tour.cursors:
            raise RuntimeError("once more")
        return summary.processed_items


def test_a_cursor_comes_back_as_it_was(local_engine):
    assert Tour.start().run().get(10).wait(20).get() == 20
    assert [type(each) for each in Tour.cursors[0]] == [int, bytes, float]
