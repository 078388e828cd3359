"""Bodies that do what no body should; a context says which. Each act is tried plain and async, in every isolation."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import koan_ray as koan


class Rude(Exception):
    """Raises when it is asked what it is."""

    def __str__(self):
        raise RuntimeError("no text")

    __repr__ = __str__


class RudeBase(BaseException):
    def __str__(self):
        raise SystemExit(9)


class Unpicklable(Exception):
    def __init__(self):
        super().__init__(threading.Lock())


class Lazy(str):
    __slots__ = ()

    def __str__(self):
        raise ValueError("lazy")

    def __len__(self):
        return 10**9


def _cycle() -> Exception:
    one, two = ValueError("one"), ValueError("two")
    one.__cause__, two.__cause__ = two, one
    return one


def _nested_group(levels: int) -> BaseException:
    made: BaseException = koan.NonRetryable(ValueError("inside"))
    for _ in range(levels):
        made = BaseExceptionGroup("level", [made, ValueError("beside")])
    return made


ERRORS: dict[str, Any] = {
    "value": lambda: ValueError("plain"),
    "rude": Rude,
    "rude base": RudeBase,
    "unpicklable": Unpicklable,
    "exit": lambda: SystemExit(3),
    "exit odd": lambda: SystemExit({"a": 1}),
    "interrupt": KeyboardInterrupt,
    "generator exit": GeneratorExit,
    "stop": lambda: StopIteration(5),
    "stop async": StopAsyncIteration,
    "cancelled": asyncio.CancelledError,
    "timeout": TimeoutError,
    "recursion": lambda: RecursionError("deep"),
    "memory": MemoryError,
    "cycle": _cycle,
    "huge": lambda: ValueError("x" * 5_000_000),
    "surrogate": lambda: FileNotFoundError(2, "No such file", "caf\udce9"),
    "ansi": lambda: ValueError("\x1b[31mred\x1b[0m \x00 \r\n"),
    "no args": lambda: ValueError(),
    "group": lambda: ExceptionGroup("group", [ValueError("a"), KeyError("b")]),
    "group of non retryable": lambda: _nested_group(3),
    "deep group": lambda: _nested_group(300),
    "group of reschedule": lambda: ExceptionGroup("g", [koan.Reschedule(after=0.05)]),
    "group with exit": lambda: BaseExceptionGroup("g", [SystemExit(1)]),
    "non retryable": lambda: koan.NonRetryable("no"),
    "non retryable of rude": lambda: koan.NonRetryable(Rude()),
    "non retryable odd": lambda: koan.NonRetryable(5),
    "non retryable class": lambda: koan.NonRetryable(ValueError),
    "reschedule huge": lambda: koan.Reschedule(after=10**400),
    "reschedule nan": lambda: koan.Reschedule(after=float("nan")),
    "reschedule text": lambda: koan.Reschedule(after="soon"),
    "reschedule negative": lambda: koan.Reschedule(after=-1),
    "job failed": lambda: koan.JobNotFoundError("x"),
}

REPORTS: dict[str, tuple[Any, ...]] = {
    "inf total": (1, float("inf")),
    "nan total": (1, float("nan")),
    "nan": (float("nan"),),
    "inf": (float("inf"), "m"),
    "exception as message": (0.5, ValueError("m")),
    "exception as total": (1, ValueError("m")),
    "rude message": (0.5, Rude()),
    "lazy": (0.5, Lazy("lazy")),
    "list": ([1], [2]),
    "list message": (0.5, ["m"]),
    "complex": (1j,),
    "complex total": (1, 2j),
    "huge": (10**400, 10**401),
    "huge share": (10**400,),
    "negative": (-1, -5, "m"),
    "number as message": (0.5, None, 5),
    "bool": (True, False),
    "text": ("half",),
    "nothing": (),
    "bytes": (0.5, b"half"),
    "surrogate": (0.5, "caf\udce9 \x00 \x1b[31m"),
    "long": (0.5, "x" * 3_000_000),
}


def made(name: str) -> BaseException:
    """Return one of `ERRORS`."""
    error: BaseException = ERRORS[name]()
    return error


def _has_waited(job: Any, detail: str) -> bool:
    """Tell whether a job that puts itself off has done so for a while; otherwise it would go on for ever."""
    return "reschedule" in detail and time.time() - job.created_at.timestamp() > 0.5


def _thread(work: Any, *, daemon: bool = True, join: bool = True) -> None:
    thread = threading.Thread(target=work, daemon=daemon)
    thread.start()
    if join:
        thread.join(10)


def _plain(act: str, job: Any, progress: Any, cancellation: Any) -> Any:  # noqa: C901, PLR0911, PLR0912
    kind, _, detail = act.partition(":")
    if _has_waited(job, detail):
        return "done"
    match kind:
        case "raise":
            raise made(detail)
        case "report":
            with contextlib.suppress(TypeError, ValueError, OverflowError):
                progress.report(*REPORTS[detail])
            time.sleep(0.12)
        case "thread exits":
            _thread(lambda: sys.exit(3))
        case "thread left":
            _thread(lambda: time.sleep(1), join=False)
        case "thread waits":
            waited: list[Any] = []
            _thread(lambda: waited.append(job.start_child(Leaf, 4).run().get(20).wait().get(20)))
            return waited[0] if waited else "no value"
        case "child":
            return job.start_child(Leaf, 4).run().get().wait().get()
        case "child left":
            job.start_child(Leaf, 4).run()
        case "fork exits":
            pid = os.fork()
            if pid == 0:
                os._exit(0)
            os.waitpid(pid, 0)
        case "fork returns":
            pid = os.fork()
            if pid:
                os.waitpid(pid, 0)
        case "program":
            subprocess.run(["true"], check=True)
        case "program left":
            subprocess.Popen(["sleep", "3"])
        case "close stdout":
            os.close(1)
        case "no stdout":
            sys.stdout = None
        case "chdir":
            os.chdir("/")
        case "environment":
            os.environ["HOSTILE"] = "1"
        case "ignore signals":
            with contextlib.suppress(ValueError):
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        case "cancel itself":
            job.cancel("by itself").get()
            time.sleep(0.05)
        case "remove itself":
            with contextlib.suppress(koan.KoanRayError):
                job.remove().get()
        case "wait itself":
            with contextlib.suppress(TimeoutError):
                job.wait(0.1).get()
        case "ignores cancel":
            until = time.monotonic() + 3
            while time.monotonic() < until:
                time.sleep(0.01)
        case "waits for cancel":
            until = time.monotonic() + 3
            while not cancellation.requested and time.monotonic() < until:
                time.sleep(0.01)
            cancellation.raise_if_requested()
        case "coroutine":

            async def later() -> str:
                await asyncio.sleep(0)
                return "awaited"

            return later()
        case "recursion":
            return _plain(act, job, progress, cancellation)
        case _:
            raise LookupError(act)
    return "done"


async def _async(act: str, job: Any, progress: Any, cancellation: Any) -> Any:  # noqa: C901, PLR0912
    kind, _, detail = act.partition(":")
    loop = asyncio.get_running_loop()
    if _has_waited(job, detail):
        return "done"
    match kind:
        case "task raises":

            async def step() -> None:
                await asyncio.sleep(0.001)
                raise made(detail)

            await asyncio.gather(step(), asyncio.sleep(0.02))
        case "group raises":

            async def step() -> None:
                raise made(detail)

            async with asyncio.TaskGroup() as group:
                group.create_task(step())
        case "task left":
            loop.create_task(asyncio.sleep(60))
        case "task left raising":

            async def exits() -> None:
                raise made(detail)

            loop.create_task(exits())
            await asyncio.sleep(0.02)
        case "callback raises":

            def exits_now() -> None:
                raise made(detail)

            loop.call_soon(exits_now)
            await asyncio.sleep(0.02)
        case "stop loop":
            loop.stop()
            await asyncio.sleep(0.01)
        case "close loop":
            with contextlib.suppress(RuntimeError):
                loop.close()
        case "cancel all":
            for task in asyncio.all_tasks():
                task.cancel()
            await asyncio.sleep(0.01)
        case "swallow cancel":
            try:
                await asyncio.sleep(3)
            except asyncio.CancelledError:
                return "swallowed"
        case "child":
            child = await job.start_child(Leaf, 4).run()
            return await child.wait()
        case "thread waits":

            def wait() -> Any:
                return job.start_child(Leaf, 4).run().get(20).wait().get(20)

            return await loop.run_in_executor(None, wait)
        case "to thread":
            return await asyncio.to_thread(lambda: job.start_child(Leaf, 4).run().get(20).wait().get(20))
        case _:
            return _plain(act, job, progress, cancellation)
    return "done"


class Leaf(koan.Job[int, int]):
    kind = "hostile.leaf"

    def execute(self, context, progress, cancellation) -> int:
        return context


_RETRY = koan.RetryPolicy(max_attempts=2, initial_delay=0.02, max_delay=0.05)


class Does(koan.Job[str, Any]):
    """Does one act, in a plain body."""

    kind = "hostile.does"
    retry, timeout = _RETRY, 8

    def execute(self, context, progress, cancellation) -> Any:
        return _plain(context, self, progress, cancellation)


class DoesAsync(koan.Job[str, Any]):
    kind = "hostile.does_async"
    retry, timeout = _RETRY, 8

    async def execute(self, context, progress, cancellation) -> Any:
        return await _async(context, self, progress, cancellation)


class DoesTogether(DoesAsync):
    kind = "hostile.does_together"
    concurrency = 4


class DoesInProcess(Does):
    kind = "hostile.does_in_process"
    isolation = koan.Isolation.PROCESS


class DoesAsyncInProcess(DoesAsync):
    kind = "hostile.does_async_in_process"
    isolation = koan.Isolation.PROCESS


ANSWERS: dict[str, Any] = {
    "yes": lambda: True,
    "no": lambda: False,
    "text": lambda: "maybe",
    "none": lambda: None,
    "list": list,
    "nan": lambda: float("nan"),
    "huge": lambda: 10**400,
    "negative": lambda: -5,
    "coroutine": lambda: asyncio.sleep(0),
    "object": object,
    "exit": lambda: sys.exit(3),
    "cancelled": lambda: _raise(asyncio.CancelledError()),
    "interrupt": lambda: _raise(KeyboardInterrupt()),
    "rude": lambda: _raise(Rude()),
    "rude base": lambda: _raise(RudeBase()),
}


def _raise(error: BaseException) -> None:
    raise error


class Judges(koan.Job[list[str], Any]):
    """Fails, and answers with odd things whether it should be tried again and when."""

    kind = "hostile.judges"
    retry, timeout = _RETRY, 8

    def execute(self, context, progress, cancellation) -> Any:
        raise made("value" if _has_waited(self, context[0]) else context[0])

    def should_retry(self, last_execution):
        return ANSWERS[self.context[1]]()

    def get_retry_delay(self, last_execution):
        return ANSWERS[self.context[2]]()


ACTORS_OF = {
    "plain": Does,
    "async": DoesAsync,
    "together": DoesTogether,
    "process": DoesInProcess,
    "async process": DoesAsyncInProcess,
}
PLAIN_ACTS = [
    *(f"raise:{name}" for name in ERRORS),
    *(f"report:{name}" for name in REPORTS),
    "thread exits",
    "thread left",
    "thread waits",
    "child",
    "child left",
    "fork exits",
    "program",
    "program left",
    "no stdout",
    "chdir",
    "environment",
    "ignore signals",
    "cancel itself",
    "remove itself",
    "wait itself",
    "coroutine",
    "recursion",
]
PROCESS_ACTS = ["fork returns", "close stdout"]
NO_ENGINE = (
    "thread waits",
    "child",
    "child left",
    "cancel itself",
    "remove itself",
    "wait itself",
)  # there is none in PROCESS
ASYNC_ACTS = [
    *(f"task raises:{name}" for name in ERRORS),
    *(f"group raises:{name}" for name in ("exit", "interrupt", "non retryable", "rude")),
    *(f"callback raises:{name}" for name in ("exit", "interrupt", "value", "rude base")),
    *(f"task left raising:{name}" for name in ("exit", "interrupt", "value")),
    "task left",
    "stop loop",
    "close loop",
    "cancel all",
    "child",
    "thread waits",
    "to thread",
]
STOPPED_ACTS = ["ignores cancel", "waits for cancel", "swallow cancel"]
