"""Every item of a batch ends exactly once, whatever happens to the chunks that it was in."""

from __future__ import annotations

import copy
import itertools
import pickle
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from koan_ray.domain.items import (
    FAILED,
    PROCESSED,
    PRODUCED,
    RETRY,
    RETURNED,
    SKIPPED,
    Batch,
    Failure,
    Limit,
    Outcomes,
    Ranges,
    Sizer,
)
from koan_ray.domain.records import ErrorInfo
from koan_ray.domain.retry import RetryPolicy
from koan_ray.finite import ItemResult

ERROR = ErrorInfo("ValueError", "no")
LOST = ErrorInfo("ProcessLost", "gone")


def shown(item):
    return str(item).encode()


def outcomes(codes):
    failures = tuple(Failure(place, ERROR, b"0") for place, code in enumerate(codes) if code in (RETRY, FAILED))
    return Outcomes(bytes(codes), (), failures, (), 0.1)


def batch(n=0, *, retry=None, limit=None, max_losses=3):
    made = Batch(
        retry or RetryPolicy(max_attempts=1), limit=limit or Limit(), max_losses=max_losses, random=random.Random(1).random
    )
    if n:
        made.offer(0, list(range(n)))
        made.is_complete = True
    return made


# --- ranges ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12))), st.integers(0, 60), st.integers(0, 30))
def test_ranges_are_a_set_of_numbers(pieces, start, size):
    ranges, numbers = Ranges(), set()
    for first, n in pieces:
        ranges.add(first, first + n)
        numbers |= set(range(first, first + n))
    listed = list(ranges)
    assert [n for low, high in listed for n in range(low, high)] == sorted(numbers)
    assert all(high < low for (_, high), (low, _) in itertools.pairwise(listed))  # sorted, and none touches
    assert ranges.size == len(numbers)
    assert ranges.mark == next(n for n in range(10_000) if n not in numbers)
    assert ranges.end == max(numbers, default=-1) + 1
    gaps = [n for low, high in ranges.gaps(start, start + size) for n in range(low, high)]
    assert gaps == [n for n in range(start, start + size) if n not in numbers]
    assert all((n in ranges) == (n in numbers) for n in range(80))
    assert list(Ranges(listed)) == listed


# --- a batch under everything that can happen --------------------------------------------------------------------------


class AnythingHappens(RuleBasedStateMachine):
    """Items come, chunks go, are answered in part, late, twice or never; poison items end their processes."""

    @initialize(poison=st.sets(st.integers(0, 199), max_size=3), bad=st.sets(st.integers(0, 199), max_size=6),
                attempts=st.integers(1, 3))  # fmt: skip
    def begin(self, poison, bad, attempts):
        self.batch = batch(retry=RetryPolicy(max_attempts=attempts, initial_delay=1, max_delay=4))
        self.poison, self.bad, self.attempts = poison, bad - poison, attempts
        self.now = 0.0
        self.given = 0
        self.answered: list[tuple[int, Outcomes]] = []
        self.ended: dict[int, str] = {}
        self.failures: dict[int, int] = {}

    @precondition(lambda self: not self.batch.is_complete)
    @rule(n=st.integers(1, 60))
    def source_gives(self, n):
        n = min(n, 200 - self.given)
        self.batch.offer(self.given, list(range(self.given, self.given + n)))
        self.given += n
        if self.given == 200:
            self.batch.is_complete = True

    @rule(size=st.integers(1, 50))
    def takes(self, size):
        chunk = self.batch.take(size, self.now)
        if chunk is not None:
            assert len(chunk) == len(chunk.items) == len(chunk.indexes) > 0
            assert list(chunk.items) == list(chunk.indexes)  # an item is its own index here
            assert not {index for index in chunk.indexes if index in self.ended}

    @precondition(lambda self: self.batch.out)
    @rule(data=st.data())
    def is_answered(self, data):
        number = data.draw(st.sampled_from(sorted(self.batch.out)))
        self.answer(number, data.draw(st.integers(0, len(self.batch.out[number]))), data)

    def answer(self, number, n_begun, data=None):
        chunk = self.batch.out[number]
        if self.poison.intersection(chunk.items[: n_begun or None]):
            self.batch.lost(number, LOST, shown)
        else:
            codes = [RETURNED] * len(chunk)
            for place, item in enumerate(chunk.items[:n_begun]):
                code = RETRY if item in self.bad else (PROCESSED, SKIPPED, PRODUCED)[item % 3]
                codes[place] = RETURNED if data is not None and data.draw(st.integers(0, 9)) == 0 else code
            for item, code in zip(chunk.items, codes, strict=True):
                if code == RETRY:
                    self.failures[item] = self.failures.get(item, 0) + 1
                elif code != RETURNED:
                    assert item not in self.ended, f"{item} ended twice"
                    self.ended[item] = "skipped" if code == SKIPPED else "processed"
            said = outcomes(codes)
            assert self.batch.reported(number, said, self.now) is chunk
            self.answered.append((number, said))
        for dead in self.batch.dead:
            assert dead.place not in self.ended, f"{dead.place} ended twice"
            assert dead.place in self.poison | self.bad
            self.ended[dead.place] = "failed"
        self.batch.dead.clear()

    @precondition(lambda self: self.batch.out)
    @rule(data=st.data())
    def comes_back_unbegun(self, data):
        self.batch.give_back(data.draw(st.sampled_from(sorted(self.batch.out))))

    @precondition(lambda self: self.batch.out)
    @rule(data=st.data())
    def is_made_smaller(self, data):
        number = data.draw(st.sampled_from(sorted(self.batch.out)))
        if len(self.batch.out[number]) > 1:
            self.batch.give_back(number, keep=data.draw(st.integers(1, len(self.batch.out[number]) - 1)))

    @precondition(lambda self: self.answered)
    @rule(data=st.data())
    def is_answered_again(self, data):
        number, said = data.draw(st.sampled_from(self.answered))
        assert self.batch.reported(number, said, self.now) is None
        assert self.batch.lost(number, LOST, shown) is None
        self.batch.give_back(number)
        self.batch.broken(number, ERROR, shown)

    @rule(seconds=st.floats(0.1, 5))
    def time_passes(self, seconds):
        self.now += seconds

    @invariant()
    def counts_are_those_of_the_ended(self):
        ended = list(self.ended.values())
        counts = self.batch.processed, self.batch.skipped, self.batch.failed
        assert counts == tuple(ended.count(what) for what in ("processed", "skipped", "failed"))
        assert self.batch.done.size == self.batch.ended == len(ended)
        assert all(index in self.batch.done for index in self.ended)
        assert self.batch.n_fresh >= 0

    def teardown(self):
        if not hasattr(self, "batch"):
            return
        if not self.batch.is_complete:
            self.batch.offer(self.given, list(range(self.given, 200)))
            self.batch.is_complete = True
        for _ in range(100_000):
            if self.batch.is_over:
                break
            self.now += 5
            chunk = self.batch.take(50, self.now)
            for number in list(self.batch.out) if chunk is None else [chunk.number]:
                self.answer(number, len(self.batch.out[number]))
        assert self.batch.is_over
        assert len(self.ended) == self.batch.total == 200
        assert {item for item, how in self.ended.items() if how == "failed"} == self.poison | self.bad
        assert all(n == self.attempts for item, n in self.failures.items() if item in self.bad)


TestAnythingHappens = AnythingHappens.TestCase
TestAnythingHappens.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


# --- poison ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 9, 1000, 5000])
def test_a_poison_item_is_found_after_few_losses(n):
    items = batch(n)
    poison, losses = n * 2 // 3, 0
    while (chunk := items.take(n, 0.0)) is not None:
        if poison in chunk.items:
            losses += 1
            items.lost(chunk.number, LOST, shown)
        else:
            items.reported(chunk.number, outcomes([PROCESSED] * len(chunk)), 0.0)
    assert items.is_over
    assert (items.processed, items.failed) == (n - 1, 1)
    assert items.dead[0].place == poison
    assert losses <= 8


def test_an_item_that_was_hit_by_chance_goes_on():
    items = batch(64)
    for _ in range(2):  # twice in a row, and then never again
        items.lost(items.take(64, 0.0).number, LOST, shown)
    while (chunk := items.take(64, 0.0)) is not None:
        items.reported(chunk.number, outcomes([PROCESSED] * len(chunk)), 0.0)
    assert items.is_over
    assert items.processed == 64


def test_a_chunk_that_nobody_can_read_costs_only_its_bad_item():
    items = batch(100)
    while (chunk := items.take(40, 0.0)) is not None:
        if 33 in chunk.items:
            items.broken(chunk.number, ERROR, shown)
        else:
            items.reported(chunk.number, outcomes([PROCESSED] * len(chunk)), 0.0)
    assert (items.processed, items.failed, items.dead[0].place) == (99, 1, 33)


# --- resuming, limits, sizes -------------------------------------------------------------------------------------------


def test_what_has_ended_before_is_not_taken_again():
    items = Batch(
        RetryPolicy(max_attempts=1), limit=Limit(), max_losses=3, random=random.random, done=Ranges([(0, 5), (7, 9)])
    )
    items.offer(0, list(range(12)))
    taken = []
    while (chunk := items.take(100, 0.0)) is not None:
        taken += chunk.indexes
    assert taken == [5, 6, 9, 10, 11]


def test_items_that_wait_keep_fresh_ones_from_being_begun():
    items = batch(5000, retry=RetryPolicy(max_attempts=2, initial_delay=10))
    while (chunk := items.take(500, 0.0)) is not None:
        items.reported(chunk.number, outcomes([RETRY] * len(chunk)), 0.0)
    assert items.n_waiting == 2000
    assert items.n_fresh == 3000
    assert items.take(500, 60.0) is not None


@pytest.mark.parametrize(
    ("limit", "failed", "ended", "total", "exceeded"),
    [
        (Limit(), 10**9, 10**9, None, False),
        (Limit(most=0), 0, 5, None, False),
        (Limit(most=0), 1, 5, None, True),
        (Limit(most=3), 3, 3, 3, False),
        (Limit(share=0.1), 9, 50, None, False),  # too early to say
        (Limit(share=0.1), 11, 100, None, True),
        (Limit(share=0.1), 11, 12, 1000, False),
        (Limit(share=0.1), 101, 102, 1000, True),
        (Limit(share=1.0), 1000, 1000, 1000, False),
        (Limit(share=0.0), 1, 1, 10, True),
    ],
)
def test_more_may_not_fail_than_is_allowed(limit, failed, ended, total, exceeded):
    assert limit.is_exceeded(failed, ended, total) is exceeded


def test_chunks_grow_to_the_target_and_shrink_at_the_end():
    sizer = Sizer(0.1, 0.1)
    sizes = []
    for _ in range(8):
        sizes.append(sizer.size(None, 2))
        sizer.ended(sizes[-1], sizes[-1] * 0.0001)
    assert sizes[:2] == [1, 32]
    assert sizes[-1] == pytest.approx(1000, rel=0.01)
    assert sizer.size(2000, 2) == 500
    assert sizer.size(40, 2) == 200  # 20 ms of work
    sizer.ended(10, 5.0)  # they have become slow
    assert sizer.size(None, 2) < 100
    assert Sizer(0.1, 0.5, fixed=7).size(1_000_000, 4) == 7


def test_chunks_of_a_job_that_goes_on_are_longer():
    sizer = Sizer(0.1, 0.5)
    sizer.ended(100, 0.1)
    assert sizer.size(None, 2) == 100
    for _ in range(20):
        sizer.ended(100, 0.1)
    assert sizer.size(None, 2) == pytest.approx(262, rel=0.01)  # a quarter of the time that two actors have worked
    for _ in range(400):
        sizer.ended(100, 0.1)
    assert sizer.size(None, 2) == pytest.approx(500, rel=0.01)
    assert sizer.size(600, 2) == 150


def test_what_became_of_an_item_travels_and_compares():
    ends = [ItemResult.success(), ItemResult.success(3), ItemResult.skipped("late"), ItemResult.failed("broken")]
    assert pickle.loads(pickle.dumps(ends)) == copy.deepcopy(ends) == ends
    assert len({repr(end) for end in ends}) == 4
