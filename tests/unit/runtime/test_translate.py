"""What a user reads when a job actor's process is gone."""

from __future__ import annotations

import pytest
from ray.exceptions import RuntimeEnvSetupError

from koan_ray.runtime.ray.translate import cause_of_death

_EXITED = (
    "The actor died unexpectedly before finishing this task.\n"
    "\tclass_name: JobActor\n"
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
    "unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was killed "
    "by the OOM killer due to high memory usage, (2) ray stop --force was called, or (3) the worker crashed unexpectedly "
    "due to SIGSEGV or other unexpected errors."
)
_OUT_OF_MEMORY = "Task was killed due to the node running low on memory.\nMemory on the node was 15.1GB / 15.5GB."


@pytest.mark.parametrize(
    ("text", "told", "not_told"),
    [
        (_EXITED, "connection error code 2. End of file.", "memory"),
        (_OUT_OF_MEMORY, "out of memory: Task was killed due to the node running low on memory.", "15.1GB"),
    ],
)
def test_a_process_that_ended_is_not_said_to_be_out_of_memory_unless_it_was(text, told, not_told):
    cause = cause_of_death(RuntimeError(text))
    assert told in cause
    assert not_told not in cause


def test_an_environment_that_cannot_be_set_up_is_told_with_what_prevents_it():
    trace = "Could not create the actor because its associated runtime env failed to be created.\nTraceback\n  File x\n"
    cause = cause_of_death(RuntimeEnvSetupError(f"{trace}ImportError: You must `pip install smart_open[s3]`\n"))
    assert cause == "its runtime_env could not be set up: ImportError: You must `pip install smart_open[s3]`"
