"""Odd values of one job, on the engine in this process with real threads: its neighbours notice nothing."""

from __future__ import annotations

import asyncio
import enum
import math
import time
import uuid
from datetime import timedelta
from decimal import Decimal

import pytest

import koan_ray as koan

ODD = "caf\udce9\x1b[31m.txt\x1b[0m\x00"
CLEAN = "caf\\xe9.txt\N{REPLACEMENT CHARACTER}"


class Colour(enum.Enum):
    RED = "red"


class Lazy:
    def __str__(self):
        raise RuntimeError


REPORTS = {
    "infinity": (1, math.inf), "nan": (1, math.nan), "an error": (0.5, ValueError("x")), "text that raises": (0.5, Lazy()),
    "a list": (0.5, [1]), "complex": (0.5, 1j), "a number as message": (0.5, None, 5), "huge": (10**400, 10**401),
    "a decimal": (Decimal("0.5"), "m"), "nothing": (None,), "text": ("x", "y"), "no unicode": (0.5, ODD),
}  # fmt: skip


class Reports(koan.Job[str, str]):
    retry = koan.RetryPolicy(max_attempts=1)

    async def execute(self, context, progress, cancellation) -> str:
        progress.report(*REPORTS[context])
        await asyncio.sleep(0.15)  # longer than it takes to ship progress
        progress.report(*REPORTS[context])
        return context


class ReportsAndFails(koan.Job[str, str]):
    retry = koan.RetryPolicy(max_attempts=1)

    def execute(self, context, progress, cancellation) -> str:
        progress.report(*REPORTS[context])
        time.sleep(0.1)
        raise FileNotFoundError(2, "No such file", ODD)


class ReportsInChild(Reports):
    isolation = koan.Isolation.PROCESS
    timeout = 20


class Plain(koan.Job[int, int]):
    async def execute(self, context, progress, cancellation) -> int:
        return context


class Later(koan.Job[str, str]):
    retry = koan.RetryPolicy(max_attempts=1)

    def execute(self, context, progress, cancellation) -> str:
        raise koan.Reschedule(after={"huge": 10**400, "never": timedelta.max, "nan": math.nan, "text": "soon"}[context])


@pytest.mark.parametrize("report", list(REPORTS))
def test_no_report_fails_its_job_or_stops_the_progress_of_others(local_engine, report):
    beside = Plain.start_many(range(20)).run().get(20)
    job = Reports.start(report).run().get(20)
    assert job.wait(20).get() == report
    failed = ReportsAndFails.start(report).run().get(20)
    with pytest.raises(koan.JobFailedError) as caught:
        failed.wait(20).get()
    (caught.value.error_message + caught.value.stack_trace).encode()
    assert "No such file" in caught.value.error_message
    assert "\x1b" not in caught.value.stack_trace
    assert [each.wait(20).get() for each in beside] == list(range(20))
    seen = [update.percentage for update in Reports.start("a list").run().get(20).progress_stream().blocking()]
    assert 0.5 in seen  # the ticker lives


@pytest.mark.parametrize("report", ["infinity", "text that raises", "huge", "no unicode"])
def test_no_report_of_a_child_process_fails_its_job(local_engine, report):
    assert ReportsInChild.start(report).run().get(20).wait(20).get() == report


def test_words_are_made_readable_and_found_by_what_was_given(local_engine):
    job = Plain.start(1, ODD).named(ODD, ODD).delayed(60).run().get(20)
    assert (job.name, job.description, job.correlation_id) == (CLEAN, CLEAN, CLEAN)
    assert [found.id for found in koan.Jobs.query(name=ODD, correlation_id=ODD).get(20)] == [job.id]
    assert koan.Jobs.count(text=ODD).get(20) == 1
    job.cancel(ODD).get(20)
    with pytest.raises(koan.JobCancelledError) as caught:
        job.refresh().get(20).wait(20).get()
    assert caught.value.reason == CLEAN


class Parent(koan.Job[None, str]):
    retry = koan.RetryPolicy(max_attempts=1)

    async def execute(self, context, progress, cancellation) -> str:
        return await (await self.start_child(Plain, 1, key=5).run()).wait()


@pytest.mark.parametrize(
    ("ask", "told"),
    [
        (lambda: Plain.start(1).named("n", 5), "named: expected a description as text, got 5"),
        (lambda: Plain.start(1).named(b"n"), "named: expected text of at most 500 characters, got b'n'"),
        (lambda: Plain.start(1).named(Lazy()), "named: expected text"),
        (lambda: Plain.start(1, 5), "start: expected a correlation id as text, got 5"),
        (lambda: Plain.start(1).with_correlation(uuid.UUID(int=1)), "with_correlation: expected a correlation id as text"),
        (lambda: Plain.start(1).delayed(10**400), "delayed: expected at most 1,000 years"),
        (lambda: Plain.start(1).delayed(timedelta.max), "delayed: expected at most 1,000 years"),
        (lambda: Plain.start(1).delayed(math.inf), "delayed: expected a timedelta"),
        (lambda: Plain.start(1).persist(partition="../x"), "partition: expected 1 to 64"),
        (lambda: Plain.start(1).persist(source=5), "expected the name of a source"),
        (lambda: koan.RetryPolicy(max_attempts=10**30), "retry.max_attempts: expected a whole number from 1 to 9,223"),
        (lambda: koan.RetryPolicy(initial_delay=1e300), "retry.initial_delay: expected at most 1,000 years"),
        (lambda: koan.Jobs.cancel("0198f0c2-7b7e-7cc2-a1f5-2f1d1e6a9b10", 5), "cancel: expected a reason as text, got 5"),
        (lambda: koan.Jobs.query(metadata={"k": math.nan}).get(20), "metadata: k: is nan"),
        (lambda: koan.Jobs.count(metadata={"k": object()}).get(20), "metadata: k: <object"),
        (lambda: list(koan.Jobs.stream(metadata={5: 1}).blocking()), "metadata: 5: keys are"),
        (lambda: koan.Jobs.query(name=5).get(20), "name: expected text, got 5"),
        (lambda: koan.Jobs.query(limit=10**5000).get(20), "limit: expected a whole number from 1 to 1000"),
        (lambda: koan.Jobs.query(created_after=math.nan).get(20), "created_after: expected"),
        (lambda: koan.Jobs.query(status=Lazy()).get(20), "status: expected one or several"),
    ],
)  # fmt: skip
def test_what_cannot_be_taken_is_refused_where_it_is_said(local_engine, ask, told):
    with pytest.raises(koan.ConfigurationError) as caught:
        ask()
    assert told in str(caught.value)
    assert Plain.start(3).run().get(20).wait(20).get() == 3


def test_a_child_key_that_is_no_text_fails_the_parent_with_the_way_out(local_engine):
    with pytest.raises(koan.JobFailedError, match=r"child key: expected text that is Unicode, got 5; use str\(key\)"):
        Parent.start().run().get(20).wait(20).get()


@pytest.mark.parametrize(
    ("context", "told"),
    [("huge", "at most 1,000 years"), ("never", "at most 1,000 years"), ("nan", "got nan"), ("text", "soon")],
)
def test_a_reschedule_that_no_calendar_holds_fails_the_attempt(local_engine, context, told):
    with pytest.raises(koan.JobFailedError, match=r"Reschedule\(after=") as caught:
        Later.start(context).run().get(20).wait(20).get()
    assert told in str(caught.value)


def test_waiting_for_ages_works_in_every_way_to_wait(local_engine):
    for timeout in (1e10, timedelta.max, math.inf, 10**400, 1e7):
        job = Plain.start(1).run().get(timeout)
        assert job.wait(timeout).get(timeout) == 1
    job = Plain.start(2).delayed(60).run().get(20)
    pending = job.wait(timedelta.max)
    with pytest.raises(TimeoutError):  # later waits still time out
        job.wait(0.05).get(20)
    assert not pending.done
    job.cancel().get(20)


def test_the_longest_limits_mean_none(local_engine):
    recipe = (
        koan.Jobs.recipe().use_policy(timeout=timedelta.max, retry=koan.RetryPolicy(max_delay=timedelta.max)).build(Plain)
    )
    assert recipe.start(7).run().get(20).wait(20).get() == 7


@pytest.mark.parametrize(
    "value",
    [uuid.UUID(int=5), Decimal("1.50"), Colour.RED, (1, (2,)), {"b", "a"}, b"ab", timedelta(seconds=90), 2**70, None],
)
def test_a_job_is_found_by_the_metadata_that_it_was_given(local_engine, value):
    job = Plain.start(1).with_metadata(k=value).run().get(20)
    job.wait(20).get()
    Plain.start(1).with_metadata(k="another").run().get(20)
    asked = {"metadata": {"k": value}}
    assert [found.id for found in koan.Jobs.query(**asked).get(20)] == [job.id]
    assert [found.id for found in Plain.stream(**asked).blocking()] == [job.id]
    assert Plain.count(**asked).get(20) == 1
    assert [found.id for found in Plain.query(kind=Plain, status=koan.JobStatus.COMPLETED, **asked).get(20)] == [job.id]
