"""The first line of what went wrong, for lists: redacted as on the page of the job, and for those who may read that.

What is secret in a message is known only from the job's context, which lists do not read. So the jobs of a page that have an
error are read once, together, and what came of it is kept: a job that has failed does not change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from koan_ray.domain.texts import said
from koan_ray.errors import KoanRayError
from koan_ray.telemetry import logs
from koan_ray.web import presenting
from koan_ray.web.security import Role

if TYPE_CHECKING:
    from collections.abc import Sequence

    from koan_ray.domain.records import JobRecord
    from koan_ray.web.reading import Reader
    from koan_ray.web.schemas import JobSummary
    from koan_ray.web.security import Principal

_KEPT: Final = 10_000


class Headlines:
    """What lists say of errors.

    Args:
        reader: Reads jobs.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._known: dict[tuple[str, int], str] = {}

    async def summaries(self, jobs: Sequence[JobRecord], who: Principal) -> list[JobSummary]:
        """Return jobs for a list that ``who`` sees."""
        return presenting.summaries(jobs, await self._of(jobs) if who.may(Role.READER) else {})

    async def _of(self, jobs: Sequence[JobRecord]) -> dict[str, str]:
        """Return headlines by id; a job that cannot be read at present has none."""
        wanted = {job.id: (job.id, hash(job.error)) for job in jobs if job.error is not None and job.error.message}
        unknown = [job for job in jobs if job.id in wanted and wanted[job.id] not in self._known]
        try:
            async for job in self._reader.complete(unknown):
                if job.error is not None:
                    self._keep((job.id, hash(job.error)), presenting.headline(job))
        except Exception as error:  # noqa: BLE001 - the list itself was read: one odd record must not hide it
            if not isinstance(error, KoanRayError):  # otherwise what is lacking now is there when the list is read again
                logs.get_logger().error("headlines_not_made", problem=said(error, 500))
        return {job_id: self._known[key] for job_id, key in wanted.items() if key in self._known}

    def _keep(self, key: tuple[str, int], text: str) -> None:
        self._known[key] = text
        if len(self._known) > _KEPT:
            del self._known[next(iter(self._known))]
