"""The right to write a shard's documents, and when it may be taken from a holder that has gone silent.

A shard is a slice of one source's jobs, named ``koan/number`` whatever namespace of Ray an engine runs in: all engines that
use a source contend for it. Its lease document says who holds it, with a `term` that
grows with each change of holder and a `beat` that grows while the holder lives. Nobody compares wall clocks: an observer
watches the beat by its own monotonic clock.
"""

from __future__ import annotations

from typing import Final, NamedTuple

SLOTS: Final = 256  # jobs are spread over so many slots by the last byte of their id; a shard is a set of slots
MAX_SHARDS: Final = 64  # of one source
LAPSES_AFTER: Final = 1.5  # times ttl of a beat that stood still, seen in successful reads, until an observer takes over
STANDS_DOWN_AFTER: Final = 0.8  # times ttl without an acknowledged beat until a holder starts and acknowledges nothing more
BEATS_PER_TTL: Final = 3.0
LOOKS_EVERY: Final = 0.8  # times ttl between two reads at most; what stood still for longer may have been the store


class Lease(NamedTuple):
    """A lease document as stored."""

    shard: str  # its name, as in ``koan/0``
    holder: str  # unique for each start of a coordinator
    term: int  # from 1; one higher with each change of holder
    beat: int  # grows while the holder lives


class Observation:
    """What an observer has seen of somebody else's lease: it lapses when its beat stood still for 1.5 ttl.

    Only successful reads count, one soon after the other: a store that does not answer, or answers after long, says nothing
    about the holder, whose beat may be the next thing it gets to. Either starts the observation afresh.
    """

    __slots__ = ("_last", "_seen", "_since", "_ttl_s")

    def __init__(self, ttl_s: float) -> None:
        self._ttl_s = ttl_s
        self._seen: Lease | None = None
        self._since = 0.0
        self._last = 0.0

    def read(self, lease: Lease, at: float) -> bool:
        """Take in a successful read at monotonic time ``at``; true if the lease may be taken now."""
        is_gap = at - self._last > LOOKS_EVERY * self._ttl_s
        self._last = at
        if is_gap or lease != self._seen:
            self._seen, self._since = lease, at
            return False
        return at - self._since >= LAPSES_AFTER * self._ttl_s

    def failed(self) -> None:
        """A read failed: forget what was seen."""
        self._seen = None


def shard_name(number: int) -> str:
    """Return the name of a shard, which is also that of its lease."""
    return f"koan/{number}"


def slot_of(job_id: str) -> int:
    """Return the slot of a job, from 0 to 255: the last byte of its id."""
    return int(job_id[-2:], 16)


def shard_of(job_id: str, n_shards: int) -> int:
    """Return the number of the shard that a job belongs to."""
    return slot_of(job_id) % n_shards


def slots_of(shard: int, n_shards: int) -> list[int]:
    """Return the slots of a shard."""
    return list(range(shard, SLOTS, n_shards))
