"""The corpus: every job, value and class that has done harm, each beside ordinary neighbours, in each mode."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
import types
from typing import Any

import pytest

import koan_ray as koan
from tests.hostile import bodies, shapes, values
from tests.hostile.bench import Harm, opened
from tests.hostile.describing import described

FAST = ("local", "persisted")
pytestmark = pytest.mark.filterwarnings("ignore")  # bodies of the local runtime do odd things to this very process


@pytest.fixture(scope="module", params=[*FAST, pytest.param("ray", marks=pytest.mark.ray)])
def bench(request, tmp_path_factory):
    if request.param.startswith("ray"):
        request.getfixturevalue("cluster")
    with opened(request.param, tmp_path_factory.mktemp("hostile")) as made:
        before = threading.active_count()
        yield made
        made.check_nothing_leaked(before)


@contextlib.contextmanager
def own_streams():
    """Bodies of the local runtime share this process: what they do to it is undone."""
    import sys

    cwd, out, environment = os.getcwd(), sys.stdout, dict(os.environ)
    try:
        yield
    finally:
        os.chdir(cwd)
        sys.stdout = out
        os.environ.clear()
        os.environ.update(environment)


def acts():
    for shape in ("plain", "process"):
        for act in bodies.PLAIN_ACTS + (bodies.PROCESS_ACTS if shape == "process" else []):
            if not (shape == "process" and act in bodies.NO_ENGINE):
                yield shape, act
    for act in bodies.ASYNC_ACTS:
        yield "async", act
    for act in bodies.ASYNC_ACTS[::4]:
        yield "together", act


RAY_SAMPLE = 5  # of the acts, on Ray: each costs a round trip or more, and the search tries all


def _for(bench: Any, all_of: list[Any]) -> list[Any]:
    return all_of[::RAY_SAMPLE] if bench.mode.startswith("ray") else all_of


@pytest.mark.timeout(900)
@pytest.mark.parametrize("shape", ["plain", "process", "async", "together"])
def test_no_body_harms_a_neighbour_and_each_has_an_outcome(bench, shape):
    harmed = []
    for _, act in _for(bench, [each for each in acts() if each[0] == shape]):
        if shape == "plain" and bench.mode in FAST and act in ("ignore signals", "fork returns", "close stdout"):
            continue  # would be done to this very process
        with own_streams():
            try:
                with bench.beside_neighbours():
                    outcome = bench.attempt(lambda: bodies.ACTORS_OF[shape].start(act))  # noqa: B023 - called at once
                if act in ("child", "thread waits", "to thread") and outcome.value != 4:
                    raise Harm(f"expected 4, got {outcome}")
            except Harm as harm:
                harmed.append(f"{act}: {harm}")
    assert not harmed, "\n".join(harmed)


@pytest.mark.timeout(600)
def test_whatever_a_retry_policy_answers_the_job_ends(bench):
    harmed = []
    answers = list(bodies.ANSWERS)
    tried = [(e, a, d) for e in ("value", "rude") for a in answers for d in ("none", "huge")]
    tried += [("value", "yes", delay) for delay in answers]
    for act in _for(bench, tried):
        try:
            with bench.beside_neighbours():
                outcome = bench.attempt(lambda: bodies.Judges.start(list(act)))  # noqa: B023 - called at once
            if outcome.how == "value":
                raise Harm(f"expected a failure, got {outcome}")
        except Harm as harm:
            harmed.append(f"{act}: {harm}")
    assert not harmed, "\n".join(harmed)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("shape", ["plain", "async", "process"])
@pytest.mark.parametrize("act", bodies.STOPPED_ACTS)
def test_a_body_that_is_cancelled_ends_whatever_it_makes_of_it(bench, shape, act):
    if act == "swallow cancel" and shape != "async":
        pytest.skip("only an async body gets CancelledError")
    with bench.beside_neighbours():
        outcome = bench.attempt(
            lambda: bodies.ACTORS_OF[shape].start(act),
            after=lambda job: (time.sleep(0.1), job.cancel("\udce9 \x1b[0m because").get(10)),
        )
    assert outcome.how in ("cancelled", "value"), str(outcome)


def _echo(name: str, declared: Any) -> Any:
    def execute(self, context, progress, cancellation):
        return context

    members = {"execute": execute, "__module__": __name__, "retry": koan.RetryPolicy(max_attempts=1), "kind": f"echo.{name}"}
    return types.new_class("Echo", (koan.Job[declared, declared],), {}, lambda body: body.update(members))


def _seen(name: str, declared: Any) -> Any:
    def execute(self, context, progress, cancellation):
        return described(context)

    members = {"execute": execute, "__module__": __name__, "retry": koan.RetryPolicy(max_attempts=1), "kind": f"seen.{name}"}
    return types.new_class("Seen", (koan.Job[declared, str],), {}, lambda body: body.update(members))


def check_value(bench: Any, name: str, declared: Any, make: Any) -> None:
    """The body sees exactly this value and who waits gets it back, or a refusal names where and what."""
    wanted = described(_safely(make))
    outcome = bench.attempt(lambda: _seen(name, declared).start(make()))
    if outcome.how == "value" and outcome.value != wanted:
        raise Harm(f"the body saw {outcome.value:.500}, given was {wanted:.500}")
    if outcome.how == "failed":
        raise Harm(f"accepted, and then {outcome}")
    outcome = bench.attempt(lambda: _echo(name, declared).start(make()))
    if outcome.how == "value":
        for where, got in (
            ("wait()", outcome.value),
            ("job.context", outcome.job.context),
            ("job.result", outcome.job.result),
        ):
            if described(got) != wanted:
                raise Harm(f"{where} gave {described(got):.500}, given was {wanted:.500}")


def _safely(make: Any) -> Any:
    value = make()
    return "generator" if hasattr(value, "send") else value


@pytest.mark.timeout(600)
def test_every_value_arrives_as_it_was_or_is_refused(bench):
    harmed = []
    for n, (name, declared, make) in enumerate(_for(bench, values.CORPUS)):
        try:
            with bench.beside_neighbours():
                check_value(bench, str(n), declared, make)
        except Harm as harm:
            harmed.append(f"{name}: {harm}")
        except Exception as error:  # what is not ours must not come out of a public call
            harmed.append(f"{name}: RAW {type(error).__name__}: {error!s:.300}")
    assert not harmed, "\n".join(harmed)


WHAT_IS_SAID = [
    functools.partial(lambda text, run: run.named(text), text)
    for text in ("caf\udce9", 5, None, "", "x" * 10_000, "\x1b[31m", b"bytes", ValueError("n"))
] + [
    lambda run: run.named("n", 5),
    lambda run: run.named("n", "\udce9" * 10),
    lambda run: run.with_correlation("\udce9\x00"),
    lambda run: run.with_correlation(5),
    lambda run: run.delayed(10**400),
    lambda run: run.delayed(float("nan")),
    lambda run: run.delayed(-1),
    lambda run: run.delayed("soon"),
    lambda run: run.with_metadata(path="caf\udce9"),
    lambda run: run.with_metadata(n=2**70),
    lambda run: run.with_metadata(n=float("nan")),
    lambda run: run.with_metadata(x=object()),
    lambda run: run.with_metadata({1: 2}),
    lambda run: run.with_metadata({"a.b": 1}),
    lambda run: run.with_metadata({"$x": 1}),
    lambda run: run.with_metadata({"": 1}),
    lambda run: run.with_metadata({"\udce9": 1}),
    lambda run: run.with_metadata(x=values._deep(200)),
    lambda run: run.with_metadata(x=values._itself()),
    lambda run: run.with_metadata(5),
    lambda run: run.persist(5),
    lambda run: run.persist("\udce9"),
    lambda run: run.persist("nowhere"),
    lambda run: run.child_of(5),
    lambda run: run.audit("yes"),
]


def test_whatever_a_submission_says_of_its_job_it_ends_or_is_refused(bench):
    harmed = []
    for n, say in enumerate(WHAT_IS_SAID):
        try:
            with bench.beside_neighbours():
                bench.attempt(lambda: say(bodies.Leaf.start(4)))  # noqa: B023 - called at once
        except Harm as harm:
            harmed.append(f"{n}: {harm}")
        except Exception as error:
            harmed.append(f"{n}: RAW {type(error).__name__}: {error!s:.300}")
    assert not harmed, "\n".join(harmed)


@pytest.mark.timeout(300)
def test_a_class_of_any_shape_works_or_is_refused(bench):
    harmed = []
    for name in _for(bench, list(shapes.SHAPES)):
        try:
            with bench.beside_neighbours():
                outcome = bench.attempt(lambda: shapes.SHAPES[name]().start([7] if name.startswith("generic") else 7))  # noqa: B023
            if (wanted := shapes.EXPECTED.get(name)) is not None and outcome.value != wanted:
                raise Harm(f"expected {wanted}, got {outcome}")
        except Harm as harm:
            harmed.append(f"{name}: {harm}")
        except Exception as error:
            if name not in ("init_subclass_raises", "getattribute_raises"):  # the user's own error at the user's own place
                harmed.append(f"{name}: RAW {type(error).__name__}: {error!s:.300}")
    assert not harmed, "\n".join(harmed)
