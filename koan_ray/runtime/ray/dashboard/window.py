"""What the page is told: engines of a cluster, their jobs, one job. Only reads; every call blocks, for seconds at most."""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import TYPE_CHECKING, Any

import ray

from koan_ray.errors import ConfigurationError, RuntimeUnavailableError
from koan_ray.plain import execution_object, job_object
from koan_ray.runtime.ray import admin, options

if TYPE_CHECKING:
    from collections.abc import Mapping

    from koan_ray.engine.session import Session

_TIMEOUT_S = 10.0
_MAX_LIMIT = 200
_FILTERS = frozenset({"kind", "status", "text", "cursor", "parent_job_id"})


class Window:
    """Connects at the first question, and again when the connection is gone.

    Args:
        address: Of the cluster.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._lock = threading.Lock()
        self._sessions: dict[str, Session] = {}
        self._open = contextlib.ExitStack()

    def engines(self) -> dict[str, Any]:
        """Return the namespaces that have an engine."""
        self._connect()
        named = ray.util.list_named_actors(all_namespaces=True)
        found = [each["namespace"] for each in named if each["name"] == options.COORDINATOR_NAME]
        return {"engines": sorted(found)}

    def jobs(self, namespace: str, asked: Mapping[str, str]) -> dict[str, Any]:
        """Return one page of jobs, where the next begins, and the engine's own counts.

        Raises:
            ConfigurationError: A filter is unknown or has an unusable value.
            RuntimeUnavailableError: There is no such engine, or it does not answer.
        """
        filters: dict[str, Any] = {name: value for name, value in asked.items() if value}
        if unknown := filters.keys() - _FILTERS - {"limit"}:
            msg = f"unknown filter {min(unknown)!r}; allowed: {', '.join(sorted(_FILTERS))}, limit"
            raise ConfigurationError(msg)
        filters["limit"] = _limit(filters.get("limit", "50"))
        if "status" in filters:
            filters["status"] = filters["status"].split(",")
        session = self._session(namespace)
        page, status = session.query(filters), session.status()
        found, now = page.get(timeout=_TIMEOUT_S), status.get(timeout=_TIMEOUT_S)
        counts = {"queued": now["queued"] + now["waiting"], "running": now["running"]}
        for name in ("completed", "failed", "cancelled"):
            counts[name] = now["jobs"].get(name, 0)
        return {"jobs": [job_object(job) for job in found], "cursor": found.cursor, "counts": counts}

    def job(self, namespace: str, job_id: str) -> dict[str, Any]:
        """Return one job with its executions and the stack trace of its last error.

        Raises:
            JobNotFoundError: There is no such job.
            RuntimeUnavailableError: There is no such engine, or it does not answer.
        """
        session = self._session(namespace)
        job = session.get(job_id).get(timeout=_TIMEOUT_S)
        tried = session.executions(job_id).get(timeout=_TIMEOUT_S)
        whole = job_object(job, whole=True)
        shown = {name: value for name, value in whole.items() if name not in ("context", "result")}
        return {**shown, "executions": [execution_object(one) for one in tried]}

    def _connect(self) -> None:
        with self._lock:
            if ray.is_initialized():
                return
            self._forget()
            name = ray.job_config.JobConfig(metadata={"job_name": "koan-ray dashboard page"})
            ray.init(
                self._address, namespace="koan_ray.dashboard", job_config=name, log_to_driver=False,
                configure_logging=False, logging_level=logging.ERROR,
            )  # fmt: skip

    def _session(self, namespace: str) -> Session:
        self._connect()
        with self._lock:
            known = self._sessions.get(namespace)
            if known is None or not _is_there(namespace):
                self._sessions.pop(namespace, None)
                known = self._open.enter_context(admin.session(self._address, namespace))
                self._sessions[namespace] = known
            return known

    def _forget(self) -> None:
        self._sessions.clear()
        self._open.close()
        self._open = contextlib.ExitStack()


def _is_there(namespace: str) -> bool:
    try:
        ray.get_actor(options.COORDINATOR_NAME, namespace=namespace)
    except ValueError:
        return False
    return True


def _limit(given: str) -> int:
    if not given.isdecimal() or not 1 <= int(given) <= _MAX_LIMIT:
        msg = f"limit: expected a whole number from 1 to {_MAX_LIMIT}, got {given!r:.40}"
        raise ConfigurationError(msg)
    return int(given)


def status_of(error: BaseException) -> int:
    """Return the HTTP status that stands for an error."""
    from koan_ray.errors import JobNotFoundError

    if isinstance(error, JobNotFoundError):
        return 404
    if isinstance(error, ConfigurationError):
        return 400
    return 503 if isinstance(error, (RuntimeUnavailableError, TimeoutError)) else 500


def problem(error: BaseException) -> dict[str, Any]:
    """Return an error as a problem document."""
    status = status_of(error)
    told = str(error) or "the engine did not answer in time" if status != 500 else f"{type(error).__name__}"
    return {"type": "about:blank", "status": status, "title": told}
