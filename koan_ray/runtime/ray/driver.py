"""Joins or starts Ray, finds or creates coordinator and broker, and connects a session to them."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

import ray
from ray._private import services
from ray.experimental import internal_kv

from koan_ray import ambient, wiring
from koan_ray.engine.session import Session
from koan_ray.errors import ConfigurationError, RuntimeUnavailableError
from koan_ray.runtime.code import Shipping
from koan_ray.runtime.knocking import knock
from koan_ray.runtime.ray import forks, options
from koan_ray.runtime.ray.actors import BrokerActor, CoordinatorActor
from koan_ray.runtime.ray.transport import RayTransport
from koan_ray.telemetry import traces

if TYPE_CHECKING:
    from koan_ray.config import Settings
    from koan_ray.engine.settings import EngineSettings

_START_TIMEOUT_S = 60.0


class RayRuntime:
    """This process's connection to the engine on a Ray cluster."""

    def __init__(self, settings: EngineSettings, namespace: str, *, owns_ray: bool) -> None:
        self._settings, self._namespace, self._owns_ray = settings, namespace, owns_ray
        self._transport = RayTransport(self._find)
        self.session = Session(
            self._transport, inline_limit=settings.inline_limit, ship=Shipping().ship, trace=traces.current
        )

    @classmethod
    def start(cls, address: str | None, settings: Settings, *, is_explicit: bool) -> RayRuntime:
        """Start or join Ray and the engine on it; ``is_explicit``: these settings were asked for, not defaults."""
        forks.check()
        wiring.check_sources(wiring.engine_settings(settings))  # here: in the coordinator nobody would see the error
        owns_ray = not ray.is_initialized()
        if owns_ray:
            start_ray(address, settings)
        namespace = settings.engine.namespace
        if not is_explicit:
            namespace = _namespace_of_this_job() or namespace
        runtime = cls(wiring.engine_settings(settings), namespace, owns_ray=owns_ray)
        try:
            runtime._connect(is_explicit=is_explicit)
        except BaseException:
            runtime.stop()
            raise
        return runtime

    def _connect(self, *, is_explicit: bool) -> None:
        coordinator = self._find("coordinator")
        self._transport.know("coordinator", coordinator)
        if _is_worker():
            ambient.block = self._transport.block
        else:
            _remember_namespace(self._namespace)
        if is_explicit:
            try:
                in_force: EngineSettings = ray.get(coordinator.warm.remote(), timeout=_START_TIMEOUT_S)
            except (ray.exceptions.RayError, TimeoutError) as error:
                msg = (
                    f"the coordinator did not start within {_START_TIMEOUT_S:g} s ({type(error).__name__}: {error}); "
                    f"look at the Ray dashboard or the logs of the cluster"
                )
                raise RuntimeUnavailableError(msg) from error
            self._check(in_force)
        else:
            coordinator.warm.remote()
        if self._settings.keeps_documents:
            self.session.introduce_kinds()

    def _check(self, in_force: EngineSettings) -> None:
        mine, theirs = self._settings, in_force
        names = mine.differences(theirs)
        if names:
            listed = "; ".join(f"{name}: {theirs.shown(name)} != {mine.shown(name)}" for name in names)
            msg = (
                f"koan.init(): the engine in namespace {self._namespace!r} of this cluster runs with other settings "
                f"({listed}); use the same, another engine.namespace, or end it with `koan-ray down`"
            )
            raise ConfigurationError(msg)

    def _find(self, whom: str) -> Any:
        if whom == "coordinator":
            shell = options.shell(CoordinatorActor, options.COORDINATOR_GROUPS)
            chosen = shell.options(**options.COORDINATOR, namespace=self._namespace)
            return chosen.remote(self._settings, self._namespace)
        shell = options.shell(BrokerActor, options.BROKER_GROUPS)
        return shell.options(**options.BROKER, namespace=self._namespace).remote(self._settings)

    def stop(self) -> None:
        """Disconnect; Ray ends as well if this process had started it."""
        self._transport.close()
        if ambient.block == self._transport.block:
            ambient.block = None
        if self._owns_ray and ray.is_initialized():
            ray.shutdown()


def start_ray(address: str | None, settings: Settings, *, log_level: int = logging.INFO) -> None:
    """Start a Ray here, or join one, as `ray.init` would; ``log_level`` is for what Ray itself says in this process.

    Raises:
        RuntimeUnavailableError: There is no Ray at ``address``.
    """
    try:
        if address is not None:
            knock(address)
        elif _is_left_over(services.find_bootstrap_address(None)):
            address = "local"
        ray.init(address=address, namespace=settings.engine.namespace, logging_level=log_level)
    except (OSError, ValueError, RuntimeError) as error:
        where = f"at {address!r}" if address else "on this machine"
        msg = (
            f"no Ray {where}: {type(error).__name__}: {error}. Start one with `ray start --head`, leave the address out "
            f"to start one here, or use koan.init(runtime='local').{token_hint(address)}"
        )
        raise RuntimeUnavailableError(msg) from error


def token_hint(address: str | None) -> str:
    """Say what may be missing where a Ray was there and did not let us in; empty where no address was given.

    Ray uses a token by default where it starts itself, and does not where an address is named.
    """
    if not address or os.environ.get("RAY_AUTH_MODE"):
        return ""
    return " If it runs and asks for a token, set RAY_AUTH_MODE=token (`ray get-auth-token` shows that of this machine)."


def _is_left_over(address: str | None) -> bool:
    """Tell whether Ray would join a cluster of this machine that is gone: one that was killed stays written down.

    Ray would try for ever, and Ctrl-C could not interrupt it.
    """
    if not address or address in ("auto", "local") or os.environ.get("RAY_ADDRESS"):
        return False
    try:
        knock(address)
    except OSError:
        return True
    return False


def _is_worker() -> bool:
    return bool(ray.get_runtime_context().worker.mode == ray.WORKER_MODE)


def _job_key() -> bytes:
    return b"namespace/" + str(ray.get_runtime_context().get_job_id()).encode()


def _remember_namespace(namespace: str) -> None:
    """Let this driver's tasks find the engine that the driver uses."""
    if internal_kv._internal_kv_initialized():  # noqa: SLF001 - Ray has no public key-value store
        internal_kv._internal_kv_put(_job_key(), namespace.encode(), namespace=options.KV)  # noqa: SLF001


def _namespace_of_this_job() -> str | None:
    if not internal_kv._internal_kv_initialized():  # noqa: SLF001 - see above
        return None
    found = internal_kv._internal_kv_get(_job_key(), namespace=options.KV)  # noqa: SLF001
    return found.decode() if found else None
