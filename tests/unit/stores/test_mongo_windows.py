"""Pages from a server that reads all that a filter lets through: how much that is."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from koan_ray.stores import mongo_windows
from koan_ray.stores.mongo_filters import Step

LAST = datetime.now(UTC) - timedelta(days=14)
N = 5_000
DOCUMENTS = [{"created_at": LAST - timedelta(minutes=4 * n)} for n in range(N)]  # two weeks of them, newest first


class Jobs:
    """A collection that counts what it has to read."""

    def __init__(self):
        self.n_read = self.n_asked = 0

    async def find(self, asked, fields, *, sort, limit, max_time_ms):
        self.n_asked += 1
        ((_, direction), *_rest) = sort
        tests = {"$lt": datetime.__lt__, "$lte": datetime.__le__, "$gt": datetime.__gt__, "$gte": datetime.__ge__}
        bounds = asked.get("created_at", {})
        inside = [each for each in DOCUMENTS if all(tests[name](each["created_at"], at) for name, at in bounds.items())]
        self.n_read += len(inside)
        for document in (inside if direction < 0 else inside[::-1])[: limit or None]:
            yield document


async def page(jobs, direction, limit, newest, **bounds):
    step = Step({"created_at": bounds} if bounds else {}, [("created_at", direction)], "created")
    return [document async for document in mongo_windows.find(jobs, step, limit, 1000, newest)]


async def test_the_newest_of_jobs_that_are_long_past_are_found_without_reading_all():
    jobs, newest = Jobs(), {}
    assert await page(jobs, -1, 100, newest) == DOCUMENTS[:100]
    assert jobs.n_read < N / 4
    assert jobs.n_asked < 120
    jobs.n_read = 0
    assert await page(jobs, -1, 100, newest) == DOCUMENTS[:100]  # where they were the last time
    assert jobs.n_read < 400


@pytest.mark.parametrize("limit", [7, 100, N, 0])
async def test_windows_leave_nothing_out_and_give_nothing_twice(limit):
    found = await page(Jobs(), -1, limit, {})
    assert found == DOCUMENTS[: limit or None]
    after = DOCUMENTS[N // 2]["created_at"]
    assert await page(Jobs(), 1, limit, {}, **{"$gt": after}) == DOCUMENTS[: N // 2][::-1][: limit or None]
