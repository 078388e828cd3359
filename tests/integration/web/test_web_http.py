"""What HTTP clients of all kinds rely on: HEAD, methods, packing, flags and bodies that may be left out."""

from __future__ import annotations

import pytest

from tests.integration.web.conftest import ABSENT, Parcel, WebDelivery

READ = ["/healthz", "/readyz", "/", "/app.js", "/api/jobs", "/api/kinds", "/metrics", "/openapi.json", "/api/events"]


@pytest.mark.parametrize("path", READ)
def test_head_answers_as_get_without_a_body(api, path):
    answer = api.call("HEAD", path)
    assert (answer.status_code, answer.content) == (200, b"")
    if path != "/api/events":  # its body has no end
        assert answer.headers["content-type"] == api.get(path).headers["content-type"]


def test_head_is_let_in_as_get_is(api):
    assert api.call("HEAD", "/api/jobs", None).status_code == 401
    assert api.call("HEAD", f"/api/jobs/{ABSENT}").status_code == 404


@pytest.mark.parametrize("name", ["cancel", "retry"])
def test_a_route_beside_the_ids_is_no_id(api, name):
    answer = api.get(f"/api/jobs/{name}")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


def test_what_is_no_id_is_said_to_be_none(api):
    answer = api.get("/api/jobs/ABC")
    assert (answer.status_code, answer.json()["type"]) == (404, "urn:koan-ray:problem:job-not-found")
    assert "'ABC'" in answer.json()["detail"]


def test_long_answers_are_packed_for_who_unpacks(api):
    packed = api.get("/openapi.json", headers={"Accept-Encoding": "gzip"})
    plain = api.get("/openapi.json", headers={"Accept-Encoding": "identity"})
    assert packed.headers["content-encoding"] == "gzip"
    assert "content-encoding" not in plain.headers
    assert packed.json() == plain.json()


@pytest.mark.parametrize("value", ["0", "1", "yes", "on", "True", "", "2", "null"])
def test_a_flag_is_true_or_false_and_nothing_else(api, value):
    assert api.get(f"/api/jobs?has_items={value}").status_code == 422


@pytest.mark.parametrize("value", ["true", "false"])
def test_a_flag_may_be_said(api, value):
    assert api.get(f"/api/jobs?has_items={value}").status_code == 200


@pytest.mark.parametrize("field", ["audit", "persist"])
@pytest.mark.parametrize("value", [0, 1, "true", "yes"])
def test_a_flag_of_a_body_is_a_boolean(api, field, value):
    context = Parcel(to="x").model_dump()
    answer = api.post("/api/jobs", {"kind": WebDelivery.kind, "context": context, field: value})
    assert answer.status_code == 422


def test_no_body_that_may_be_left_out_is_described_as_null(api):
    for path, item in api.get("/openapi.json").json()["paths"].items():
        for method, operation in item.items():
            body = operation.get("requestBody")
            if body is not None:
                schema = body["content"]["application/json"]["schema"]
                assert "$ref" in schema or "allOf" in schema, (method, path, schema)
