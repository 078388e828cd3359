"""Threads of ours, and users' code on them: whatever that code raises is logged and ends nothing but itself.

What a thread of ours does is wrapped once, by `keep`, which begins it again where it has ended of an error. What users hand
in to be called (handlers of progress, callbacks) runs on `handlers`: threads for nothing else, so that one that blocks, even
for ever, holds up neither the engine nor the other handlers.
"""

from __future__ import annotations

import atexit
import contextlib
import contextvars
import logging
import os
import threading
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from koan_ray.errors import RuntimeUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
_log = logging.getLogger("koan_ray.threads")
LONGEST_WAIT_S: Final = 3600.0  # that a lock is waited for at a time: what the platform can wait for is limited
_AGAIN_S: Final = 0.05  # between the end of a thread and its next beginning: one that cannot go on must not burn a CPU
_FEW: Final = 8  # threads for handlers that are started as they are needed
_MOST: Final = 256  # of them, when those before do not come back
_PATIENCE_S: Final = 0.25  # that handlers wait for a thread before there is one more than `_FEW`
_IDLE_S: Final = 10.0  # after which a thread for handlers ends
_LAST_S: Final = 2.0  # for handlers that run or wait when the interpreter ends


class _Answering(threading.local):
    """Whether this thread is bringing answers of the engine at present."""

    now = False


answering = _Answering()
_locks: list[weakref.ref[Any]] = []  # those that answers of the engine need on their way


def lock() -> Any:
    """Return a lock that answers of the engine need on their way; the thread that has it must not wait for any.

    Reentrant: a finalizer or a signal handler may use the engine in the middle of a call of its own thread.
    """
    made = threading.RLock()
    _locks[:] = [known for known in _locks if known() is not None]
    _locks.append(weakref.ref(made))
    return made


def check_may_block() -> None:
    """Refuse to wait for the engine where that would keep its answers from arriving.

    That is in a finalizer or a signal handler that has hit the thread which brings them, or the middle of a call.

    Raises:
        RuntimeUnavailableError: The wait would never end.
    """
    if answering.now or any((known := ref()) is not None and known._is_owned() for ref in _locks):  # noqa: SLF001 - as Condition does
        raise RuntimeUnavailableError(
            "waiting for the engine in a finalizer such as __del__, or a signal handler, that has hit it in the middle of "
            "its work would never end; hand it to another thread, or leave out get()"
        )


def say(level: int, text: str, *args: object, exc_info: BaseException | None = None) -> None:
    """Log from a thread of ours, unless the interpreter is about to end.

    A daemon thread stopped in the middle of writing would keep the lock of the stream, and the interpreter aborts on that.
    """
    with _saying:
        if not _is_ending:
            with contextlib.suppress(Exception):  # a user's logging handler may raise
                _log.log(level, text, *args, exc_info=exc_info)


def _fall_silent() -> None:
    global _is_ending  # noqa: PLW0603 - of the process
    if _saying.acquire(timeout=_LAST_S):  # whoever is writing comes to an end first
        _is_ending = True
        _saying.release()


def _speak_again() -> None:
    global _saying  # noqa: PLW0603 - of the process
    _saying = threading.RLock()


_saying = threading.RLock()
_is_ending = False
atexit.register(_fall_silent)  # registered before, and so called after, what ends the engine
os.register_at_fork(after_in_child=_speak_again)


def survive(what: str, error: BaseException) -> None:
    """Log what a callback raised, so that its caller goes on. Ctrl-C in the main thread is for the program, and raised."""
    if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
        raise error
    say(logging.ERROR, "%s: %s", what, type(error).__name__, exc_info=error)


def guarded(what: str, action: Callable[..., Any], *args: Any) -> None:
    """Call ``action``; what it raises is logged as ``what``."""
    try:
        action(*args)
    except BaseException as error:  # noqa: BLE001 - whatever it is, the thread goes on
        survive(what, error)


def keep(name: str, work: Callable[[], None]) -> threading.Thread:
    """Start a daemon thread that does ``work`` until it returns; where it raises, that is logged and it begins again."""

    def main() -> None:
        while True:
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - a thread of ours does not end unnoticed
                survive(f"thread_restarted: {name}", error)
                threading.Event().wait(_AGAIN_S)
            else:
                return

    thread = threading.Thread(target=main, name=name, daemon=True)
    thread.start()
    return thread


def apart(name: str, work: Callable[[], T], *, undo: Callable[[T], object] = lambda _: None) -> T:
    """Do ``work`` in a thread of its own, where no interrupt reaches it, and return or raise its outcome.

    A caller who is interrupted meanwhile goes; the work is done nevertheless, and what it has made is handed to ``undo``.
    """
    known, made, is_left = threading.Event(), list[T](), False
    failed: list[BaseException] = []
    context = contextvars.copy_context()

    def main() -> None:
        try:
            made.append(context.run(work))
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            failed.append(error)
        known.set()
        if is_left and made:
            guarded(f"undo_failed: {name}", undo, made[0])

    thread = threading.Thread(target=main, name=name, daemon=True)
    try:
        thread.start()
        while not known.wait(LONGEST_WAIT_S):
            pass
    except RuntimeError:  # no thread can be started: as many as the system allows, or the interpreter ends
        return work()
    except BaseException:
        is_left = True
        if known.is_set() and made:
            threading.Thread(target=guarded, args=(f"undo_failed: {name}", undo, made[0]), name=name, daemon=True).start()
        raise
    if failed:
        raise failed[0]
    return made[0]


class Handlers:
    """Calls users' handlers on threads of their own, each as soon as one is free.

    Some threads are enough while handlers return. When those are all blocked, more are started at a measured pace, up to
    ``most``; beyond that handlers wait until another returns, which is logged. They are daemon threads: one that never comes
    back does not keep the interpreter from its end.
    """

    def __init__(self, few: int = _FEW, most: int = _MOST, *, name: str = "koan-handlers", idle_s: float = _IDLE_S) -> None:
        self._few, self._most, self._name, self._idle_s = few, most, name, idle_s
        self._changed = threading.Condition(lock())
        self._waiting: deque[tuple[str, Callable[[], Any]]] = deque()
        self._n_threads = 0
        self._n_idle = 0
        self._n_taken = 0
        self._has_reserve = False  # a thread that looks whether the others come back
        self._is_closed = False

    def call(self, what: str, handler: Callable[[], Any]) -> None:
        """Call ``handler`` on another thread; what it raises is logged as ``what``."""
        self._waiting.append((what, handler))
        with self._changed:
            if self._n_idle >= len(self._waiting):  # each takes one, also those that were notified and still wake up
                self._changed.notify()
            elif self._n_threads < self._few:
                self._start(self._serve)
            elif not self._has_reserve and self._few < self._most:
                self._has_reserve = True
                self._start(self._reserve)

    def close(self) -> None:
        """Let the threads end once nothing waits any more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def finish(self, timeout: float = _LAST_S) -> None:
        """Return when nothing waits or runs any more, at the latest after ``timeout`` seconds."""
        until = time.monotonic() + timeout
        while (self._waiting or self._n_idle < self._n_threads - self._has_reserve) and time.monotonic() < until:
            threading.Event().wait(0.01)

    def _start(self, work: Callable[[], None]) -> None:
        """Start one more thread. Needs the lock."""
        self._n_threads += 1
        try:
            threading.Thread(target=work, name=self._name, daemon=True).start()
        except RuntimeError as error:  # as many threads as the system allows, or the interpreter ends
            self._n_threads -= 1
            self._has_reserve = self._has_reserve and work != self._reserve
            if self._n_threads == 0:
                survive("handlers_wait", error)

    def _serve(self) -> None:
        try:
            while (taken := self._next()) is not None:
                guarded(*taken)
                del taken  # what it holds may be large, and the next one may be long in coming
        finally:
            with self._changed:
                self._n_threads -= 1

    def _next(self) -> tuple[str, Callable[[], Any]] | None:
        with self._changed:
            self._n_idle += 1
            try:
                if not self._waiting and not self._is_closed:
                    self._changed.wait(self._idle_s)
                if not self._waiting:
                    return None
                self._n_taken += 1
                return self._waiting.popleft()
            finally:
                self._n_idle -= 1

    def _reserve(self) -> None:
        """Have one more thread whenever handlers wait and none has been taken for a while; end when none waits."""
        is_told = False
        while True:
            before = self._n_taken
            threading.Event().wait(_PATIENCE_S)
            with self._changed:
                if not self._waiting:
                    self._has_reserve = False
                    self._n_threads -= 1
                    return
                if self._n_taken != before:
                    continue
                if self._n_threads < self._most:
                    self._start(self._serve)
                    continue
            if not is_told:
                is_told = True
                _log.error("handlers_block: %d handlers have not returned; others wait for one that does", self._most)


class InOrder(Generic[T]):
    """Calls a handler with values on threads of `handlers`, one at a time and in order; beyond ``most`` the oldest go."""

    def __init__(self, what: str, handler: Callable[[T], Any], most: int = 256) -> None:
        self._what, self._handler = what, handler
        self._lock = threading.RLock()
        self._values: deque[T] = deque(maxlen=most)
        self._is_serving = False

    def put(self, value: T) -> None:
        """Have the handler called with ``value``."""
        with self._lock:
            self._values.append(value)
            if self._is_serving:
                return
            self._is_serving = True
        handlers.call(self._what, self._serve)

    def _serve(self) -> None:
        while True:
            with self._lock:
                if not self._values:
                    self._is_serving = False
                    return
                value = self._values.popleft()
            guarded(self._what, self._handler, value)


handlers = Handlers()
atexit.register(handlers.finish)
os.register_at_fork(after_in_child=handlers.__init__)  # type: ignore[misc]  # its threads are not in the copy
