"""Ctrl-C and SIGTERM: the first one ends a command in order, more of them change nothing, and none prints a traceback."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
_SLICE_S: Final = 0.05
_LEAVES_WITHIN_S: Final = 4.0  # the interpreter, when all that matters is closed


class Stop:
    """Whether this process was asked to end: by the first signal; more of them change nothing.

    Args:
        on_asked: Called in the main thread at the first signal.
    """

    def __init__(self, on_asked: Callable[[], None] | None = None) -> None:
        self.is_asked = False
        self._on_asked = on_asked

    def wait(self, timeout_s: float) -> bool:
        """Wait until asked to end; false if that is not so in time."""
        # No threading.Event: a handler that sets one can find its lock held by the very thread that it interrupts.
        until = time.monotonic() + timeout_s
        while not self.is_asked and time.monotonic() < until:
            time.sleep(min(_SLICE_S, timeout_s))
        return self.is_asked

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """Take signals while the block lasts, and after it if one came: the process is on its way out then."""
        if threading.current_thread() is not threading.main_thread():  # which alone gets signals
            yield
            return
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        self.take_signals()
        try:
            yield
        finally:
            if not self.is_asked:
                for number, handler in before.items():
                    signal.signal(number, handler)

    def take_signals(self) -> None:
        """Install our handlers; again after Ray, which installs its own."""
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, _number: int, _frame: Any) -> None:
        global _came  # noqa: PLW0603 - signals are the process's
        if not self.is_asked:
            self.is_asked = _came = True
            if self._on_asked is not None:
                self._on_asked()


_came = False  # a signal has ended a command of this process


def interrupting() -> contextlib.AbstractContextManager[None]:
    """Have the first Ctrl-C or SIGTERM raise KeyboardInterrupt in the block; later ones change nothing any more."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    return Stop(interrupt).on_signals()


def leave(code: int, *, interrupted: bool = False) -> None:
    """Let nothing disturb or delay the interpreter's end, if a signal has ended the command.

    Python takes its own handlers away early in its end; Ctrl-C would then kill it, or end one of its last steps with a
    traceback. Ignored signals stay ignored.
    """
    if not (interrupted or _came):
        return
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    late = threading.Timer(_LEAVES_WITHIN_S, os._exit, (code,))
    late.daemon = True
    late.start()
