"""The filters of `koan_ray.Jobs.query` as options of a command, and how their text becomes values."""

from __future__ import annotations

import functools
import inspect
import json
import sys
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

_STATUSES = ("created", "queued", "running", "completed", "failed", "cancelled")  # JobStatus takes time to import
_INSTANT = "ISO 8601, or an age such as 90s, 30m, 2h, 7d."


class Where(NamedTuple):
    """What a user said of the engine that a command is for."""

    address: str | None = None  # None: RAY_ADDRESS, a `koan-ray dev` of this directory, or what Ray finds
    namespace: str | None = None  # None: as in the settings
    documents: bool = False  # read the documents, do not look for an engine


def complete_status(incomplete: str) -> list[str]:
    """Return the statuses that begin so."""
    return [status for status in _STATUSES if status.startswith(incomplete.lower())]


def complete_kind(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the kinds that begin so: those of --module, and of the modules of the settings."""
    from koan_ray import registry
    from koan_ray.cli.reach import import_modules
    from koan_ray.errors import ConfigurationError

    try:
        import_modules(ctx.params.get("module") or [])
    except ConfigurationError:
        return []
    return sorted(each.kind for each in registry.everything() if each.kind.startswith(incomplete))


def _option(*names: str, help_: str, completes: Any = None, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help_, autocompletion=completes, metavar=metavar, rich_help_panel="Filters")


_STATUS_HELP = "In this status; repeat it, or part several by commas."
_METADATA_HELP = "With this in its metadata; the value is JSON, or text as it is. Repeat it for more."
_KIND = _option("--kind", "-k", help_="Of this kind; repeat it for several.", completes=complete_kind)
_STATUS = _option("--status", "-s", help_=_STATUS_HELP, completes=complete_status)
_METADATA = _option("--metadata", "-m", help_=_METADATA_HELP, metavar="KEY=VALUE")
_FILTERS: Final[dict[str, Any]] = {
    "kind": Annotated[list[str] | None, _KIND],
    "status": Annotated[list[str] | None, _STATUS],
    "name": Annotated[str | None, _option(help_="With exactly this name.")],
    "text": Annotated[str | None, _option(help_="With this in name, description, kind or last error.")],
    "correlation": Annotated[str | None, _option(help_="With this correlation id.", metavar="ID")],
    "parent": Annotated[str | None, _option(help_="Children of this job.", metavar="ID")],
    "metadata": Annotated[list[str] | None, _METADATA],
    "created_after": Annotated[str | None, _option(help_=f"Created since: {_INSTANT}", metavar="WHEN")],
    "created_before": Annotated[str | None, _option(help_=f"Created before: {_INSTANT}", metavar="WHEN")],
    "completed_after": Annotated[str | None, _option(help_=f"Ended since: {_INSTANT}", metavar="WHEN")],
    "completed_before": Annotated[str | None, _option(help_=f"Ended before: {_INSTANT}", metavar="WHEN")],
    "items": Annotated[bool | None, _option("--items/--no-items", help_="Only jobs over items, or only others.")],
    "source": Annotated[str | None, _option(help_="Kept in this source; 'memory' for the engine's memory.")],
    "partition": Annotated[str | None, _option(help_="Kept in this partition; '*' for all, archives as well.")],
}


def _target(help_: str) -> Any:
    return typer.Option(help=help_, rich_help_panel="Engine", show_default=False)


_ADDRESS_HELP = "Ray cluster, as in ray.init; else RAY_ADDRESS, a koan-ray dev of this directory, or what Ray finds."
_TARGET = {
    "address": Annotated[str | None, _target(_ADDRESS_HELP)],
    "namespace": Annotated[str | None, _target("Namespace of the engine; else engine.namespace of the settings.")],
}
_DOCUMENTS = Annotated[
    bool,
    typer.Option("--documents", help="Read the stored documents; do not look for an engine.", rich_help_panel="Engine"),
]
_KEYWORD = inspect.Parameter.KEYWORD_ONLY
_RENAMED = {"correlation": "correlation_id", "parent": "parent_job_id", "items": "has_items"}


def for_jobs(*, filters: bool = False, reads: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options that many share.

    It receives ``where`` (a `Where`) and, with ``filters``, a dict for `koan_ray.Jobs.query`.
    """
    shared = dict(_FILTERS if filters else {}) | _TARGET
    if reads:
        shared["documents"] = _DOCUMENTS

    def give(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters
        kept = [each for name, each in own.items() if name not in ("filters", "where")]
        more = [
            inspect.Parameter(name, _KEYWORD, annotation=each, default=False if name == "documents" else None)
            for name, each in shared.items()
        ]

        @functools.wraps(command)
        def call(**values: Any) -> None:
            given = {name: values.pop(name) for name in shared}
            where = Where(given.pop("address"), given.pop("namespace"), given.pop("documents", False))
            if filters:
                values["filters"] = parse(given)
            command(**values, where=where)

        ordered = [each.replace(kind=_KEYWORD) for each in kept]
        call.__signature__ = inspect.Signature([*ordered, *more])  # type: ignore[attr-defined]
        call.__annotations__ = {each.name: each.annotation for each in (*ordered, *more)}
        return call

    return give


def parse(given: dict[str, Any]) -> dict[str, Any]:
    """Return options as filters of `koan_ray.Jobs.query`; those not given are left out.

    Raises:
        ConfigurationError: A value cannot be used; the message names the option.
    """
    found = {_RENAMED.get(name, name): value for name, value in given.items() if value not in (None, [])}
    if "status" in found:
        found["status"] = [part for value in found["status"] for part in value.split(",") if part]
    if "metadata" in found:
        found["metadata"] = parse_metadata(found["metadata"])
    for name, value in found.items():
        if name.endswith(("_after", "_before")):
            found[name] = parse_instant(value, f"--{name.replace('_', '-')}")
    return found


def parse_metadata(pairs: list[str]) -> dict[str, Any]:
    """Return ``key=value`` pairs as metadata; a value that is JSON is taken as such.

    Raises:
        ConfigurationError: There is no ``=``.
    """
    from koan_ray.errors import ConfigurationError

    found: dict[str, Any] = {}
    for pair in pairs:
        key, is_pair, value = pair.partition("=")
        if not is_pair or not key:
            msg = f"--metadata: expected KEY=VALUE, got {pair!r}"
            raise ConfigurationError(msg)
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def parse_instant(text: str, option: str) -> datetime:
    """Return an instant: an age counts back from now, one without a time zone is local time.

    Raises:
        ConfigurationError: It is neither.
    """
    from datetime import UTC, timedelta

    from koan_ray.domain.durations import seconds
    from koan_ray.errors import ConfigurationError

    try:
        return datetime.now(UTC) - timedelta(seconds=seconds(text.removesuffix(" ago"), name=option))
    except (ConfigurationError, OverflowError):
        pass
    try:
        return datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError):
        msg = f"{option}: expected ISO 8601 such as 2026-01-31T09:00, or an age such as 90s, 30m, 2h, 7d, got {text!r}"
        raise ConfigurationError(msg) from None


def read_context(given: str) -> bytes:
    """Return a context as it was given: JSON itself, ``@file``, or ``-`` for standard input.

    Raises:
        ConfigurationError: The file cannot be read.
    """
    from pathlib import Path

    from koan_ray.errors import ConfigurationError

    if given == "-":
        return sys.stdin.buffer.read()
    if not given.startswith("@"):
        return given.encode()
    try:
        return Path(given[1:]).read_bytes()
    except OSError as error:
        msg = f"--context: {given[1:]!r} cannot be read: {error.strerror}"
        raise ConfigurationError(msg) from None
