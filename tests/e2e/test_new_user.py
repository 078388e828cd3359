"""All that a new user does, led by what ``koan-ray dev`` prints alone; Ray asks for its token, as it does by default."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from tests.e2e.site import CHROMIUM, browser

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]
COMMAND = [sys.executable, "-m", "koan_ray"]
WITHIN_MS = 30_000
SETTINGS = """
[[archival.policies]]
name = "unlucky"
kinds = ["sample.unlucky"]
older_than = 0
"""


@pytest.fixture
def home():
    """A home, a project and a Ray of our own: nothing that ran before is found. Ray's sockets need a short path."""
    folder = Path(tempfile.mkdtemp(prefix="koan-", dir="/tmp"))
    (folder / "project").mkdir()
    (folder / "project" / "koan.toml").write_text(SETTINGS)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_a_new_user_starts_watches_reads_cancels_archives_and_leaves(home):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "KOAN_RAY_"))}
    environment |= {"HOME": str(home), "RAY_TMPDIR": str(home), "PYTHONPATH": str(Path(__file__).parents[2])}
    project = home / "project"

    def run(*arguments):
        return subprocess.run(
            arguments, cwd=project, env=environment, capture_output=True, text=True, timeout=100, check=False
        )

    dev = subprocess.Popen(
        [*COMMAND, "dev", "--port", "0"], cwd=project, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        told = ""
        for line in dev.stdout:
            told += line
            if "Ctrl-C ends all of it" in line:
                break
        assert "WARNING" not in told, told
        addresses = re.findall(r"^  (http://\S+#token=\S+)$", told, re.MULTILINE)
        assert len(addresses) == 1, told
        assert re.search(r"Ray dashboard   http://\S+  \(its token: ray get-auth-token\)", told), told
        with browser() as chrome:
            walk(chrome, addresses[0])
        # Another terminal is let in by Ray: without what we print, and with it.
        command = " ".join(COMMAND)
        for asked in (f"{command} jobs list --json", f". .koan/env && {command} jobs list --json"):
            listed = run("sh", "-c", asked)
            assert listed.stdout.count('"kind": "sample.') == 1, listed.stdout + listed.stderr
            assert "read from the documents" not in listed.stderr
        shown = run("sh", "-c", f". .koan/env && {command} status")
        assert "1 cancelled" in shown.stdout, shown.stdout + shown.stderr
        below = psutil.Process(dev.pid).children(recursive=True)
        dev.send_signal(signal.SIGINT)
        output, _ = dev.communicate(timeout=60)
    finally:
        dev.kill()
        dev.wait()
    assert dev.returncode == 0, output
    assert "Ended. What was kept is still there." in output
    assert psutil.wait_procs(below, timeout=10)[1] == []


def walk(chrome, address):
    page = chrome.new_page()
    page.set_default_timeout(WITHIN_MS)
    page.goto(address)
    page.locator(".who", has_text="the printed token").wait_for()

    start(page, "sample.unlucky", Failures="9")
    page.locator(".attempt.is-failed", has_text="Attempt 1").wait_for()
    page.locator(".page-head .badge", has_text="failed").wait_for()
    trace = page.get_by_role("region", name="Stack trace of attempt 3")
    assert "raise PrinterError(msg)" in trace.inner_text()
    page.get_by_role("button", name="Retry").click()
    page.get_by_role("button", name="Run again").click()
    page.locator(".crumbs", has_text="Runs anew").wait_for()
    page.locator(".page-head .badge", has_text="failed").wait_for()

    start(page, "sample.countdown", Steps="10000")
    page.locator(".job-progress", has_text="step 3").wait_for()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Cancel the job").click()
    page.locator(".page-head .badge", has_text="cancelled").wait_for()

    page.get_by_role("link", name="Archive", exact=True).click()
    page.get_by_role("button", name="Archive what is due").click()
    page.get_by_role("button", name="Count them").click()
    page.get_by_role("button", name="Archive 2 jobs").click()
    page.get_by_role("link", name="sample.unlucky").first.click()
    page.locator(".page-head .tag", has_text="archived").wait_for()
    page.close()


def start(page, kind, **context):
    page.get_by_role("link", name="Kinds", exact=True).click()
    page.get_by_role("link", name=f"Start {kind}").click()
    for name, value in context.items():
        page.get_by_label(name, exact=True).fill(value)
    page.get_by_role("button", name="Start the job").click()
    page.locator("h1", has_text=kind).wait_for()
