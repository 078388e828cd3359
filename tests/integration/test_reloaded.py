"""A class that was changed and loaded again, on actors that have run the version before."""

from __future__ import annotations

import importlib
import sys

import pytest

import koan_ray as koan

pytestmark = pytest.mark.ray

HELPER = "def said():\n    return {said!r}\n"
SOURCE = """
import koan_ray as koan
from shop_reload.helper import said

class Says(koan.Job[None, str]):
    kind = "shop_reload.Says"

    def execute(self, context, progress, cancellation) -> str:
        return f"{version} {{said()}}"
"""


def test_a_warm_actor_runs_what_was_loaded_again(cluster, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    package = tmp_path / "shop_reload"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "helper.py").write_text(HELPER.format(said="one"))
    (package / "jobs.py").write_text(SOURCE.format(version="first"))
    with koan.init(cluster, engine={"max_actors": 1}):
        helper, jobs = (importlib.import_module(f"shop_reload.{name}") for name in ("helper", "jobs"))
        assert jobs.Says.start().run().get(60).wait(60).get() == "first one"
        (package / "jobs.py").write_text(SOURCE.format(version="second"))
        importlib.reload(jobs)
        assert jobs.Says.start().run().get(60).wait(60).get() == "second one"
        (package / "helper.py").write_text(HELPER.format(said="two"))  # what the class uses is changed, its module is not
        importlib.reload(helper)
        importlib.reload(jobs)
        assert jobs.Says.start().run().get(60).wait(60).get() == "second two"
    for name in ("shop_reload.helper", "shop_reload.jobs", "shop_reload"):
        del sys.modules[name]
