"""The record of requests: appended to, bounded, and needed."""

from __future__ import annotations

import json

import pytest

from koan_ray.errors import StoreUnavailableError
from koan_ray.web.audit import AuditTrail


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_records_are_appended_for_the_owner_alone(tmp_path):
    path = tmp_path / "new" / "audit.jsonl"
    AuditTrail(path).write({"who": "ada", "status": 201})
    AuditTrail(path).write({"who": None, "status": 401})
    assert [record["status"] for record in lines(path)] == [201, 401]
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_a_record_is_one_line_of_plain_characters(tmp_path):
    path = tmp_path / "audit.jsonl"
    AuditTrail(path).write({"who": "a\nb\r\x1b[31m\u202e", "route": "x" * 5000})
    raw = path.read_bytes()
    assert raw.count(b"\n") == 1
    assert all(32 <= byte < 127 for byte in raw.rstrip(b"\n"))
    assert len(raw) < 1000


def test_a_full_file_gives_way_and_four_are_kept(tmp_path):
    path = tmp_path / "audit.jsonl"
    trail = AuditTrail(path, 1000)
    for n in range(200):
        trail.write({"n": n, "text": "x" * 50})
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files if file != path] == [f"audit.jsonl.{place}" for place in range(1, 5)]
    assert all(file.stat().st_size < 1200 for file in files)
    newest = lines(tmp_path / "audit.jsonl.1")
    assert newest[-1]["n"] >= 180
    assert [record["n"] for record in newest] == sorted(record["n"] for record in newest)


def test_a_link_in_its_place_is_not_followed(tmp_path):
    target = tmp_path / "elsewhere"
    target.write_text("")
    (tmp_path / "audit.jsonl").symlink_to(target)
    with pytest.raises(StoreUnavailableError, match="audit record"):
        AuditTrail(tmp_path / "audit.jsonl").check()
    assert target.read_text() == ""


def test_what_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(StoreUnavailableError, match="nothing was changed"):
        AuditTrail(tmp_path).check()
    AuditTrail(None).write({"who": "ada"})  # to the log only
