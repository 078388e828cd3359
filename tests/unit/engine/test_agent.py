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


def batch(*contexts: bool, is_brief: bool = True) -> OrderBatch:
    terms = Brief.definition.terms("code", retry=None, timeout_s=None)
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
