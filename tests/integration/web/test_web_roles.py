"""Who may do what: every route and every WebSocket, with every credential. Generated from the route table."""

from __future__ import annotations

import pytest
from starlette.testclient import WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect

from koan_ray.web.app import TABLES, _description
from koan_ray.web.dashboard import Dashboard
from koan_ray.web.routing import GuardedRoute, GuardedSocket, Table
from koan_ray.web.security import Role, permissions
from tests.integration.web.conftest import ABSENT, ROLES, assert_problem, bearer, subprotocols

REST = [(m, path, role) for table in (*TABLES, _description) for m, path, role, _, _ in table._routes]
SOCKETS = [(path, role) for table in TABLES for path, role, _ in table._sockets]
CREDENTIALS = [None, "expired", "nobodys-token-0123456789", *ROLES]


def filled(path):
    return path.replace("{job_id}", ABSENT).replace("{kind}", "WebDelivery")


@pytest.mark.parametrize("credential", CREDENTIALS)
@pytest.mark.parametrize(("method", "path", "role"), REST)
async def test_a_route_lets_in_whoever_has_its_role_and_nobody_else(api, method, path, role, credential):
    status = await api.status_of(method, filled(path), bearer(credential))
    if role is Role.PUBLIC:
        assert status not in (401, 403)
    elif credential not in ROLES:
        assert status == 401
    elif role in permissions([credential]):
        assert status not in (401, 403)
    else:
        assert status == 403


def test_every_route_of_the_app_is_guarded(api):
    for route in api.app.router.routes:
        is_files = isinstance(getattr(route, "app", None), Dashboard)
        assert isinstance(route, (GuardedRoute, GuardedSocket)) or is_files, route
    assert {(route.path_format, *route.methods, route.role) for route in api.routes} == {(p, m, r) for m, p, r in REST}


def test_only_probes_and_the_login_are_public():
    public = {(method, path) for method, path, role in REST if role is Role.PUBLIC}
    assert public == {("GET", "/healthz"), ("GET", "/readyz"), ("POST", "/api/session")}


def test_a_route_without_a_role_cannot_be_made():
    async def endpoint() -> None: ...

    with pytest.raises(TypeError, match="declares no role"):
        GuardedRoute("/open", endpoint)
    with pytest.raises(ValueError, match="nobody"):
        Table("x").get("/open", Role("nobody"))


def test_roles_do_not_include_each_other_but_admin():
    assert permissions(["operator"]) == {Role.PUBLIC, Role.VIEWER, Role.OPERATOR}
    assert permissions(["submitter"]) == {Role.PUBLIC, Role.VIEWER, Role.SUBMITTER}
    assert permissions(["admin"]) == set(Role)
    assert permissions([]) == frozenset()


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", "Basic YTpi", "bearer\t", "Bearer " + "x" * 1000, "Token x"])
def test_a_header_that_is_no_bearer_token_is_nobodys(api, header):
    assert_problem(api.client.get("/api/jobs", headers={"Authorization": header}), 401)


def test_a_wrong_token_is_not_made_good_by_a_cookie(api):
    login = api.client.post("/api/session", json={"token": bearer("admin")["Authorization"].split()[1]})
    cookie = login.cookies["koan_ray_session"]
    api.client.cookies.clear()
    answer = api.client.get("/api/jobs", headers={"Cookie": f"koan_ray_session={cookie}", "Authorization": "Bearer no"})
    assert_problem(answer, 401)


@pytest.mark.parametrize("credential", ["expired", "nobodys-token-0123456789", *ROLES])
@pytest.mark.parametrize(("path", "role"), SOCKETS)
def test_a_websocket_lets_in_whoever_has_its_role(api, path, role, credential):
    path = path.replace("{job_id}", api.done("WebDelivery", {"to": "a"})["id"])
    if credential in ROLES and role in permissions([credential]):
        with api.socket(path, subprotocols=subprotocols(credential)) as socket:
            assert socket.accepted_subprotocol == "koan-ray"
            assert socket.receive_json()["event"] in ("open", "progress")
        return
    with pytest.raises(WebSocketDenialResponse) as denied, api.socket(path, subprotocols=subprotocols(credential)):
        pass
    assert_problem(denied.value, 401)


@pytest.mark.parametrize(("path", "role"), SOCKETS)
def test_a_websocket_without_a_credential_is_told_nothing_before_it_gives_one(api, path, role):
    path = path.replace("{job_id}", api.done("WebDelivery", {"to": "a"})["id"])
    for hello in ('{"token": "wrong"}', "no json", "[]", '{"token": 7}', '{"token": "' + "x" * 5000 + '"}'):
        with api.socket(path) as socket:
            socket.send_text(hello)
            with pytest.raises(WebSocketDisconnect) as closed:
                socket.receive_text()
            assert closed.value.code == 4401
    with api.socket(path) as socket:
        socket.send_json({"token": bearer("viewer")["Authorization"].split()[1]})
        assert socket.receive_json()["event"] in ("open", "progress")


def test_denials_are_counted_by_route(api):
    before = api.app.state.koan.counters["auth_denied", "/api/jobs"]
    api.client.get("/api/jobs")
    assert api.app.state.koan.counters["auth_denied", "/api/jobs"] == before + 1
    assert 'koan_ray_auth_denied_total{route="/api/jobs"}' in api.get("/metrics", "viewer").text
