"""What items have produced survives its way into parts and back, whatever its size and order."""

from __future__ import annotations

import json
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from koan_ray.domain.items import DeadItem
from koan_ray.domain.records import MAX_PART, ErrorInfo
from koan_ray.engine import produce

entries = st.lists(st.lists(st.integers() | st.text(max_size=20) | st.none(), min_size=1, max_size=20), max_size=20)


@given(entries)
@settings(max_examples=100, deadline=None)
def test_arrays_keep_all_entries_in_order(pieces):
    given_pieces = [(json.dumps(piece)[1:-1].encode(), len(piece)) for piece in pieces]
    arrays = produce.in_arrays(given_pieces)
    assert [entry for body, _ in arrays for entry in json.loads(body)] == [entry for piece in pieces for entry in piece]
    assert all(len(json.loads(body)) == n for body, n in arrays)
    assert len(arrays) <= 1


def test_arrays_fit_into_parts():
    pieces = [(json.dumps(["x" * size] * n)[1:-1].encode(), n) for size, n in ((300_000, 2), (900_000, 1), (9, 200_000))]
    arrays = produce.in_arrays(pieces)
    assert len(arrays) > 3
    assert all(len(body) <= MAX_PART for body, _ in arrays)
    assert sum(n for _, n in arrays) == 200_003
    assert [len(entry) for body, _ in arrays for entry in json.loads(body)] == [300_000] * 2 + [900_000] + [9] * 200_000


@given(st.integers(1, 400), st.integers(1, 30), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_values_are_put_in_order(n, size, seed):
    dice = random.Random(seed)
    indexes = list(range(n))
    late = {index for index in indexes if dice.random() < 0.1}  # they needed a second attempt
    chunks = [[i for i in indexes[start : start + size] if i not in late] for start in range(0, n, size)]
    chunks += [[i] for i in late]
    dice.shuffle(chunks)
    arrays = [[[index, f"v{index}"] for index in chunk] for chunk in chunks if chunk]
    assert list(produce.in_order(arrays)) == [f"v{index}" for index in indexes]


def test_nothing_is_in_order_as_well():
    assert list(produce.in_order([])) == []


def test_dead_items_become_rows_that_json_can_hold():
    odd = ErrorInfo("OSError", "no such file: \udce9", "trace \udce9")
    dead = [DeadItem(place, b'{"a":1}', odd, 2) for place in range(3)]
    ((body, n),) = produce.dead_as_array(dead, lambda place: place + 10)
    rows = json.loads(body)
    assert n == 3
    assert [row["index"] for row in rows] == [10, 11, 12]
    assert rows[0] == {
        "index": 10, "item": {"a": 1}, "error_type": "OSError", "error_message": "no such file: ?",
        "stack_trace": "trace ?", "attempts": 2,
    }  # fmt: skip


def test_a_spool_gives_back_what_it_was_given():
    spool = produce.Spool()
    bodies = [json.dumps([n] * 1000).encode() for n in range(6000)]  # more than is kept in memory
    for body in bodies:
        spool.add(body)
    assert len(spool) == 6000
    assert all(spool.read(place) == [place] * 1000 for place in (0, 5999, 17, 3000))
    spool.close()
