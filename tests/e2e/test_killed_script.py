"""The script of examples/12_items.py is killed and run again, as its first lines invite to: every item counts once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
from pymongo import MongoClient

from koan_ray.stores.embedded import DocumentServer
from tests.integration.conftest import end_namespace

pytestmark = pytest.mark.ray
SCRIPT = Path(__file__).parents[2] / "examples" / "12_items.py"
N = 20_000


@pytest.fixture
def command(cluster, tmp_path):
    """How to start the script: with an engine and a document server of its own, on the Ray of the tests."""
    end_namespace("items")
    environment = {**os.environ, "RAY_ADDRESS": cluster, "PYTHONUNBUFFERED": "1"}
    yield {"args": [sys.executable, str(SCRIPT)], "cwd": tmp_path, "env": environment, "text": True}
    end_namespace("items")


def killed_in_the_middle(command) -> str:
    """Run the script until it has killed something itself, and kill it; returns what it said."""
    said = []
    with subprocess.Popen(**command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as script:
        watchdog = threading.Timer(60, script.kill)
        watchdog.start()
        try:
            for line in script.stdout:
                said.append(line)
                if line.startswith("killed the "):
                    break
        finally:
            watchdog.cancel()
            script.send_signal(signal.SIGKILL)
    assert script.wait() == -signal.SIGKILL, "".join(said)
    return "".join(said)


@contextlib.contextmanager
def documents(folder: Path):
    server = DocumentServer(folder / ".koan" / "store")
    url = asyncio.run(server.start())
    try:
        with MongoClient(url) as client:
            yield client.get_default_database()
    finally:
        asyncio.run(server.stop())


def test_a_script_that_is_killed_goes_on_when_it_is_run_again(command, tmp_path):
    first = killed_in_the_middle(command)
    assert "a new job" in first, first
    assert "every item is accounted for" not in first, first

    second = subprocess.run(**command, capture_output=True, timeout=90, check=False)
    assert second.returncode == 0, second.stdout + second.stderr
    (job_id,) = re.findall(r"^going on with (\S+)$", second.stdout, re.MULTILINE)
    report = {name: int(n) for name, n in re.findall(r"(readings|checked|skipped|failed)=(\d+)", second.stdout)}
    assert report["checked"] + report["skipped"] + report["failed"] == report["readings"] == N
    assert report["skipped"] == N // 100, "one more or less would be an item that counts twice, or not at all"

    dead = [json.loads(line) for line in (tmp_path / ".koan" / "dead.jsonl").read_text().splitlines()]
    assert max(Counter(item["index"] for item in dead).values()) == 1
    assert len(dead) == report["failed"]
    refused = {item["index"] for item in dead if item["error_type"] == "ValueError"}
    assert refused == set(range(3, N, 500))

    with documents(tmp_path) as db:
        assert [job["_id"] for job in db.jobs.find({"kind": "CheckReadings"}, {"_id": 1})] == [job_id]
        pages = db.items.find({"job_id": job_id, "stream": "values"}, {"count": 1})
        assert sum(page["count"] for page in pages) == report["checked"], "each has left its value once"
