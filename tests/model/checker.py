"""Visits every state of a small model, breadth first, and returns the shortest way to one that breaks a promise.

A model is a `Model`; its states are hashable. Breadth first, because a counter-example is read by people: no shorter one
exists. Symmetry is the model's part: states that differ in names only should be equal, so it sorts what has no order.

Two kinds of promise are checked. *Safety*: ``broken`` names the promise that a step breaks. *Progress*: from every state
some way without further faults leads to a good state; a state without one is a job that nobody will ever finish.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable


class Step(NamedTuple):
    """One thing that may happen next."""

    says: str
    after: Hashable
    is_fault: bool = False


class Model(Protocol):
    """What the checker asks of a model."""

    def initial(self) -> Hashable: ...

    def steps(self, state) -> Iterable[Step]: ...

    def broken(self, before, after) -> str | None:
        """Return the promise that this step breaks, if any."""

    def is_good(self, state) -> bool:
        """Tell whether everything is done here."""


class Verdict(NamedTuple):
    """What came of a search: ``broken`` is None where every state keeps every promise."""

    n_states: int
    broken: str | None = None
    trace: tuple[str, ...] = ()
    end: Hashable = None

    def __str__(self) -> str:
        if self.broken is None:
            return f"{self.n_states} states, all promises kept"
        lines = [f"{place:3}. {says}" for place, says in enumerate(self.trace, 1)]
        return "\n".join([f"BROKEN {self.broken}", *lines, f"  => {self.end}"])


NO_PROGRESS = "I7: no way without further faults leads to the end of the job"


class Search:
    """One search through the states of one model."""

    def __init__(self, model: Model, limit: int) -> None:
        self._model, self._limit = model, limit
        self._states = [model.initial()]
        self._number = {self._states[0]: 0}
        self._parent, self._says = array("l", [-1]), ["start"]
        self._from, self._to = array("l"), array("l")  # steps that are not faults

    def run(self) -> Verdict:
        """Visit everything, or stop at the first broken promise."""
        model, number, states = self._model, self._number, self._states
        steps, broken = model.steps, model.broken
        here = 0
        while here < len(states):  # grows while we walk
            before = states[here]
            for says, after, is_fault in steps(before):
                there = number.get(after)
                if there is None:
                    there = number[after] = len(states)
                    states.append(after)
                    self._parent.append(here)
                    self._says.append(says)
                    if there > self._limit:
                        raise RuntimeError(f"more than {self._limit} states; bound the configuration further")
                if (promise := broken(before, after)) is not None:
                    return self._verdict(promise, here, says, after)
                if not is_fault:
                    self._from.append(here)
                    self._to.append(there)
            here += 1
        stuck = self._first_stuck()
        return Verdict(len(states)) if stuck is None else self._verdict(NO_PROGRESS, stuck, "… and stays so", states[stuck])

    def _first_stuck(self) -> int | None:
        """Walk back from the good states; who is not met cannot reach one."""
        back: list[list[int]] = [[] for _ in self._states]
        for here, there in zip(self._from, self._to, strict=True):
            back[there].append(here)
        todo = [place for place, state in enumerate(self._states) if self._model.is_good(state)]
        can = bytearray(len(self._states))
        for place in todo:
            can[place] = 1
        while todo:
            for place in back[todo.pop()]:
                if not can[place]:
                    can[place] = 1
                    todo.append(place)
        place = can.find(0)
        return None if place < 0 else place

    def _verdict(self, promise: str, here: int, says: str, end: Hashable) -> Verdict:
        trace = [says]
        while here > 0:
            trace.append(self._says[here])
            here = self._parent[here]
        return Verdict(len(self._states), promise, tuple(reversed(trace)), end)


def search(model: Model, limit: int = 400_000) -> Verdict:
    """Visit all states of ``model``; the shortest counter-example, or the number of states that hold."""
    return Search(model, limit).run()
