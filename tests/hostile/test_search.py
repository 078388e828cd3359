"""The search: jobs, values, answers and stops drawn by Hypothesis, several at once, until the time is over.

``make hostile`` runs it; ``KOAN_RAY_HOSTILE_S`` says for how long, ``KOAN_RAY_HOSTILE_SEED`` with which seed (printed, and
chosen by chance if it is not given), ``KOAN_RAY_HOSTILE_MODES`` in which modes. Each round has an engine of its own, so that
what one has broken does not hide what the next would find; its seed is printed and repeats it.
"""

from __future__ import annotations

import os
import random
import threading
import time
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, given, note, seed, settings
from hypothesis import strategies as st

from tests.hostile import bodies, values
from tests.hostile.bench import MODES, Harm, opened
from tests.hostile.test_corpus import check_value, own_streams

SECONDS = float(os.environ.get("KOAN_RAY_HOSTILE_S", "0"))
SEED = int(os.environ.get("KOAN_RAY_HOSTILE_SEED", "0")) or random.SystemRandom().randrange(1, 10**9)
SEARCHED = os.environ.get("KOAN_RAY_HOSTILE_MODES", "local,persisted,ray,raypersisted").split(",")
EXAMPLES = 40  # of one round: those of one engine
HERE = ("ignore signals", "fork returns", "close stdout")  # would be done to the process of the tests

pytestmark = [
    pytest.mark.search,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not SECONDS, reason="make hostile runs it"),
]


class Act(NamedTuple):
    """One hostile job: which body does what, and when it is stopped, if it is."""

    shape: str
    act: Any
    cancel_after_s: float | None = None


def _acts_of(shape: str) -> list[str]:
    plain = [*bodies.PLAIN_ACTS, *bodies.STOPPED_ACTS[:2]]
    if shape in ("async", "together"):
        return [*bodies.ASYNC_ACTS, *plain, "swallow cancel"]
    if shape == "plain":
        return plain
    left_out = bodies.NO_ENGINE
    more = bodies.PROCESS_ACTS if shape == "process" else bodies.ASYNC_ACTS[:12]
    return [act for act in (*plain, *more) if act not in left_out]


@st.composite
def acts(draw: Any, in_this_process: bool) -> Act:  # noqa: FBT001 - a strategy
    cancel = draw(st.none() | st.none() | st.floats(0.0, 0.5))
    if draw(st.integers(0, 5)) == 0:
        answers = st.sampled_from(list(bodies.ANSWERS))
        return Act("judges", [draw(st.sampled_from(list(bodies.ERRORS))), draw(answers), draw(answers)], cancel)
    shape = draw(st.sampled_from(list(bodies.ACTORS_OF)))
    found = [act for act in _acts_of(shape) if not (in_this_process and "process" not in shape and act in HERE)]
    return Act(shape, draw(st.sampled_from(found)), cancel)


def _start(bench: Any, act: Act) -> Any:
    job_type = bodies.Judges if act.shape == "judges" else bodies.ACTORS_OF[act.shape]
    return bench.run_of(job_type.start(act.act)).run()


def _together(bench: Any, drawn: list[Act]) -> None:
    """Run hostile jobs at once beside neighbours; each has an outcome."""
    with own_streams(), bench.beside_neighbours():
        began = time.monotonic()
        started = [(act, _start(bench, act)) for act in drawn]
        jobs = [(act, pending.get(bench.within)) for act, pending in started]
        stopped = sorted((act.cancel_after_s, n) for n, (act, _) in enumerate(jobs) if act.cancel_after_s is not None)
        for after_s, n in stopped:
            time.sleep(max(0.0, began + after_s - time.monotonic()))
            jobs[n][1].cancel("by the search").get(bench.within)
        for act, job in jobs:
            try:
                bench.outcome_of(job)
            except Harm as harm:
                raise Harm(f"{act}: {harm}") from harm


def _round(mode: str, number: int, folder: Any, until: float) -> int:
    """Search with one engine; returns how many hostile jobs were run."""
    n = 0
    with opened(mode, folder) as bench:
        before = threading.active_count()
        lists = st.lists(acts(not mode.startswith("ray")), min_size=1, max_size=5)

        @seed(number)
        @settings(
            max_examples=EXAMPLES, deadline=None, database=None, phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck), print_blob=False,
        )  # fmt: skip
        @given(drawn=lists, value=values.typed())
        def search(drawn: list[Act], value: tuple[Any, Any]) -> None:
            nonlocal n
            if time.monotonic() > until:
                return
            note(f"mode {mode}, round {number}: {drawn} beside a value of {value[0]!r}: {value[1]!r:.300}")
            _together(bench, drawn)
            declared, given_value = value
            check_value(bench, f"{number}-{n}", declared, lambda: given_value)
            n += len(drawn) + 2

        search()
        bench.check_nothing_leaked(before)
    return n


@pytest.mark.timeout(0)
def test_nothing_is_found(tmp_path, capsys):
    until, number, counts = time.monotonic() + SECONDS, SEED, dict.fromkeys(SEARCHED, 0)
    assert set(SEARCHED) <= set(MODES)
    while time.monotonic() < until:
        mode = SEARCHED[(number - SEED) % len(SEARCHED)]
        folder = tmp_path / str(number)
        folder.mkdir()
        with capsys.disabled():
            print(f"\nhostile: mode {mode}, seed {number}", flush=True)
        counts[mode] += _round(mode, number, folder, until)
        number += 1
    with capsys.disabled():
        print(
            f"\nhostile: seed {SEED}, {number - SEED} rounds in {SECONDS:g} s, hostile jobs by mode: {counts}; nothing found"
        )
