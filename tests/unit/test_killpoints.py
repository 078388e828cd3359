"""Named places where a process can be killed."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import timeit
from pathlib import Path

import pytest

import koan_ray
from koan_ray.errors import ConfigurationError
from koan_ray.killpoints import NAMES, armed, killpoint

PASSES = """
from koan_ray.killpoints import killpoint
for n in range(1, 6):
    print(n, flush=True)
    killpoint('dispatch.sent')
"""


def run(**environment):
    """Pass one killpoint five times in another process; returns how often it got there, and how it ended."""
    ended = subprocess.run([sys.executable, "-c", PASSES], env=environment, capture_output=True, text=True, check=False)
    return len(ended.stdout.split()), ended.returncode, ended.stderr


def test_every_name_is_in_the_code_and_every_killpoint_in_the_code_has_a_name():
    sources = Path(koan_ray.__file__).parent.rglob("*.py")
    found = re.findall(r"(?<!def )\bkillpoint\(\s*\"([^\"]+)\"", "\n".join(source.read_text() for source in sources))
    assert set(found) == set(NAMES)


def test_the_process_is_killed_when_it_passes_for_the_nth_time():
    assert run(KOAN_RAY_KILL="dispatch.sent")[:2] == (1, -signal.SIGKILL)
    assert run(KOAN_RAY_KILL="dispatch.sent:3")[:2] == (3, -signal.SIGKILL)
    assert run(KOAN_RAY_KILL="dispatch.sent:6")[:2] == (5, 0)
    assert run(KOAN_RAY_KILL="dispatch.decided")[:2] == (5, 0)
    assert run()[:2] == (5, 0)


def test_the_next_process_with_the_same_environment_lives(tmp_path):
    marker = tmp_path / "marker"
    environment = {"KOAN_RAY_KILL": "dispatch.sent:2", "KOAN_RAY_KILL_ONCE": str(marker)}
    assert run(**environment)[:2] == (2, -signal.SIGKILL)
    assert marker.read_text().split()[1] == "dispatch.sent"
    assert run(**environment)[:2] == (5, 0)


@pytest.mark.parametrize("asked", ["dispatch", "dispatch.sent:0", "dispatch.sent:x", "dispatch.sent:-1", ":2"])
def test_a_setting_that_would_never_fire_is_refused(asked):
    with pytest.raises(ConfigurationError, match="KOAN_RAY_KILL"):
        armed({"KOAN_RAY_KILL": asked})


def test_unset_it_costs_no_more_than_a_call_of_an_empty_function():
    def empty(_name):
        pass

    def cost(function):
        return min(timeit.repeat(lambda: function("dispatch.sent"), number=20_000, repeat=7))

    assert cost(killpoint) < 3 * cost(empty)
