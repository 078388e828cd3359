"""The engine's numbers, resolved and checked; `koan_ray.config` fills them from a user's settings."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from koan_ray.domain.archival import ArchivalPolicy


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Every limit and interval of coordinator, broker and job actors. Durations in seconds, sizes in bytes."""

    namespace: str = "koan"
    sources: tuple[tuple[str, str], ...] = field(default=(), repr=False)  # names and URLs of what keeps documents
    default_source: str = "default"
    default_partition: str = ""
    audit_source: str = ""  # where executions are kept; "": with their jobs
    archives: bool = True  # finished documents, by the policies
    archive_interval_s: float = 3600.0  # between two passes
    archival_policies: tuple[ArchivalPolicy, ...] = (ArchivalPolicy(),)  # the first that covers a job decides
    lease_ttl_s: float = 15.0  # of the right to write a source
    shards: int = 1  # parts of each source, each with a lease and a writer of its own
    max_actors: int = 0  # 0: as many as the cluster has CPUs
    max_queued: int = 2_000_000  # jobs that are not final; one more is refused
    max_depth: int = 100  # of a job tree
    max_crashes: int = 3  # losses of the process before a job is Failed(poison)
    cancel_grace_s: float = 5.0  # from the request to stop until the actor is killed
    inline_limit: int = 1_048_576  # of one context or result, as JSON
    max_sessions: int = 10_000  # drivers, tasks and job actors that wait for jobs at a time
    max_watched: int = 1_000_000  # jobs one session waits for
    batch_target_s: float = 0.010  # work that is handed to an actor at a time
    batch_limit: int = 500  # jobs that are handed to an actor at a time
    overrun_s: float = 0.020  # after this a batch is answered, and what was not begun goes back
    idle_ttl_s: float = 30.0  # an idle actor is ended after this
    recycle_age_s: float = 14_400.0  # an actor is replaced after this
    recycle_rss: int = 4 * 1024**3  # an actor above this is replaced when idle
    orphan_timeout_s: float = 60.0  # a job actor that cannot reach a coordinator ends itself after this
    stuck_after_s: float = 30.0  # an actor that does not answer a batch is killed after this
    max_parked: int = 1000  # jobs of one actor that wait for other jobs
    completed_retention_s: float = 3600.0
    faulted_retention_s: float = 7200.0
    max_finished: int = 1_000_000  # finished jobs kept in memory
    max_part_bytes: int = 256 * 1024 * 1024  # what items of jobs in memory have produced, of all jobs together
    max_watchers: int = 10_000  # sessions that watch progress
    max_tracked: int = 100_000  # jobs whose latest progress the broker keeps
    # How the engine's processes log; whoever starts it decides, and who joins it with other wishes is not refused.
    log_level: str = field(default="warning", compare=False)
    log_format: str = field(default="text", compare=False)

    @property
    def keeps_documents(self) -> bool:
        """At least one source outlives the coordinator."""
        return len(self.in_memory) < len(self.sources)

    @property
    def in_memory(self) -> tuple[str, ...]:
        """The names of the sources that are the coordinator's memory."""
        return tuple(name for name, url in self.sources if url.startswith("memory://"))

    def differences(self, other: EngineSettings) -> list[str]:
        """Return the names of what is not the same in both."""
        compared = (each.name for each in fields(self) if each.compare)
        return [name for name in compared if getattr(self, name) != getattr(other, name)]

    def shown(self, name: str) -> str:
        """Return a value for people: of the sources only the names, because URLs hold passwords."""
        value = getattr(self, name)
        return ", ".join(source for source, _ in value) or "none" if name == "sources" else str(value)
