"""Requests that somebody else's page makes: forged, rebound, hijacked. None of them reaches the engine."""

from __future__ import annotations

import pytest
from starlette.testclient import WebSocketDenialResponse

from koan_ray.web.security import COOKIE, Role
from tests.integration.web.conftest import ABSENT, TOKENS, assert_problem, bearer, subprotocols
from tests.integration.web.test_web_roles import REST, SOCKETS, filled

UNSAFE = [(method, path) for method, path, _ in REST if method != "GET"]
FOREIGN = ["http://evil.example", "https://localhost", "http://localhost:81", "http://localhost.evil.example", "null", "x"]
OWN = {"Origin": "http://localhost"}


@pytest.fixture
def dashboard(api):
    """Log in as a dashboard does: the cookie in a header, and what goes with it."""
    answer = api.client.post("/api/session", json={"token": TOKENS["admin"]}, headers=OWN)
    assert answer.status_code == 200, answer.text
    cookie = answer.cookies[COOKIE]
    api.client.cookies.clear()
    return {"Cookie": f"{COOKIE}={cookie}", **OWN, "X-Koan-CSRF": answer.json()["csrf"]}


@pytest.mark.parametrize("origin", FOREIGN)
@pytest.mark.parametrize(("method", "path"), UNSAFE)
def test_another_sites_page_changes_nothing(api, asked, method, path, origin):
    body = {"token": TOKENS["admin"]} if path == "/api/session" else None
    answer = api.call(method, filled(path), headers={"Origin": origin}, json=body)
    assert assert_problem(answer, 403)["type"].endswith("foreign-origin")
    assert asked == []


@pytest.mark.parametrize("site", ["cross-site", "same-site", "anything"])
@pytest.mark.parametrize(("method", "path"), UNSAFE)
def test_what_the_browser_says_of_the_site_is_heeded(api, asked, method, path, site):
    assert_problem(api.call(method, filled(path), headers={"Sec-Fetch-Site": site}), 403)
    assert asked == []


@pytest.mark.parametrize("lacking", ["X-Koan-CSRF", "Origin", "both wrong"])
@pytest.mark.parametrize(("method", "path"), [pair for pair in UNSAFE if pair != ("POST", "/api/session")])
def test_a_cookie_alone_changes_nothing(api, asked, dashboard, method, path, lacking):
    headers = {name: value for name, value in dashboard.items() if name != lacking}
    if lacking == "both wrong":
        headers["X-Koan-CSRF"] = "x" * 43
    assert_problem(api.call(method, filled(path), role=None, headers=headers), 403)
    assert asked == []


def test_a_dashboard_reads_and_writes_with_its_cookie(api, dashboard):
    assert api.get("/api/session", None, headers=dashboard).json()["csrf"] == dashboard["X-Koan-CSRF"]
    submitted = api.post("/api/jobs", {"kind": "WebDelivery", "context": {"to": "a"}}, None, headers=dashboard)
    assert submitted.status_code == 201
    assert api.get("/api/jobs", None, headers={"Cookie": dashboard["Cookie"]}).status_code == 200
    out = api.call("DELETE", "/api/session", None, headers=dashboard)
    assert out.status_code == 204
    assert f'{COOKIE}=""' in out.headers["set-cookie"]


def test_the_cookie_is_for_this_site_and_not_for_scripts(api):
    given = api.client.post("/api/session", json={"token": TOKENS["viewer"]}).headers["set-cookie"].lower()
    api.client.cookies.clear()
    assert "httponly" in given
    assert "samesite=strict" in given
    assert "secure" not in given  # plain http on loopback
    over_tls = api.client.post("https://localhost/api/session", json={"token": TOKENS["viewer"]})
    api.client.cookies.clear()
    assert "secure" in over_tls.headers["set-cookie"].lower()
    assert "strict-transport-security" in over_tls.headers


@pytest.mark.parametrize(
    "value", ["", "x", "x.y", "YWRtaW58OTk5OTk5OTk5OXx4.bm8", "YWRtaW4.x", "%00", "é", "a" * 5000]
)  # fmt: skip
def test_a_cookie_that_we_did_not_make_is_nobodys(api, value):
    assert_problem(api.client.get("/api/jobs", headers={"Cookie": f"{COOKIE}={value}".encode()}), 401)


def test_a_cookie_cannot_be_made_to_last_longer_or_to_be_anothers(api, dashboard):
    import base64

    value = dashboard["Cookie"].partition("=")[2]
    encoded, _, signature = value.partition(".")
    text = base64.urlsafe_b64decode(encoded + "==").decode()
    for forged in (text.replace("admin", "viewer"), text.replace("|1", "|9", 1), text + "x"):
        changed = base64.urlsafe_b64encode(forged.encode()).decode().rstrip("=")
        assert_problem(api.get("/api/jobs", None, headers={"Cookie": f"{COOKIE}={changed}.{signature}"}), 401)


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example", "evil.example:80", "", "localhost@evil.example", "127.0.0.2", "[::2]", "a b"],
)
@pytest.mark.parametrize(
    ("method", "path"), [(m, p) for m, p, _ in REST if p not in ("/healthz", "/readyz")] + [("GET", "/")]
)
def test_a_name_that_is_not_ours_is_answered_with_nothing(api, asked, method, path, host):
    answer = api.call(method, filled(path), headers={"Host": host})
    assert assert_problem(answer, 421)["type"].endswith("wrong-host")
    assert asked == []


def test_probes_answer_under_any_name(api):
    assert api.client.get("/healthz", headers={"Host": "10.0.0.7:8267"}).json() == {"status": "ok"}
    assert api.client.get("/readyz", headers={"Host": "10.0.0.7:8267"}).json() == {"status": "ready"}


@pytest.mark.parametrize("host", ["localhost", "localhost:8267", "127.0.0.1:1", "[::1]:8267", "LOCALHOST"])
def test_our_own_names_are_answered_whatever_the_port(api, host):
    assert api.get("/api/session", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("origin", FOREIGN)
@pytest.mark.parametrize(("path", "role"), SOCKETS)
def test_another_sites_page_opens_no_websocket(api, path, role, origin):
    assert role is Role.VIEWER
    with (
        pytest.raises(WebSocketDenialResponse) as denied,
        api.socket(path.replace("{job_id}", ABSENT), subprotocols=subprotocols("admin"), headers={"Origin": origin}),
    ):
        pass
    assert_problem(denied.value, 403)


def test_a_cookie_opens_a_websocket_from_our_own_page_only(api, dashboard):
    job_id = api.done("WebDelivery", {"to": "a"})["id"]
    with api.socket(f"/api/jobs/{job_id}/ws", headers={"Cookie": dashboard["Cookie"], **OWN}) as socket:
        assert socket.receive_json()["data"]["status"] == "completed"
    with (
        pytest.raises(WebSocketDenialResponse) as denied,
        api.socket(f"/api/jobs/{job_id}/ws", headers={"Cookie": dashboard["Cookie"]}),
    ):
        pass
    assert_problem(denied.value, 401)


@pytest.mark.parametrize("name", ["token", "access_token"])
def test_a_token_in_a_url_is_refused(api, name):
    with pytest.raises(WebSocketDenialResponse) as denied, api.socket(f"/api/ws?{name}={TOKENS['admin']}"):
        pass
    assert "ends up in logs" in assert_problem(denied.value, 400)["detail"]
    assert_problem(api.client.get(f"/api/jobs?{name}={TOKENS['admin']}"), 401)


def test_no_other_site_is_invited(api):
    answer = api.client.options(
        "/api/jobs", headers={"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    )
    assert answer.status_code == 405
    for found in (answer, api.get("/api/jobs", headers={"Origin": "http://evil.example"})):
        assert not [name for name in found.headers if name.startswith("access-control-")]


@pytest.mark.parametrize("path", ["/", "/api/jobs", "/api/nothing", "/healthz", "/openapi.json", "/style.css"])
def test_every_response_carries_the_headers_that_browsers_heed(api, path):
    for answer in (api.get(path), api.client.get(path, headers={"Host": "evil.example"})):
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"


def test_every_request_that_changes_something_is_recorded_the_refused_ones_too(api):
    n_before = len(api.audited())
    job_id = api.submit("WebDelivery", {"to": "secret place"}, name="secret name")
    api.ended(job_id)
    api.post(f"/api/jobs/{job_id}/cancel", {"reason": "secret reason"}, "viewer")
    api.client.post("/api/jobs", json={"kind": "WebDelivery"})
    api.post("/api/jobs", {"kind": "WebDelivery"}, headers={"Origin": "http://evil.example"})
    api.call("DELETE", f"/api/jobs/{job_id}")
    api.get("/api/jobs")
    found = api.audited()[n_before:]
    assert [(r["who"], r["method"], r["route"], r["status"]) for r in found] == [
        ("admin", "POST", "/api/jobs", 201),
        ("viewer", "POST", "/api/jobs/{job_id}/cancel", 403),
        (None, "POST", "/api/jobs", 401),
        (None, "POST", "/api/jobs", 403),
        ("admin", "DELETE", "/api/jobs/{job_id}", 204),
    ]
    assert found[0]["job_id"] == found[1]["params"]["job_id"] == job_id
    assert "secret" not in api.audit_file.read_text()
    assert bearer("admin")["Authorization"].split()[1] not in api.audit_file.read_text()
    assert api.audit_file.stat().st_mode & 0o777 == 0o600


def test_without_a_record_nothing_is_changed(api, asked, monkeypatch, tmp_path):
    monkeypatch.setattr(api.app.state.koan.audit, "_path", tmp_path)  # a directory cannot be appended to
    assert "audit" in assert_problem(api.post("/api/jobs", {"kind": "WebDelivery", "context": {"to": "a"}}), 503)["detail"]
    assert asked == []
