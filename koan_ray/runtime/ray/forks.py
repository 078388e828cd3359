"""Ray in a forked copy of a process that uses it: not to be used, and not to be ended.

The copy has Ray's objects and none of its threads, so that every call would wait for ever; and it has Ray's handler for the
exit of a process, which would end the cluster that the original has started.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
from typing import Any

import ray

from koan_ray.errors import RuntimeUnavailableError

_original: int | None = None  # the process with Ray that this one is a copy of
_pid = os.getpid()


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
        for native in (
            getattr(worker.global_worker, "core_worker", None),
            getattr(worker.global_worker, "gcs_client", None),
            getattr(ray._private.state.state, "_global_state_accessor", None),  # noqa: SLF001
            worker._global_node,  # noqa: SLF001
        ):
            _never_destroy(native)
        worker._global_node = None  # noqa: SLF001 - the processes it would end are the original's
        _skip_native_exit_handlers()
    _pid = os.getpid()


def _never_destroy(thing: object) -> None:
    """Keep an object beyond the end of the interpreter: Ray's destructors wait for its threads, or fail without them."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def _skip_native_exit_handlers() -> None:
    """End this process, when Python has come to its end, without what Ray's library does at an exit: it waits for a thread.

    Python has flushed its files by then, and the exit code is kept: what is registered last is called first, with the code.
    """
    libc = ctypes.CDLL(None)
    with contextlib.suppress(AttributeError):  # another libc than GNU's
        libc.on_exit(ctypes.cast(libc._exit, ctypes.c_void_p), None)  # noqa: SLF001 - its name in C


os.register_at_fork(after_in_child=_after_fork)
