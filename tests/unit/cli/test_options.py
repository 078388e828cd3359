"""What the options of ``koan-ray jobs`` mean."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from koan_ray.cli.options import complete_status, parse, parse_instant, parse_metadata, read_context
from koan_ray.cli.present import ago, span
from koan_ray.errors import ConfigurationError


def test_options_become_filters_of_a_query():
    given = {"kind": ["A", "B"], "status": ["failed,cancelled", "queued"], "parent": "x", "correlation": None, "text": "no"}
    assert parse(given) == {
        "kind": ["A", "B"],
        "status": ["failed", "cancelled", "queued"],
        "parent_job_id": "x",
        "text": "no",
    }
    assert parse({"kind": None, "metadata": [], "items": None}) == {}
    assert [parse({"items": wants}) for wants in (True, False)] == [{"has_items": True}, {"has_items": False}]


def test_values_of_metadata_are_json_or_text():
    assert parse_metadata(["n=7", "t=007", "s=acme", 's2="7"', "b=true", "eq=a=b", "empty=", "o={}"]) == {
        "n": 7, "t": "007", "s": "acme", "s2": "7", "b": True, "eq": "a=b", "empty": "", "o": {},
    }  # fmt: skip
    for wrong in ("tenant", "=7"):
        with pytest.raises(ConfigurationError, match="expected KEY=VALUE"):
            parse_metadata([wrong])


@pytest.mark.parametrize(("age", "hours"), [("2h", 2), ("90m", 1.5), ("7d", 168), ("3600s", 1), ("2h ago", 2)])
def test_an_age_counts_back_from_now(age, hours):
    expected = datetime.now(UTC) - timedelta(hours=hours)
    assert abs(parse_instant(age, "--created-after") - expected) < timedelta(seconds=5)


def test_an_instant_without_a_zone_is_local_time():
    assert parse_instant("2026-01-31T09:00:00+02:00", "x") == datetime(2026, 1, 31, 7, tzinfo=UTC)
    assert parse_instant("2026-01-31T09:00", "x") == datetime(2026, 1, 31, 9).astimezone()
    assert parse_instant("2026-01-31", "x").tzinfo is not None


@pytest.mark.parametrize("wrong", ["yesterday", "2 weeks", "", "-2h", "99999999999d", "2026-13-01"])
def test_what_is_no_instant_is_refused_by_the_name_of_its_option(wrong):
    with pytest.raises(ConfigurationError, match="--created-after: expected ISO 8601"):
        parse({"created_after": wrong}) if wrong else parse_instant(wrong, "--created-after")


def test_a_context_is_json_or_a_file(tmp_path):
    (tmp_path / "c.json").write_text('{"a": 1}')
    assert read_context('{"a": 1}') == b'{"a": 1}'
    assert read_context(f"@{tmp_path}/c.json") == b'{"a": 1}'
    with pytest.raises(ConfigurationError, match=r"no\.json' cannot be read: No such file"):
        read_context(f"@{tmp_path}/no.json")


def test_statuses_are_completed():
    assert complete_status("c") == ["created", "completed", "cancelled"]
    assert complete_status("RUN") == ["running"]
    assert complete_status("x") == []


def test_durations_are_short():
    spans = {0.0123: "12ms", 3.42: "3.4s", 9.99: "10s", 59: "59s", 312: "5m12s", 7500: "2h05m", 90000: "1d"}
    assert {value: span(value) for value in spans} == spans
    assert span(None) == ago(None) == ""
