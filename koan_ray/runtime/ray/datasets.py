"""Datasets of Ray Data, made where jobs run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ray
import ray.data

from koan_ray.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable


def of_tables(tables: Iterable[Any]) -> Any:
    """Return a dataset of Arrow tables, each of which is put into the object store before the next is asked for.

    Raises:
        ConfigurationError: This process is connected to no Ray.
    """
    if not ray.is_initialized():
        msg = (
            "to_dataset needs Ray, to which this process is not connected (the engine is runtime='local'); use the engine "
            "on Ray, call ray.init() first, or write_parquet(path) for a single file"
        )
        raise ConfigurationError(msg)
    refs: list[Any] = []
    for table in tables:
        refs.append(ray.put(table))
        del table  # before the next one is made
    return ray.data.from_arrow_refs(refs) if refs else ray.data.from_items([])
