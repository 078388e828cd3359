"""What users hand in to be called may raise and block: threads of ours go on, and others are called."""

from __future__ import annotations

import threading

import pytest

from koan_ray import threads
from koan_ray.engine.timeouts import Timeouts
from koan_ray.threads import Handlers, InOrder


def raises(error):
    def fail():
        raise error

    return fail


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt, GeneratorExit, MemoryError])
def test_a_handler_that_raises_is_logged_and_the_next_is_called(error, caplog):
    handlers, called = Handlers(few=1), threading.Event()
    handlers.call("handler_failed", raises(error))
    handlers.call("handler_failed", called.set)
    assert called.wait(5)
    assert f"handler_failed: {error.__name__}" in caplog.text


def test_handlers_that_block_for_ever_hold_up_nobody():
    handlers, leave, n_blocked = Handlers(few=2), threading.Event(), threading.Semaphore(0)

    def block():
        n_blocked.release()
        leave.wait(30)

    for _ in range(5):
        handlers.call("handler_failed", block)
    for _ in range(5):
        assert n_blocked.acquire(timeout=5)
    called = threading.Event()
    handlers.call("handler_failed", called.set)
    assert called.wait(5)
    leave.set()
    handlers.finish(5)
    assert handlers._n_threads == handlers._n_idle + handlers._has_reserve


def test_a_burst_of_handlers_finds_a_thread_each_though_one_is_idle():
    handlers, leave, called = Handlers(few=4), threading.Event(), threading.Event()
    handlers.call("handler_failed", called.set)
    assert called.wait(5)
    for _ in range(20):
        called.clear()
        while not handlers._n_idle:
            threading.Event().wait(0.001)
        handlers.call("handler_failed", leave.wait)
        handlers.call("handler_failed", called.set)
        assert called.wait(5)
        leave.set()
        handlers.finish(5)
        leave.clear()


def test_beyond_the_most_threads_handlers_wait_until_one_returns(caplog):
    handlers, leave, called = Handlers(few=1, most=2), threading.Event(), threading.Event()
    for _ in range(3):
        handlers.call("handler_failed", lambda: leave.wait(30))
    handlers.call("handler_failed", called.set)
    assert not called.wait(0.8)
    assert "handlers_block: 2 handlers have not returned" in caplog.text
    leave.set()
    assert called.wait(5)


def test_few_threads_do_for_many_handlers_that_return():
    handlers, n = Handlers(few=3), threading.Semaphore(0)
    for _ in range(1000):
        handlers.call("handler_failed", n.release)
    for _ in range(1000):
        assert n.acquire(timeout=5)
    assert handlers._n_threads <= 4


def test_values_come_in_order_one_at_a_time_and_the_newest_are_kept():
    got, leave, over = [], threading.Event(), threading.Event()

    def take(value):
        leave.wait(5)
        got.append(value)
        if value == 9:
            over.set()
        if value % 2:
            raise SystemExit

    values = InOrder("handler_failed", take, most=3)
    for n in range(10):
        values.put(n)
    leave.set()
    assert over.wait(5)
    assert got[-3:] == [7, 8, 9]
    assert len(got) <= 4


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_a_thread_of_ours_that_ends_of_an_error_is_logged_and_begins_again(error, caplog):
    begun = []

    def work():
        begun.append(threading.current_thread())
        if len(begun) < 3:
            raise error

    threads.keep("koan-test", work).join(5)
    assert begun == [begun[0]] * 3
    assert f"thread_restarted: koan-test: {error.__name__}" in caplog.text


def test_ctrl_c_in_the_main_thread_is_for_the_program():
    with pytest.raises(KeyboardInterrupt):
        threads.guarded("handler_failed", raises(KeyboardInterrupt))
    threads.guarded("handler_failed", raises(SystemExit))


def test_a_logging_handler_that_raises_ends_nothing(monkeypatch):
    monkeypatch.setattr(threads._log, "error", raises(ValueError))
    threads.guarded("handler_failed", raises(OSError))


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_timers_survive_what_they_call_and_times_that_no_clock_can_hold(error):
    timeouts, called = Timeouts(), threading.Event()
    for delay in (1e300, threading.TIMEOUT_MAX * 2):
        timeouts.add(delay, called.clear)
    for delay in (-1e300, 0.01):
        timeouts.add(delay, raises(error))
    timeouts.add(0.02, called.set)
    assert called.wait(5)
    timeouts.close()


def test_a_thread_for_timers_that_has_ended_is_replaced():
    timeouts, called = Timeouts(), threading.Event()
    timeouts._thread = threading.Thread()  # one that does not run, as after a fork
    timeouts.add(0, called.set)
    assert called.wait(5)
    timeouts.close()


def test_timers_that_are_left_at_the_end_are_called_then_so_that_nobody_waits_for_them():
    timeouts, called = Timeouts(), []
    timeouts.add(60, lambda: called.append("left"))
    timeouts.add(1e300, raises(ValueError))
    timeouts.close()
    timeouts.add(60, lambda: called.append("late"))
    assert called == ["left", "late"]
