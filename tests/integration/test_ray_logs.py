"""On a cluster the log of coordinator and job actors is among Ray's own log files, under the ids of jobs."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest
import ray

import koan_ray as koan

pytestmark = pytest.mark.ray
ENGINE = {"max_crashes": 1}


class Dies(koan.Job[None, None]):
    def execute(self, context, progress, cancellation) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Undecided(koan.Job[str, None]):
    retry = koan.RetryPolicy(max_attempts=1)

    def execute(self, context, progress, cancellation) -> None:
        raise ValueError(context)

    def should_retry(self, last_execution):
        raise RuntimeError(f"cannot decide\r\nERROR forged {last_execution.job_id}")


class Stubborn(koan.Job[None, None]):
    isolation = koan.Isolation.PROCESS
    timeout = 0.3
    retry = koan.RetryPolicy(max_attempts=1)

    def execute(self, context, progress, cancellation) -> None:
        signal.pause()


def records(job_id):
    """What Ray's log files say of a job: each record with the lines of its stack trace."""
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    found = []
    for path in (session / "logs").glob("worker-*.err"):
        text = path.read_text(errors="replace")
        found += re.findall(rf"^[^ ].*{job_id}.*\n(?:  .*\n)*", text, re.MULTILINE)
    return found


def failed(job, how):
    with pytest.raises(koan.JobFailedError) as caught:
        job.wait(timeout=60).get()
    assert caught.value.failure == how
    return job.id


def test_that_an_execution_was_lost_is_in_the_coordinator_s_log(engine, eventually):
    job_id = failed(Dies.start().run().get(timeout=30), "poison")
    eventually(lambda: records(job_id))
    (record,) = records(job_id)
    assert " WARNING coordinator[" in record
    assert f"execution_lost job_id={job_id} execution_id=" in record
    assert "kind=Dies" in record


def test_that_a_retry_policy_raises_is_in_the_job_actor_s_log_with_its_stack_trace(engine, eventually):
    job_id = failed(Undecided.start("x").run().get(timeout=30), "exhausted")
    eventually(lambda: records(job_id))
    (record,) = [record for record in records(job_id) if "retry_policy_failed" in record]
    assert " WARNING job actor[" in record
    assert "in should_retry" in record
    assert "execution_id=" in record


def test_that_a_child_had_to_be_killed_is_in_the_job_actor_s_log(engine, eventually):
    job_id = failed(Stubborn.start().run().get(timeout=30), "timeout")
    eventually(lambda: records(job_id))
    record = records(job_id)[0]
    assert "child_killed" in record or "execution_killed" in record  # the coordinator's patience ends soon after
    assert "cause=timeout" in record


def test_the_settings_choose_level_and_format(cluster, eventually, engine):
    namespace = engine.namespace + "-json"
    koan.shutdown()
    from tests.integration.conftest import end_namespace

    with koan.init(engine={"namespace": namespace, "max_actors": 1}, logging={"level": "info", "format": "json"}):
        job = Undecided.start("y").run().get(timeout=30)
        failed(job, "exhausted")
        eventually(lambda: len(records(job.id)) > 3)
        found = [json.loads(record) for record in records(job.id)]
        end_namespace(namespace)
    assert {"coordinator", "job_moved"} <= {each["process"] for each in found} | {each["event"] for each in found}
    assert all(each.get("koan_job_id", job.id) == job.id for each in found)
