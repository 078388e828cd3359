"""Names of lease holders: which process it is, so that another on the same machine can know that it is gone.

A lease whose holder is known to be dead need not lapse first, which is what makes the restart of a coordinator quick. On
another machine, or in another container, nothing is known, and the lease's beat decides.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from koan_ray.domain.ids import new_id


def this_process() -> str:
    """Return a name that is unique for each call, and tells where this process can be found."""
    return f"{_home()}/{os.getpid()}/{psutil.Process().create_time():.2f}/{new_id()[-12:]}"


def is_dead(holder: str) -> bool:
    """Tell whether a holder is a process of this machine and container, and is gone for certain."""
    home, *process_of_it = holder.rsplit("/", 3)
    if home != _home() or len(process_of_it) != 3 or not process_of_it[0].isdigit():
        return False
    pid, started, _ = process_of_it
    try:
        process = psutil.Process(int(pid))
        return f"{process.create_time():.2f}" != started or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


def _home() -> str:
    """Return what two processes share that see each other's ids: the boot of the kernel, and the space of process ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = Path("/proc/self/ns/pid").readlink().name
    except OSError:  # no Linux
        return f"boot-{psutil.boot_time():.0f}"
    return f"{boot}:{space}"
