"""Processes are found and ended with all that they have started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from koan_ray.runtime import processes


@pytest.mark.parametrize(
    ("status", "words"),
    [(0, "exit code 0"), (7 << 8, "exit code 7"), (11, "signal 11 (SIGSEGV)"), (9, "signal 9 (SIGKILL)"), (41, "signal 41")],
)
def test_an_end_is_said_in_words(status, words):
    assert processes.how_it_ended(status) == words


def test_children_are_found_while_they_are_not_reaped():
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(3)
    assert pid in processes.children()
    os.close(writer)
    os.close(reader)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    assert pid not in processes.children()


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
print(ended[child], len(ended), processes.children())
"""


def test_whatever_descends_from_a_process_is_ended_also_when_it_was_orphaned():
    said = subprocess.run([sys.executable, "-c", _ADOPTER], capture_output=True, text=True, timeout=30, check=True).stdout
    assert said.split(maxsplit=2) == [str(int(signal.SIGKILL)), "7", "[]\n"]
