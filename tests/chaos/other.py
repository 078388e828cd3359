"""Another process: an engine or a driver that a test kills or pauses. Told what to do, and says what it did, in JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import koan_ray as koan
from tests.chaos.bench import Effectful

ROOT = Path(__file__).parents[2]


def start(**task):
    """Run `main` in a process of its own, which ends with its standard input."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.chaos.other", json.dumps(task)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        cwd=ROOT, env={**os.environ, "RAY_AUTH_MODE": "disabled"}, text=True,
    )  # fmt: skip


def said(process, within=60.0):
    """Return the next line that it says as JSON."""
    found = []

    def read():
        for line in process.stdout:
            if line.startswith("{"):
                found.append(json.loads(line))
                return

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(within)
    assert found, "the other process said nothing"
    return found[0]


def status(process):
    """Return what the engine of another process says of itself."""
    process.stdin.write("status\n")
    process.stdin.flush()
    return said(process)


def end(process):
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def main(task):
    koan.init(
        task.get("address"), runtime=task["runtime"], engine=task["engine"], sources={"default": {"url": task["url"]}}
    )  # fmt: skip
    jobs = Effectful.start_many(task["contexts"]).persist().audit().run().get(60) if task.get("contexts") else []
    print(json.dumps({"pid": os.getpid(), "jobs": [job.id for job in jobs]}), flush=True)
    for line in sys.stdin:  # until the test closes it
        if line.strip() == "status":
            print(json.dumps(koan.init().status().get(60), default=str), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
