"""Messages that arrive before what they are about are kept, but neither for ever nor all of them."""

from __future__ import annotations

from koan_ray.engine import early
from koan_ray.engine.early import Early


def test_what_was_said_is_handed_out_once():
    kept = Early(30.0)
    kept.keep("e", "cancelled", now=0.0)
    kept.keep("e", "timeout", now=1.0)
    assert kept.take("e") == "cancelled"
    assert kept.take("e") is None


def test_what_is_older_than_the_limit_is_forgotten():
    kept = Early(30.0)
    kept.keep("old", "cancelled", now=0.0)
    kept.keep("young", "cancelled", now=20.0)
    kept.keep("new", "cancelled", now=31.0)
    assert [kept.take(about) for about in ("old", "young", "new")] == [None, "cancelled", "cancelled"]


def test_the_oldest_is_forgotten_when_there_are_too_many(monkeypatch):
    monkeypatch.setattr(early, "_MOST", 3)
    kept = Early(30.0)
    for n in range(5):
        kept.keep(n, "hurry", now=0.0)
    assert len(kept) == 3
    assert [n for n in range(5) if kept.take(n)] == [2, 3, 4]
