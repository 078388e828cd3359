"""The token by which a body learns that it shall stop."""

from __future__ import annotations

import asyncio
import contextlib
import threading


class CancellationToken:
    """Set when the job is cancelled, or when its attempt has taken longer than its timeout.

    After it is set the body has ``engine.cancel_grace`` (5 s) to return or raise; then its process is killed.
    What a cancelled job returns is its result; what an attempt returns after its timeout is not: it has failed.
    """

    __slots__ = ("_lock", "_requested", "_waiting", "cause", "is_watched")

    def __init__(self) -> None:
        self.cause: str | None = None
        self.is_watched = False  # the body looks at it, so it is given time to act on it before it is interrupted
        self._requested = False
        self._lock = threading.Lock()
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    @property
    def requested(self) -> bool:
        """Whether the body shall stop."""
        self.is_watched = True
        return self._requested

    def raise_if_requested(self) -> None:
        """Raise `asyncio.CancelledError` if the body shall stop; let it pass through."""
        self.is_watched = True
        if self._requested:
            raise asyncio.CancelledError(self.cause)

    async def wait(self) -> None:
        """Return when the body shall stop."""
        self.is_watched = True
        event = asyncio.Event()
        with self._lock:
            if self._requested:
                return
            self._waiting.append((asyncio.get_running_loop(), event))
        await event.wait()

    def _set(self, cause: str) -> None:
        with self._lock:
            if self._requested:
                return
            self.cause, self._requested = cause, True
            waiting, self._waiting = self._waiting, []
        for loop, event in waiting:
            with contextlib.suppress(RuntimeError):  # a loop of the body's own that is closed: nobody waits there any more
                loop.call_soon_threadsafe(event.set)
