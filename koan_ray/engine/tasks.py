"""Work of the engine that nobody awaits, and what becomes of it when it fails as nobody expected.

No task, loop or timer here ends unnoticed. What was expected to fail, such as a store that is away, is handled where it
happens. Everything else is a mistake of ours, or of what we stand on: it is logged with its trace, counted under the place
where it happened, and survived. A pass that has failed leaves the rest to the next; what shall always run begins again after
a while, and says in the status that it had to.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, Any

from koan_ray.domain.texts import said
from koan_ray.engine.writer import pause

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from koan_ray.ports import Clock, Log

_AGAIN_S = (0.2, 1.0, 5.0, 15.0)
_WELL_AFTER_S = 60.0  # what has run for so long begins anew without waiting for longer
_MAX_PROBLEM = 500


class Failures:
    """What has failed unexpectedly, by place. Thread-safe as far as it matters: a count may be lost.

    Args:
        log: Told of each, with its trace.
    """

    def __init__(self, log: Log) -> None:
        self._log = log
        self.counts: Counter[str] = Counter()
        self._latest: dict[str, str] = {}

    def note(self, where: str, error: BaseException) -> None:
        """Take note of an exception that nobody expected; never raises."""
        problem = f"{type(error).__name__}: {said(error, _MAX_PROBLEM)}"
        self.counts[where] += 1
        self._latest[where] = problem
        try:
            self._log.error("engine_failed", where=where, problem=problem, n=self.counts[where], exc_info=error)
        except Exception:  # noqa: BLE001 - a log that is broken must not end what it is told of
            self.counts["log"] += 1

    def survive(self, where: str, action: Callable[..., object], *args: Any) -> bool:
        """Call something; false if it raised, which is taken note of."""
        try:
            action(*args)
        except Exception as error:  # noqa: BLE001 - that is what this is for
            self.note(where, error)
            return False
        return True

    def snapshot(self) -> dict[str, dict[str, Any]]:
        """Return what has failed so far: how often, and the last error, by place."""
        return {where: {"n": n, "last": self._latest.get(where, "")} for where, n in self.counts.items()}


class Tasks:
    """The background work of one coordinator.

    Args:
        failures: Where what raises is noted.
        clock: For the waits before something begins again.
    """

    def __init__(self, failures: Failures, clock: Clock) -> None:
        self._failures, self._clock = failures, clock
        self._running: set[asyncio.Task[Any]] = set()
        self._kept: dict[str, str] = {}  # what shall always run, and how it stands

    def spawn(self, work: Coroutine[Any, Any, Any], where: str = "task") -> None:
        """Begin this and see it through; what it raises is taken note of."""
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(lambda ended: self._ended(ended, where))

    def _ended(self, task: asyncio.Task[Any], where: str) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failures.note(where, error)

    def keep(self, where: str, begin: Callable[[], Coroutine[Any, Any, None]], is_over: Callable[[], bool]) -> None:
        """Have something run until ``is_over``: what ends before, by an error or without one, begins again after a while."""
        self.spawn(self._keep(where, begin, is_over), where)

    async def _keep(self, where: str, begin: Callable[[], Coroutine[Any, Any, None]], is_over: Callable[[], bool]) -> None:
        turn = 0
        while not is_over():
            self._kept[where] = "runs"
            began = self._clock.monotonic()
            try:
                await begin()
                if is_over():
                    break
                raise RuntimeError(f"{where} has ended by itself")
            except Exception as error:  # noqa: BLE001 - it shall go on, whatever it was
                self._failures.note(where, error)
            turn = 0 if self._clock.monotonic() - began > _WELL_AFTER_S else turn
            self._kept[where] = "has failed, and begins again"
            await pause(self._clock, _AGAIN_S[min(turn, len(_AGAIN_S) - 1)])
            turn += 1
        self._kept.pop(where, None)

    def interrupted(self) -> Iterator[str]:
        """Iterate over what shall always run and does not just now."""
        return (where for where, stands in self._kept.items() if stands != "runs")

    def cancel(self) -> None:
        """End all of it."""
        for task in self._running:
            task.cancel()
