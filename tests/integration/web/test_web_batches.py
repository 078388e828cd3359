"""Jobs over items over HTTP: listed by themselves, gone on with, their dead items run again."""

from __future__ import annotations

import threading

import pytest

import koan_ray as koan
from tests.integration.web.conftest import assert_problem, until


class WebBatch(koan.FiniteJob[int, int, int]):
    """Multiples of three are dead while it is told so; fails when the first of them is."""

    retry = koan.RetryPolicy(max_attempts=1)
    items = koan.ItemOptions(checkpoint_every=0.05, chunk_size=2, max_workers=1)
    good, fails, gate = False, False, threading.Event()

    def get_items(self, context):
        return range(context)

    def process_item(self, item, index, progress):
        if item >= 10:
            self.gate.wait(10)
        if item % 3 == 0 and not self.good:
            raise LookupError(f"no {item}")
        return koan.ItemResult.success(item)

    def build_result(self, summary) -> int:
        if type(self).fails:
            raise ValueError("as asked")
        return summary.processed_items


@pytest.fixture
def batches():
    WebBatch.good, WebBatch.fails = False, False
    WebBatch.gate.set()
    yield WebBatch
    WebBatch.gate.set()


def listed(api, **params):
    return [job["id"] for job in api.get("/api/jobs", "viewer", params={"limit": 500, **params}).json()["items"]]


def test_batches_are_listed_by_themselves_before_their_first_item_and_without_their_chunks(api, batches):
    batches.gate.clear()
    plain, running = api.done("WebDelivery", {"to": "a"})["id"], api.submit("WebBatch", 12)
    waiting = api.submit("WebBatch", 3, delay_s=60)
    until(lambda: (api.get(f"/api/jobs/{running}").json()["items"] or {}).get("processed"))
    assert set(listed(api, has_items="true")) >= {running, waiting}
    assert plain not in listed(api, has_items="true")
    assert {running, waiting}.isdisjoint(listed(api, has_items="false"))
    assert plain in listed(api, has_items="false")
    assert listed(api, has_items="true", status="running") == [running]
    chunks = [job for job in api.engine._runtime.core._live.values() if job.terms.part]
    assert chunks
    assert {job.id for job in chunks}.isdisjoint(
        [*listed(api), *listed(api, has_items="true"), *listed(api, has_items="false")]
    )
    assert [api.get(f"/api/jobs/{job_id}").json()["has_items"] for job_id in (plain, running, waiting)] == [
        False,
        True,
        True,
    ]
    assert {job.id for job in koan.Jobs.query(has_items=True, limit=1000).get(10)} == set(listed(api, has_items="true"))
    asked = {"filters": {"has_items": True, "status": ["queued"]}}
    assert api.post("/api/jobs/cancel", asked, "operator").json()["counted"] == 1
    assert_problem(api.get("/api/jobs?has_items=perhaps"), 422)
    with pytest.raises(koan.ConfigurationError, match="has_items: expected True or False, got 'yes'"):
        koan.Jobs.query(has_items="yes").get(10)
    batches.gate.set()
    api.post(f"/api/jobs/{waiting}/cancel")
    api.ended(running)


def test_the_dead_items_of_a_batch_are_run_again_and_it_is_audited(api, batches):
    old = api.done("WebBatch", 7)
    assert (old["status"], old["items"]["failed"], old["result"]) == ("completed", 3, 4)
    batches.good = True
    again = api.post(f"/api/jobs/{old['id']}/retry-failed-items", role="operator")
    assert again.status_code == 201, again.text
    assert again.json()["retry_of"] == old["id"]
    ended = api.ended(again.json()["id"])
    assert (ended["status"], ended["items"], ended["result"]) == (
        "completed", {"total": 3, "processed": 3, "failed": 0, "skipped": 0}, 3,
    )  # fmt: skip
    entry = api.audited()[-1]
    assert (entry["route"], entry["status"], entry["job_id"]) == ("/api/jobs/{job_id}/retry-failed-items", 201, ended["id"])
    problem = assert_problem(api.post(f"/api/jobs/{ended['id']}/retry-failed-items", role="operator"), 409)
    assert "has no failed items, so there are none to run again" in problem["detail"]
    plain = api.done("WebDelivery", {"to": "nowhere"})["id"]
    assert_problem(api.post(f"/api/jobs/{plain}/retry-failed-items", role="operator"), 409)
    batches.gate.clear()
    running = api.submit("WebBatch", 12)
    problem = assert_problem(api.post(f"/api/jobs/{running}/retry-failed-items", role="operator"), 409)
    assert "wait for that, or cancel it" in problem["detail"]
    batches.gate.set()
    api.ended(running)


def test_a_batch_that_failed_goes_on_where_it_stopped(api, batches):
    batches.fails = True
    old = api.done("WebBatch", 7)
    assert (old["status"], old["items"]["processed"]) == ("failed", 4)
    batches.fails, batches.good = False, True
    resumed = api.ended(api.post(f"/api/jobs/{old['id']}/retry", {"resume": True}, "operator").json()["id"])
    assert (resumed["retry_of"], resumed["status"]) == (old["id"], "completed")
    assert resumed["items"] == old["items"]  # nothing was done again, the dead stay dead
    assert api.audited()[-1]["resume"] is True
    anew = api.ended(api.post(f"/api/jobs/{old['id']}/retry", {"resume": False}, "operator").json()["id"])
    assert anew["items"] == {"total": 7, "processed": 7, "failed": 0, "skipped": 0}
    plain = api.done("WebDelivery", {"to": "nowhere"})["id"]
    problem = assert_problem(api.post(f"/api/jobs/{plain}/retry", {"resume": True}, "operator"), 409)
    assert "without resume" in problem["detail"]
    assert_problem(api.post(f"/api/jobs/{plain}/retry", {"resum": True}, "operator"), 422)
