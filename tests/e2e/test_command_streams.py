"""Commands whose output goes somewhere else than to a UTF-8 terminal that is read to the end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CLI = str(Path(sys.executable).with_name("koan-ray"))


def run(script: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["bash", "-c", script], check=False, capture_output=True, timeout=60, env={**os.environ, "KOAN": CLI, **environment}
    )


@pytest.mark.parametrize("command", ["--help", "jobs list --help"])
@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252"])
def test_a_terminal_without_utf8_gets_text_that_it_has(command, encoding):
    done = run(f'"$KOAN" {command}', PYTHONIOENCODING=encoding)
    assert done.returncode == 0
    assert done.stderr == b""
    done.stdout.decode(encoding)


def test_a_reader_that_leaves_ends_the_command_without_a_word():
    done = run('"$KOAN" --help | head -1; echo "${PIPESTATUS[0]}"')
    assert done.stderr == b""
    assert done.stdout.split()[-1] in (b"0", b"141")


def test_a_closed_output_is_no_error():
    done = run('"$KOAN" --version >&-')
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_is_one_line_and_an_exit_code_of_its_own():
    done = run('"$KOAN" --help > /dev/full')
    assert done.returncode == 5
    assert done.stderr == b"koan-ray: the output cannot be written: No space left on device\n"


def test_serve_finds_modules_of_the_current_directory(tmp_path):
    (tmp_path / "shop.py").write_text("import koan_ray as koan\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [CLI, "serve", "--local", "--module", "shop", "--token-file", "missing"]
    done = subprocess.run(command, check=False, capture_output=True, timeout=60, cwd=tmp_path, env=environment)
    assert done.returncode == 2
    assert b"missing" in done.stderr
    assert b"shop" not in done.stderr
