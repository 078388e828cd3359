"""The values that a job's items have produced, and where they can be written to."""

from __future__ import annotations

import importlib
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic_core import to_json

from koan_ray.domain.records import DocumentPage
from koan_ray.errors import ConfigurationError
from koan_ray.exact import loose

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator

T = TypeVar("T")

_ROWS = 10_000  # of a block or a row group, at most
_BLOCK_BYTES = 32 * 1_048_576  # of them, as JSON
_DOCUMENTS = 500  # of a page, at most
_PAGE_BYTES = 512 * 1024  # of them; the coordinator takes a page in one go


class Values:
    """The values of a job's items, read page by page. Iterate over it as often as needed, inside of ``build_result``.

    What writes them blocks until all are written, and holds a page of them in memory. Written again, by another attempt of
    the job, they replace what is there.
    """

    def __init__(
        self, read: Callable[[], Iterator[Any]], n: int, write_page: Callable[[DocumentPage], None] | None = None
    ) -> None:
        self._read, self._n, self._write_page = read, n, write_page

    def __iter__(self) -> Iterator[Any]:
        return self._read()

    def __len__(self) -> int:
        return self._n

    def __repr__(self) -> str:
        return f"<{self._n:,} values>"

    def write_json_lines(self, path: str | os.PathLike[str]) -> int:
        """Write the values to a file, one JSON value a line; returns how many. The file is there whole or not at all.

        A float that is no finite number is a text there: ``"NaN"``, ``"Infinity"`` or ``"-Infinity"``.
        """
        with _whole(path) as unfinished, unfinished.open("wb") as file:
            for value in self:
                file.write(loose.line(value) + b"\n")
        return self._n

    def write_parquet(self, path: str | os.PathLike[str]) -> int:
        """Write the values to a Parquet file, which Ray Data reads in parallel; returns how many.

        Each value is a dict with the same keys; their types are those of the first 10,000 values. The file is there whole
        or not at all. `to_dataset` writes many files, also to object stores.

        Raises:
            ConfigurationError: PyArrow is not installed, or a value does not fit the columns.
        """
        pa = _pyarrow("write_parquet")
        parquet = importlib.import_module("pyarrow.parquet")

        writer = None
        with _whole(path) as unfinished:
            try:
                for table in _tables(self, "write_parquet"):
                    writer = writer or parquet.ParquetWriter(unfinished, table.schema)
                    writer.write_table(table)
            finally:
                if writer is not None:
                    writer.close()
            if writer is None:
                parquet.write_table(pa.table({}), unfinished)
        return self._n

    def write_documents(self, collection: str, source: str | None = None) -> int:
        """Write the values as documents of a collection; returns how many. It is created if it is not there.

        Shape: one document for each value, with the ``_id`` ``<job id>/<number>``: the number from 0, in 12 digits, in the
        order of the values. A dict is the document, anything else its member ``value``. Afterwards the collection has
        exactly these documents of this job; those of other jobs stay. Written to a majority and journalled, in pages of at
        most 500 values and half a mebibyte or one value.

        Args:
            collection: Its name: 1 to 64 of a-z, 0-9, ``_`` and ``-``, and none that koan_ray uses, such as ``jobs``.
            source: The source whose database it is in; None for the default one.

        Raises:
            ConfigurationError: The source keeps no documents, the name cannot be used, or a value cannot be a document: a
                member is named ``_id`` or begins with ``$``, a whole number has more than 64 bits. Pages before it stay.
            ConflictError: Another execution of this job runs by now.
            StoreUnavailableError: The source has not answered for two minutes.
        """
        if self._write_page is None:
            msg = "write_documents needs an engine with threads of its own, not one of koan_ray.testing; use koan.init()"
            raise ConfigurationError(msg)
        names: tuple[object, object] = (collection, source)
        if not isinstance(names[0], str) or not isinstance(names[1], str | None):
            msg = f"write_documents: expected names as text, got collection={collection!r:.100}, source={source!r:.100}"
            raise ConfigurationError(msg)
        n, last = 0, None
        for page in _pages(self):
            if last is not None:
                self._write_page(DocumentPage(source, collection, n, last, is_last=False))
                n += len(last)
            last = page
        self._write_page(DocumentPage(source, collection, n, last or [], is_last=True))
        return n + len(last or [])

    def to_dataset(self) -> Any:
        """Return the values as a `ray.data.Dataset`, for example for ``.write_parquet("s3://bucket/folder")``.

        Each value is a dict with the same keys; their types are those of the first 10,000 values. Blocks of at most 10,000
        rows go to Ray's object store one by one, which spills to disk what it has no room for. They live as long as this
        process, so use the dataset in ``build_result``.

        Raises:
            ConfigurationError: This process has no Ray, Ray Data or PyArrow is not installed, or a value does not fit the
                columns.
        """
        _pyarrow("to_dataset")
        # By name: what knows Ray stands above; and without Ray, it cannot be imported.
        try:
            datasets = importlib.import_module("koan_ray.runtime.ray.datasets")
        except ImportError as error:
            msg = f"to_dataset needs Ray with Ray Data, which cannot be imported ({error}): install 'ray[data]'"
            raise ConfigurationError(msg) from error
        return datasets.of_tables(_tables(self, "to_dataset"))


def _pyarrow(what: str) -> Any:
    try:
        import pyarrow as pa  # type: ignore[import-untyped]
    except ImportError as error:
        msg = f"{what} needs PyArrow: install koan-ray[data]"
        raise ConfigurationError(msg) from error
    return pa


def _tables(values: Iterable[Any], what: str) -> Iterator[Any]:
    """Yield values as Arrow tables of one schema, that of the first."""
    pa, schema = _pyarrow(what), None
    for rows in _batches(map(loose.flat, values), _ROWS, _BLOCK_BYTES, lambda value: len(to_json(value))):
        names = _columns(rows, schema.names if schema is not None else None, what)
        try:
            table = pa.table({name: [row.get(name) for row in rows] for name in names}, schema=schema)
        except (pa.ArrowException, TypeError) as error:
            raise _misfit(what, str(error)) from error
        schema = table.schema
        yield table


def _columns(rows: list[Any], known: list[str] | None, what: str) -> list[str]:
    """Return the names of the columns: those of all these rows, or those that are known, which must be enough."""
    odd = next((row for row in rows if not isinstance(row, dict)), None)
    if odd is not None:
        raise _misfit(what, f"{odd!r:.100} is no dict")
    names = list(dict.fromkeys(name for row in rows for name in row))
    if known is not None and (more := set(names).difference(known)):
        raise _misfit(what, f"{min(more)!r} is not among the columns of the first values: {', '.join(known)[:500]}")
    return known or names


def _misfit(what: str, why: str) -> ConfigurationError:
    return ConfigurationError(f"{what}: a value does not fit the columns ({why}); return dicts with the same keys and types")


def _pages(values: Iterable[Any]) -> Iterator[list[bytes]]:
    return _batches((to_json(loose.flat(value)) for value in values), _DOCUMENTS, _PAGE_BYTES, len)


def _batches(values: Iterable[T], most: int, most_bytes: int, size_of: Callable[[T], int]) -> Iterator[list[T]]:
    """Yield values in lists of at most so many, and so many bytes unless one alone is larger."""
    batch: list[T] = []
    size = 0
    for value in values:
        its_size = size_of(value)
        if batch and (len(batch) >= most or size + its_size > most_bytes):
            yield batch
            batch, size = [], 0
        batch.append(value)
        size += its_size
    if batch:
        yield batch


@contextmanager
def _whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a file to write to that takes its place once it is written."""
    target = Path(path)
    unfinished = target.with_name(f".{target.name}.unfinished")
    try:
        yield unfinished
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
