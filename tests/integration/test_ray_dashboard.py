"""Our page inside a real Ray dashboard, and a Ray dashboard with a broken page of ours."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import ray

from koan_ray.runtime.ray.dashboard import installation
from tests.e2e.site import CHROMIUM, browser

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
HOSTILE = "<img src=x onerror=\"document.title='pwned'\">"
SCRIPT = f"""
import sys, time
import ray
import koan_ray as koan

@koan.job(kind="fine")
def fine(n: int) -> int:
    return n

@koan.job(kind="broken", retry=koan.RetryPolicy(max_attempts=1))
def broken(n: int) -> int:
    raise ValueError({HOSTILE!r})

@koan.job(kind="long")
def long(n: int, progress: koan.JobProgress) -> int:
    progress.report(0.42, "on its way")
    time.sleep(300)
    return n

with koan.init(engine={{"namespace": "seen", "max_actors": 2}}):
    fine.start(1).named({HOSTILE!r}).with_metadata(secret="no secret").run().get(60).wait().get(60)
    failed = broken.start(7).with_metadata(number=2**53 + 1, share=1.0, word="1.0").run().get(60)
    try:
        failed.wait().get(60)
    except koan.JobFailedError:
        pass
    running = long.start(1).run().get(60)
    while running.refresh().get(60).progress < 0.4:
        time.sleep(0.1)
    print("READY", failed.id, running.id, flush=True)
    sys.stdin.read()
"""
START = """
import ray
started = ray.init(num_cpus=2, include_dashboard=True, dashboard_port=0, log_to_driver=False)
print("DASHBOARD", started.dashboard_url, flush=True)
"""


def ray_of_our_own(place: Path) -> Path:
    """Make an importable Ray of links to the installed one, whose dashboard's modules are a folder of its own."""

    def link(real: Path, mine: Path, inner: list[str]) -> None:
        mine.mkdir(parents=True)
        for each in real.iterdir():
            if inner and each.name == inner[0]:
                link(each, mine / each.name, inner[1:])
            elif each.name != "__pycache__":
                (mine / each.name).symlink_to(each)

    link(Path(ray.__path__[0]), place / "ray", ["dashboard", "modules"])
    return place / "ray" / "dashboard" / "modules"


class Driver:
    """A process that starts a Ray with a dashboard, and what it has told."""

    def __init__(self, code: str, *path: Path, folder: Path, auth_mode: str = "disabled") -> None:
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        environment |= {
            "PYTHONPATH": os.pathsep.join(map(str, path)),
            "RAY_TMPDIR": str(folder),
            "RAY_AUTH_MODE": auth_mode,
            "HOME": str(folder),  # where Ray keeps its token
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", START + code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.told = self.line("DASHBOARD")
        self.url = f"http://{self.told.split()[1]}"

    def line(self, begin: str) -> str:
        for line in self.process.stdout:
            if line.startswith(begin):
                return line
        raise AssertionError(f"the driver ended with {self.process.wait()} before it told {begin}")

    def get(self, path: str):
        try:
            with urllib.request.urlopen(self.url + path, timeout=30) as answer:
                return answer.status, dict(answer.headers), answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, dict(error.headers), error.read().decode()

    def ask(self, path: str):
        status, _, text = self.get(path)
        return status, json.loads(text)

    def end(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(30)
        finally:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()


@pytest.fixture(scope="module")
def short_folder():
    """Ray's sockets need a short path."""
    folder = Path(f"/tmp/koan-{os.getpid()}")
    folder.mkdir()
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def driver(tmp_path_factory, short_folder):
    site = tmp_path_factory.mktemp("site")
    installation.install(ray_of_our_own(site))
    driver = Driver(SCRIPT, site, ROOT, folder=short_folder)
    driver.failed, driver.running = driver.line("READY").split()[1:]
    yield driver
    driver.end()


def test_jobs_are_listed_with_their_progress(driver):
    assert driver.ask("/api/koan/engines") == (200, {"engines": ["seen"]})
    status, found = driver.ask("/api/koan/jobs?engine=seen")
    assert status == 200
    assert [(job["kind"], job["status"]) for job in found["jobs"]] == [
        ("long", "running"), ("broken", "failed"), ("fine", "completed"),
    ]  # fmt: skip
    assert (found["jobs"][0]["progress"], found["jobs"][0]["progress_message"]) == (0.42, "on its way")
    assert found["counts"] == {"queued": 0, "running": 1, "completed": 1, "failed": 1, "cancelled": 0}
    _, failed = driver.ask("/api/koan/jobs?engine=seen&status=failed,cancelled&limit=1")
    assert ([job["id"] for job in failed["jobs"]], failed["cursor"]) == ([driver.failed], None)


def test_one_job_is_told_with_its_trace_and_without_its_payloads(driver):
    status, job = driver.ask(f"/api/koan/jobs/{driver.failed}?engine=seen")
    assert status == 200
    assert "ValueError" in job["error"]["stack_trace"]
    assert [one["status"] for one in job["executions"]] == ["failed"]
    assert not {"context", "result"} & job.keys()


def test_wrong_questions_are_answered_with_what_is_wrong(driver):
    no_such = "0198f0c2-7b7e-7cc2-a1f5-2f1d1e6a9b10"
    for path, status, told in (
        (f"/api/koan/jobs/{no_such}?engine=seen", 404, "not found"),
        ("/api/koan/jobs/x?engine=seen", 404, "An id is a UUID in lower case"),
        ("/api/koan/jobs?engine=seen&status=sleeping", 400, "expected one or several of"),
        ("/api/koan/jobs?engine=seen&limit=100000", 400, "from 1 to 200"),
        ("/api/koan/jobs?engine=seen&metadata=x", 400, "unknown filter 'metadata'"),
        ("/api/koan/jobs?engine=seen&cursor=zzz", 400, "does not belong to a query"),
        ("/api/koan/jobs?engine=nobody", 503, "no engine in namespace 'nobody'"),
    ):
        found, problem = driver.ask(path)
        assert (found, problem["status"], told in problem["title"]) == (status, status, True), problem


def test_nothing_but_reading_is_answered(driver):
    request = urllib.request.Request(driver.url + "/api/koan/jobs?engine=seen", method="DELETE")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=30)
    assert refused.value.code in (403, 405)
    refused.value.close()


def test_the_page_is_served_with_a_strict_policy(driver):
    for path, kind in (("/koan", "text/html"), ("/koan/koan.js", "text/javascript"), ("/koan/koan.css", "text/css")):
        status, headers, text = driver.get(path)
        assert (status, headers["Content-Type"]) == (200, f"{kind}; charset=utf-8")
        assert "script-src 'self'" in headers["Content-Security-Policy"]
        assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|eval\(|https?://", text)
    assert driver.get("/api/version")[0] == 200


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium: apt-get install chromium")
def test_a_browser_shows_jobs_live_and_runs_nothing_of_theirs(driver, tmp_path):
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path}",
        "--virtual-time-budget=8000", "--dump-dom", f"{driver.url}/koan?engine=seen&job={driver.failed}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    page = done.stdout
    assert "<title>Jobs · koan-ray</title>" in page, done.stderr
    assert "number=9007199254740993, share=1.0, word=1.0" in page
    for text in ("42 %", "on its way", "ValueError", driver.running, "&lt;img src=x onerror="):
        assert text in page
    assert "<img" not in page


GUARDED = f"""
import sys
import koan_ray as koan

@koan.job(kind="broken", retry=koan.RetryPolicy(max_attempts=1))
def broken(n: int) -> int:
    raise ValueError({HOSTILE!r})

with koan.init(engine={{"namespace": "seen", "max_actors": 1}}):
    failed = broken.start(7).run().get(60)
    try:
        failed.wait().get(60)
    except koan.JobFailedError:
        pass
    print("READY", failed.id, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def guarded(tmp_path, short_folder):
    """A dashboard that asks for Ray's token."""
    site = tmp_path / "site"
    installation.install(ray_of_our_own(site))
    driver = Driver(GUARDED, site, ROOT, folder=short_folder, auth_mode="token")
    driver.failed = driver.line("READY").split()[1]
    yield driver
    driver.end()


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_behind_rays_token_nothing_is_shown_before_one_signs_in_and_all_of_it_afterwards(guarded, short_folder):
    for path in (
        "/koan",
        "/koan/koan.js",
        "/api/koan/engines",
        "/api/koan/jobs?engine=seen",
        f"/api/koan/jobs/{guarded.failed}",
    ):
        status, _, text = guarded.get(path)
        assert (status, guarded.failed in text, "seen" in text) == (401, False, False), path
    token = (short_folder / ".ray" / "auth_token").read_text().strip()
    with browser() as chrome:
        page = chrome.new_page()
        page.set_default_timeout(30_000)
        assert page.goto(f"{guarded.url}/koan").status == 401
        page.goto(guarded.url)
        page.locator("[role=dialog] input[type=password]").fill(token)
        page.locator("[role=dialog]").get_by_role("button", name="Submit").click()
        page.wait_for_function("fetch('/api/koan/engines').then((answer) => answer.ok)")
        page.goto(f"{guarded.url}/koan?engine=seen")
        page.locator("#rows tr", has_text="broken").click()
        page.locator("#about pre", has_text="ValueError").wait_for()
        page.context.clear_cookies()  # as when one has signed out
        page.locator("#state.bad", has_text="Sign in to the Ray dashboard first").wait_for()


BROKEN = {
    "an error of its import": "raise RuntimeError('broken')",
    "a missing dependency": "import no_such_module_anywhere",
    "an exit": "raise SystemExit(3)",
    "no such module": None,
}


@pytest.mark.parametrize("code", BROKEN.values(), ids=BROKEN)
def test_a_broken_page_never_keeps_rays_dashboard_from_starting(tmp_path, short_folder, code):
    site = tmp_path / "site"
    installation.install(ray_of_our_own(site))
    package = tmp_path / "broken" / "koan_ray"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(code or "")
    driver = Driver("import sys; sys.stdin.read()\n", site, tmp_path / "broken", folder=short_folder)
    try:
        assert driver.get("/api/version")[0] == 200
        until = time.monotonic() + 20
        while driver.get("/nodes?view=summary")[0] != 200 and time.monotonic() < until:
            time.sleep(0.2)
        assert driver.ask("/nodes?view=summary")[1]["result"] is True
        assert driver.get("/api/koan/engines")[0] == 404
    finally:
        driver.end()
