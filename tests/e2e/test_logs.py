"""Who gets an error from the server with a request's id finds in its log what happened, under this id."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TOKEN = "t" * 40
BROKEN = """
from koan_ray.errors import StoreUnavailableError
from koan_ray.web import reading


async def page(self, filters, **more):
    if filters.get("name") == "away":
        raise StoreUnavailableError("nobody answers\\r\\nERROR forged")
    raise LookupError("in the \\x1b[31mreader\\r\\nERROR forged")


async def job(self, job_id):
    raise LookupError("no such thing")


reading.Reader.page = page
reading.Reader.job = job
"""


@pytest.fixture(scope="module", params=["text", "json"])
def server(request, tmp_path_factory):
    project = tmp_path_factory.mktemp("project")
    (project / "broken.py").write_text(BROKEN)
    (project / "token").write_text(TOKEN)
    (project / "token").chmod(0o600)
    (project / "koan.toml").write_text(f'[logging]\nformat = "{request.param}"\n')
    paths = os.pathsep.join([str(project), str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
    command = ["serve", "--local", "--port", "0", "--token-file", "token", "--module", "broken"]
    with (project / "out").open("w") as out, (project / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "koan_ray", *command], cwd=project, stdout=out, stderr=log,
            env={**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
    try:
        until = time.monotonic() + 30
        while not (found := re.search(r"answers at http://127\.0\.0\.1:(\d+)", (project / "out").read_text())):
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
        yield int(found[1]), project / "log", request.param
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()


def ask(port, path):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {TOKEN}"})
        with connection.getresponse() as answer:
            return answer.status, answer.headers["X-Request-ID"], json.loads(answer.read())
    finally:
        connection.close()


def about(log, request_id):
    """The record of a request: its line, and those of its stack trace."""
    text = log.read_text()
    return re.findall(rf"^[^ ].*{request_id}.*\n(?:  .*\n)*", text, re.MULTILINE)


@pytest.mark.parametrize("path", ["/api/jobs", "/api/jobs/0198f0c2-7b7e-7cc2-a1f5-2f1d1e6a9b10"])
def test_an_error_of_ours_is_in_the_log_with_its_stack_trace_under_the_id_that_the_answer_has(server, path):
    port, log, form = server
    status, request_id, problem = ask(port, path)
    assert status == 500
    assert problem["request_id"] == request_id
    assert "the log of the API has the details under this request id" in problem["detail"]
    (record,) = about(log, request_id)
    assert "request_failed" in record
    assert "LookupError" in record
    assert "in page" in record or "in job" in record
    assert path in record
    assert "\x1b" not in record
    if form == "json":
        assert json.loads(record)["request_id"] == request_id


def test_what_a_store_says_is_in_the_log_of_the_request_as_well(server):
    port, log, _ = server
    status, request_id, _ = ask(port, "/api/jobs?name=away")
    assert status == 503
    (record,) = about(log, request_id)
    assert "request_unanswered" in record
    assert "nobody answers" in record
    assert record.count("\n") == 1


def test_what_is_the_caller_s_own_mistake_is_not_logged(server):
    port, log, _ = server
    status, request_id, _ = ask(port, "/api/jobs?limit=x")
    assert status == 422
    assert about(log, request_id) == []
