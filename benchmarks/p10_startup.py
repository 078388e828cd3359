"""P10: start-up. A fresh process until its first result, against the same with a plain Ray task; and ``koan-ray --help``.

Rounds alternate, each in a process of its own, with the defaults that a user gets.

Where the time goes: `ray.init` with the dashboard is most of it on both sides; ours adds the start of the processes of the
coordinator and of one job actor, one after the other. ``--help`` imports Typer and nothing of ours but the command line.
"""

from __future__ import annotations

import subprocess
import sys

from benchmarks._harness import Row, median, timed

OURS = """
import koan_ray as koan
@koan.job
def one(x: int) -> int:
    return x
koan.init()
assert one.start(1).run().get().wait().get() == 1
"""
PLAIN = """
import ray
ray.init()
@ray.remote
def one(x):
    return x
assert ray.get(one.remote(1)) == 1
"""


def run(quick: bool) -> list[Row]:
    import ray

    if ray.is_initialized():
        ray.shutdown()
    ours, plain = [], []
    for _ in range(2 if quick else 5):
        plain.append(timed(lambda: _python(PLAIN)))
        ours.append(timed(lambda: _python(OURS)))
    show_help = [timed(lambda: _run([sys.executable, "-m", "koan_ray", "--help"])) for _ in range(10)]
    ratio, seconds = median(ours) / median(plain), median(show_help)
    first = Row(
        "P10 import, init, first result", f"{median(ours):.2f} s", f"{median(plain):.2f} s", ratio, 1.4, 1.15, lower=True
    )
    return [first, Row("P10 koan-ray --help", f"{seconds:.2f} s", "", seconds, 0.5, 0.2, unit="s", lower=True)]


def _python(source: str) -> None:
    # Time until the result is there; Ray's shutdown is not part of it.
    _run([sys.executable, "-c", source + "\nimport os; os._exit(0)"])


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
