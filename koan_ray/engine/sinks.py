"""Values of jobs over items on their way to collections of their users.

The lead sends pages of JSON; here they become documents, written with the clients that the sources have anyway. Nothing of
the user's is unpickled, and what a superseded lead still sends is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from koan_ray.errors import ConfigurationError, ConflictError

if TYPE_CHECKING:
    from koan_ray.domain.records import DocumentPage
    from koan_ray.engine.catalog import Catalog
    from koan_ray.engine.checkpoints import Checkpoints
    from koan_ray.ports import DocumentStore


class Sinks:
    """Writes values to sources.

    Args:
        checkpoints: They know which execution of a job is the current one.
        catalog: Where the sources are.
    """

    def __init__(self, checkpoints: Checkpoints, catalog: Catalog) -> None:
        self._checkpoints, self._catalog = checkpoints, catalog

    async def write(self, job_id: str, execution_id: str, page: DocumentPage) -> None:
        """Keep a page of values as documents, replacing those of the same numbers. May be repeated.

        Raises:
            ConfigurationError: The source keeps no documents, the collection is ours or has no proper name, or a value is
                none that a document can hold.
            ConflictError: Another execution of the job runs.
            StoreUnavailableError: It is unknown what was written; repeat the call.
        """
        store = self._store(page.source)
        if await self._checkpoints.current(job_id, execution_id) is None:
            msg = f"job {job_id}: execution {execution_id} is not its current one any more; its values are not written"
            raise ConflictError(msg)
        await store.write_documents(page.collection, job_id, page.first, page.bodies)
        if page.is_last:
            await store.drop_documents(page.collection, job_id, page.first + len(page.bodies))

    def _store(self, source: str | None) -> DocumentStore:
        name = source if source is not None else self._catalog.default.source or ""
        found = self._catalog.sources.get(name)
        if found is None:
            known = ", ".join(map(repr, self._catalog.sources)) or "none"
            is_default = ", the default," if source is None else ""
            msg = (
                f"write_documents: source {name!r}{is_default} is no document store of this engine (known: {known}); give "
                f'it a URL, for example [sources.{name or "default"}] url = "mongodb://localhost:27017/koan" in koan.toml'
            )
            raise ConfigurationError(msg)
        return found.store
