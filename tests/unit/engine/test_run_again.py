"""Running a stored job again in a process that has its class, before or after the engine knows that."""

from __future__ import annotations

import pytest

import koan_ray as koan
from koan_ray import registry, testing
from koan_ray.errors import ConflictError, JobDefinitionError, KindNotIntroducedError


class Mail(koan.Job[int, int]):
    retry = koan.RetryPolicy(max_attempts=1)

    def execute(self, context, progress, cancellation) -> int:
        raise ConnectionError("down")


async def failed(engine):
    """Return the id of a stored job that has failed under another coordinator, which knew its class."""
    job = await Mail.start(1).persist().run()
    with pytest.raises(koan.JobFailedError):
        await job.wait()
    engine.crash()
    engine.launcher._kept.clear()  # another cluster, which nobody has sent the class to
    await engine.restart()
    return job.id


def engine():
    database = testing.MemoryDatabase()
    return testing.engine(sources={"default": lambda: testing.MemoryDocumentStore(database)})


def test_a_class_that_the_engine_does_not_know_yet_is_introduced_and_the_job_runs_again():
    async def scenario():
        async with engine() as made:
            job_id = await failed(made)
            again = await koan.Jobs.retry(job_id)
            assert again.kind == "Mail"
            with pytest.raises(koan.JobFailedError):
                await again.wait()

    testing.run(scenario())


def test_a_kind_that_no_process_has_is_refused_with_those_that_are_known_and_the_way_out(monkeypatch):
    async def scenario():
        async with engine() as made:
            job_id = await failed(made)
            monkeypatch.setattr(registry, "_by_kind", {})
            for ask in (koan.Jobs.retry, lambda job_id: koan.Jobs.retry(job_id, resume=True)):
                with pytest.raises(ConflictError, match=r"'Mail' to the engine \(known: none\); import its module") as got:
                    await ask(job_id)
                assert isinstance(got.value, KindNotIntroducedError)

    testing.run(scenario())


def test_a_class_that_cannot_be_shipped_is_refused_with_what_is_wrong_with_it(monkeypatch):
    async def scenario():
        async with engine() as made:
            job_id = await failed(made)

            def refuse(job_type):
                raise JobDefinitionError("Mail holds a lock")

            monkeypatch.setattr(made.session, "_terms", {})
            monkeypatch.setattr(made.session, "_ship", refuse)
            with pytest.raises(JobDefinitionError, match="holds a lock"):
                await koan.Jobs.retry(job_id)

    testing.run(scenario())
