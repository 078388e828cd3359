"""Items whose process vanished: they carry their losses wherever they go, and wait for a process of their own."""

from __future__ import annotations

import json
import random

import pytest

from koan_ray.domain.items import FAILED, PROCESSED, RETRY, RETURNED, Batch, Failure, Limit, Outcomes
from koan_ray.domain.lane import Lane
from koan_ray.domain.records import ActorSpec, ErrorInfo
from koan_ray.domain.retry import RetryPolicy

LOST = ErrorInfo("ProcessLost", "gone")


def shown(item):
    return b"%d" % item


def batch(n, *, attempts=3):
    retry = RetryPolicy(max_attempts=attempts, initial_delay=1, max_delay=1, jitter=0)
    made = Batch(retry, limit=Limit(), max_losses=3, random=random.random)
    made.offer(0, list(range(n)))
    return made


def outcomes(codes):
    failures = [Failure(place, ErrorInfo("ValueError", "no"), b"0") for place, c in enumerate(codes) if c in {RETRY, FAILED}]
    return Outcomes(bytes(codes), (), tuple(failures), (), 0.01)


def lose(items, size=100, now=0.0):
    """Take a chunk whose process vanishes."""
    chunk = items.take(size, now)
    items.lost(chunk.number, LOST, shown)
    return chunk


def test_a_process_that_others_were_in_is_no_evidence():
    items = batch(1)
    for crashes in (0, 1, 2):  # at first it was alone in its chunk, but others may have been in its process
        assert not items.dead
        chunk = items.take(1, 0.0)
        assert chunk.crashes == crashes
        items.lost(chunk.number, LOST, shown)
    assert [(dead.place, dead.attempts) for dead in items.dead] == [(0, 3)]


def test_a_chunk_that_comes_back_is_as_suspect_as_before():
    items = batch(16)
    lose(items)
    first = items.take(100, 0.0)
    items.give_back(first.number)
    again = items.take(100, 0.0)
    assert (list(again.indexes), again.crashes) == ([0, 1], 1)
    items.reported(again.number, outcomes([PROCESSED, RETURNED]), 0.0)
    rest = items.take(100, 0.0)
    assert (list(rest.indexes), rest.crashes) == ([1], 1)


def test_a_suspect_that_fails_is_as_suspect_at_its_next_attempt_and_alone():
    items = batch(9)
    lose(items, 8)
    lose(items)  # item 0, alone
    while (chunk := items.take(100, 0.0)) is not None:
        items.reported(chunk.number, outcomes([RETRY] * len(chunk)), 0.0)
    taken = [items.take(100, 5.0) for _ in range(9)]
    assert sorted((list(chunk.indexes), chunk.crashes) for chunk in taken) == [
        ([0], 2), *(([item], 1) for item in range(1, 8)), ([8], 0),
    ]  # fmt: skip
    assert not items.suspicions() or {each.losses for each in items.suspicions()} == {1, 2}


@pytest.mark.parametrize("seed", range(20))
def test_losses_outlive_an_execution(seed):
    dice = random.Random(seed)
    items, n = batch(100), 100
    for _ in range(dice.randrange(1, 60)):
        chunk = items.take(dice.choice([1, 7, 40]), 2.0 * items.n_losses)
        if chunk is None:
            break
        if dice.random() < 0.4:
            items.lost(chunk.number, LOST, shown)
        elif dice.random() < 0.8:
            codes = [dice.choice([PROCESSED, PROCESSED, RETRY, RETURNED]) for _ in range(len(chunk))]
            items.reported(chunk.number, outcomes(codes), 2.0 * items.n_losses)
    kept = json.loads(json.dumps(items.suspicions()))
    known = {index: (losses, alone) for start, end, losses, alone in kept for index in range(start, end)}
    assert len(known) == sum(end - start for start, end, *_ in kept), "an item is in one place"

    after = Batch(RetryPolicy(), limit=Limit(), max_losses=3, random=random.random, done=items.done)
    after.remember(kept)
    assert [list(each) for each in after.suspicions()] == kept
    for start in range(0, n, 13):
        after.offer(start, list(range(start, min(start + 13, n))))
    found = {}
    while (chunk := after.take(1000, 0.0)) is not None:
        assert chunk.items == list(chunk.indexes)
        found.update(dict.fromkeys(chunk.indexes, (chunk.losses, chunk.alone)))
    assert sorted(found) == [index for index in range(n) if index not in items.done]
    assert {index: lost for index, lost in found.items() if lost != (0, 0)} == known


# --- beside a lane -------------------------------------------------------------------------------------------------------


def test_what_must_be_alone_waits_beside_its_lane_and_holds_nobody_up():
    lane = Lane(ActorSpec())
    for name in "abc":
        lane.push(name, 0)
    (first,) = lane.take(1)
    lane.set_aside(first, is_new=True)
    assert (len(lane), lane.n_aside, lane.n_aside_of(is_new=True), lane.n_aside_of(is_new=False)) == (3, 1, 1, 0)
    assert list(lane.take(10)) == ["b", "c"]
    assert lane.heads() == ["a"]
    assert lane.has_queued(lambda _: True)
    assert lane.take_aside(is_new=True) == "a"
    assert (len(lane), lane.n_aside) == (0, 0)


def test_what_left_the_queue_by_another_way_is_not_kept_beside_it():
    lane = Lane(ActorSpec())
    lane.set_aside("a", is_new=False)
    assert not lane.has_queued(lambda _: False)
    assert len(lane) == 0
    for n in range(3000):
        lane.set_aside(str(n), is_new=False)
    for _ in range(3000):
        lane.dropped(lambda _: False)
    assert len(lane) == 0
