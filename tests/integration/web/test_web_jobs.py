"""Jobs over HTTP: found, shown, started, cancelled, run anew, deleted."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta

import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

import koan_ray as koan
from koan_ray import web
from koan_ray.telemetry import metrics
from koan_ray.web.schemas import JobDetail
from tests.integration.web.conftest import ABSENT, TOKENS, assert_problem, bearer, until


def test_a_job_is_started_found_and_shown(api):
    job_id = api.submit(
        "WebDelivery", {"to": "berlin", "weight": "2.5"}, name="first", description="a parcel", metadata={"tenant": 7},
        correlation_id="trace-1",
    )  # fmt: skip
    job = api.ended(job_id)
    assert job["status"] == "completed"
    assert (job["name"], job["description"], job["metadata"], job["correlation_id"]) == (
        "first",
        "a parcel",
        {"tenant": 7},
        "trace-1",
    )
    assert job["context"] == {"to": "berlin", "weight": 2.5, "size": "small"}
    assert job["result"] == "BERLIN"
    assert (job["source"], job["partition"], job["archived"]) == ("memory", "", False)
    assert job["progress"] == 1.0
    assert (job["current_step"], job["total_steps"], job["progress_message"]) == (1, 2, "on its way")
    assert datetime.fromisoformat(job["created_at"]) <= datetime.fromisoformat(job["completed_at"])
    assert api.get(f"/api/jobs/{job_id}/result").json() == {"job_id": job_id, "value": "BERLIN"}
    assert api.get(f"/api/jobs/{job_id}/context").json()["value"]["to"] == "berlin"
    found = api.get("/api/jobs", params={"metadata": '{"tenant": 7}', "kind": "WebDelivery", "name": "first"}).json()[
        "items"
    ]
    assert [item["id"] for item in found] == [job_id]
    assert JobDetail.model_validate(job).model_dump(mode="json") == job


def test_a_failure_is_shown_with_its_attempts(api):
    job = api.done("WebDelivery", {"to": "nowhere"})
    assert (job["status"], job["reason"], job["error"]["type"]) == ("failed", "exhausted", "LookupError")
    (attempt,) = api.get(f"/api/jobs/{job['id']}/executions").json()["items"]
    assert attempt["error"]["message"] == "there is no such place"
    assert "raise LookupError" in attempt["error"]["stack_trace"]
    assert attempt["metrics"]["pid"] > 0
    assert (attempt["attempt_number"], attempt["status"]) == (1, "failed")
    assert_problem(api.get(f"/api/jobs/{job['id']}/result"), 409)


def test_payloads_and_what_errors_say_are_hidden_from_viewers(api):
    job = api.done("WebDelivery", {"to": "nowhere"})
    seen = api.get(f"/api/jobs/{job['id']}", "viewer").json()
    assert (seen["context"], seen["result"]) == (None, None)
    assert seen["error"] == {"type": "LookupError", "message": None, "stack_trace": None}
    assert seen["hidden"] == ["context", "result", "error.message", "error.stack_trace"]
    for path in ("", "/executions", "/progress", "/tree", "/children"):
        text = api.get(f"/api/jobs/{job['id']}{path}", "viewer").text
        assert "nowhere" not in text
        assert "no such place" not in text
    assert "no such place" not in api.get("/api/jobs?text=no such place", "viewer").text
    assert "no such place" in api.get(f"/api/jobs/{job['id']}", "reader").text
    # Nor can they find out by asking whether it is there.
    assert api.get("/api/jobs?text=no such place", "viewer").json()["items"] == []
    assert api.get("/api/jobs?text=webdeliv", "viewer").json()["items"] != []
    assert api.get("/api/jobs?text=no such place", "reader").json()["items"] != []
    assert_problem(api.post("/api/jobs/retry", {"filters": {"text": "no such"}}, "operator"), 403)
    assert_problem(api.get("/api/jobs", params={"metadata": '{"api_token": "guess"}'}), 422)


@pytest.mark.parametrize(
    "value", ["0198f0c2-7b7e-7cc2-a1f5-2f1d1e6a9b10", True, 1, 1.5, None, 2**70, [1, [2]], {"b": 1, "a": [True]}, {}]
)
def test_a_job_is_found_by_the_metadata_that_it_was_given(api, value):
    job = api.done("WebDelivery", {"to": "here"}, metadata={"found_by": value})
    api.done("WebDelivery", {"to": "here"}, metadata={"found_by": "another"})
    for metadata in ({"found_by": value}, job["metadata"]):
        found = api.get("/api/jobs", params={"metadata": json.dumps(metadata)}).json()["items"]
        assert [each["id"] for each in found] == [job["id"]]
    counted = api.post("/api/jobs/retry", {"filters": {"metadata": {"found_by": value}}}).json()
    assert counted["counted"] == 0  # it has completed


def test_pages_are_stable_while_jobs_come_in(api):
    first = [api.submit("WebDelivery", {"to": f"p{n}"}, correlation_id="paging") for n in range(25)]
    seen, cursor = [], None
    while True:
        params = {"correlation_id": "paging", "limit": 7, **({"cursor": cursor} if cursor else {})}
        page = api.get("/api/jobs", params=params).json()
        seen += [item["id"] for item in page["items"]]
        api.submit("WebDelivery", {"to": "later"}, correlation_id="paging")
        cursor = page["cursor"]
        if cursor is None:
            break
        assert len(page["items"]) == 7
    assert seen == list(reversed(first))
    oldest = api.get("/api/jobs", params={"correlation_id": "paging", "order_by": "created_at", "limit": 3}).json()["items"]
    assert [item["id"] for item in oldest] == first[:3]


def test_a_cursor_belongs_to_its_order(api):
    for _ in range(3):
        api.submit("WebDelivery", {"to": "a"}, correlation_id="order")
    cursor = api.get("/api/jobs?correlation_id=order&limit=1").json()["cursor"]
    assert_problem(api.get("/api/jobs", params={"correlation_id": "order", "order_by": "created_at", "cursor": cursor}), 422)


def test_filters_combine(api):
    api.done("WebDelivery", {"to": "nowhere"}, correlation_id="both")
    done = api.done("WebDelivery", {"to": "a"}, correlation_id="both")
    path = "/api/jobs?correlation_id=both"
    assert len(api.get(path).json()["items"]) == 2
    assert [item["id"] for item in api.get(f"{path}&status=completed&status=running").json()["items"]] == [done["id"]]
    assert api.get(f"{path}&kind=WebIdle&kind=WebSteps").json()["items"] == []
    after = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    assert api.get(path, params={"correlation_id": "both", "created_after": after}).json()["items"] == []
    assert len(api.get(path, params={"correlation_id": "both", "completed_before": after}).json()["items"]) == 2
    assert api.get(f"{path}&text=NO%20SUCH").json()["items"][0]["status"] == "failed"


def test_what_is_known_is_not_sent_again(api):
    job_id = api.done("WebDelivery", {"to": "a"}, correlation_id="etag")["id"]
    for path in (f"/api/jobs/{job_id}", "/api/jobs?correlation_id=etag", f"/api/jobs/{job_id}/executions", "/api/kinds"):
        first = api.get(path)
        tag = first.headers["etag"]
        assert "no-cache" in first.headers["cache-control"]
        for known in (tag, f'"x", {tag}', tag.removeprefix("W/"), "*"):
            again = api.get(path, headers={"If-None-Match": known})
            assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
        assert api.get(path, headers={"If-None-Match": 'W/"other"'}).status_code == 200
    api.submit("WebDelivery", {"to": "b"}, correlation_id="etag")
    stale = api.get("/api/jobs?correlation_id=etag").headers["etag"]
    assert stale != tag
    # A role that sees less has another tag for the same job.
    assert api.get(f"/api/jobs/{job_id}", "viewer").headers["etag"] != api.get(f"/api/jobs/{job_id}").headers["etag"]


def test_a_job_is_cancelled_and_run_anew(api):
    job_id = api.submit("WebIdle")
    until(lambda: api.get(f"/api/jobs/{job_id}/progress").json()["message"] == "waiting")
    assert api.get(f"/api/jobs/{job_id}").json()["progress"] == 0.1
    assert api.post(f"/api/jobs/{job_id}/cancel", {"reason": "no longer needed"}, "operator").json()["status"] in (
        "running",
        "cancelled",
    )
    job = api.ended(job_id)
    assert (job["status"], job["reason"], job["cancel_requested"]) == ("cancelled", "no longer needed", True)
    assert api.post(f"/api/jobs/{job_id}/cancel").json()["status"] == "cancelled"
    again = api.post(f"/api/jobs/{job_id}/retry", role="operator")
    assert again.status_code == 201
    assert again.json()["retry_of"] == job_id
    api.post(f"/api/jobs/{again.json()['id']}/cancel")
    assert api.ended(again.json()["id"])["reason"] == "cancelled by admin"
    assert_problem(api.post(f"/api/jobs/{api.done('WebDelivery', {'to': 'a'})['id']}/retry"), 409)


def test_only_a_job_that_has_ended_is_deleted(api):
    job_id = api.submit("WebIdle")
    assert_problem(api.call("DELETE", f"/api/jobs/{job_id}"), 409)
    api.post(f"/api/jobs/{job_id}/cancel")
    api.ended(job_id)
    assert api.call("DELETE", f"/api/jobs/{job_id}").status_code == 204
    assert_problem(api.get(f"/api/jobs/{job_id}"), 404)


def test_many_are_cancelled_only_after_their_number_was_confirmed(api):
    ids = [api.submit("WebIdle", correlation_id="bulk") for _ in range(5)]
    other = api.submit("WebIdle")
    ask = {"filters": {"correlation_id": "bulk"}}
    counted = api.post("/api/jobs/cancel", ask, "operator").json()
    assert (counted["counted"], counted["dry_run"], counted["done"]) == (5, True, 0)
    assert_problem(api.post("/api/jobs/cancel", {**ask, "expected": 4}), 409)
    assert all(api.get(f"/api/jobs/{job_id}").json()["status"] != "cancelled" for job_id in ids)
    done = api.post("/api/jobs/cancel", {**ask, "expected": 5, "reason": "enough"}, "operator").json()
    assert (done["done"], done["failed"], done["skipped"], sorted(done["jobs"])) == (5, 0, 0, sorted(ids))
    assert {api.ended(job_id)["reason"] for job_id in ids} == {"enough"}
    assert api.get(f"/api/jobs/{other}").json()["status"] in ("queued", "running")
    again = api.post("/api/jobs/retry", {**ask, "expected": 5}, "operator").json()
    assert again["done"] == 5
    assert {api.get(f"/api/jobs/{job_id}").json()["retry_of"] for job_id in again["jobs"]} == set(ids)
    for job_id in [*again["jobs"], other]:
        api.post(f"/api/jobs/{job_id}/cancel")
        api.ended(job_id)
    assert_problem(api.post("/api/jobs/cancel", {"filters": {"status": ["completed"]}}), 422)
    assert_problem(api.post("/api/jobs/retry", {"filters": {}, "expected": 100_001}), 422)


def test_a_tree_is_shown_from_its_root(api):
    root = api.done("WebParent", 3)
    children = api.get(f"/api/jobs/{root['id']}/children?limit=2").json()
    assert len(children["items"]) == 2
    rest = api.get(f"/api/jobs/{root['id']}/children", params={"cursor": children["cursor"]}).json()
    assert len(rest["items"]) == 1
    tree = api.get(f"/api/jobs/{rest['items'][0]['id']}/tree").json()
    assert (tree["root"]["job"]["id"], tree["n_jobs"], tree["truncated"]) == (root["id"], 4, False)
    assert {node["job"]["parent_job_id"] for node in tree["root"]["children"]} == {root["id"]}


def test_a_batch_shows_its_counts_and_its_dead_items_page_by_page(api):
    import json

    from koan_ray.domain.records import FAILED, Checkpoint, Part

    job_id = api.submit("WebIdle")
    until(lambda: api.get(f"/api/jobs/{job_id}/progress").json()["message"] == "waiting")
    assert_problem(api.get(f"/api/jobs/{job_id}/failed-items"), 404)
    runtime = api.engine._runtime
    rows = [{"index": n, "item": {"to": f"h{n}", "password": "hunter2222"}, "error_type": "ValueError",
             "error_message": f"no hunter2222 at {n}", "attempts": 3, "stack_trace": "trace"} for n in range(7)]  # fmt: skip
    parts = [Part(job_id, FAILED, seq, json.dumps(rows[3 * seq : 3 * seq + 3]).encode(), 3) for seq in range(3)]
    execution_id = runtime.core._live[job_id].execution_id
    checkpoint = Checkpoint(1, b"{}", 100, 50, 2, 7, 0.0, failed_parts=3)
    assert runtime._thread.run(runtime.core.checkpoint(job_id, execution_id, checkpoint, parts))
    assert api.get(f"/api/jobs/{job_id}").json()["items"] == {"total": 100, "processed": 50, "failed": 7, "skipped": 2}
    seen, cursor = [], None
    while True:
        page = api.get(
            f"/api/jobs/{job_id}/failed-items", params={"limit": 2, **({"cursor": cursor} if cursor else {})}
        ).json()
        seen += page["items"]
        if (cursor := page["cursor"]) is None:
            break
    assert [item["index"] for item in seen] == list(range(7))
    assert seen[4]["item"] == {"to": "h4", "password": "[redacted]"}
    assert seen[4]["error"] == {"type": "ValueError", "message": "no [redacted] at 4", "stack_trace": "trace"}
    (hidden, *_) = api.get(f"/api/jobs/{job_id}/failed-items", "viewer").json()["items"]
    assert (hidden["item"], hidden["error"]["message"], hidden["attempts"]) == (None, None, 3)
    assert_problem(api.get(f"/api/jobs/{job_id}/failed-items?cursor=x"), 422)
    api.post(f"/api/jobs/{job_id}/cancel")


def test_kinds_are_told_with_their_schemas(api):
    kinds = {item["kind"]: item for item in api.get("/api/kinds", "viewer").json()["items"]}
    assert kinds["WebDelivery"]["context_schema"]["required"] == ["to"]
    assert kinds["WebDelivery"]["description"] == "Brings a parcel; to nowhere it fails."
    assert (kinds["WebDelivery"]["is_known"], kinds["WebDelivery"]["retry_policy"]["max_attempts"]) == (True, 1)
    assert api.get("/api/kinds/WebDelivery").json() == kinds["WebDelivery"]


def test_the_overview_adds_up(api):
    api.done("WebDelivery", {"to": "nowhere"})
    api.done("WebDelivery", {"to": "a"})
    waiting = api.submit("WebDelivery", {"to": "later"}, delay_s=60)
    time.sleep(2.1)  # it is made anew every two seconds
    seen = api.get("/api/overview", "viewer").json()
    assert seen["counts"]["queued"] == {"n": 1, "more": False}
    assert seen["counts"]["failed"]["n"] >= 1
    assert (seen["waiting"], seen["max_actors"]) == (1, 2)
    assert 0 < seen["oldest_queued_s"] < 60
    five = seen["windows"][0]
    assert (five["name"], five["sampled"]) == ("5m", False)
    assert five["n"] == sum(bucket[name] for bucket in five["buckets"] for name in ("completed", "failed", "cancelled"))
    assert 0 < five["failure_rate"] < 1
    assert five["p50_s"] <= five["p95_s"]
    api.post(f"/api/jobs/{waiting}/cancel")


def test_metrics_are_prometheus(api):
    answer = api.get("/metrics", "viewer")
    assert answer.headers["content-type"].startswith("text/plain")
    for name in (
        "koan_ray_up 1.0",
        "koan_ray_jobs_ended_total",
        "koan_ray_oldest_queued_seconds",
        "koan_ray_http_requests_total",
    ):
        assert name in answer.text
    assert ABSENT not in answer.text
    scraped = {family.name: family for family in text_string_to_metric_families(answer.text)}
    labels = {
        "fenced_writes": {"transition"}, "takeovers": {"reason"}, "executions_lost": {"cause"},
        "outcome_unknown": {"op", "resolution"}, "claims_returned": set(), "poison": None, "progress_dropped": set(),
        "readers_evicted": set(), "auth_denied": {"route"}, "outbox_backlog": set(), "oldest_queued_seconds": set(),
        "unroutable": None, "loop_lag_seconds": set(), "beat_age_seconds": None,
    }  # fmt: skip
    for name, expected in labels.items():
        samples = scraped[f"koan_ray_{name}"].samples
        if expected is not None:  # the others have a series for each kind or source, when there is one
            assert samples, name
            assert {frozenset(each.labels) for each in samples} == {frozenset(expected)}, name
    assert {each.value for each in scraped["koan_ray_fenced_writes"].samples} == {0.0}
    routes = {each.labels["route"] for each in scraped["koan_ray_auth_denied"].samples}
    assert {"/api/jobs/{job_id}/retry-failed-items", "/metrics", "/api/jobs/{job_id}/events"} <= routes


def test_metrics_take_no_durations_from_whoever_exports_those(api):
    job_id = api.done("WebDelivery", {"to": "a"})["id"]
    time.sleep(1.1)  # a reading is fresh for a second
    text = api.get("/metrics", "viewer").text
    assert 'koan_ray_jobs_ended_total{kind="WebDelivery",status="completed"}' in text
    runtime = api.engine._runtime
    left = runtime._thread.run(runtime.core.measure()).samples
    assert left["run_seconds", ("WebDelivery",)], job_id


def test_denials_are_in_the_applications_own_telemetry_too(api):
    api.client.get("/api/jobs/cancel")
    api.client.post("/api/jobs/cancel", json={})
    assert sum(read().counters.get(("auth_denied", ("/api/jobs/cancel",)), 0) for read in list(metrics._reads)) >= 1


def test_sources_and_status_are_told(api):
    assert api.get("/api/sources").json()["items"][0]["name"] == "memory"
    assert api.get("/api/status").json()["limits"]["max_actors"] == 2
    assert api.post("/api/archive/run", {"dry_run": True}).json() == {"dry_run": True, "policies": {"default": {
        "due": 0, "moved": 0, "gone": 0, "changed": 0, "mismatched": 0, "interrupted": 0}}}  # fmt: skip


def test_a_full_queue_is_told_with_when_to_come_back(api, monkeypatch):
    monkeypatch.setattr(api.app.state.koan, "web", api.app.state.koan.web.model_copy(
        update={"limits": api.app.state.koan.web.limits.model_copy(update={"queued": 0})}))  # fmt: skip
    answer = api.post("/api/jobs", {"kind": "WebDelivery", "context": {"to": "a"}})
    assert "[web.limits] queued" in assert_problem(answer, 429)["detail"]
    assert int(answer.headers["retry-after"]) > 0


def test_who_asks_too_often_is_slowed_down(api, monkeypatch):
    from koan_ray.web.security import Rates

    monkeypatch.setattr(api.app.state.koan.guard, "_rates", Rates(1.0, 3))
    answers = [api.get("/api/session", "viewer") for _ in range(5)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
    assert answers[-1].headers["retry-after"] == "1"
    assert_problem(answers[-1], 429)
    assert api.get("/api/session", "reader").status_code == 200
    assert {api.client.get("/healthz").status_code for _ in range(10)} == {200}


def test_guessing_of_tokens_is_slowed_down(api, monkeypatch):
    from koan_ray.web.security import Rates

    monkeypatch.setattr(api.app.state.koan.guard, "_failures", Rates(1.0, 3))
    codes = [api.get("/api/session", f"guess-{n}-0123456789abc").status_code for n in range(5)]
    assert codes == [401, 401, 401, 429, 429]
    assert api.get("/api/session").status_code == 200


def test_an_engine_that_is_away_is_told_as_such(api, monkeypatch):
    def gone(method, args, done):
        done(None, koan.CoordinatorUnavailableError("the coordinator is gone"))

    monkeypatch.setattr(api.engine._runtime, "coordinator", gone)
    answer = api.get("/api/jobs")
    assert_problem(answer, 503)
    assert answer.headers["retry-after"] == "2"
    api.app.state.koan._cached.clear()
    assert_problem(api.client.get("/readyz"), 503)
    assert api.client.get("/healthz").status_code == 200
    assert "koan_ray_up 0.0" in api.get("/metrics").text
    monkeypatch.undo()
    api.app.state.koan._cached.clear()


def test_the_app_works_inside_somebody_elses(api, tmp_path):
    outer = FastAPI()

    @outer.get("/mine")
    async def mine() -> str:
        return "mine"

    settings = koan.Settings(web={"tokens": [{"name": "a", "roles": ["admin"], "token": TOKENS["admin"]}],
                                  "audit_file": str(tmp_path / "audit.jsonl")})  # fmt: skip
    inner = web.create_app(api.engine, settings=settings)
    outer.mount("/koan", inner)
    with TestClient(outer, base_url="http://localhost") as client:
        assert client.get("/mine").json() == "mine"
        assert client.get("/koan/healthz").json() == {"status": "ok"}
        assert client.get("/koan/").text.startswith("<!doctype html>")
        assert client.get("/koan/api/jobs", headers=bearer("admin")).status_code == 200
        assert_problem(client.get("/koan/api/jobs"), 401)
        assert_problem(client.get("/koan/api/nothing", headers=bearer("admin")), 404)
        assert "content-security-policy" not in client.get("/mine").headers
        answer = client.post("/koan/api/session", json={"token": TOKENS["admin"]}, headers={"Origin": "http://localhost"})
        assert "Path=/koan;" in answer.headers["set-cookie"]


def test_an_authentication_of_ones_own_decides(api, tmp_path):
    async def authenticate(caller):
        user = caller.headers.get("x-user")
        return web.Principal.of(user, ["viewer"]) if user else None

    settings = koan.Settings(web={"audit_file": str(tmp_path / "audit.jsonl")})
    app = web.create_app(api.engine, settings=settings, authenticate=authenticate)
    client = TestClient(app, base_url="http://localhost")
    assert client.get("/api/session", headers={"X-User": "ada"}).json()["name"] == "ada"
    assert_problem(client.get("/api/session"), 401)
    assert_problem(client.post("/api/jobs", json={"kind": "WebDelivery"}, headers={"X-User": "ada"}), 403)


def test_an_app_without_tokens_makes_one_and_prints_it_once(api, capsys, tmp_path):
    settings = koan.Settings(web={"audit_file": str(tmp_path / "audit.jsonl")})
    client = TestClient(web.create_app(api.engine, settings=settings), base_url="http://localhost")
    printed = capsys.readouterr().err
    secret = printed.strip().rpartition(" ")[2]
    assert printed.count(secret) == 1
    assert client.get("/api/session", headers={"Authorization": f"Bearer {secret}"}).json()["roles"][0] == "admin"
    assert_problem(client.get("/api/session"), 401)


@pytest.mark.parametrize("section", ["web", "jobs"])
def test_a_module_that_cannot_be_imported_is_named(section):
    with pytest.raises(koan.ConfigurationError, match=rf"\[{section}\] modules: 'no_such_module' cannot be imported"):
        web.create_app(settings=koan.Settings(**{section: {"modules": ["no_such_module"]}}))
