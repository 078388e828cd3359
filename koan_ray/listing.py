"""Jobs as query results: a page with its cursor, and a stream over all pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

from koan_ray import ambient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator, Mapping

J = TypeVar("J")
_PAGE = 500


class JobPage(list[J]):
    """A list of jobs; ``cursor`` is what `query` takes to go on, None on the last page."""

    def __init__(self, jobs: Iterable[J], cursor: str | None) -> None:
        super().__init__(jobs)
        self.cursor = cursor


class JobStream(Generic[J]):
    """All jobs that match, page by page and in constant memory: ``async for``, or ``.blocking()`` in scripts."""

    def __init__(self, job_type: Any, filters: Mapping[str, Any]) -> None:
        self._job_type = job_type
        self._filters = {"limit": _PAGE, **filters}

    async def __aiter__(self) -> AsyncIterator[J]:
        cursor: str | None = self._filters.get("cursor")
        while True:
            page = await ambient.engine().query({**self._filters, "cursor": cursor}, self._job_type)
            for job in page:
                yield job
            cursor = page.cursor
            if cursor is None:
                return

    def blocking(self) -> Iterator[J]:
        """Iterate without a loop, blocking for each page."""
        cursor: str | None = self._filters.get("cursor")
        while True:
            page = ambient.engine().query({**self._filters, "cursor": cursor}, self._job_type).get()
            yield from page
            cursor = page.cursor
            if cursor is None:
                return
