"""How the engine does, in numbers that cost little.

Bounded counts along an index, samples of what ended last, and what the coordinator knows anyway. Never a scan; asked for
anew at most every two seconds, whoever looks.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from koan_ray.domain.status import JobStatus
from koan_ray.errors import KoanRayError
from koan_ray.web import presenting
from koan_ray.web.redaction import clean_text
from koan_ray.web.routing import Table
from koan_ray.web.schemas import Bucket, Count, Overview, Sources, SourceStatus, Window
from koan_ray.web.security import Role
from koan_ray.web.service import Api, Caller, Service

if TYPE_CHECKING:
    from collections.abc import Sequence

    from koan_ray.engine.window import Figures

routes = Table("engine")
_FRESH_S: Final = 2.0
_COUNT_LIMIT: Final = 10_000  # of each status in each place
SAMPLE: Final = 500  # jobs that ended last
_WINDOWS: Final = (("5m", 300.0), ("1h", 3600.0), ("24h", 86_400.0))
_N_BUCKETS: Final = 30


class _Ended(NamedTuple):
    at: float
    status: JobStatus
    took_s: float | None


@routes.get("/api/overview", Role.VIEWER)
async def get_overview(api: Api, _who: Caller) -> Overview:
    """Return queue depth, what runs, throughput, failures, durations and the age of the oldest queued job."""
    found: Overview = await api.cached("overview", _FRESH_S, lambda: _overview(api))
    return found


@routes.get("/api/status", Role.VIEWER)
async def get_status(api: Api, _who: Caller) -> dict[str, Any]:
    """Return what the coordinator says of itself: jobs, actors, limits, counters."""
    found: dict[str, Any] = presenting.plain(await api.status())
    return found


@routes.get("/api/sources", Role.VIEWER)
async def list_sources(api: Api, _who: Caller) -> Sources:
    """Return where jobs are kept: the coordinator's memory, and each source of documents with its partitions."""
    return Sources(items=await api.cached("sources", _FRESH_S, lambda: sources(api)))


async def _overview(api: Service) -> Overview:
    now = time.time()
    status, figures, places = await asyncio.gather(api.status(), api.figures(), sources(api))
    counts, ended = await asyncio.gather(_counts(api, status, figures), _ended(api, figures, now))
    oldest = figures.oldest_queued_at
    return Overview(
        at=presenting.moment(now),
        counts=counts,
        queued=status["queued"],
        waiting=status["waiting"],
        running=status["running"],
        live=status["live"],
        actors=len(status["actors"]),
        max_actors=status["limits"]["max_actors"],
        oldest_queued_at=presenting.instant(oldest),
        oldest_queued_s=None if oldest is None else round(max(0.0, now - oldest), 3),
        windows=[_window(name, length_s, ended, now) for name, length_s in _WINDOWS],
        sources=places,
    )


async def _counts(api: Service, status: dict[str, Any], figures: Figures) -> dict[str, Count]:
    """Return how many jobs there are by status: of those that have not ended the coordinator knows, others are counted."""
    final = [status for status in JobStatus if status.is_final]
    found = await asyncio.gather(
        *[api.reader.count({"status": status.value}, _COUNT_LIMIT, memory=False) for status in final]
    )
    running = status["running"]
    counts = {"created": Count(n=0, more=False), "queued": Count(n=max(0, status["live"] - running), more=False),
              "running": Count(n=running, more=False)}  # fmt: skip
    for each, count in zip(final, found, strict=True):
        counts[each.value] = Count(n=count.n + figures.n_settled.get(each.value, 0), more=count.more)
    return counts


async def _ended(api: Service, figures: Figures, now: float) -> list[_Ended]:
    """Return the jobs that ended last, newest first."""
    longest = max(length_s for _, length_s in _WINDOWS)
    filters = {"completed_after": now - longest, "order_by": "-completed_at", "limit": SAMPLE}
    page = await api.reader.page(filters, memory=False)
    ended = [_Ended(job.completed_at or 0.0, job.status, presenting.duration_s(job)) for job in page.jobs]
    for at, status, began_at in figures.ended:
        ended.append(_Ended(at, status, None if began_at is None else round(max(0.0, at - began_at), 6)))
    return sorted(ended, key=lambda end: -end.at)[:SAMPLE]


def _window(name: str, length_s: float, ended: Sequence[_Ended], now: float) -> Window:
    """Return the figures of one window; where the sample does not reach back to its begin, those of what it covers."""
    inside = [end for end in ended if end.at >= now - length_s]
    is_sampled = len(inside) >= SAMPLE
    covered_s = max(now - inside[-1].at, 0.001) if is_sampled else length_s
    n_failed = sum(end.status is JobStatus.FAILED for end in inside)
    n_judged = n_failed + sum(end.status is JobStatus.COMPLETED for end in inside)
    p50, p95 = _quantiles([end.took_s for end in inside if end.took_s is not None])
    return Window(
        name=name, seconds=length_s, n=len(inside), sampled=is_sampled, throughput_per_s=round(len(inside) / covered_s, 4),
        failure_rate=round(n_failed / n_judged, 4) if n_judged else None, p50_s=p50, p95_s=p95,
        buckets=_buckets(inside, covered_s, now),
    )  # fmt: skip


def _buckets(inside: Sequence[_Ended], covered_s: float, now: float) -> list[Bucket]:
    width_s = covered_s / _N_BUCKETS
    begin = now - covered_s
    sorted_in: list[list[_Ended]] = [[] for _ in range(_N_BUCKETS)]
    for end in inside:
        sorted_in[min(_N_BUCKETS - 1, max(0, int((end.at - begin) / width_s)))].append(end)
    found = []
    for place, ends in enumerate(sorted_in):
        p50, p95 = _quantiles([end.took_s for end in ends if end.took_s is not None])
        n = {status: sum(end.status is status for end in ends) for status in JobStatus}
        found.append(
            Bucket(
                at=presenting.moment(begin + place * width_s),
                completed=n[JobStatus.COMPLETED],
                failed=n[JobStatus.FAILED],
                cancelled=n[JobStatus.CANCELLED],
                p50_s=p50,
                p95_s=p95,
            )
        )
    return found


def _quantiles(values: list[float]) -> tuple[float | None, float | None]:
    """Return the median and the 95th percentile: the nearest values, not between two."""
    if not values:
        return None, None
    ordered = sorted(values)
    return ordered[(len(ordered) - 1) // 2], ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]


async def sources(api: Service) -> list[SourceStatus]:
    """Return all places where jobs are kept."""
    status = await api.status()
    found = [SourceStatus(name="memory", state="active", term=None, problem=None, is_readable=True, partitions=[""])]
    seen: dict[str, Any] = status["sources"]
    for name in sorted({*seen, *api.reader.sources}):
        told = seen.get(name, {"state": "unknown to the engine", "term": None, "problem": None})
        partitions: list[str] = []
        problem = told["problem"]
        is_readable = name in api.reader.sources
        if is_readable:
            try:
                partitions = await api.reader.partitions(name)
            except KoanRayError as error:
                is_readable, problem = False, problem or str(error)
        else:
            problem = problem or "this API process has no such source in its settings"
        found.append(
            SourceStatus(
                name=name,
                state=str(told["state"]),
                term=told["term"],
                problem=clean_text(problem) if problem else None,
                is_readable=is_readable,
                partitions=partitions,
            )
        )
    return found
