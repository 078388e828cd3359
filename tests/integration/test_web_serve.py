"""The API as a Ray Serve deployment: the same app, behind Serve's proxy."""

from __future__ import annotations

import json
import urllib.error
import urllib.request

import pytest

import koan_ray as koan
from koan_ray.web.serve import deployment
from tests.integration.conftest import end_namespace
from tests.servers import free_port

TOKEN = "a-token-for-serve-0123456789"
WEB = {"tokens": [{"name": "admin", "roles": "admin", "token": TOKEN}], "audit_file": ""}
NAMESPACE = "test-web-serve"
# Importing Ray Serve warns of what it uses of pydantic.
pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def address(cluster):
    from ray import serve

    settings = koan.Settings(engine={"namespace": NAMESPACE, "max_actors": 1}, web=WEB)
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    with koan.init(settings=settings):
        serve.run(deployment(settings, ray_actor_options={"num_cpus": 0}), name="api", route_prefix="/koan")
        yield f"http://127.0.0.1:{port}/koan"
        serve.shutdown()
        end_namespace(NAMESPACE)


def call(url, token=TOKEN, body=None):
    request = urllib.request.Request(url, json.dumps(body).encode() if body is not None else None)
    request.add_header("Content-Type", "application/json")
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.slow
def test_the_deployment_shows_and_guards_the_engine_of_the_cluster(address):
    @koan.job
    def greet(name: str) -> str:
        return f"hello {name}"

    job = greet.start("ada").run().get()
    assert job.wait().get(timeout=60) == "hello ada"
    status, text = call(f"{address}/api/jobs/{job.id}")
    assert (status, json.loads(text)["result"]) == (200, "hello ada")
    assert call(f"{address}/api/jobs/{job.id}", None)[0] == 401
    assert call(f"{address}/api/nothing")[0] == 404
    assert json.loads(call(f"{address}/readyz", None)[1]) == {"status": "ready"}
    status, text = call(f"{address}/api/jobs/{job.id}/events")
    assert (status, '"status":"completed"' in text) == (200, True)
    status, text = call(f"{address}/api/jobs", body={"kind": "greet", "context": "x"})
    assert status == 422  # the replica has not imported this class, and says what to do
    assert "[web] modules" in text


def test_a_deployment_without_tokens_is_refused():
    with pytest.raises(koan.ConfigurationError, match=r"web\.tokens"):
        deployment(koan.Settings())
    with pytest.raises(koan.ConfigurationError, match=r"web\.session_key"):
        deployment(koan.Settings(web=WEB), num_replicas=2)
