"""An event loop for the parts of the engine that live on one, turned by whichever thread brings work.

A loop in a thread of its own costs two thread switches for each call from outside, about 0.15 ms. Here the loop's own
thread sleeps in its selector most of the time, and meanwhile a thread that brings work takes the *turn*: it runs what is
ready itself and goes on with its answer. One thread has the turn at a time, so that for everything on the loop nothing
differs from a loop with one thread. A process's main thread never takes it: Ctrl-C is raised there, between any two
instructions, and what it stopped half-way would be the engine's.

Nothing that is called on the loop ends it, nor the thread that has the turn: not `SystemExit` either, which asyncio lets
through. It is reported, and the loop turns on.
"""

from __future__ import annotations

import asyncio
import math
import selectors
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, TypeVar, cast

from koan_ray import threads
from koan_ray.domain.texts import said
from koan_ray.telemetry import logs

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

T = TypeVar("T")
_MOST_HANDLES = 1000  # that a thread runs for others before it leaves the rest to the loop's own
_HEADROOM = 300  # frames that a thread has left when it takes the turn; the engine's calls need far fewer


def _log_failure(where: str, error: BaseException) -> None:
    logs.get_logger().error(
        "engine_failed", where=where, problem=f"{type(error).__name__}: {said(error, 500)}", exc_info=error
    )


class _Answer:
    """One answer between two threads; half the cost of a `concurrent.futures.Future`."""

    __slots__ = ("_error", "_known", "_value", "is_known")

    def __init__(self) -> None:
        self._known = threading.Lock()
        self._known.acquire()
        self._value: object = None
        self._error: BaseException | None = None
        self.is_known = False

    def set(self, value: object, error: BaseException | None) -> None:
        self._value, self._error = value, error
        self.is_known = True
        self._known.release()

    def wait(self, timeout: float | None) -> object:
        if not self._known.acquire(timeout=-1 if timeout is None else timeout):
            raise TimeoutError
        if self._error is not None:
            raise self._error
        return self._value


class _Selector(selectors.DefaultSelector):
    """Gives the turn away while it sleeps."""

    def __init__(self, turn: threading.Lock) -> None:
        super().__init__()
        self._turn = turn
        self.wakes_at = 0.0  # when the sleep ends by itself, monotonic; 0 while the loop's own thread has the turn

    def select(self, timeout: float | None = None) -> Any:
        if timeout is not None and timeout <= 0:
            return super().select(0)
        self.wakes_at = math.inf if timeout is None else time.monotonic() + timeout
        self._turn.release()
        try:
            return super().select(timeout)
        finally:
            self._turn.acquire()
            self.wakes_at = 0.0


class _Loop(asyncio.SelectorEventLoop):
    """A selector loop that other threads may turn while its own sleeps."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._main_thread = threading.main_thread().ident
        self._sleep = _Selector(self._turn)
        super().__init__(self._sleep)

    # What asyncio keeps for subclasses, which its annotations leave out.
    _ready: Any
    _scheduled: Any
    _write_to_self: Callable[[], None]

    def run_forever(self) -> None:
        """Turn until stopped, giving the turn away while there is nothing to do."""
        with self._turn:
            super().run_forever()

    def turn_here(self, action: Callable[..., Any], args: tuple[Any, ...], answer: _Answer | None) -> bool:
        """Call ``action`` and what follows from it in this thread, if the loop sleeps; false if it does not.

        Returns when nothing is ready any more, or the answer is known. Never in the main thread, where Ctrl-C and signal
        handlers would end whatever task of the engine is under way, nor on a deep stack, which would overflow in it.
        """
        if asyncio._get_running_loop() is not None or not _may_turn() or not self._turn.acquire(blocking=False):  # noqa: SLF001 - as above
            return False
        try:
            if not self.is_running():
                return False
            asyncio._set_running_loop(self)  # noqa: SLF001 - meant for those who write loops
            threads.answering.now = True
            try:
                self.call_soon(action, *args)
                self._run_ready(answer)
            finally:
                threads.answering.now = False
                asyncio._set_running_loop(None)  # noqa: SLF001
            if self._ready or (self._scheduled and self._scheduled[0].when() < self._sleep.wakes_at):
                self._write_to_self()  # the loop's own thread goes on, or sleeps shorter
        finally:
            self._turn.release()
        return True

    def _run_ready(self, answer: _Answer | None) -> None:
        ready = self._ready
        for _ in range(_MOST_HANDLES):
            if not ready or (answer is not None and answer.is_known):
                return
            handle = ready.popleft()
            if not handle.cancelled():
                try:
                    handle._run()  # noqa: SLF001 - as BaseEventLoop does
                except BaseException as error:  # noqa: BLE001 - SystemExit of somebody's callback: not this thread's
                    self.report(error)

    def report(self, error: BaseException) -> None:
        """Report what a callback has raised that asyncio lets through."""
        self.call_exception_handler({"message": "a callback has raised", "exception": error})


def _may_turn() -> bool:
    if threading.get_ident() == threading.main_thread().ident:
        return False
    try:
        sys._getframe(sys.getrecursionlimit() - _HEADROOM)  # noqa: SLF001 - the one way to ask how deep we are
    except ValueError:
        return True
    return False


class LoopThread:
    """A private loop. Its daemon thread runs until `stop`.

    Args:
        name: Of the thread.
        on_failure: Called with the place and the exception when something raises there that nobody waits for.
    """

    def __init__(self, name: str, on_failure: Callable[[str, BaseException], None] | None = None) -> None:
        self.on_failure = on_failure or _log_failure
        self._loop = _Loop()
        self._loop.set_exception_handler(self._failed)
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._is_stopping = False
        self._thread.start()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop itself."""
        return self._loop

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        threads.answering.now = True
        while not self._is_stopping:
            try:
                self._loop.run_forever()
            except BaseException as error:  # noqa: BLE001 - SystemExit of somebody's callback: the others go on
                self._loop.report(error)
        self._loop.close()

    def _failed(self, _loop: object, context: dict[str, Any]) -> None:
        """Take note of what a callback, a timer or a task has raised."""
        error = context.get("exception") or RuntimeError(str(context.get("message")))
        self.on_failure(self._thread.name, error)

    def run(self, work: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Run a coroutine on the loop and block for its result. From any other thread."""
        if threads.answering.now:
            work.close()
            threads.check_may_block()
        answer = _Answer()
        self._do(self._begin, (work, answer.set), answer)
        return cast("T", answer.wait(timeout))

    def begin(self, work: Coroutine[Any, Any, T], done: Callable[[Any, BaseException | None], None]) -> None:
        """Run a coroutine on the loop; ``done(answer, error)`` is called there. From any thread."""
        self._loop.call_soon_threadsafe(self._begin, work, done)

    def call(self, action: Callable[..., Any], *args: Any) -> None:
        """Call something on the loop, in this thread if the loop sleeps; from any thread."""
        self._do(action, args, None)

    def _do(self, action: Callable[..., Any], args: tuple[Any, ...], answer: _Answer | None) -> None:
        if not self._loop.turn_here(action, args, answer):
            self._loop.call_soon_threadsafe(action, *args)

    def _begin(self, work: Coroutine[Any, Any, T], done: Callable[[Any, BaseException | None], None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)

        def finished(finished_task: asyncio.Task[T]) -> None:
            self._tasks.discard(finished_task)
            outcome: tuple[object, BaseException | None]
            if finished_task.cancelled():
                outcome = None, asyncio.CancelledError("the engine was shut down")
            elif (error := finished_task.exception()) is not None:
                outcome = None, error
            else:
                outcome = finished_task.result(), None
            threads.guarded("answer_not_delivered", done, *outcome)

        task.add_done_callback(finished)

    def stop(self) -> None:
        """Cancel what goes on and end the thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stop)
            self._thread.join(timeout=5.0)

    def _stop(self) -> None:
        self._is_stopping = True
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.call_soon(self._loop.call_soon, self._loop.stop)  # after the cancelled tasks had their turn
