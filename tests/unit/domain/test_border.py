"""Numbers, durations, instants and reports of users: made plain or refused where they come in."""

from __future__ import annotations

import math
import sys
import threading
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction

import bson
import numpy as np
import pytest
from bson.codec_options import CodecOptions
from hypothesis import given
from hypothesis import strategies as st

import koan_ray as koan
from koan_ray.cancellation import CancellationToken
from koan_ray.domain.durations import LONGEST_S, bound, instant, patience, seconds
from koan_ray.domain.progress import MAX_STEPS, parse_report
from koan_ray.pending import Pending
from koan_ray.progress import JobProgress
from koan_ray.stores.codec import decode_job, encode_job
from koan_ray.testing.contracts import job


class Loud:
    """Raises at whatever it is asked."""

    def _raise(self, *args):
        raise RuntimeError

    __str__ = __repr__ = __float__ = __index__ = __int__ = _raise


class LoudText(str):
    __slots__ = ()

    def __str__(self):
        raise RuntimeError

    __len__ = __getitem__ = __iter__ = __str__


class Word(str):
    __slots__ = ()


class Lazy:
    """Text that is made when it is looked at, as translations are."""

    def __str__(self):
        return "half way"


_AWARE = CodecOptions(tz_aware=True)


def _type(value):
    return type(value).__name__


# --- durations -----------------------------------------------------------------------------------------------------------

HUGE = [10**400, 10**5000, 1e300, timedelta.max, "9" * 400 + "d", Decimal("1e999"), np.float64(1e200)]


@pytest.mark.parametrize("value", HUGE, ids=_type)
def test_a_delay_that_no_calendar_holds_is_refused_with_the_limit(value):
    with pytest.raises(
        koan.ConfigurationError, match=r"^delayed: expected at most 1,000 years \(31557600000 seconds\), got"
    ):
        seconds(value, name="delayed")


@pytest.mark.parametrize("value", [*HUGE, math.inf], ids=_type)
def test_a_limit_or_a_wait_that_long_is_one_without_end(value):
    assert bound(value, name="timeout") == LONGEST_S
    assert patience(value, name="timeout") is None


@pytest.mark.parametrize("read", [seconds, bound, patience])
@pytest.mark.parametrize("value", [np.int64(90), np.float32(90), Decimal(90), Fraction(180, 2), 90, "90s"])
def test_whatever_is_a_number_is_a_duration_in_seconds(read, value):
    assert read(value, name="x") == 90.0


@pytest.mark.parametrize("read", [seconds, bound, patience])
@pytest.mark.parametrize(
    "value", [math.nan, Decimal("nan"), 1j, b"90s", [], Loud(), LoudText("soon"), -(10**400), -math.inf], ids=_type
)
def test_what_is_no_duration_is_refused_whatever_its_repr_does(read, value):
    with pytest.raises(koan.ConfigurationError, match=r"^x: "):
        read(value, name="x")


def test_waiting_for_longer_than_threads_can_be_told_works():
    pending: Pending[int] = Pending()
    threading.Timer(0.05, pending.resolve, (7,)).start()
    assert pending.get(1e10) == pending.get(timedelta.max) == pending.get(math.inf) == 7


def test_a_retry_policy_takes_the_longest_delay_and_every_count_that_a_document_holds():
    for longest in (timedelta.max, 10**400, math.inf):
        policy = koan.RetryPolicy(max_delay=longest)
        assert policy.max_delay == timedelta(seconds=LONGEST_S)
        assert policy.delay_s(10**9, lambda: 0.5) <= LONGEST_S
    many = koan.RetryPolicy(max_attempts=sys.maxsize, max_delay=timedelta.max, backoff_multiplier=2)
    record = job()
    record = record.evolve(terms=record.terms._replace(retry=many, timeout_s=bound(timedelta.max, name="timeout")))
    assert decode_job(encode_job(record)).terms.retry == many


@pytest.mark.parametrize("value", [10**30, 10**5000, 0, True, 2.0, "3", None, Loud()], ids=_type)
def test_a_count_of_attempts_that_no_document_holds_is_refused(value):
    with pytest.raises(koan.ConfigurationError, match="expected a whole number from 1 to 9,223,372,036,854,775,807"):
        koan.RetryPolicy(max_attempts=value)


def test_an_instant_outside_of_the_calendar_is_its_edge():
    assert instant(1e300) == instant(math.inf) == datetime.max.replace(tzinfo=UTC)
    assert instant(-1e300) == datetime.min.replace(tzinfo=UTC)
    assert instant(None) is None


# --- progress ------------------------------------------------------------------------------------------------------------


def reported(*args, **named):
    progress = JobProgress(lambda: None, CancellationToken())
    progress.report(*args, **named)
    return parse_report(*progress._latest)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ((0.5, "half"), (0.5, "half", None, None)),
        ((3, 10, "third"), (0.3, "third", 3, 10)),
        ((1, math.inf), (0.0, None, 1, None)),
        ((1, math.nan), (0.0, None, 1, None)),
        ((math.inf, 10), (0.0, None, None, 10)),
        ((math.nan,), (0.0, None, None, None)),
        ((0.5, ValueError("of a step")), (0.5, "of a step", None, None)),
        ((0.5, Lazy()), (0.5, "half way", None, None)),
        ((0.5, None, Lazy()), (0.5, "half way", None, None)),
        ((0.5, [1, 2]), (0.5, "[1, 2]", None, None)),
        ((0.5, 1j), (0.5, "1j", None, None)),
        ((0.5, b"half"), (0.5, "b'half'", None, None)),
        ((0.5, "half", 5), (0.5, "half", None, None)),
        ((0.5, None, 5), (0.5, "5", None, None)),
        ((3, 10, 5), (0.3, "5", 3, 10)),
        ((np.float32(0.5), "half"), (0.5, "half", None, None)),
        ((np.int64(3), np.int64(10)), (0.3, None, 3, 10)),
        ((Decimal("0.5"),), (0.5, None, None, None)),
        ((Fraction(1, 2),), (0.5, None, None, None)),
        ((True,), (1.0, None, None, None)),
        ((10**400,), (1.0, None, None, None)),
        ((10**400, 10**401), (0.1, None, MAX_STEPS, MAX_STEPS)),
        ((10**800, 3), (1.0, None, MAX_STEPS, 3)),
        ((-5, 10), (0.0, None, -5, 10)),
        ((2.5, 10.0), (0.2, None, 2, 10)),
        ((0.5, LoudText("half")), (0.5, "half", None, None)),
        ((0.5, "caf\udce9"), (0.5, "caf\\xe9", None, None)),
        ((0.5, "\x1b[31mred\x1b[0m\x00"), (0.5, "red\N{REPLACEMENT CHARACTER}", None, None)),
    ],
    ids=lambda value: type(value[0]).__name__ if isinstance(value, tuple) else "",
)
def test_progress_takes_what_it_is_given(args, expected):
    assert reported(*args) == expected


@pytest.mark.parametrize("value", [Loud(), object(), "x", None, 1j, [], np.array([1, 2]), type], ids=_type)
def test_what_is_no_number_leaves_the_job_where_it_was(value):
    progress = JobProgress(lambda: None, CancellationToken())
    progress.report(value, "first")
    assert parse_report(*progress._latest) == (0.0, "first", None, None)
    progress.report(3, 10)
    progress.report(value, "then")
    assert parse_report(*progress._latest) == (0.3, "then", 3, 10)
    progress.report(value, message="and then")
    assert parse_report(*progress._latest) == (0.3, "and then", 3, 10)


_ODD = st.one_of(
    st.integers(), st.floats(), st.text(), st.complex_numbers(), st.decimals(), st.fractions(), st.binary(), st.booleans(),
    st.none(), st.builds(Loud), st.builds(Lazy), st.builds(LoudText), st.builds(ValueError), st.lists(st.none()),
    st.sampled_from([10**400, -(10**400), 10**5000, "\ud800", "x" * 100_000]),
)  # fmt: skip


@given(st.lists(st.tuples(_ODD, _ODD, _ODD), min_size=1, max_size=4))
def test_no_report_raises_and_every_one_can_be_stored(calls):
    progress = JobProgress(lambda: None, CancellationToken())
    for args in calls:
        progress.report(*args)
        found = parse_report(*progress._latest)
        assert 0.0 <= found.percentage <= 1.0
        assert all(step is None or abs(step) <= MAX_STEPS for step in (found.current, found.total))
        (found.message or "").encode()
        assert len(found.message or "") <= 2000
        _ = progress.estimated_completion


# --- resources -----------------------------------------------------------------------------------------------------------


def test_resources_are_kept_as_numbers_that_come_back_from_a_document():
    asked = koan.Resources(np.float64(0.5), 1, 1.5e9, {"licence": np.int64(2)}, label_selector={"region": Word("eu")})
    assert asked == koan.Resources(0.5, 1.0, 1_500_000_000, {"licence": 2.0}, label_selector={"region": "eu"})
    record = job()
    spec = asked.spec(concurrency=1, dedicated=False)
    record = record.evolve(terms=record.terms._replace(spec=spec))
    assert decode_job(bson.decode(bson.encode(encode_job(record)), _AWARE)).terms.spec == spec


@pytest.mark.parametrize(
    "given",
    [
        {"num_cpus": -1}, {"num_cpus": "1"}, {"num_gpus": 10**400}, {"memory": 10**30}, {"memory": math.nan},
        {"memory": True}, {"custom": {"a": Loud()}}, {"custom": {5: 1}}, {"custom": {"a\ud800": 1}},
        {"label_selector": {"region": 5}},
    ],
    ids=lambda given: next(iter(given)),
)  # fmt: skip
def test_resources_that_no_document_holds_are_refused(given):
    with pytest.raises(koan.JobDefinitionError, match=r"^resources\."):
        koan.Resources(**given)
