"""Reads the items of a `FiniteJob` from whatever its ``get_items`` returns, no further ahead than is wanted.

The user's iterable runs in a thread of its own, so that one that blocks holds up nobody; an async generator gets a loop
there. A job that goes on after a loss reads its items again: what has ended is passed over, and a fingerprint of the items
says whether they are still the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from hashlib import blake2b
from itertools import islice
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic_core import to_json

from koan_ray.engine.awaiting import awaited, is_awaitable
from koan_ray.errors import ItemsChangedError, JobDefinitionError, NonRetryable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from koan_ray.domain.items import Ranges

_MOST_AT_ONCE = 4096
_PROMPT_S = 0.010  # a source that gives items slowly is asked for fewer at once
_BLOCK = 256  # items whose fingerprint is taken together


class Mark(NamedTuple):
    """The fingerprint of the first ``n`` items."""

    n: int
    digest: str


class Fingerprint:
    """A rolling fingerprint of items, in blocks of `_BLOCK`, whatever the pieces that they come in."""

    def __init__(self, expected: Mark | None = None) -> None:
        self.mark = Mark(0, "")
        self._expected = expected
        self._open: list[Any] = []

    @property
    def is_settled(self) -> bool:
        """There is nothing to compare with, or it was compared."""
        return self._expected is None

    def add(self, items: list[Any]) -> bool:
        """Take in the next items; false if they turn out not to be those of the mark that was expected."""
        self._open += items
        whole = len(self._open) - len(self._open) % _BLOCK
        for start in range(0, whole, _BLOCK):
            block = self._open[start : start + _BLOCK]
            digest = blake2b(self.mark.digest.encode() + _plain(block), digest_size=16).hexdigest()
            self.mark = Mark(self.mark.n + _BLOCK, digest)
            if self._expected is not None and self.mark.n == self._expected.n:
                if self.mark != self._expected:
                    return False
                self._expected = None
        del self._open[:whole]
        return True


def _plain(items: list[Any]) -> bytes:
    try:
        return to_json(items, inf_nan_mode="strings", bytes_mode="base64", fallback=_named)
    except Exception:  # noqa: BLE001 - anything may be an item
        return "".join(_named(item) for item in items).encode(errors="replace")


def _named(item: object) -> str:
    return f"{type(item).__module__}.{type(item).__qualname__}"


class Source:
    """The items of one job, as they are read.

    Args:
        make: Calls ``get_items``; or ``resume_from``, then ``start`` says which index its first item has.
        on_news: Called, in any thread, when there is something new to look at.
        skip: Indexes of items that are not wanted.
        expected: The fingerprint to compare with; None for a job that begins, or that does not want it.
        start: The index of the first item.
        inline: Read in the caller's thread, for tests in virtual time.
    """

    def __init__(
        self, make: Callable[[], Any], on_news: Callable[[], None], *, skip: Ranges, expected: Mark | None = None,
        start: int = 0, takes_fingerprint: bool = True, inline: bool = False,
    ) -> None:  # fmt: skip
        self._make, self._on_news, self._skip, self._inline = make, on_news, skip, inline
        self._must_reach = max(skip.end, expected.n if expected is not None else 0)
        self._print = Fingerprint(expected) if takes_fingerprint else None
        self._lock = threading.Lock()
        self._demand = threading.Event()
        self._ready: list[tuple[int, list[Any]]] = []
        self._n_ready = 0
        self._wanted = 0
        self._is_stopped = False
        self._thread: threading.Thread | None = None
        self._rows: _Rows | None = None
        self._size = 1
        self.seen = start  # indexes below this were read
        self.total: int | None = None  # if the source can say it beforehand
        self.is_complete = False
        self.error: BaseException | None = None

    @property
    def n_ready(self) -> int:
        """Items that were read and not taken."""
        return self._n_ready

    @property
    def mark(self) -> Mark | None:
        """The fingerprint as far as it goes."""
        return self._print.mark if self._print is not None else None

    def want(self, n: int) -> None:
        """Have up to ``n`` items ready."""
        if self.is_complete or n <= self._n_ready:
            return
        self._wanted = n
        if self._inline:
            self._read_inline()
            return
        if self._thread is None:
            context = contextvars.copy_context()  # so that calls of the engine know the job that they belong to
            self._thread = threading.Thread(target=context.run, args=(self._main,), name="koan-items", daemon=True)
            self._thread.start()
        self._demand.set()

    def take(self) -> list[tuple[int, list[Any]]]:
        """Return what was read, as lists with the index of their first item."""
        if not self._n_ready:
            return []
        with self._lock:
            taken, self._ready, self._n_ready = self._ready, [], 0
        return taken

    def stop(self) -> None:
        """Read nothing more. A source that blocks keeps its thread until it returns."""
        self._is_stopped = True
        self._demand.set()
        if self._rows is not None:
            self._rows.cancel()

    # --- in the thread ---------------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            self._open()
            while not self._is_stopped and not self.is_complete:
                self._demand.clear()
                if self._n_ready >= self._wanted:
                    self._demand.wait()
                    continue
                self._read_some()
        except BaseException as error:  # noqa: BLE001 - a user's iterable may raise anything
            self._fail(error)
        finally:
            if self._rows is not None:
                self._rows.close()

    def _read_inline(self) -> None:
        try:
            if self._rows is None:
                self._open()
            while not self.is_complete and self._n_ready < self._wanted:
                self._read_some()
        except BaseException as error:  # noqa: BLE001 - as above
            self._fail(error)

    def _open(self) -> None:
        source = self._make()
        if not hasattr(source, "iter_rows"):  # a Ray Dataset would have to be made to be counted
            with contextlib.suppress(Exception):  # not everything can say it beforehand, or says it truly
                self.total = self.seen + len(source)
        self._rows = _Rows(source)

    def _read_some(self) -> None:
        assert self._rows is not None  # noqa: S101 - opened before
        wanted = min(self._size, self._wanted - self._n_ready)
        began = monotonic()
        batch: list[Any] = []
        try:
            self._rows.fill(batch, wanted)
        finally:
            if batch:  # also those before an error
                self._add(batch)
        took = monotonic() - began
        if took > _PROMPT_S:
            self._size = max(1, self._size // 4)
        elif took < _PROMPT_S / 2 and wanted == self._size:
            self._size = min(_MOST_AT_ONCE, self._size * 2)
        if len(batch) < wanted:
            self._check_reached()
            self.is_complete = True
            self.total = self.seen
            self._on_news()

    def _add(self, batch: list[Any]) -> None:
        if self._print is not None and not self._print.add(batch):
            raise ItemsChangedError(self._must_reach)
        start, end = self.seen, self.seen + len(batch)
        pieces = [(low, batch[low - start : high - start]) for low, high in self._skip.gaps(start, end)]
        with self._lock:
            self.seen = end
            self._ready += pieces
            n = sum(len(items) for _, items in pieces)
            if self._print is None or self._print.is_settled:
                self._n_ready = sum(len(items) for _, items in self._ready)
        if n:
            self._on_news()

    def _check_reached(self) -> None:
        if self.seen < self._must_reach or (self._print is not None and not self._print.is_settled):
            raise ItemsChangedError(self._must_reach, self.seen)

    def _fail(self, error: BaseException) -> None:
        if isinstance(error, Exception) and not isinstance(error, ItemsChangedError):
            error.add_note(f"raised by get_items() after {self.seen:,} items")
        self.error, self.is_complete = error, True
        self._on_news()


def only(source: Any, indexes: list[int]) -> Any:
    """Return only the items with these indexes, in their order; reads no further than the last of them."""
    if is_awaitable(source):
        return _only_awaited(source, indexes)
    if hasattr(source, "__aiter__"):
        return _only_async(source, indexes)
    return _only_plain(source.iter_rows() if hasattr(source, "iter_rows") else source, indexes)


async def _only_awaited(source: Any, indexes: list[int]) -> Any:
    return only(await awaited(source), indexes)


def _only_plain(source: Any, indexes: list[int]) -> Iterator[Any]:
    wanted = iter(indexes)
    following = next(wanted, None)
    for index, item in enumerate(source):
        if following is None:
            return
        if index == following:
            yield item
            following = next(wanted, None)


async def _only_async(source: Any, indexes: list[int]) -> Any:
    wanted = iter(indexes)
    following = next(wanted, None)
    index = 0
    async for item in source:
        if following is None:
            return
        if index == following:
            yield item
            following = next(wanted, None)
        index += 1


class _Rows:
    """Any source of items as something to take from."""

    def __init__(self, source: Any) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[Any] | None = None
        if is_awaitable(source):
            source = self._run(awaited(source))
        self._async: Any = None
        if hasattr(source, "__aiter__"):
            self._async = source.__aiter__()
        elif hasattr(source, "iter_rows"):  # a Ray Dataset; its rows are made on the cluster as they are asked for
            self._rows: Iterator[Any] = iter(source.iter_rows())
        else:
            try:
                self._rows = iter(source)
            except TypeError:
                msg = (
                    f"get_items() returned {type(source).__name__}, which cannot be iterated over; return an iterable, a "
                    f"generator, an async generator or a Ray Dataset"
                )
                raise NonRetryable(JobDefinitionError(msg)) from None  # it will return that again

    def fill(self, batch: list[Any], n: int) -> None:
        """Append the next ``n`` items, fewer only at the end; before an error, those that came."""
        if self._async is None:
            batch.extend(islice(self._rows, n))
        else:
            self._run(self._fill(batch, n))

    async def _fill(self, batch: list[Any], n: int) -> None:
        self._task = asyncio.current_task()
        for _ in range(n):
            try:
                batch.append(await self._async.__anext__())
            except StopAsyncIteration:
                return

    def _run(self, coroutine: Any) -> Any:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
        return self._loop.run_until_complete(coroutine)

    def cancel(self) -> None:
        """Interrupt an async source where it waits; from any thread."""
        loop, task = self._loop, self._task
        if loop is not None and task is not None and not loop.is_closed():
            try:
                loop.call_soon_threadsafe(task.cancel)
            except RuntimeError:  # closed meanwhile
                return

    def close(self) -> None:
        """Let a generator run its ``finally`` blocks."""
        try:
            if self._async is not None and hasattr(self._async, "aclose"):
                self._run(self._async.aclose())
            elif self._async is None and hasattr(self._rows, "close"):
                self._rows.close()
        except BaseException:  # noqa: BLE001, S110 - nobody is there any more to be told
            pass
        finally:
            if self._loop is not None:
                self._loop.close()
