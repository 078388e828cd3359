"""Why jobs cannot run that are due: what no node of the cluster has, or why no actor of theirs starts. In words.

Nothing is refused for it: a cluster grows, and a package index comes back. It is said where the job is submitted, once for a
spec, in the log when it begins and when it is over, and wherever the job is shown while it lasts. An actor's spec is looked
at when its jobs are first heard of, and again with each housekeeping, by what the launcher knew of the cluster a moment ago.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from koan_ray.domain.feasibility import unmet
from koan_ray.domain.texts import said

if TYPE_CHECKING:
    from collections.abc import Iterable

    from koan_ray.domain.records import ActorSpec
    from koan_ray.ports import Launcher, Log

_MAX_CAUSE = 300  # characters
_MOST_SPECS = 1000  # remembered though nobody waits for an actor of theirs just now


class Obstacles:
    """What is in the way of jobs, by the spec of their actors.

    Args:
        launcher: Knows the nodes.
        log: Told of what begins and ends to be in the way.
    """

    def __init__(self, launcher: Launcher, log: Log) -> None:
        self._launcher, self._log = launcher, log
        self._lacking: dict[ActorSpec, str] = {}
        self._failing: dict[ActorSpec, str] = {}

    def __bool__(self) -> bool:
        return bool(self._lacking or self._failing)

    def of(self, spec: ActorSpec) -> str | None:
        """Return what is in the way of jobs with this spec, None if nothing is known to be."""
        return self._failing.get(spec) or self._lacking.get(spec)

    def look(self, specs: Iterable[ActorSpec]) -> None:
        """Look whether the cluster has nodes for these specs, and whether it has any by now for those that had none."""
        nodes = self._launcher.nodes()
        if nodes is None:
            return
        asked = set(specs)
        if len(self._lacking) > _MOST_SPECS:
            self._lacking = {spec: text for spec, text in self._lacking.items() if spec in asked}
        for spec in asked.union(self._lacking):
            lacking, known = unmet(spec, nodes), self._lacking.get(spec)
            if lacking is not None:
                self._lacking[spec] = lacking
            elif known is not None:
                del self._lacking[spec]
            if (lacking is None) is not (known is None):
                self._report(spec, lacking)

    def failed_to_start(self, spec: ActorSpec, cause: str) -> None:
        """Take note that an actor could not be started."""
        is_new = spec not in self._failing
        self._failing[spec] = f"no job actor with {spec.label} could be started so far: {said(cause, _MAX_CAUSE)}"
        if is_new:
            self._report(spec, self._failing[spec])

    def started(self, spec: ActorSpec) -> None:
        """Take note that an actor of this spec is there."""
        if self._failing.pop(spec, None) is not None:
            self._report(spec, None)

    def given_up(self, spec: ActorSpec) -> None:
        """Forget that actors could not be started: their jobs have failed."""
        self._failing.pop(spec, None)

    def _report(self, spec: ActorSpec, problem: str | None) -> None:
        if problem is not None:
            self._log.warning("jobs_cannot_run", spec=spec.label, problem=problem)
        elif self.of(spec) is None:
            self._log.info("jobs_can_run", spec=spec.label)
