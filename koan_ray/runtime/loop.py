"""An event loop in a thread of its own, for the parts of the engine that live on one."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

T = TypeVar("T")


class _Answer:
    """One answer between two threads; half the cost of a `concurrent.futures.Future`."""

    __slots__ = ("_error", "_known", "_value")

    def __init__(self) -> None:
        self._known = threading.Lock()
        self._known.acquire()
        self._value: object = None
        self._error: BaseException | None = None

    def set(self, value: object, error: BaseException | None) -> None:
        self._value, self._error = value, error
        self._known.release()

    def wait(self, timeout: float | None) -> object:
        if not self._known.acquire(timeout=-1 if timeout is None else timeout):
            raise TimeoutError
        if self._error is not None:
            raise self._error
        return self._value


class LoopThread:
    """A private loop. Its daemon thread runs until `stop`."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._thread.start()

    def _main(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        self.loop.close()

    def run(self, work: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Run a coroutine on the loop and block for its result. From any other thread."""
        answer = _Answer()
        self.begin(work, answer.set)
        return cast("T", answer.wait(timeout))

    def begin(self, work: Coroutine[Any, Any, T], done: Callable[[Any, BaseException | None], None]) -> None:
        """Run a coroutine on the loop; ``done(answer, error)`` is called there. From any thread."""
        self.loop.call_soon_threadsafe(self._begin, work, done)

    def _begin(self, work: Coroutine[Any, Any, T], done: Callable[[Any, BaseException | None], None]) -> None:
        task = self.loop.create_task(work)
        self._tasks.add(task)

        def finished(finished_task: asyncio.Task[T]) -> None:
            self._tasks.discard(finished_task)
            if finished_task.cancelled():
                done(None, asyncio.CancelledError("the engine was shut down"))
            elif (error := finished_task.exception()) is not None:
                done(None, error)
            else:
                done(finished_task.result(), None)

        task.add_done_callback(finished)

    def call(self, action: Callable[..., Any], *args: Any) -> None:
        """Call something on the loop when it is free; from any thread."""
        self.loop.call_soon_threadsafe(action, *args)

    def stop(self) -> None:
        """Cancel what goes on and end the thread."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._stop)
            self._thread.join(timeout=5.0)

    def _stop(self) -> None:
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self.loop.call_soon(self.loop.call_soon, self.loop.stop)  # after the cancelled tasks had their turn
