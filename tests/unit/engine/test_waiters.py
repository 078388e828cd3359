"""Ends that are remembered for whoever asks next."""

from __future__ import annotations

from koan_ray.domain.records import End
from koan_ray.engine import waiters
from koan_ray.engine.waiters import RecentEnds


def end(name: str, size: int = 0) -> End:
    return End(name, "completed", result=b"x" * size)


def test_the_oldest_go_when_there_are_too_many(monkeypatch):
    monkeypatch.setattr(waiters, "_MAX_RECENT", 2)
    recent = RecentEnds()
    for name in "abc":
        recent.add(end(name))
    assert [recent.get(name) is not None for name in "abc"] == [False, True, True]


def test_the_oldest_go_when_results_are_too_large(monkeypatch):
    monkeypatch.setattr(waiters, "_MAX_RECENT_BYTES", 10)
    recent = RecentEnds()
    for name in "abc":
        recent.add(end(name, size=4))
    assert [recent.get(name) is not None for name in "abc"] == [False, True, True]
    recent.add(end("whale", size=11))
    assert recent.get("whale") is None
    recent.add(end("d", size=10))
    assert recent.get("d") is not None


def test_what_was_removed_is_forgotten_and_makes_room(monkeypatch):
    monkeypatch.setattr(waiters, "_MAX_RECENT_BYTES", 10)
    recent = RecentEnds()
    recent.add(end("a", size=8))
    recent.forget("a")
    recent.forget("never there")
    assert recent.get("a") is None
    recent.add(end("b", size=8))
    assert recent.get("b") is not None
