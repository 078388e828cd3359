"""Logs and traces.

The OpenTelemetry API is used where the application uses it; the SDK is the application's to configure, or `configure`'s.
"""

from __future__ import annotations

from koan_ray.errors import ConfigurationError


def configure(service_name: str = "koan_ray", *, endpoint: str | None = None, console: bool = False) -> None:
    """Set up the OpenTelemetry SDK for this process: an application that does that itself does not need this.

    Args:
        service_name: As in OpenTelemetry's ``service.name``.
        endpoint: Base URL of an OTLP/HTTP collector; needs ``pip install 'koan-ray[otlp]'``.
        console: Print spans.

    Raises:
        ConfigurationError: ``endpoint`` is given and the exporter is not installed.
    """
    from opentelemetry import trace
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SimpleSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": service_name}))
    if endpoint is not None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ImportError:
            msg = "telemetry.configure(endpoint=…) needs the OTLP exporter: pip install 'koan-ray[otlp]'"
            raise ConfigurationError(msg) from None
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint.rstrip("/") + "/v1/traces")))
    if console:
        provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter()))
    trace.set_tracer_provider(provider)
