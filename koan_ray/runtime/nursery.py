"""The processes of ``Isolation.PROCESS``: who starts them, who watches over them, and who ends them.

::

    job actor ── nursery ── keeper ── body ── what the body starts
                        └── keeper ── body ── …

* The *nursery* has imported what bodies need, has one thread, and forks a keeper for each attempt: a few milliseconds. It is
  not the forkserver of `multiprocessing`, which belongs to the user's code.
* The *keeper* forks the body, and waits. When the body has ended, when it is asked to, and when the job actor is gone, it
  kills the body and everything that descends from it, daemons included, and says how the body ended. Because that is a
  message of the keeper, and not the end of a stream, no copy of a stream in some other process can hold it up.
* The *body* leads a process group of its own, so that signals to its group reach nobody else.

What holds when one of them is killed: the body and its programs die with their keeper (the kernel kills the body, the
nursery the others); keepers live on without a nursery, and the next attempt starts a new one; all end with the job actor,
whose death each of them sees by itself, whoever has copies of its file descriptors.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from multiprocessing import spawn
from typing import TYPE_CHECKING

from koan_ray.runtime import processes

if TYPE_CHECKING:
    from collections.abc import Callable

# What a keeper sends, line by line: first `BEGUN`; last `ENDED`, the wait status of the body and whether its keeper has
# killed it, or `FAILED` with a reason. What it receives: how many seconds the body has left.
BEGUN, ENDED, FAILED = "begun", "ended", "failed"
_REQUEST = b"b"  # for a keeper, with the file descriptors for its body and for itself; one byte: it comes whole
_LOOK_S = 1.0  # for the end of the job actor, where the kernel does not say so
_KILL_S = 3.0  # a process that cannot be killed within this is left behind
_STOP_S = 5.0
_START = "import sys; sys.path[:] = {path!r}; from koan_ray.runtime.nursery import serve; serve({fd}, {parent})"


class Nursery:
    """The job actor's side: starts the nursery when it is first needed, and again when it has died."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._line: socket.socket | None = None
        self._is_closed = False

    def begin(self, line: socket.socket, keeper: socket.socket) -> None:
        """Start a process for an attempt, which has ``line`` to talk to us, and its keeper ``keeper``.

        Raises:
            OSError: None can be started: no memory, too many processes.
        """
        with self._lock:
            if self._is_closed:
                raise OSError("the engine was shut down")
            for is_last in (False, True):
                try:
                    socket.send_fds(self._started(), [_REQUEST], [line.fileno(), keeper.fileno()])
                except OSError:  # it has died since the last attempt
                    self._let_go()
                    if is_last:
                        raise
                else:
                    return

    def _started(self) -> socket.socket:
        if self._line is None or self._process is None or self._process.poll() is not None:
            self._let_go()
            ours, theirs = socket.socketpair()
            with theirs:
                program = _START.format(path=sys.path, fd=theirs.fileno(), parent=os.getpid())
                flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # noqa: SLF001 - as multiprocessing does
                executable = os.fsdecode(spawn.get_executable())
                self._process = subprocess.Popen(
                    [executable, *flags, "-c", program], stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()],
                    start_new_session=True,  # Ctrl-C is for the program that uses the engine
                )  # fmt: skip
            self._line = ours
        return self._line

    def replace(self) -> None:
        """Use another from now on: this one does not do what it is asked."""
        with self._lock:
            if self._process is not None:
                self._process.kill()
            self._let_go()

    def _let_go(self) -> None:
        line, self._line = self._line, None
        if line is not None:
            line.close()
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_S)

    def close(self) -> None:
        """End the nursery and all that it has started."""
        with self._lock:
            self._is_closed = True
            self._let_go()


# --- in the nursery ------------------------------------------------------------------------------------------------------


def serve(fd: int, parent: int) -> None:
    """Fork a keeper for each request, until the job actor closes the line or ends; then end all that was started."""
    from koan_ray.runtime.body import perform  # what the keepers' children need is imported here, once

    if os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        with contextlib.suppress(ImportError):  # each child would say so; and importing it takes long
            importlib.import_module("koan_ray.telemetry.exports")
    gc.collect()
    gc.freeze()  # a collection in a child does not touch, and so copy, what all of them share
    _reset_signals()
    line = socket.socket(fileno=fd)
    line.set_inheritable(False)
    processes.adopt_orphans()
    bell = _Bell()
    actor = processes.watched(parent)
    poller = select.poll()
    for each in (line.fileno(), bell.fd, actor):
        if each is not None:
            poller.register(each, select.POLLIN)
    keepers: set[int] = set()
    while os.getppid() == parent:
        ready = {each for each, _ in poller.poll(None if actor is not None else _LOOK_S * 1000)}
        if actor in ready:
            break
        if bell.fd in ready:
            bell.clear()
            gone = keepers & processes.reap().keys()
            keepers -= gone
            if gone:  # one that was killed leaves what it has kept to us
                keepers -= processes.end_descendants(_KILL_S, spare=keepers).keys()
        if line.fileno() in ready and not _take_request(line, keepers, actor, [bell.fd, bell.other_fd], perform):
            break
    processes.end_descendants(_KILL_S)
    os._exit(0)


def _take_request(
    line: socket.socket, keepers: set[int], actor: int | None, ours: list[int], perform: Callable[[int], None]
) -> bool:
    """Fork a keeper; false when there will be no request any more."""
    try:
        request, fds, _, _ = socket.recv_fds(line, len(_REQUEST), 2)
    except OSError:
        return False
    if not request:
        return False
    if len(fds) != 2:  # there were no file descriptors left for them; the job actor sees that nobody is at its lines
        for fd in fds:
            os.close(fd)
        return True
    body_fd, keeper_fd = fds
    with socket.socket(fileno=keeper_fd) as control:
        try:
            pid = os.fork()
        except OSError as error:
            _say(control, FAILED, error)
        else:
            if pid == 0:
                line.close()
                for fd in ours:
                    os.close(fd)
                _keep(control, body_fd, actor, perform)
            keepers.add(pid)
        os.close(body_fd)
    return True


# --- in a keeper ---------------------------------------------------------------------------------------------------------


def _keep(control: socket.socket, body_fd: int, actor: int | None, perform: Callable[[int], None]) -> None:
    """Fork the body, wait for its end, end what it leaves, and say how it ended; never returns."""
    try:
        end = _kept(control, body_fd, actor, perform)
    except BaseException as error:  # noqa: BLE001 - whatever it is, nothing may be left behind and the actor must hear of it
        processes.end_descendants(_KILL_S)
        _say(control, FAILED, f"{type(error).__name__}: {error}")
    else:
        status, was_killed = end
        _say(control, ENDED, status, int(was_killed))
    os._exit(0)


def _say(control: socket.socket, *words: object) -> None:
    line = " ".join(" ".join(map(str, words)).split())[:1000]
    with contextlib.suppress(OSError):  # the job actor is gone
        control.sendall(line.encode(errors="replace") + b"\n")


def _kept(control: socket.socket, body_fd: int, actor: int | None, perform: Callable[[int], None]) -> tuple[int, bool]:
    processes.adopt_orphans()
    bell = _Bell()
    me = os.getpid()
    body = os.fork()
    if body == 0:
        _become_body(me, [control.fileno(), bell.fd, bell.other_fd, *([] if actor is None else [actor])])
        perform(body_fd)
        os._exit(0)
    os.close(body_fd)
    _say(control, BEGUN)
    poller = select.poll()
    for each in (control.fileno(), bell.fd, actor):
        if each is not None:
            poller.register(each, select.POLLIN)
    ends_at = float("inf")
    while (left_s := ends_at - time.monotonic()) > 0:
        ready = {each for each, _ in poller.poll(None if left_s == float("inf") else left_s * 1000 + 1)}
        if bell.fd in ready:
            bell.clear()
            ended = processes.reap()
            if body in ended:
                processes.end_descendants(_KILL_S)
                return ended[body], False
        if actor in ready:
            break
        if control.fileno() in ready:
            asked = _asked(control)
            if asked is None:
                break
            ends_at = min(ends_at, time.monotonic() + asked)
    with contextlib.suppress(OSError):
        os.killpg(body, signal.SIGKILL)  # at one stroke, so that most of them start nothing more
    return processes.end_descendants(_KILL_S).get(body, signal.SIGKILL), True


def _asked(control: socket.socket) -> float | None:
    """Return how many seconds the body has left; None when the job actor does not care any more."""
    try:
        message = control.recv(4096)
    except OSError:
        return None
    return min(map(float, message.split()), default=None)


def _become_body(keeper: int, not_for_it: list[int]) -> None:
    """Leave behind what is the keeper's: signals, file descriptors, the process group."""
    processes.die_with_parent(keeper)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for each in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_DFL)
    for fd in not_for_it:
        os.close(fd)
    os.setpgid(0, 0)  # no session: its leader cannot make a group, as bodies may want to


def _reset_signals() -> None:
    """Undo what this process has inherited, and let only the job actor end it."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)


class _Bell:
    """A file descriptor that becomes readable when a child has ended."""

    def __init__(self) -> None:
        self.fd, self.other_fd = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(self.other_fd, False)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        signal.set_wakeup_fd(self.other_fd, warn_on_full_buffer=False)

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self.fd, 4096):
                pass


# --- in the job actor, about one keeper ------------------------------------------------------------------------------------


def within(seconds: float) -> bytes:
    """Return the message that has a keeper end its body in so many seconds, if it has not ended before."""
    return f"{seconds:.6f}\n".encode()
