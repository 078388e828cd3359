"""An engine in this process, measured by the application's OpenTelemetry SDK."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

import koan_ray as koan
from koan_ray.domain.measures import INSTRUMENTS
from koan_ray.telemetry import metrics


class Fine(koan.Job[int, int]):
    def execute(self, context, progress, cancellation):
        return context


class Flaky(koan.Job[int, int]):
    retry = koan.RetryPolicy(max_attempts=2, initial_delay=0.01)

    def execute(self, context, progress, cancellation):
        raise ValueError("no")


class Gated(koan.Job[int, int]):
    gate = threading.Event()

    def execute(self, context, progress, cancellation):
        progress.report(0.25)
        self.gate.wait(30)
        return context


@pytest.fixture
def collected():
    """Collects what a meter of its own sees: the global one can be set once a process."""
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    instruments = metrics._Instruments(provider.get_meter("test"))

    def collect() -> dict[tuple, object]:
        instruments._found_at = float("-inf")  # the last reading is fresh for a second
        found = {}
        for _ in range(2):  # durations are recorded while the first collection reads
            data = reader.get_metrics_data()
            for resource in data.resource_metrics if data is not None else ():
                for scope in resource.scope_metrics:
                    for metric in scope.metrics:
                        for point in metric.data.data_points:
                            value = getattr(point, "value", None)
                            key = (metric.name, *point.attributes.values())
                            found[key] = point.count if value is None else value
        return found

    yield collect
    provider.shutdown()


def test_jobs_are_counted_timed_and_shown_while_they_run(collected, local_engine, eventually):
    koan.Jobs.count().get(10)
    for job in Fine.start_many(range(20)).run().get(10):
        job.wait().get(10)
    with pytest.raises(koan.JobFailedError):
        Flaky.start(1).run().get(10).wait().get(10)
    Gated.gate.clear()
    running = Gated.start(1).run().get(10)
    waiting = Fine.start(1).delayed(3600).run().get(10)
    eventually(lambda: collected().get(("koan.root_progress", "Gated", "00")) == 0.25)
    found = collected()
    assert found["koan.jobs_ended", "Fine", "completed"] == 20
    assert found["koan.jobs_ended", "Flaky", "failed"] == 1
    assert found["koan.executions", "Flaky", "retry"] == found["koan.executions", "Flaky", "failed"] == 1
    assert found["koan.retries", "Flaky"] == 1
    assert found["koan.run_seconds", "Fine"] == found["koan.wait_seconds", "Fine"] == 20
    assert found["koan.wait_seconds", "Flaky"] == 1
    assert found["koan.flush_seconds", "memory"] > 0
    assert (found["koan.queue_depth", "running"], found["koan.queue_depth", "waiting"]) == (1, 1)
    assert (found["koan.jobs_live", "Gated"], found["koan.jobs_live", "Fine"]) == (1, 1)
    assert found["koan.actors", "ready"] >= 1
    assert found["koan.loop_lag_seconds",] >= 0
    assert found["koan.oldest_queued_seconds",] == 0
    Gated.gate.set()
    running.wait().get(10)
    waiting.cancel().get(10)
    assert ("koan.root_progress", "Gated", "00") not in collected()
    assert collected()["koan.jobs_ended", "Fine", "cancelled"] == 1


def test_the_age_of_the_oldest_queued_job_grows(collected, local_engine, eventually):
    Gated.gate.clear()
    jobs = [Gated.start(n).run().get(10) for n in range(3)]  # on two actors
    eventually(lambda: collected()["koan.oldest_queued_seconds",] > 0.05)
    assert collected()["koan.queue_depth", "queued"] == 1
    Gated.gate.set()
    for job in jobs:
        job.wait().get(10)
    assert collected()["koan.oldest_queued_seconds",] == 0


def test_an_engine_that_has_ended_is_measured_no_more(collected, local_engine):
    assert ("koan.queue_depth", "queued") in collected()
    local_engine.shutdown()
    assert collected() == {}


def test_every_measure_has_an_instrument_and_its_labels(collected, local_engine):
    Fine.start(1).run().get(10).wait().get(10)
    (read,) = metrics._reads
    by_name = {each.name: each for each in INSTRUMENTS}
    for kind, values in zip(("counter", "gauge", "histogram"), read(), strict=True):
        for name, labels in values:
            assert (by_name[name].type, len(by_name[name].labels)) == (kind, len(labels))


def test_every_transition_is_told_with_its_term_and_what_became_of_its_guard(caplog):
    with caplog.at_level("INFO", "koan_ray"), koan.init(runtime="local", engine={"max_actors": 1}):
        job = Fine.start(1).run().get(10)
        job.wait().get(10)
    told = [record for record in caplog.records if getattr(record, "koan_job_id", None) == job.id]
    moves = [(each.status, each.rev, each.term) for each in told if each.message.startswith("job_moved")]
    assert [status for status, _, _ in moves] == ["running", "completed"]
    written = [(each.status, each.guard) for each in told if each.message.startswith("job_written")]
    assert written[-1] == ("completed", "applied")
    assert all(each.execution_id for each in told if each.message.startswith("job_moved"))


SCRIPT = """
import koan_ray as koan
from koan_ray import telemetry

@koan.job
def one() -> int:
    return 1

telemetry.configure(console=True, metrics_interval_s=0.2)
with koan.init(runtime="local", engine={"max_actors": 1}):
    one.start().run().get(10).wait().get(10)
    import time
    time.sleep(1)
"""


def test_configure_sets_metrics_up_for_an_application_that_has_not():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=True)
    assert '"name": "koan.jobs_ended"' in done.stdout
    assert '"name": "koan.run_seconds"' in done.stdout
    assert '"kind": "one"' in done.stdout


@pytest.mark.ray
@pytest.mark.slow
def test_on_a_cluster_the_numbers_are_among_rays_own(engine, eventually):
    """Ray's agent on each node serves what actors publish, for Prometheus."""
    import ray

    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    @koan.job(kind="slow root")
    def slow(n: int, progress: koan.JobProgress) -> int:
        progress.report(0.75)
        time.sleep(n)
        return n

    for job in Fine.start_many(range(5)).run().get(30):
        job.wait().get(60)
    running = slow.start(60).run().get(30)

    def scraped() -> dict[str, float]:
        text = urllib.request.urlopen(url, timeout=10).read().decode()
        lines = [line.rpartition(" ") for line in text.splitlines() if line.startswith("ray_koan_")]
        mine = [(name, float(value)) for name, _, value in lines if f'engine="{engine.namespace}"' in name]
        return {_short(name): value for name, value in mine}

    def has(name: str, *labels: str, value: float) -> bool:
        wanted = {f"ray_koan_{name}", *labels}
        return any(wanted <= set(key.split("|")) and found == value for key, found in scraped().items())

    try:
        eventually(lambda: has("root_progress", "kind=slow root", "slot=00", value=0.75), within=60)
        eventually(lambda: has("jobs_ended_total", "kind=Fine", "status=completed", value=5), within=30)
        eventually(lambda: has("run_seconds_count", "kind=Fine", value=5), within=30)
        eventually(lambda: has("queue_depth", "state=running", value=1), within=30)
    finally:
        running.cancel().get(10)


def _short(name: str) -> str:
    """Turn ``name{a="b",c="d"}`` into ``name|a=b|c=d``."""
    head, _, labels = name.partition("{")
    return "|".join([head, *(f"{key}={value}" for key, value in re.findall(r'([a-zA-Z_]+)="([^"]*)"', labels))])
