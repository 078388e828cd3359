"""Processes and all that they have started: found, ended, and noticed when they die.

A program may start others, put them into a session of their own and end itself before them. On Linux such orphans become
children of the nearest ancestor that has asked for them (a *subreaper*), so that whoever asks can end whatever descends from
it. Elsewhere only the children of a process are found.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Container

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_SHORT_PAUSE_S, _LONGEST_PAUSE_S = 0.0005, 0.05  # between two looks for processes that are left


def adopt_orphans() -> None:
    """Make this process the parent of every descendant that loses its own; without effect where there is no such thing."""
    _control(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when ``parent`` ends, which must have one thread only; at once if it has ended."""
    _control(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _control(what: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(what, value, 0, 0, 0)


def watched(pid: int) -> int | None:
    """Return a file descriptor that becomes readable when the process has ended; None where the kernel has none."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None


def children() -> list[int]:
    """Return the process ids of the children of this process, zombies included."""
    found: list[int] = []
    try:
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError):  # a thread that has just ended
                found += map(int, (task / "children").read_bytes().split())
    except OSError:  # not Linux
        return []
    return found


def end_descendants(within_s: float, *, spare: Container[int] = ()) -> dict[int, int]:
    """Kill whatever descends from this process, and return the wait status of each process that ended, by its id.

    For a process whose children are all its own to end and to reap. One that cannot be killed (it belongs to another user,
    or hangs in the kernel) is left behind after ``within_s``. Children in ``spare`` live on, with all that is theirs.
    """
    ended: dict[int, int] = {}
    give_up_at = time.monotonic() + within_s
    pause_s = _SHORT_PAUSE_S
    while True:
        going = [pid for pid in children() if pid not in spare]
        for pid in going:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        # The children of a killed one are ours when it has ended, so look again.
        reaped = reap()
        ended |= reaped
        if not reaped and (not going or time.monotonic() > give_up_at):
            return ended
        if not reaped:
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def kill_descendants(within_s: float) -> None:
    """Kill whatever descends from this process and reap nothing.

    For a process whose children are not its own to reap: whoever waits for one of them learns that it was killed.
    """
    adopt_orphans()
    give_up_at = time.monotonic() + within_s
    while (going := [pid for pid in children() if _runs(pid)]) and time.monotonic() < give_up_at:
        for pid in going:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_SHORT_PAUSE_S)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def reap() -> dict[int, int]:
    """Return the wait status of each child that has ended since the last call, by its process id."""
    ended: dict[int, int] = {}
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            ended[pid] = status
    return ended


def how_it_ended(status: int) -> str:
    """Say a wait status in words: ``exit code 7``, ``signal 11 (SIGSEGV)``."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {-code} ({signal.Signals(-code).name})"
    except ValueError:  # a real-time signal
        return f"signal {-code}"
