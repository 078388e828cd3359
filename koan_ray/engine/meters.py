"""Plain numbers of one process, kept where things happen and read on a timer.

The hot path pays for an addition and an append; no metrics library is called there, and none is known here. Of durations
the newest `MAX_SAMPLES` between two readings are kept for the histograms; the counters next to them are exact.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import TYPE_CHECKING

from koan_ray.domain.measures import MAX_KINDS, MAX_ROOTS, OTHER, ZEROS, Measures

if TYPE_CHECKING:
    from collections.abc import Iterable

    from koan_ray.domain.measures import Key
    from koan_ray.domain.records import ErrorInfo, JobRecord

MAX_SAMPLES = 2048


class _Kind:
    """The numbers of one kind."""

    __slots__ = ("ends", "reasons", "runs", "waits")

    def __init__(self) -> None:
        self.runs: deque[float] = deque(maxlen=MAX_SAMPLES)
        self.waits: deque[float] = deque(maxlen=MAX_SAMPLES)
        self.reasons: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()


class Meters:
    """What has been counted, and durations that no reading has taken yet."""

    def __init__(self) -> None:
        self._counts: Counter[Key] = Counter()
        self._samples: dict[Key, deque[float]] = {}
        self._kinds: dict[str, _Kind] = {}
        self._slots: dict[str, int] = {}  # of root jobs that are shown

    def count(self, name: str, *labels: str, n: int = 1) -> None:
        """Count something that is rare."""
        self._counts[name, labels] += n

    def took(self, name: str, seconds: float, *labels: str) -> None:
        """Take note of a duration."""
        samples = self._samples.get((name, labels))
        if samples is None:
            samples = self._samples[name, labels] = deque(maxlen=MAX_SAMPLES)
        samples.append(seconds)

    def of(self, kind: str) -> _Kind:
        """Return the numbers of a kind, or of all others once there are too many."""
        found = self._kinds.get(kind)
        if found is None:
            name = kind if len(self._kinds) < MAX_KINDS else OTHER
            found = self._kinds.setdefault(name, _Kind())
        return found

    def settled(self, kind: str, reason: str, run_s: float, wait_s: float | None) -> None:
        """An execution has ended; ``wait_s`` of a first attempt only."""
        numbers = self.of(kind)
        numbers.reasons[reason] += 1
        numbers.runs.append(run_s)
        if wait_s is not None:
            numbers.waits.append(wait_s)

    def lost(self, kind: str, error: ErrorInfo, *, is_poison: bool) -> None:
        """The process of an execution has vanished."""
        self.count("crashes")
        self.count("executions_lost", cause_of_loss(error.message))
        if is_poison:
            self.count("poison", kind if kind in self._kinds or len(self._kinds) < MAX_KINDS else OTHER)

    def read(self, *, durations: bool = True) -> Measures:
        """Return everything, and begin to collect durations anew; without ``durations`` these stay for another reader."""
        counters: dict[Key, float] = {**ZEROS, **self._counts}
        samples = {key: _taken(values) for key, values in self._samples.items() if values} if durations else {}
        for kind, numbers in self._kinds.items():
            for status, n in numbers.ends.items():
                counters["jobs_ended", (kind, status)] = n
            for reason, n in numbers.reasons.items():
                counters["executions", (kind, reason)] = n
            if numbers.reasons["retry"]:
                counters["retries", (kind,)] = numbers.reasons["retry"]
            for name, values in (("run_seconds", numbers.runs), ("wait_seconds", numbers.waits)):
                if values and durations:
                    samples[name, (kind,)] = _taken(values)
        return Measures(counters, {}, samples)

    def roots(self, running: Iterable[JobRecord]) -> dict[Key, float]:
        """Return the progress of at most `MAX_ROOTS` root jobs, each in the slot that it had before."""
        shown = {job.id: job for job in running if job.particulars.depth == 0}
        self._slots = {job_id: slot for job_id, slot in self._slots.items() if job_id in shown}
        free = [slot for slot in range(MAX_ROOTS) if slot not in set(self._slots.values())]
        for job_id in shown:
            if job_id not in self._slots and free:
                self._slots[job_id] = free.pop(0)
        found: dict[Key, float] = {}
        for job_id, slot in self._slots.items():
            job = shown[job_id]
            kind = job.terms.kind if job.terms.kind in self._kinds or len(self._kinds) < MAX_KINDS else OTHER
            found["root_progress", (kind, f"{slot:02d}")] = job.progress.percentage if job.progress is not None else 0.0
        return found


def cause_of_loss(message: str) -> str:
    """Return one of a few words for why a process vanished, as far as its death notice tells."""
    told = message.lower()
    if "memory" in told:
        return "oom"
    if "node" in told:
        return "node"
    if "child" in told:
        return "child_process"
    if "its coordinator and its job actor" in told:
        return "coordinator"
    return "process"


def _taken(values: deque[float]) -> list[float]:
    taken = list(values)
    values.clear()
    return taken
