"""Sends spans from the processes of the engine soon after they have ended, because those are ended without a warning.

The SDK's batch processor gathers for five seconds, and its flush takes as long as the collector does. A job actor is killed
when it has been idle, when its job was the only one it was made for, or with its cluster, and what it holds is gone. So the
first span of a while goes at once, later ones together every `_PACE_S`; nothing wakes up in between, and no call waits for
longer than it says. What cannot be sent is dropped and counted, never kept without bound.

Importing this imports the SDK and, where it is installed, the exporter: once, for all children of a process.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Final

from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace.export import SpanExportResult

from koan_ray.telemetry import logs

with contextlib.suppress(ImportError):
    import opentelemetry.exporter.otlp.proto.http.trace_exporter  # noqa: F401 - so that a forked child has it

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter

_PACE_S: Final = 0.2
_BATCH: Final = 512  # spans of one request
_KEPT: Final = 2048  # spans that may wait; above this the oldest are dropped


class PromptProcessor(SpanProcessor):
    """Hands spans to an exporter on a thread of its own, which begins with the first span."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._lock = threading.Condition()
        self._waiting: deque[ReadableSpan] = deque(maxlen=_KEPT)
        self._n_ended = self._n_sent = 0  # sent or given up
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        self._has_failed = False

    def on_end(self, span: ReadableSpan) -> None:
        """Take a span that has ended."""
        if not span.context.trace_flags.sampled or os.getpid() != self._pid:
            return  # a copy of this process, which a body has made, has no thread of ours
        with self._lock:
            self._waiting.append(span)
            self._n_ended += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="koan-spans", daemon=True)
                self._thread.start()
            self._lock.notify_all()

    def shutdown(self) -> None:
        """Send what there is; called by the SDK at the interpreter's end."""
        self.force_flush(1000)

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Return when what has ended by now is sent or given up, and whether that was so in time."""
        with self._lock:
            awaited = self._n_ended
            return self._thread is None or self._lock.wait_for(lambda: self._n_sent >= awaited, timeout_millis / 1000)

    def _run(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: bool(self._waiting))
                n_until = self._n_ended - max(0, len(self._waiting) - _BATCH)
                batch = [self._waiting.popleft() for _ in range(min(_BATCH, len(self._waiting)))]
            began = time.monotonic()
            self._send(batch)
            with self._lock:
                self._n_sent = n_until
                self._lock.notify_all()
                is_behind = len(self._waiting) >= _BATCH
            if not is_behind:
                time.sleep(max(0.0, _PACE_S - (time.monotonic() - began)))

    def _send(self, batch: list[ReadableSpan]) -> None:
        problem = "the collector did not take them"
        try:
            if self._exporter.export(batch) is SpanExportResult.SUCCESS:
                self._has_failed = False
                return
        except Exception as error:  # noqa: BLE001 - whatever an exporter raises; the thread goes on
            problem = f"{type(error).__name__}: {error}"
        if not self._has_failed:  # told once until it works again
            self._has_failed = True
            logs.get_logger().warning("spans_dropped", n=len(batch), problem=problem)
