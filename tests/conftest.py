"""Helpers of all tests."""

from __future__ import annotations

import logging
import os
import time
from typing import TYPE_CHECKING

import pytest

import koan_ray as koan

if TYPE_CHECKING:
    from collections.abc import Callable

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def eventually(condition: Callable[[], object], *, within: float = 10.0) -> object:
    """Return the first true value of ``condition``; fail after ``within`` seconds."""
    until = time.monotonic() + within
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > until:
            pytest.fail(f"still {value!r} after {within:g} s")
        time.sleep(0.02)


@pytest.fixture(name="eventually")
def eventually_fixture() -> Callable[..., object]:
    return eventually


@pytest.fixture(scope="session")
def cluster():
    """One local Ray for the whole run; its address."""
    import ray

    ray.init(
        "local", num_cpus=2, resources={"licence": 1}, include_dashboard=False, log_to_driver=False,
        logging_level=logging.ERROR,
    )  # fmt: skip
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture
def local_engine():
    """The engine inside this process, with two job actors."""
    with koan.init(runtime="local", engine={"max_actors": 2, "cancel_grace": 0.2}) as engine:
        yield engine
