"""``koan-ray serve`` as somebody uses it: in a process, over the network."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

JOBS = "import koan_ray as koan\n\n\n@koan.job\ndef double(n: int) -> int:\n    return 2 * n\n"


@pytest.fixture
def project(tmp_path):
    (tmp_path / "my_jobs.py").write_text(JOBS)
    return tmp_path


def start(project, *arguments):
    paths = os.pathsep.join([str(project), str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "koan_ray", "serve", *arguments], cwd=project, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip


def call(url, token, body=None):
    request = urllib.request.Request(url, json.dumps(body).encode() if body is not None else None)
    request.add_header("Content-Type", "application/json")
    request.add_header("Authorization", f"Bearer {token}")
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.loads(answer.read())


def test_it_prints_where_and_with_what_and_ends_on_ctrl_c(project):
    server = start(project, "--local", "--port", "0", "--module", "my_jobs")
    try:
        said = ""
        while "/#token=" not in said:
            line = server.stdout.readline()
            assert line, server.stderr.read()
            said += line
        url, token = re.search(r"open (http://127\.0\.0\.1:\d+)/#token=(\S+)", said).groups()
        assert said.count(token) == 2  # alone, and as part of the address
        submitted = call(f"{url}/api/jobs", token, {"kind": "double", "context": 21})
        with urllib.request.urlopen(
            urllib.request.Request(f"{url}/api/jobs/{submitted['id']}/events", headers={"Authorization": f"Bearer {token}"}),
            timeout=20,
        ) as stream:
            assert b'"status":"completed"' in stream.read()
        assert call(f"{url}/api/jobs/{submitted['id']}/result", token)["value"] == 42
        with pytest.raises(urllib.error.HTTPError) as refused:
            call(f"{url}/api/jobs", "wrong")
        assert refused.value.code == 401
        assert "Server" not in refused.value.headers
        refused.value.close()
    finally:
        server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=20)
    assert server.returncode == 0, err
    assert "Traceback" not in err
    assert token not in out + err
    assert '"route":"/api/jobs"' in (project / ".koan" / "audit.jsonl").read_text()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--host", "0.0.0.0"], "no token is configured"),
        (["--host", "0.0.0.0", "--generate-token"], "allowed_hosts or public_url"),
        (["--module", "no_such_module", "--local"], "'no_such_module' cannot be imported"),
        (["--token-file", "nowhere"], "--token-file: 'nowhere' cannot be read"),
    ],
)
def test_it_refuses_to_start_where_it_should_not(project, arguments, problem):
    server = start(project, "--port", "0", *arguments)
    _, err = server.communicate(timeout=30)
    assert server.returncode == 2
    assert err.startswith("koan-ray: ")
    assert problem in err
    assert "Traceback" not in err
