"""Spans of the engine's processes go out at once, in bounded number and time, and a collector that is away harms nobody."""

from __future__ import annotations

import threading

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SpanExportResult

from koan_ray.telemetry import exports
from koan_ray.telemetry.exports import PromptProcessor


class Collector:
    """An exporter that takes spans when its gate is open."""

    def __init__(self, result=SpanExportResult.SUCCESS):
        self.gate, self.taken, self.result = threading.Event(), [], result
        self.asked = threading.Semaphore(0)
        self.gate.set()

    def export(self, batch):
        self.asked.release()
        assert self.gate.wait(20)
        self.taken.append([span.name for span in batch])
        if isinstance(self.result, Exception):
            raise self.result
        return self.result

    def shutdown(self):
        pass


@pytest.fixture(autouse=True)
def unpaced(monkeypatch):
    monkeypatch.setattr(exports.time, "sleep", lambda _seconds: None)


def tracer(collector):
    processor = PromptProcessor(collector)
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(processor)
    return processor, provider.get_tracer("test")


def end_spans(tracer, names):
    for name in names:
        tracer.start_span(name).end()


def test_a_span_goes_out_without_being_asked_for():
    collector = Collector()
    _, spans = tracer(collector)
    end_spans(spans, ["one"])
    assert collector.asked.acquire(timeout=10)


def test_a_flush_returns_when_what_has_ended_is_sent():
    collector = Collector()
    processor, spans = tracer(collector)
    end_spans(spans, map(str, range(5)))
    assert processor.force_flush(10_000)
    assert [name for batch in collector.taken for name in batch] == list("01234")


def test_nothing_was_ended_so_nothing_runs_and_a_flush_returns_at_once():
    processor, _ = tracer(Collector())
    assert processor.force_flush(0)
    assert processor._thread is None


def test_a_flush_gives_up_in_time_and_what_waits_is_bounded(monkeypatch):
    monkeypatch.setattr(exports, "_KEPT", 3)
    collector = Collector()
    collector.gate.clear()
    processor, spans = tracer(collector)
    end_spans(spans, ["first"])
    assert collector.asked.acquire(timeout=10)  # it has been taken and hangs
    end_spans(spans, map(str, range(10)))
    assert not processor.force_flush(10)
    collector.gate.set()
    assert processor.force_flush(10_000)
    assert [name for batch in collector.taken for name in batch] == ["first", "7", "8", "9"]


@pytest.mark.parametrize("result", [SpanExportResult.FAILURE, OSError("no route")], ids=["refused", "raises"])
def test_a_collector_that_is_away_is_told_once_and_the_thread_goes_on(result, caplog):
    collector = Collector(result)
    processor, spans = tracer(collector)
    for name in "abc":
        end_spans(spans, [name])
        assert processor.force_flush(10_000)
    assert [record.getMessage().split()[0] for record in caplog.records] == ["spans_dropped"]
    collector.result = SpanExportResult.SUCCESS
    end_spans(spans, ["d"])
    assert processor.force_flush(10_000)
    assert [name for batch in collector.taken for name in batch] == list("abcd")
