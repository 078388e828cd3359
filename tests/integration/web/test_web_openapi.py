"""The description of the API is true: requests made from it, good and bad, get answers that it announces."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import load_all_checks
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from koan_ray.web.security import Rates
from tests.integration.web.conftest import TOKENS, bearer
from tests.integration.web.test_web_roles import REST

load_all_checks()

WEB = {"allowed_hosts": ["testserver"]}  # what schemathesis calls an app in process
OPERATIONS = [(method, path) for method, path, _ in REST if path not in ("/api/events", "/openapi.json")]


@pytest.fixture(scope="module")
def operations(api):
    api.app.state.koan.guard._failures = Rates(1e6, 1_000_000)  # schemathesis tries wrong credentials on every operation
    found = schemathesis.openapi.from_asgi("/openapi.json", api.app, headers=bearer("admin")).get_all_operations()
    return {(operation.method.upper(), operation.path): operation for operation in (result.ok() for result in found)}


# Not the pytest plugin of schemathesis: it does not know this pytest.
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_no_request_made_from_the_description_surprises(operations, method, path, mode):
    strategy = operations[method, path].as_strategy(generation_mode=mode)

    @given(case=strategy)
    @settings(max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    def one(case):
        # Not everything that fits the description is accepted: a kind has to be known, a cursor to be ours.
        case.call_and_validate(headers=bearer("admin"), excluded_checks=[positive_data_acceptance])

    is_fixed = not operations[method, path].path_parameters.items and not operations[method, path].query.items
    if mode is GenerationMode.NEGATIVE and is_fixed and not operations[method, path].body.items:
        pytest.skip("nothing of it can be wrong")
    one()


@given(
    text=st.text(max_size=200),
    name=st.sampled_from(["name", "text", "cursor", "metadata", "kind", "status", "created_after"]),
)
@settings(max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_no_filter_is_too_strange(api, name, text):
    assert api.get("/api/jobs", params={name: text}).status_code in (200, 422)


def test_the_description_is_complete(api):
    document = api.get("/openapi.json").json()
    assert document["openapi"] == "3.1.0"
    described = {(path, method.upper()) for path, item in document["paths"].items() for method in item}
    routed = {(route.path_format, method) for route in api.routes for method in route.methods}
    assert described == routed - {("/openapi.json", "GET")}
    for item in document["paths"].values():
        for operation in item.values():
            assert operation["x-koan-role"]
            assert operation["description"]
            assert operation["operationId"]
            for status, answer in operation["responses"].items():
                if int(status) >= 400:
                    assert list(answer["content"]) == ["application/problem+json"]
    assert TOKENS["admin"] not in str(document)
    assert "HTTPValidationError" not in str(document)
