"""The API on stored jobs: read from their source and not through the coordinator, hostile documents included."""

from __future__ import annotations

import sys
import uuid
from datetime import UTC, datetime

import pytest
from pymongo import MongoClient

import koan_ray as koan
from tests.integration.web.conftest import CANARY, assert_problem, until

HAS_SOURCES = True


@pytest.fixture(scope="module")
def url(mongo_server):
    url = mongo_server.url(f"w{uuid.uuid4().hex[:12]}")
    yield url
    with MongoClient(url, serverSelectionTimeoutMS=2000) as client:
        client.drop_database(client.get_default_database().name)


@pytest.fixture(scope="module")
def sources(url):
    return {"default": {"url": url}}


@pytest.fixture
def db(url):
    with MongoClient(url, tz_aware=True) as client:
        yield client.get_default_database()


def kept(api, context, **more):
    job_id = api.submit("WebDelivery", context, persist=more.pop("persist", True), audit=True, **more)
    koan.Jobs.get(job_id).get(timeout=10).refresh().get()
    return until(lambda: (job := api.get(f"/api/jobs/{job_id}").json())["completed_at"] and job)


def test_documents_are_read_without_the_coordinator(api, asked):
    job = kept(api, {"to": "nowhere"}, correlation_id="stored", metadata={"tenant": 7})
    asked.clear()
    assert (job["source"], job["partition"], job["audited"], job["status"]) == ("default", "", True, "failed")
    assert job["context"]["to"] == "nowhere"
    assert job["error"]["message"] == "there is no such place"
    for path in ("/api/jobs?source=default&limit=5", "/api/jobs?source=default&status=failed&text=place",
                 f"/api/jobs/{job['id']}",
                 f"/api/jobs/{job['id']}/executions", f"/api/jobs/{job['id']}/context", f"/api/jobs/{job['id']}/progress",
                 '/api/jobs?source=default&metadata={"tenant":7}'):  # fmt: skip
        answer = api.get(path)
        assert answer.status_code == 200, answer.text
        assert job["id"] in answer.text
    assert asked == []
    (attempt,) = api.get(f"/api/jobs/{job['id']}/executions").json()["items"]
    assert "raise LookupError" in attempt["error"]["stack_trace"]


def test_memory_and_documents_are_one_list(api):
    ids = []
    for n in range(12):
        made = (
            api.done("WebDelivery", {"to": f"m{n}"}, correlation_id="mixed")
            if n % 2
            else kept(api, {"to": f"d{n}"}, correlation_id="mixed")
        )
        ids.append(made["id"])
    seen, cursor = [], None
    while True:
        page = api.get(
            "/api/jobs", params={"correlation_id": "mixed", "limit": 5, **({"cursor": cursor} if cursor else {})}
        ).json()
        seen += page["items"]
        if (cursor := page["cursor"]) is None:
            break
    assert [item["id"] for item in seen] == ids[::-1]
    assert {item["source"] for item in seen} == {"memory", "default"}
    counted = api.post("/api/jobs/cancel", {"filters": {"correlation_id": "mixed"}}).json()
    assert counted["counted"] == 0


def test_partitions_and_the_archive_are_addressable(api):
    kept(api, {"to": "a"}, persist={"partition": "hot"}, correlation_id="hot")
    old = kept(api, {"to": "b"}, persist={"partition": "archive"}, correlation_id="hot")
    found = api.get("/api/jobs?correlation_id=hot").json()["items"]
    assert [item["partition"] for item in found] == ["hot"]
    assert len(api.get("/api/jobs?correlation_id=hot&partition=*").json()["items"]) == 2
    assert api.get("/api/jobs?correlation_id=hot&partition=archive").json()["items"][0]["archived"] is True
    assert api.get(f"/api/jobs/{old['id']}").json()["archived"] is True
    (source,) = [item for item in api.get("/api/sources").json()["items"] if item["name"] == "default"]
    assert (source["state"], source["is_readable"]) == ("active", True)
    assert set(source["partitions"]) >= {"", "hot", "archive"}


def test_hostile_documents_are_shown_as_data_and_nothing_is_imported(api, db):
    job = kept(api, {"to": "nowhere"})
    sys.modules.pop("antigravity", None)
    hostile = {
        "kind": "antigravity",
        "error": {"type": "antigravity.Fly", "message": "<img src=x onerror=alert(1)>", "stack_trace": "os.system('x')"},
        "name": "{{7*7}}", "context": {"__class__": "antigravity.Fly", "py/object": "antigravity.Fly", "password": CANARY},
    }  # fmt: skip
    db.jobs.update_one({"_id": job["id"]}, {"$set": hostile})
    seen = api.get(f"/api/jobs/{job['id']}")
    assert seen.headers["content-type"] == "application/json"
    assert seen.json()["error"]["type"] == "antigravity.Fly"
    assert seen.json()["context"]["py/object"] == "antigravity.Fly"
    assert CANARY not in seen.text
    assert "antigravity" in api.get("/api/jobs?kind=antigravity").text
    assert_problem(api.post(f"/api/jobs/{job['id']}/retry"), 409)
    assert "antigravity" not in sys.modules


def test_a_document_that_cannot_be_read_hides_no_other(api, db):
    good = kept(api, {"to": "a"}, correlation_id="broken")
    bad = kept(api, {"to": "b"}, correlation_id="broken")
    db.jobs.update_one({"_id": bad["id"]}, {"$set": {"rev": "seven"}})
    assert [item["id"] for item in api.get("/api/jobs?correlation_id=broken").json()["items"]] == [good["id"]]
    problem = assert_problem(api.get(f"/api/jobs/{bad['id']}"), 500)
    assert "rev" in problem["detail"]
    db.jobs.delete_one({"_id": bad["id"]})


def test_a_stored_credential_is_in_no_answer(api, db, url):
    job = kept(api, {"to": "a"})
    address = url.replace("mongodb://", f"mongodb://ada:{CANARY}@")
    db.jobs.update_one({"_id": job["id"]}, {"$set": {"error": {"type": "E", "message": f"cannot reach {address}"}}})
    for path in (f"/api/jobs/{job['id']}", "/api/jobs", "/api/sources", "/api/status", "/api/overview", "/metrics"):
        assert CANARY not in api.get(path).text
    assert "mongodb://***@" in api.get(f"/api/jobs/{job['id']}").text


def test_the_overview_counts_documents_and_not_more_than_it_may(api, db, monkeypatch):
    from koan_ray.web import overview

    monkeypatch.setattr(overview, "_COUNT_LIMIT", 3)
    api.app.state.koan._cached.clear()
    for n in range(4):
        kept(api, {"to": f"o{n}"})
    counts = api.get("/api/overview").json()["counts"]
    in_memory = len(api.get("/api/jobs?source=memory&status=completed").json()["items"])
    assert counts["completed"] == {"n": 3 + in_memory, "more": True}
    api.app.state.koan._cached.clear()


def test_times_are_compared_as_instants(api):
    job = kept(api, {"to": "a"}, correlation_id="times")
    created = datetime.fromisoformat(job["created_at"])
    for zone in (created, created.astimezone(UTC)):
        path = f"/api/jobs?correlation_id=times&source=default&created_after={zone.isoformat().replace('+', '%2B')}"
        assert len(api.get(path).json()["items"]) == 1
