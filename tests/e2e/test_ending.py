"""Ctrl-C and SIGTERM while streams are open: each stream gets its end, the process ends at once, without a traceback."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

TOKEN = "t" * 40
HEADERS = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
JOBS = """
import koan_ray as koan


@koan.job
async def wait(_context: None, cancellation: koan.CancellationToken) -> None:
    await cancellation.wait()
"""
# An application of somebody's own, with the API mounted: its lifespan is the application's.
APP = f"""
from fastapi import FastAPI

import koan_ray as koan
import my_jobs
from koan_ray import web

engine = koan.init(runtime="local", engine={{"cancel_grace": 0.2}})
app = FastAPI()
app.mount("/koan", web.create_app(engine, tokens=[web.token("me", "{TOKEN}")]))
"""
SIGNALS = {
    "Ctrl-C": [signal.SIGINT],
    "Ctrl-C twice": [signal.SIGINT] * 2,
    "Ctrl-C five times": [signal.SIGINT] * 5,
    "SIGTERM": [signal.SIGTERM],
}
WITHIN_S = 5.0


@pytest.fixture
def project(tmp_path):
    (tmp_path / "my_jobs.py").write_text(JOBS)
    (tmp_path / "my_app.py").write_text(APP)
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(0o600)
    return tmp_path


@contextlib.contextmanager
def running(project, *command, says):
    paths = os.pathsep.join([str(project), str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
    variables = {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", "KOAN_RAY_ENGINE__CANCEL_GRACE": "0.2s"}
    with (project / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", *command], cwd=project, stdout=log, stderr=log, env=variables)
    try:
        until = time.monotonic() + 60
        while not (found := re.search(says, (project / "log").read_text())):
            assert process.poll() is None, (project / "log").read_text()
            assert time.monotonic() < until
            time.sleep(0.05)
        yield process, int(found[1])
    finally:
        process.kill()
        process.wait()


def request(stack, port, method, path, body=None):
    connection = stack.enter_context(contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)))
    connection.request(method, path, body, HEADERS)
    answer = stack.enter_context(connection.getresponse())
    assert answer.status in (200, 201, 202), answer.read()
    return answer


def end(process, numbers):
    began = time.monotonic()
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.1)  # as a hand would
    code = process.wait(30)
    return code, time.monotonic() - began


@contextlib.contextmanager
def streams(port, prefix=""):
    """Open each sort of stream, see each begin, and in the end see that each was ended in order."""
    caller = {"Authorization": f"Bearer {TOKEN}"}
    with contextlib.ExitStack() as stack:
        body = json.dumps({"kind": "wait", "context": None})
        job_id = json.loads(request(stack, port, "POST", f"{prefix}/api/jobs", body).read())["id"]
        paths = [f"{prefix}/api/events", f"{prefix}/api/jobs/{job_id}/events"]
        events = [request(stack, port, "GET", path) for path in paths]
        paths = [f"ws://127.0.0.1:{port}{prefix}{path}" for path in ("/api/ws", f"/api/jobs/{job_id}/ws")]
        sockets = [stack.enter_context(connect(path, additional_headers=caller)) for path in paths]
        for each in events:
            each.readline()
        for each in sockets:
            each.recv(timeout=20)
        yield
        for each in events:
            each.read()  # raises IncompleteRead where the last chunk is missing
        for each in sockets:
            with contextlib.suppress(ConnectionClosed):
                while True:
                    each.recv(timeout=5)
            assert each.close_code == 1012  # 1006: the connection was cut


@pytest.mark.parametrize("numbers", SIGNALS.values(), ids=SIGNALS.keys())
def test_the_server_ends_its_streams_and_itself_at_once(project, numbers):
    command = ("koan_ray", "serve", "--local", "--port", "0", "--module", "my_jobs", "--token-file", "token")
    with running(project, *command, says=r"answers at http://127\.0\.0\.1:(\d+)") as (process, port):
        with streams(port):
            code, took_s = end(process, numbers)
        said = (project / "log").read_text()
        assert code == 0, said
        assert took_s < WITHIN_S
        assert "Traceback" not in said


def test_requests_that_stand_still_are_given_up_without_a_traceback(project):
    command = ("koan_ray", "serve", "--local", "--port", "0", "--module", "my_jobs", "--token-file", "token")
    with running(project, *command, says=r"answers at http://127\.0\.0\.1:(\d+)") as (process, port):
        with socket.create_connection(("127.0.0.1", port)) as half, socket.create_connection(("127.0.0.1", port)):
            lines = ["POST /api/jobs HTTP/1.1", f"Host: 127.0.0.1:{port}", *map(": ".join, HEADERS.items())]
            half.sendall("\r\n".join([*lines, "Content-Length: 100", "", "{"]).encode())
            time.sleep(0.5)
            code, took_s = end(process, [signal.SIGINT])
        said = (project / "log").read_text()
        assert code == 0, said
        assert took_s < WITHIN_S
        assert "Traceback" not in said


@pytest.mark.parametrize("numbers", SIGNALS.values(), ids=SIGNALS.keys())
def test_an_application_that_has_mounted_the_api_ends_as_it_would_without(project, numbers):
    command = ("uvicorn", "my_app:app", "--port", "0")
    with running(project, *command, says=r"running on http://127\.0\.0\.1:(\d+)") as (process, port):
        with streams(port, "/koan"):
            code, took_s = end(process, numbers)
        said = (project / "log").read_text()
        assert code in (0, -numbers[0]), said  # uvicorn ends by the signal itself
        assert took_s < WITHIN_S
        assert "Exception in ASGI application" not in said
        if len(numbers) == 1:  # two are uvicorn's own way to cut off everything, the application's lifespan included
            assert "Traceback" not in said
