"""Counters and gauges as Prometheus reads them. Ids, names of jobs and callers are never labels.

What the engine counts is what `koan_ray.domain.measures` names, read from coordinator and broker at the time of the scrape,
at most once a second; what this process counts is its own. A counter whose labels are known is there from the start, as 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from koan_ray.domain.measures import INSTRUMENTS
from koan_ray.errors import ConfigurationError, KoanRayError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from koan_ray.domain.measures import Measures
    from koan_ray.web.service import Service

_OF_PROCESS = "auth_denied"  # is counted here and not in the engine


async def exposition(api: Service, routes: Iterable[str]) -> tuple[bytes, str]:
    """Return the text and its media type. ``routes``: all that may deny somebody, which are counted from zero.

    Raises:
        ConfigurationError: prometheus_client is not installed.
    """
    try:
        from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
    except ImportError:
        msg = "/metrics needs prometheus_client: pip install prometheus-client"
        raise ConfigurationError(msg) from None
    try:
        known: tuple[dict[str, Any], Measures] | None = (await api.status(), await api.measures())
    except KoanRayError:
        known = None
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(list(_families(api, known, routes))))
    return generate_latest(registry), CONTENT_TYPE_LATEST


class _Collector:
    def __init__(self, families: list[Any]) -> None:
        self._families = families

    def collect(self) -> list[Any]:
        return self._families


def _families(api: Service, known: tuple[dict[str, Any], Measures] | None, routes: Iterable[str]) -> Iterator[Any]:
    yield _gauge("koan_ray_up", "The coordinator answers.", float(known is not None))
    if known is not None:
        yield from _measured(known[1])
        yield from _of_status(known[0])
    yield from _of_process(api, routes)


def _measured(found: Measures) -> Iterator[Any]:
    """Yield every counter and gauge of the engine's, those without a value as well."""
    for each in INSTRUMENTS:
        if each.type == "histogram" or each.name == _OF_PROCESS:
            continue
        kind, values = (_counter, found.counters) if each.type == "counter" else (_labelled, found.gauges)
        family = kind(f"koan_ray_{each.name}", each.description, *each.labels)
        for (name, labels), value in sorted(values.items()):
            if name == each.name:
                family.add_metric(labels, value)
        yield family


def _of_status(status: dict[str, Any]) -> Iterator[Any]:
    dispatched = _counter("koan_ray_dispatcher_events", "What the dispatcher has counted.", "event")
    for name, value in sorted(status["counters"].items()):
        dispatched.add_metric([name], value)
    yield dispatched
    for name, text in (
        ("queued", "Jobs that wait for an actor."),
        ("waiting", "Jobs that wait for their due time."),
        ("running", "Executions in progress."),
    ):
        yield _gauge(f"koan_ray_jobs_{name}", text, status[name])
    held = _labelled("koan_ray_source_active", "The coordinator holds the lease of a source.", "source")
    for name, source in status["sources"].items():
        held.add_metric([name], float(source["state"] == "active"))
    yield held


def _of_process(api: Service, routes: Iterable[str]) -> Iterator[Any]:
    requests = _counter("koan_ray_http_requests", "Requests to this process.", "route", "status")
    denied = _counter("koan_ray_auth_denied", "Requests whose caller was unknown or not allowed.", "route")
    n_denied = dict.fromkeys(routes, 0)
    for (name, labels), n in sorted(api.counters.items()):
        if name == "requests":
            requests.add_metric(labels.rsplit(" ", 1), n)
        elif name == "auth_denied":
            n_denied[labels] = n
    for route, n in sorted(n_denied.items()):
        denied.add_metric([route], n)
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
