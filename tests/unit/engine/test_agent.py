"""The inside of a job actor: who runs a brief body, and what happens when it is not brief."""

from __future__ import annotations

import threading

import pytest

import koan_ray as koan
from koan_ray.domain.ids import new_id
from koan_ray.domain.records import Particulars
from koan_ray.engine.agent import Agent
from koan_ray.engine.settings import EngineSettings
from koan_ray.ports import LoopClock, Order, OrderBatch
from koan_ray.testing import ManualClock

released, entered = threading.Event(), threading.Event()


class Brief(koan.Job[bool, str]):
    def execute(self, context, progress, cancellation) -> str:
        if context:
            entered.set()
            released.wait(10)
        return threading.current_thread().name


class Uplink:
    def __init__(self) -> None:
        self.ended = []
        self.told = threading.Event()

    def push(self, push, done) -> None:
        self.ended += push.ended
        done(True)
        if push.ended:
            self.told.set()

    def progress(self, states) -> None:
        pass


@pytest.fixture
def uplink():
    return Uplink()


@pytest.fixture
def agent(uplink):
    released.clear()
    entered.clear()
    made = Agent(
        "a", 1, EngineSettings(overrun_s=0.5), clock=LoopClock(), uplink=uplink, load=lambda *_: Brief, watch_process=False,
    )  # fmt: skip
    if not made.run_batch(1, batch(False, is_brief=False)).ended:  # loads the class, which may take a while
        assert uplink.told.wait(5)
        uplink.ended.clear()
        uplink.told.clear()
    yield made
    released.set()
    made.stop()


def batch(*contexts: bool, is_brief: bool = True, of: type[koan.Job] = Brief) -> OrderBatch:
    terms = of.definition.terms("code", retry=None, timeout_s=None)
    orders = [
        Order(new_id(), new_id(), terms.id, b"true" if c else b"false", 1, 0, 0.0, 0.0, Particulars()) for c in contexts
    ]
    return OrderBatch(orders, [terms], [("code", b"")], is_brief)


def test_brief_bodies_run_on_the_thread_that_brought_them(agent):
    reply = agent.run_batch(2, batch(False, False, False))
    here = threading.current_thread().name
    assert [report.result for report in reply.ended] == [f'"{here}"'.encode()] * 3
    assert not reply.running
    assert not reply.returned


def test_a_brief_body_that_turns_out_long_is_reported_when_asked_and_ends_by_push(agent, uplink):
    answers = []
    orders = batch(True, False)
    caller = threading.Thread(target=lambda: answers.append(agent.run_batch(2, orders)))
    caller.start()
    assert entered.wait(5)
    reply = agent.answer_now(2)
    assert [running.execution_id for running in reply.running] == [orders.orders[0].execution_id]
    assert reply.returned == [orders.orders[1].execution_id]  # so that another actor takes it
    assert agent.answer_now(2) is None
    released.set()
    caller.join(5)
    assert answers == [None]  # said already: nothing is told twice, and no empty answer overtakes the full one
    assert uplink.told.wait(5)
    assert [report.execution_id for report in uplink.ended] == [orders.orders[0].execution_id]


def test_a_second_batch_is_taken_while_a_body_has_the_first_callers_thread(agent):
    orders = batch(True)
    caller = threading.Thread(target=agent.run_batch, args=(2, orders))
    caller.start()
    assert entered.wait(5)
    assert agent.answer_now(2).running
    second = batch(False)
    reply = agent.run_batch(3, second)  # answered after `overrun`, though the one place is taken
    assert reply.returned == [second.orders[0].execution_id]
    released.set()
    caller.join(5)


class Counts(koan.Job[bool, int]):
    """Counts the bodies that have begun."""

    begun = 0

    async def execute(self, context, progress, cancellation) -> int:
        Counts.begun += 1
        await cancellation.wait()
        return Counts.begun


@pytest.fixture
def driven():
    """An agent for `Counts` whose clock the test moves."""
    Counts.begun = 0
    clock = ManualClock()
    made = Agent(
        "a", 1, EngineSettings(overrun_s=5.0, stuck_after_s=30.0), clock=clock, uplink=Uplink(), load=lambda *_: Counts,
        watch_process=False,
    )  # fmt: skip
    yield made, clock
    made.stop()


def test_a_cancel_that_overtakes_its_order_keeps_it_from_beginning(driven):
    agent, _ = driven
    orders = batch(False, False, of=Counts)
    for order in orders.orders:
        agent.cancel(order.execution_id, "cancelled")
    reply = agent.run_batch(1, orders)  # answered at once, not after `overrun`
    assert [(report.execution_id, report.outcome, report.duration_s) for report in reply.ended] == [
        (order.execution_id, "cancelled", 0.0) for order in orders.orders
    ]
    assert (reply.running, reply.returned, Counts.begun) == ([], [], 0)


def test_a_cancel_that_overtakes_a_brief_order_stops_that_one_alone(agent):
    orders = batch(True, False)  # the first would block the thread that brought it
    agent.cancel(orders.orders[0].execution_id, "cancelled")
    reply = agent.run_batch(2, orders)
    assert [report.outcome for report in reply.ended] == ["cancelled", "succeeded"]
    assert not entered.is_set()


def test_a_cancel_of_what_has_ended_is_forgotten_when_no_order_can_be_on_its_way_any_more(driven):
    agent, clock = driven
    for n in range(100):
        agent.cancel(f"ended-{n}", "cancelled")
    clock.advance(31)
    agent.cancel("now", "cancelled")
    assert len(agent._early) == 1


def test_a_request_to_answer_that_overtakes_its_batch_has_it_answered_in_time(agent):
    """It comes once; with the caller's thread lent to a long body, nobody would answer."""
    orders = batch(True)
    assert agent.answer_now(2) is None
    reply = agent.run_batch(2, orders)
    assert [running.execution_id for running in reply.running] == [orders.orders[0].execution_id]
