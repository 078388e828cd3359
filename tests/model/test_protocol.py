"""The protocol of stored jobs keeps its promises in every reachable state, and needs each of its guards for that."""

from __future__ import annotations

import pytest

from tests.model.checker import search
from tests.model.protocol import ALL, GUARDS, PROMISES, Budget, Config, Protocol

CONFIGS = {
    config.name: config
    for config in (
        Config("no faults", Budget(), 1, may_fail=True, may_cancel=True),
        Config("a crash", Budget(crash=1), 1, may_cancel=True),
        Config("two crashes", Budget(crash=2), 1),
        Config("a crash and a lost reply", Budget(crash=1, timeout=1), 1, may_cancel=True),
        Config("write-ahead, a crash and a dead actor", Budget(crash=1, death=1), 1, may_cancel=True, write_ahead=True),
        Config("write-ahead, a crash and a lost reply", Budget(crash=1, timeout=1), 1, write_ahead=True),
        Config("write-ahead, a false takeover", Budget(takeover=1), may_cancel=True, write_ahead=True),
        Config("a false takeover", Budget(takeover=1), may_cancel=True),
        Config("a false takeover and a lost reply", Budget(takeover=1, timeout=1)),
        Config("a false takeover and a crash for good", Budget(takeover=1, crash=1), restarts=False),
        Config("a false takeover and a dead actor", Budget(takeover=1, death=1)),
        Config("a false takeover and a partition", Budget(takeover=1, cut=1)),
        Config("two false takeovers", Budget(takeover=2)),
        Config("two lost replies", Budget(timeout=2), 1, may_cancel=True),
        Config("a lost reply and failures", Budget(timeout=1), 1, may_fail=True),
        Config("three dead actors", Budget(death=3), 1, may_cancel=True),
        Config("a dead actor and a crash", Budget(death=1, crash=1), 1),
        Config("a partition and repeated reports", Budget(cut=1, repeat=1), 1, may_fail=True),
        Config("a partition and lost reports", Budget(cut=1, repeat=1, loss=1), 1),
        Config("a crash and a lost report", Budget(crash=1, loss=1), 1),
    )
}

# Where each guard is missed, and the promise that its absence breaks first.
MISSED = {
    "rev_cas": ("a crash and a lost reply", "I3"),
    "insert_unique": ("a crash", "I3"),
    "lease_cas": ("a false takeover", "TERM"),
    "term_stamp": ("a crash", "I10"),
    "stamp_before_read": ("a crash", "I10"),
    "read_only_stamped": ("a false takeover", "I10"),
    "stamp_only_older": ("a false takeover", "I3"),
    "stop_in_time": ("write-ahead, a false takeover", "I9"),
    "stand_down_when_fenced": ("a false takeover and a crash for good", "I3"),
    "sweep_unclaimed": ("a false takeover", "I7"),
    "execution_fence": ("a partition and repeated reports", "I5"),
    "actor_term_fence": ("a crash", "ONE"),
    "outbox_until_ack": ("no faults", "ADOPT"),
    "hold_until_written": ("no faults", "HOLD"),
    "adopt_before_lost": ("two crashes", "ONE"),
    "kill_not_current": ("a crash", "ONE"),
    "ack_after_flush": ("no faults", "I1"),
    "read_back_unknown": ("two lost replies", "I1"),
    "read_back_refused": ("two lost replies", "I5"),
    "read_back_executions": ("two lost replies", "I5"),
    "closed_once": ("a crash", "I4"),
    "job_before_execution": ("a crash", "I5"),
    "trail_in_job": ("a crash", "I5"),
    "close_on_recovery": ("two crashes", "I5"),
    "start_after_insert": ("a crash", "I10"),
    "start_after_flush": ("write-ahead, a crash and a dead actor", "I5"),
    "cancel_kept": ("no faults", "I9"),
    "crash_budget": ("three dead actors", "I8"),
    "attempt_budget": ("no faults", "I8"),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_with_all_guards_every_state_keeps_every_promise(config):
    verdict = search(Protocol(config))
    assert verdict.broken is None, str(verdict)
    assert verdict.n_states > 1000  # the danger was there


@pytest.mark.parametrize("guard", GUARDS)
def test_each_guard_is_missed_when_it_is_gone(guard):
    name, promise = MISSED[guard]
    verdict = search(Protocol(CONFIGS[name], ALL - {guard}))
    assert verdict.broken is not None, (
        f"{verdict.n_states} states of {name!r} hold without {guard}: it is redundant, or untested"
    )
    assert verdict.broken.split(":")[0] == promise, str(verdict)


def test_a_counter_example_tells_its_story():
    model = Protocol(CONFIGS["no faults"], ALL - {"ack_after_flush"})
    verdict = search(model)
    assert verdict.trace[-1] == "the client submits to c1"  # and is told so before anything is written
    assert verdict.broken == f"I1: {PROMISES['I1']}"
    assert str(verdict).splitlines()[1] == "  1. a coordinator reads the lease, term 0"


def test_a_counter_example_can_be_replayed():
    model = Protocol(CONFIGS["a crash"], ALL - {"term_stamp"})
    verdict = search(model)
    before, promise = model.initial(), None
    for says in verdict.trace:
        after = next(step.after for step in model.steps(before) if step.says == says)
        before, promise = after, model.broken(before, after)
    assert before == verdict.end
    assert promise == verdict.broken
