"""What the engine counts, and what it makes of it in a reading."""

from __future__ import annotations

from koan_ray.domain.measures import CAUSES, INSTRUMENTS, MAX_KINDS, MAX_ROOTS, OTHER, ZEROS
from koan_ray.domain.records import ActorSpec, ErrorInfo, JobRecord, Particulars, Progress, Terms
from koan_ray.domain.retry import RetryPolicy
from koan_ray.engine.meters import MAX_SAMPLES, Meters, cause_of_loss


def record(n: int, *, depth: int = 0, percentage: float | None = None, kind: str = "Root") -> JobRecord:
    terms = Terms("t", kind, "c", RetryPolicy(), None, ActorSpec())
    job = JobRecord(f"job-{n}", terms, Particulars(depth=depth), b"null", 1.0)
    job.progress = Progress(1, percentage) if percentage is not None else None
    return job


def test_executions_are_counted_by_kind_and_reason_and_timed():
    meters = Meters()
    meters.settled("A", "succeeded", 0.5, 0.1)
    meters.settled("A", "retry", 0.7, None)
    meters.of("A").ends["completed"] += 1
    found = meters.read()
    assert {key: n for key, n in found.counters.items() if n} == {
        ("executions", ("A", "succeeded")): 1, ("executions", ("A", "retry")): 1, ("retries", ("A",)): 1,
        ("jobs_ended", ("A", "completed")): 1,
    }  # fmt: skip
    assert found.samples == {("run_seconds", ("A",)): [0.5, 0.7], ("wait_seconds", ("A",)): [0.1]}


def test_counters_stay_and_samples_are_handed_out_once_and_bounded():
    meters = Meters()
    for n in range(MAX_SAMPLES + 10):
        meters.settled("A", "succeeded", float(n), None)
        meters.took("flush_seconds", float(n), "default")
    first, second = meters.read(), meters.read()
    assert first.counters == second.counters == {**ZEROS, ("executions", ("A", "succeeded")): MAX_SAMPLES + 10}
    assert {len(values) for values in first.samples.values()} == {MAX_SAMPLES}
    assert first.samples["flush_seconds", ("default",)][-1] == MAX_SAMPLES + 9
    assert second.samples == {}


def test_too_many_kinds_are_counted_together():
    meters = Meters()
    for n in range(MAX_KINDS + 50):
        meters.settled(f"kind-{n}", "succeeded", 0.1, None)
    counters = {key: n for key, n in meters.read().counters.items() if n}
    assert len(counters) == MAX_KINDS + 1
    assert counters["executions", (OTHER, "succeeded")] == 50


def test_losses_are_counted_by_cause_and_poison_by_kind():
    meters = Meters()
    meters.lost("A", ErrorInfo("ProcessLost", "out of memory: killed"), is_poison=False)
    meters.lost("A", ErrorInfo("ProcessLost", "worker died"), is_poison=True)
    counters = meters.read().counters
    assert counters["crashes", ()] == 2
    assert (counters["executions_lost", ("oom",)], counters["executions_lost", ("process",)]) == (1, 1)
    assert counters["poison", ("A",)] == 1
    told = ["killed: out of memory", "the node died", "its child", "its coordinator and its job actor are gone", "who knows"]
    assert tuple(map(cause_of_loss, told)) == CAUSES
    assert cause_of_loss("The node was terminated") == "node"
    assert cause_of_loss("the child process vanished") == "child_process"
    assert cause_of_loss("its coordinator and its job actor are gone") == "coordinator"


def test_a_reader_that_wants_no_durations_leaves_them_to_another():
    meters = Meters()
    meters.settled("A", "succeeded", 0.5, 0.1)
    meters.took("flush_seconds", 0.2, "default")
    assert meters.read(durations=False).samples == {}
    assert meters.read().samples == {
        ("run_seconds", ("A",)): [0.5], ("wait_seconds", ("A",)): [0.1], ("flush_seconds", ("default",)): [0.2],
    }  # fmt: skip


def test_a_root_job_keeps_its_slot_and_children_have_none():
    meters = Meters()
    first = meters.roots([record(1, percentage=0.2), record(2), record(3, depth=1)])
    assert first == {("root_progress", ("Root", "00")): 0.2, ("root_progress", ("Root", "01")): 0.0}
    later = meters.roots([record(2, percentage=0.9), record(4, percentage=0.1)])
    assert later == {("root_progress", ("Root", "01")): 0.9, ("root_progress", ("Root", "00")): 0.1}


def test_the_progress_of_many_roots_is_capped():
    meters = Meters()
    assert len(meters.roots([record(n) for n in range(500)])) == MAX_ROOTS
    assert len(meters.roots([record(n) for n in range(500)])) == MAX_ROOTS


def test_no_label_is_an_id():
    assert len({each.name for each in INSTRUMENTS}) == len(INSTRUMENTS)
    allowed = {
        "route",
        "kind",
        "type",
        "status",
        "reason",
        "cause",
        "transition",
        "op",
        "resolution",
        "state",
        "source",
        "slot",
    }
    assert {label for each in INSTRUMENTS for label in each.labels} <= allowed
