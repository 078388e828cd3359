"""The engine in this process goes on, or ends in time, whatever interrupts, handlers, finalizers and threads do to it."""

from __future__ import annotations

import asyncio
import gc
import random
import signal
import subprocess
import sys
import threading
import time

import pytest

import koan_ray as koan
from koan_ray import client
from koan_ray.errors import RuntimeUnavailableError


class Doubles(koan.Job[int, int]):
    def execute(self, context, progress, cancellation) -> int:
        progress.report(0.5, "half")
        return 2 * context


class Sleeps(koan.Job[float, str]):
    def execute(self, context, progress, cancellation) -> str:
        progress.report(0.5, "asleep")
        STARTED.set()
        LEAVE.wait(context)
        return "awake"


STARTED, LEAVE = threading.Event(), threading.Event()


@pytest.fixture(autouse=True)
def rested():
    STARTED.clear()
    LEAVE.clear()
    yield
    LEAVE.set()


def runs(n=1):
    assert Doubles.start(n).run().get(timeout=10).wait().get(timeout=10) == 2 * n


# --- interrupts ----------------------------------------------------------------------------------------------------------


def interrupted(work, after_s, n=1):
    """Do some work in the main thread, and raise KeyboardInterrupt in it as Ctrl-C does; tell whether it came in time."""

    def raise_it(number, frame):
        raise KeyboardInterrupt

    def send():
        until = time.perf_counter() + after_s
        while time.perf_counter() < until:
            pass
        for _ in range(n):
            if not over:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

    over, is_hit = [], False
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


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    "work",
    [
        runs,
        lambda: Doubles.start_many(range(50)).run().get(timeout=10)[-1].wait().get(timeout=10),
        lambda: list(Doubles.start(1).run().get(timeout=10).progress_stream().blocking()),
        lambda: [koan.Jobs.count().get(timeout=10), koan.Jobs.query().get(timeout=10)],
    ],
    ids=["run and wait", "start_many", "stream", "query"],
)
def test_interrupts_at_any_moment_leave_the_engine_working(local_engine, work, n):
    chance, n_hit = random.Random(n), 0
    for _ in range(60):
        n_hit += interrupted(work, chance.random() * 0.004, n)
        runs()
    assert n_hit > 10
    other = threading.Thread(target=runs, args=(4,))
    other.start()
    other.join(20)
    assert not other.is_alive()


def test_an_engine_whose_start_or_end_was_interrupted_can_be_started_again(eventually):
    def begin_and_end():
        with koan.init(runtime="local", engine={"max_actors": 1, "cancel_grace": 0.1}):
            runs()

    chance, n_hit = random.Random(1), 0
    for _ in range(25):
        n_hit += interrupted(begin_and_end, chance.random() * 0.03, chance.choice([1, 2]))
        koan.shutdown()
        assert not client._ending
        begin_and_end()
    assert n_hit > 3
    eventually(lambda: "koan-engine" not in [thread.name for thread in threading.enumerate()])


# --- handlers ------------------------------------------------------------------------------------------------------------


def blocks(update):
    LEAVE.wait(30)


def leaves(update):
    raise SystemExit


def asks(update):
    ASKED.append(Doubles.start(3).run().get(timeout=10).wait().get(timeout=10))


async def leaves_its_loop(update):
    raise SystemExit


async def blocks_its_loop(update):
    LEAVE.wait(30)


async def is_cancelled(update):
    raise asyncio.CancelledError


ASKED: list[int] = []


@pytest.mark.parametrize("handler", [blocks, leaves, asks, leaves_its_loop, blocks_its_loop, is_cancelled])
def test_handlers_of_any_kind_keep_no_other_from_its_last_update(local_engine, handler):
    ASKED.clear()
    jobs = Doubles.start_many(range(20)).run().get(timeout=10)
    bad = [job.on_progress(handler) for job in jobs]
    ends, seen = threading.Semaphore(0), []

    def note(update):
        seen.append(update.status)
        if update.status.is_final:
            ends.release()

    subscriptions = [job.on_progress(note) for job in jobs]
    for _ in jobs:
        assert ends.acquire(timeout=20)
    runs()
    LEAVE.set()
    until = time.monotonic() + 10
    while not all(each.closed for each in (*subscriptions, *bad)) and time.monotonic() < until:
        time.sleep(0.01)
    assert all(each.closed for each in (*subscriptions, *bad))
    assert handler is not asks or set(ASKED) == {6}


def test_a_coroutine_handler_ends_with_its_loop(local_engine):
    async def handler(update):
        seen.append(update)

    async def subscribe():
        subscription = job.on_progress(handler)
        stream = job.progress_stream().__aiter__()
        await stream.__anext__()
        return subscription, stream

    seen = []
    job = Sleeps.start(20).run().get(timeout=10)
    assert STARTED.wait(10)
    subscription, _stream = asyncio.run(subscribe())
    LEAVE.set()
    assert job.wait().get(timeout=10) == "awake"
    until = time.monotonic() + 10
    while not subscription.closed and time.monotonic() < until:
        time.sleep(0.01)
    assert subscription.closed
    assert local_engine.session._watching._by_job == {}
    runs()


def test_streams_that_nobody_reads_to_the_end_leave_nothing_behind(local_engine):
    job = Sleeps.start(20).run().get(timeout=10)
    for _ in range(5):
        next(job.progress_stream().blocking())
    gc.collect()
    assert local_engine.session._watching._by_job == {}


# --- finalizers, signal handlers, callbacks ------------------------------------------------------------------------------


class Asks:
    """Uses the engine when it is collected, wherever that is."""

    def __init__(self):
        self.itself = self

    def __del__(self):
        try:
            runs()
        except RuntimeUnavailableError:
            REFUSED.append(threading.current_thread().name)


REFUSED: list[str] = []


def test_finalizers_may_use_the_engine_wherever_the_collector_runs_them(local_engine):
    before = gc.get_threshold()
    gc.set_threshold(10, 2, 2)
    try:
        for n in range(100):
            Asks()
            runs(n)
    finally:
        gc.set_threshold(*before)
    gc.collect()
    runs()


def test_a_signal_handler_may_use_the_engine(local_engine):
    done = []
    before = signal.signal(signal.SIGUSR1, lambda *_: done.append(runs()))
    try:
        for _ in range(50):
            threading.Timer(0.001, signal.pthread_kill, (threading.main_thread().ident, signal.SIGUSR1)).start()
            runs()
            time.sleep(0.002)
    finally:
        time.sleep(0.05)
        signal.signal(signal.SIGUSR1, before)
    assert len(done) > 20


# --- the end -------------------------------------------------------------------------------------------------------------


def test_the_end_of_the_engine_answers_everything_that_is_under_way_and_another_can_begin():
    for _ in range(2):
        STARTED.clear()
        LEAVE.clear()
        leave = threading.Event()

        def never(leave=leave):
            yield 1
            leave.wait(20)

        with koan.init(runtime="local", engine={"max_actors": 1, "cancel_grace": 0.1}) as engine:
            runs()
            job = Sleeps.start(20).run().get(timeout=10)
            assert STARTED.wait(10)
            pendings = [job.wait(), job.wait(timeout=60), job.wait(1e300), Doubles.start_many(never()).run()]
            pendings += [Doubles.start(n).delayed(60).run().get(timeout=10).wait() for n in range(3)]
            ends = []

            def read(job=job, ends=ends):
                try:
                    list(job.progress_stream().blocking())
                except RuntimeUnavailableError:
                    ends.append("refused")

            readers = [threading.Thread(target=read) for _ in range(3)]
            for reader in readers:
                reader.start()
            subscription = job.on_progress(lambda update: None)
            time.sleep(0.05)
            began = time.monotonic()
            engine.shutdown()
            for pending in pendings:
                with pytest.raises(RuntimeUnavailableError):
                    pending.get(timeout=5)
            for reader in readers:
                reader.join(5)
            assert ends == ["refused"] * 3
            assert subscription.closed
            assert time.monotonic() - began < 5
            leave.set()
            LEAVE.set()


SCRIPT = """
import atexit, signal, sys, threading, time
import koan_ray as koan

class Doubles(koan.Job[int, int]):
    def execute(self, context, progress, cancellation) -> int:
        progress.report(0.5)
        time.sleep(0.05)
        return 2 * context

class Late:
    def __del__(self):
        try:
            Doubles.start(1).run().get(timeout=1)
        except BaseException as error:
            print("late:", type(error).__name__, flush=True)

def last():
    try:
        print("last:", Doubles.start(4).run().get(timeout=5).wait().get(timeout=5), flush=True)
    except koan.KoanRayError as error:
        print("last:", type(error).__name__, flush=True)

def forever():
    while True:
        yield 1
        time.sleep(0.01)

if __name__ == "__main__":
    koan.init(runtime="local", engine={"max_actors": 1, "cancel_grace": 0.1})
    atexit.register(last)
    job = Doubles.start(1).delayed(600).run().get(timeout=10)
    job.on_progress(lambda update: None)
    job.wait(1e300)
    Doubles.start_many(forever()).run()
    reader = threading.Thread(target=lambda: list(job.progress_stream().blocking()), daemon=True)
    reader.start()
    late = Late()
    late.itself = late
    print("under way", flush=True)
    if sys.argv[1] == "waits":
        job.wait().get()
"""


@pytest.mark.parametrize("how", ["ends", "waits"])
def test_a_program_ends_in_time_with_everything_under_way(tmp_path, how):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    program = subprocess.Popen([sys.executable, str(script), how], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert program.stdout.readline() == "under way\n"
        if how == "waits":
            time.sleep(0.3)
            program.send_signal(signal.SIGINT)
        out, err = program.communicate(timeout=20)
    finally:
        program.kill()
        program.wait()
    assert "last: 8" in out
    assert ("KeyboardInterrupt" in err) == (how == "waits")
    assert "Fatal" not in err
