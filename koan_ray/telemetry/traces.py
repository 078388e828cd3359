"""One trace from submit to the last child: the context current at `run` goes with the job and is restored around it.

OpenTelemetry is not imported before the application has done so: where nobody traces, this costs a dictionary lookup.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from koan_ray.ports import Order

_TRACER = "koan_ray"


def current() -> tuple[str | None, str | None]:
    """Return ``(trace id, traceparent)`` of the span that is current here; ``(None, None)`` without one."""
    if "opentelemetry.trace" not in sys.modules:
        return None, None
    from opentelemetry import trace

    span = trace.get_current_span().get_span_context()
    if not span.is_valid:
        return None, None
    trace_id = f"{span.trace_id:032x}"
    return trace_id, f"00-{trace_id}-{span.span_id:016x}-{span.trace_flags:02x}"


@contextmanager
def attempt_span(order: Order, kind: str) -> Iterator[None]:
    """Make the submitter's context current and open a span for one attempt; the body's error is recorded on it."""
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, Any] = {"traceparent": order.particulars.traceparent}
    attributes: dict[str, str | int] = {
        "koan.job.id": order.job_id,
        "koan.job.kind": kind,
        "koan.execution.id": order.execution_id,
        "koan.attempt": order.attempt,
    }
    with trace.get_tracer(_TRACER).start_as_current_span(
        f"job {kind}",
        context=TraceContextTextMapPropagator().extract(carrier),
        kind=trace.SpanKind.CONSUMER,
        attributes=attributes,
    ):
        yield
