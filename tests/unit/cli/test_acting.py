"""What ``koan-ray`` says before it asks anybody: about contexts, kinds, and its own options."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import koan_ray as koan
from koan_ray.cli import acting
from koan_ray.cli import app as command_line
from koan_ray.cli.safe import counted
from koan_ray.errors import KindNotIntroducedError


class Errand(koan.Job[dict[str, int], None]):
    """Wants a context."""

    async def execute(self, context, progress, cancellation) -> None: ...


def run(*arguments: str):
    # Rich cuts words to the width of the terminal; a wide one keeps the lines whole.
    return CliRunner(env={"COLUMNS": "160", "NO_COLOR": "1", "TERM": "dumb"}).invoke(command_line.app, list(arguments))


def test_a_context_that_was_forgotten_is_told_with_what_to_write():
    done = run("jobs", "submit", "Errand")
    assert done.exit_code == 2
    assert "--context: kind 'Errand' takes a context, none was given" in done.stderr
    assert "--context '{}'" in done.stderr
    wrong = run("jobs", "submit", "Errand", "--context", '{"n": "many"}')
    assert (wrong.exit_code, "n: Input should be a valid integer" in wrong.stderr) == (2, True)


def test_a_delay_that_is_none_is_told_with_those_that_are():
    done = run("jobs", "submit", "Errand", "--context", "{}", "--delay", "soon")
    assert (done.exit_code, "--delay" in done.stderr, "such as '90s'" in done.stderr) == (2, True, True)


@pytest.mark.parametrize(("kind", "code"), [("sample.countdown", 0), ("sample.nothing", 2), ("other.countdown", 2)])
def test_the_samples_of_dev_are_known_by_their_kinds(kind, code):
    script = "import sys; from koan_ray.cli.acting import find_class; print(find_class(sys.argv[1], []).__doc__)"
    command = [sys.executable, "-c", script, kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # where nobody has imported them yet
    assert (done.returncode == 0, "Counts" in done.stdout) == (code == 0, code == 0)
    assert code == 0 or "is not defined in this process" in done.stderr


def test_a_job_whose_class_no_process_has_introduced_is_run_again_with_the_modules_of_the_settings(monkeypatch):
    imported = []

    def run_again():
        if not imported:
            raise KindNotIntroducedError("j1", "mail", ["other"])
        return "runs"

    monkeypatch.setattr(acting, "import_modules", imported.append)
    assert acting._introducing(run_again) == "runs"
    assert imported == [[]]
    monkeypatch.setattr(acting, "import_modules", lambda named: None)
    imported.clear()
    with pytest.raises(KindNotIntroducedError, match=r"kind 'mail' to the engine \(known: 'other'\).*jobs\.modules"):
        acting._introducing(run_again)


def test_help_shows_every_word_of_what_it_says():
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", run("serve", "--help").stdout).split())
    assert "web.host of the settings by default" in shown
    assert "web.port of the settings by default" in shown
    assert "[OPTIONS] [ID]...\n" in re.sub(r" +\n", "\n", run("jobs", "watch", "--help").stdout)


def test_status_tells_of_jobs_and_not_of_the_chunks_of_batches(capsys):
    found = {"queued": 0, "waiting": 1, "running": 2, "actors": []}
    command_line._print_status({**found, "jobs": {"chunks": 70, "completed": 5, "failed": 1}})
    assert "ended: 5 completed, 1 failed" in capsys.readouterr().out
    command_line._print_status({**found, "jobs": {"chunks": 70}})
    assert "ended: none" in capsys.readouterr().out


@pytest.mark.parametrize(("n", "said"), [(0, "0 jobs"), (1, "1 job"), (2000, "2,000 jobs")])
def test_one_is_one(n, said):
    assert counted(n, "job") == said
