"""``koan-ray jobs``, run in this process against its own engine."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import textwrap
import threading
import time
from datetime import datetime

import pytest
import ray
from pydantic import BaseModel
from typer.testing import CliRunner

import koan_ray as koan
from koan_ray.cli.app import app

NO_SUCH = "0198f0c2-7b7e-7cc2-a1f5-2f1d1e6a9b10"


class Mail(BaseModel):
    to: str
    size: int = 1


class SendMail(koan.Job[Mail, str]):
    async def execute(self, context, progress, cancellation):
        progress.report(1, 2, "half way")
        return f"sent to {context.to}"


class BadMail(koan.Job[Mail, str]):
    retry = koan.RetryPolicy(max_attempts=2, initial_delay=0.01)

    def execute(self, context, progress, cancellation):
        raise ValueError(f"no such \x1b[31muser {context.to}")


class Halves(koan.FiniteJob[int, int, int]):
    def get_items(self, context):
        return range(context)

    def process_item(self, item, index, progress):
        if item % 2 == 0:
            raise ValueError("no half \x1b[31mof it")
        return koan.ItemResult.success()

    def build_result(self, summary):
        return summary.processed_items


class AtMostThree(Halves):
    """Fails with more than three failed items; it goes on one by one, so that what is done is what is counted."""

    retry = koan.RetryPolicy(max_attempts=1)
    items = koan.ItemOptions(max_failed_items=3, max_workers=1, chunk_size=1)
    begun: list[int] = []

    def process_item(self, item, index, progress):
        self.begun.append(item)
        return super().process_item(item, index, progress)


class Gated(koan.Job[int, int]):
    gates: dict[int, threading.Event] = {}

    def execute(self, context, progress, cancellation):
        progress.report(0.25, "waiting at the gate")
        self.gates[context].wait(60)
        progress.report(0.75, "through the gate")
        return context


class Parent(koan.Job[int, int]):
    async def execute(self, context, progress, cancellation):
        children = [await self.start_child(SendMail, Mail(to=f"u{n}")).named(f"child {n}").run() for n in range(context)]
        for child in children:
            await child.wait()
        return len(children)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    Gated.gates.clear()


def run(*arguments: str, typed: str | None = None, code: int = 0):
    done = CliRunner().invoke(app, list(arguments), input=typed)
    assert done.exit_code == code, (done.output, done.exception)
    assert "\x1b" not in done.output
    return done


def objects(*arguments: str) -> list[dict]:
    return [json.loads(line) for line in run(*arguments).stdout.splitlines()]


def started(job_type, context, **metadata):
    return job_type.start(context).with_metadata(**metadata).run().get(10)


def ended(job):
    with contextlib.suppress(koan.JobFailedError, koan.JobCancelledError):
        job.wait().get(20)
    return job


@pytest.fixture
def some(local_engine):
    """Three mails sent, two that failed, for two tenants."""
    sent = [ended(started(SendMail, Mail(to=f"u{n}"), tenant_id="acme" if n else "other", n=n)) for n in range(3)]
    failed = [ended(started(BadMail, Mail(to="x"), tenant_id="acme")) for _ in range(2)]
    return sent, failed


def test_list_shows_whole_ids_at_every_width(some, monkeypatch):
    sent, failed = some
    for columns in ("80", "120"):
        monkeypatch.setenv("COLUMNS", columns)
        lines = run("jobs", "list").stdout.splitlines()
        assert len(lines) == 6
        assert max(map(len, lines)) <= int(columns)
        assert [line.split()[0] for line in lines[1:]] == [job.id for job in [*sent, *failed][::-1]]
    assert "ValueError: no such user x" in "\n".join(lines)


def test_list_takes_every_filter(some):
    sent, failed = some

    def ids(*arguments: str) -> set[str]:
        return set(run("jobs", "list", "--quiet", *arguments).stdout.split())

    assert ids("--kind", "SendMail") == {job.id for job in sent}
    assert ids("-k", "SendMail", "-k", "BadMail", "-s", "failed,cancelled") == {job.id for job in failed}
    assert ids("-m", "tenant_id=acme", "-m", "n=1") == {sent[1].id}
    assert ids("--text", "NO SUCH") == {job.id for job in failed}
    assert ids("--created-after", "1h") == ids("--completed-before", "2999-01-01") == {job.id for job in [*sent, *failed]}
    assert ids("--created-before", "1h") == ids("--name", "nobody") == ids("--correlation", "nobody") == set()
    assert ids("--parent", NO_SUCH) == set()
    assert ids("--source", "memory", "--order-by", "created_at", "-n", "1") == {sent[0].id}
    assert objects("jobs", "list", "--count", "--json", "-k", "BadMail") == [{"count": 2}]
    assert run("jobs", "list", "--count").stdout == "5\n"


def test_list_pages_by_the_cursor_it_tells(some, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["koan-ray", "jobs", "list", "--quiet", "-n", "2"])
    seen, arguments = [], ["jobs", "list", "--quiet", "-n", "2"]
    while True:
        done = run(*arguments)
        seen += done.stdout.split()
        if "There are more" not in done.stderr:
            break
        assert "koan-ray jobs list --quiet -n 2 --cursor " in done.stderr
        arguments = ["jobs", "list", "--quiet", "-n", "2", "--cursor", done.stderr.split()[-1]]
    assert seen == run("jobs", "list", "--all", "--quiet").stdout.split()
    assert len(seen) == 5
    assert "--all: needs --json or --quiet" in run("jobs", "list", "--all", code=2).stderr


def test_json_has_the_attributes_of_a_job(some):
    sent, _ = some
    (found,) = objects("jobs", "list", "--json", "-m", "n=0")
    assert set(found) == {
        "id", "kind", "name", "description", "status", "reason", "progress", "progress_message", "current_step",
        "total_steps", "items", "estimated_completion", "attempts", "last_error", "cancel_requested", "correlation_id",
        "parent_job_id", "metadata", "created_at", "queued_at", "started_at", "completed_at", "duration_s", "last_modified",
    }  # fmt: skip
    assert (found["id"], found["status"], found["progress"]) == (sent[0].id, "completed", 1.0)
    assert found["metadata"] == {"tenant_id": "other", "n": 0}
    assert datetime.fromisoformat(found["created_at"]) == sent[0].created_at
    assert found["duration_s"] >= 0


def test_show_tells_everything_of_a_job(some):
    (sent, *_), (failed, *_) = some
    shown = run("jobs", "show", failed.id).stdout
    for text in ("BadMail", "✗ failed", failed.id, "exhausted", "tenant_id=acme", "Traceback", '"to": "x"', "executions"):
        assert text in shown
    assert "no such user x" in shown
    assert "sent to u0" in run("jobs", "show", sent.id).stdout
    found = json.loads(run("jobs", "show", failed.id, "--json").stdout)
    assert found["context"] == {"to": "x", "size": 1}
    assert found["error"]["type"] == "ValueError"
    assert [one["reason"] for one in found["executions"]] == ["retry", "failed"]


def test_executions_are_listed_with_traces_on_request(some):
    _, (failed, *_) = some
    assert "Traceback" not in run("jobs", "executions", failed.id).stdout
    assert run("jobs", "executions", "--trace", failed.id).stdout.count("Traceback") == 2
    assert [one["attempt_number"] for one in objects("jobs", "executions", "--json", failed.id)] == [1, 2]


def test_dead_items_are_listed(local_engine):
    job = Halves.start(5).run().get(30)
    assert job.wait().get(30) == 2
    (shown,) = objects("jobs", "list", "--json", "--kind", "Halves")
    assert shown["items"] == {"total": 5, "processed": 2, "skipped": 0, "failed": 3}
    dead = objects("jobs", "failed-items", "--json", job.id)
    assert sorted((one["index"], one["item"], one["attempts"]) for one in dead) == [(0, 0, 1), (2, 2, 1), (4, 4, 1)]
    table = run("jobs", "failed-items", "--trace", job.id).stdout
    assert table.count("no half of it") >= 3
    assert table.count("Traceback") == 3
    whole = SendMail.start(Mail(to="x")).run().get(30)
    assert run("jobs", "list", "--items", "--quiet").stdout.split() == [job.id]
    assert run("jobs", "list", "--no-items", "--quiet").stdout.split() == [whole.id]
    assert "No item" in run("jobs", "failed-items", whole.id).stderr
    run("jobs", "failed-items", NO_SUCH, code=3)


def test_dead_items_are_run_again_alone(local_engine):
    job = ended(started(Halves, 5))
    again = run("jobs", "retry-failed-items", job.id).stdout
    assert again.startswith(f"{job.id}: its 3 failed items run again as ")
    second = ended(koan.Jobs.get(again.split()[-1]).get(10))
    assert (second.refresh().get(10).items_total, second.items_failed) == (3, 3)
    (told,) = objects("jobs", "retry-failed-items", "--json", job.id)
    assert (told["id"], told["items_total"]) == (job.id, 3)
    assert ended(koan.Jobs.get(told["retried_as"]).get(10)).status is koan.JobStatus.COMPLETED

    without = ended(started(Halves, 0))
    done = run("jobs", "retry-failed-items", without.id, job.id, code=1)
    assert f"job {without.id}: has no failed items" in done.stderr
    assert "run again as" in done.stdout, "the others are tried all the same"
    run("jobs", "retry-failed-items", NO_SUCH, code=3)
    run("jobs", "retry-failed-items", code=2)


def test_a_job_over_items_is_resumed(local_engine):
    job = ended(started(AtMostThree, 20))
    assert job.refresh().get(10).status is koan.JobStatus.FAILED
    for _ in range(10):  # three more may fail in each
        (told,) = objects("jobs", "retry", "--resume", "--json", job.id)
        job = ended(koan.Jobs.get(told["retried_as"]).get(10)).refresh().get(10)
        if job.status is koan.JobStatus.COMPLETED:
            break
    assert (job.result, job.items_failed) == (10, 10), "what has ended before is counted and not done again"
    assert sorted(AtMostThree.begun) == list(range(20))

    (failed,) = [ended(started(BadMail, Mail(to="x")))]
    assert "has no checkpoint to go on from" in run("jobs", "retry", "--resume", failed.id, code=1).stderr
    assert "--resume" in run("jobs", "retry", "--help").stdout


def test_a_tree_is_shown_from_any_of_its_jobs(local_engine):
    parent = ended(started(Parent, 3))
    children = parent.get_children().get(10)
    shown = run("jobs", "tree", parent.id).stdout
    assert all(f"child {n}" in shown for n in range(3))
    assert run("jobs", "tree", "--up", children[1].id).stdout == shown
    assert len(run("jobs", "tree", children[1].id).stdout.splitlines()) == 1
    found = json.loads(run("jobs", "tree", "--json", "-n", "2", parent.id).stdout)
    assert ([child["id"] for child in found["children"]], found["more"]) == ([child.id for child in children[:2]], True)
    assert f"… and more: koan-ray jobs list --parent {parent.id}" in run("jobs", "tree", "-n", "2", parent.id).stdout


def test_exit_codes_tell_what_went_wrong(some):
    for command in ("show", "tree", "executions", "cancel", "retry", "watch"):
        assert "not found" in run("jobs", command, NO_SUCH, code=3).stderr
    assert "not found" in run("jobs", "remove", "--yes", NO_SUCH, code=3).stderr
    for command in (["show"], ["tree"], ["executions"], ["cancel"], ["retry"], ["watch"], ["remove", "--yes"]):
        assert "An id is a UUID" in run("jobs", *command, "\x1b[1mx", code=2).stderr
    assert "expected one or several of" in run("jobs", "list", "-s", "sleeping", code=2).stderr
    assert "does not belong to a query" in run("jobs", "list", "--cursor", "zzz", code=2).stderr
    assert "limit" in run("jobs", "list", "-n", "0", code=2).stderr
    (sent, *_), _ = some
    assert "only a failed or cancelled job" in run("jobs", "retry", sent.id, code=1).stderr


def test_submit_checks_the_context_and_names_the_fields(local_engine, tmp_path):
    def refused(*arguments: str) -> str:
        return run("jobs", "submit", *arguments, code=2).stderr

    assert "to: Field required; size: Input should be a valid integer" in refused("SendMail", "-c", '{"size": "x"}')
    assert "Invalid JSON" in refused("SendMail", "-c", "{")
    assert "--context: kind 'SendMail' takes a context, none was given" in refused("SendMail")
    told = refused("Nothing", "-c", "1")
    assert "job kind 'Nothing' is not defined in this process" in told
    assert "--module" in told
    assert "no_such_module' (--module" in refused("SendMail", "-M", "no_such_module", "-c", "{}")
    assert "has no job class 'Mail'" in refused(f"{__name__}:Mail", "-c", "{}")
    assert "--metadata: expected KEY=VALUE" in refused("SendMail", "-c", '{"to": "x"}', "-m", "acme")
    assert "--delay: expected" in refused("SendMail", "-c", '{"to": "x"}', "--delay", "soon")
    assert "this engine has no such source" in refused("SendMail", "-c", '{"to": "x"}', "--persist")
    assert koan.Jobs.count().get(10) == 0


def test_submit_starts_a_job_as_it_was_told(local_engine, tmp_path):
    (tmp_path / "context.json").write_text('{"to": "file"}')
    options = ["-m", "n=1", "-m", "tenant_id=acme", "--name", "mail", "--correlation", "abc", "--delay", "1h"]
    job = koan.Jobs.get(run("jobs", "submit", "SendMail", "-c", "@context.json", "--quiet", *options).stdout.strip()).get(10)
    assert (job.context, job.metadata) == (Mail(to="file"), {"n": 1, "tenant_id": "acme"})
    assert (job.name, job.correlation_id, job.status) == ("mail", "abc", koan.JobStatus.QUEUED)
    found = json.loads(run("jobs", "submit", f"{__name__}:SendMail", "-c", "-", "--json", typed='{"to": "stdin"}').stdout)
    assert (found["kind"], found["context"]["to"]) == ("SendMail", "stdin")


def test_submit_waits_and_ends_as_the_job_does(local_engine):
    assert "sent to u1" in run("jobs", "submit", "SendMail", "-c", '{"to": "u1"}', "--wait").stdout
    failed = run("jobs", "submit", "BadMail", "-c", '{"to": "u1"}', "--wait", code=1)
    assert "no such user u1" in failed.stdout
    found = json.loads(run("jobs", "submit", "SendMail", "-c", '{"to": "u1"}', "-w", "--json").stdout)
    assert (found["status"], found["result"]) == ("completed", "sent to u1")


def test_kinds_come_from_modules_of_the_command_line_and_of_the_settings(local_engine, tmp_path, monkeypatch):
    code = """
        import koan_ray as koan

        @koan.job(kind="from-%s")
        def work(n: int) -> int:
            return n + 1
    """
    for name in ("cli_jobs_one", "cli_jobs_two"):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(code % name))
    (tmp_path / "broken_jobs.py").write_text("1/0")
    (tmp_path / "koan.toml").write_text('[jobs]\nmodules = ["cli_jobs_one"]\n')
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert "2" in run("jobs", "submit", "from-cli_jobs_one", "-c", "1", "-w").stdout
    assert "2" in run("jobs", "submit", "from-cli_jobs_two", "-c", "1", "-w", "-M", "cli_jobs_two").stdout
    assert "ZeroDivisionError" in run("jobs", "submit", "x", "-M", "broken_jobs", code=2).stderr


def test_cancel_by_id_and_by_filter(local_engine):
    later = [SendMail.start(Mail(to=f"u{n}")).delayed(3600).with_metadata(n=n).run().get(10) for n in range(4)]
    assert run("jobs", "cancel", later[0].id, "--reason", "not today").stdout == f"{later[0].id} cancelled\n"
    assert koan.Jobs.get(later[0].id).get(10)._view.reason == "not today"
    asked = run("jobs", "cancel", "--kind", "SendMail", typed="n\n", code=1)
    assert "Cancel 3 jobs?" in asked.stderr
    assert koan.Jobs.count(status="queued").get(10) == 3
    assert "Cancel 1 job?" in run("jobs", "cancel", "-m", "n=1", typed="y\n").stderr
    done = run("jobs", "cancel", "--kind", "SendMail", "--yes", "--json", "--limit", "1").stdout
    assert json.loads(done) == {"id": later[2].id, "status": "cancelled"}
    assert "No jobs to cancel" in run("jobs", "cancel", "-k", "Nobody").stderr
    assert "either ids of jobs, or filters" in run("jobs", "cancel", code=2).stderr
    assert "not both" in run("jobs", "cancel", later[3].id, "-k", "SendMail", code=2).stderr
    assert koan.Jobs.count(status="queued").get(10) == 1


def test_several_ids_are_all_tried_and_the_worst_is_told(some):
    sent, failed = some
    done = run("jobs", "retry", sent[0].id, NO_SUCH, failed[0].id, code=3)
    assert f"{failed[0].id} runs again as " in done.stdout
    assert len(done.stderr.splitlines()) == 2


def test_retry_and_remove_by_filter(some):
    _, failed = some
    retried = objects("jobs", "retry", "--text", "no such", "--yes", "--json")
    assert [one["id"] for one in retried] == [job.id for job in failed]
    for one in retried:
        ended(koan.Jobs.get(one["retried_as"]).get(10))
    assert "Remove 3 jobs?" in run("jobs", "remove", "-k", "SendMail", typed="y\n").stderr
    assert run("jobs", "list", "--count").stdout == "4\n"
    assert "Remove 1 job?" in run("jobs", "remove", failed[0].id, typed="y\n").stderr
    assert "not found" in run("jobs", "show", failed[0].id, code=3).stderr


def test_watch_tells_lines_to_the_end_and_how_it_was(local_engine):
    Gated.gates[1] = threading.Event()
    job = started(Gated, 1)
    threading.Timer(0.5, Gated.gates[1].set).start()
    done = run("jobs", "watch", job.id)
    assert f"Gated {job.id}  running  25%  waiting at the gate" in done.stderr
    assert f"Gated {job.id}  completed  100%" in done.stderr
    assert "✓ completed" in done.stdout
    updates = objects("jobs", "watch", "--json", job.id)
    assert (updates[-1]["status"], updates[-1]["progress"]) == ("completed", 1.0)


def test_watch_ends_as_its_jobs_do(some):
    sent, failed = some
    run("jobs", "watch", sent[0].id, sent[1].id)
    done = run("jobs", "watch", sent[0].id, failed[0].id, code=1)
    assert "Traceback" in done.stdout
    assert "Traceback" not in done.stderr


def test_ctrl_c_ends_the_watching_and_not_the_job(local_engine, eventually):
    Gated.gates[2] = threading.Event()
    job = started(Gated, 2)
    eventually(lambda: job.refresh().get(10).status is koan.JobStatus.RUNNING)
    main = threading.main_thread().ident
    threading.Timer(0.5, signal.pthread_kill, (main, signal.SIGINT)).start()
    done = run("jobs", "watch", job.id, code=130)
    assert "Stopped watching; 1 job goes on." in done.stderr
    Gated.gates[2].set()
    assert job.wait().get(10) == 2


def test_more_ctrl_c_and_sigterm_end_the_watching_no_differently(local_engine, eventually):
    Gated.gates[4] = threading.Event()
    job = started(Gated, 4)
    eventually(lambda: job.refresh().get(10).status is koan.JobStatus.RUNNING)
    main = threading.main_thread().ident
    for number, delay in ((signal.SIGTERM, 0.5), (signal.SIGINT, 0.501), (signal.SIGINT, 0.51), (signal.SIGTERM, 0.6)):
        threading.Timer(delay, signal.pthread_kill, (main, number)).start()
    done = run("jobs", "watch", job.id, code=130)
    eventually(lambda: not any(isinstance(each, threading.Timer) for each in threading.enumerate()))
    assert "Stopped watching; 1 job goes on." in done.stderr
    Gated.gates[4].set()
    assert job.wait().get(10) == 4


def test_the_queue_is_told_of_until_ctrl_c(local_engine, eventually):
    Gated.gates[3] = threading.Event()
    job = started(Gated, 3)
    eventually(lambda: job.refresh().get(10).progress > 0)
    main = threading.main_thread().ident

    def end() -> None:
        Gated.gates[3].set()
        job.wait().get(10)
        time.sleep(1.5)
        signal.pthread_kill(main, signal.SIGINT)

    threading.Timer(1.2, end).start()
    done = run("jobs", "watch", "--json")
    states = [json.loads(line) for line in done.stdout.splitlines()]
    assert [state["status"] for state in states] == ["running"] * (len(states) - 1) + ["completed"]
    assert len(states) >= 2


def test_no_engine_is_its_own_exit_code(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # this process may be one of a cluster
    for arguments in (["list"], ["submit", "SendMail", "-c", '{"to": "x"}'], ["cancel", NO_SUCH], ["watch"]):
        assert "no Ray at '127.0.0.1:1'" in run("jobs", *arguments, code=4).stderr
    assert "no source keeps documents" in run("jobs", "list", "--documents", code=2).stderr
