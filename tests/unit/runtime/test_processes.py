"""Processes are found and ended with all that they have started."""

from __future__ import annotations

import os

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
