"""One Ray for the whole run; a namespace of its own for each module."""

from __future__ import annotations

import contextlib
import os
import signal

import pytest
import ray

import koan_ray as koan
from koan_ray.runtime.ray import options


def end_namespace(namespace: str, *, within: float = 20.0) -> None:
    """End coordinator, broker and job actors, so that they hold no CPU while other modules run.

    The job actors go first. A coordinator whose store is gone would then wait for it ``within`` seconds.
    """
    with contextlib.suppress(Exception):
        coordinator = ray.get_actor(options.COORDINATOR_NAME, namespace=namespace)
        ray.get(coordinator.end.remote(), timeout=within)
    for name in (options.COORDINATOR_NAME, options.BROKER_NAME):
        end_actor(name, namespace)


def end_actor(name: str, namespace: str) -> None:
    with contextlib.suppress(ValueError):
        ray.kill(ray.get_actor(name, namespace=namespace))


@pytest.fixture(scope="module")
def engine(cluster, request):
    namespace = "test-" + request.module.__name__.rpartition(".")[2]
    sections = {"max_actors": 2, "cancel_grace": 0.5, **getattr(request.module, "ENGINE", {})}
    with koan.init(engine={"namespace": namespace, **sections}) as engine:
        engine.namespace = namespace
        yield engine
        end_namespace(namespace)


def kill9(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
