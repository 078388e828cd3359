"""Archival policies as settings say them, and the commands that apply them."""

from __future__ import annotations

import json
import pickle

import pytest
from typer.testing import CliRunner

import koan_ray as koan
from koan_ray import wiring
from koan_ray.cli.app import app
from koan_ray.domain.archival import ArchivalPolicy
from koan_ray.domain.records import JobView
from koan_ray.domain.status import JobStatus
from koan_ray.errors import ConfigurationError
from koan_ray.runtime.ray import admin

JOBS = {"jobs": {"url": "mongodb://localhost/koan"}, "cold": {"url": "mongodb://localhost/cold"}}
DAY_S = 86_400.0


def resolved(**archival):
    return wiring.engine_settings(koan.Settings(archival=archival, sources=JOBS))


def test_by_default_every_job_moves_after_thirty_days():
    settings = wiring.engine_settings(koan.Settings())
    assert (settings.archives, settings.archive_interval_s) == (True, 3600.0)
    (policy,) = settings.archival_policies
    assert policy == ArchivalPolicy("default", older_than_s=30 * DAY_S, batch=500)
    assert set(policy.statuses) == {JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED}


def test_policies_come_first_and_take_what_they_leave_out_from_the_section():
    settings = resolved(
        retention="60d", batch=100, check_interval="5m",
        policies=[
            {"name": "mails", "kinds": "mail", "status": "completed", "keep_count": 9},
            {"name": "away", "older_than": "1d", "partition": "hot", "target_source": "cold", "batch": 7},
        ],
    )  # fmt: skip
    assert settings.archival_policies == (
        ArchivalPolicy("mails", (JobStatus.COMPLETED,), ("mail",), 60 * DAY_S, keep=9, batch=100),
        ArchivalPolicy("away", older_than_s=DAY_S, partition="hot", target_source="cold", batch=7),
        ArchivalPolicy(older_than_s=60 * DAY_S, batch=100),
    )
    assert pickle.loads(pickle.dumps(settings)) == settings
    assert settings != resolved(retention="60d")
    wiring.check_sources(settings)


def test_policies_are_read_from_the_file_and_from_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "koan.toml"
    file.write_text('[archival]\nretention = "7d"\n[[archival.policies]]\nname = "mails"\nkinds = ["mail"]\n')
    monkeypatch.setenv("KOAN_RAY_CONFIG_FILE", str(file))
    assert [policy.name for policy in koan.Settings().archival.resolved()] == ["mails", "default"]
    monkeypatch.setenv("KOAN_RAY_ARCHIVAL__POLICIES", '[{"name": "reports"}]')
    names = {policy.name: policy.older_than_s for policy in koan.Settings().archival.resolved()}
    assert names == {"reports": 7 * DAY_S, "default": 7 * DAY_S}


@pytest.mark.parametrize(
    ("archival", "problem"),
    [
        ({"retention": "soon"}, r"archival\.retention: expected a duration"),
        ({"batch": 0}, r"archival\.batch: "),
        ({"check_interval": 0}, r"archival\.check_interval: "),
        ({"policies": [{}]}, r"archival\.policies\.0\.name: "),
        ({"policies": [{"name": "a b"}]}, r"archival\.policies\.0\.name: "),
        (
            {"policies": [{"name": "a", "status": "running"}]},
            r"archival\.policies\.0\.status\.0: expected one or several of",
        ),
        (
            {"policies": [{"name": "a", "keep_coun": 3}]},
            r"archival\.policies\.0\.keep_coun: is no setting; did you mean 'keep_count'",
        ),
        ({"policies": [{"name": "a", "kinds": []}]}, r"archival\.policies\.0\.kinds"),
        (
            {"policies": [{"name": "a", "target_partition": "hot"}]},
            r"archival\.policies\.0: .*target_partition: expected 'arch",
        ),
        ({"policies": [{"name": "a"}, {"name": "a"}]}, r"archival\.policies: two policies are named 'a'"),
        ({"policies": [{"name": "default"}]}, r"archival\.policies: two policies are named 'default'"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named_by_its_path(archival, problem):
    with pytest.raises(ConfigurationError, match=problem):
        koan.Settings(archival=archival)


def test_a_policy_names_sources_that_are_there_and_keeps_executions_with_their_jobs():
    with pytest.raises(
        ConfigurationError, match=r"archival\.policies\.0\.target_source: there is no source 'attic' \(known: "
    ):
        wiring.check_sources(resolved(policies=[{"name": "a", "target_source": "attic"}]))
    parts = koan.Settings(
        sources=JOBS, jobs={"audit_source": "jobs"}, archival={"policies": [{"name": "a", "target_source": "cold"}]}
    )
    with pytest.raises(ConfigurationError, match=r"archival\.policies\.0\.target_source: jobs of 'jobs' keep their exec"):
        wiring.check_sources(wiring.engine_settings(parts))


def test_the_command_line_archives_and_restores(monkeypatch):
    asked = []

    def archive(address, namespace, *, dry_run):
        asked.append(dry_run)
        return {"default": {"due": 1200, "moved": 0 if dry_run else 1199, "mismatched": 0 if dry_run else 1}}

    view = JobView("an-id", "mail", "completed", b"1", 0.0)
    monkeypatch.setattr(admin, "archive", archive)
    monkeypatch.setattr(admin, "restore", lambda _address, _namespace, _job_id: view)
    run = CliRunner().invoke
    assert run(app, ["archive", "run"]).stdout == "default: 1,200 due, 1,199 moved, 1 mismatched\n"
    assert run(app, ["archive", "run", "--dry-run"]).stdout == "default: 1,200 due, nothing was moved\n"
    assert json.loads(run(app, ["archive", "run", "--json"]).stdout)["default"]["moved"] == 1199
    assert asked == [False, True, False]
    assert run(app, ["archive", "restore", "an-id"]).stdout == "mail an-id (completed) is out of the archive\n"
