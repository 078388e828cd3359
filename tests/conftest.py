"""Helpers of all tests."""

from __future__ import annotations

import logging
import os
import signal
import time
from typing import TYPE_CHECKING

import pytest

import koan_ray as koan
from koan_ray import registry

if TYPE_CHECKING:
    from collections.abc import Callable

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all that use the cluster: `make test` has them in a process of their own, beside the others."""
    for item in items:
        if "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.ray)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    """Import each module of tests as if it were the only one: several have a class of one name, and so of one kind."""
    before = dict(registry._by_kind)
    if isinstance(collector, pytest.Module):
        for kind, job_type in before.items():
            if job_type.__module__.rpartition(".")[2].startswith("test_"):
                del registry._by_kind[kind]
    report = yield
    registry._by_kind.update(before | registry._by_kind)
    return report


def eventually(condition: Callable[[], object], *, within: float = 30.0) -> object:
    """Return the first true value of ``condition``; fail after ``within`` seconds: a safety net, not a promise."""
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


@pytest.fixture(scope="module", autouse=True)
def kinds_of_module(request: pytest.FixtureRequest):
    """Let tests find the job classes of their own module, and not those that another one has given the same kind.

    All modules are imported before the first test begins, in the order in which they were collected.
    """
    before, name = dict(registry._by_kind), request.module.__name__
    for kind, job_type in before.items():
        its, _, last = job_type.__module__.rpartition(".")
        is_of_other_tests = its == "tests.hostile" != name.rpartition(".")[0]
        if job_type.__module__ != name and (last.startswith("test_") or is_of_other_tests):
            del registry._by_kind[kind]
    for each in vars(request.module).values():
        if isinstance(each, type) and issubclass(each, koan.Job) and "definition" in vars(each) and each.definition.has_body:
            registry._by_kind[each.kind] = each
    yield
    _restore(before)


@pytest.fixture(autouse=True)
def kinds_of_test(kinds_of_module):
    """Forget the job classes that a test has defined."""
    before = dict(registry._by_kind)
    yield
    _restore(before)


@pytest.fixture(autouse=True)
def handlers_of_signals():
    """Give the run its Ctrl-C back: a command that was ended by one keeps it, because its process ends."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def logging_of_our_own():
    """Forget how a command that was run in this process has set up its logging."""
    logger = logging.getLogger("koan_ray")
    before = list(logger.handlers), logger.level
    yield
    logger.handlers[:], level = before
    if logger.level != level:
        logger.setLevel(level)


def _restore(before: dict[str, type[koan.Job]]) -> None:
    registry._by_kind.clear()
    registry._by_kind.update(before)
    registry._refuses = True


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
