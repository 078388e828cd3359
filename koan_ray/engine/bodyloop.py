"""Event loops that outlive what bodies do to them.

A `SystemExit` or `KeyboardInterrupt` that a task or a callback raises goes through the loop, as asyncio has it, and ends
whoever turns it; ``loop.stop()`` ends it likewise. Here the loop is turned again: what was raised belongs to the task that
raised it, and to whoever awaits that, and all others on the loop go on. A loop that cannot be turned any more, because a
body has closed it or the files under it, is given up, and its owner is called.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from koan_ray.engine.raised import name_of

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from contextvars import Context

T = TypeVar("T")
_MOST_STILL: Final = 3  # times in a row that a loop ends before it has turned once; then it is taken for broken
_SAY_EVERY_S: Final = 1.0  # a callback that raises and comes back at once must not fill the log
_LEAVE_S: Final = 1.0  # for what a body left on its loop
# As they were before a body could put something else in their place.
_Task: Final = asyncio.Task
_unregister: Final = asyncio._unregister_task  # noqa: SLF001 - documented, for those who make tasks themselves
_SelectorLoop: Final = asyncio.SelectorEventLoop


def new_loop() -> asyncio.AbstractEventLoop:
    """Return a fresh loop, as the policy in force makes them; a plain one where a body's policy makes none."""
    try:
        loop = asyncio.new_event_loop()
        if not (loop.is_running() or loop.is_closed()):
            return loop
    except BaseException:  # noqa: BLE001, S110 - a policy is users' code
        pass
    return _SelectorLoop()


def hidden_task(
    loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T], *, context: Context | None = None
) -> asyncio.Task[T]:
    """Return a task that neither a body's task factory makes nor ``asyncio.all_tasks()`` shows.

    Bodies cancel "all tasks but mine" when they end; those that carry the bodies of other jobs are not theirs.
    """
    task = _Task(work, loop=loop, context=context)
    _unregister(task)
    return task


class _Turning:
    """Turns a loop until it is told to end, or cannot."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_trouble: Callable[[str], None]) -> None:
        self.loop, self._on_trouble = loop, on_trouble
        self._is_over = False
        self._n_still = 0
        self._said_at = float("-inf")

    def end(self) -> None:
        """Turn no more; on the loop."""
        self._is_over = True
        self.loop.stop()

    def turn(self) -> bool:
        """Turn the loop until `end` is called; false if it has to be given up."""
        while True:
            why = "a body stopped it"
            try:
                self.loop.call_soon(self._has_turned)
                self._n_still += 1
                self.loop.run_forever()
            except BaseException as error:  # noqa: BLE001 - what tasks raise through the loop is their own
                why = f"{name_of(error)} was raised through it"
            if self._is_over:
                return True
            self._say(why)
            if self.loop.is_closed() or self._n_still >= _MOST_STILL:
                return False

    def _has_turned(self) -> None:
        self._n_still = 0

    def _say(self, why: str) -> None:
        now = monotonic()
        if now - self._said_at >= _SAY_EVERY_S:
            self._said_at = now
            self._on_trouble(why)


class BodyLoop:
    """An event loop for bodies, in a thread of its own.

    Args:
        name: Of the thread.
        on_trouble: Called when the loop was ended from inside and goes on, with the reason; at most once a second.
        on_lost: Called, in the thread, when it cannot go on: nothing that was on it will ever happen.
    """

    def __init__(self, name: str, *, on_trouble: Callable[[str], None], on_lost: Callable[[BodyLoop], None]) -> None:
        self.loop = new_loop()
        self._turning = _Turning(self.loop, on_trouble)
        self._on_lost = on_lost
        self.kept: set[asyncio.Task[Any]] = set()  # hidden tasks: nobody else holds them
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        try:
            self._thread.start()
        except BaseException:
            self.loop.close()
            raise

    @property
    def is_lost(self) -> bool:
        """Nothing turns it any more."""
        return self.loop.is_closed() or not self._thread.is_alive()

    def start(self, work: Coroutine[Any, Any, Any], *, context: Context | None = None) -> None:
        """Run a coroutine in a hidden task; in the loop's thread."""
        task = hidden_task(self.loop, work, context=context)
        self.kept.add(task)
        task.add_done_callback(self.kept.discard)

    def stop(self) -> None:
        """Cancel what runs on the loop and end its thread."""
        with contextlib.suppress(RuntimeError):  # a body has closed it
            self.loop.call_soon_threadsafe(self._stop)

    def _main(self) -> None:
        with contextlib.suppress(BaseException):  # a body's policy
            asyncio.set_event_loop(self.loop)
        if not self._turning.turn():
            for task in self.kept:  # they will not end, and their owner ends what they carried
                task._log_destroy_pending = False  # type: ignore[attr-defined]  # noqa: SLF001 - asyncio sets it likewise
            self._on_lost(self)
        _close(self.loop)

    def _stop(self) -> None:
        for task in [*asyncio.all_tasks(self.loop), *self.kept]:
            task.cancel()
        self.loop.call_soon(self.loop.call_soon, self._turning.end)  # after the cancelled tasks had their turn


def run_here(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on a loop of its own in this thread and return what it returns.

    Raises:
        RuntimeError: The loop was closed or broken by what ran on it.
    """
    turning = _Turning(new_loop(), lambda _why: None)
    loop = turning.loop
    task = hidden_task(loop, work)
    task.add_done_callback(lambda _task: turning.end())
    with contextlib.suppress(BaseException):
        asyncio.set_event_loop(loop)
    if not turning.turn():
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # noqa: SLF001 - as in `BodyLoop`
        _close(loop)
        msg = "the event loop that the body ran on was closed or broken by it"
        raise RuntimeError(msg)
    with contextlib.suppress(BaseException):  # what was left behind has a moment to end, and no say
        _leave(loop)
    return task.result()


def _leave(loop: asyncio.AbstractEventLoop) -> None:
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    if left:
        loop.run_until_complete(asyncio.wait(left, timeout=_LEAVE_S))
    loop.run_until_complete(asyncio.wait_for(loop.shutdown_asyncgens(), _LEAVE_S))
    loop.close()


def _close(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.close()
    except BaseException:  # noqa: BLE001 - a body has closed parts of it: the rest is closed one by one
        for part in (getattr(loop, "_ssock", None), getattr(loop, "_csock", None)):
            with contextlib.suppress(BaseException):
                cast("Any", part).close()
        with contextlib.suppress(BaseException):
            asyncio.BaseEventLoop.close(cast("asyncio.BaseEventLoop", loop))
