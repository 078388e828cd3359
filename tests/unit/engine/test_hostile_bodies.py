"""What bodies do to the job actor around them: each job ends, its place is given back, and the next one runs."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import os
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

import koan_ray as koan
from koan_ray.domain.ids import new_id
from koan_ray.domain.records import Particulars
from koan_ray.engine import agent as agent_module
from koan_ray.engine.agent import Agent
from koan_ray.engine.settings import EngineSettings
from koan_ray.ports import LoopClock, Order, OrderBatch, Silence

ONCE = koan.RetryPolicy(max_attempts=1)
PLAIN = Particulars()
TRACED = Particulars(traceparent="00-1-1-01")


class Uplink:
    def __init__(self) -> None:
        self.ended, self.parked = [], []
        self.news = threading.Condition()

    def push(self, push, done) -> None:
        done(True)
        with self.news:
            self.ended += push.ended
            self.parked += push.parked
            self.news.notify_all()

    def progress(self, states) -> None:
        pass


class Rig:
    """An agent, with classes by name."""

    def __init__(self, concurrency: int = 1, **settings: Any) -> None:
        self.uplink = Uplink()
        self.types: dict[str, type[koan.Job]] = {}
        self.n = 0
        given = {"span": settings.pop("span", None), "uplink": settings.pop("uplink", self.uplink)}
        self.agent = Agent(
            "a", concurrency, EngineSettings(overrun_s=10.0, **settings), clock=LoopClock(),
            load=lambda code_id, _blob: self.types[code_id], watch_process=False, **given,
        )  # fmt: skip

    def batch(self, *of: tuple[type[koan.Job], bytes], is_brief=False, about=PLAIN) -> OrderBatch:
        orders, all_terms = [], {}
        for job_type, context in of:
            terms = job_type.definition.terms(job_type.__qualname__)
            self.types[terms.code_id] = job_type
            all_terms[terms.id] = terms
            orders.append(Order(new_id(), new_id(), terms.id, context, 1, 0, 0.0, 0.0, about))
        return OrderBatch(orders, list(all_terms.values()), [(t.code_id, b"") for t in all_terms.values()], is_brief)

    def reports(self, *of: tuple[type[koan.Job], bytes], is_brief=False, about=PLAIN):
        """Run bodies to their ends and return their reports, in the order given."""
        self.n += 1
        batch = self.batch(*of, is_brief=is_brief, about=about)
        reply = self.agent.run_batch(self.n, batch)
        ended = {report.execution_id: report for report in reply.ended}
        missing = {running.execution_id for running in reply.running}
        with self.uplink.news:
            assert self.uplink.news.wait_for(lambda: missing <= {r.execution_id for r in self.uplink.ended}, timeout=10)
        ended |= {report.execution_id: report for report in self.uplink.ended}
        return [ended[order.execution_id] for order in batch.orders]

    def run(self, job_type, context=b"0", **more):
        return self.reports((job_type, context), **more)[0]

    def check(self) -> None:
        """Neighbours run, and nothing is taken."""
        assert [r.result for r in self.reports((Async, b"1"), (Sync, b"2"), (Async, b"3"))] == [b"1", b"2", b"3"]
        assert [r.result for r in self.reports((Sync, b"2"), (Sync, b"4"), is_brief=True)] == [b"2", b"4"]
        agent = self.agent
        with agent._lock:
            assert (agent._n_active, agent._n_parked, agent._live, list(agent._resuming)) == (0, 0, {}, [])
        assert not agent._lends_thread


class Async(koan.Job[int, int]):
    async def execute(self, context, progress, cancellation) -> int:
        await asyncio.sleep(0)
        return context


class Sync(koan.Job[int, int]):
    def execute(self, context, progress, cancellation) -> int:
        return context


@pytest.fixture
def rig():
    made = Rig()
    yield made
    made.agent.stop()


def made(name: str, **attributes) -> type[koan.Job]:
    return types.new_class(name, (koan.Job[int, Any],), exec_body=lambda space: space.update(attributes))


def body(function, **attributes):
    """A job class with this ``execute``."""

    def plain(self, context, progress, cancellation):
        return function(context)

    async def on_loop(self, context, progress, cancellation):
        return await function(context)

    execute = on_loop if asyncio.iscoroutinefunction(function) else plain
    return made(function.__name__, execute=execute, retry=ONCE, **attributes)


def until(holds) -> bool:
    """Wait until something holds that other threads do."""
    for _ in range(500):
        if holds():
            return True
        threading.Event().wait(0.01)
    return False


# --- what is raised, and where -------------------------------------------------------------------------------------------

RAISED = [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError(), StopIteration(1), MemoryError(),
          RecursionError(), BaseException(), StopAsyncIteration()]  # fmt: skip


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["body", "task", "awaited task", "callback", "async generator", "thread"])
def test_whatever_an_async_body_raises_anywhere_it_ends_and_the_next_one_runs(rig, where, error):
    if where == "thread" and isinstance(error, StopIteration):
        pytest.skip(
            "asyncio never ends a future with it, and the body waits until its timeout: cpython#112182, before 3.12.1"
        )

    async def fails() -> None:
        await asyncio.sleep(0)
        raise error

    async def generator():
        try:
            yield 1
        finally:
            raise error

    def raises() -> None:
        raise error

    async def execute(context):
        loop = asyncio.get_running_loop()
        if where == "body":
            raise error
        if where == "task":
            task = asyncio.create_task(fails())
            await asyncio.wait([task])
            with_it = task.cancelled() or task.exception()
            return bool(with_it)
        if where == "awaited task":
            await asyncio.gather(fails(), asyncio.sleep(0.01))
        if where == "callback":
            loop.call_soon(raises)
        if where == "thread":
            await asyncio.to_thread(raises)
        if where == "async generator":
            made = generator()
            await made.__anext__()
            del made
        for _ in range(5):
            await asyncio.sleep(0)
        return None

    report = rig.run(body(execute))
    fails_by_it = where in ("body", "awaited task", "thread")
    assert report.outcome == ("failed" if fails_by_it else "succeeded")
    rig.check()


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("is_brief", [True, False])
def test_whatever_a_plain_body_raises_it_ends_and_the_next_one_runs(rig, error, is_brief):
    def execute(context):
        raise error

    report = rig.run(body(execute), is_brief=is_brief)
    assert (report.outcome, report.error.type) == ("failed", type(error).__name__)
    rig.check()


# --- what is done to the loop --------------------------------------------------------------------------------------------


async def stops(context):
    asyncio.get_running_loop().stop()
    await asyncio.sleep(0.01)
    return "went on"


async def closes(context):
    asyncio.get_running_loop().close()


async def cancels_all(context):
    for task in asyncio.all_tasks():
        task.cancel()
    await asyncio.sleep(0.01)
    return "went on"


async def handles(context):
    def handler(loop, context):
        raise SystemExit(1)

    loop = asyncio.get_running_loop()
    loop.set_exception_handler(handler)
    loop.call_soon(lambda: 1 / 0)
    await asyncio.sleep(0.01)
    return "went on"


async def makes_tasks(context):
    def factory(loop, work, **more):
        raise SystemExit(1)

    asyncio.get_running_loop().set_task_factory(factory)
    return "went on"


async def leaks(context):
    async def forever():
        while True:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                raise SystemExit(1) from None

    leaks.tasks = [asyncio.create_task(forever()) for _ in range(10)]
    await asyncio.sleep(0)
    return "went on"


async def cancels_itself(context):
    asyncio.current_task().cancel()
    return "went on"


async def swallows(context):
    asyncio.current_task().cancel()
    try:
        await asyncio.sleep(1)
    except asyncio.CancelledError:
        return "went on"


@pytest.mark.parametrize("of", [stops, cancels_all, handles, makes_tasks, leaks, cancels_itself, swallows])
def test_what_a_body_does_to_its_loop_is_nobody_elses(rig, of):
    reports = rig.reports((body(of), b"0"), (Async, b"7"))
    assert [report.result for report in reports] == [b'"went on"', b"7"]
    rig.check()


def test_a_loop_that_runs_cannot_be_closed(rig):
    report = rig.run(body(closes))
    assert (report.outcome, report.error.type) == ("failed", "RuntimeError")
    rig.check()


def test_a_timeout_works_in_the_body_that_follows_one_that_cancelled_itself(rig):
    async def times_out(context):
        try:
            async with asyncio.timeout(0.01):
                await asyncio.sleep(10)
        except TimeoutError:
            return "in time"

    reports = rig.reports((body(swallows), b"0"), (body(times_out), b"0"))
    assert [report.result for report in reports] == [b'"went on"', b'"in time"']


def test_a_loop_whose_files_a_body_has_closed_is_replaced_and_those_on_it_have_failed():
    rig = Rig(concurrency=3)

    is_there = threading.Event()

    async def waits(context):
        is_there.set()
        await asyncio.sleep(3600)

    async def closes_files(context):
        while not is_there.is_set():  # noqa: ASYNC110 - of another loop, perhaps
            await asyncio.sleep(0)
        asyncio.get_running_loop()._selector.close()
        await asyncio.sleep(3600)

    reports = rig.reports((body(waits), b"0"), (body(closes_files), b"0"))
    assert {report.outcome for report in reports} == {"failed"}
    assert "event loop" in reports[0].error.message
    rig.check()
    assert rig.agent.troubles["body_loop_lost"] == 1
    rig.agent.stop()


def test_a_body_that_blocks_its_loop_does_not_hold_up_those_that_have_yet_to_begin(monkeypatch):
    monkeypatch.setattr(agent_module, "_IDLE_TICK_S", 0.05)
    rig = Rig(concurrency=2)
    go_on = threading.Event()

    async def blocks(context):
        go_on.wait(10)
        return "blocked"

    async def frees(context):
        go_on.set()
        return "free"

    rig.run(Async)  # a loop is there
    reports = rig.reports((body(blocks), b"0"), (body(frees), b"0"))
    assert [report.result for report in reports] == [b'"blocked"', b'"free"']
    rig.check()
    rig.agent.stop()


# --- classes, policies, results, spans -----------------------------------------------------------------------------------


def broken_in(where: str, error: BaseException) -> type[koan.Job]:
    def raises(self, *_):
        raise error

    def execute(self, context, progress, cancellation):
        raise ValueError("plain")

    parts = {
        "should_retry": {"should_retry": raises},
        "get_retry_delay": {"get_retry_delay": raises},
        "bool": {"should_retry": lambda self, last: type("Odd", (), {"__bool__": raises})()},
        "delay": {"get_retry_delay": lambda self, last: 10**400},
        "coroutine": {"should_retry": lambda self, last: asyncio.sleep(0)},
        "getattribute": {"__getattribute__": raises},
        "getattr": {"__getattr__": raises},
        "new": {"__new__": raises},
    }[where]
    return made(f"Broken_{where}", execute=execute, retry=ONCE, **parts)


@pytest.mark.parametrize("error", [SystemExit(1), asyncio.CancelledError(), KeyboardInterrupt(), ValueError()], ids=repr)
@pytest.mark.parametrize(
    "where", ["should_retry", "get_retry_delay", "bool", "delay", "coroutine", "getattribute", "getattr", "new"]
)
def test_a_class_that_misbehaves_fails_its_own_job_alone(rig, where, error):
    report = rig.run(broken_in(where, error))
    assert (report.outcome, bool(report.error.type)) == ("failed", True)
    rig.check()


def test_an_abstract_class_fails_its_job_and_says_why(rig):
    from abc import ABC, abstractmethod

    class Unfinished(koan.Job[int, int], ABC):
        def execute(self, context, progress, cancellation) -> int:
            return 1

        @abstractmethod
        def step(self): ...

    report = rig.run(Unfinished)
    assert (report.outcome, "Unfinished" in report.error.message) == ("failed", True)
    rig.check()


class Texts:
    def __init__(self, error) -> None:
        self.error = error

    def __str__(self):
        raise self.error


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), ValueError()], ids=repr)
def test_an_error_whose_text_raises_is_told_without_it(rig, error):
    def execute(context):
        raise koan.NonRetryable(Texts(error))

    report = rig.run(body(execute))
    assert report.outcome == "non_retryable"
    rig.check()


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), ValueError()], ids=repr)
def test_a_result_that_raises_while_it_is_written_fails_its_job(rig, error):
    class Odd(dict):
        def __iter__(self):
            raise error

        items = keys = values = __len__ = __iter__

    def execute(context):
        return Odd()

    assert rig.run(body(execute)).outcome in ("failed", "result_rejected", "succeeded")
    rig.check()


@pytest.mark.parametrize("when", ["make", "enter", "exit"])
@pytest.mark.parametrize("of", [Async, Sync])
def test_a_span_that_raises_changes_no_outcome(of, when):
    @contextmanager
    def span(order, kind):
        if when == "enter":
            raise SystemExit(1)
        yield
        raise SystemExit(2)

    def make(order, kind):
        raise SystemExit(0)

    rig = Rig(span=make if when == "make" else span)
    assert rig.run(of, b"5", about=TRACED).result == b"5"
    rig.check()
    rig.agent.stop()


def test_context_variables_that_cannot_be_compared_stay_with_their_body(rig):
    class Odd:
        def __eq__(self, other):
            raise SystemExit(1)

        __hash__ = None

    variable = contextvars.ContextVar("odd")

    async def sets(context):
        variable.set(Odd())

    async def reads(context):
        return variable.get("clean")

    assert rig.reports((body(sets), b"0"), (body(sets), b"0"), (body(reads), b"0"))[2].result == b'"clean"'
    rig.check()


def test_a_body_that_has_changed_os_environ_for_something_else_ends(monkeypatch):
    rig = Rig()
    rig.agent._leftovers = agent_module._Leftovers(EngineSettings())

    def execute(context):
        monkeypatch.setattr(os, "environ", {})

    assert rig.run(body(execute)).outcome == "succeeded"
    with rig.agent._lock:  # it is told before the process is looked at, in one go
        monkeypatch.undo()
    assert "os module" in rig.agent._recycle
    rig.agent.stop()


def test_a_recursion_limit_that_a_body_has_lowered_is_put_back():
    rig = Rig()
    rig.agent._leftovers = agent_module._Leftovers(EngineSettings())
    limit = sys.getrecursionlimit()

    def execute(context):
        sys.setrecursionlimit(limit - 1)

    assert rig.run(body(execute)).outcome == "succeeded"
    assert (sys.getrecursionlimit(), rig.agent._recycle) == (limit, "a job lowered the recursion limit")
    rig.agent.stop()


# --- async behind plain --------------------------------------------------------------------------------------------------


def decorated(function):
    @functools.wraps(function)
    def inner(*args, **kwargs):
        return function(*args, **kwargs)

    return inner


class Decorated(koan.Job[int, str]):
    @decorated
    async def execute(self, context, progress, cancellation) -> str:
        await asyncio.sleep(0)
        return threading.current_thread().name


class Twice(koan.Job[int, str]):
    def execute(self, context, progress, cancellation) -> str:
        async def inner():
            return work()

        async def work():
            return "worked"

        return inner()


def test_an_async_body_behind_a_plain_decorator_is_awaited_and_known_from_then_on(rig):
    assert rig.run(Decorated).result == b'"koan-bodies"'
    assert Decorated.definition.is_async
    assert rig.run(Decorated, is_brief=True).result == b'"koan-bodies"'
    rig.check()


def test_an_awaitable_that_gives_another_is_awaited_to_the_end(rig):
    assert rig.run(Twice).result == b'"worked"'
    rig.check()


def test_a_body_that_gives_something_to_await_only_at_times_runs_either_way(rig):
    async def later(context):
        return context

    def execute(context):
        return later(context) if context % 2 else context

    of = body(execute)
    assert [rig.run(of, b"%d" % n).result for n in range(6)] == [b"%d" % n for n in range(6)]
    rig.check()


def test_what_a_decorator_has_set_in_the_context_is_there_in_the_body_and_not_in_the_next(rig):
    variable = contextvars.ContextVar("tenant")

    async def reads(context):
        return variable.get("none")

    def execute(context):
        variable.set("mine")
        return reads(context)

    assert rig.run(body(execute)).result == b'"mine"'
    assert rig.run(body(reads)).result == b'"none"'


def test_a_body_that_was_called_but_is_cancelled_before_it_is_awaited_is_let_go(rig):
    async def never(context):
        return 1

    def execute(context):
        execution_id = next(iter(rig.agent._live))
        rig.agent._live[execution_id].stop_cause = "cancelled"
        return never(context)

    assert rig.run(body(execute)).outcome == "cancelled"
    rig.check()


# --- cold classes and many threads ---------------------------------------------------------------------------------------


def test_async_bodies_of_a_class_that_many_threads_load_at_once_run_on_a_loop():
    """Each thread decides for itself what the class is, and all get the same one."""
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    loaded = []
    try:
        for number in range(20):

            class Cold(koan.Job[int, str]):
                kind = f"cold.{number}"
                concurrency = 50

                async def execute(self, context, progress, cancellation) -> str:
                    await asyncio.sleep(0)
                    return threading.current_thread().name

            rig = Rig(concurrency=50)
            rig.agent._load = lambda code_id, _blob, rig=rig: loaded.append(code_id) or rig.types[code_id]
            reports = rig.reports(*[(Cold, b"0")] * 100)
            assert {report.result for report in reports} == {b'"koan-bodies"'}
            rig.agent.stop()
        assert len(loaded) == 20
    finally:
        sys.setswitchinterval(switch)


def test_many_plain_bodies_of_cold_classes_from_several_callers_all_end():
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        rig = Rig(concurrency=20)
        cold = [body(lambda context: context) for _ in range(5)]
        for n, each in enumerate(cold):
            each.__qualname__ = f"Cold{n}"
        with ThreadPoolExecutor(2) as callers:
            answers = [
                callers.submit(rig.agent.run_batch, 100 + n, rig.batch(*[(each, b"%d" % n)] * 40, is_brief=bool(n % 2)))
                for n, each in enumerate(cold)
            ]
            replies = [answer.result(20) for answer in answers]
        ended = {r.execution_id: r for reply in replies for r in reply.ended} | {r.execution_id: r for r in rig.uplink.ended}
        assert len(ended) == 200
        assert {report.outcome for report in ended.values()} == {"succeeded"}
        rig.check()
        rig.agent.stop()
    finally:
        sys.setswitchinterval(switch)


# --- our own threads -----------------------------------------------------------------------------------------------------


def test_the_ticker_goes_on_when_a_report_cannot_be_read(rig, monkeypatch):
    monkeypatch.setattr(agent_module.Attempt, "take_progress", lambda self: 1 / 0)

    class Reports(koan.Job[int, int]):
        def execute(self, context, progress, cancellation) -> int:
            progress.report(0.5)
            return context

    assert rig.run(Reports, b"3").result == b"3"
    assert until(lambda: rig.agent.troubles["ticker_failed"] >= 1)
    assert rig.agent._ticker.is_alive()


class Broken(Uplink):
    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def push(self, push, done) -> None:
        self.n += 1
        if self.n == 1:
            raise SystemExit(1)
        super().push(push, done)


def test_a_push_that_raises_is_made_again():
    uplink = Broken()
    rig = Rig(uplink=uplink, orphan_timeout_s=1.0)
    rig.uplink = uplink
    rig.agent.survey()
    rig.agent._outbox.append(rig.run(Sync, b"1"))
    rig.agent.tick()
    rig.agent.tick()
    assert (uplink.n >= 2, rig.agent._outbox) == (True, [])
    rig.agent.stop()


def test_a_push_whose_answer_is_lost_is_made_again_and_a_late_answer_is_ignored():
    class Silent(Uplink):
        answers = []

        def push(self, push, done):
            self.answers.append((push, done))

    rig = Rig(uplink=Silent(), orphan_timeout_s=100.0)
    clock = rig.agent.clock
    report = rig.run(Sync, b"1")
    rig.agent._outbox.append(report)
    rig.agent._push_news(clock.monotonic())
    rig.agent._push_news(clock.monotonic())
    assert len(Silent.answers) == 1
    rig.agent._push_news(clock.monotonic() + 101)
    rig.agent._push_news(clock.monotonic() + 101)
    assert len(Silent.answers) == 2
    Silent.answers[0][1](True)
    assert rig.agent._outbox == [report]
    Silent.answers[1][1](True)
    assert rig.agent._outbox == []
    rig.agent.stop()


def test_what_bodies_did_is_logged_by_the_ticker_and_a_log_that_raises_ends_nothing(rig):
    said = []

    class Log(Silence):
        def warning(self, event, **fields):
            said.append((event, fields))
            raise SystemExit(1)

    rig.agent._log = Log()
    rig.run(body(stops))
    rig.run(body(stops))
    assert until(lambda: said)
    assert said[0] == ("body_loop_interrupted", {"reason": "a body stopped it"})
    rig.check()
    assert rig.agent._ticker.is_alive()


def test_a_ticker_that_has_ended_is_replaced_by_the_next_batch(rig):
    rig.run(Sync)
    dead = threading.Thread(target=lambda: None)
    dead.start()
    dead.join()
    rig.agent._ticker = dead
    rig.check()
    assert rig.agent._ticker.is_alive()
    assert rig.agent.troubles["ticker_replaced"] == 1


def test_bodies_that_cannot_begin_for_want_of_threads_go_back(rig, monkeypatch):
    def none_left(*args, **kwargs):
        raise RuntimeError("can't start new thread")

    rig.agent.keep_in_touch()
    monkeypatch.setattr(agent_module.threading.Thread, "start", none_left)
    batch = rig.batch((Sync, b"1"))
    reply = rig.agent.run_batch(1, batch)
    assert [report.outcome for report in reply.ended] == ["returned"]
    assert "can't start new thread" in reply.recycle
    assert rig.agent._n_active == 0


def test_a_body_that_ends_while_a_task_of_it_waits_gives_back_what_it_has_once(rig):
    """Its place was given to others while it waited; it has none to give back."""

    async def execute(context):
        attempt = koan_attempt()
        attempt.park(blocking=False)

    for _ in range(3):
        assert rig.run(body(execute)).outcome == "succeeded"
    rig.check()


def koan_attempt():
    from koan_ray import ambient

    return ambient.attempt.get()


def test_a_thread_of_unknown_origin_waits_for_a_body_that_has_a_place():
    rig = Rig(concurrency=2)
    go_on, is_there = threading.Event(), threading.Event()

    def waits(context):
        is_there.set()
        go_on.wait(10)

    caller = threading.Thread(target=rig.run, args=(body(waits),))
    caller.start()
    assert is_there.wait(5)
    stand_in = rig.agent.stand_in()
    stand_in.park(blocking=True)
    assert (rig.agent._n_active, rig.agent._n_parked, rig.agent.stand_in()) == (0, 1, None)
    stand_in.resume()
    assert (rig.agent._n_active, rig.agent._n_parked) == (1, 0)
    go_on.set()
    caller.join(5)
    rig.check()
    rig.agent.stop()


def test_waits_that_overlap_in_several_threads_give_one_place_away_and_take_one_back():
    """One that has ended stands in line for the place while another begins: it goes on, and the body stays away."""
    rig = Rig(concurrency=1)
    leave, is_there, other_leave, other_is_there = (threading.Event() for _ in range(4))

    def waits(context):
        waits.attempt = koan_attempt()
        waits.attempt.park(blocking=True)
        is_there.set()
        leave.wait(10)

    def holds(context):
        other_is_there.set()
        other_leave.wait(10)

    first = threading.Thread(target=rig.run, args=(body(waits),))
    first.start()
    assert is_there.wait(5)
    second = threading.Thread(target=rig.run, args=(body(holds),))
    second.start()
    assert other_is_there.wait(5)
    resumes = threading.Thread(target=waits.attempt.resume)
    resumes.start()
    assert until(lambda: len(rig.agent._resuming) == 1)
    waits.attempt.park(blocking=True)
    resumes.join(5)
    assert not resumes.is_alive()
    assert (rig.agent._n_active, rig.agent._n_parked, len(rig.agent._resuming)) == (1, 1, 0)
    other_leave.set()
    second.join(5)
    waits.attempt.resume()
    assert (rig.agent._n_active, rig.agent._n_parked) == (1, 0)
    leave.set()
    first.join(5)
    rig.check()
    rig.agent.stop()
