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


def visit(visit_it) -> None:
    """Do something in a thread that may take the turn: the main one never does."""
    raised = []

    def go() -> None:
        try:
            visit_it()
        except BaseException as error:
            raised.append(error)

    visitor = threading.Thread(target=go, name="visitor")
    visitor.start()
    visitor.join(20)
    if raised:
        raise raised[0]


def asleep(thread: LoopThread) -> None:
    """Wait until the loop's own thread sleeps."""
    while thread._loop._sleep.wakes_at == 0.0:
        pass


def test_a_thread_that_brings_work_does_it_itself_while_the_loop_sleeps(thread):
    def comes() -> None:
        asleep(thread)
        assert thread.run(where()) == ("visitor", True)
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()

    visit(comes)


def test_the_main_thread_leaves_everything_to_the_loop_because_ctrl_c_is_raised_there(thread):
    asleep(thread)
    assert threading.current_thread() is threading.main_thread()
    assert thread.run(where()) == ("test-loop", True)


def test_nothing_that_is_called_on_the_loop_ends_it_or_the_thread_that_has_the_turn(thread):
    noted = []
    thread.on_failure = lambda where, error: noted.append((where, type(error)))

    def leaves(*_args) -> None:
        raise SystemExit("a callback of somebody")

    async def leaves_as_a_task() -> None:
        raise SystemExit("a task of somebody")

    def comes() -> None:
        asleep(thread)
        thread.call(leaves)
        thread.begin(leaves_as_a_task(), lambda _answer, _error: None)
        thread.begin(where(), leaves)
        assert thread.run(where())[1]

    visit(comes)
    thread.call(leaves)
    thread.loop.call_soon_threadsafe(lambda: thread.loop.call_later(0.01, leaves))
    thread.loop.call_soon_threadsafe(lambda: {}["x"])
    thread.run(asyncio.sleep(0.1))
    assert noted.count(("test-loop", KeyError)) == 1
    assert noted.count(("test-loop", SystemExit)) >= 4
    assert thread._thread.is_alive()


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
