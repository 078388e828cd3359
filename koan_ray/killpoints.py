"""Named places in the code where a test can have this process killed, as a crash would come there.

::

    KOAN_RAY_KILL=flush.between:2 KOAN_RAY_KILL_ONCE=/tmp/marker python …

kills the process with SIGKILL when it passes ``flush.between`` for the second time; ``:1`` may be left out. A coordinator
that Ray starts again inherits the environment: with ``KOAN_RAY_KILL_ONCE`` the marker is made first, and whoever finds it
there passes on, so that all processes together are killed once. The marker says who died where; a test reads it to know
that its fault happened.

Unset, a killpoint is a call of an empty function, some tens of nanoseconds. Each write that `koan_ray.engine` relies on has
one before and one after it (``NAMES``), and so has the hand-over to user code.
"""

from __future__ import annotations

import os
import signal
from itertools import count
from typing import TYPE_CHECKING, Final

from koan_ray.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_KILL: Final = "KOAN_RAY_KILL"
_ONCE: Final = "KOAN_RAY_KILL_ONCE"

NAMES: Final = {
    "submit.after_flush": "the job is stored, and whoever submitted it was not told",
    "dispatch.decided": "the job is Running in memory, its order not sent, nothing written",
    "dispatch.sent": "the order is on its way to the job actor; Running is written behind",
    "claim.before_flush": "a write-ahead job is Running in memory, nothing written, its order not sent",
    "claim.after_flush": "a write-ahead job's Running state and its execution are stored, its order not sent",
    "body.before": "in the process that runs it: the body is about to be called",
    "body.after": "in the process that runs it: the body has returned, and nobody was told",
    "settle.before_flush": "the job's end, or its return to the queue, is decided and not written",
    "settle.after_flush": "the job's end is written, and nobody was told",
    "flush.before_jobs": "jobs of a flush are about to be written",
    "flush.between": "jobs of a flush are written, their executions not",
    "flush.after_executions": "a flush is written, and its writer does not know",
    "lease.before_take": "the lease is free and about to be taken",
    "lease.after_take": "the lease is taken, and nothing stamped",
    "lease.before_beat": "the holder is about to beat",
    "lease.after_beat": "the beat is written",
    "lease.before_release": "the holder is about to give the lease back",
    "lease.after_release": "the lease is nobody's",
    "takeover.before_stamp": "the lease is ours, and some documents carry an older term",
    "takeover.after_stamp": "documents carry our term, and were not read",
    "takeover.before_adopt": "what runs was read, and no job actor was adopted",
    "takeover.after_adopt": "job actors are adopted, and what nobody runs is still Running",
    "takeover.before_close": "executions that an earlier holder left open are about to be closed",
    "takeover.after_close": "they are closed",
    "archive.before_copy": "the job is where it was",
    "archive.between_copies": "its executions are copied, the job is not",
    "archive.after_copy": "job and executions are in both places, not compared",
    "archive.before_delete": "they are in both places, and equal",
    "archive.between_deletes": "the job is in the archive only, its executions in both places",
    "archive.after_delete": "they are in the archive only",
}


def _pass(_name: str) -> None:
    """Go on."""


def armed(environment: Mapping[str, str]) -> Callable[[str], None]:
    """Return what is called at every killpoint.

    Raises:
        ConfigurationError: ``KOAN_RAY_KILL`` names no killpoint, or has no positive number.
    """
    asked = environment.get(_KILL, "")
    if not asked:
        return _pass
    name, _, number = asked.partition(":")
    if name not in NAMES or not (number or "1").isdecimal() or int(number or "1") < 1:
        msg = f"{_KILL}: expected one of {', '.join(NAMES)}, and :n with n of at least 1 for the n-th time; got {asked!r}"
        raise ConfigurationError(msg)
    nth, passed, marker = int(number or "1"), count(1), environment.get(_ONCE)

    def killpoint(here: str) -> None:
        if here == name and next(passed) == nth and _is_first(marker, here):
            os.kill(os.getpid(), signal.SIGKILL)

    return killpoint


def _is_first(marker: str | None, here: str) -> bool:
    """Leave the marker; false if it was there."""
    if marker is None:
        return True
    try:
        fd = os.open(marker, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return False
    with os.fdopen(fd, "w") as file:
        file.write(f"{os.getpid()} {here}\n")
        file.flush()
        os.fsync(fd)
    return True


killpoint: Final = armed(os.environ)
