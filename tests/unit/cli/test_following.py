"""``koan-ray jobs watch``: what is told of jobs that tell nothing themselves."""

from __future__ import annotations

import asyncio
import threading

import koan_ray as koan
from koan_ray.cli import bars, following

seen_running = threading.Event()


class Silent(koan.Job[None, None]):
    """Reports nothing; ends when it was seen running, or after five seconds."""

    async def execute(self, context, progress, cancellation) -> None:
        for _ in range(500):
            if seen_running.is_set():
                return
            await asyncio.sleep(0.01)


def test_a_job_that_reports_nothing_is_seen_to_run(local_engine, monkeypatch, capsys):
    tell = bars.Lines.tell

    def tell_and_remember(self, update):
        tell(self, update)
        if update.status is koan.JobStatus.RUNNING:
            seen_running.set()

    monkeypatch.setattr(bars.Lines, "tell", tell_and_remember)
    monkeypatch.setattr(following, "_LOOK_EVERY_S", 0.01)
    jobs = [Silent.start().delayed(0.3).run().get(10), Silent.start().delayed(0.3).run().get(10)]
    assert following.follow(jobs, machine=False) == 0
    told = capsys.readouterr().err.splitlines()
    for job in jobs:
        assert [line.split()[2] for line in told if job.id in line] in (
            ["queued", "running", "completed"], ["queued", "completed"],
        ), told  # fmt: skip
    assert any("running" in line for line in told)
