"""One source as one coordinator has it: its stores, and a tenure for each shard. The first of them leads; see `tenure`.

How many shards there are is a matter of the coordinator that holds the source (``engine.shards``), and of no other: one
with another number stands by like any, and when it takes over, what it stamps are all unfinished jobs, whatever shard they
were in before. So the number may be changed at any restart.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from koan_ray.domain.lease import shard_name, shard_of, slots_of
from koan_ray.engine.tenure import Tenure, TenureState
from koan_ray.errors import KoanRayError, StoreError

if TYPE_CHECKING:
    from koan_ray.engine.meters import Meters
    from koan_ray.engine.tasks import Failures
    from koan_ray.engine.tenure import Host, Source
    from koan_ray.ports import Clock, Log

_FLUSH_S = 5.0  # for the last flush when the engine is ended


class Shards:
    """The tenures of one source.

    Args:
        source: Its name and its stores.
        n_shards: How many.
        holder: Unique for each start of a coordinator.
        ttl_s: Of the leases.
        clock: Time and timers.
        host: The coordinator.
        log: Where changes of state are told.
        meters: Where takeovers and flushes are counted.
        failures: Where what nobody expected is noted.
    """

    def __init__(
        self, source: Source, *, n_shards: int, holder: str, ttl_s: float, clock: Clock, host: Host, log: Log,
        meters: Meters | None = None, failures: Failures | None = None,
    ) -> None:  # fmt: skip
        self.source, self.store = source.name, source.store
        self.audit = source.audit or source.store
        self.opening = asyncio.Lock()  # held while what was read is adopted and dispatched
        self._n_shards = n_shards
        self.tenures: list[Tenure] = []
        for number in range(n_shards):
            tenure = Tenure(
                source, shard=shard_name(number), slots=slots_of(number, n_shards), holder=holder, ttl_s=ttl_s,
                clock=clock, host=host, log=log, lead=self.tenures[0] if number else None,
                meters=meters, failures=failures,
            )  # fmt: skip
            self.tenures.append(tenure)

    def of(self, job_id: str) -> Tenure:
        """Return the tenure that a job belongs to."""
        return self.tenures[0 if self._n_shards == 1 else shard_of(job_id, self._n_shards)]

    @property
    def is_active(self) -> bool:
        """All of it is taken in, and we write."""
        return all(tenure.state is TenureState.ACTIVE for tenure in self.tenures)

    @property
    def may_act(self) -> bool:
        """We hold all of it, and rely on that."""
        return all(tenure.may_act for tenure in self.tenures)

    @property
    def problem(self) -> BaseException | None:
        """Why a part of it is not active, as last seen."""
        return next((tenure.problem for tenure in self.tenures if tenure.problem is not None), None)

    def explain(self) -> str:
        """Say in words why jobs of this source are not taken at present."""
        return self._worst.explain()

    @property
    def _worst(self) -> Tenure:
        return next((tenure for tenure in self.tenures if tenure.state is not TenureState.ACTIVE), self.tenures[0])

    def snapshot(self) -> dict[str, Any]:
        """Return where we stand: of all, as the first shard that is not active, and of each."""
        return {
            "state": self._worst.state.value,
            "term": self.tenures[0].term,
            "problem": self.problem and str(self.problem),
            "shards": {tenure.shard: {"state": tenure.state.value, "term": tenure.term} for tenure in self.tenures},
        }

    async def settled(self) -> None:
        """Return when it is known whether the source is ours: active, standing by, or not to be had."""
        lead, *others = self.tenures
        await lead.settled()
        if lead.state is TenureState.ACTIVE:
            await asyncio.gather(*[tenure.settled() for tenure in others])

    async def all_read(self, tenure: Tenure) -> bool:
        """Return when every shard has taken in what runs; false if ``tenure`` was replaced before that.

        A job actor runs jobs of any shard, and what becomes of it is decided once.
        """
        if self._n_shards > 1:
            reading = asyncio.ensure_future(self._each_read())
            replaced = asyncio.ensure_future(tenure.replaced.wait())
            try:
                await asyncio.wait([reading, replaced], return_when=asyncio.FIRST_COMPLETED)
            finally:
                reading.cancel()
                replaced.cancel()
        return not tenure.replaced.is_set()

    async def _each_read(self) -> bool:
        for tenure in self.tenures:
            await tenure.read.wait()
        return True

    async def close(self) -> None:
        """Write what is staged, give the leases back, the first one last, and let go of connections.

        A store that does not answer is waited for a few seconds: what was acknowledged is written already, and whatever is
        not is found again by whoever takes over.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FLUSH_S):
                for tenure in reversed(self.tenures):
                    if tenure.may_act:
                        with contextlib.suppress(KoanRayError):
                            await tenure.writer.flushed()
        for tenure in reversed(self.tenures):
            await tenure.close()
        for store in {id(store): store for store in (self.store, self.audit)}.values():
            with contextlib.suppress(StoreError):
                await store.close()
