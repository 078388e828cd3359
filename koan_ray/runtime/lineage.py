"""Which body a thread belongs to, where its context cannot tell.

A body that waits for its children gives its place to them; a wait finds its body in the context. Threads begin with an
empty one, and so the wait of a helper, in a ``Thread``, a ``ThreadPoolExecutor`` or through ``loop.run_in_executor``, would
keep the place, while the body waits for the helper, the helper for the child, and the child for the place.

So in a process that runs bodies ``Thread.start`` and ``ThreadPoolExecutor.submit`` note whose doing they are; for all others
they do what they did. What neither sees, such as threads of native libraries, waits in a job actor on behalf of a body that
has a place: nobody else is there who could have started it.
"""

from __future__ import annotations

import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from typing import TYPE_CHECKING, Any, Final

from koan_ray import ambient

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

_MARK: Final = "_koan_started_by"
_once = threading.Lock()
_process = object()  # this one; another after a fork, because the bodies of the original are not the copy's


def follow(stand_in: Callable[[], ambient.Parking | None] | None = None) -> None:
    """Have waits in threads find their body from now on; may be repeated.

    Args:
        stand_in: Returns a body on whose behalf a thread of unknown origin waits. None: such a thread is the application's.
    """
    with _once:
        if not hasattr(threading.Thread.start, _MARK):
            threading.Thread.start = _noting_start(threading.Thread.start)  # type: ignore[method-assign]
            os.register_at_fork(after_in_child=_forget)
            ThreadPoolExecutor.submit = _noting_submit(ThreadPoolExecutor.submit)  # type: ignore[method-assign]
    ambient.whose_thread = lambda: _starter() or (stand_in() if stand_in is not None else None)


def _forget() -> None:
    global _process  # noqa: PLW0603 - of the process
    _process = object()
    ambient.whose_thread = None


def _starter() -> ambient.Parking | None:
    """Return the body that has started this thread, if one has."""
    mark: tuple[object, Callable[[], ambient.Parking | None]] | None = getattr(threading.current_thread(), _MARK, None)
    return mark[1]() if mark is not None and mark[0] is _process else None


def _noting_start(original: Callable[[threading.Thread], None]) -> Any:
    @wraps(original)
    def start(self: threading.Thread) -> None:
        body = ambient.attempt.get() or _starter()
        if body is not None:
            setattr(
                self, _MARK, (_process, weakref.ref(body))
            )  # an idle thread of a pool must not keep what a body was given
        original(self)

    setattr(start, _MARK, True)
    return start


def _noting_submit(original: Callable[..., Future[Any]]) -> Any:
    @wraps(original)
    def submit(self: ThreadPoolExecutor, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        body = ambient.attempt.get() or _starter()
        if body is None:
            return original(self, fn, *args, **kwargs)
        return original(self, _within, body, fn, args, kwargs)

    return submit


def _within(body: ambient.Parking, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function on behalf of a body, in a thread that a pool may have had before it."""
    mark = ambient.attempt.set(body)
    try:
        return fn(*args, **kwargs)
    finally:
        ambient.attempt.reset(mark)
