"""Messages between a job actor and the process of one attempt: pickles with a mark and a length before them.

The body of a job runs in the process at the other end. It may write into a file descriptor that is not its own, or die in
the middle of a message, so that what arrives is looked at before it is taken for a message.
"""

from __future__ import annotations

import pickle
import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

_MARK = b"koan"
_HEAD = struct.Struct("!4sQ")


class GarbledError(Exception):
    """What arrived was not written by us."""


def frame(what: str, value: object) -> bytes:
    """Return a message as bytes."""
    body = pickle.dumps((what, value), protocol=5)
    return _HEAD.pack(_MARK, len(body)) + body


class Frames:
    """Takes bytes as they come and gives messages."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, piece: bytes) -> Iterator[tuple[str, Any]]:
        """Take what came, and give each message that is complete.

        Raises:
            GarbledError: It is no message of ours. What comes after it cannot be understood either.
        """
        self._bytes += piece
        while len(self._bytes) >= _HEAD.size:
            mark, size = _HEAD.unpack_from(self._bytes)
            if mark != _MARK:
                raise GarbledError
            if len(self._bytes) < _HEAD.size + size:
                return
            body = bytes(memoryview(self._bytes)[_HEAD.size : _HEAD.size + size])
            del self._bytes[: _HEAD.size + size]
            try:
                what, value = pickle.loads(body)  # noqa: S301 - from a process that runs what this one would run
            except Exception as error:
                raise GarbledError from error
            yield what, value
