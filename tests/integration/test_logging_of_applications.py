"""koan_ray in somebody's application: its own logging decides, and is not touched."""

from __future__ import annotations

import subprocess
import sys

import pytest

APPLICATION = """
import logging, sys
{setup}
before = list(logging.getLogger().handlers), logging.getLogger().level
import koan_ray as koan
from koan_ray.telemetry import logs

@koan.job
def greet(name: str) -> str:
    return "hello " + name

with koan.init(runtime="local"):
    assert greet.start("you").run().get().wait().get(timeout=20) == "hello you"
    logs.get_logger().warning("from_the_engine", n=1)
    logs.get_logger().info("not_shown")
    logging.getLogger("koan_ray.progress").warning("from_progress")
assert (list(logging.getLogger().handlers), logging.getLogger().level) == before
assert logging.getLogger("koan_ray").handlers == []
assert logging.getLogger("koan_ray").propagate
"""


@pytest.mark.parametrize(
    ("setup", "shown"),
    [
        ("", ["from_the_engine n=1", "from_progress"]),
        ("logging.basicConfig(format='APP %(message)s')", ["APP from_the_engine n=1", "APP from_progress"]),
        ("logging.getLogger('koan_ray').setLevel('CRITICAL')", []),
    ],
    ids=["none", "basicConfig", "silenced"],
)  # fmt: skip
def test_an_application_s_own_logging_is_not_touched(setup, shown):
    done = subprocess.run(
        [sys.executable, "-c", APPLICATION.format(setup=setup)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == shown
