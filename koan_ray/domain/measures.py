"""What the engine measures: names, units and labels, here once; and one reading of all of it.

Labels are kinds, statuses, causes and names of sources, never ids: a label with many values costs a time-series store more
than the jobs themselves cost us. Kinds beyond `MAX_KINDS` are counted together as ``other``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from koan_ray.domain.status import JobStatus

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_KINDS: Final = 100
OTHER: Final = "other"
MAX_ROOTS: Final = 50  # root jobs whose progress is shown at a time; a slot is used again when its job has ended


class Instrument(NamedTuple):
    """One thing that is measured. ``counter`` only grows, ``gauge`` is a level, ``histogram`` collects single values."""

    name: str
    type: Literal["counter", "gauge", "histogram"]
    description: str
    labels: tuple[str, ...] = ()
    unit: str = "1"
    known: tuple[tuple[str, ...], ...] = ()  # values of the labels that are there from the start, as zero


CAUSES: Final = ("oom", "node", "child_process", "coordinator", "process")  # of a process that vanished
TAKEOVERS: Final = ("first", "released", "own", "dead", "lapsed")  # why a lease was free
RESOLUTIONS: Final = {"flush": ("was_written", "refused", "repeated"), "take_lease": ("was_written", "refused")}
SECONDS_BOUNDS: Final = (0.001, 0.005, 0.02, 0.1, 0.5, 1.0, 5.0, 20.0, 60.0, 300.0, 1800.0, 7200.0)


def _each(values: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    return tuple((value,) for value in values)


INSTRUMENTS: Final = (
    Instrument("jobs_ended", "counter", "Jobs that reached a final status.", ("kind", "status")),
    Instrument("executions", "counter", "Executions that ended, by how.", ("kind", "reason")),
    Instrument("retries", "counter", "Attempts that failed and are followed by another.", ("kind",)),
    Instrument("crashes", "counter", "Executions whose process vanished."),
    Instrument("executions_lost", "counter", "The same, by what is known of the cause.", ("cause",), known=_each(CAUSES)),
    Instrument("poison", "counter", "Jobs given up because their process vanished too often.", ("type",)),
    Instrument("fenced_writes", "counter", "Writes refused because a newer writer has the job.", ("transition",),
               known=_each(status.value for status in JobStatus)),
    Instrument("fenced_reports", "counter", "Reports for an execution that is not current any more."),
    Instrument("takeovers", "counter", "Leases taken, by why they were free.", ("reason",), known=_each(TAKEOVERS)),
    Instrument("outcome_unknown", "counter", "Writes whose outcome had to be found out.", ("op", "resolution"),
               known=tuple((op, each) for op, resolutions in RESOLUTIONS.items() for each in resolutions)),
    Instrument("claims_returned", "counter", "Jobs that an actor gave back without having begun them."),
    Instrument("actors_started", "counter", "Job actors started."),
    Instrument("actors_lost", "counter", "Job actors that vanished with work in them."),
    Instrument("unexpected_failures", "counter", "Errors of the engine itself that it has survived, by place.", ("op",)),
    Instrument("progress_dropped", "counter", "States of progress that a newer one has replaced unseen."),
    Instrument("readers_evicted", "counter", "Watchers that were forgotten because they did not call."),
    Instrument("auth_denied", "counter", "Requests to an API whose caller was unknown or not allowed.", ("route",)),
    Instrument("queue_depth", "gauge", "Unfinished jobs: queued, waiting for their time, running.", ("state",)),
    Instrument("jobs_live", "gauge", "Unfinished jobs.", ("kind",)),
    Instrument("oldest_queued_seconds", "gauge", "Age of the job that is next in its queue, the oldest of them.", unit="s"),
    Instrument("outbox_backlog", "gauge", "Jobs whose newest state is not stored yet, and whose store is late."),
    Instrument("unroutable", "gauge", "Stored jobs whose class nobody has introduced.", ("type",)),
    Instrument("loop_lag_seconds", "gauge", "How late the coordinator's last housekeeping was.", unit="s"),
    Instrument("beat_age_seconds", "gauge", "Since the last acknowledged beat of a lease.", ("source",), "s"),
    Instrument("actors", "gauge", "Job actors.", ("state",)),
    Instrument("root_progress", "gauge", "Progress of running jobs without a parent, 0 to 1.", ("kind", "slot")),
    Instrument("wait_seconds", "histogram", "From accepted to the begin of the first attempt.", ("kind",), "s"),
    Instrument("run_seconds", "histogram", "Duration of one execution.", ("kind",), "s"),
    Instrument("flush_seconds", "histogram", "Duration of one flush to a store.", ("source",), "s"),
)  # fmt: skip

Key = tuple[str, tuple[str, ...]]  # name of an instrument, and the values of its labels


class Measures(NamedTuple):
    """One reading. Counters are totals since the start of the process; samples those since the last reading."""

    counters: dict[Key, float]
    gauges: dict[Key, float]
    samples: dict[Key, list[float]]


ZEROS: Final[dict[Key, float]] = {
    (each.name, labels): 0
    for each in INSTRUMENTS
    if each.type == "counter"
    for labels in (each.known if each.labels else ((),))
}  # counters of which it is known beforehand that they can grow: a rate needs a value before the first event
