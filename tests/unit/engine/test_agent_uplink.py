"""What a job actor does when it cannot reach the coordinator."""

from __future__ import annotations

import threading

import pytest

import koan_ray as koan
from koan_ray.domain.ids import new_id
from koan_ray.domain.records import Particulars
from koan_ray.engine.agent import Agent
from koan_ray.engine.settings import EngineSettings
from koan_ray.ports import Order, OrderBatch
from koan_ray.testing import ManualClock

SETTINGS = EngineSettings(orphan_timeout_s=60.0, stuck_after_s=60.0, overrun_s=0.0)


begun, released = threading.Event(), threading.Event()


class Says(koan.Job[int, int]):
    """Ends when it may, which is after its batch was answered."""

    def execute(self, context, progress, cancellation) -> int:
        if context > 100:
            progress.report(context - 100, 10)
        begun.set()
        assert released.wait(5)
        return context


class Uplink:
    """``answer``: what every push is answered with; None: nobody is there. ``held``: answers that are kept back."""

    def __init__(self) -> None:
        self.answer: bool | None = True
        self.tried, self.arrived, self.held = [], [], None

    def push(self, push, done) -> None:
        self.tried.append(push)
        if self.answer is not None:
            self.arrived.append(push)
        if self.held is None:
            done(self.answer)
        else:
            self.held.append((done, self.answer))

    def progress(self, states) -> None:
        pass

    def ended(self) -> list[bytes]:
        return [report.result for push in self.arrived for report in push.ended]


class Driven(Agent):
    """Its ticks are the test's."""

    def _tick_forever(self) -> None:
        pass


@pytest.fixture
def uplink():
    return Uplink()


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def orphaned():
    return []


@pytest.fixture
def agent(uplink, clock, orphaned):
    made = Driven(
        "a", 1, SETTINGS, clock=clock, uplink=uplink, load=lambda *_: Says, on_orphaned=orphaned.append,
        watch_process=False,
    )  # fmt: skip
    yield made
    released.set()
    made.stop()


def tick(agent, clock, seconds: float) -> None:
    """Let time pass as the ticker does."""
    for _ in range(round(seconds)):
        clock.advance(1.0)
        agent.tick()


def begin(agent, context: int) -> str:
    """Begin a body and return its execution id; its batch has been answered."""
    begun.clear()
    released.clear()
    terms = Says.definition.terms("code")
    order = Order(new_id(), new_id(), terms.id, str(context).encode(), 1, 0, 0.0, 0.0, Particulars())
    reply = agent.run_batch(context, OrderBatch([order], [terms], [("code", b"")]))
    assert [running.execution_id for running in reply.running] == [order.execution_id]
    assert begun.wait(5)
    return order.execution_id


def end(agent) -> None:
    """Let the body end, and return when its report is in the outbox."""
    agent._bell.clear()
    released.set()
    assert agent._bell.wait(5)


def run(agent, *contexts: int) -> None:
    for context in contexts:
        begin(agent, context)
        end(agent)


def test_an_actor_that_reaches_no_coordinator_for_the_orphan_timeout_ends_itself(agent, uplink, clock, orphaned):
    uplink.answer = None
    tick(agent, clock, 60)
    assert orphaned == []
    tick(agent, clock, 1)
    assert orphaned[0] == "no coordinator for 61 s"


def test_an_actor_that_the_coordinator_does_not_know_ends_itself_at_once(agent, uplink, clock, orphaned):
    uplink.answer = False
    tick(agent, clock, 15)  # a quarter of the timeout: how long an idle actor is quiet
    assert orphaned == ["the coordinator does not know this actor"]


def test_an_idle_actor_asks_after_its_coordinator_from_time_to_time_and_stays(agent, uplink, clock, orphaned):
    tick(agent, clock, 600)
    assert orphaned == []
    assert 600 / 20 <= len(uplink.tried) <= 600 / 15


def test_a_coordinator_that_is_away_for_less_than_the_timeout_ends_nobody(agent, uplink, clock, orphaned):
    for _ in range(3):
        uplink.answer = None
        tick(agent, clock, 55)
        uplink.answer = True
        tick(agent, clock, 5)
    assert orphaned == []


def test_a_batch_says_that_there_is_a_coordinator(agent, uplink, clock, orphaned):
    uplink.answer = None
    for _ in range(3):
        tick(agent, clock, 50)
        run(agent, 1)
    assert orphaned == []


def test_reports_are_kept_while_the_uplink_fails_and_delivered_once_in_order(agent, uplink, clock):
    uplink.answer = None
    run(agent, 1, 2)
    tick(agent, clock, 3)
    run(agent, 3)
    tick(agent, clock, 3)
    assert len(uplink.tried) > 1
    uplink.answer = True
    tick(agent, clock, 3)
    assert uplink.ended() == [b"1", b"2", b"3"]


def test_a_report_that_comes_while_a_push_is_under_way_goes_with_the_next(agent, uplink, clock):
    uplink.held = []
    run(agent, 1)
    tick(agent, clock, 1)
    run(agent, 2)
    tick(agent, clock, 5)
    assert [len(push.ended) for push in uplink.tried] == [1]
    (done, answer), uplink.held = uplink.held[0], None
    done(answer)
    tick(agent, clock, 1)
    assert uplink.ended() == [b"1", b"2"]


def test_many_reports_go_in_several_pushes_and_none_twice(agent, uplink, clock):
    uplink.answer = None
    run(agent, *range(3))
    agent._outbox *= 400
    uplink.answer = True
    tick(agent, clock, 5)
    assert len(uplink.ended()) == 1200
    assert max(len(push.ended) for push in uplink.arrived) <= 500


def test_while_nobody_is_there_the_ticker_waits_between_its_attempts(agent, uplink, clock):
    uplink.answer = None
    run(agent, 1)
    agent.tick()
    assert not agent._bell.is_set()


def test_progress_that_could_not_be_told_is_told_again(agent, uplink, clock):
    uplink.answer = None
    execution_id = begin(agent, 105)
    tick(agent, clock, 2)
    uplink.answer = True
    tick(agent, clock, 3)
    told = [(execution, progress.current_step) for push in uplink.arrived for execution, progress in push.progress]
    assert told == [(execution_id, 5)]
    end(agent)


def test_a_body_that_has_resumed_and_parked_again_since_the_last_news_is_told_as_parked(agent, uplink, clock):
    """The coordinator would else take its actor for busy, and send it none of the jobs that the body waits for."""
    execution_id = begin(agent, 1)
    attempt = agent._live[execution_id].attempt
    uplink.held = []
    agent.release(attempt, blocking=False)
    agent.tick()
    assert (uplink.tried[-1].parked, uplink.tried[-1].resumed) == ([execution_id], [])
    agent.acquire(attempt, lambda: None)
    agent.release(attempt, blocking=False)
    done, answer = uplink.held.pop()
    done(answer)
    agent.tick()
    assert (uplink.tried[-1].parked, uplink.tried[-1].resumed) == ([execution_id], [])
    agent.acquire(attempt, lambda: None)
    done, _ = uplink.held.pop()
    done(None)  # nobody was there: told again, as it is now
    agent.tick()
    assert (uplink.tried[-1].parked, uplink.tried[-1].resumed) == ([], [execution_id])
