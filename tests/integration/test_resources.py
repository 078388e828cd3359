"""What a job asks of its actor: environment, nodes, custom resources."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
import warnings

import pytest

import koan_ray as koan
from koan_ray import ambient
from tests.conftest import eventually

pytestmark = pytest.mark.ray


class InEnvironment(koan.Job[str, str]):
    resources = koan.Resources(num_cpus=0.5, runtime_env={"env_vars": {"KOAN_TEST_COLOUR": "green"}})

    def execute(self, context, progress, cancellation) -> str:
        return os.environ.get(context, "none")


class Plain(koan.Job[str, str]):
    resources = koan.Resources(num_cpus=0.5)

    def execute(self, context, progress, cancellation) -> str:
        return os.environ.get(context, "none")


class Elsewhere(koan.Job[None, None]):
    """No node has this label."""

    resources = koan.Resources(num_cpus=0.5, label_selector={"region": "nowhere"})

    async def execute(self, context, progress, cancellation) -> None:
        pass


class Licensed(koan.Job[float, list]):
    """The cluster has one licence. Returns when it began and ended."""

    resources = koan.Resources(num_cpus=0.1, custom={"licence": 1})

    async def execute(self, context, progress, cancellation) -> list:
        began = time.time()
        await asyncio.sleep(context)
        return [began, time.time()]


def result_of(job):
    return job.wait(timeout=60).get()


def test_a_body_finds_the_variables_of_its_runtime_environment_and_others_do_not(engine):
    jobs = [job_type.start("KOAN_TEST_COLOUR").run().get(timeout=30) for job_type in (InEnvironment, Plain)]
    assert [result_of(job) for job in jobs] == ["green", "none"]


def test_jobs_that_no_node_can_take_wait_while_others_run(engine):
    waiting = Elsewhere.start_many([None] * 5).run().get(timeout=30)
    others = Plain.start_many(["KOAN_TEST_COLOUR"] * 20).run().get(timeout=30)
    assert [result_of(job) for job in others] == ["none"] * 20
    assert {job.refresh().get().status for job in waiting} == {koan.JobStatus.QUEUED}
    for job in waiting:
        assert job.cancel().get() is koan.JobStatus.CANCELLED
    eventually(lambda: all(actor["state"] != "starting" for actor in engine.status().get()["actors"]), within=30)


def test_jobs_run_one_after_the_other_where_the_cluster_has_one_of_what_they_need(engine):
    jobs = Licensed.start_many([0.3] * 4).run().get(timeout=30)
    times = sorted(result_of(job) for job in jobs)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(times))
    assert result_of(Plain.start("KOAN_TEST_COLOUR").run().get(timeout=30)) == "none"


def test_a_job_that_no_node_can_run_says_so_at_once_and_everywhere(engine):
    class Nowhere(koan.Job[int, int]):
        resources = koan.Resources(num_cpus=0.1, num_gpus=7, label_selector={"region": "nowhere"})

        async def execute(self, context, progress, cancellation) -> int:
            return context

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first, second = (Nowhere.start(n).run().get(timeout=30) for n in range(2))
    (warning,) = [each for each in caught if issubclass(each.category, koan.JobWaitsWarning)]
    assert "job 'Nowhere': no node of the cluster has GPU: 7 (none has any)" in str(warning.message)
    details = first.details().get(timeout=30)
    assert (details.reason, details.source, details.node) == (
        str(warning.message).removeprefix("job 'Nowhere': "),
        None,
        None,
    )
    status = ambient.engine().ask("status").get(timeout=30)
    assert [each["reason"] for each in status["cannot_run"]] == [details.reason]
    assert status["failures"] == {}
    for job in (first, second):
        assert job.cancel().get(timeout=30) is koan.JobStatus.CANCELLED
