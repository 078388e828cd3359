"""The demo's jobs: a census of the Python source files on this machine.

``Census`` (parent) starts one ``PackageCensus`` for each group of packages; those parse every file with `ast`. A file that
does not parse becomes a ``ParseFile`` job of its own, which fails for good. ``Announce`` tells a collector that a census
begins; the collector is not up yet, so its first attempts fail and it is retried.
"""

from __future__ import annotations

import ast
import asyncio
import json
import sysconfig
import tokenize
import urllib.error
import urllib.request
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koan_ray.domain.retry import RetryPolicy, RetryStrategy
from koan_ray.errors import JobCancelledError, JobFailedError
from koan_ray.jobs import Job

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from koan_ray.cancellation import CancellationToken
    from koan_ray.progress import JobProgress

_FILES_PER_JOB = 150  # tiny packages share a job, so that the tree stays readable
_BRANCHES = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.With, ast.AsyncWith, ast.Assert, ast.IfExp)


@dataclass
class CensusContext:
    """Where to look, at most how many files to read, and who is told."""

    roots: list[str]
    limit: int | None = None
    collector: str | None = None


@dataclass
class Package:
    """Files that are counted together; ``name`` is for people."""

    name: str
    files: list[str]


@dataclass
class Counts:
    """What was found in some files. ``most_complex`` is (complexity, function, file), ``broken`` (file, why)."""

    name: str
    files: int = 0
    lines: int = 0
    functions: int = 0
    classes: int = 0
    imports: int = 0
    complexity: int = 0
    most_complex: tuple[int, str, str] = (0, "", "")
    broken: list[tuple[str, str]] = field(default_factory=list)


class Census(Job[CensusContext, list[Counts]]):
    """Counts everything, one child job for each package."""

    async def execute(self, context: CensusContext, progress: JobProgress, cancellation: CancellationToken) -> list[Counts]:
        """Start the children, and report how many have ended."""
        if context.collector is not None:
            await self.start_child(Announce, context.collector).run()
        packages = await asyncio.to_thread(lambda: list(find_packages(context.roots, context.limit)))
        progress.report(0, len(packages), "starting")
        jobs = await PackageCensus.start_many(packages).child_of(self).run()
        counted = []
        waits = [asyncio.ensure_future(job.wait()) for job in jobs]
        try:
            for n, waiting in enumerate(asyncio.as_completed(waits), start=1):
                try:
                    counted.append(await waiting)
                except JobFailedError as error:  # one package that cannot be counted does not end the census
                    problem = f"{error.error_type}: {error.error_message}"
                    counted.append(Counts(error.job_id, broken=[(error.job_id, problem)]))
                progress.report(n, len(packages), f"{n} of {len(packages)} package jobs")
        finally:
            for wait in waits:  # nobody is left to be told when the census is cancelled
                wait.cancel()
        return counted


class PackageCensus(Job[Package, Counts]):
    """Parses the files of one package."""

    def execute(self, context: Package, progress: JobProgress, cancellation: CancellationToken) -> Counts:
        """Count file by file; what does not parse becomes a job of its own."""
        counts = Counts(context.name)
        broken = []
        for n, path in enumerate(context.files, start=1):
            cancellation.raise_if_requested()
            progress.report(n, len(context.files), path)
            try:
                count_file(path, counts)
            except (SyntaxError, ValueError, OSError, RecursionError):
                broken.append((path, self.start_child(ParseFile, path).named(Path(path).name).run()))
        for path, starting in broken:
            try:
                starting.get().wait().get()
            except (JobFailedError, JobCancelledError) as error:
                why = f"{error.error_type}: {error.error_message}" if isinstance(error, JobFailedError) else str(error)
                counts.broken.append((path, why))
        return counts


class ParseFile(Job[str, int]):
    """Reads one file; fails with the parser's own error when it is not Python."""

    retry = RetryPolicy(max_attempts=1, strategy=RetryStrategy.NONE)

    def execute(self, context: str, progress: JobProgress, cancellation: CancellationToken) -> int:
        """Return the number of lines."""
        counts = Counts(context)
        count_file(context, counts)
        return counts.lines


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


def find_packages(roots: Iterable[str], limit: int | None = None) -> Iterator[Package]:
    """Yield packages, large ones in parts, tiny ones together; ``limit`` files in all."""
    seen: set[Path] = set()
    gathered: list[str] = []
    left = limit if limit is not None else 10**9
    for root in roots:
        base = Path(root)
        for entry in sorted(base.iterdir()) if base.is_dir() else [base]:
            if entry.name in {"site-packages", "__pycache__"}:
                continue
            files = _files_of(entry, seen)[:left]
            left -= len(files)
            if len(files) < _FILES_PER_JOB // 3:
                gathered += files
                if len(gathered) >= _FILES_PER_JOB:
                    yield Package(f"{len(gathered)} files of small packages", gathered)
                    gathered = []
                continue
            for start in range(0, len(files), _FILES_PER_JOB):
                part = files[start : start + _FILES_PER_JOB]
                name = entry.stem if len(files) <= _FILES_PER_JOB else f"{entry.stem} [{start // _FILES_PER_JOB + 1}]"
                yield Package(name, part)
    if gathered:
        yield Package(f"{len(gathered)} files of small packages", gathered)


def _files_of(entry: Path, seen: set[Path]) -> list[str]:
    found = sorted(entry.rglob("*.py")) if entry.is_dir() else [entry] if entry.suffix == ".py" else []
    fresh = [path for path in found if path not in seen]
    seen.update(fresh)
    return [str(path) for path in fresh]


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
    names = ("files", "lines", "functions", "classes", "imports", "complexity")
    return {name: sum(getattr(counts, name) for counts in counted) for name in names}
