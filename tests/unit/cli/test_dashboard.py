"""What ``koan-ray dashboard`` writes, and what it leaves alone."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from koan_ray.cli.app import app
from koan_ray.domain.measures import INSTRUMENTS
from koan_ray.runtime.ray.dashboard import grafana


def run(*arguments: str, code: int = 0):
    done = CliRunner().invoke(app, ["dashboard", *map(str, arguments)])
    assert done.exit_code == code, (done.output, done.exception)
    return done


@pytest.fixture
def modules(tmp_path):
    """A Ray's modules, with one of its own."""
    (tmp_path / "modules" / "node").mkdir(parents=True)
    (tmp_path / "modules" / "node" / "__init__.py").touch()
    return tmp_path / "modules"


def test_the_page_is_installed_and_removed_without_a_trace(modules):
    assert "not installed" in run("status", "--modules", modules, code=1).stdout
    assert "installed in" in run("install", "--modules", modules).stdout
    assert sorted(path.name for path in (modules / "koan").iterdir()) == ["__init__.py", "koan_head.py"]
    assert json.loads(run("status", "--json", "--modules", modules).stdout)["current"] is True
    run("install", "--modules", modules)
    (modules / "koan" / "__pycache__").mkdir()
    (modules / "koan" / "__pycache__" / "koan_head.cpython-311.pyc").touch()
    assert "removed" in run("remove", "--modules", modules).stdout
    assert [path.name for path in modules.iterdir()] == ["node"]
    assert "was not installed" in run("remove", "--modules", modules).stdout


def test_a_stub_of_another_version_is_told_and_brought_up_to_date(modules):
    run("install", "--modules", modules)
    stub = modules / "koan" / "koan_head.py"
    stub.write_text(stub.read_text() + "# older\n")
    assert "by another version" in run("status", "--modules", modules, code=1).stdout
    run("install", "--modules", modules)
    run("status", "--modules", modules)


def test_what_others_have_put_there_is_left_alone(modules):
    (modules / "koan").mkdir()
    (modules / "koan" / "__init__.py").write_text("theirs = 1\n")
    assert "was not written by koan-ray" in run("install", "--modules", modules, code=2).stderr
    assert "nothing was deleted" in run("remove", "--modules", modules, code=2).stderr
    assert (modules / "koan" / "__init__.py").read_text() == "theirs = 1\n"


def exprs(board) -> list[str]:
    return [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]


def test_the_board_asks_for_what_is_published_by_labels_that_it_has():
    by_name = {each.name: each for each in INSTRUMENTS}
    asked = set()
    for expr in exprs(grafana.board()):
        (metric,) = re.findall(r"ray_koan_(\w+)\{", expr)
        name = re.sub(r"_(total|bucket)$", "", metric) if metric not in by_name else metric
        asked.add(name)
        suffix = {"counter": "_total", "gauge": "", "histogram": "_bucket"}[by_name[name].type]
        assert metric == name + suffix
        labels = {"engine", "le", *by_name[name].labels}
        (by,) = re.findall(r"by \(([^)]*)\)", expr)
        assert {label.strip() for label in by.split(",")} <= labels
        assert set(re.findall(r"[{,](\w+)=", expr)) <= labels
    assert {"queue_depth", "root_progress", "run_seconds", "executions_lost", "fenced_writes", "unroutable"} <= asked


def test_panels_do_not_overlap_and_have_numbers_of_their_own():
    panels = grafana.board()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len(panels)


def test_the_board_is_written_to_standard_output_a_file_or_a_folder(tmp_path):
    assert json.loads(run("grafana").stdout) == grafana.board()
    run("grafana", "--out", tmp_path / "mine.json")
    run("grafana", "--out", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [grafana.OWN_FILE, "mine.json"]
    assert json.loads((tmp_path / "mine.json").read_text())["uid"] == grafana.UID
    assert "cannot be written" in run("grafana", "--out", tmp_path / "no" / "such.json", code=2).stderr


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Ray leaves the file open that it reads
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_panels_are_added_to_rays_own_board_once(tmp_path):
    from ray.dashboard.modules.metrics.grafana_dashboard_factory import generate_default_grafana_dashboard

    text, uid = generate_default_grafana_dashboard()
    path = tmp_path / grafana.RAYS_FILE
    path.write_text(text)
    run("grafana", "--merge", path)
    once = path.read_text()
    run("grafana", "--merge", path)
    assert path.read_text() == once
    before, after = json.loads(text), json.loads(once)
    assert after["uid"] == before.get("uid", uid)
    assert after["panels"][: len(before["panels"])] == before["panels"]
    added = after["panels"][len(before["panels"]) :]
    assert (added[0]["title"], len(added)) == (grafana.ROW_TITLE, len(grafana.board()["panels"]) + 1)
    assert len({panel["id"] for panel in after["panels"]}) == len(after["panels"])
    assert {"engine", "datasource"} <= {each["name"] for each in after["templating"]["list"]}
    assert exprs(after)[-1] == exprs(grafana.board())[-1]


def test_what_is_no_board_is_left_alone(tmp_path):
    for text in ("{", "[]", '{"panels": 1}'):
        (tmp_path / "x.json").write_text(text)
        assert "--merge: " in run("grafana", "--merge", tmp_path / "x.json", code=2).stderr
        assert (tmp_path / "x.json").read_text() == text
    assert "cannot be read" in run("grafana", "--merge", tmp_path / "none.json", code=2).stderr
