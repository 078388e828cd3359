"""A session answers each call and loses no place, whatever users' classes, callbacks and interrupts do."""

from __future__ import annotations

import abc
import random
import signal
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import pytest
from pydantic import BaseModel, field_validator

import koan_ray as koan
from koan_ray import ambient, threads
from koan_ray.domain.records import End
from koan_ray.domain.status import JobStatus
from koan_ray.engine import session as sessions
from koan_ray.engine.messages import Accepted, Ends
from koan_ray.engine.session import Session
from koan_ray.errors import ConflictError, JobDefinitionError, LimitExceededError, RuntimeUnavailableError


class Wire:
    """A transport that keeps calls until the test answers them."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple, object]] = []
        self.came = threading.Condition()
        self.on_call = self.on_call_taken = lambda method: None

    def coordinator(self, method, args, done):
        self.on_call(method)
        with self.came:
            self.calls.append((method, args, done))
            self.came.notify_all()
        self.on_call_taken(method)

    broker = coordinator

    def take(self, method, within=5.0):
        """Return the oldest call of this method, waiting for it."""
        with self.came:
            assert self.came.wait_for(lambda: any(call[0] == method for call in self.calls), within), self.calls
            call = next(call for call in self.calls if call[0] == method)
            self.calls.remove(call)
            return call[1], call[2]

    def accept(self, refused=None):
        (submission, _watcher), done = self.take("submit")
        done(Accepted("e", 1.0, refused or {}, []), None)
        return [row[0] for row in submission.rows]

    def end(self, *job_ids, result=b"1", unknown=()):
        _, done = self.take("wait")
        done(Ends("e", [ended(job_id, result) for job_id in job_ids], list(unknown)), None)


def ended(job_id, result=b"1"):
    return End(job_id, "completed", "succeeded", result, None, 1.0, 1.0, 2.0, 2.0, 1, None, None)


@pytest.fixture
def wire():
    return Wire()


@pytest.fixture
def session(wire):
    made = Session(wire, inline_limit=1000, ship=lambda job_type: (f"{id(job_type)}", b""), trace=lambda: (None, None))
    ambient.set_engine(made)
    yield made
    ambient.set_engine(None)
    made.close("the test is over")


class Plain(koan.Job[int, int]):
    def execute(self, context, progress, cancellation) -> int:
        return context


def still_works(wire, job_type=Plain):
    """Submit more often than there are places, one after the other."""
    for n in range(5):
        pending = job_type.start(n).run()
        job_id = wire.accept()[0]
        assert pending.get(timeout=5).id == job_id


# --- classes -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frozen(koan.Job[int, int]):
    def execute(self, context, progress, cancellation) -> int:
        return context


class Guarded(koan.Job[int, int]):
    def __setattr__(self, name, value):
        raise TypeError(f"{name} is not for you")

    def execute(self, context, progress, cancellation) -> int:
        return context


class Slotted(koan.Job[int, int]):
    __slots__ = ("own",)

    def execute(self, context, progress, cancellation) -> int:
        return context


class WithoutAnEnd(koan.Job[int, int]):
    def __eq__(self, other):
        raise RecursionError("compared")

    def __hash__(self):
        raise RecursionError("hashed")

    def __init__(self):
        raise RuntimeError("not to be called")

    def execute(self, context, progress, cancellation) -> int:
        return context


class Meta(type(koan.Job)):
    def __call__(cls, *args, **kwargs):
        raise RuntimeError("a singleton")


class Odd(koan.Job[int, int], metaclass=Meta):
    def execute(self, context, progress, cancellation) -> int:
        return context


class ADict(koan.Job[int, int], dict):
    def execute(self, context, progress, cancellation) -> int:
        return context


@pytest.mark.parametrize("job_type", [Frozen, Guarded, Slotted, WithoutAnEnd, Odd, ADict])
def test_a_class_may_guard_its_instances_as_it_likes(session, wire, job_type):
    still_works(wire, job_type)
    pending = job_type.start(1).run()
    job_id = wire.accept()[0]
    waiting = pending.get(timeout=5).wait()
    wire.end(job_id)
    assert waiting.get(timeout=5) == 1
    assert pending.get().status == JobStatus.COMPLETED
    many = job_type.start_many([1, 2]).run()
    assert len(wire.accept()) == 2
    assert [job.status for job in many.get(timeout=5)] == ["queued"] * 2


class Abstract(koan.Job[int, int], abc.ABC):
    @abc.abstractmethod
    def amount(self): ...

    def execute(self, context, progress, cancellation) -> int:
        return context


def test_a_class_without_instances_is_refused_with_what_it_lacks_and_takes_no_place(session, wire):
    for _ in range(5):
        with pytest.raises(JobDefinitionError, match=r"Abstract is abstract \(amount not defined\)"):
            Abstract.start(1).run().get(timeout=5)
        with pytest.raises(JobDefinitionError, match="amount"):
            Abstract.start_many([1]).run().get(timeout=5)
    assert wire.calls == []
    still_works(wire)


def test_what_goes_wrong_with_one_job_in_hand_is_told_to_its_own_submitter_alone(session, wire, monkeypatch):
    blocked = [Plain.start(0).run() for _ in range(2)]  # all places are taken: the next go together
    bad, good = Frozen.start(1).run(), Plain.start(2).run()
    monkeypatch.setattr(Frozen, "_in_hand", lambda view: 1 / 0)
    for _ in range(2):
        wire.accept()
    wire.accept()
    for pending in (*blocked, good):
        assert pending.get(timeout=5).kind == "Plain"
    with pytest.raises(ZeroDivisionError):
        bad.get(timeout=5)
    still_works(wire)


def test_a_list_with_a_job_of_a_class_without_instances_shows_it_all_the_same(session, wire):
    pending = Plain.start(1).run()
    wire.accept()
    view = pending.get(timeout=5)._view
    listed = koan.Jobs.query()
    _, done = wire.take("query")
    done(([view, view._replace(kind="Abstract", context=b"7")], None), None)
    plain, abstract = listed.get(timeout=5)
    assert (plain.context, abstract.kind, abstract.context) == (1, "Abstract", 7)


# --- transports ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("cannot be pickled"), RuntimeError("no thread can be started")])
def test_a_transport_that_refuses_a_call_takes_no_place(session, wire, error):
    def refuse(method):
        raise error

    wire.on_call = refuse
    for _ in range(5):
        with pytest.raises(type(error)):
            Plain.start(1).run().get(timeout=5)
        with pytest.raises(type(error)):
            Plain.start_many([1, 2]).run().get(timeout=5)
    wire.on_call = lambda method: None
    still_works(wire)
    pending = Plain.start(1).run()
    wire.accept()
    job = pending.get(timeout=5)
    wire.on_call = refuse
    for _ in range(5):
        with pytest.raises(type(error)):
            job.wait().get(timeout=5)
    wire.on_call = lambda method: None
    waiting = job.wait()
    wire.end(job.id)
    assert waiting.get(timeout=5) == 1


def test_an_answer_that_makes_no_sense_fails_its_own_call_and_no_other(session, wire):
    for method, ask in {
        "get": lambda: koan.Jobs.get(koan.Jobs and "0" * 8 + "-0000-7000-8000-" + "0" * 12),
        "query": koan.Jobs.query,
        "status": session.status,
    }.items():
        pending = ask()
        _, done = wire.take(method)
        done(object() if method != "status" else {}, None)
        if method == "status":
            assert pending.get(timeout=5) == {}
        else:
            with pytest.raises((TypeError, AttributeError)):
                pending.get(timeout=5)
    for _ in range(5):
        pending = Plain.start(1).run()
        _, done = wire.take("submit")
        done(Accepted("e", 1.0, None, []), None)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            pending.get(timeout=5)
        for answer in (object(), Accepted("e", 1.0, {}, ["terms that nobody has"])):
            pending = Plain.start(1).run()
            _, done = wire.take("submit")
            done(answer, None)
            with pytest.raises((AttributeError, KeyError)):
                pending.get(timeout=5)
    still_works(wire)


# --- those who wait ------------------------------------------------------------------------------------------------------


class Picky(BaseModel):
    n: int

    @field_validator("n")
    @classmethod
    def look(cls, n):
        LOOKED.append(threading.current_thread())
        if n < 0:
            raise SystemExit(n)
        return n


LOOKED: list[threading.Thread] = []


class Validates(koan.Job[int, Picky]):
    def execute(self, context, progress, cancellation) -> Picky:
        return Picky(n=context)


def test_validators_of_a_result_run_once_where_it_is_looked_at(session, wire):
    pending = Validates.start(1).run()
    job_id = wire.accept()[0]
    waiting = pending.get(timeout=5).wait()
    LOOKED.clear()
    bringing = threading.Thread(target=wire.end, args=(job_id,), kwargs={"result": b'{"n": 3}'})
    bringing.start()
    bringing.join(5)
    assert waiting.done
    assert not LOOKED
    assert waiting.get(timeout=5) is waiting.get()
    assert [threading.current_thread()] == LOOKED


def test_one_waiter_whose_validators_leave_the_program_does_not_keep_the_others_waiting(session, wire):
    first, second = Validates.start(1).run(), Validates.start(2).run()
    ids = wire.accept() + wire.accept()
    bad, good = first.get(timeout=5).wait(), second.get(timeout=5).wait()
    _, done = wire.take("wait")
    done(Ends("e", [ended(ids[0], b'{"n": -1}'), ended(ids[1], b'{"n": 2}')], []), None)
    assert good.get(timeout=5).n == 2
    with pytest.raises(SystemExit):
        bad.get(timeout=5)


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_a_done_callback_may_raise_block_and_use_the_engine(session, wire, error, caplog):
    pending = Plain.start(1).run()
    blocked, leave, called = threading.Event(), threading.Event(), []

    def block():
        blocked.set()
        leave.wait(10)

    def use():
        called.append(Plain.start(2).run().get(timeout=5).id)

    def fail():
        raise error

    for callback in (fail, block, use, lambda: called.append("last")):
        pending.add_done_callback(callback)
    wire.accept()  # returns although a callback blocks
    assert pending.get(timeout=5)
    assert blocked.wait(5)
    accepted = wire.accept()
    until = time.monotonic() + 5
    while len(called) < 2 and time.monotonic() < until:
        threading.Event().wait(0.01)
    assert set(called) == {*accepted, "last"}
    leave.set()
    threads.handlers.finish(5)
    assert "done_callback_failed" in caplog.text
    pending.add_done_callback(lambda: called.append(threading.current_thread()))
    assert called[-1] is threading.current_thread()
    still_works(wire)


# --- time ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("endless", [timedelta.max, 1e300, 1e10, threading.TIMEOUT_MAX + 1])
def test_a_wait_may_be_bounded_by_more_than_a_clock_can_hold_and_later_ones_time_out(session, wire, endless):
    pending = Plain.start(1).run()
    wire.accept()
    job = pending.get(timeout=endless)
    patient, brief = job.wait(endless), job.wait(0.05)
    with pytest.raises(TimeoutError):
        brief.get(timeout=5)
    with pytest.raises(TimeoutError):
        job.wait(0).get(timeout=5)
    with pytest.raises(TimeoutError):
        patient.get(timeout=0)
    got = []
    reader = threading.Thread(target=lambda: got.append(patient.get(timeout=endless)))
    reader.start()
    wire.end(job.id)
    reader.join(5)
    assert got == [1]


# --- interrupts ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def answered(wire):
    """All calls are answered as a coordinator would."""
    threading.Thread(target=answer_all, args=(wire,), daemon=True).start()
    yield
    with wire.came:
        wire.calls.append(("stop", (), None))


def runs(n):
    """Run a job, another thread's as well as one of the main thread."""
    for _ in range(2):
        assert Plain.start(n).run().get(timeout=5).wait().get(timeout=5) == 1


@pytest.mark.parametrize("when", ["on_call", "on_call_taken"])
@pytest.mark.parametrize("method", ["submit", "wait"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interrupts_in_the_middle_of_a_call_are_raised_and_what_they_left_undone_is_done(
    session, wire, answered, error, method, when
):
    def interrupt(called):
        if called == method and threading.current_thread() is threading.main_thread():
            raise error

    for n in range(5):
        setattr(wire, when, interrupt)
        with pytest.raises(error):
            Plain.start(n).run().get(timeout=5).wait().get(timeout=5)
        setattr(wire, when, lambda called: None)
        other = threading.Thread(target=runs, args=(n,))
        other.start()
        other.join(10)
        assert not other.is_alive()
    runs(5)


@pytest.mark.parametrize("n_interrupts", [1, 2])
def test_interrupts_at_any_moment_of_submitting_and_waiting_lose_no_place(session, answered, n_interrupts):
    chance, n_hit = random.Random(n_interrupts), 0
    for _ in range(200):
        n_hit += is_interrupted(
            lambda: Plain.start(1).run().get(timeout=10).wait().get(timeout=10), n_interrupts, chance.random() * 0.0004
        )
    assert n_hit > 50
    for n in range(5):
        assert Plain.start(n).run().get(timeout=10).wait().get(timeout=10) == 1
    assert [job.wait().get(timeout=10) for job in Plain.start_many([1, 2]).run().get(timeout=10)] == [1, 1]


def is_interrupted(work, n, after_s):
    """Raise KeyboardInterrupt in the main thread as Ctrl-C does, ``n`` times in a row; tell whether it came in time."""

    def raise_it(number, frame):
        raise KeyboardInterrupt

    def send():
        until = time.perf_counter() + after_s
        while time.perf_counter() < until:
            pass
        for _ in range(n):
            if not over:
                signal.pthread_kill(main, signal.SIGUSR1)

    over, main, is_hit = [], threading.main_thread().ident, False
    before = signal.signal(signal.SIGUSR1, raise_it)
    sender = threading.Thread(target=send)
    try:
        try:
            sender.start()
            work()
        finally:
            over.append(True)
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    except KeyboardInterrupt:
        is_hit = True
    finally:
        over.append(True)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        sender.join()
        signal.signal(signal.SIGUSR1, before)
    return is_hit


def answer_all(wire):
    """Accept and complete every job, as a coordinator would."""
    ended_ids, parked = {}, []
    while True:
        with wire.came:
            wire.came.wait_for(lambda: wire.calls, 1)
            calls, wire.calls = wire.calls, []
        for method, args, done in calls:
            if method == "stop":
                return
            if method == "submit":
                for row in args[0].rows:
                    ended_ids[row[0]] = ended(row[0])
                done(Accepted("e", 1.0, {}, []), None)
            elif method == "wait":
                for other in parked:
                    other(Ends("e", [], []), None)
                parked.clear()
                known = [ended_ids[job_id] for job_id in args[2] if job_id in ended_ids]
                if known:
                    done(Ends("e", known, []), None)
                else:
                    parked.append(done)
            else:
                done(None, ConflictError(method))


# --- the end -------------------------------------------------------------------------------------------------------------


def test_closing_answers_everything_that_is_under_way_and_refuses_what_comes(session, wire):
    pending = Plain.start(1).run()
    wire.accept()
    job = pending.get(timeout=5)
    begun, leave = threading.Event(), threading.Event()

    def never():
        yield 1
        begun.set()
        leave.wait(20)
        yield 2

    many = Plain.start_many(never()).run()
    assert begun.wait(5)
    under_way = [
        *(Plain.start(n).run() for n in range(5)), job.wait(), job.wait(60), many,
        session.checkpoint("j", "x", (), ()),
    ]  # fmt: skip
    _, done = wire.take("checkpoint")
    done(None, RuntimeUnavailableError("for a while"))  # it is made again later
    stream = job.progress_stream().blocking()
    reading = []

    def read():
        with pytest.raises(RuntimeUnavailableError):
            next(stream)
        reading.append("ended")

    reader = threading.Thread(target=read)
    reader.start()
    wire.take("get")
    session.close("over")
    for pending in under_way:
        with pytest.raises(RuntimeUnavailableError):
            pending.get(timeout=5)
    reader.join(5)
    assert reading
    leave.set()
    for ask in (lambda: Plain.start(1).run(), job.wait, lambda: Plain.start_many([1]).run(), koan.Jobs.count):
        with pytest.raises(RuntimeUnavailableError):
            ask().get(timeout=5)
    with pytest.raises(RuntimeUnavailableError):
        job.on_progress(print)


def test_a_finalizer_or_a_signal_handler_may_use_the_engine_in_the_middle_of_a_call(session, wire):
    """It runs in the same thread, between any two steps of the call, and with its locks held."""
    nested = []

    def in_the_middle():
        nested.append(Plain.start(2).run())

    with session._lock:
        in_the_middle()
    pending = Plain.start(1).run()
    ids = wire.accept() + wire.accept()
    assert {p.get(timeout=5).id for p in (*nested, pending)} == set(ids)


def test_waiting_where_answers_arrive_is_refused_and_does_not_hang(session, wire):
    pending = Plain.start(1).run()
    threads.answering.now = True
    try:
        with pytest.raises(RuntimeUnavailableError, match="would never end"):
            pending.get(timeout=5)
    finally:
        threads.answering.now = False


# --- watching ------------------------------------------------------------------------------------------------------------


def test_the_poller_survives_what_its_watchers_and_its_transport_do(session, wire):
    pending = Plain.start(1).run()
    wire.accept()
    job = pending.get(timeout=5)

    def fail(update):
        raise SystemExit

    seen = []
    session.watch(job, fail)
    session.watch(job, seen.append)
    for _ in range(2):
        _, done = wire.take("get")
        done(job._view._replace(status="running"), None)
    for n in range(1, 4):
        from koan_ray.domain.records import Progress
        from koan_ray.engine.broker import States

        _, done = wire.take("poll")
        done(States("b", [(job.id, Progress(n, n / 10))]), None)
    assert [update.sequence for update in seen] == [0, 1, 2, 3]
    _, done = wire.take("poll")

    def refuse(method):
        if method == "poll":
            raise OSError("no socket")

    wire.on_call = refuse
    done(States("b", []), None)  # the next poll is refused, and made again
    wire.on_call = lambda method: None
    _, done = wire.take("poll")
    done(None, LimitExceededError("watchers", 2, 1, "fewer"))
    assert isinstance(seen[-1], LimitExceededError)


# --- introducing classes -------------------------------------------------------------------------------------------------


def test_classes_are_introduced_again_when_there_was_no_coordinator_and_after_an_interrupt(session, wire, monkeypatch):
    monkeypatch.setattr(sessions, "_GATHER_KINDS_S", 0.01)
    monkeypatch.setattr(sessions, "_INTRODUCE_AGAIN_S", 0.01)
    session.introduce_kinds()
    _, done = wire.take("introduce")
    done(None, RuntimeUnavailableError("none yet"))
    (terms, _), done = wire.take("introduce")
    assert "Plain" in [each.kind for each in terms]
    done("e", None)
    add = session._timeouts.add

    def interrupt(delay_s, action):
        raise KeyboardInterrupt

    monkeypatch.setattr(session._timeouts, "add", interrupt)
    with pytest.raises(KeyboardInterrupt):
        session._introduce(Frozen)
    monkeypatch.setattr(session._timeouts, "add", add)
    session._introduce(Guarded)
    (terms, _), _ = wire.take("introduce")
    assert {each.kind for each in terms} == {"Frozen", "Guarded"}
