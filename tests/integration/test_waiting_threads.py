"""A body that waits for its children in another thread: its place is theirs meanwhile, with one actor, too."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool

import pytest

import koan_ray as koan

_shared = ThreadPoolExecutor(2)  # of a module, whose threads have been others' before


class Child(koan.Job[int, int]):
    async def execute(self, context, progress, cancellation) -> int:
        await asyncio.sleep(0)
        return context * 2


class PlainChild(koan.Job[int, int]):
    def execute(self, context, progress, cancellation) -> int:
        return context * 2


def child(n: int) -> int:
    return Child.start(n).run().get().wait().get() + PlainChild.start(n).run().get().wait().get()


async def child_async(n: int) -> int:
    job = await Child.start(n).run()
    return await job.wait()


def in_thread(n: int) -> int:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(child(n)))
    thread.start()
    thread.join()
    return found[0]


def in_thread_of_thread(n: int) -> int:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(in_thread(n)))
    thread.start()
    thread.join()
    return found[0]


def in_pool(n: int) -> int:
    with ThreadPoolExecutor(2) as pool:
        return sum(pool.map(child, [n, n])) // 2


def in_shared_pool(n: int) -> int:
    return _shared.submit(child, n).result()


def in_other_pool(n: int) -> int:
    with ThreadPool(2) as pool:
        return pool.map(child, [n])[0]


def in_loop_of_thread(n: int) -> int:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(child_async(n)) * 2).result()


def in_stream(n: int) -> int:
    job = Child.start(n).run().get()
    return sum(update.status.is_final for update in job.progress_stream().blocking()) * 28


PLAIN = [in_stream, in_thread, in_thread_of_thread, in_pool, in_shared_pool, in_other_pool, in_loop_of_thread]


class Parent(koan.Job[int, int]):
    def execute(self, context, progress, cancellation) -> int:
        return PLAIN[context](7)


class AsyncParent(koan.Job[int, int]):
    async def execute(self, context, progress, cancellation) -> int:
        if context == 0:
            return await asyncio.to_thread(child, 7)
        if context == 1:
            return await asyncio.get_running_loop().run_in_executor(None, child, 7)
        if context == 2:
            return await asyncio.get_running_loop().run_in_executor(_shared, child, 7)
        if context == 3:
            job = await Child.start(7).run()
            return sum([update.status.is_final async for update in job.progress_stream()]) * 28
        return _shared.submit(child, 7).result()  # blocks its loop, which the child would have begun on


@pytest.fixture
def one_actor():
    with koan.init(runtime="local", engine={"max_actors": 1}) as engine:
        _shared.submit(int).result()  # a thread that no body has started
        yield engine


@pytest.mark.parametrize("way", range(len(PLAIN)), ids=lambda n: PLAIN[n].__name__)
def test_a_plain_body_that_waits_in_another_thread_gives_its_place_to_its_child(one_actor, way):
    assert Parent.start(way).run().get(10).wait(10).get() == 28


@pytest.mark.parametrize("way", range(5), ids=["to_thread", "run_in_executor", "own executor", "stream", "blocking"])
def test_an_async_body_that_waits_in_another_thread_gives_its_place_to_its_child(one_actor, way):
    assert AsyncParent.start(way).run().get(10).wait(10).get() == 28


def test_threads_of_the_application_wait_for_themselves(one_actor):
    """They take nobody's place, whatever bodies run in the process."""
    go_on = threading.Event()

    class Holds(koan.Job[int, int]):
        kind = "holds.place"

        def execute(self, context, progress, cancellation) -> int:
            go_on.wait(10)
            return 1

    job = Holds.start(0).run().get(10)
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(lambda: Child.start(1).run().get(10).wait(10).get())
        with pytest.raises(TimeoutError):
            waits.result(0.3)
        go_on.set()
        assert waits.result(10) == 2
    assert job.wait(10).get() == 1


_left: list[threading.Thread] = []


class Leaves(koan.Job[None, str]):
    """Ends while a thread of it stands in line for the place that it gave away."""

    async def execute(self, context, progress, cancellation) -> str:
        thread = threading.Thread(target=lambda: Child.start(1).run().get().wait().get())
        thread.start()
        _left.append(thread)
        await asyncio.sleep(0.6)
        return "left"


class Long(koan.Job[None, str]):
    def execute(self, context, progress, cancellation) -> str:
        threading.Event().wait(1.5)
        return "long"


def test_a_thread_that_stands_in_line_goes_on_when_its_body_has_ended():
    """It has nothing to wait for any more, and would keep its process from ending."""
    _left.clear()
    with koan.init(runtime="local", engine={"max_actors": 1}):
        leaving = Leaves.start().run().get()
        longs = [Long.start().run().get() for _ in range(2)]
        assert leaving.wait(20).get() == "left"
        assert [job.wait(20).get() for job in longs] == ["long", "long"]
        _left[0].join(5)
        assert not _left[0].is_alive()
