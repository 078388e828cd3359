"""Every example is run as a user would run it, and prints what it says it does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.conftest import end_namespace

pytestmark = pytest.mark.ray
FOLDER = Path(__file__).parents[2] / "examples"
EXPECTED = {
    "01_quickstart.py": ["completed: sent=True", "refused: ['body']"],
    "02_retry.py": ["attempt 3: succeeded", "failed after 1 attempt: non_retryable"],
    "03_custom_retry.py": ["answered", "waited 0.", "not retried: 1 attempt, PermissionError"],
    "04_recipe.py": ["photos saved for u1", "{'module': 'Backups', 'user_id': 'u1'}"],
    "05_progress.py": ["[running]", "[completed]", "imported 150 rows, a handler saw several updates"],
    "06_parent_child.py": ["sum: 285", "10 children"],
    "07_function_job.py": ["{'to': 2, 'be': 2, 'or': 1, 'not': 1}", "slow-hello -> hello world"],
    "08_inside_a_ray_task.py": ["[[5, 10, 15], [20]]", "50"],
    "09_plain_script.py": ["slept 0.1 s", "still asleep", "cancelled: that was long enough", "1000 jobs in"],
    "10_notebook.py": ["awaited: 42", "blocked: 8", "redefined: 800", "shown: completed", "last state: completed"],
    "11_persist.py": [
        "0 invoices from earlier runs",
        "sums: [119, 15, 59]",
        "tenant 7: [15, 119]",
        "attempt 1: failed the bank is closed",
        "attempt 2: succeeded",
    ],
    "12_items.py": [
        "a new job",
        "killed the job actor",
        "killed the lead",
        "killed the coordinator",
        "every item is accounted for",
        "item 12345 ended its process",
    ],
}


@pytest.fixture(scope="module")
def address(cluster):
    yield cluster
    end_namespace("koan")
    for namespace in ("invoices", "items"):  # their document servers have ended with the scripts
        end_namespace(namespace, within=2.0)


def test_every_example_is_checked():
    assert sorted(EXPECTED) == sorted(path.name for path in FOLDER.glob("*.py"))


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_example(address, name, tmp_path):
    environment = {**os.environ, "RAY_ADDRESS": address}
    done = subprocess.run(
        [sys.executable, str(FOLDER / name)],
        capture_output=True,
        text=True,
        timeout=90,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for line in EXPECTED[name]:
        assert line in done.stdout, done.stdout + done.stderr
