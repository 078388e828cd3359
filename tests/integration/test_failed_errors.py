"""An error of a job that nobody has caught shows where in the body it came from."""

from __future__ import annotations

import asyncio
import copy
import pickle
import subprocess
import sys
import traceback

import pytest

import koan_ray as koan
from koan_ray.errors import JobFailedError

SCRIPT = """
import koan_ray as koan


class Fails(koan.Job[int, int]):
    retry = koan.RetryPolicy(max_attempts=1)

    def execute(self, context, progress, cancellation) -> int:
        return inner_part(context)


def inner_part(n):
    return 1 // n


if __name__ == "__main__":
    koan.init(runtime="local")
    Fails.start(0).run().get().wait().get()
"""


class Fails(koan.Job[str, None]):
    retry = koan.RetryPolicy(max_attempts=1)

    async def execute(self, context, progress, cancellation) -> None:
        self.deep_inside(context)

    def deep_inside(self, context):
        raise LookupError(context)


class FailsByItems(koan.FiniteJob[int, int, int]):
    retry = koan.RetryPolicy(max_attempts=1)
    items = koan.ItemOptions(retry=koan.RetryPolicy(max_attempts=1), max_failed_items=0)

    def get_items(self, context):
        return range(context)

    def process_item(self, item, index, progress):
        return self.weigh(item)

    def weigh(self, item):
        raise LookupError(f"{item} weighs nothing")

    def build_result(self, summary):
        return summary.processed_items


def failure(job):
    with pytest.raises(koan.JobFailedError) as caught:
        job.wait().get(timeout=20)
    return caught.value


def test_a_script_that_catches_nothing_prints_the_body_s_stack_trace(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py"], capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path
    )
    assert done.returncode == 1
    shown = done.stderr
    assert shown.index("in inner_part") < shown.index("direct cause of the following") < shown.index("JobFailedError: job")
    assert "ZeroDivisionError" in shown


def test_the_trace_is_the_cause_and_the_text_stays_one_line(local_engine):
    error = failure(Fails.start("nobody").run().get(timeout=10))
    assert "\n" not in str(error)
    assert "in deep_inside" not in str(error)
    assert "in deep_inside" in str(error.__cause__)
    assert "in deep_inside" in "".join(traceback.format_exception(error))


def test_it_survives_pickling_copying_and_being_raised_again(local_engine):
    error = failure(Fails.start("nobody").run().get(timeout=10))
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(again) is JobFailedError
        assert again.args == error.args
        assert "in deep_inside" in "".join(traceback.format_exception(again))
    with pytest.raises(JobFailedError) as caught:
        raise error
    assert "in deep_inside" in "".join(traceback.format_exception(caught.value))


async def test_it_is_there_for_who_awaits(local_engine):
    job = await Fails.start("nobody").run()
    found = await asyncio.gather(job.wait(), job.wait(), return_exceptions=True)
    assert all("in deep_inside" in str(error.__cause__) for error in found)


def test_a_batch_that_fails_by_its_items_shows_where_the_last_one_failed(local_engine):
    error = failure(FailsByItems.start(3).run().get(timeout=10))
    assert error.error_type == "TooManyFailedItemsError"
    shown = "".join(traceback.format_exception(error))
    assert "in weigh" in shown
    assert "weighs nothing" in shown


def test_an_error_without_a_stack_trace_has_no_cause():
    assert JobFailedError("i", "k", "timeout", "TimeoutError", "m", 1, "").__cause__ is None
