"""Lists say what went wrong: the first line of an error, redacted as on the job's page, for those who may read that."""

from __future__ import annotations

import uuid

import pytest
from pydantic import BaseModel, SecretStr
from pymongo import MongoClient

import koan_ray as koan
from koan_ray.domain.texts import MOST_HEADLINE
from koan_ray.web.redaction import REDACTED
from tests.integration.web.conftest import CANARY, ROLES, until

HAS_SOURCES = True


@pytest.fixture(scope="module")
def sources(mongo_server):
    url = mongo_server.url(f"l{uuid.uuid4().hex[:12]}")
    yield {"default": {"url": url}}
    with MongoClient(url, serverSelectionTimeoutMS=2000) as client:
        client.drop_database(client.get_default_database().name)


class Told(BaseModel):
    text: str
    pin: SecretStr | None = None
    api_key: str = ""


class WebTold(koan.Job[Told, None]):
    """Fails as it is told to."""

    retry = koan.RetryPolicy(max_attempts=1)

    def execute(self, context, progress, cancellation) -> None:
        raise LookupError(context.text)


class WebParentOfTold(koan.Job[str, None]):
    retry = koan.RetryPolicy(max_attempts=1)

    async def execute(self, context, progress, cancellation) -> None:
        job = await self.start_child(WebTold, Told(text=context)).run()
        with pytest.raises(koan.JobFailedError):
            await job.wait()


def listed(api, job_id, role="reader", path="/api/jobs?kind=WebTold"):
    def found():
        return next((item for item in api.get(path, role).json()["items"] if item["id"] == job_id and item["error"]), None)

    return until(found)  # documents are read beside the coordinator, which may have told of the end a moment before


def fail(api, persist, text, **more):
    asked = {"kind": "WebTold", "context": {"text": text, **more}, **({"persist": {}} if persist else {})}
    job_id = api.post("/api/jobs", asked).json()["id"]
    with pytest.raises(koan.JobFailedError):
        koan.Jobs.get(job_id).get(timeout=30).wait().get(timeout=30)
    return job_id


@pytest.mark.parametrize("persist", [False, True], ids=["memory", "documents"])
def test_a_list_has_the_first_line_of_an_error(api, persist):
    job_id = fail(api, persist, "\n  nobody is called Ada  \nand much more\n")
    for _ in range(2):  # the second time from what is kept
        error = listed(api, job_id)["error"]
        assert error == {"type": "LookupError", "message": "nobody is called Ada", "stack_trace": None}


@pytest.mark.parametrize("persist", [False, True], ids=["memory", "documents"])
def test_it_is_cut_and_holds_nothing_that_steers_a_page(api, persist):
    job_id = fail(api, persist, "\x1b[31mred\u202e " + "x" * 1000)
    message = listed(api, job_id)["error"]["message"]
    assert len(message) == MOST_HEADLINE
    assert message.endswith("…")
    assert message.isprintable()


@pytest.mark.parametrize("persist", [False, True], ids=["memory", "documents"])
def test_secrets_of_the_context_are_taken_out_as_on_the_page_of_the_job(api, persist):
    text = f"cannot log in with {CANARY}-key or password={CANARY}"
    job_id = fail(api, persist, text, api_key=f"{CANARY}-key")
    message = listed(api, job_id)["error"]["message"]
    assert message == f"cannot log in with {REDACTED} or password={REDACTED}"
    assert api.get(f"/api/jobs/{job_id}", "reader").json()["error"]["message"] == message
    for role in ROLES:
        error = listed(api, job_id, role)["error"]
        assert CANARY not in str(error), role


@pytest.mark.parametrize("persist", [False, True], ids=["memory", "documents"])
def test_who_may_not_read_it_sees_the_type_alone(api, persist):
    job_id = fail(api, persist, "nobody is called Ada")
    assert listed(api, job_id, "viewer")["error"] == {"type": "LookupError", "message": None, "stack_trace": None}
    assert listed(api, job_id)["error"]["message"] == "nobody is called Ada"
    assert listed(api, job_id, "viewer")["error"]["message"] is None  # whoever has asked before


def test_children_are_listed_alike(api):
    parent = api.done("WebParentOfTold", "no such child")
    (child,) = api.get(f"/api/jobs/{parent['id']}/children", "reader").json()["items"]
    assert child["error"]["message"] == "no such child"
    (child,) = api.get(f"/api/jobs/{parent['id']}/children", "viewer").json()["items"]
    assert child["error"]["message"] is None


def test_many_large_ones_are_read_in_bounded_answers(api, monkeypatch):
    from koan_ray.engine import window

    monkeypatch.setattr(window, "_MOST_BYTES", 1000)
    ids = [fail(api, False, f"number {n} " + "x" * 900) for n in range(5)]
    items = api.get("/api/jobs?kind=WebTold", "reader").json()["items"]
    said = {item["id"]: item["error"]["message"] for item in items}
    assert all(said[job_id].startswith(f"number {n} x") for n, job_id in enumerate(ids))
