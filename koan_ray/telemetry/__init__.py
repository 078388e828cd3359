"""Logs, traces and metrics.

The OpenTelemetry API is used where the application uses it; the SDK is the application's to configure, or `configure`'s.
Logs go where the application's own logging sends them; `configure_logging` is for processes that have none.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from koan_ray.errors import ConfigurationError
from koan_ray.telemetry import logs
from koan_ray.telemetry.logs import configure as configure_logging

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["configure", "configure_from_environment", "configure_logging", "flush", "follow", "in_force"]
_ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


class Export(NamedTuple):
    """Where this process sends spans."""

    service_name: str
    endpoint: str | None
    console: bool = False


_in_force: Export | None = None


def configure(
    service_name: str = "koan_ray", *, endpoint: str | None = None, console: bool = False, metrics_interval_s: float = 15.0
) -> None:
    """Set up the OpenTelemetry SDK for this process: an application that does that itself does not need this.

    Args:
        service_name: As in OpenTelemetry's ``service.name``.
        endpoint: Base URL of an OTLP/HTTP collector; needs ``pip install 'koan-ray[otlp]'``.
        console: Print spans and metrics.
        metrics_interval_s: How often metrics are collected.

    Raises:
        ConfigurationError: ``endpoint`` is given and the exporter is not installed.
    """
    export = Export(service_name, endpoint, console)
    _trace(export, is_ours=False)
    _meter(export, metrics_interval_s)


def configure_from_environment(service_name: str, *, measures: bool = True) -> bool:
    """Set up the SDK in a process of the engine if OTEL_EXPORTER_OTLP_ENDPOINT names a collector; tell whether it does.

    A provider that is there already, such as one of a job's own environment, is left alone. What cannot be set up is a
    warning in the log: an engine without traces is better than none. ``measures``: send metrics as well.
    """
    endpoint = os.environ.get(_ENDPOINT)
    if not endpoint:
        return False
    export = Export(os.environ.get("OTEL_SERVICE_NAME", service_name), endpoint)

    def set_up() -> None:
        _trace(export, is_ours=True)
        if measures:
            _meter(export, 15.0)

    return _tried(set_up)


def in_force() -> Export | None:
    """Return where this process was told to send spans; None if it was not told, or not by us."""
    return _in_force


def follow(export: Export | None) -> bool:
    """Send spans to where the parent of this process does, and tell whether it does."""
    return export is not None and _tried(lambda: _trace(export, is_ours=True))


def flush(timeout_s: float = 1.0) -> None:
    """Send the spans that have ended, before this process is ended; gives up after a while."""
    if _in_force is None:
        return
    from opentelemetry import trace

    force: Any = getattr(trace.get_tracer_provider(), "force_flush", None)
    if force is not None:
        # Aside: some processors take as long as the collector does, whatever they are told.
        flushing = threading.Thread(target=force, args=(int(timeout_s * 1000),), name="koan-flush", daemon=True)
        flushing.start()
        flushing.join(timeout_s)


def _tried(set_up: Callable[[], object]) -> bool:
    try:
        set_up()
    except Exception as error:  # noqa: BLE001 - an SDK of another version, an exporter that is not there, a wrong URL
        logs.get_logger().warning("telemetry_not_configured", problem=f"{type(error).__name__}: {error}")
        return False
    return True


def _trace(export: Export, *, is_ours: bool) -> None:
    """Set the tracer provider; ``is_ours``: of a process of the engine, which may be ended at any time."""
    global _in_force  # noqa: PLW0603 - OpenTelemetry's provider is one a process
    from opentelemetry import trace
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SimpleSpanProcessor

    if is_ours and not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        _in_force = _in_force or export
        return
    provider = TracerProvider(resource=Resource.create({"service.name": export.service_name}))
    if export.endpoint is not None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ImportError:
            raise _no_exporter() from None
        exporter = OTLPSpanExporter(export.endpoint.rstrip("/") + "/v1/traces")
        if is_ours:
            from koan_ray.telemetry.exports import PromptProcessor

            provider.add_span_processor(PromptProcessor(exporter))
        else:
            provider.add_span_processor(BatchSpanProcessor(exporter))
    if export.console:
        provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter()))
    trace.set_tracer_provider(provider)
    _in_force = export


def _meter(export: Export, interval_s: float) -> None:
    """Set the meter provider, and install our instruments."""
    from opentelemetry import metrics
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import ConsoleMetricExporter, MetricReader, PeriodicExportingMetricReader
    from opentelemetry.sdk.resources import Resource

    from koan_ray.telemetry.metrics import install

    readers = list[MetricReader]()
    interval_ms = interval_s * 1000
    if export.endpoint is not None:
        try:
            from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        except ImportError:
            raise _no_exporter() from None
        exporter = OTLPMetricExporter(export.endpoint.rstrip("/") + "/v1/metrics")
        readers.append(PeriodicExportingMetricReader(exporter, export_interval_millis=interval_ms))
    if export.console:
        readers.append(PeriodicExportingMetricReader(ConsoleMetricExporter(), export_interval_millis=interval_ms))
    if readers:
        resource = Resource.create({"service.name": export.service_name})
        metrics.set_meter_provider(MeterProvider(readers, resource=resource))
        install()


def _no_exporter() -> ConfigurationError:
    return ConfigurationError("telemetry.configure(endpoint=…) needs the OTLP exporter: pip install 'koan-ray[otlp]'")
