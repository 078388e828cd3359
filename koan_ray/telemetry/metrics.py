"""The engine's numbers as OpenTelemetry instruments of the application's own SDK.

Nothing is recorded while jobs run. Counters and gauges are observable instruments whose callbacks take a reading when the
SDK collects; the durations that a reading brings are recorded into histograms then. An engine in another process, such as a
coordinator actor, is measured there: by Ray's own metrics (`koan_ray.runtime.ray.metrics`), and by OpenTelemetry as well
where the standard environment variables name a collector.

OpenTelemetry is not imported for an application that has not done so.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from koan_ray.domain.measures import INSTRUMENTS, SECONDS_BOUNDS, Measures

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from koan_ray.domain.measures import Instrument, Key

    Read = Callable[[], Measures]

_FRESH_S = 1.0  # all instruments of one collection share a reading
_lock = threading.Lock()
_reads: list[Read] = []
_is_installed = False


def _after_fork() -> None:
    """Read no engine of the process that this one is a copy of: its threads are not here to answer."""
    global _lock, _reads
    _lock, _reads = threading.Lock(), []


os.register_at_fork(after_in_child=_after_fork)


def offer(read: Read) -> Callable[[], None]:
    """Have an engine measured from now on; returns what ends that. ``read`` is called from the SDK's threads."""
    with _lock:
        _reads.append(read)
    if "opentelemetry.metrics" in sys.modules:
        install()

    def withdraw() -> None:
        with _lock:
            if read in _reads:
                _reads.remove(read)

    return withdraw


def install() -> None:
    """Create the instruments, once a process; they follow a meter provider that is set later."""
    global _is_installed  # noqa: PLW0603 - instruments are one set a process, as the meter provider is
    with _lock:
        if _is_installed:
            return
        _is_installed = True
    from opentelemetry import metrics

    _Instruments(metrics.get_meter("koan_ray"))


class _Instruments:
    """One set of instruments over all engines of this process."""

    def __init__(self, meter: Any) -> None:
        self._lock = threading.Lock()
        self._found = Measures({}, {}, {})
        self._found_at = float("-inf")
        self._by_name = {each.name: each for each in INSTRUMENTS}
        self._histograms: dict[str, Any] = {}
        for each in INSTRUMENTS:
            name, about = f"koan.{each.name}", {"unit": each.unit, "description": each.description}
            if each.type == "histogram":
                bounds = {"explicit_bucket_boundaries_advisory": SECONDS_BOUNDS}
                self._histograms[each.name] = meter.create_histogram(name, **about, **bounds)
            elif each.type == "counter":
                meter.create_observable_counter(name, [self._observer(each)], **about)
            else:
                meter.create_observable_gauge(name, [self._observer(each)], **about)

    def _observer(self, instrument: Instrument) -> Callable[[Any], Iterable[Any]]:
        from opentelemetry.metrics import Observation

        def observe(_options: Any) -> Iterator[Any]:
            found = self._reading()
            values = found.counters if instrument.type == "counter" else found.gauges
            for (name, labels), value in values.items():
                if name == instrument.name:
                    yield Observation(value, dict(zip(instrument.labels, labels, strict=True)))

        return observe

    def _reading(self) -> Measures:
        with self._lock:
            if time.monotonic() - self._found_at > _FRESH_S:
                with _lock:
                    reads = list(_reads)
                self._found = merged([read() for read in reads])
                self._found_at = time.monotonic()
                for (name, labels), values in self._found.samples.items():
                    attributes = dict(zip(self._by_name[name].labels, labels, strict=True))
                    for value in values:
                        self._histograms[name].record(value, attributes)
            return self._found


def merged(readings: list[Measures]) -> Measures:
    """Return several readings as one; what they share is added."""
    counters: dict[Key, float] = {}
    gauges: dict[Key, float] = {}
    samples: dict[Key, list[float]] = {}
    for reading in readings:
        for key, value in reading.counters.items():
            counters[key] = counters.get(key, 0.0) + value
        for key, value in reading.gauges.items():
            gauges[key] = gauges.get(key, 0.0) + value
        for key, values in reading.samples.items():
            samples.setdefault(key, []).extend(values)
    return Measures(counters, gauges, samples)
