"""Logs, traces and metrics.

The OpenTelemetry API is used where the application uses it; the SDK is the application's to configure, or `configure`'s.
Logs go where the application's own logging sends them; `configure_logging` is for processes that have none.
"""

from __future__ import annotations

import os

from koan_ray.errors import ConfigurationError
from koan_ray.telemetry.logs import configure as configure_logging

__all__ = ["configure", "configure_from_environment", "configure_logging"]
_ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


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
    from opentelemetry import metrics, trace
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import ConsoleMetricExporter, MetricReader, PeriodicExportingMetricReader
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SimpleSpanProcessor

    from koan_ray.telemetry.metrics import install

    resource = Resource.create({"service.name": service_name})
    provider, readers = TracerProvider(resource=resource), list[MetricReader]()
    interval_ms = metrics_interval_s * 1000
    if endpoint is not None:
        try:
            from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ImportError:
            msg = "telemetry.configure(endpoint=…) needs the OTLP exporter: pip install 'koan-ray[otlp]'"
            raise ConfigurationError(msg) from None
        base = endpoint.rstrip("/")
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(base + "/v1/traces")))
        exporter = OTLPMetricExporter(base + "/v1/metrics")
        readers.append(PeriodicExportingMetricReader(exporter, export_interval_millis=interval_ms))
    if console:
        provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter()))
        readers.append(PeriodicExportingMetricReader(ConsoleMetricExporter(), export_interval_millis=interval_ms))
    trace.set_tracer_provider(provider)
    if readers:
        metrics.set_meter_provider(MeterProvider(readers, resource=resource))
        install()


def configure_from_environment(service_name: str) -> bool:
    """Set up the SDK in a process of the engine if OTEL_EXPORTER_OTLP_ENDPOINT names a collector; tell whether it does."""
    endpoint = os.environ.get(_ENDPOINT)
    if endpoint:
        configure(os.environ.get("OTEL_SERVICE_NAME", service_name), endpoint=endpoint)
    return bool(endpoint)
