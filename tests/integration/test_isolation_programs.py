"""What a body in a process of its own may do to that process, and what becomes of the programs that it starts."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import fcntl
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

import koan_ray as koan
from tests.integration.conftest import is_alive, kill9

ONCE = koan.RetryPolicy(max_attempts=1)


@pytest.fixture(scope="module")
def engine():
    with koan.init(runtime="local", engine={"max_actors": 2, "cancel_grace": 0.5, "max_crashes": 1}) as engine:
        yield engine


def write_down(path: str, *pids: int) -> None:
    Path(path + ".new").write_text(" ".join(map(str, pids)))
    Path(path + ".new").rename(path)


def read_pids(path: Path) -> list[int]:
    return [int(word) for word in path.read_text().split()] if path.exists() else []


def daemon() -> int:
    """Start a program as daemons do: in a session of its own, orphaned at once."""
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        os.setsid()
        grandchild = subprocess.Popen(["sleep", "61"], start_new_session=True)
        os.write(writer, str(grandchild.pid).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    found = int(os.read(reader, 20))
    os.close(reader)
    os.close(writer)
    return found


class Programs(koan.Job[dict, str]):
    """Starts programs of several kinds, writes their ids down, and ends as it was asked to."""

    isolation = koan.Isolation.PROCESS
    retry = ONCE
    timeout = 30

    def execute(self, context, progress, cancellation) -> str:
        plain = subprocess.Popen(["sleep", "61"])
        program = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(61)"
        deaf = subprocess.Popen([sys.executable, "-c", program])
        shell = subprocess.Popen("sleep 61 & echo $!; wait", shell=True, stdout=subprocess.PIPE, text=True)
        copy = os.fork()
        if copy == 0:
            time.sleep(61)
        write_down(context["path"], plain.pid, deaf.pid, shell.pid, int(shell.stdout.readline()), copy, daemon())
        if context["end"] == "return":
            return "done"
        if context["end"] == "raise":
            raise ValueError("not today")
        if context["end"] == "exit":
            os._exit(3)
        if context["end"] == "kill keeper":
            os.kill(os.getppid(), signal.SIGKILL)
        plain.wait()
        return "late"


class TimedPrograms(Programs):
    timeout = 1.5


class Odd(koan.Job[str, object]):
    """Does to its process what its context says."""

    isolation = koan.Isolation.PROCESS
    retry = ONCE
    timeout = 20

    def execute(self, context, progress, cancellation) -> object:
        return getattr(Acts, context.replace(" ", "_"))(progress)


class OddAsync(koan.Job[str, object]):
    isolation = koan.Isolation.PROCESS
    retry = ONCE
    timeout = 20

    async def execute(self, context, progress, cancellation) -> object:
        if context == "thread in executor":
            asyncio.get_running_loop().run_in_executor(None, time.sleep, 61)
        elif context == "task that will not end":
            self.task = asyncio.create_task(never_ends())
        elif context == "exit in a task":
            self.task = asyncio.create_task(exits())
            await asyncio.sleep(5)
        elif context == "program":
            program = await asyncio.create_subprocess_exec("sh", "-c", "exit 3")
            return await program.wait()
        elif context == "fork":
            os.fork()
        return "done"


async def never_ends():
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(61)


async def exits():
    sys.exit(5)


class Acts:
    """Bodies; each returns "done" where the process is still able to say so."""

    @staticmethod
    def close_stdout(progress):
        sys.stdout.close()
        os.close(0)
        os.close(1)
        return "done"

    @staticmethod
    def no_stdout(progress):
        sys.stdout = sys.stderr = None
        return "done"

    @staticmethod
    def full_stdout(progress):
        _, writer = os.pipe()
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
        os.dup2(writer, 1)
        sys.stdout = os.fdopen(1, "w", buffering=1 << 20)
        sys.stdout.write("x" * 100_000)
        return "done"

    @staticmethod
    def close_many(progress):
        os.closerange(3, 256)
        return "done"

    @staticmethod
    def close_all(progress):
        os.closerange(3, 65536)
        return "done"

    @staticmethod
    def close_all_and_stay(progress):
        os.closerange(3, 65536)
        time.sleep(61)

    @staticmethod
    def close_all_and_open_others(progress):
        os.closerange(3, 65536)
        for _ in range(1000):
            with contextlib.suppress(OSError):
                os.open("/dev/null", os.O_WRONLY)
        return "done"

    @staticmethod
    def garbage_in_all(progress):
        for fd in range(3, 1024):
            with contextlib.suppress(OSError):
                os.write(fd, b"\x00\xff" * 5000)
        return "done"

    @staticmethod
    def garbage_after_a_mark(progress):
        for fd in range(3, 1024):
            with contextlib.suppress(OSError):
                os.write(fd, b"koan\x00\x00\x00\x00\x00\x00\x00\x02xx")
        time.sleep(61)

    @staticmethod
    def thread(progress):
        threading.Thread(target=time.sleep, args=(61,)).start()
        return "done"

    @staticmethod
    def handlers(progress):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN)
        return "done"

    @staticmethod
    def default_sigpipe(progress):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        return "done"

    @staticmethod
    def limits(progress):
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        return "done"

    @staticmethod
    def no_memory(progress):
        resource.setrlimit(resource.RLIMIT_AS, (1 << 20, 1 << 20))
        return "x" * (1 << 24)

    @staticmethod
    def directory(progress):
        os.chdir(tempfile.mkdtemp())
        os.rmdir(os.getcwd())
        os.umask(0o777)
        os.setpgrp()
        os.nice(5)
        return "done"

    @staticmethod
    def group(progress):
        os.killpg(os.getpgrp(), signal.SIGTERM)
        time.sleep(61)

    @staticmethod
    def interrupt(progress):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(61)

    @staticmethod
    def fork(progress):
        os.fork()
        return "done"

    @staticmethod
    def daemonised(progress):
        if os.fork():
            os._exit(0)
        return "done"

    @staticmethod
    def many_forks(progress):
        for _ in range(20):
            if os.fork() == 0:
                progress.report(0.9, "from a copy")
                return "from a copy"
        return "done"

    @staticmethod
    def large(progress):
        return "x" * 900_000

    @staticmethod
    def flood(progress):
        for n in range(200_000):
            progress.report(n, 200_000, "x" * 1000)
        return "done"

    @staticmethod
    def segfault(progress):
        os.kill(os.getpid(), signal.SIGSEGV)

    @staticmethod
    def real_time_signal(progress):
        os.kill(os.getpid(), 40)

    @staticmethod
    def sys_exit(progress):
        sys.exit(7)

    @staticmethod
    def nursery(progress):
        parent = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[1]
        os.kill(int(parent), signal.SIGKILL)
        return "done"


def outcome(job, within: float = 15.0):
    try:
        return job.wait(within).get()
    except koan.JobFailedError as error:
        return str(error)


def run(job_type, context):
    return outcome(job_type.start(context).run().get(10))


@pytest.mark.parametrize("end", ["return", "raise", "exit", "kill keeper"])
def test_what_a_body_has_started_ends_with_it_however_it_ends(engine, tmp_path, eventually, end):
    saw = run(Programs, {"path": str(tmp_path / "pids"), "end": end})
    pids = read_pids(tmp_path / "pids")
    assert len(pids) == 6
    eventually(lambda: not any(map(is_alive, pids)), within=5)
    expected = {
        "return": "done", "raise": "not today", "exit": "exit code 3", "kill keeper": "watches over it was killed",
    }  # fmt: skip
    assert expected[end] in saw


def test_what_a_body_has_started_is_gone_when_its_cancellation_is_told(engine, tmp_path, eventually):
    job = Programs.start({"path": str(tmp_path / "pids"), "end": "wait"}).run().get(10)
    pids = eventually(lambda: read_pids(tmp_path / "pids"))
    job.cancel().get(10)
    with pytest.raises(koan.JobCancelledError):
        job.wait(10).get()
    assert not any(map(is_alive, pids))


def test_what_a_body_has_started_is_gone_when_its_timeout_is_told(engine, tmp_path):
    assert "timeout" in run(TimedPrograms, {"path": str(tmp_path / "pids"), "end": "wait"})
    pids = read_pids(tmp_path / "pids")
    assert pids
    assert not any(map(is_alive, pids))


_DRIVER = """
import sys, time
import koan_ray as koan
from tests.integration.test_isolation_programs import Programs

with koan.init(runtime="local", engine={"cancel_grace": 0.5}):
    Programs.start({"path": sys.argv[1], "end": "wait"}).run().get()
    sys.stdin.readline()
"""


@pytest.mark.parametrize("how", ["leaves", "is killed"])
def test_what_a_body_has_started_ends_with_the_engine(tmp_path, eventually, how):
    driver = subprocess.Popen([sys.executable, "-c", _DRIVER, str(tmp_path / "pids")], stdin=subprocess.PIPE)
    pids = eventually(lambda: read_pids(tmp_path / "pids"))
    if how == "leaves":
        driver.communicate(b"\n", timeout=20)
    else:
        kill9(driver.pid)
        driver.communicate(timeout=20)
    eventually(lambda: not any(map(is_alive, pids)), within=5)


@pytest.mark.parametrize(
    "act",
    ["close stdout", "no stdout", "full stdout", "close many", "thread", "handlers", "default sigpipe", "limits",
     "directory", "fork", "many forks", "flood", "nursery"],
)  # fmt: skip
def test_what_a_body_does_to_its_process_does_not_hold_its_result(engine, act):
    began = time.monotonic()
    assert run(Odd, act) == "done"
    assert time.monotonic() - began < 8


@pytest.mark.parametrize(
    ("act", "seen"),
    [("close all", "closed its connection"), ("close all and stay", "closed its connection"),
     ("close all and open others", "closed its connection"), ("garbage in all", "written into its connection"),
     ("garbage after a mark", "written into its connection"), ("daemonised", "exit code 0"),
     ("group", "signal 15 (SIGTERM)"), ("segfault", "signal 11 (SIGSEGV)"),
     ("real time signal", "signal 40"), ("no memory", ""), ("interrupt", ""),
     ("sys exit", "7")],
)  # fmt: skip
def test_what_a_body_does_to_its_process_is_told_in_seconds(engine, act, seen):
    began = time.monotonic()
    saw = run(Odd, act)
    assert "failed" in saw
    assert seen in saw
    assert time.monotonic() - began < 8
    assert run(Odd, "thread") == "done"  # and the next one runs


@pytest.mark.parametrize(
    ("what", "seen"),
    [("thread in executor", "done"), ("task that will not end", "done"), ("exit in a task", "done"), ("program", 3),
     ("fork", "done")],
)  # fmt: skip
def test_what_an_async_body_leaves_does_not_hold_it(engine, what, seen):
    began = time.monotonic()
    saw = run(OddAsync, what)
    assert saw == seen or seen in saw
    assert time.monotonic() - began < 8


def test_a_large_result_arrives_whole(engine):
    assert run(Odd, "large") == "x" * 900_000


def double(n: int) -> int:
    return 2 * n


class Parallel(koan.Job[str, list]):
    """Uses processes of its own."""

    retry = ONCE
    timeout = 60

    def execute(self, context, progress, cancellation) -> list:
        how = multiprocessing.get_context(context)
        with how.Pool(1) as pool:
            pooled = pool.map(double, [1])
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=how) as executor:
            executed = list(executor.map(double, [2]))
        queue = how.SimpleQueue()
        process = how.Process(target=queue.put, args=(6,))
        process.start()
        process.join()
        return [*pooled, *executed, queue.get()]


class ParallelInProcess(Parallel):
    isolation = koan.Isolation.PROCESS


@pytest.mark.parametrize("job_type", [Parallel, ParallelInProcess])
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_bodies_may_use_processes(engine, job_type, method):
    assert outcome(job_type.start(method).run().get(10), 60) == [2, 4, 6]


def count_jobs() -> str:
    try:
        return str(koan.Jobs.count().get(5))
    except koan.ConfigurationError as error:
        return str(error)


class AskEngine(koan.Job[None, list]):
    isolation = koan.Isolation.PROCESS
    retry = ONCE

    def execute(self, context, progress, cancellation) -> list:
        with multiprocessing.get_context("fork").Pool(1) as pool:
            return [count_jobs(), pool.apply(count_jobs)]


def test_neither_a_body_nor_its_own_processes_can_use_the_engine_and_both_say_so(engine):
    saw = outcome(AskEngine.start().run().get(10))
    assert len(saw) == 2
    assert all("Isolation.PROCESS cannot use the engine" in each for each in saw)


class AskParallel(koan.Job[None, list]):
    isolation = koan.Isolation.PROCESS

    def execute(self, context, progress, cancellation) -> list:
        return [multiprocessing.current_process().daemon, multiprocessing.parent_process() is None]


def test_a_body_is_no_daemonic_process_and_belongs_to_nobody(engine):
    assert outcome(AskParallel.start().run().get(10)) == [False, True]
    assert multiprocessing.active_children() == []


class Around(koan.Job[str, list]):
    isolation = koan.Isolation.PROCESS

    def execute(self, context, progress, cancellation) -> list:
        return [os.environ.get(context), os.getcwd()]


def test_a_body_finds_environment_and_directory_as_they_are_when_it_begins(engine, tmp_path, monkeypatch):
    assert outcome(Around.start("KOAN_TEST_AROUND").run().get(10))[0] is None
    monkeypatch.setenv("KOAN_TEST_AROUND", "x")
    monkeypatch.chdir(tmp_path)
    assert outcome(Around.start("KOAN_TEST_AROUND").run().get(10)) == ["x", str(tmp_path)]
    monkeypatch.delenv("KOAN_TEST_AROUND")
    assert outcome(Around.start("KOAN_TEST_AROUND").run().get(10))[0] is None


def test_the_next_attempt_runs_when_the_nursery_has_died_between(engine):
    assert run(Odd, "fork") == "done"
    for agent, *_ in engine._runtime._launcher._agents.values():
        nursery = agent._children._nursery
    kill9(nursery._process.pid)
    assert run(Odd, "fork") == "done"


def test_many_bodies_at_once_each_end_with_their_own(engine):
    jobs = Odd.start_many([["fork", "thread", "segfault", "close all"][n % 4] for n in range(24)]).run().get(20)
    saw = [outcome(job, 60) for job in jobs]
    assert [each == "done" for each in saw] == [n % 4 < 2 for n in range(24)]


def test_cancelled_at_the_very_start_a_body_does_not_go_on(engine, tmp_path):
    for n in range(10):
        job = Programs.start({"path": str(tmp_path / f"pids{n}"), "end": "wait"}).run().get(10)
        time.sleep(n * 0.003)
        job.cancel().get(10)
        with pytest.raises(koan.JobCancelledError):
            job.wait(10).get()
        assert not any(map(is_alive, read_pids(tmp_path / f"pids{n}")))


_ADOPTER = """
import os, signal, sys
from koan_ray.runtime import processes

reader, writer = os.pipe()
processes.adopt_orphans()
child = os.fork()
if child == 0:
    for _ in range(3):
        if os.fork() == 0:
            os.setsid()
            if os.fork() != 0:
                os._exit(0)
            signal.pause()
    os.write(writer, b"x")
    signal.pause()
os.read(reader, 1)
ended = processes.end_descendants(10.0)
print(ended[child], len(ended) > 3, processes.children())
"""


def test_whatever_descends_from_a_process_is_ended_also_when_it_was_orphaned():
    said = subprocess.run([sys.executable, "-c", _ADOPTER], capture_output=True, text=True, timeout=30, check=True).stdout
    assert said.split(maxsplit=2) == [str(int(signal.SIGKILL)), "True", "[]\n"]


_KILLER = """
import subprocess, threading
from koan_ray.runtime import processes

program = subprocess.Popen("sleep 61 & setsid sleep 61 & wait", shell=True)
waiting = threading.Thread(target=program.wait)
waiting.start()
processes.kill_descendants(10.0)
waiting.join()
print(program.returncode, [pid for pid in processes.children() if processes._runs(pid)])
"""


def test_whoever_waits_for_a_program_that_is_killed_with_its_actor_learns_that_it_was():
    said = subprocess.run([sys.executable, "-c", _KILLER], capture_output=True, text=True, timeout=30, check=True).stdout
    assert said == "-9 []\n"
