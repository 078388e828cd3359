"""What the benchmarks share: the cluster, statistics, and how a measurement becomes a row."""

from __future__ import annotations

import logging
import os
import platform
import statistics
import time
from dataclasses import dataclass

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


@dataclass
class Row:
    """One line of the table. ``ratio`` is what must and aim are about; higher is better unless ``lower`` is set.

    Without must and aim it is told for comparison only.
    """

    name: str
    ours: str
    reference: str
    ratio: float
    must: float | None = None
    aim: float | None = None
    unit: str = "×"
    lower: bool = False

    @property
    def verdict(self) -> str:
        def reached(limit: float) -> bool:
            return self.ratio <= limit if self.lower else self.ratio >= limit

        if self.must is None or self.aim is None:
            return ""
        return "aim" if reached(self.aim) else "must" if reached(self.must) else "MISSED"


def start_ray(num_cpus: int = 2) -> None:
    import ray

    if not ray.is_initialized():
        ray.init("local", num_cpus=num_cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)


def start_engine(*, max_finished: int = 1_000_000, sources=None, **engine):
    """An engine whose idle actors go at once, so that plain Ray has the CPUs when it is its turn."""
    import koan_ray as koan

    start_ray()
    sections = {"idle_ttl": 3600, "namespace": f"bench-{time.time_ns()}", **engine}
    return koan.init(engine=sections, memory={"max_finished": max_finished}, sources=sources or {})


def end_engine(engine) -> None:
    """End the engine's actors, so that what comes next has the machine."""
    import contextlib

    import ray

    import koan_ray as koan
    from koan_ray.runtime.ray import options

    namespace = engine.settings.engine.namespace
    coordinator = ray.get_actor(options.COORDINATOR_NAME, namespace=namespace)
    ray.get(coordinator.end.remote(), timeout=30)
    koan.shutdown()
    for name in (options.COORDINATOR_NAME, options.BROKER_NAME):
        with contextlib.suppress(ValueError):
            ray.kill(ray.get_actor(name, namespace=namespace))
    until = time.monotonic() + 20
    while ray.available_resources().get("CPU", 0) < ray.cluster_resources()["CPU"] and time.monotonic() < until:
        time.sleep(0.1)


def median(values) -> float:
    return statistics.median(values)


def timed(action) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def plain_tasks_per_second(n: int) -> float:
    """No-op ``ray.remote`` tasks, submitted and gathered."""
    import ray

    @ray.remote
    def plain(x):
        return x

    ray.get([plain.remote(i) for i in range(200)])
    return n / timed(lambda: ray.get([plain.remote(i) for i in range(n)]))


def machine() -> str:
    import ray

    cpus = len(os.sched_getaffinity(0))
    return f"{cpus} cores, Python {platform.python_version()}, Ray {ray.__version__}, {platform.system()}"
