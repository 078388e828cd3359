"""Looking at and ending the engine of a cluster, for the command line."""

from __future__ import annotations

import contextlib
import logging
import pickle
from typing import TYPE_CHECKING, Any, cast

import ray

from koan_ray.engine.session import Session
from koan_ray.errors import RuntimeUnavailableError
from koan_ray.runtime.code import Shipping
from koan_ray.runtime.knocking import knock
from koan_ray.runtime.ray import options
from koan_ray.runtime.ray.actors import BrokerActor
from koan_ray.runtime.ray.driver import start_ray, token_hint
from koan_ray.runtime.ray.translate import to_ours
from koan_ray.runtime.ray.transport import RayTransport
from koan_ray.telemetry import traces

if TYPE_CHECKING:
    from collections.abc import Iterator

    from koan_ray.config import Settings
    from koan_ray.domain.records import JobView
    from koan_ray.engine.settings import EngineSettings

_TIMEOUT_S = 30.0


@contextlib.contextmanager
def joined(address: str | None, settings: Settings) -> Iterator[bool]:
    """Start or join Ray, and tell whether an engine is in its namespace already; what was started ends afterwards.

    Raises:
        RuntimeUnavailableError: There is no Ray at ``address``.
    """
    is_ours = not ray.is_initialized()
    if is_ours:
        start_ray(address, settings, log_level=logging.ERROR)
    try:
        yield _has_engine(settings.engine.namespace)
    finally:
        if is_ours:
            ray.shutdown()


def _has_engine(namespace: str) -> bool:
    try:
        ray.get_actor(options.COORDINATOR_NAME, namespace=namespace)
    except ValueError:
        return False
    return True


def ray_address() -> str:
    """Return the address at which another process joins the Ray of this one."""
    return str(ray.get_runtime_context().gcs_address)


def status(address: str, namespace: str) -> dict[str, Any]:
    """Return what the coordinator says of itself.

    Raises:
        RuntimeUnavailableError: There is no Ray at ``address``, or no engine in the namespace.
    """
    coordinator = _find(address, namespace)
    answer = ray.get(coordinator.ask.remote("status", pickle.dumps(())), timeout=_TIMEOUT_S)
    return cast("dict[str, Any]", pickle.loads(answer))  # noqa: S301 - from the cluster that we run on


@contextlib.contextmanager
def session(address: str, namespace: str) -> Iterator[Session]:
    """Connect to the engine of a cluster as it is; none is started, whatever the settings here say.

    Raises:
        RuntimeUnavailableError: As `status`.
    """
    was_connected = ray.is_initialized()
    connected: Session | None = None
    transport = RayTransport(lambda whom: _actor(whom, namespace, in_force))
    try:
        coordinator = _find(address, namespace)
        in_force: EngineSettings = ray.get(coordinator.warm.remote(), timeout=_TIMEOUT_S)
        connected = Session(transport, inline_limit=in_force.inline_limit, ship=Shipping().ship, trace=traces.current)
        yield connected
    except (ray.exceptions.RayError, TimeoutError) as error:
        raise to_ours(error, "session") from None
    finally:
        if connected is not None:
            connected.close("the command has ended")
        transport.close()
        if not was_connected and ray.is_initialized():
            ray.shutdown()


def _actor(whom: str, namespace: str, settings: EngineSettings) -> Any:
    if whom == "coordinator":
        return ray.get_actor(options.COORDINATOR_NAME, namespace=namespace)
    shell = options.shell(BrokerActor, options.BROKER_GROUPS)  # nobody may have watched anything yet
    return shell.options(**options.BROKER, namespace=namespace).remote(settings)


def archive(address: str, namespace: str, *, dry_run: bool) -> dict[str, dict[str, int]]:
    """Apply the archival policies now; returns counts by policy. It may take long, and is waited for.

    Raises:
        RuntimeUnavailableError: As `status`.
    """
    return cast("dict[str, dict[str, int]]", _ask(address, namespace, "archive", dry_run))


def restore(address: str, namespace: str, job_id: str) -> JobView:
    """Bring a job back from an archive; returns it.

    Raises:
        JobNotFoundError: There is no such job.
        RuntimeUnavailableError: As `status`.
    """
    return cast("JobView", _ask(address, namespace, "restore", job_id))


def _ask(address: str, namespace: str, method: str, *args: object) -> Any:
    """Ask the coordinator something that may take long."""
    coordinator = _find(address, namespace)
    try:
        answer = ray.get(coordinator.ask.remote(method, pickle.dumps(args)))
    except ray.exceptions.RayError as error:
        raise to_ours(error, method) from None
    return pickle.loads(answer)  # noqa: S301 - from the cluster that we run on


def end(address: str, namespace: str) -> int:
    """End coordinator, broker and job actors; returns how many job actors there were.

    A coordinator that does not answer is killed; its job actors then end by themselves, as those of one that crashed.
    """
    coordinator = _find(address, namespace)
    try:
        n_actors = int(ray.get(coordinator.end.remote(), timeout=_TIMEOUT_S))
    except ray.exceptions.GetTimeoutError:
        n_actors = 0
    ray.kill(coordinator)
    with contextlib.suppress(ValueError):  # nobody has watched anything yet
        ray.kill(ray.get_actor(options.BROKER_NAME, namespace=namespace))
    return n_actors


def _find(address: str, namespace: str) -> Any:
    if not ray.is_initialized():
        try:
            knock(address)
            ray.init(address, namespace=namespace, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, ValueError, RuntimeError) as error:
            msg = f"no Ray at {address!r}: {error}. Give the address of a cluster with --address.{token_hint(address)}"
            raise RuntimeUnavailableError(msg) from error
    try:
        return ray.get_actor(options.COORDINATOR_NAME, namespace=namespace)
    except ValueError:
        msg = (
            f"no engine in namespace {namespace!r} of this cluster ({ray_address()}); it starts with the first job, with "
            f"koan.init(), or with `koan-ray dev`"
        )
        raise RuntimeUnavailableError(msg) from None


def dashboard_url() -> str | None:
    """Return the address of the Ray dashboard that this process is connected to."""
    url = ray.get_runtime_context().worker.node.webui_url if ray.is_initialized() else None
    return f"http://{url}" if url else None
