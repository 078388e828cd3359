"""Jobs to try things out with, where nobody has written any yet: ``koan-ray dev`` offers them on its page."""

from __future__ import annotations

import asyncio
import re
import time
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, Field

import koan_ray as koan

if TYPE_CHECKING:
    from koan_ray import CancellationToken, JobProgress


class CountdownContext(BaseModel):
    """What to count."""

    steps: Annotated[int, Field(ge=1, le=10_000, description="How many steps there are.")] = 30
    seconds_per_step: Annotated[float, Field(ge=0, le=60, description="How long each takes.")] = 0.5


class Countdown(koan.Job[CountdownContext, int]):
    """Counts, and reports each step: something to watch, and to cancel. Takes no CPU."""

    kind = "sample.countdown"
    resources = koan.Resources(num_cpus=0.1)

    async def execute(self, context: CountdownContext, progress: JobProgress, cancellation: CancellationToken) -> int:
        for step in range(1, context.steps + 1):
            await asyncio.sleep(context.seconds_per_step)
            progress.report(step, context.steps, f"step {step}")
        return context.steps


class UnluckyContext(BaseModel):
    """How unlucky to be."""

    failures: Annotated[int, Field(ge=0, le=20, description="How many attempts fail before one succeeds.")] = 2
    reason: Annotated[str, Field(max_length=200, description="What the error says.")] = "the printer is on fire"


class PrinterError(Exception):
    """What an `Unlucky` job fails with."""


class Unlucky(koan.Job[UnluckyContext, str]):
    """Fails a few times and is tried again after two seconds, then after four; three attempts are all it gets."""

    kind = "sample.unlucky"
    retry = koan.RetryPolicy(max_attempts=3, initial_delay=2, jitter=0)
    resources = koan.Resources(num_cpus=0.1)

    async def execute(self, context: UnluckyContext, progress: JobProgress, cancellation: CancellationToken) -> str:
        before = re.search(r"attempt (\d+)", self.last_error or "")
        attempt = int(before[1]) + 1 if before else 1
        progress.report(0.5, f"attempt {attempt}")
        await asyncio.sleep(1)
        if attempt <= context.failures:
            msg = f"attempt {attempt}: {context.reason}"
            raise PrinterError(msg)
        return f"attempt {attempt} succeeded"


class FamilyContext(BaseModel):
    """Which family to start."""

    children: Annotated[int, Field(ge=1, le=50, description="How many jobs it waits for.")] = 5


class Family(koan.Job[FamilyContext, int]):
    """Starts countdowns of different lengths below itself and waits for all of them: a tree to look at."""

    kind = "sample.family"
    resources = koan.Resources(num_cpus=0.1)

    async def execute(self, context: FamilyContext, progress: JobProgress, cancellation: CancellationToken) -> int:
        lengths = [5 + 5 * number for number in range(context.children)]
        children = [
            await self.start_child(Countdown, CountdownContext(steps=length), key=str(length)).named(f"{length} steps").run()
            for length in lengths
        ]
        total = 0
        for number, child in enumerate(children, 1):
            total += await child.wait()
            progress.report(number, len(children))
        return total


class ParcelsContext(BaseModel):
    """How many parcels to weigh."""

    parcels: Annotated[int, Field(ge=0, le=100_000, description="How many there are.")] = 500
    seconds_each: Annotated[float, Field(ge=0, le=10, description="How long each takes.")] = 0.02
    broken_every: Annotated[int, Field(ge=0, description="Every how many one is broken; 0: none.")] = 50


class Parcels(koan.FiniteJob[ParcelsContext, int, int]):
    """Weighs parcels on all job actors: a batch to look at, with items that fail and can be run again."""

    kind = "sample.parcels"

    def get_items(self, context: ParcelsContext) -> range:
        return range(1, context.parcels + 1)

    def process_item(self, item: int, index: int, progress: JobProgress) -> koan.ItemResult:
        time.sleep(self.context.seconds_each)
        if self.context.broken_every and item % self.context.broken_every == 0:
            return koan.ItemResult.failed(f"parcel {item} has come undone")
        return koan.ItemResult.success()

    def build_result(self, summary: koan.FiniteSummary) -> int:
        return summary.processed_items
