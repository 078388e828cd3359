"""A process that is forked while it has an engine: its copy says so, may have an engine of its own, and disturbs nothing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_PROGRAM = """
import asyncio, multiprocessing, os, sys, threading, time
import koan_ray as koan

class Double(koan.Job[int, int]):
    def execute(self, context, progress, cancellation) -> int:
        time.sleep(0.01)
        return 2 * context

class Slow(koan.Job[None, int]):
    def execute(self, context, progress, cancellation) -> int:
        time.sleep({slow_s})
        return 1

class Forks(koan.Job[str, str]):
    retry = koan.RetryPolicy(max_attempts=1)
    def execute(self, context, progress, cancellation) -> str:
        return in_copy({"double": double, "fresh": fresh, "init": koan.init}[context])

class Both(koan.Job[None, int]):
    def execute(self, context, progress, cancellation) -> int:
        os.fork()
        progress.report(0.5, str(os.getpid()))
        return os.getpid()

class BothAsync(Both):
    async def execute(self, context, progress, cancellation) -> int:
        os.fork()
        progress.report(0.5, str(os.getpid()))
        return os.getpid()

def said(action):
    try:
        return "ok", action()
    except BaseException as error:
        return type(error).__name__, str(error)

def in_copy(action):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, repr(said(action)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        answer = file.read()
    os.waitpid(pid, 0)
    return answer

def double(n=2):
    return Double.start(n).run().get(10).wait(10).get(10)

def fresh():
    with koan.init(runtime="local"):
        seen = []
        job = Double.start(2).run().get(10)
        job.on_progress(lambda update: seen.append(update.status))
        result = job.wait(10).get(10)
        deadline = time.monotonic() + 5
        while not seen and time.monotonic() < deadline:
            time.sleep(0.01)
        return result, bool(seen)

koan.init(**{init})
assert double() == 4
job = Slow.start().run().get(20)
waiting = job.wait(60)
stream = job.progress_stream().blocking()
next(stream)
subscription = job.on_progress(lambda update: None)
engine = koan.init()

def forever():
    while True:
        double()

busy = [threading.Thread(target=forever, daemon=True) for _ in range(2)]  # so that locks are held when it is forked
[thread.start() for thread in busy]
{body}
print("parent", double(21), flush=True)
koan.shutdown()
os._exit(0)  # the body of the slow job goes on
"""


def told(body: str, *, ray: bool = False, within: float = 60, slow_s: float = 30) -> str:
    init = "{'engine': {'max_actors': 2}}" if ray else "{'runtime': 'local', 'engine': {'max_actors': 4}}"
    program = _PROGRAM.replace("{init}", init).replace("{body}", body).replace("{slow_s}", str(slow_s))
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=within, check=False,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    assert "parent 42" in done.stdout, done.stdout + done.stderr[-3000:]
    return done.stdout


CALLS = [
    "double()",
    "Double.start(1).run().get(10)",
    "Double.start_many([1, 2]).run().get(10)",
    "koan.Jobs.query().get(10)",
    "list(koan.Jobs.stream().blocking())",
    "koan.Jobs.count().get(10)",
    "koan.Jobs.get(job.id).get(10)",
    "koan.Jobs.cancel(job.id).get(10)",
    "job.refresh().get(10)",
    "job.wait(5).get(10)",
    "job.cancel().get(10)",
    "job.on_progress(print)",
    "next(job.progress_stream().blocking())",
    "next(stream)",
    "waiting.get(10)",
    "asyncio.run(asyncio.wait_for(waiting.map(str), 10))",
    "engine.status().get(10)",
    "engine.session.count({}).get(10)",
]


def test_every_call_of_a_copy_says_at_once_that_it_is_one():
    lines = told("".join(f"print(in_copy(lambda: {call}), flush=True)\n" for call in CALLS)).splitlines()
    assert len(lines) == len(CALLS) + 1
    for call, line in zip(CALLS, lines, strict=False):
        assert line.startswith("('RuntimeUnavailableError'"), (call, line)
        assert "forked copy of process" in line, (call, line)
        assert "koan.init" in line, (call, line)


def test_a_pending_of_the_original_is_done_in_its_copy_and_goes_on_in_the_original():
    out = told("print(in_copy(lambda: (waiting.done, waiting.succeeded)), waiting.done)\nprint(waiting.get())", slow_s=2)
    assert out.splitlines()[0] == "('ok', (True, False)) False"
    assert "\n1\n" in out


def test_a_copy_may_have_an_engine_of_its_own():
    out = told("for _ in range(5): print(in_copy(fresh), flush=True)")
    assert out.count("('ok', (4, True))") == 5


def test_a_copy_of_a_copy_says_the_same():
    out = told("print(in_copy(lambda: in_copy(double)))\nprint(in_copy(lambda: in_copy(fresh)))")
    assert "RuntimeUnavailableError" in out.splitlines()[0]
    assert "(4, True)" in out.splitlines()[1]


@pytest.mark.parametrize("leave", ["sys.exit(0)", "koan.shutdown(); sys.exit(0)", "engine.shutdown(); sys.exit(0)",
                                   "engine.__exit__(None, None, None); sys.exit(0)", "subscription.close(); sys.exit(0)",
                                   "os.kill(os.getpid(), 0); sys.exit(0)"])  # fmt: skip
def test_the_exit_of_a_copy_does_not_disturb_the_original(leave):
    told(f"pid = os.fork()\nif pid == 0:\n    {leave}\nassert os.waitpid(pid, 0)[1] == 0")


def test_classes_may_be_defined_in_a_copy():
    out = told("def define():\n    class New(koan.Job[int, int]):\n        pass\nprint(in_copy(define))")
    assert out.startswith("('ok', None)")


def test_processes_of_multiprocessing_say_so_too():
    body = """
context = multiprocessing.get_context("fork")
queue = context.SimpleQueue()
def work():
    queue.put(said(double))
process = context.Process(target=work)
process.start()
process.join(20)
print(queue.get())
"""
    assert "forked copy of process" in told(body)


def test_a_copy_of_a_body_says_so_too():
    out = told("for what in ('double', 'fresh'): print(Forks.start(what).run().get(10).wait(20).get(20), flush=True)")
    assert "forked copy of process" in out.splitlines()[0]
    assert out.splitlines()[1] == "('ok', (4, True))"


def test_of_a_body_that_forks_and_returns_twice_the_original_alone_has_a_result():
    body = """
for kind in (Both, BothAsync) * 3:
    assert kind.start(None).run().get(10).wait(20).get(20) == os.getpid()
"""
    told(body)


def test_a_process_forked_before_there_is_an_engine_has_its_own():
    program = (
        _PROGRAM[: _PROGRAM.index("koan.init(**")] + "print(in_copy(fresh))\nkoan.init(runtime='local')\nprint(double())"
    )
    program = program.replace("{slow_s}", "1")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == ["('ok', (4, True))", "4"]


@pytest.mark.ray
def test_on_ray_a_copy_says_so_may_have_a_local_engine_and_leaves_the_cluster_alone():
    body = """
print(in_copy(double))
print(in_copy(lambda: koan.init()))
print(in_copy(fresh))
print(in_copy(lambda: waiting.get(10)))
print(Forks.start("double").run().get(20).wait(30).get(30))
print(Forks.start("init").run().get(20).wait(30).get(30))
pid = os.fork()
if pid == 0:
    sys.exit(0)
assert os.waitpid(pid, 0)[1] == 0
"""
    lines = told(body, ray=True, within=180).splitlines()
    assert "forked copy of process" in lines[0]
    assert "Ray does not work in a forked copy" in lines[1]
    assert lines[2] == "('ok', (4, True))"
    assert "forked copy of process" in lines[3]
    assert "forked copy of process" in lines[4]
    assert "Ray does not work in a forked copy" in lines[5]
