"""Counters and gauges as Prometheus reads them. Ids, names of jobs and callers are never labels.

What the engine counts comes from the coordinator's status at the time of the scrape; what this process counts is its own.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from koan_ray.errors import ConfigurationError, KoanRayError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from koan_ray.web.service import Service

# What the engine's counters are called outside, and what they mean.
_COUNTERS = {
    "fenced": ("koan_ray_fenced_reports", "Reports of executions that were not current, and changed nothing."),
    "fenced_writes": ("koan_ray_fenced_writes", "Writes that a newer writer's had replaced."),
    "crashes": ("koan_ray_executions_lost", "Executions whose process vanished."),
}


async def exposition(api: Service) -> tuple[bytes, str]:
    """Return the text and its media type.

    Raises:
        ConfigurationError: prometheus_client is not installed.
    """
    try:
        from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
    except ImportError:
        msg = "/metrics needs prometheus_client: pip install prometheus-client"
        raise ConfigurationError(msg) from None
    try:
        status: dict[str, Any] | None = await api.status()
        oldest = (await api.figures()).oldest_queued_at
    except KoanRayError:
        status, oldest = None, None
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(list(_families(api, status, oldest))))
    return generate_latest(registry), CONTENT_TYPE_LATEST


class _Collector:
    def __init__(self, families: list[Any]) -> None:
        self._families = families

    def collect(self) -> list[Any]:
        return self._families


def _families(api: Service, status: dict[str, Any] | None, oldest: float | None) -> Iterator[Any]:
    yield _gauge("koan_ray_up", "The coordinator answers.", float(status is not None))
    if status is not None:
        yield from _of_engine(status, oldest)
    yield from _of_process(api)


def _of_engine(status: dict[str, Any], oldest: float | None) -> Iterator[Any]:
    counted = status["jobs"]
    ended = _counter("koan_ray_jobs_ended", "Jobs that have reached a final status.", "status")
    for name in ("completed", "failed", "cancelled"):
        ended.add_metric([name], counted.get(name, 0))
    yield ended
    for name, (metric, text) in _COUNTERS.items():
        yield _counted(metric, text, counted.get(name, 0))
    dispatched = _counter("koan_ray_dispatcher_events", "What the dispatcher has counted.", "event")
    for name, value in sorted(status["counters"].items()):
        dispatched.add_metric([name], value)
    yield dispatched
    for name, text in (
        ("queued", "Jobs that wait for an actor."),
        ("waiting", "Jobs that wait for their due time."),
        ("running", "Executions in progress."),
        ("live", "Jobs that have not ended."),
    ):
        yield _gauge(f"koan_ray_jobs_{name}", text, status[name])
    yield _gauge("koan_ray_actors", "Job actors.", len(status["actors"]))
    yield _gauge(
        "koan_ray_oldest_queued_seconds", "Age of the oldest queued job.", max(0.0, time.time() - oldest) if oldest else 0
    )
    unroutable = _labelled("koan_ray_unroutable", "Stored jobs that wait for the class of their kind.", "type")
    for kind, n in status["unroutable"].items():
        unroutable.add_metric([kind], n)
    yield unroutable
    held = _labelled("koan_ray_source_active", "The coordinator holds the lease of a source.", "source")
    for name, source in status["sources"].items():
        held.add_metric([name], float(source["state"] == "active"))
    yield held


def _of_process(api: Service) -> Iterator[Any]:
    requests = _counter("koan_ray_http_requests", "Requests to this process.", "route", "status")
    denied = _counter("koan_ray_auth_denied", "Requests whose caller was unknown or not allowed.", "route")
    for (name, labels), n in sorted(api.counters.items()):
        if name == "requests":
            requests.add_metric(labels.rsplit(" ", 1), n)
        elif name == "auth_denied":
            denied.add_metric([labels], n)
    yield requests
    yield denied
    yield _gauge("koan_ray_http_streams", "Server-sent event streams that are open.", api.hub.n_streams)
    yield _gauge("koan_ray_http_websockets", "WebSockets that are open.", api.guard.n_sockets)
    yield _counted("koan_ray_http_changes_lost", "Changes that were dropped on their way to readers.", api.hub.n_lost)


def _counter(name: str, text: str, *labels: str) -> Any:
    from prometheus_client.metrics_core import CounterMetricFamily

    return CounterMetricFamily(name, text, labels=labels)


def _labelled(name: str, text: str, *labels: str) -> Any:
    from prometheus_client.metrics_core import GaugeMetricFamily

    return GaugeMetricFamily(name, text, labels=labels)


def _counted(name: str, text: str, value: float) -> Any:
    from prometheus_client.metrics_core import CounterMetricFamily

    return CounterMetricFamily(name, text, value=value)


def _gauge(name: str, text: str, value: float) -> Any:
    from prometheus_client.metrics_core import GaugeMetricFamily

    return GaugeMetricFamily(name, text, value=value)
