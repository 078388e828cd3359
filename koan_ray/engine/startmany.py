"""Many jobs of one class, read from a source that may be long and sent in chunks of rows."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any

from koan_ray.domain.ids import new_id
from koan_ray.engine.messages import Submission
from koan_ray.engine.waits import Chunk, seen

if TYPE_CHECKING:
    from koan_ray.domain.records import Particulars, Terms
    from koan_ray.engine.messages import Accepted
    from koan_ray.engine.session import Session
    from koan_ray.jobs import Job
    from koan_ray.pending import Pending

ROWS = 1000  # of one submission
_MAX_CHUNKS = 4  # of one start_many on their way


class ManyFeed:
    """One `start_many`: reads contexts and keeps a few chunks of rows on their way."""

    def __init__(
        self, session: Session, pending: Pending[Any], job_type: type[Job[Any, Any]], terms: Terms, about: Particulars,
        delay_s: float,
    ) -> None:  # fmt: skip
        self._session, self._pending, self._job_type = session, pending, job_type
        self._terms, self._about, self._delay_s = terms, about, delay_s
        self._jobs: list[list[Job[Any, Any]]] = []  # by chunk, in order
        self._free = threading.Semaphore(1_000_000 if session.reads_inline else _MAX_CHUNKS)
        self._lock = threading.RLock()
        self._n_open = 1  # chunks on their way, and the reading itself
        self._error: BaseException | None = None

    def give_up(self, error: BaseException) -> None:
        """Fail, whatever the source does: the session is over. The reading ends with the next context."""
        self._error = self._error or error
        self._pending.fail(error)
        self._free.release()  # it may wait for an answer that does not come any more

    def run(self, contexts: Any) -> None:
        """Read all contexts and send them; the pending gets the jobs in order, or the first error, and never both."""
        encode = self._job_type.definition.encode_context
        rows: list[tuple[Any, ...]] = []
        limit = 64  # the first chunks are small, so that actors begin while the rest is read
        place = 0
        try:
            for context in contexts:
                encoded = encode(context)
                self._session._check_size(self._job_type, encoded)  # noqa: SLF001 - one package
                rows.append((new_id(), 0, 0, encoded, time.time(), self._delay_s))
                place += 1
                if len(rows) >= limit:
                    self._send(rows)
                    rows, limit = [], min(ROWS, limit * 2)
                if self._error is not None:
                    break
            if rows and self._error is None:
                self._send(rows)
        except BaseException as error:  # noqa: BLE001 - a user's iterable may raise anything
            with contextlib.suppress(Exception):  # an error of a user's may refuse notes, too
                error.add_note(f"at place {place} of the contexts given to start_many; the jobs before it are cancelled")
            self._error = self._error or error
        finally:
            self._closed_one()

    def _send(self, rows: list[tuple[Any, ...]]) -> None:
        self._free.acquire()  # back-pressure: the source is read no faster than the coordinator accepts
        chunk: list[Job[Any, Any]] = []
        with self._lock:
            self._n_open += 1
            self._jobs.append(chunk)

        def accepted(answer: Accepted | None, error: BaseException | None) -> None:
            try:
                if answer is None:
                    self._error = self._error or error
                else:
                    self._take(rows, answer, chunk)
            except BaseException as problem:  # noqa: BLE001 - a class of a user's
                self._error = self._error or problem
            finally:
                self._free.release()
                self._closed_one()

        try:
            self._session._send(Submission([self._terms.id], [self._about], rows, [], {}), accepted)  # noqa: SLF001 - one package
        except Exception as problem:  # noqa: BLE001 - the transport has not taken it
            accepted(None, problem)

    def _take(self, rows: list[tuple[Any, ...]], answer: Accepted, chunk: list[Job[Any, Any]]) -> None:
        """Make the jobs in hand of those that were accepted."""
        for problem in answer.refused.values():
            self._error = self._error or problem
        make, view, terms, about = self._job_type._in_hand, self._session._view, self._terms, self._about  # noqa: SLF001
        together = Chunk()
        for place, row in enumerate(rows):
            if place not in answer.refused:
                job = make(view(terms, about, row, answer))
                object.__setattr__(job, "_chunk", together)
                chunk.append(job)
        together.jobs = list(chunk)

    def _closed_one(self) -> None:
        with self._lock:
            self._n_open -= 1
            if self._n_open:
                return
        jobs = [job for chunk in self._jobs for job in chunk]
        if self._error is None:
            self._pending.resolve(jobs)
            return
        self._pending.fail(self._error)
        for job in jobs:
            self._session.cancel(seen(job).id, "another context of the same start_many was refused")
