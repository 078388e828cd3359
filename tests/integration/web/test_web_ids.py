"""Over HTTP what is no id of a job is not found either, as in Python and on the command line."""

from __future__ import annotations

import pytest

from tests.integration.web.conftest import ABSENT, assert_problem

ROUTES = ["", "/progress", "/context", "/result", "/executions", "/failed-items", "/children", "/tree", "/events"]


@pytest.mark.parametrize("text", ["abc", "0", ABSENT.upper(), ABSENT[:-1], "%1b[1mx", "\u00e9"], ids=ascii)
def test_what_is_no_id_is_not_found(api, text):
    for route in ROUTES:
        problem = assert_problem(api.get(f"/api/jobs/{text}{route}", role="admin"), 404)
        assert "An id is a UUID in lower case" in problem["detail"], route
    for action in ("cancel", "retry", "retry-failed-items", "restore"):
        assert_problem(api.post(f"/api/jobs/{text}/{action}", role="admin"), 404)
    assert_problem(api.call("DELETE", f"/api/jobs/{text}", role="admin"), 404)


def test_where_a_job_was_looked_for_is_said(api):
    assert "not found in the engine's memory" in assert_problem(api.get(f"/api/jobs/{ABSENT}"), 404)["detail"]
