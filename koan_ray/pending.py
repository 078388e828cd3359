"""`Pending`: something that has already started, to be awaited or to be blocked on.

One implementation for asyncio, plain scripts, notebooks and Ray tasks: it is resolved from any thread, an awaiting loop
is told through ``call_soon_threadsafe``, and a blocking caller waits on an event that no loop has to turn for.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from koan_ray import ambient, threads
from koan_ray.domain.durations import patience

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from koan_ray.domain.durations import Duration

T = TypeVar("T", covariant=True)  # noqa: PLC0105 - the one type parameter of the one class here


class Pending(Generic[T]):
    """The outcome of an operation that has already started.

    ``await pending`` in a coroutine, or ``pending.get(timeout=…)`` to block; both any number of times. Not awaiting it does
    not stop the operation.
    """

    __slots__ = ("_callbacks", "_done", "_error", "_event", "_forks", "_lock", "_make", "_value", "_yields_place")

    def __init__(self, *, yields_place: bool = False) -> None:
        self._lock = threading.RLock()  # reentrant: a finalizer or a signal handler may ask in the middle of it
        self._done = False
        self._forks = ambient.forks  # another number later: this is a forked copy of the process that will know the outcome
        self._value: object = None
        self._make: Callable[[Any], object] | None = None  # makes the outcome of the value, until somebody has looked
        self._error: BaseException | None = None
        self._event: threading.Event | None = None
        self._callbacks: list[Callable[[], None]] | None = None
        # True for waits on other jobs: in a job's body, other jobs may use its actor meanwhile.
        self._yields_place = yields_place

    @property
    def done(self) -> bool:
        """The outcome is known."""
        return self._done or self._is_left_behind()

    @property
    def succeeded(self) -> bool:
        """The outcome is known and is a value."""
        if self._make is not None:
            self._look()
        return self.done and self._error is None

    def get(self, timeout: Duration | None = None) -> T:
        """Block until the outcome is known and return or raise it.

        Args:
            timeout: `timedelta` or seconds; None waits for ever.

        Raises:
            TimeoutError: It is not known in time; the operation goes on.
            RuntimeUnavailableError: It was asked for before this process was forked from another, which gets the outcome; or
                the wait would never end, in a finalizer or a signal handler that has hit the engine in its work.
        """
        if not self._done and not self._is_left_behind():
            limit = patience(timeout, name="timeout")
            parking = ambient.waiting() if self._yields_place else None
            if parking is None:
                self._block(limit)
            else:
                parking.park(blocking=True)
                try:
                    self._block(limit)
                finally:
                    parking.resume()
        return self._outcome()

    def __await__(self) -> Generator[object, None, T]:
        if not self._done and not self._is_left_behind():
            parking = ambient.waiting() if self._yields_place else None
            if parking is None:
                yield from self._suspend().__await__()
            else:
                parking.park(blocking=False)
                try:
                    yield from self._suspend().__await__()
                finally:
                    yield from parking.resume_async().__await__()
        return self._outcome()

    def resolve(self, value: object) -> bool:
        """Set the outcome to ``value``; false if there was one already."""
        return self._finish(value, None, None)

    def resolve_with(self, make: Callable[[Any], object], value: object) -> bool:
        """Set the outcome to what ``make(value)`` returns or raises, called where somebody looks; false if there was one.

        For what runs users' code, such as the validators of a result: the thread that brings it here is not theirs.
        """
        return self._finish(value, None, make)

    def fail(self, error: BaseException) -> bool:
        """Set the outcome to ``error``; false if there was one already."""
        return self._finish(None, error, None)

    def add_done_callback(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` when the outcome is known, on a thread kept for that, or now. What it raises is logged."""
        if not self._on_done(lambda: threads.handlers.call("done_callback_failed", callback)):
            threads.guarded("done_callback_failed", callback)

    def map(self, function: Callable[[T], object]) -> Pending[object]:
        """Return a pending with ``function`` applied to the value, on a thread kept for that."""
        mapped: Pending[object] = Pending(yields_place=self._yields_place)

        def finish() -> None:
            try:
                mapped.resolve(function(self._outcome()))
            except BaseException as error:  # noqa: BLE001 - becomes the outcome
                mapped.fail(error)

        self.add_done_callback(finish)
        return mapped

    def _is_left_behind(self) -> bool:
        """Tell whether this process is a copy of the one that asked; then that is the outcome, for none will come."""
        if self._forks == ambient.forks:
            return False
        if not self._done:
            self._forks = ambient.forks
            self._lock, self._event, self._callbacks = threading.RLock(), None, None  # whoever holds or waits is not here
            self._finish(None, ambient.left_behind(), None)
        return True

    def _on_done(self, callback: Callable[[], None]) -> bool:
        """Have ``callback`` called where the outcome is brought, and not hold that up; false if it is known already."""
        self._is_left_behind()
        # No container is made under the lock, which answers need: the collector may run a user's finalizer there.
        callbacks = self._callbacks
        if callbacks is None:
            callbacks = []
            with self._lock:
                if self._callbacks is None:
                    self._callbacks = callbacks
                callbacks = self._callbacks
        callbacks.append(callback)
        if self.done:
            with contextlib.suppress(ValueError):  # it is being called
                callbacks.remove(callback)
                return False
        return True

    def _finish(self, value: object, error: BaseException | None, make: Callable[[Any], object] | None) -> bool:
        if self.done:  # without the lock, which is held while users' code makes the outcome
            return False
        with self._lock:
            if self._done:
                return False
            self._value, self._error, self._make, self._done = value, error, make, True
            event = self._event
        if event is not None:
            event.set()
        if self._callbacks:
            with contextlib.suppress(IndexError):  # until none is left
                while True:
                    threads.guarded("callback_failed", self._callbacks.pop(0))
        return True

    def _look(self) -> None:
        """Have the outcome made, once, whoever looks first."""
        with self._lock:
            if (make := self._make) is None:
                return
            try:
                self._value = make(self._value)
            except BaseException as error:
                if not isinstance(error, Exception):  # an interrupt of the caller is no outcome: the next one looks again
                    raise
                self._error = error
            self._make = None

    def _block(self, timeout: float | None) -> None:
        threads.check_may_block()
        event = threading.Event()
        with self._lock:
            if self._done:
                return
            if self._event is None:
                self._event = event
            event = self._event
        until = None if timeout is None else time.monotonic() + timeout
        while True:  # in slices: what a platform can wait for at a time is limited
            left = threads.LONGEST_WAIT_S
            if until is not None:
                left = min(left, max(0.0, until - time.monotonic()))
            if ambient.block(event, left) if ambient.block is not None else event.wait(left):
                return
            if until is not None and time.monotonic() >= until:
                msg = f"no outcome within {timeout:g} s; the operation goes on"
                raise TimeoutError(msg)

    async def _suspend(self) -> None:
        loop = asyncio.get_running_loop()
        known = loop.create_future()

        def tell() -> None:
            if not known.done():
                known.set_result(None)

        def tell_loop() -> None:
            try:
                loop.call_soon_threadsafe(tell)
            except RuntimeError:  # the loop was closed; nobody waits any more
                return

        if self._on_done(tell_loop):
            await known

    def _outcome(self) -> T:
        if self._make is not None:
            self._look()
        if self._error is not None:
            raise self._error.with_traceback(None)
        return cast("T", self._value)
