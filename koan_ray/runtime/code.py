"""How job classes travel: by reference where the other side can import them, by value where it cannot.

A shipped class is a pickle of a small dict:

* ``module``, ``qualname``, ``digest``, ``path``: import it, with the driver's ``sys.path`` entry as a hint; the digest of
  the module's source, taken when the class was defined, says whether what is imported there is what the driver had;
* ``value``: the class by value (cloudpickle), for ``__main__``, notebooks, what was loaded again (`importlib.reload`), and
  as the fallback for everything that is not part of an installed distribution.

The coordinator keeps the bytes and never looks inside.
"""

from __future__ import annotations

import copyreg
import dataclasses
import hashlib
import importlib
import os
import pickle
import sys
import sysconfig
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import cloudpickle  # type: ignore[import-untyped]

from koan_ray.domain.status import Isolation
from koan_ray.errors import JobDefinitionError
from koan_ray.registry import accept_all, is_redefined, replace

if TYPE_CHECKING:
    from types import ModuleType

    from koan_ray.jobs import Job

# A dataclass compares with this one object: a copy of it, in a class by value, would be taken for a default.
copyreg.pickle(type(dataclasses.MISSING), lambda _missing: "MISSING")  # a name of its module
_lock = threading.Lock()  # register_pickle_by_value changes what every thread pickles
os.register_at_fork(after_in_child=_lock._at_fork_reinit)  # type: ignore[attr-defined]  # noqa: SLF001 - as in logging


class Shipping:
    """Writes classes; each is written once in a process."""

    def __init__(self) -> None:
        self._written: dict[type[Any], tuple[str, bytes]] = {}

    def ship(self, job_type: type[Any]) -> tuple[str, bytes]:
        """Return ``(code_id, bytes)`` of a class; equal classes have equal ids.

        Raises:
            JobDefinitionError: It can only travel by value, and holds something that cannot be pickled.
        """
        known = self._written.get(job_type)
        if known is None:
            blob = write(job_type)
            known = self._written[job_type] = (hashlib.blake2b(blob, digest_size=12).hexdigest(), blob)
        return known

    def load(self, code_id: str, blob: bytes) -> type[Job[Any, Any]]:
        """Return a shipped class; shipped on from here, it keeps its id."""
        job_type = read(blob)
        self._written[job_type] = (code_id, blob)
        return job_type


class LocalCode:
    """Shipping within one process: classes go by themselves, and are written only for child processes."""

    def __init__(self) -> None:
        self._types: dict[str, type[Any]] = {}

    def ship(self, job_type: type[Any]) -> tuple[str, bytes]:
        """Return ``(code_id, bytes)``; the bytes are empty for a class that cannot be pickled."""
        code_id = f"{job_type.__qualname__}@{id(job_type):x}"
        self._types[code_id] = job_type
        return code_id, write(job_type) if job_type.definition.isolation is Isolation.PROCESS else b""

    def load(self, code_id: str, _blob: bytes) -> type[Job[Any, Any]]:
        """Return the class itself."""
        return self._types[code_id]


def write(job_type: type[Any]) -> bytes:
    """Return a class in shipped form; see the module's docstring.

    Raises:
        JobDefinitionError: It can only travel by value, and holds something that cannot be pickled.
    """
    reference = _reference(job_type)
    value: bytes | None = None
    is_new = reference is not None and is_redefined(job_type)  # an actor that has imported its module has the one before
    if reference is None or is_new or not reference["installed"]:
        try:
            value = _by_value(job_type, alone=is_new)
            if is_new:
                reference = None
        except Exception as error:
            if reference is None:
                msg = (
                    f"job class {job_type.__qualname__!r} (defined in {job_type.__module__!r}) cannot be sent to the job "
                    f"actors: {type(error).__name__}: {error}. Create what cannot be pickled inside execute(), or move "
                    f"the class to a module that the cluster can import."
                )
                raise JobDefinitionError(msg) from error
    return pickle.dumps({"reference": reference, "value": value}, protocol=5)


def read(blob: bytes) -> type[Job[Any, Any]]:
    """Return the class that `write` wrote, importing its module or rebuilding it by value."""
    shipped = pickle.loads(blob)  # noqa: S301 - written by a driver of this cluster, which may run anything here anyway
    reference, value = shipped["reference"], shipped["value"]
    accept_all()  # two drivers may have classes of one kind, and each job runs its own
    job_type: type[Job[Any, Any]] | None = None
    if reference is not None:
        try:
            job_type = _import(reference, must_match=value is not None)
        except Exception:
            if value is None:
                raise
    if job_type is None:
        job_type = pickle.loads(value)  # noqa: S301 - as above
        replace(job_type.kind, job_type)  # a class rebuilt by value was not defined here
    return job_type


def _reference(job_type: type[Any]) -> dict[str, Any] | None:
    """Return where a class can be imported from; None if only by value."""
    module = sys.modules.get(job_type.__module__)
    if module is None or job_type.__module__ == "__main__" or "<locals>" in job_type.__qualname__:
        return None
    found: Any = module
    for name in job_type.__qualname__.split("."):
        found = getattr(found, name, None)
    if found is not job_type:
        return None
    file = getattr(module, "__file__", None)
    if file is None:
        return None
    return {
        "module": job_type.__module__,
        "qualname": job_type.__qualname__,
        "digest": job_type.definition.source_digest,
        "path": _root_of(module),
        "installed": _is_installed(file),
    }


def _by_value(job_type: type[Any], *, alone: bool) -> bytes:
    # With its whole package, because the parts of one that is not installed are missing over there as well.
    package = sys.modules.get(job_type.__module__.partition(".")[0])
    by_value = package is not None and package.__name__ != "__main__" and not _is_installed_module(package)
    if alone and not by_value:  # of an installed package that one module, which was loaded again
        package = sys.modules.get(job_type.__module__)
        by_value = package is not None and package.__name__ != "__main__"
    with _lock:
        if package is None or not by_value or package.__name__ in cloudpickle.list_registry_pickle_by_value():
            return cast("bytes", cloudpickle.dumps(job_type, protocol=5))
        cloudpickle.register_pickle_by_value(package)
        try:
            return cast("bytes", cloudpickle.dumps(job_type, protocol=5))
        finally:
            cloudpickle.unregister_pickle_by_value(package)


def _import(reference: dict[str, Any], *, must_match: bool) -> type[Job[Any, Any]]:
    module: Any = None
    try:
        module = importlib.import_module(reference["module"])
    except ModuleNotFoundError:
        path = reference["path"]
        if path is None or not Path(path).is_dir() or path in sys.path:
            raise
        sys.path.append(path)
        module = importlib.import_module(reference["module"])
    found: Any = module
    for name in reference["qualname"].split("."):
        found = getattr(found, name)
    if must_match and found.definition.source_digest != reference["digest"]:
        msg = f"module {reference['module']} differs from the driver's"
        raise ImportError(msg)
    return cast("type[Job[Any, Any]]", found)


def _root_of(module: ModuleType) -> str | None:
    """Return the directory from which the module was imported."""
    file = Path(module.__file__ or "")
    parents = module.__name__.count(".") + (file.name == "__init__.py")
    root = file.resolve().parent
    for _ in range(parents):
        root = root.parent
    return str(root) if root.is_dir() else None


def _is_installed_module(module: ModuleType) -> bool:
    return _is_installed(getattr(module, "__file__", None) or "")


_INSTALLED = tuple(
    {str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    | {str(Path(__file__).resolve().parent.parent)}  # koan_ray itself, also from a checkout
)


def _is_installed(file: str) -> bool:
    return str(Path(file).resolve()).startswith(_INSTALLED)
