"""Live streams: one job and all of them, resumed, bounded, ended."""

from __future__ import annotations

import asyncio
import contextlib
import time
from datetime import datetime

import pytest
from starlette.websockets import WebSocketDisconnect

from koan_ray.engine.feed import News
from koan_ray.web import hub as hubs
from koan_ray.web.hub import Batch, Event, Hub, Reading
from koan_ray.web.security import Principal
from tests.integration.web.conftest import TOKENS, assert_problem, subprotocols

WEB = {"limits": {"streams": 3, "websockets": 2}}


async def submit(api, kind, context=None, **more):
    return await asyncio.to_thread(api.submit, kind, context, **more)


def until_closed(socket):
    """All messages, and how the socket was closed."""
    messages = []
    while True:
        try:
            messages.append(socket.receive_json())
        except WebSocketDisconnect as closed:
            return messages, closed


async def test_a_stream_tells_every_step_and_ends_with_the_job(api):
    job_id = await submit(api, "WebSteps", 10)
    async with api.open(f"/api/jobs/{job_id}/events") as stream:
        assert stream.status == 200
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert stream.headers["cache-control"] == "no-store"
        events = await stream.events()
    numbers = [number for _, number, _ in events]
    assert numbers == sorted(set(numbers))
    assert {name for name, _, _ in events} == {"progress"}
    assert events[-1][2]["status"] == "completed"
    assert events[-1][2]["percentage"] == 1.0
    assert [data["sequence"] for _, _, data in events] == numbers


async def test_a_stream_goes_on_where_it_was_left(api):
    job_id = await submit(api, "WebSteps", 30)
    async with api.open(f"/api/jobs/{job_id}/events") as stream:
        seen = [await stream.event() for _ in range(5)]
    last = seen[-1][1]
    async with api.open(f"/api/jobs/{job_id}/events", headers={"Last-Event-ID": str(last)}) as stream:
        rest = await stream.events()
    assert all(number > last for _, number, _ in rest)
    assert rest[-1][2]["status"] == "completed"
    final = rest[-1][1]
    for known in (final - 1, final, final + 5):  # whatever it has seen but the end itself, it is told the end
        async with api.open(f"/api/jobs/{job_id}/events", headers={"Last-Event-ID": str(known)}) as stream:
            ((_, number, data),) = await stream.events()
            assert (data["status"], number > known or number == final) == ("completed", True)
    async with api.open(f"/api/jobs/{job_id}/events", headers={"Last-Event-ID": f"{final}-end"}) as stream:
        assert stream.status == 204  # browsers do not ask again then


async def test_the_list_tells_of_every_job_that_moves(api):
    async with api.open("/api/events") as stream:
        assert (await stream.event())[0] == "open"
        job_id = await submit(api, "WebSteps", 5, name="live")
        statuses, progress = [], []
        while "completed" not in statuses:
            name, _, data = await stream.event()
            if name == "job" and data["job"]["id"] == job_id:
                statuses.append(data["job"]["status"])
                assert data["job"]["name"] == "live"
            elif name == "progress" and data["job_id"] == job_id:
                progress.append(data["sequence"])
        assert progress == sorted(progress)
        assert progress
        await asyncio.to_thread(api.call, "DELETE", f"/api/jobs/{job_id}")
        while (event := await stream.event())[0] != "removed":
            pass
        assert event[2] == {"job_id": job_id}


async def test_the_list_can_be_limited_to_kinds(api):
    async with api.open("/api/events?kind=WebDelivery") as stream:
        await stream.event()
        await submit(api, "WebSteps", 3)
        wanted = await submit(api, "WebDelivery", {"to": "a"})
        seen = set()
        while wanted not in seen:
            name, _, data = await stream.event()
            seen.add(data["job"]["id"] if name == "job" else data["job_id"])
        assert seen == {wanted}


async def test_a_reader_that_comes_back_is_told_of_a_gap(api):
    async with api.open("/api/events", headers={"Last-Event-ID": "7"}) as stream:
        assert (await stream.event())[0] == "open"
        name, _, data = await stream.event()
        assert (name, data) == ("gap", {"n_lost": None})


async def test_a_report_is_on_screen_within_three_hundred_milliseconds(api):
    lags = []
    async with api.open("/api/events") as stream:
        await stream.event()
        job_id = await submit(api, "WebSteps", 20)
        while True:
            name, _, data = await stream.event()
            if name == "progress" and data["job_id"] == job_id:
                lags.append(time.time() - datetime.fromisoformat(data["updated_at"]).timestamp())
            if name == "job" and data["job"]["id"] == job_id and data["job"]["status"] == "completed":
                break
    assert sorted(lags)[len(lags) // 2] < 0.3, lags


async def test_streams_are_limited_and_given_back(api):
    job_id = await submit(api, "WebIdle")
    path = f"/api/jobs/{job_id}/events"
    async with api.open(path) as one, api.open(path) as two, api.open("/api/events") as three:
        assert {one.status, two.status, three.status} == {200}
        for stream in (one, two, three):
            await stream.event()
        refused = await asyncio.to_thread(api.get, path)
        assert "[web.limits] streams" in assert_problem(refused, 429)["detail"]
        assert refused.headers["retry-after"] == "5"
    for _ in range(100):
        if not api.app.state.koan.hub.n_streams:
            break
        await asyncio.sleep(0.02)
    assert api.app.state.koan.hub.n_streams == 0
    async with api.open(path) as stream:
        while (await stream.event())[2]["message"] != "waiting":
            pass
        await asyncio.to_thread(api.post, f"/api/jobs/{job_id}/cancel")
        assert (await stream.events())[-1][2]["status"] == "cancelled"


async def test_nobody_listens_when_nobody_reads(api):
    feed = api.engine._runtime.core._window.feed
    async with api.open("/api/events") as stream:
        await stream.event()
        await submit(api, "WebDelivery", {"to": "a"})
        await stream.event()
        assert feed.is_heard
    for _ in range(100):
        if not feed.is_heard:
            break
        await asyncio.sleep(0.05)
    assert not feed.is_heard


def test_a_websocket_tells_the_same(api):
    job_id = api.submit("WebSteps", 5)
    with api.socket(f"/api/jobs/{job_id}/ws", subprotocols=subprotocols("viewer")) as socket:
        messages, closed = until_closed(socket)
    assert closed.code == 1000
    assert messages[-1]["data"]["status"] == "completed"
    assert [message["id"] for message in messages] == sorted(message["id"] for message in messages)
    with api.socket("/api/ws", subprotocols=subprotocols("viewer")) as socket:
        assert socket.receive_json()["event"] == "open"
        job_id = api.submit("WebDelivery", {"to": "a"})
        while (message := socket.receive_json())["event"] != "job" or message["data"]["job"]["id"] != job_id:
            pass


def test_websockets_are_limited_and_given_back(api):
    job_id = api.submit("WebIdle")
    path = f"/api/jobs/{job_id}/ws"
    with api.socket(path, subprotocols=subprotocols("viewer")), api.socket(path, subprotocols=subprotocols("viewer")):
        from starlette.testclient import WebSocketDenialResponse

        with pytest.raises(WebSocketDenialResponse) as denied, api.socket(path, subprotocols=subprotocols("viewer")):
            pass
        assert "[web.limits] websockets" in assert_problem(denied.value, 429)["detail"]
    assert api.app.state.koan.guard.n_sockets == 0
    api.post(f"/api/jobs/{job_id}/cancel")


def test_a_websocket_of_no_job_is_closed_with_what_is_wrong(api):
    for job_id, code in (("0198f0c2-7b7e-7cc2-a1f5-2f1d1e6a9b10", 4404), ("x", 4404)):
        with api.socket(f"/api/jobs/{job_id}/ws", subprotocols=subprotocols("viewer")) as socket:
            with pytest.raises(WebSocketDisconnect) as closed:
                socket.receive_json()
            assert closed.value.code == code


def test_a_websocket_ends_when_its_credential_does(api, monkeypatch):
    real = api.app.state.koan.credentials.by_token

    def brief(secret):
        found = real(secret)
        return found and Principal(found.name, found.roles, time.time() + 0.3)

    monkeypatch.setattr(api.app.state.koan.credentials, "by_token", brief)
    with api.socket("/api/ws") as socket:
        socket.send_json({"token": TOKENS["viewer"]})
        assert socket.receive_json()["event"] == "open"
        _, closed = until_closed(socket)
    assert closed.code == 4401


async def test_a_slow_reader_loses_the_oldest_and_is_told():
    reading = Reading()
    for n in range(hubs._BATCHES + 3):
        reading.put(Batch([Event("job", str(n), n), Event("job", "x", n)]))
    gap, *rest = await reading.take(1.0)
    assert [(event.name, event.state) for event in gap.events] == [("gap", 6)]
    assert [batch.events[0].state for batch in rest] == list(range(3, hubs._BATCHES + 3))
    assert await reading.take(0.01) == []
    reading.gap(None)
    assert (await reading.take(0.01))[0].events[0].state is None


def test_what_many_read_is_made_once():
    made = []
    batch = Batch([Event("job", str(n), n) for n in range(3)])
    texts = {batch.text(lambda event: made.append(event) or f"{event.state};") for _ in range(500)}
    assert texts == {"0;1;2;"}
    assert len(made) == 3


def states(batches):
    return [(event.name, event.state) for batch in batches for event in batch.events]


def names(batches):
    return [name for name, _ in states(batches)]


class Link:
    """To a coordinator that says what it is given, and a broker that says nothing."""

    def __init__(self):
        self.answers = asyncio.Queue()

    async def coordinator(self, method, listener_id, epoch, park_s, *, timeout_s):
        return await self.answers.get() if epoch != "" else None

    async def broker(self, method, listener_id, epoch, park_s, *, timeout_s):
        if epoch != "":
            await asyncio.Event().wait()


@pytest.mark.parametrize(("n_changes", "least_s"), [(1, 0.2), (60, 1.0)])
async def test_many_readers_are_told_less_often(n_changes, least_s):
    hub = Hub(link := Link(), 1000)
    async with contextlib.AsyncExitStack() as stack:
        readings = [await stack.enter_async_context(hub.reading()) for _ in range(100)]
        changes = [(f"job-{n}", None) for n in range(n_changes)]
        link.answers.put_nowait(News("one", changes))
        link.answers.put_nowait(News("one", changes))
        await readings[0].take(1.0)
        began = time.monotonic()
        await readings[0].take(5.0)
        assert time.monotonic() - began > least_s * 0.9
        assert len(await readings[-1].take(0.0)) == 2


async def test_a_feed_that_restarts_is_a_gap():
    link = Link()
    hub = Hub(link, 10)
    async with hub.reading() as reading:
        link.answers.put_nowait(News("one", [("a", None)]))
        assert names(await reading.take(1.0)) == ["removed"]
        link.answers.put_nowait(News("two", [("b", None)]))
        assert states(await reading.take(1.0)) == [("gap", None), ("removed", None)]
        link.answers.put_nowait(News("two", [], 5))
        assert states(await reading.take(1.0)) == [("gap", 5)]
    assert hub.n_lost == 5
