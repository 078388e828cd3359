"""Changes of all jobs on their way to listeners: the newest of each, bounded, and free while nobody listens."""

from __future__ import annotations

import asyncio

import pytest

import koan_ray as koan
from koan_ray import testing
from koan_ray.domain.records import Progress
from koan_ray.engine import feed as feeds
from koan_ray.engine.feed import Feed
from koan_ray.errors import LimitExceededError
from koan_ray.testing import ManualClock


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def feed(clock):
    return Feed(clock, "e1", 3)


async def test_the_newest_state_of_each_job_is_told_once(feed):
    assert not feed.is_heard
    assert (await feed.news("l", None, 0)).changes == []
    assert feed.is_heard
    feed.note([("a", 1), ("b", 1)])
    feed.note([("a", 2)])
    assert (await feed.news("l", "e1", 0)).changes == [("b", 1), ("a", 2)]
    assert (await feed.news("l", "e1", 0)).changes == []


async def test_a_parked_call_is_answered_by_a_change_or_by_time(feed, clock):
    await feed.news("l", None, 0)
    parked = asyncio.create_task(feed.news("l", "e1", 10))
    await asyncio.sleep(0)
    feed.note([("a", 1)])
    assert (await parked).changes == [("a", 1)]
    parked = asyncio.create_task(feed.news("l", "e1", 10))
    await asyncio.sleep(0)
    clock.advance(10)
    assert (await parked).changes == []


async def test_a_newer_call_answers_the_older_one(feed):
    await feed.news("l", None, 0)
    older = asyncio.create_task(feed.news("l", "e1", 10))
    await asyncio.sleep(0)
    newer = asyncio.create_task(feed.news("l", "e1", 10))
    assert (await older).changes == []
    feed.note([("a", 1)])
    assert (await newer).changes == [("a", 1)]


async def test_a_listener_that_does_not_keep_up_loses_everything_and_is_told(feed):
    await feed.news("l", None, 0)
    feed.note([(str(n), n) for n in range(5)])
    feed.note([("2", 22)])
    news = await feed.news("l", "e1", 0)
    assert (news.changes, news.n_lost) == ([], 6)
    feed.note([(str(n), n) for n in range(3)])
    news = await feed.news("l", "e1", 0)
    assert (len(news.changes), news.n_lost) == (3, 0)


async def test_each_listener_has_its_own(feed):
    await feed.news("one", None, 0)
    feed.note([("a", 1)])
    await feed.news("two", None, 0)
    feed.note([("b", 1)])
    assert [key for key, _ in (await feed.news("one", "e1", 0)).changes] == ["a", "b"]
    assert [key for key, _ in (await feed.news("two", "e1", 0)).changes] == ["b"]


async def test_a_listener_that_is_gone_is_forgotten(feed, clock):
    await feed.news("silent", None, 0)
    clock.advance(61)
    feed.note([("a", 1)])
    assert not feed.is_heard
    await feed.news("polite", None, 0)
    assert (await feed.news("polite", "", 0)).changes == []
    assert not feed.is_heard


async def test_listeners_are_limited(feed, monkeypatch):
    monkeypatch.setattr(feeds, "_MAX_LISTENERS", 2)
    await feed.news("one", None, 0)
    await feed.news("two", None, 0)
    with pytest.raises(LimitExceededError, match="processes that listen to all jobs"):
        await feed.news("three", None, 0)


class Greet(koan.Job[str, str]):
    async def execute(self, context, progress, cancellation) -> str:
        progress.report(0.5, "half")
        return context * 2


def test_a_coordinator_tells_of_its_jobs_without_their_payloads():
    async def scenario():
        async with testing.engine() as engine:
            core = engine.coordinator
            await core.news("l", None, 0)
            job = await Greet.start("secret").run()
            await job.wait()
            news = await core.news("l", core.epoch, 0)
            ((job_id, record),) = news.changes
            assert (job_id, record.status.value, record.context, record.result) == (job.id, "completed", b"null", b"null")
            await job.remove()
            assert (await core.news("l", core.epoch, 0)).changes == [(job.id, None)]
            again = await Greet.start("x").run()
            await again.wait()
            page, cursor = await core.look("page", {"limit": 5})
            assert ([record.id for record in page], cursor) == ([again.id], None)
            assert page[0].context == b"null"
            assert (await core.look("job", again.id)).context == b'"x"'
            assert await core.look("job", job.id) is None
            assert [e.status.value for e in await core.look("executions", again.id)] == ["succeeded"]
            assert await core.look("kinds") == ["Greet"]

    testing.run(scenario())


def test_a_broker_tells_of_all_progress():
    async def scenario():
        async with testing.engine() as engine:
            await engine.broker.news("l", None, 0)
            await engine.broker.push([("a", Progress(1, 0.1)), ("a", Progress(2, 0.2)), ("b", Progress(1, 0.3))])
            news = await engine.broker.news("l", engine.broker.epoch, 0)
            assert [(job_id, state.sequence) for job_id, state in news.changes] == [("a", 2), ("b", 1)]

    testing.run(scenario())
