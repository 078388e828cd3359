"""Retry, transitions, ids, durations, lanes and queries: pure decisions."""

from __future__ import annotations

import itertools
import pickle
import uuid
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

import koan_ray as koan
from koan_ray import errors
from koan_ray.domain import transitions
from koan_ray.domain.durations import seconds
from koan_ray.domain.ids import child_id, is_id, new_id
from koan_ray.domain.lane import DueTimes, Lane
from koan_ray.domain.progress import estimate_completion, parse_report
from koan_ray.domain.query import parse_query
from koan_ray.domain.records import ActorSpec, ErrorInfo
from koan_ray.domain.retry import Advice, RetryPolicy, RetryStrategy, decide
from koan_ray.domain.status import FailureKind, JobStatus, Reason
from koan_ray.testing.contracts import AT, job

ERROR = ErrorInfo("E", "m")
POLICIES = st.builds(
    RetryPolicy,
    max_attempts=st.integers(1, 10),
    strategy=st.sampled_from(RetryStrategy),
    initial_delay=st.floats(0, 100),
    backoff_multiplier=st.floats(1, 100),
    max_delay=st.floats(100, 1e6),
    jitter=st.floats(0, 1),
)


@given(POLICIES, st.integers(1, 10_000), st.floats(0, 1, exclude_max=True))
def test_no_delay_is_negative_or_above_the_cap(policy, failures, draw):
    delay = policy.delay_s(failures, lambda: draw)
    assert 0 <= delay <= policy.max_delay.total_seconds()


@given(POLICIES, st.integers(1, 50), st.floats(0, 1, exclude_max=True))
def test_jitter_moves_a_delay_by_at_most_its_share(policy, failures, draw):
    base = RetryPolicy(
        policy.max_attempts, policy.strategy, policy.initial_delay, policy.backoff_multiplier, policy.max_delay, 0
    ).delay_s(failures, lambda: 0.0)
    assert abs(policy.delay_s(failures, lambda: draw) - base) <= base * policy.jitter + 1e-9


@given(POLICIES, st.sampled_from([Reason.FAILED, Reason.TIMEOUT]), st.integers(1, 12), st.booleans() | st.none())
def test_a_verdict_never_exceeds_max_attempts_and_follows_the_advice(policy, reason, attempts, advised):
    verdict = decide(policy, reason, attempts, lambda: 0.5, Advice(advised, None))
    may = attempts < policy.max_attempts and policy.strategy is not RetryStrategy.NONE and advised is not False
    assert verdict.retry == may
    assert (verdict.failure is None) == may


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        (Reason.NON_RETRYABLE, FailureKind.NON_RETRYABLE),
        (Reason.RESULT_REJECTED, FailureKind.RESULT_REJECTED),
        (Reason.CONTEXT_REJECTED, FailureKind.CONTEXT_REJECTED),
        (Reason.UNKNOWN_KIND, FailureKind.UNKNOWN_KIND),
    ],
)
def test_what_another_attempt_cannot_help_ends_the_job(reason, kind):
    assert decide(RetryPolicy(), reason, 1, lambda: 0.0) == (False, 0.0, kind)


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_attempts": 0}, {"max_attempts": 1.5}, {"max_attempts": True}, {"strategy": "sometimes"},
        {"initial_delay": -1},
        {"initial_delay": "soon"}, {"max_delay": 1}, {"backoff_multiplier": 0.5}, {"jitter": 2}, {"max_delay": float("nan")},
        {"backoff_multiplier": "2"}, {"backoff_multiplier": None}, {"jitter": "a little"}, {"jitter": True},
    ],
)  # fmt: skip
def test_a_policy_that_makes_no_sense_is_refused_by_name(arguments):
    with pytest.raises(koan.ConfigurationError, match=rf"retry\.{next(iter(arguments))}"):
        RetryPolicy(**arguments)


MOVES = {
    "queued": lambda j: transitions.queued(j, at=AT),
    "dispatched": lambda j: transitions.dispatched(j, "e", at=AT),
    "completed": lambda j: transitions.completed(j, b"1", at=AT),
    "failed": lambda j: transitions.failed(j, FailureKind.EXHAUSTED, ERROR, at=AT),
    "retry_later": lambda j: transitions.retry_later(j, ERROR, at=AT, due_at=AT + 1),
    "rescheduled": lambda j: transitions.rescheduled(j, at=AT, due_at=AT + 1),
    "interrupted": lambda j: transitions.interrupted(j, at=AT),
    "returned": lambda j: transitions.returned(j, at=AT),
    "lost": lambda j: transitions.lost(j, ERROR, at=AT),
    "cancel_requested": lambda j: transitions.cancel_requested(j, at=AT),
    "cancelled": lambda j: transitions.cancelled(j, at=AT),
}
ALLOWED = {
    JobStatus.CREATED: {"queued", "cancelled"},
    JobStatus.QUEUED: {"dispatched", "cancelled", "failed"},
    JobStatus.RUNNING: set(MOVES) - {"queued", "dispatched"},
}


@pytest.mark.parametrize(("status", "move"), list(itertools.product(JobStatus, MOVES)))
def test_a_move_that_is_not_in_the_table_is_refused(status, move):
    record = job(status=status, attempts=1, ordinal=1, execution_id="e")
    if move in ALLOWED.get(status, set()):
        assert MOVES[move](record) is not record
        assert record.status is status, "records are values"
    else:
        with pytest.raises(koan.IllegalTransitionError, match=str(status)):
            MOVES[move](record)


@pytest.mark.parametrize("move", ["failed", "retry_later", "rescheduled", "interrupted", "lost", "returned"])
def test_whatever_finds_a_cancel_request_becomes_cancelled_but_a_success(move):
    record = job(status=JobStatus.RUNNING, attempts=1, ordinal=1, cancel_requested_at=AT, reason="why")
    after = MOVES[move](record)
    assert (after.status, after.reason) == (JobStatus.CANCELLED, "why")
    assert MOVES["completed"](record).status is JobStatus.COMPLETED


def test_only_failures_and_losses_keep_the_attempt():
    running = job(status=JobStatus.RUNNING, attempts=2, crashes=0, ordinal=2)
    assert MOVES["retry_later"](running).attempts == 2
    assert (MOVES["lost"](running).attempts, MOVES["lost"](running).crashes) == (2, 1)
    assert all(MOVES[move](running).attempts == 1 for move in ("rescheduled", "interrupted", "returned"))


def test_a_child_id_is_a_valid_uuid7_and_always_the_same():
    parent = new_id()
    found = child_id(parent, "a")
    assert found == child_id(parent, "a") != child_id(parent, "b")
    assert uuid.UUID(found).version == 7
    assert found[:13] == parent[:13]
    assert is_id(found)
    assert not is_id("x" * 36)
    assert not is_id(7)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(timedelta(minutes=1), 60), (1.5, 1.5), ("90s", 90), ("2h", 7200), ("250ms", 0.25), (" 1d ", 86400)],
)
def test_durations_are_read_as_users_write_them(value, expected):
    assert seconds(value, name="x") == expected


@pytest.mark.parametrize("value", [-1, "-5s", "soon", None, True, float("inf"), timedelta(seconds=-1)])
def test_what_is_no_duration_is_refused(value):
    with pytest.raises(koan.ConfigurationError, match=r"^x: "):
        seconds(value, name="x")


@given(st.lists(st.tuples(st.sampled_from(["push", "front", "take"]), st.integers(0, 3)), max_size=200))
def test_a_lane_gives_the_deepest_first_and_then_the_oldest(steps):
    lane, model, n = Lane(ActorSpec()), [], 0
    for action, depth in steps:
        if action == "take":
            taken = list(lane.take(depth))
            model.sort(key=lambda item: (-item[0], item[1]))
            assert taken == [name for _, _, name in model[:depth]]
            model = model[depth:]
        else:
            n += 1
            name = str(n)
            if action == "push":
                lane.push(name, depth)
                model.append((depth, n, name))
            else:
                lane.push_front(name, depth)
                model.append((depth, -n, name))
        assert len(lane) == len(model)


def test_a_lane_and_due_times_do_not_keep_what_was_dropped():
    lane, due = Lane(ActorSpec()), DueTimes()
    for n in range(3000):
        lane.push(str(n), 0)
        due.push(float(n), str(n), ends_at=float(n))
    for _ in range(3000):
        lane.dropped(lambda name: name == "7")
        due.dropped(lambda at, name: name == "7")
    assert len(lane) < 2000
    assert len(due) < 2000
    assert "7" in list(lane.take(5000))
    assert list(due.take_due(1e9, 0.0, lambda at, name: name == "7")) == ["7"]


def test_progress_is_read_in_both_forms_and_never_fails_a_job():
    assert parse_report(0.5, "half") == (0.5, "half", None, None)
    assert parse_report(3, 10, "third") == (0.3, "third", 3, 10)
    assert parse_report(7, 0).percentage == 0.0
    assert [parse_report(value).percentage for value in (-1, 2, float("nan"))] == [0.0, 1.0, 0.0]


def test_the_end_is_estimated_from_the_average_speed():
    assert estimate_completion(0.25, began_at=100, now=110) == 140
    assert estimate_completion(0.0, began_at=100, now=110) is None
    assert estimate_completion(1.0, began_at=100, now=110) == 110


@pytest.mark.parametrize(
    ("filters", "told"),
    [
        ({"stauts": "x"}, "did you mean 'status'"), ({"status": "gone"}, "status: expected"), ({"limit": 0}, "limit: "),
        ({"limit": 5000}, "limit: "), ({"order_by": "color"}, "order_by: "), ({"cursor": "!"}, "cursor: "),
        ({"created_after": datetime(2026, 1, 1)}, "time zone"), ({"created_after": "yesterday"}, "ISO 8601"),
        ({"metadata": "a"}, "metadata: "), ({"name": 5}, "name: expected text"), ({"nonsense_filter": 1}, "allowed: "),
    ],
)  # fmt: skip
def test_a_bad_filter_is_refused_by_name(filters, told):
    with pytest.raises(koan.ConfigurationError, match=told):
        parse_query(filters)


def test_instants_are_read_from_datetimes_and_text():
    at = datetime(2026, 1, 1, tzinfo=UTC)
    assert parse_query({"created_after": at}) == parse_query({"created_after": at.isoformat()})


EXAMPLES = [
    errors.ConfigurationError("m"), errors.JobDefinitionError("m"), errors.InvalidContextError("k", [("a", "b")]),
    errors.InvalidContextError("", [("a", "b")], "metadata"),
    errors.PayloadTooLargeError("k", "context", 2, 1), errors.UnknownKindError("k", ["a"]),
    errors.JobNotFoundError("i", "a", "b"),
    errors.JobFailedError("i", "k", "exhausted", "E", "m", 3, "t"), errors.JobCancelledError("i", "k", "why"),
    errors.JobLostError("i"), errors.IllegalTransitionError("i", "a", "b"), errors.StaleLeaseError("s", 1, 2),
    errors.JobIdConflictError("i"), errors.LimitExceededError("w", 2, 1, "s"), errors.StoreUnavailableError("m"),
    errors.RecordCorruptError("j", "rev", "is missing"), errors.RuntimeUnavailableError("m"),
    errors.CoordinatorUnavailableError("m"),
    errors.NonRetryable("x"), errors.Reschedule(5),
]  # fmt: skip


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_errors_survive_pickling(error):
    twin = pickle.loads(pickle.dumps(error))
    assert (type(twin), twin.args, str(twin)) == (type(error), error.args, str(error))


def test_every_public_name_is_there_and_every_error_is_ours():
    assert sorted(koan.__all__) == koan.__all__
    for name in koan.__all__:
        value = getattr(koan, name)
        if name.endswith("Error"):
            assert issubclass(value, koan.KoanRayError), name
    with pytest.raises(AttributeError, match="nothing"):
        _ = koan.nothing
