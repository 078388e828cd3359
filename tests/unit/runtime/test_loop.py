"""A loop that any thread may turn behaves like a loop with one thread."""

from __future__ import annotations

import asyncio
import sys
import threading

import pytest

from koan_ray.runtime.loop import LoopThread


@pytest.fixture
def thread():
    made = LoopThread("test-loop")
    yield made
    made.stop()


async def where() -> tuple[str, bool]:
    return threading.current_thread().name, asyncio.get_running_loop() is not None


def asleep(thread: LoopThread) -> None:
    """Wait until the loop's own thread sleeps."""
    while thread._loop._sleep.wakes_at == 0.0:
        pass


def test_a_thread_that_brings_work_does_it_itself_while_the_loop_sleeps(thread):
    def bring() -> None:
        asleep(thread)
        found.append(thread.run(where()))
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        found.append("no loop is left behind")

    found = []
    visitor = threading.Thread(target=bring, name="visitor")
    visitor.start()
    visitor.join(5)
    assert found == [("visitor", True), "no loop is left behind"]


def test_the_main_thread_never_turns_it_because_an_interrupt_would_end_what_is_under_way(thread):
    asleep(thread)
    assert thread.run(where()) == ("test-loop", True)


def test_a_thread_deep_in_calls_does_not_turn_it_because_its_stack_would_overflow_there(thread):
    def bring(depth: int) -> None:
        if depth:
            bring(depth - 1)
        else:
            asleep(thread)
            found.append(thread.run(where()))

    found = []
    visitor = threading.Thread(target=bring, args=(sys.getrecursionlimit() - 200,), name="visitor")
    visitor.start()
    visitor.join(5)
    assert found == [("test-loop", True)]


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, RecursionError, ValueError])
def test_whatever_a_callback_or_a_task_raises_the_loop_goes_on(thread, error):
    def fail() -> None:
        raise error

    async def fail_later() -> None:
        fail()

    thread.call(fail)
    with pytest.raises(error):
        thread.run(fail_later())
    thread.begin(asyncio.sleep(0), lambda _answer, _error: fail())
    for name in ("main", "visitor"):
        visitor = threading.Thread(target=thread.call, args=(fail,), name=name)
        visitor.start()
        visitor.join(5)
    assert thread.run(where(), timeout=5)[1]


def test_work_is_left_to_the_loop_while_it_is_busy(thread):
    entered, leave = threading.Event(), threading.Event()

    def occupy() -> None:
        entered.set()
        leave.wait(5)

    threading.Thread(target=thread.call, args=(occupy,)).start()
    assert entered.wait(5)
    ran = []
    thread.call(lambda: ran.append(threading.current_thread().name))
    assert ran == []  # and this thread was not held up
    leave.set()
    thread.run(asyncio.sleep(0))
    assert len(ran) == 1


def test_a_timer_set_by_a_visiting_thread_fires_in_time(thread):
    asleep(thread)
    fired = threading.Event()
    thread.call(lambda: thread.loop.call_later(0.02, fired.set))
    assert fired.wait(2)


def test_what_a_visitor_leaves_unfinished_is_finished_by_the_loop(thread):
    asleep(thread)
    done = threading.Event()

    async def later() -> None:
        await asyncio.sleep(0.01)
        done.set()

    async def first() -> int:
        thread._tasks.add(asyncio.get_running_loop().create_task(later()))
        return 1

    assert thread.run(first()) == 1
    assert done.wait(2)


def test_an_error_reaches_the_caller(thread):
    async def fails() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        thread.run(fails())


def test_a_call_from_the_loop_itself_waits_for_its_turn(thread):
    order = []

    async def nested() -> None:
        thread.call(order.append, "inner")
        order.append("outer")

    thread.run(nested())
    thread.run(asyncio.sleep(0))
    assert order == ["outer", "inner"]


def test_one_thread_at_a_time_has_the_turn(thread):
    inside, most, count = 0, 0, 0

    def work() -> None:
        nonlocal inside, most, count
        inside += 1
        most = max(most, inside)
        for _ in range(50):
            count += 1
        inside -= 1

    def bring() -> None:
        for _ in range(300):
            thread.call(work)
            thread.run(asyncio.sleep(0))

    threads = [threading.Thread(target=bring) for _ in range(6)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    thread.run(asyncio.sleep(0))
    assert (most, count) == (1, 6 * 300 * 50)


def test_after_stop_the_thread_is_gone():
    thread = LoopThread("test-stop")
    asleep(thread)
    thread.stop()
    assert not thread._thread.is_alive()
    assert thread.loop.is_closed()
