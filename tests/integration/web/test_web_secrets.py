"""A secret that goes in comes out nowhere: no response, no log line, no error, no record."""

from __future__ import annotations

import pytest

from koan_ray.web.redaction import REDACTED, Redactor, clean_text
from koan_ray.web.routing import GuardedRoute
from tests.integration.web.conftest import CANARY, ROLES

LOGIN = {"user": "bad", "pin": CANARY + "-pin", "password": CANARY + "-password", "nested": {"api_key": CANARY + "-key"}}


@pytest.fixture(scope="module", params=["bad", "good"])
def leaked(api, request):
    return api.done("WebLeaky", {**LOGIN, "user": request.param}, metadata={"access_token": CANARY + "-meta", "tenant": 7})


@pytest.mark.parametrize("role", ROLES)
def test_no_response_tells_a_secret(api, leaked, role, caplog):
    with caplog.at_level("DEBUG"):
        for route in api.routes:
            assert isinstance(route, GuardedRoute)
            if "GET" not in route.methods or route.path_format == "/api/events":
                continue
            path = route.path_format.replace("{job_id}", leaked["id"]).replace("{kind}", "WebLeaky")
            answer = api.get(path, role)
            assert CANARY not in answer.text, path
    assert CANARY not in caplog.text
    assert CANARY not in api.audit_file.read_text()


def test_what_is_secret_is_replaced_and_the_rest_is_there(api, leaked):
    seen = api.get(f"/api/jobs/{leaked['id']}", "reader").json()
    assert seen["context"]["user"] in ("bad", "good")
    assert (seen["context"]["pin"], seen["context"]["password"]) == (REDACTED, REDACTED)
    assert seen["context"]["nested"] == {"api_key": REDACTED}
    assert seen["metadata"] == {"access_token": REDACTED, "tenant": 7}
    assert seen["progress_message"] == f"password={REDACTED}"
    if leaked["status"] == "failed":
        assert seen["error"]["message"] == f"cannot log in with {REDACTED} or {REDACTED}"
        (attempt,) = api.get(f"/api/jobs/{leaked['id']}/executions", "reader").json()["items"]
        assert attempt["error"]["message"] == seen["error"]["message"]
    else:
        assert seen["result"] == {"token": REDACTED, "said": f"hello {REDACTED}"}


def test_a_refused_context_is_not_repeated(api):
    answer = api.post("/api/jobs", {"kind": "WebLeaky", "context": {**LOGIN, "pin": {"x": CANARY}, "nested": CANARY}})
    assert answer.status_code == 422
    assert CANARY not in answer.text


def test_a_schema_does_not_tell_the_default_of_a_secret(api):
    from pydantic import BaseModel

    import koan_ray as koan

    class WithDefault(BaseModel):
        password: str = CANARY
        size: int = 3

    class WebConfigured(koan.Job[WithDefault, None]):
        def execute(self, context, progress, cancellation) -> None: ...

    schema = api.get("/api/kinds/WebConfigured").json()["context_schema"]
    assert CANARY not in str(schema)
    assert schema["properties"]["size"]["default"] == 3


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("mongodb://ada:pw@host/db failed", "mongodb://***@host/db failed"),
        ("password=hunter2, user=ada", f"password={REDACTED}, user=ada"),
        ('{"api_key": "abc", "n": 1}', f'{{"api_key": {REDACTED}, "n": 1}}'),
        ("Authorization: Bearer abcdefgh12345", f"Authorization: Bearer {REDACTED}"),
        ("a\x1b[31mb\u202ec", "ab\ufffdc"),
        ("pass\x1b[0mword=hunter2", f"password={REDACTED}"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("the keyboard is monkeyed with", "the keyboard is monkeyed with"),
    ],
)
def test_texts_lose_their_credentials(text, cleaned):
    assert clean_text(text) == cleaned


def test_short_values_are_replaced_where_they_are_but_not_looked_for():
    redactor = Redactor()
    assert redactor.value({"pin_token": "1", "items": [{"secret": None, "count": 1}]}) == {
        "pin_token": REDACTED, "items": [{"secret": None, "count": 1}]}  # fmt: skip
    assert redactor.text("1 of 11") == "1 of 11"
