"""Every kind of bad request gets the right 4xx, a document that says what to do, and does not reach the engine."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from datetime import timedelta

import pytest

from koan_ray.domain.query import parse_query
from koan_ray.stores import mongo_filters
from tests.integration.web.conftest import ABSENT, Parcel, assert_problem

SUBMIT = {"kind": "WebDelivery", "context": {"to": "a"}}
JSON = {"Content-Type": "application/json"}
DEEP = "[" * 40 + "]" * 40


def with_body(api, body, path="/api/jobs", headers=JSON):
    return api.call("POST", path, content=body, headers=headers)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 422), (b"{", 400), (b"nonsense", 400), (b"\xff\xfe{}", 400), (b'{"kind": NaN}', 400),
        (b'{"a": Infinity}', 400),
        (b'{"kind": "\\ud800"}', 400), (b"[]", 422), (b"7", 422), (b"null", 422), (b'"text"', 422),
        (('{"kind": "WebDelivery", "context": ' + DEEP + "}").encode(), 422),
        (b'{"kind": ' + b"9" * 5000 + b"}", 400),
        (b"{}", 422), (b'{"kind": ""}', 422), (b'{"kind": 3}', 422), (b'{"kind": "a\\u0000b"}', 422),
    ],
)  # fmt: skip
def test_a_body_that_is_no_submission_is_refused(api, asked, body, status):
    assert_problem(with_body(api, body), status)
    assert asked == []


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"kind": "Unknown"}, "body.kind"), ({"kind": "os.system"}, "body.kind"), ({"surplus": 1}, "body.surplus"),
        ({"context": {"to": 7}}, "body.context.to"), ({"context": {}}, "body.context.to"),
        ({"context": None}, "body.context"),
        ({"context": {"to": "a", "weight": -1}}, "body.context.weight"), ({"context": "a"}, "body.context"),
        ({"context": {"to": "a", "size": "huge"}}, "body.context.size"), ({"audit": "maybe"}, "body.audit"),
        ({"persist": {"source": "a/b"}}, "body.persist.Persist.source"),
        ({"persist": {"partition": "../x"}}, "body.persist.Persist.partition"),
        ({"name": "n" * 501}, "body.name"), ({"delay_s": -1}, "body.delay_s"), ({"delay_s": 1e300}, "body.delay_s"),
        ({"metadata": {"$where": 1}}, "body.metadata"), ({"metadata": {"a.b": 1}}, "body.metadata"),
        ({"metadata": []}, "body.metadata"),
        ({"metadata": {"a\0b": 1}}, "body.metadata"), ({"metadata": {"": 1}}, "body.metadata"),
        ({"correlation_id": 5}, "body.correlation_id"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_submission_is_said_by_field(api, asked, change, field):
    problem = assert_problem(api.post("/api/jobs", {**SUBMIT, **change}), 422)
    assert any(error["field"].startswith(field) for error in problem["errors"]), problem
    assert asked == []


def test_a_source_that_does_not_exist_is_named(api):
    problem = assert_problem(api.post("/api/jobs", {**SUBMIT, "persist": {"source": "nowhere"}}), 422)
    assert "'nowhere'" in problem["detail"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"}, {"Content-Type": ""}, {},
        {"Content-Type": "application/xml"}, {**JSON, "Content-Encoding": "gzip"},
        {"Content-Type": "multipart/form-data; boundary=x"},
        {"Content-Type": "application/x-python-pickle"},
    ],
)  # fmt: skip
def test_only_plain_json_is_taken(api, asked, headers):
    assert_problem(with_body(api, json.dumps(SUBMIT).encode(), headers=headers), 415)
    assert asked == []


def test_a_body_above_the_limit_is_not_read(api, asked):
    read = []

    def chunks():
        for _ in range(100):
            read.append(65536)
            yield b" " * 65536

    answer = api.call("POST", "/api/jobs", content=b" " * 1_048_577, headers=JSON)
    assert assert_problem(answer, 413)["type"].endswith("body-too-large")
    assert answer.headers["connection"] == "close"
    assert asked == []


async def test_a_body_that_grows_beyond_the_limit_is_cut_off_there(api, asked):
    from koan_ray.web.security import Role

    taken = []

    async def receive():
        taken.append(65536)
        return {"type": "http.request", "body": b" " * 65536, "more_body": True}

    sent = []

    async def send(message):
        sent.append(message)

    headers = [
        (b"host", b"localhost"),
        (b"authorization", b"Bearer admin-token-0123456789"),
        (b"content-type", b"application/json"),
    ]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/api/jobs",
        "raw_path": b"/api/jobs", "query_string": b"", "root_path": "", "headers": headers, "client": None,
        "server": None, "state": {},
    }  # fmt: skip
    await api.app(scope, receive, send)
    assert sent[0]["status"] == 413
    assert len(taken) == 17  # the first one above 1 MiB
    assert asked == []
    assert Role.SUBMITTER  # the caller may submit; the size alone is what is wrong


async def test_a_body_that_does_not_come_is_not_waited_for(api, asked, monkeypatch):
    brief = api.app.state.koan.web.limits.model_copy(update={"body_timeout": timedelta(seconds=0.05)})
    monkeypatch.setattr(api.app.state.koan.guard, "_limits", brief)
    sent = []

    async def receive():
        await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"authorization", b"Bearer admin-token-0123456789")]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/api/jobs", "raw_path": b"/api/jobs", "query_string": b"", "root_path": "", "headers": headers,
        "client": None, "server": None, "state": {},
    }  # fmt: skip
    await api.app(scope, receive, send)
    assert sent[0]["status"] == 408
    assert asked == []


async def test_nobody_has_their_body_read(api):
    async def receive():
        pytest.fail("the body of a request without a credential was read")

    sent = []

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/api/jobs",
        "raw_path": b"/api/jobs", "query_string": b"", "root_path": "", "headers": [(b"host", b"localhost")], "client": None,
        "server": None, "state": {},
    }  # fmt: skip
    await api.app(scope, receive, send)
    assert sent[0]["status"] == 401


@pytest.mark.parametrize("length", ["-1", "x", "1e9", "٣"])
def test_a_length_that_is_no_number_is_refused(api, asked, length):
    assert (
        api.call("POST", "/api/jobs", content=b"{}", headers={**JSON, "Content-Length": length.encode()}).status_code == 400
    )
    assert asked == []


@pytest.mark.parametrize(
    "query",
    [
        "limit=0", "limit=501", "limit=-1", "limit=x", "limit=1e2", "limit=99999999999999999999", "order_by=name",
        "order_by=",
        "status=lost", "status=", "cursor=x", "cursor=%00", "cursor=bm9wZQ", "created_after=yesterday",
        "created_after=2026-01-01",
        "created_before=2026-01-01T00:00:00", "unknown=1", "Limit=1", "$where=1", "source=nowhere", "source=..%2f",
        "partition=A%20b",
        "partition=" + "x" * 65, "parent_job_id=x", "text=", "text=" + "x" * 201, "metadata=x", "metadata=[]", "metadata=7",
        "metadata={", "kind=", "kind=%00", "name=" + "x" * 501, "metadata={%22a%22:NaN}",
    ],
)  # fmt: skip
def test_a_filter_that_cannot_be_used_is_named(api, asked, query):
    problem = assert_problem(api.get(f"/api/jobs?{query}"), 422)
    assert query.partition("=")[0].strip() in problem["detail"]
    assert asked == []


@pytest.mark.parametrize(
    "metadata",
    [
        {"$where": "sleep(1000)"}, {"$expr": {}}, {"a": {"$ne": 1}}, {"a": {"$regex": ".*"}}, {"a": {"$gt": ""}},
        {"a": [[{"b": {"$ne": 1}}]]}, {"a": {"b.c": 1}}, {"a": {"password": "x"}}, {"a": [{"api_key": 1}]}, {"a": 2**5000},
        {"a": {"$function": {"body": "f", "args": [], "lang": "js"}}}, {"$or": [{}]}, {"a.b": 1}, {"a\0": 1}, {"": 1},
        {"a": [{"$ne": 1}]}, {"__proto__": {"$ne": 1}}, {f"k{n}": n for n in range(17)},
    ],
)  # fmt: skip
def test_metadata_that_could_be_an_operator_are_refused(api, asked, metadata):
    text = json.dumps(metadata)
    assert_problem(api.get("/api/jobs", params={"metadata": text}), 422)
    for what in ("cancel", "retry"):
        assert_problem(api.post(f"/api/jobs/{what}", {"filters": {"metadata": metadata}}), 422)
    assert asked == []


OPERATORS = [
    '{"$ne": null}',
    "[$ne]",
    '{"$where": "1"}',
    "$where",
    "{$gt: ''}",
    "'; return true; //",
    ".*",
    "a|b",
    "(",
    "[",
    "\\",
    "$",
]


@pytest.mark.parametrize("value", OPERATORS)
@pytest.mark.parametrize("name", ["name", "correlation_id", "text", "kind"])
def test_what_looks_like_an_operator_is_text(api, value, name):
    answer = api.get("/api/jobs", params={name: value})
    assert answer.status_code == 200
    assert answer.json()["items"] == []
    compiled = json.dumps(mongo_filters.filter_of(parse_query({name: value})), default=str)
    allowed = {"$eq", "$in", "$regex", "$options", "$or"}
    found = json.loads(compiled)
    assert operators_in(found) <= allowed
    if name == "text":
        assert {part[field]["$regex"] for part in found["$or"] for field in part} == {re.escape(value)}


def operators_in(value):
    """Every key that a database would take for an operator."""
    if isinstance(value, dict):
        return {name for name in value if name.startswith("$")}.union(*map(operators_in, value.values()), set())
    return set().union(*map(operators_in, value)) if isinstance(value, list) else set()


@pytest.mark.parametrize("name", ["name[$ne]", "status[$ne]", "metadata[tenant]", "filter", "$or"])
def test_parameters_with_brackets_are_no_parameters(api, asked, name):
    assert_problem(api.get("/api/jobs", params={name: "x"}), 422)
    assert asked == []


@pytest.mark.parametrize(
    "job_id",
    [
        "x", "%2e%2e%2e", "..%2f..%2fetc%2fpasswd", "..%5c..", "%00", ABSENT + "x", ABSENT[:-1], ABSENT.upper(), "x" * 5000,
        "{" + ABSENT + "}", ABSENT.replace("-", ""), "urn:uuid:" + ABSENT, ABSENT + "%0a", "null", "0", "-1", "%f0%9f%92%a9",
        "<script>alert(1)</script>",
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("POST", "/retry"), ("POST", "/restore"), ("GET", "/executions"),
     ("POST", "/retry-failed-items"),
     ("GET", "/tree"), ("GET", "/events"), ("GET", "/context"), ("GET", "/children"), ("GET", "/progress"),
     ("GET", "/result")],
)  # fmt: skip
def test_an_id_that_is_none_is_refused(api, asked, job_id, method, path):
    answer = api.call(method, f"/api/jobs/{job_id}{path}")
    assert answer.status_code in (404, 405, 422), answer.text
    assert_problem(answer, answer.status_code)
    assert asked == []


@pytest.mark.parametrize("path", ["/../etc/passwd.txt", "/%2e%2e/%2e%2e/etc/passwd.txt", "/..%2f..%2fapp.py",
                                  "/static/../../app.py", "/%00",
                                  "/a/%2e%2e/%2e%2e/security.py", "/.hidden", "/api", "/api/", "/apix.js",
                                  "//etc/passwd.txt"])  # fmt: skip
def test_no_file_but_the_dashboards_is_served(api, path):
    answer = api.client.get(path)
    assert answer.status_code == 404, (answer.status_code, answer.text[:100])
    assert_problem(answer, 404)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("PUT", "/api/jobs", "GET, POST"), ("POST", "/healthz", "GET"), ("PATCH", f"/api/jobs/{ABSENT}", "DELETE, GET"),
     ("GET", "/api/archive/run", "POST"), ("DELETE", "/api/jobs", "GET, POST"), ("TRACE", "/api/jobs", "GET, POST")],
)  # fmt: skip
def test_a_method_that_a_route_does_not_take_is_405(api, method, path, allowed):
    answer = api.call(method, path)
    assert_problem(answer, 405)
    assert answer.headers["allow"] == allowed


def test_a_route_without_a_body_takes_none(api, asked):
    assert_problem(api.call("DELETE", f"/api/jobs/{ABSENT}", json={"force": True}), 422)
    assert asked == []


@pytest.mark.parametrize("header", ["x", "-1", "1.5", "9" * 17, "1; 2"])
def test_a_last_event_id_that_is_no_number_is_refused(api, asked, header):
    assert_problem(api.get(f"/api/jobs/{ABSENT}/events", headers={"Last-Event-ID": header}), 422)
    assert asked == []


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_what_is_not_there_is_404(api, method):
    for path in {
        "GET": ["", "/executions", "/tree", "/events", "/failed-items"],
        "POST": ["/cancel", "/retry", "/retry-failed-items", "/restore"],
        "DELETE": [""],
    }[method]:
        assert_problem(api.call(method, f"/api/jobs/{ABSENT}{path}"), 404)
    assert_problem(api.get("/api/kinds/NoSuchKind"), 404)
    assert_problem(api.get("/api/nothing"), 404)


def test_stored_names_are_never_imported(api):
    """A kind is looked up among what is defined; nothing is imported for the sake of a name."""
    sys.modules.pop("antigravity", None)
    for name in ("antigravity", "antigravity.fly", "os:system", "koan_ray.testing"):
        assert_problem(api.post("/api/jobs", {"kind": name}), 422)
        assert_problem(api.get(f"/api/kinds/{name}"), 404)
    assert "antigravity" not in sys.modules
    assert Parcel(to="a").to == "a"


@pytest.mark.parametrize(
    "text", ["\x1b[31mred", "a\r\nSet-Cookie: x=1", "\u202egnp.exe", "<img src=x onerror=alert(1)>", "[bold]x[/bold]"]
)
def test_texts_are_told_without_what_a_terminal_would_obey(api, text, caplog):
    with caplog.at_level("INFO", logger="koan_ray"):
        job = api.done("WebDelivery", {"to": "a"}, name=text, metadata={"note": text})
        api.call("DELETE", "/api/jobs/" + job["id"], headers={"Origin": "http://" + "evil.example"})
        api.get("/api/kinds/" + "x")
    raw = api.get(f"/api/jobs/{job['id']}").text
    for character in ("\x1b", "\u202e", "\\u001b", "\\u202e"):
        assert character not in json.loads(raw)["name"]
        assert character not in caplog.text
    lines = caplog.text.replace("\t", " ").splitlines()  # Ray, where it was started before, puts tabs between its fields
    assert all(line.isprintable() for line in lines)
    assert "\x1b" not in api.audit_file.read_text()
