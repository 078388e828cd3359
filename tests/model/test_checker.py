"""The checker itself, on models that fit on a line."""

from __future__ import annotations

import pytest

from tests.model.checker import NO_PROGRESS, Step, search


class Walk:
    """From 0 to ``goal`` by ones and twos; ``forbidden`` must not be met, ``trap`` cannot be left."""

    def __init__(self, goal, *, forbidden=None, trap=None, by_fault=False):
        self.goal, self.forbidden, self.trap, self.by_fault = goal, forbidden, trap, by_fault

    def initial(self):
        return 0

    def steps(self, state):
        if state in (self.goal, self.trap):
            return
        for size in (1, 2):
            if state + size <= self.goal:
                yield Step(f"+{size}", state + size, is_fault=self.by_fault)

    def broken(self, before, after):
        return "met what is forbidden" if after == self.forbidden else None

    def is_good(self, state):
        return state == self.goal


def test_all_states_are_visited():
    verdict = search(Walk(10))
    assert (verdict.n_states, verdict.broken) == (11, None)
    assert str(verdict) == "11 states, all promises kept"


def test_the_shortest_counter_example_is_returned():
    verdict = search(Walk(10, forbidden=6))
    assert verdict.broken == "met what is forbidden"
    assert verdict.trace == ("+2", "+2", "+2")
    assert verdict.end == 6


def test_a_state_without_a_way_out_is_found():
    verdict = search(Walk(10, trap=3))
    assert verdict.broken == NO_PROGRESS
    assert (verdict.end, len(verdict.trace)) == (3, 3)  # two steps, and the remark that it stays so


def test_progress_may_not_need_faults():
    assert search(Walk(2, by_fault=True)).broken == NO_PROGRESS


def test_a_model_that_grows_beyond_its_limit_is_refused():
    with pytest.raises(RuntimeError, match="more than 5 states"):
        search(Walk(10), limit=5)
