"""An engine with ordinary neighbours, beside which hostile jobs run; what must hold is asserted here, once.

After every hostile job: it has an outcome in time, the value is the one that was given or a refusal says which and what to
do; its neighbours, begun before and after it, have their right results; lists, pages and executions can be read. At the end
of a run: every place of every actor can be used, and no thread or waiting call is left over.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import koan_ray as koan
from koan_ray import ambient
from tests.hostile.neighbours import Ordinary, OrdinaryPlain
from tests.servers import MongoServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MODES = ("local", "persisted", "ray", "raypersisted")
ACTORS = 2
ENGINE = {"max_actors": ACTORS, "cancel_grace": 0.5, "stuck_after": 10, "max_crashes": 2}


class Harm(AssertionError):
    """Something of the engine's promises does not hold."""


@dataclass
class Outcome:
    """How a hostile job ended for whoever submitted it."""

    how: str  # refused, value, failed, cancelled
    value: Any = None
    error: BaseException | None = None
    job: Any = None
    took_s: float = 0.0
    text: str = field(init=False)

    def __post_init__(self) -> None:
        self.text = "" if self.error is None else str(self.error)

    def __str__(self) -> str:
        return f"{self.how}: {self.text[:300] or repr(self.value)[:300]}"


class Bench:
    """One engine in one mode.

    Args:
        mode: Of `MODES`.
        engine: The running engine.
        within: Seconds in which every outcome must be there. A hang is what this finds, so it is generous.
    """

    def __init__(self, mode: str, engine: Any, within: float) -> None:
        self.mode, self.engine, self.within = mode, engine, within
        self.persisted = mode.endswith("persisted")
        self._n = 0

    def run_of(self, builder: Any) -> Any:
        """Return the builder with what the mode says about storing."""
        return builder.persist().audit() if self.persisted else builder

    # --- one hostile job -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def beside_neighbours(self) -> Iterator[None]:
        """Have ordinary jobs under way meanwhile, and others afterwards; all must have their results."""
        before = self._neighbours()
        yield
        self._check(before, "begun before it")
        self._check(self._neighbours(), "begun after it")

    def attempt(self, make: Callable[[], Any], *, after: Callable[[Any], None] | None = None) -> Outcome:
        """Return the outcome of what ``make`` starts: a builder, or an error of ours; anything else is harm.

        ``after`` is called with the accepted job, to cancel it or to look at it.
        """
        began = time.monotonic()
        try:
            builder = make()
            job = self.run_of(builder).run().get(self.within)
        except koan.KoanRayError as error:
            self._check_error(error)
            return Outcome("refused", error=error, took_s=time.monotonic() - began)
        except TimeoutError as error:
            raise Harm(f"[{self.mode}] the submit was not answered within {self.within:g} s") from error
        if after is not None:
            after(job)
        return self.outcome_of(job, began)

    def outcome_of(self, job: Any, began: float | None = None) -> Outcome:
        """Return how an accepted job ended."""
        began = time.monotonic() if began is None else began
        try:
            value = job.wait(self.within).get(self.within + 5)
            outcome = Outcome("value", value, job=job)
        except koan.JobFailedError as error:
            outcome = Outcome("failed", error=error, job=job)
        except koan.JobCancelledError as error:
            outcome = Outcome("cancelled", error=error, job=job)
        except TimeoutError as error:
            state = job.refresh().get(10)
            raise Harm(f"[{self.mode}] no outcome within {self.within:g} s: {state.status}, {state.last_error}") from error
        if outcome.error is not None:
            self._check_error(outcome.error)
        outcome.took_s = time.monotonic() - began
        self.check_readable(job)
        return outcome

    def check_readable(self, job: Any) -> None:
        """The job can be read back in all ways, and the list that it is in."""
        where = {"source": "default"} if self.persisted else {}
        found = koan.Jobs.get(job.id).get(self.within)
        if not found.status.is_final:
            raise Harm(f"[{self.mode}] {found!r} after its end was reported")
        executions = koan.Jobs.executions(job.id).get(self.within)
        if self.persisted and not executions and found.status is not koan.JobStatus.CANCELLED:
            raise Harm(f"[{self.mode}] {found!r} has no execution though it is audited")
        for each in executions:
            if each.completed_at is None:
                raise Harm(f"[{self.mode}] an execution of {found!r} is open")
            _checked_text(each.error_type, each.error_message, each.stack_trace)
        if not len(koan.Jobs.query(limit=20, **where).get(self.within)):
            raise Harm(f"[{self.mode}] the list of all jobs is empty")
        for each in koan.Jobs.query(limit=20, kind=found.kind, **where).get(self.within):
            _checked_text(each.name, each.description, each.last_error, each.progress_message, each.correlation_id)

    def _check_error(self, error: BaseException) -> None:
        text = str(error)
        if not text.strip():
            raise Harm(f"[{self.mode}] {type(error).__name__} says nothing") from error
        _checked_text(text)

    # --- neighbours --------------------------------------------------------------------------------------------------

    def _neighbours(self) -> list[tuple[Any, int]]:
        self._n += 4
        started = []
        for n in range(self._n, self._n + 4):
            job_type = Ordinary if n % 2 else OrdinaryPlain
            started.append((self.run_of(job_type.start(n)).run(), n))
        return started

    def _check(self, started: list[tuple[Any, int]], which: str) -> None:
        for pending, n in started:
            try:
                value = pending.get(self.within).wait(self.within).get(self.within + 5)
            except BaseException as error:
                raise Harm(f"[{self.mode}] a neighbour {which} ended with {type(error).__name__}: {error}") from error
            if value != n + 1:
                raise Harm(f"[{self.mode}] a neighbour {which} returned {value!r} for {n}")

    # --- at the end ----------------------------------------------------------------------------------------------------

    def check_nothing_leaked(self, threads_before: int | None = None) -> None:
        """All places can be used at once, the coordinator has nothing left, and no thread or slot is kept."""
        jobs = [self.run_of(OrdinaryPlain.start(n)).run() for n in range(8 * ACTORS)]
        self._check([(pending, n) for n, pending in enumerate(jobs)], "that use every place")
        session = ambient.current_engine()
        left = {
            "submissions under way": len(session._batches),
            "submissions that wait": len(session._submits),
        }
        if any(left.values()):
            raise Harm(f"[{self.mode}] the session keeps {left}")
        if threads_before is not None:
            _eventually(lambda: threading.active_count() <= threads_before + 40, "threads", threading.enumerate)


def _checked_text(*texts: object) -> None:
    for text in texts:
        if text is None:
            continue
        if type(text) is not str:
            raise Harm(f"expected text, got {text!r:.100}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Harm(f"text that cannot be encoded: {text!r:.200}") from error
        if "\x1b" in text or "\x00" in text:
            raise Harm(f"text with control characters: {text!r:.200}")


def _eventually(condition: Callable[[], bool], what: str, show: Callable[[], object], within: float = 15.0) -> None:
    until = time.monotonic() + within
    while not condition():
        if time.monotonic() > until:
            raise Harm(f"leaked {what}: {show()!r:.2000}")
        time.sleep(0.05)


@contextlib.contextmanager
def opened(mode: str, folder: Any, *, within: float | None = None) -> Iterator[Bench]:
    """An engine as the mode says, ended afterwards with the server that it stored in."""
    if within is None:
        within = 60.0 if mode.startswith("ray") else 20.0
    server = MongoServer(folder / f"db-{mode}").start() if mode.endswith("persisted") else None
    sections: dict[str, Any] = {"engine": {**ENGINE, "namespace": f"hostile-{os.getpid()}-{mode}"}}
    if server is not None:
        sections["sources"] = {"default": {"url": server.url(f"h{os.getpid()}")}}
    if mode.startswith("ray"):
        import ray

        if not ray.is_initialized():
            ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        with koan.init(runtime="ray" if mode.startswith("ray") else "local", **sections) as engine:
            yield Bench(mode, engine, within)
            if mode.startswith("ray"):
                from tests.integration.conftest import end_namespace

                end_namespace(sections["engine"]["namespace"])
    finally:
        if server is not None:
            server.end()
