"""Every Ray option that we set, in one place, with its reason.

Source: Ray 2.60; the control actors follow Ray Serve's controller.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import ray

if TYPE_CHECKING:
    from koan_ray.domain.records import ActorSpec

COORDINATOR_NAME: Final = "koan_ray.coordinator"
BROKER_NAME: Final = "koan_ray.broker"
JOB_PREFIX: Final = "koan_ray.job/"
KV: Final = b"koan_ray"  # our namespace in Ray's internal key-value store

_CONTROL: Final[dict[str, Any]] = {
    "lifetime": "detached",  # outlives the driver that happened to be first
    "get_if_exists": True,
    "max_restarts": -1,
    "max_task_retries": -1,  # their calls are idempotent, so Ray may repeat them
    "num_cpus": 0,
    "resources": {"node:__internal_head__": 0.001},
    "scheduling_strategy": "DEFAULT",  # not inside a caller's placement group
    "enable_task_events": False,  # 20 % cheaper calls, and no noise in the task table
    "allow_out_of_order_execution": True,  # an ordered queue can stall after a lost call (ray#65785)
}
# A group is a set of threads that only its methods use, so that parked waits cannot hold up a submit. Parked calls above
# the number of threads wait in Ray; the coordinator answers sooner when it sees many (`coordinator._FEW_PARKED`).
COORDINATOR_GROUPS: Final = {"submit": 16, "wait": 64, "report": 4, "checkpoint": 8, "control": 8}
BROKER_GROUPS: Final = {"push": 2, "poll": 64}
COORDINATOR: Final = {**_CONTROL, "name": COORDINATOR_NAME}
BROKER: Final = {**_CONTROL, "name": BROKER_NAME}

ATTEND_LIMIT: Final = 8  # long executions of one actor that the dashboard shows as calls in progress
JOB_GROUPS: Final = {"run": 2, "control": 2, "watch": 1, "attend": ATTEND_LIMIT}


def shell(actor_class: type[Any], groups: dict[str, int]) -> Any:
    """Return a class as a Ray actor class with these groups, which Ray takes here and not with the other options."""
    remote: Any = ray.remote  # its annotations leave concurrency_groups out
    return remote(concurrency_groups=groups)(actor_class)


def job_actor(spec: ActorSpec, name: str, namespace: str, *, lent: bool) -> dict[str, Any]:
    """Return the options of a job actor; ``lent``: it runs on the CPU of a parent that waits, and holds none itself."""
    options: dict[str, Any] = {
        "name": name,
        "namespace": namespace,
        "lifetime": "detached",  # a coordinator crash stops no job
        "max_restarts": 0,  # retry has one owner: the coordinator
        "max_task_retries": 0,
        "num_cpus": 0.0 if lent else spec.num_cpus,
        "num_gpus": spec.num_gpus,
        "scheduling_strategy": "DEFAULT",
        "allow_out_of_order_execution": True,
    }
    if spec.memory is not None:
        options["memory"] = spec.memory
    if spec.custom:
        options["resources"] = dict(spec.custom)
    if spec.label_selector:
        options["label_selector"] = dict(spec.label_selector)
    if spec.runtime_env is not None:
        options["runtime_env"] = json.loads(spec.runtime_env)
    return options
