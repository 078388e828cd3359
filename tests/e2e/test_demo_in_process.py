"""The demo and the command line, called in this process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from collections import Counter

import pytest
from pymongo import MongoClient
from typer.testing import CliRunner

import koan_ray as koan
from koan_ray.cli import census, demo, dev, documents
from koan_ray.cli.app import app
from koan_ray.config import load_settings
from koan_ray.stores import embedded
from koan_ray.stores.embedded import DocumentServer
from tests.integration.conftest import end_namespace

SOURCE = """
import os
from a import b


class Thing:
    async def choose(self, a, c):
        with open(a) as f:
            pass
        for x in [y for y in a if y and c or a]:
            assert x
        return None
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch):
    """A working directory of its own: commands keep documents there, and read settings."""
    monkeypatch.chdir(tmp_path_factory.mktemp("work"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def folder(tmp_path):
    for n in range(5):
        (tmp_path / f"m{n}.py").write_text(SOURCE)
    (tmp_path / "big").mkdir()
    for n in range(170):
        (tmp_path / "big" / f"m{n}.py").write_text("x = 1\n")
    (tmp_path / "bad.py").write_text("def bad(:\n")
    return tmp_path


def test_files_are_found_with_their_packages(folder):
    found = list(census.find_files([str(folder)]))
    assert Counter(file.package for file in found) == Counter({"big": 170, "bad": 1, **{f"m{n}": 1 for n in range(5)}})
    assert len(list(census.find_files([str(folder), str(folder)], limit=7))) == 7
    assert len(list(census.find_files([str(folder), str(folder)]))) == 176  # each once
    assert all(map(len, census.default_roots()))


def test_a_file_is_counted(folder):
    counts = census.Counts("x")
    census.count_file(str(folder / "m0.py"), counts)
    assert (counts.files, counts.functions, counts.classes, counts.imports) == (1, 1, 1, 2)
    assert counts.complexity == 8
    with pytest.raises(SyntaxError):
        census.count_file(str(folder / "bad.py"), counts)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_demo_reports_what_it_found(folder, capsys, monkeypatch, is_terminal):
    monkeypatch.setattr(demo, "_COLLECTOR_IS_LATE_S", 0.3)
    if is_terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    assert demo.run("local", [str(folder)], None) == 0
    shown = capsys.readouterr().out
    for text in ("175 files", "1 files are not Python", "SyntaxError", "Executions of Announce", "Connection refused"):
        assert text in shown
    assert koan.client._current is None
    assert "Earlier censuses" not in shown
    assert "kept as documents" in shown


def test_a_second_demo_tells_of_the_first_and_the_doctor_reads_both(folder, capsys, monkeypatch):
    monkeypatch.setattr(demo, "_COLLECTOR_IS_LATE_S", 0.3)
    monkeypatch.setenv("COLUMNS", "120")
    run = CliRunner().invoke
    with server() as url, MongoClient(url) as client:  # which all commands share, and none of them ends
        assert demo.run("local", [str(folder)], 175) == 0
        capsys.readouterr()
        assert demo.run("local", [str(folder)], 20) == 0
        shown = capsys.readouterr().out
        assert "Earlier censuses" in shown
        (row,) = [line for line in shown.splitlines() if "completed" in line and line.startswith("│")]
        assert [cell.strip() for cell in row.split("│")][2:4] == ["174", "1"]
        sound = run(app, ["doctor"])
        assert (sound.exit_code, sound.stdout) == (0, "4 jobs read; nothing is wrong\n"), sound.stdout
        jobs = client.get_default_database().jobs
        wrong = jobs.find_one_and_update({"kind": "Census"}, {"$unset": {"result": ""}})
        jobs.update_one({"kind": "Census", "_id": {"$ne": wrong["_id"]}}, {"$set": {"rev": "many"}})
        found = run(app, ["doctor", "--source", "default"])
        assert found.exit_code == 1
        assert f"I6 job {wrong['_id']}: is completed and has no result  (source default)" in found.stdout
        assert "unreadable job" in found.stdout
        *problems, totals = map(json.loads, run(app, ["doctor", "--json"]).stdout.splitlines())
        assert totals == {"jobs": 3, "problems": 2}
        assert sorted((problem["invariant"], problem["source"]) for problem in problems) == [
            ("I6", "default"), ("unreadable", "default")
        ]  # fmt: skip
    assert run(app, ["doctor", "--source", "elsewhere"]).exit_code == 2


class server:
    """The document server of this directory, for a moment."""

    def __enter__(self):
        self._server = DocumentServer()
        return asyncio.run(self._server.start())

    def __exit__(self, *_):
        asyncio.run(self._server.stop())


def test_the_address_of_this_directory_starts_its_server_again(monkeypatch):
    with server() as url:
        pass
    monkeypatch.setenv("KOAN_RAY_SOURCES__DEFAULT__URL", url)  # as `.koan/env` has it
    with documents.documents(load_settings()) as where:
        assert where.url == url
        assert where.server is not None
        assert where.server.is_owner
    monkeypatch.setenv("KOAN_RAY_SOURCES__DEFAULT__URL", "mongodb://elsewhere/jobs")
    with documents.documents(load_settings()) as where:
        assert where == ("mongodb://elsewhere/jobs", None)
        assert where.overrides == {}


@pytest.mark.parametrize("why", ["asked for", "not installed"])
def test_the_demo_works_in_memory(folder, capsys, monkeypatch, why, tmp_path):
    monkeypatch.setattr(demo, "_COLLECTOR_IS_LATE_S", 0.1)
    monkeypatch.setenv("COLUMNS", "200")
    if why == "not installed":
        monkeypatch.setattr(embedded, "_COMMAND", "no-such-server")
    assert demo.run("local", [str(folder)], 20, memory=why == "asked for") == 0
    shown = capsys.readouterr().out
    assert ("Jobs are kept in memory only" in shown) is (why == "not installed")
    assert "kept as documents" not in shown
    assert "20 files" in shown or "19 files" in shown


@pytest.mark.ray
def test_dev_ends_what_it_has_started_and_takes_no_harm_from_a_second_ctrl_c(cluster, capsys, monkeypatch):
    monkeypatch.setenv("KOAN_RAY_ENGINE__NAMESPACE", "test-dev")
    explain = dev._explain

    def interrupt(*args):
        explain(*args)
        for delay in (0.5, 0.6, 1.0):
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)).start()

    monkeypatch.setattr(dev, "_explain", interrupt)
    assert dev.run(None) == 0
    shown = capsys.readouterr().out
    assert cluster in shown
    assert "koan-ray status --namespace test-dev" in shown
    assert koan.client._current is None
    gone = CliRunner().invoke(app, ["status", "--namespace", "test-dev"])
    assert gone.exit_code == 4


@pytest.mark.ray
def test_an_engine_on_a_cluster_is_shown_and_ended(cluster):
    @koan.job
    def one() -> int:
        return 1

    namespace = "test-admin"
    with koan.init(engine={"namespace": namespace}):
        assert one.start().run().get(timeout=30).wait(timeout=30).get() == 1
        run = CliRunner().invoke
        shown = run(app, ["status", "--namespace", namespace, "--json"])
        assert json.loads(shown.stdout)["jobs"] == {"completed": 1}
        assert "completed" in run(app, ["status", "--namespace", namespace]).stdout
    assert "with 1 job actor\n" in run(app, ["down", "--namespace", namespace]).stdout
    gone = run(app, ["status", "--namespace", namespace])
    assert gone.exit_code == 4
    end_namespace(namespace)
