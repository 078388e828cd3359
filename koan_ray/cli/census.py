"""The demo's jobs: a census of the Python source files on this machine.

``Census`` is one job over all files, each of which is parsed with `ast` by whichever job actor is free. A file that does not
parse is a dead item; the others are counted. ``Announce``, its child, tells a collector that a census begins; the collector
is not up yet, so its first attempts fail and it is retried.
"""

from __future__ import annotations

import ast
import json
import sysconfig
import tokenize
import urllib.error
import urllib.request
import warnings
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from koan_ray.domain.retry import RetryPolicy, RetryStrategy
from koan_ray.errors import NonRetryable
from koan_ray.finite import FiniteJob, ItemOptions, ItemResult
from koan_ray.jobs import Job

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from koan_ray.cancellation import CancellationToken
    from koan_ray.finite import FiniteSummary
    from koan_ray.progress import JobProgress

_SUMS = ("files", "lines", "functions", "classes", "imports", "complexity")
_BRANCHES = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.With, ast.AsyncWith, ast.Assert, ast.IfExp)


@dataclass
class CensusContext:
    """Where to look, at most how many files to read, and who is told."""

    roots: list[str]
    limit: int | None = None
    collector: str | None = None


class SourceFile(NamedTuple):
    """One item: a file, and the package or module that it belongs to."""

    package: str
    path: str


@dataclass
class Counts:
    """What was found in the files of a package. ``most_complex`` is (complexity, function, file)."""

    name: str
    files: int = 0
    lines: int = 0
    functions: int = 0
    classes: int = 0
    imports: int = 0
    complexity: int = 0
    most_complex: tuple[int, str, str] = (0, "", "")


class Census(FiniteJob[CensusContext, list[Counts], SourceFile]):
    """Counts everything, file by file."""

    items = ItemOptions(max_failed_items=0.5)

    def get_items(self, context: CensusContext) -> list[SourceFile]:
        """Find the files, and have the collector told."""
        if context.collector is not None:
            self.start_child(Announce, context.collector, key="announce").run().get()
        return list(find_files(context.roots, context.limit))

    def process_item(self, item: SourceFile, index: int, progress: JobProgress) -> ItemResult:
        """Count one file; one that is no Python fails for good, with the parser's own error."""
        counts = Counts(item.package)
        try:
            count_file(item.path, counts)
        except (SyntaxError, ValueError, OSError, RecursionError) as error:
            raise NonRetryable(error) from error
        return ItemResult.success(counts)

    def build_result(self, summary: FiniteSummary) -> list[Counts]:
        """Add up the files of each package."""
        packages: dict[str, Counts] = {}
        for row in summary.values:
            package = packages.setdefault(row["name"], Counts(row["name"]))
            for name in _SUMS:
                setattr(package, name, getattr(package, name) + row[name])
            complexity, function, path = row["most_complex"]
            package.most_complex = max(package.most_complex, (complexity, function, path))
        return list(packages.values())


class Announce(Job[str, str]):
    """Tells the collector that a census begins; tried again while the collector is not up."""

    retry = RetryPolicy(max_attempts=8, strategy=RetryStrategy.EXPONENTIAL_BACKOFF, initial_delay=0.5, max_delay=4)

    def execute(self, context: str, progress: JobProgress, cancellation: CancellationToken) -> str:
        """Post a short message and return the answer."""
        body = json.dumps({"census": self.parent_job_id}).encode()
        request = urllib.request.Request(context, data=body, headers={"Content-Type": "application/json"})  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:  # noqa: S310 - the demo's own address
                return str(answer.read().decode())
        except urllib.error.URLError as error:
            raise ConnectionError(f"collector: {error.reason}") from error


def default_roots() -> list[str]:
    """Return the standard library's directory and the one where packages are installed."""
    return [sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")]


def find_files(roots: Iterable[str], limit: int | None = None) -> Iterator[SourceFile]:
    """Yield the Python files below some directories, each once; ``limit`` in all."""
    return islice(_all_files(roots), limit)


def _all_files(roots: Iterable[str]) -> Iterator[SourceFile]:
    seen: set[Path] = set()
    for root in roots:
        base = Path(root)
        for entry in sorted(base.iterdir()) if base.is_dir() else [base]:
            if entry.name in {"site-packages", "__pycache__"}:
                continue
            for path in _files_of(entry):
                if path not in seen:
                    seen.add(path)
                    yield SourceFile(entry.stem, str(path))


def _files_of(entry: Path) -> list[Path]:
    return sorted(entry.rglob("*.py")) if entry.is_dir() else [entry] if entry.suffix == ".py" else []


def count_file(path: str, counts: Counts) -> None:
    """Add what is in a file.

    Raises:
        SyntaxError, ValueError: It is not Python, or not in the encoding that it says.
        OSError: It cannot be read.
    """
    with tokenize.open(path) as file:  # in the encoding that the file itself declares
        source = file.read()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's escape sequences
        tree = ast.parse(source, filename=path)
    counts.files += 1
    counts.lines += source.count("\n") + 1
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            counts.functions += 1
            complexity = cyclomatic(node)
            counts.complexity += complexity
            counts.most_complex = max(counts.most_complex, (complexity, node.name, path))
        elif isinstance(node, ast.ClassDef):
            counts.classes += 1
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            counts.imports += 1


def cyclomatic(function: ast.AST) -> int:
    """Return McCabe's number for a function: one, and one more for each decision."""
    n = 1
    for node in ast.walk(function):
        if isinstance(node, _BRANCHES):
            n += 1
        elif isinstance(node, ast.BoolOp):
            n += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            n += 1 + len(node.ifs)
    return n


def total(counted: Iterable[Counts]) -> dict[str, Any]:
    """Return the sums over all packages."""
    counted = list(counted)
    return {name: sum(getattr(counts, name) for counts in counted) for name in _SUMS}
