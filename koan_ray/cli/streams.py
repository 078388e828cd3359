"""Standard streams that take whatever a command prints, and that end it properly when nobody reads on."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import NoReturn, TextIO

from koan_ray.cli.exits import NO_READER, UNWRITABLE


def prepare() -> None:
    r"""Make this process's standard streams fit for a command line.

    * A character that the encoding of the terminal does not have is written as an escape, such as ``\u2713``.
    * Where the reader of a pipe has left (``| head``), the command ends as a program that SIGPIPE ends: with 141, and
      without a word. The signal itself stays ignored: it would end a server whose browser has left as well.
    * What cannot be written for another reason, such as a full disk, is one line and an exit code.
    * A stream that was closed (``>&-``) takes everything and keeps nothing.
    """
    sys.stdout = _prepared(sys.stdout, 1)
    sys.stderr = _prepared(sys.stderr, 2)


def finish() -> None:
    """Write out what is held back, while a failure can still be reported."""
    with contextlib.suppress(ValueError):  # closed
        sys.stdout.flush()


def _prepared(stream: TextIO | None, number: int) -> TextIO:
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123 - lives as long as the process
    if not isinstance(stream, io.TextIOWrapper):  # somebody's own, such as a test's
        return stream
    return _Stream(stream, number)


class _Stream(io.TextIOWrapper):
    def __init__(self, stream: io.TextIOWrapper, number: int) -> None:
        encoding, is_by_line = stream.encoding, stream.line_buffering
        super().__init__(stream.detach(), encoding=encoding, errors="backslashreplace", line_buffering=is_by_line)
        self._number = number

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._give_up(error)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> NoReturn:
        """End the command; what is still held back goes nowhere, so that the interpreter does not fail on it later."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._number)
        os.close(nowhere)
        if isinstance(error, BrokenPipeError):
            raise SystemExit(NO_READER) from None
        if self._number == 1:
            with contextlib.suppress(OSError):
                os.write(2, f"koan-ray: the output cannot be written: {error.strerror or error}\n".encode())
        raise SystemExit(UNWRITABLE) from None
