"""Ordinary jobs: whatever happens beside them, they have their results."""

from __future__ import annotations

import asyncio

import koan_ray as koan


class Ordinary(koan.Job[int, int]):
    kind = "hostile.ordinary"
    retry = koan.RetryPolicy(max_attempts=1)

    async def execute(self, context, progress, cancellation) -> int:
        progress.report(0.5, "half")
        await asyncio.sleep(0.005)
        return context + 1


class OrdinaryPlain(koan.Job[int, int]):
    kind = "hostile.ordinary_plain"
    retry = koan.RetryPolicy(max_attempts=1)

    def execute(self, context, progress, cancellation) -> int:
        progress.report(1, 2, "half")
        return context + 1
