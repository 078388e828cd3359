"""Bars: what a person sees of a job's progress, on a terminal, on a narrow one, and where there is none."""

from __future__ import annotations

import io
import sys
from datetime import UTC, datetime, timedelta

import pytest
from rich.console import Console

import koan_ray as koan
from koan_ray.cli import bars


class Halves(koan.FiniteJob[int, int, int]):
    items = koan.ItemOptions()

    def get_items(self, context):
        return range(context)

    def process_item(self, item, index, progress):
        if item % 2 == 0:
            raise ValueError("no half")
        return koan.ItemResult.skipped("three") if item % 3 == 0 else koan.ItemResult.success()

    def build_result(self, summary):
        return summary.processed_items


class Fails(koan.Job[None, None]):
    retry = koan.RetryPolicy(max_attempts=1)

    def execute(self, context, progress, cancellation):
        progress.report(0.5, "[red]half\x1b[2J\nway[/red]")
        raise ValueError("no")


def terminal(width=120, *, is_terminal=True):
    return Console(
        file=io.StringIO(), force_terminal=is_terminal, force_jupyter=False, width=width, highlight=False, markup=False,
        record=True,
    )  # fmt: skip


def last_line(console):
    """Return what is left standing: all frames before were drawn over."""
    text = console.export_text().rstrip()
    return text[max(map(text.rfind, "○●✓✗–")) :]


def test_a_bar_has_percentage_counts_and_rate_until_the_end(local_engine):
    job, console = Halves.start(300).run().get(10), terminal()
    assert bars.show(job, console).get(30) is koan.JobStatus.COMPLETED
    line = last_line(console)
    assert line.startswith("✓ Halves")
    for part in ("100%", "300 of 300 items", "150 failed", "50 skipped", "/s"):
        assert part in line
    assert "left" not in line


def test_a_bar_tells_when_it_may_be_done(local_engine):
    job, console = Halves.start(0).run().get(10), terminal()
    due = datetime.now(UTC) + timedelta(seconds=125)
    said = "250 of 1,000 items, 3 failed, 20/s"
    drawn = bars.Bars(console, [job])
    with drawn:
        drawn.tell(koan.JobProgressUpdate(job.id, 1, 0.25, said, 250, 1000, due, None, koan.JobStatus.RUNNING))
    assert any("25%" in line and "2m0" in line and "left" in line for line in console.export_text().splitlines())


@pytest.mark.parametrize("width", [40, 80])
def test_a_bar_fits_its_line(local_engine, width):
    job, console = Halves.start(300).run().get(10), terminal(width)
    bars.show(job, console).get(30)
    line = last_line(console)
    assert "100%" in line
    assert "300 of" in line
    assert len(line) <= width


def test_what_a_job_says_steers_nothing(local_engine):
    job, console = Fails.start().named("\x1b[31m[bold]evil").run().get(10), terminal()
    assert bars.show(job, console).get(30) is koan.JobStatus.FAILED
    line = last_line(console)
    assert line.startswith("✗ [bold]evil")
    assert "[red]half\\nway[/red]" in line
    assert "50%" in line


def test_without_a_terminal_changes_are_lines(local_engine):
    job, console = Halves.start(30).run().get(10), terminal(is_terminal=False)
    assert bars.show(job, console).get(30) is koan.JobStatus.COMPLETED
    text = console.export_text()
    assert "━" not in text
    assert f"Halves {job.id}  completed  100%  30 of 30 items, 15 failed" in text


def test_show_progress_shows_on_standard_output_and_names_what_is_missing(local_engine, capsys, monkeypatch):
    job = Halves.start(30).run().get(10)
    assert job.show_progress().get(30) is koan.JobStatus.COMPLETED
    assert f"{job.id}  completed  100%" in capsys.readouterr().out
    monkeypatch.delitem(sys.modules, "koan_ray.cli.bars")
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(koan.ConfigurationError, match=r"koan-ray\[cli\]"):
        job.show_progress()
