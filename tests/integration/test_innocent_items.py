"""The neighbours of an item that ends its process, on a real Ray with one job actor: none is given up with it."""

from __future__ import annotations

import asyncio
import os
import time

import pytest

import koan_ray as koan

pytestmark = pytest.mark.ray
ENGINE = {"max_actors": 1}
N = 40


class Blocking(koan.FiniteJob[list, list, int]):
    """Gives back the items that ended well."""

    kind = "innocent.Blocking"
    items = koan.ItemOptions(max_failed_items=1.0)

    def get_items(self, context):
        return range(N)

    def process_item(self, item, index, progress):
        if item in self.context:
            os._exit(7)
        time.sleep(0.06)
        return koan.ItemResult.success(item)

    def build_result(self, summary) -> list:
        return sorted(summary.values)


class Awaiting(Blocking):
    """The same on a loop, some at a time, and one ends the process late."""

    kind = "innocent.Awaiting"
    items = koan.ItemOptions(max_failed_items=1.0, concurrency=4)

    async def process_item(self, item, index, progress):
        await asyncio.sleep(0.06)
        if item in self.context:
            os._exit(7)
        return koan.ItemResult.success(item)


class Single(Blocking):
    """The same, one item in a chunk."""

    kind = "innocent.Single"
    items = koan.ItemOptions(max_failed_items=1.0, chunk_size=1)


@pytest.mark.parametrize("job_type", [Blocking, Awaiting, Single], ids=lambda job_type: job_type.__name__)
def test_only_the_item_that_ends_its_process_is_given_up(engine, job_type):
    poison = [N // 2] if job_type is not Single else [7, 8, N - 1]
    job = job_type.start(poison).run().get(30)
    assert job.wait().get(120) == [item for item in range(N) if item not in poison]
    dead = sorted(job.failed_items().get(30), key=lambda item: item.index)
    assert [(item.index, item.error_type) for item in dead] == [(item, "ProcessLost") for item in poison]
    assert {item.attempts for item in dead} <= {3, 4}  # the fourth where there were more than eight in its chunk
