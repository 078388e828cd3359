"""The engine's numbers among Ray's own metrics: Ray gathers them from every node, for Prometheus and its Metrics page.

A daemon thread of the actor takes a reading every few seconds. Ray forgets a gauge that was not set for about twenty
seconds, so all are set each time, and the progress of a job that has ended vanishes by itself.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

from ray.util import metrics

from koan_ray.domain.measures import INSTRUMENTS, SECONDS_BOUNDS, Measures
from koan_ray.telemetry import metrics as otel

if TYPE_CHECKING:
    from collections.abc import Callable

    from koan_ray.domain.measures import Instrument, Key

PREFIX = "koan_"  # Ray puts its own `ray_` in front
_EVERY_S = 5.0
_MAX_SAMPLES = 10_000  # kept for OpenTelemetry, which may collect less often than we read


class RayMetrics:
    """Publishes one process's readings until that process ends.

    Args:
        read: Takes a reading; called from a thread of its own.
        namespace: Of the engine; the label ``engine``.
    """

    def __init__(self, read: Callable[[], Measures], namespace: str) -> None:
        self._read, self._namespace = read, namespace
        self._by_name = {each.name: each for each in INSTRUMENTS}
        self._instruments: dict[str, Any] = {}
        self._published: dict[Key, float] = {}
        self._lock = threading.Lock()
        self._latest = Measures({}, {}, {})
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="koan-metrics", daemon=True)

    def start(self) -> None:
        """Begin; OpenTelemetry is served from the same readings, where the process has it."""
        otel.offer(self.latest)
        self._thread.start()

    def stop(self) -> None:
        """Publish no more."""
        self._stop.set()

    def latest(self) -> Measures:
        """Return the last reading, with the durations that came since this was last called."""
        with self._lock:
            found = self._latest
            self._latest = found._replace(samples={})
        return found

    def _run(self) -> None:
        while not self._stop.wait(_EVERY_S):
            try:
                self.publish(self._read())
            except Exception:
                # Whatever it is, jobs go on; and the next reading is its own chance.
                logging.getLogger("koan_ray").debug("metrics_not_published", exc_info=True)

    def publish(self, found: Measures) -> None:
        """Hand a reading to Ray."""
        for key, total in found.counters.items():
            grown = total - self._published.get(key, 0.0)
            if grown > 0:
                self._of(key[0]).inc(grown, self._tags(key))
                self._published[key] = total
        for key, level in found.gauges.items():
            self._of(key[0]).set(level, self._tags(key))
        for key, values in found.samples.items():
            tags, histogram = self._tags(key), self._of(key[0])
            for value in values:
                histogram.observe(value, tags)
        with self._lock:
            kept = {key: values[-_MAX_SAMPLES:] for key, values in otel.merged([self._latest, found]).samples.items()}
            self._latest = Measures(found.counters, found.gauges, kept)

    def _of(self, name: str) -> Any:
        instrument = self._instruments.get(name)
        if instrument is None:
            instrument = self._instruments[name] = _made(self._by_name[name])
        return instrument

    def _tags(self, key: Key) -> dict[str, str]:
        name, labels = key
        return {"engine": self._namespace, **dict(zip(self._by_name[name].labels, labels, strict=True))}


def _made(about: Instrument) -> Any:
    tags = ("engine", *about.labels)
    if about.type == "histogram":
        return metrics.Histogram(PREFIX + about.name, about.description, list(SECONDS_BOUNDS), tags)
    if about.type == "counter":
        return metrics.Counter(f"{PREFIX}{about.name}_total", about.description, tags)
    return metrics.Gauge(PREFIX + about.name, about.description, tags)
