"""What the items of a job have produced, on its way from the actors to the parts that are stored, and back.

Values come as JSON arrays, one for each chunk, and leave as parts of up to a mebibyte. Where they cannot be stored, because
the memory of the engine has a limit for them, they stay here: in memory first, then in a temporary file.
"""

from __future__ import annotations

import heapq
import tempfile
from typing import IO, TYPE_CHECKING, Any

from pydantic_core import from_json, to_json

from koan_ray.domain.records import MAX_PART

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from koan_ray.domain.items import DeadItem

_IN_MEMORY = 16 * 1024 * 1024  # bytes of values kept before a file is used


def in_arrays(pieces: Iterable[tuple[bytes, int]]) -> list[tuple[bytes, int]]:
    """Return pieces of JSON arrays, without brackets and each with its number of entries, as few arrays that fit into parts.

    A piece that is too large is taken apart. One entry is never: it was refused where it was made.
    """
    arrays: list[tuple[bytes, int]] = []
    gathered: list[bytes] = []
    size = count = 0
    for piece, n in _fitting(pieces):
        if gathered and size + len(piece) + 2 > MAX_PART:
            arrays.append((b"[" + b",".join(gathered) + b"]", count))
            gathered, size, count = [], 0, 0
        gathered.append(piece)
        size += len(piece) + 1
        count += n
    if gathered:
        arrays.append((b"[" + b",".join(gathered) + b"]", count))
    return arrays


def _fitting(pieces: Iterable[tuple[bytes, int]]) -> Iterator[tuple[bytes, int]]:
    for piece, n in pieces:
        if len(piece) + 2 <= MAX_PART or n == 1:
            yield piece, n
        else:
            for entry in from_json(b"[" + piece + b"]"):
                yield to_json(entry), 1


def dead_as_array(dead: list[DeadItem], name: Callable[[int], int]) -> list[tuple[bytes, int]]:
    """Return dead items as JSON arrays for parts; ``name`` turns a place into the index that people know."""
    rows = [
        b'{"index":%d,"item":%s,"error_type":%s,"error_message":%s,"stack_trace":%s,"attempts":%d}' % (
            name(item.place), item.shown, to_json(item.error.type), to_json(_clean(item.error.message)),
            to_json(_clean(item.error.stack_trace)), item.attempts,
        )
        for item in dead
    ]  # fmt: skip
    return in_arrays((row, 1) for row in rows)


def _clean(text: str) -> str:
    return text if text.isascii() else text.encode(errors="replace").decode()


class Spool:
    """JSON arrays in the order they came, in memory and then in a file that vanishes with the process."""

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._places: list[tuple[int, int]] = []
        self._end = 0

    def add(self, body: bytes) -> None:
        """Keep an array."""
        if self._file is None:
            self._file = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115 - closed with the job
        self._file.seek(self._end)
        self._file.write(body)
        self._places.append((self._end, len(body)))
        self._end += len(body)

    def __len__(self) -> int:
        return len(self._places)

    def body(self, place: int) -> bytes:
        """Return an array as it came."""
        assert self._file is not None  # noqa: S101 - there is a place only when something was added
        start, size = self._places[place]
        self._file.seek(start)
        return self._file.read(size)

    def read(self, place: int) -> list[Any]:
        """Return an array as JSON values."""
        values: list[Any] = from_json(self.body(place))
        return values

    def close(self) -> None:
        """Let go of everything."""
        if self._file is not None:
            self._file.close()


def in_order(arrays: Iterable[list[Any]]) -> Iterator[Any]:
    """Yield the values of arrays of ``[index, value]`` pairs by their index.

    Arrays overlap only as far as chunks ended out of order, so few of them are open at a time.
    """
    spool, firsts = Spool(), []
    try:
        for pairs in arrays:
            pairs.sort(key=_index)
            firsts.append((pairs[0][0], len(spool)))
            spool.add(to_json(pairs))
        firsts.sort()
        going: list[tuple[int, int, Any, Iterator[Any]]] = []
        for first, place in [*firsts, (None, -1)]:
            while going and (first is None or going[0][0] < first):
                _, number, value, rest = heapq.heappop(going)
                yield value
                if (pair := next(rest, None)) is not None:
                    heapq.heappush(going, (pair[0], number, pair[1], rest))
            if first is not None:
                rest = iter(spool.read(place))
                index, value = next(rest)
                heapq.heappush(going, (index, place, value, rest))
    finally:
        spool.close()


def _index(pair: list[Any]) -> int:
    index: int = pair[0]
    return index
