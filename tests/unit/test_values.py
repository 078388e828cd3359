"""Values in columns: whatever does not fit is told, and nothing is left out."""

from __future__ import annotations

import pytest

import koan_ray as koan
from koan_ray.values import Values

parquet = pytest.importorskip("pyarrow.parquet")


def values(*rows):
    return Values(lambda: iter(rows), len(rows))


def test_a_key_that_only_some_values_have_is_a_column_with_holes(tmp_path):
    assert values({"a": 1}, {"a": 2, "b": "x"}).write_parquet(tmp_path / "v") == 2
    assert parquet.read_table(tmp_path / "v").to_pylist() == [{"a": 1, "b": None}, {"a": 2, "b": "x"}]


@pytest.mark.parametrize(
    ("late", "why"),
    [
        ({"a": 1, "b": 2}, "'b' is not among the columns of the first values: a"),
        ({"a": "text"}, "a value does not fit the columns"),
        (7, "7 is no dict"),
        ([], r"\[\] is no dict"),
    ],
)
def test_a_late_value_that_does_not_fit_leaves_no_file(tmp_path, late, why):
    rows = [{"a": n} for n in range(10_000)]
    with pytest.raises(koan.ConfigurationError, match=why):
        values(*rows, late).write_parquet(tmp_path / "v")
    assert list(tmp_path.iterdir()) == []


def test_no_values_are_an_empty_file(tmp_path):
    assert values().write_parquet(tmp_path / "v") == 0
    assert parquet.read_table(tmp_path / "v").num_rows == 0
