"""Ray in a forked copy of a process that uses it: not to be used, and not to be ended.

The copy has Ray's objects and none of its threads, so that every call would wait for ever; and it has Ray's handler for the
exit of a process, which would end the cluster that the original has started.
"""

from __future__ import annotations

import atexit
import os
from typing import Any

import ray

from koan_ray.errors import RuntimeUnavailableError

_original: int | None = None  # the process with Ray that this one is a copy of
_pid = os.getpid()
_inherited: list[Any] = []  # kept: their destructors would touch what the original uses


def check() -> None:
    """Refuse to go on where Ray would hang.

    Raises:
        RuntimeUnavailableError: This process is a forked copy of one that uses Ray.
    """
    if _original is not None or _has_lost_threads():
        original = "another" if _original is None else f"process {_original}"
        msg = (
            f"this process ({os.getpid()}) is a forked copy of {original}, which uses Ray, and Ray does not work in a "
            f"forked copy. Start the process with 'spawn' instead (multiprocessing.get_context('spawn')), fork before "
            f"ray.init() and koan.init(), or use koan.init(runtime='local') here"
        )
        raise RuntimeUnavailableError(msg)


def _has_lost_threads() -> bool:
    """Tell whether Ray was connected before a fork that came before this module."""
    listener = getattr(ray._private.worker.global_worker, "listener_thread", None)  # noqa: SLF001 - as below
    return ray.is_initialized() and listener is not None and not listener.is_alive()


def _after_fork() -> None:
    global _original, _pid  # noqa: PLW0603 - of one process
    worker: Any = ray._private.worker  # noqa: SLF001 - there is no public way to forget
    if ray.is_initialized():
        _original = _original or _pid
        atexit.unregister(worker.shutdown)
        _inherited.append(worker._global_node)  # noqa: SLF001
        worker._global_node = None  # noqa: SLF001 - the processes it would end are the original's
    _pid = os.getpid()


os.register_at_fork(after_in_child=_after_fork)
