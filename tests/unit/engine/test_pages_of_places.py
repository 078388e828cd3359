"""Pages over any mix of places: memory, which keeps instants to the microsecond, and documents, which keep milliseconds."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from koan_ray.domain.query import ORDERS, Page, Query, parse_query
from koan_ray.domain.status import JobStatus
from koan_ray.ports import Change
from koan_ray.stores.codec import from_date, to_date
from koan_ray.stores.memory import MemoryStore
from koan_ray.testing.contracts import job

AT = 1_750_000_000.0
# Many in one millisecond, at its halves and around its edges; some without the instant.
INSTANTS = st.integers(0, 40).map(lambda n: AT + n * 0.000_25) | st.none()


class Documents(MemoryStore):
    """Keeps what a document would: instants in milliseconds."""

    async def apply(self, changes):
        return await super().apply([change._replace(job=_as_stored(change.job)) for change in changes])


def _as_stored(record):
    return record.evolve(**{name: from_date(to_date(at)) for name in ORDERS if (at := getattr(record, name)) is not None})


async def _pages(stores, order_by: str, limit: int) -> list[str]:
    seen: list[str] = []
    cursor: str | None = None
    for _ in range(1000):
        query = parse_query({"order_by": order_by, "limit": limit, "cursor": cursor})
        page = query.merged([await store.query(query) for store in stores])
        assert len(page.jobs) <= limit
        seen += [record.id for record in page.jobs]
        cursor = page.cursor
        if cursor is None:
            return seen
    pytest.fail(f"paging does not end: {len(seen)} jobs seen")


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), INSTANTS), max_size=40),
    st.sampled_from([sign + order for sign in ("", "-") for order in ORDERS]),
    st.integers(1, 9),
)
def test_every_job_is_shown_once_in_order_and_the_pages_end(kept, order_by, limit):
    stores = [MemoryStore(), Documents(), Documents()]
    name = order_by.removeprefix("-")

    async def scenario():
        records = []
        for place, at in kept:
            record = job(at=AT).evolve(**{name: at if at is not None or name != "created_at" else AT})
            if record.completed_at is not None:
                record = record.evolve(status=JobStatus.COMPLETED)
            records.append(record)
            await stores[place].apply([Change(record, 0)])
        assert Counter(await _pages(stores, order_by, limit)) == Counter(record.id for record in records)

    asyncio.run(scenario())


def test_a_page_ends_where_the_first_place_has_stopped_reading():
    """A place that returned nothing of what it read, and has not read all, may have jobs before those of the others."""
    query = Query(limit=2)
    jobs = [job(at=AT + n) for n in range(6)]
    here = Page(jobs[:2][::-1], None)
    there = Page([], query.cursor_after(jobs[3]))
    page = query.merged([here, there])
    assert page.jobs == []
    assert page.cursor == query.cursor_after(jobs[3])


def test_a_cursor_of_another_kind_is_refused():
    from koan_ray.errors import ConfigurationError

    for cursor in ("", "x", "W10", 5, "WyItY3JlYXRlZF9hdCIsMS41LCJ4Il0", "a" * 10_000):
        with pytest.raises(ConfigurationError, match="cursor"):
            parse_query({"cursor": cursor})
