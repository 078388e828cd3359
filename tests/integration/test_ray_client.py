"""A driver outside of the cluster, through a real Ray Client server: `koan.init("ray://…")`."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.integration.conftest import end_namespace

NAMESPACE = "test-ray-client"
DRIVER = f"""
import signal, sys
import koan_ray as koan

class Twice(koan.Job[int, int]):
    def execute(self, context, progress, cancellation) -> int:
        progress.report(0.5, "half")
        return 2 * context

class FailsOnce(koan.Job[None, str]):
    retry = koan.RetryPolicy(max_attempts=1)

    def execute(self, context, progress, cancellation) -> str:
        raise ConnectionError("down")

with koan.init(sys.argv[1], engine={{"namespace": {NAMESPACE!r}, "max_actors": 2}}):
    for n in range(3):
        job = Twice.start(n).run().get(timeout=40)
        handled = []
        with job.on_progress(handled.append):
            assert job.wait().get(timeout=40) == 2 * n
        jobs = Twice.start_many(range(20)).run().get(timeout=40)
        assert [each.wait().get(timeout=40) for each in jobs] == [2 * m for m in range(20)]
        assert [update.status for update in jobs[0].progress_stream().blocking()][-1] == "completed"
        print("round", n, flush=True)
    failed = FailsOnce.start(None).run().get(timeout=40)
    try:
        failed.wait().get(timeout=40)
    except koan.JobFailedError as error:
        print(str(error).rpartition(" ")[2], flush=True)
    if sys.argv[2] == "waits":
        print("waiting", flush=True)
        Twice.start(1).delayed(600).run().get(timeout=40).wait().get()
print("end", flush=True)
"""


@pytest.fixture(scope="module")
def address(cluster):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [
            sys.executable, "-m", "ray.util.client.server", "--address", cluster, "--host", "127.0.0.1",
            "--port", str(port), "--mode", "legacy",
        ],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        until = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert server.poll() is None
                assert time.monotonic() < until
                time.sleep(0.1)
        yield f"ray://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait(20)
        end_namespace(NAMESPACE)


@pytest.fixture
def drive(address, tmp_path):
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    started = []

    def start(what):
        started.append(
            subprocess.Popen([sys.executable, str(script), address, what], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
        )
        return started[-1]

    yield start
    for driver in started:
        driver.kill()
        driver.wait(20)
        driver.stdout.close()


@pytest.mark.slow
def test_rounds_of_jobs_through_a_ray_client_come_to_their_ends(drive):
    out, _ = drive("ends").communicate(timeout=100)
    assert out.splitlines() == ["round 0", "round 1", "round 2", "down", "end"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_driver_that_waits_through_a_ray_client_ends_with_a_signal(drive, number):
    driver = drive("waits")
    for line in driver.stdout:
        if line == "waiting\n":
            break
    time.sleep(0.5)
    began = time.monotonic()
    driver.send_signal(number)
    assert driver.wait(20) != 0
    assert time.monotonic() - began < 8
