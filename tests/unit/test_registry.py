"""Two classes of one kind: of two modules, of one, of a module that runs as ``__main__`` as well."""

from __future__ import annotations

import sys
import types

import pytest

import koan_ray as koan
from koan_ray import registry
from koan_ray.runtime.code import read, write

SOURCE = """
import koan_ray as koan

class Cleanup(koan.Job[int, str]):
    def execute(self, context, progress, cancellation) -> str:
        return {said!r}
"""


def module(name, said, *, file=None):
    made = types.ModuleType(name)
    sys.modules[name] = made
    exec(compile(SOURCE.format(said=said), file or f"/nowhere/{name}.py", "exec"), vars(made))
    return made


@pytest.fixture(autouse=True)
def forget_modules():
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("shop_"):
            del sys.modules[name]


def test_the_same_kind_from_another_module_is_refused_with_both_names_and_the_way_out():
    first = module("shop_billing", "billing")
    with pytest.raises(koan.JobDefinitionError, match=r"shop_stock\.Cleanup: shop_billing\.Cleanup .* kind = \"shop_stock"):
        module("shop_stock", "stock")
    assert registry.find("Cleanup") is first.Cleanup


def test_a_function_with_the_name_of_another_modules_job_is_refused_as_well():
    module("shop_billing", "billing")

    def Cleanup(context: int) -> str: ...

    Cleanup.__module__ = "shop_stock"
    with pytest.raises(koan.JobDefinitionError, match=r"@koan\.job"):
        koan.job(Cleanup)
    assert koan.job(kind="stock.Cleanup")(Cleanup).kind == "stock.Cleanup"


def test_a_class_that_is_defined_anew_in_its_module_takes_its_place():
    module("shop_billing", "old")
    new = module("shop_billing", "new").Cleanup
    assert registry.find("Cleanup") is new


def test_a_module_that_runs_as_main_and_is_imported_as_well_has_one_class(tmp_path):
    file = tmp_path / "shop.py"
    file.touch()
    main = module("shop_main", "main", file=str(file)).Cleanup
    main.__module__ = "__main__"
    again = module("shop_imported", "imported", file=str(file)).Cleanup
    assert registry.find("Cleanup") is again


def test_two_results_of_one_factory_are_two_classes():
    def cleanup_of(name):
        class Cleanup(koan.Job[int, str]):
            def execute(self, context, progress, cancellation) -> str: ...

        Cleanup.__module__ = name
        return Cleanup

    kept = cleanup_of("shop_billing")
    with pytest.raises(koan.JobDefinitionError):
        cleanup_of("shop_stock")
    assert registry.find("Cleanup") is kept


def test_a_class_of_a_function_that_has_ended_is_in_nobodys_way():
    def ended():
        class Cleanup(koan.Job[None, None]):
            def execute(self, context, progress, cancellation) -> None: ...

        Cleanup.__module__ = "shop_gone"

    ended()
    assert registry.find("Cleanup") is not None
    module("shop_stock", "stock")
    assert registry.find("Cleanup").__module__ == "shop_stock"


def test_a_process_that_runs_classes_of_others_refuses_none():
    blob = write(module("shop_billing", "billing").Cleanup)
    registry._by_kind.clear()
    first = read(blob)
    second = module("shop_stock", "stock").Cleanup
    assert registry.find("Cleanup") is second
    assert first.execute(None, 1, None, None) == "billing"


def test_a_class_that_was_loaded_again_travels_by_value_under_another_id(tmp_path, monkeypatch):
    import importlib
    import pickle

    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "shop_reloaded.py").write_text(SOURCE.format(said="first"))
    loaded = importlib.import_module("shop_reloaded")
    first = write(loaded.Cleanup)
    (tmp_path / "shop_reloaded.py").write_text(SOURCE.format(said="second"))
    second = write(importlib.reload(loaded).Cleanup)
    assert first != second
    assert pickle.loads(first)["reference"]["module"] == "shop_reloaded"
    assert pickle.loads(second)["reference"] is None


def test_a_module_that_was_loaded_before_it_was_changed_is_not_taken_for_the_new_one(tmp_path, monkeypatch):
    """As in a warm actor: what is on its disk is what the driver has, what it has loaded is the version before."""
    import importlib
    import pickle

    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    path = tmp_path / "shop_edited.py"
    path.write_text(SOURCE.format(said="first"))
    old = importlib.import_module("shop_edited")
    path.write_text(SOURCE.format(said="second"))
    del sys.modules["shop_edited"]
    registry._by_kind.clear()
    blob = write(importlib.import_module("shop_edited").Cleanup)
    assert pickle.loads(blob)["reference"] is not None
    sys.modules["shop_edited"] = old
    assert read(blob).execute(None, 1, None, None) == "second"
