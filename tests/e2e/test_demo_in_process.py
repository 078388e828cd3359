"""The demo and the command line, called in this process."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from typer.testing import CliRunner

import koan_ray as koan
from koan_ray.cli import census, demo
from koan_ray.cli.app import app
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


@pytest.fixture
def folder(tmp_path):
    for n in range(5):
        (tmp_path / f"m{n}.py").write_text(SOURCE)
    (tmp_path / "big").mkdir()
    for n in range(170):
        (tmp_path / "big" / f"m{n}.py").write_text("x = 1\n")
    (tmp_path / "bad.py").write_text("def bad(:\n")
    return tmp_path


def test_packages_are_found_split_and_gathered(folder):
    found = list(census.find_packages([str(folder)]))
    assert Counter(package.name for package in found) == Counter(["big [1]", "big [2]", "6 files of small packages"])
    assert sum(len(package.files) for package in census.find_packages([str(folder)], limit=7)) == 7
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
    assert "1 job actors" in run(app, ["down", "--namespace", namespace]).stdout
    gone = run(app, ["status", "--namespace", namespace])
    assert isinstance(gone.exception, koan.RuntimeUnavailableError)
    end_namespace(namespace)
