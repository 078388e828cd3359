"""One trace from the driver's span to the bodies on a cluster, received by a collector: OTLP over HTTP, as it comes."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

pytestmark = pytest.mark.ray
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SCRIPT = f"""
import koan_ray as koan
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags


class Pooled(koan.Job[int, int]):
    retry = koan.RetryPolicy(max_attempts=1)

    def execute(self, context, progress, cancellation) -> int:
        with trace.get_tracer("mine").start_as_current_span("inside " + type(self).__name__):
            return 1 // context


class Dedicated(Pooled):
    isolation = koan.Isolation.DEDICATED


class Process(Pooled):
    isolation = koan.Isolation.PROCESS


if __name__ == "__main__":
    koan.init(engine={{"max_actors": 1}})
    here = SpanContext(0x{TRACE}, 0x00f067aa0ba902b7, is_remote=False, trace_flags=TraceFlags(1))
    with trace.use_span(NonRecordingSpan(here)):
        for kind in (Dedicated, Process, Pooled):
            assert kind.start(1).run().get(timeout=60).wait().get(timeout=60) == 1
        job = Pooled.start(0).run().get(timeout=60)
    try:
        job.wait().get(timeout=60)
    except koan.JobFailedError:
        koan.shutdown()  # at once, as a script ends
"""


@pytest.fixture
def collector():
    """A collector on a port of its own; yields its address, and the spans that it has received."""
    received = []

    class Receive(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/v1/traces":
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    names = {each.key: each.value.string_value for each in resource.resource.attributes}
                    received.extend((names["service.name"], span) for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receive) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", received
        server.shutdown()
        thread.join()


def test_spans_of_jobs_arrive_with_the_driver_s_trace_id_whatever_their_isolation(collector, tmp_path, eventually):
    endpoint, received = collector
    (tmp_path / "script.py").write_text(SCRIPT)
    variables = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "OTEL_SERVICE_NAME")}
    done = subprocess.run(
        [sys.executable, "script.py"], capture_output=True, text=True, timeout=100, check=False, cwd=tmp_path,
        env={**variables, "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    wanted = {"job Pooled", "job Dedicated", "job Process", "inside Pooled", "inside Dedicated", "inside Process"}
    eventually(lambda: {span.name for _, span in received} >= wanted, within=10)
    assert {span.trace_id.hex() for _, span in received} == {TRACE}
    assert {name for name, _ in received} == {"koan_ray.job_actor"}
    outer = {span.name.split()[1]: span for _, span in received if span.name.startswith("job ") and span.status.code != 2}
    for _, span in received:
        if span.name.startswith("inside ") and span.status.code != 2:
            assert span.parent_span_id == outer[span.name.split()[1]].span_id
    (failed,) = (span for _, span in received if span.name == "job Pooled" and span.status.code == 2)
    assert [event.name for event in failed.events] == ["exception"]
    assert failed.parent_span_id.hex() == "00f067aa0ba902b7"


def test_a_collector_that_is_not_there_costs_no_job_its_end(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    variables = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "script.py"], capture_output=True, text=True, timeout=100, check=False, cwd=tmp_path,
        env={**variables, "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
