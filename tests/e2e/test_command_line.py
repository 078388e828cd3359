"""The ``koan-ray`` command, as a user types it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import httpx2
import psutil
import pytest

import koan_ray as koan
from tests.integration.conftest import end_namespace

COMMAND = [sys.executable, "-m", "koan_ray"]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=100, env={**os.environ, **environment}, check=False
    )


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A working directory of its own: commands keep documents there, and read settings."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def sources(tmp_path):
    """A folder of Python files, two of which are none."""
    tmp_path = tmp_path / "src"
    tmp_path.mkdir()
    for n in range(60):
        (tmp_path / f"module_{n}.py").write_text(
            textwrap.dedent(f"""
                import os

                class Thing{n}:
                    def choose(self, a, b):
                        if a and b:
                            return [x for x in range({n}) if x]
                        return None
                """)
        )
    (tmp_path / "broken.py").write_text("def broken(:\n")
    (tmp_path / "odd [bold]name.py").write_text("print 'python 2'\n")
    return tmp_path


def seconds_of_help() -> float:
    began = time.perf_counter()
    run("--help")
    return time.perf_counter() - began


def test_help_names_the_commands_and_is_quick():
    assert any(seconds_of_help() < 2 for _ in range(3))  # the machine may be busy with something else for a moment
    done = run("--help")
    assert all(name in done.stdout for name in ("demo", "dev", "doctor", "jobs", "status", "down"))
    assert all(
        name in run("jobs", "--help").stdout for name in ("list", "show", "tree", "watch", "submit", "cancel", "retry")
    )
    code = "import sys, koan_ray.cli.app; print([m for m in ('ray', 'pydantic', 'asyncio', 'pymongo') if m in sys.modules])"
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert imported == "[]\n"
    assert run("--version").stdout == f"koan-ray {koan.__version__}\n"


def test_the_demo_counts_files_and_shows_failures_and_retries(sources):
    done = run("demo", "--runtime", "local", "--path", str(sources), COLUMNS="140")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "60 files," in done.stdout
    assert "60 functions, 60 classes" in done.stdout
    assert "2 files are not Python; each is a dead item of the census" in done.stdout
    assert "odd [bold]name.py" in done.stdout
    assert "Executions of Announce" in done.stdout
    assert "Connection refused" in done.stdout
    assert "\x1b" not in done.stdout
    assert "kept as documents" in done.stdout
    checked = run("doctor", "--json")
    assert (checked.returncode, json.loads(checked.stdout)) == (0, {"jobs": 2, "problems": 0})


def test_ctrl_c_cancels_the_demo_cleanly():
    demo = subprocess.Popen(
        [*COMMAND, "demo", "--runtime", "local"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        for line in demo.stdout:
            if "%" in line:
                break
        demo.send_signal(signal.SIGINT)
        output, errors = demo.communicate(timeout=40)
    finally:
        demo.kill()
        demo.wait()
    assert demo.returncode == 130, output + errors
    assert "Census cancelled." in output
    assert "Traceback" not in errors
    assert run("doctor").returncode == 0


def lines_until(stream, text):
    lines = []
    for line in stream:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError("".join(lines))


SCRIPT = """
import koan_ray as koan

@koan.job
def double(n: int) -> int:
    return 2 * n

if __name__ == "__main__":
    job = double.start(21).persist().audit().run().get(60)
    print("result", job.wait().get(60), koan.Jobs.count(source="default").get())
"""


def check_page(told: str) -> None:
    """What is printed leads to a page that starts a sample job."""
    page, token = re.search(r"(http://127\.0\.0\.1:\d+)/#token=(\S+)", told).groups()
    with httpx2.Client(base_url=page, headers={"Authorization": f"Bearer {token}"}, timeout=20) as caller:
        assert "<html" in caller.get("/").text
        job = {"kind": "sample.unlucky", "context": {"failures": 0}, "persist": True}
        started = caller.post("/api/jobs", json=job)
        assert started.status_code == 201, started.text
        until = time.monotonic() + 30
        while caller.get(f"/api/jobs/{started.json()['id']}").json()["status"] != "completed":
            assert time.monotonic() < until
            time.sleep(0.1)


@pytest.mark.ray
@pytest.mark.slow
def test_dev_runs_everything_and_ends_everything(tmp_path, sources):
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    dev = subprocess.Popen([*COMMAND, "dev"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        told = lines_until(dev.stdout, "Ctrl-C ends all of it")
        for text in ("mongodb://127.0.0.1:", "document server in ./.koan/store", "namespace 'koan'", ". .koan/env"):
            assert text in told
        check_page(told)
        script = ["sh", "-c", '. .koan/env && exec "$0" script.py', sys.executable]
        done = subprocess.run(script, capture_output=True, text=True, timeout=90, env=environment, check=False)
        assert "result 42 2" in done.stdout, done.stdout + done.stderr
        checked = run("doctor")
        assert checked.stdout == "2 jobs read; nothing is wrong\n", checked.stdout + checked.stderr
        refused = run("demo", "--runtime", "local", "--path", str(sources))
        assert refused.returncode == 4
        assert "another engine works on these documents" in refused.stderr
        joined = run("demo", "--path", str(sources), "--limit", "5")
        assert "Joining the engine" in joined.stdout, joined.stdout + joined.stderr
        assert "kept as documents" in joined.stdout
        below = psutil.Process(dev.pid).children(recursive=True)
        assert len(below) > 3
        dev.send_signal(signal.SIGINT)
        time.sleep(0.5)
        dev.send_signal(signal.SIGINT)
        output, _ = dev.communicate(timeout=40)
    finally:
        dev.kill()
        dev.wait()
    assert dev.returncode == 0, output
    assert "Traceback" not in output
    assert not (tmp_path / ".koan" / "env").exists()
    assert psutil.wait_procs(below, timeout=10)[1] == []
    assert run("doctor").returncode == 0


def test_a_shell_completes_statuses_and_kinds(tmp_path):
    (tmp_path / "my_jobs.py").write_text(MODULE)
    (tmp_path / "koan.toml").write_text('[jobs]\nmodules = ["my_jobs"]\n')

    def completed(line: str) -> list[str]:
        script = str(Path(sys.executable).with_name("koan-ray"))
        completion = {"_KOAN_RAY_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
        done = subprocess.run([script], capture_output=True, text=True, env={**os.environ, **completion}, check=False)
        return done.stdout.split()

    assert completed("koan-ray jobs list --status c") == ["created", "completed", "cancelled"]
    assert completed("koan-ray jobs submit ") == ["double", "slow"]
    assert completed("koan-ray jobs list --kind d") == ["double"]
    assert "executions" in completed("koan-ray jobs ")


MODULE = """
import time
import koan_ray as koan

@koan.job(kind="double")
def double(n: int, progress: koan.JobProgress) -> int:
    progress.report(0.5, "doubling")
    return 2 * n

@koan.job(kind="slow")
def slow(n: int, progress: koan.JobProgress) -> int:
    for step in range(10 * n):
        progress.report(step, 10 * n, "step")
        time.sleep(0.1)
    return n
"""


@pytest.mark.ray
@pytest.mark.slow
def test_jobs_are_started_watched_and_found_on_a_cluster(cluster, tmp_path):
    (tmp_path / "my_jobs.py").write_text(MODULE)
    (tmp_path / "koan.toml").write_text('[engine]\nnamespace = "test-jobs-command"\n[jobs]\nmodules = ["my_jobs"]\n')
    environment = {"RAY_ADDRESS": cluster, "COLUMNS": "100"}
    nobody = run("jobs", "list", **environment)
    assert (nobody.returncode, "no engine in namespace 'test-jobs-command'" in nobody.stderr) == (4, True)
    try:
        with koan.init(engine={"namespace": "test-jobs-command", "max_actors": 2}):
            done = run("jobs", "submit", "double", "-c", "21", "--wait", "--json", **environment)
            found = json.loads(done.stdout)
            assert (found["status"], found["result"], found["attempts"]) == ("completed", 42, 1), done.stderr
            slow = run("jobs", "submit", "my_jobs:slow", "-c", "60", "--quiet", **environment).stdout.strip()
            watching = subprocess.Popen(
                [*COMMAND, "jobs", "watch", slow], stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
            )
            told = lines_until(watching.stderr, "step")
            assert f"slow {slow}  running  " in told
            watching.send_signal(signal.SIGINT)
            assert "1 job goes on" in watching.communicate(timeout=30)[1]
            assert watching.returncode == 130
            assert "running" in run("jobs", "list", "--status", "running", **environment).stdout
            assert run("jobs", "cancel", slow, **environment).returncode == 0
            assert run("jobs", "watch", slow, **environment).returncode == 1
            shown = json.loads(run("jobs", "show", "--json", slow, **environment).stdout)
            assert (shown["status"], shown["executions"][0]["status"]) == ("cancelled", "cancelled")
    finally:
        end_namespace("test-jobs-command")


def test_without_an_engine_stored_jobs_are_read_from_their_documents(tmp_path, sources):
    """Nothing runs at the address; the document server of this directory is started to be read."""
    assert run("demo", "--runtime", "local", "--path", str(sources)).returncode == 0
    nowhere = {"RAY_ADDRESS": "127.0.0.1:1", "COLUMNS": "100"}
    listed = run("jobs", "list", "--json", "--kind", "Census", **nowhere)
    (census,) = [json.loads(line) for line in listed.stdout.splitlines()]
    assert (census["status"], census["name"]) == ("completed", "census")
    assert "no engine was found" in listed.stderr
    assert "this is read from the documents" in listed.stderr
    assert run("jobs", "list", "--count", "--documents").stdout == "2\n"
    tree = run("jobs", "tree", census["id"], "--documents", COLUMNS="100")
    assert "Announce" in tree.stdout
    assert tree.stderr == ""
    (tried,) = run("jobs", "list", "--quiet", "--kind", "Announce", "--documents").stdout.split()
    assert "ConnectionError" in run("jobs", "executions", "--trace", tried, "--documents").stdout
    assert "ConnectionError" in run("jobs", "show", tried, "--documents").stdout
    assert run("jobs", "show", "0198f0c2-7b7e-7cc2-a1f5-2f1d1e6a9b10", "--documents").returncode == 3
    assert run("jobs", "retry", tried, **nowhere).returncode == 4


@pytest.mark.ray
def test_the_demo_runs_on_ray_and_the_engine_can_be_looked_at_and_ended(cluster, sources):
    done = run("demo", "--path", str(sources), RAY_ADDRESS=cluster, COLUMNS="140")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "60 files," in done.stdout
    try:
        shown = run("status", "--address", cluster, COLUMNS="140")
        assert "ended: " in shown.stdout, shown.stderr
        found = json.loads(run("status", "--address", cluster, "--json").stdout)
        assert found["jobs"]["completed"] >= 1
        assert "ended the engine in namespace 'koan'" in run("down", "--address", cluster).stdout
        gone = run("status", "--address", cluster)
        assert gone.returncode == 4
        assert "no engine in namespace 'koan'" in gone.stderr
    finally:
        end_namespace("koan")


def test_a_wrong_address_or_option_is_told_in_one_line():
    done = run("status", "--address", "127.0.0.1:1")
    assert done.returncode == 4
    assert done.stderr.startswith("koan-ray: no Ray at '127.0.0.1:1'")
    assert len(done.stderr.strip().splitlines()) == 1
    assert run("demo", "--runtime", "moon").returncode == 2
    nothing = run("doctor")
    assert nothing.returncode == 2
    assert nothing.stderr.startswith("koan-ray: sources: no source keeps documents")
