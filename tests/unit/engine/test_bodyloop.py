"""Loops for bodies: turned again whatever goes through them, and given up when they are broken."""

from __future__ import annotations

import asyncio
import threading
import warnings

import pytest

from koan_ray.engine.bodyloop import BodyLoop, hidden_task, new_loop, run_here

RAISED = [SystemExit(1), KeyboardInterrupt()]


def raises(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize("error", RAISED, ids=repr)
def test_what_a_task_raises_is_for_those_who_await_it(error):
    async def fails() -> None:
        await asyncio.sleep(0)
        raise error

    async def body() -> str:
        try:
            await asyncio.gather(fails(), asyncio.sleep(1))
        except type(error):
            return "seen"
        return "not seen"

    assert run_here(body()) == "seen"


@pytest.mark.parametrize("error", RAISED, ids=repr)
def test_a_callback_that_raises_again_and_again_keeps_nobody_from_ending(error):
    async def body() -> str:
        loop = asyncio.get_running_loop()

        def again() -> None:
            loop.call_soon(again)
            raise error

        loop.call_soon(again)
        await asyncio.sleep(0.01)
        return "ended"

    assert run_here(body()) == "ended"


def test_a_loop_that_is_stopped_goes_on():
    async def body() -> str:
        asyncio.get_running_loop().stop()
        await asyncio.sleep(0)
        return "went on"

    assert run_here(body()) == "went on"


def test_a_loop_that_is_broken_is_told_of():
    async def body() -> None:
        asyncio.get_running_loop()._selector.close()
        await asyncio.sleep(1)

    with pytest.raises(RuntimeError, match="event loop"):
        run_here(body())


def test_what_is_left_behind_has_a_moment_to_end_and_not_more():
    ended = []

    async def lingers() -> None:
        try:
            await asyncio.sleep(100)
        finally:
            ended.append(1)

    async def body() -> int:
        body.task = asyncio.create_task(lingers())
        await asyncio.sleep(0)
        return 1

    assert run_here(body()) == 1
    assert ended == [1]


def test_a_hidden_task_is_among_no_tasks():
    async def body() -> int:
        work = hidden_task(asyncio.get_running_loop(), asyncio.sleep(0, 7))
        assert work not in asyncio.all_tasks()
        return await work

    assert run_here(body()) == 7


def test_a_policy_that_makes_no_loops_leaves_plain_ones():
    class Policy(asyncio.DefaultEventLoopPolicy):
        def new_event_loop(self):
            raise SystemExit(1)

    with warnings.catch_warnings():
        asyncio.set_event_loop_policy(Policy())
        try:
            loop = new_loop()
        finally:
            asyncio.set_event_loop_policy(None)
    assert isinstance(loop, asyncio.SelectorEventLoop)
    loop.close()


def test_its_owner_is_called_when_a_loop_cannot_go_on_and_when_it_does():
    troubles, lost = [], threading.Event()
    made = BodyLoop("koan-bodies", on_trouble=troubles.append, on_lost=lambda _loop: lost.set())
    made.loop.call_soon_threadsafe(raises, SystemExit(1))
    went_on = threading.Event()
    made.loop.call_soon_threadsafe(went_on.set)
    assert went_on.wait(5)
    assert troubles == ["SystemExit was raised through it"]
    made.loop.call_soon_threadsafe(made.loop._selector.close)
    assert lost.wait(5)
