"""``koan-ray dashboard grafana``: files of boards."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import typer

from koan_ray.cli.safe import safe
from koan_ray.errors import ConfigurationError
from koan_ray.runtime.ray.dashboard import grafana

if TYPE_CHECKING:
    from pathlib import Path


def write(out: Path | None) -> None:
    """Write our board to standard output, a file, or a folder."""
    text = json.dumps(grafana.board(), indent=2)
    if out is None:
        typer.echo(text)
        return
    path = out / grafana.OWN_FILE if out.is_dir() else out
    _replace(path, text)
    typer.echo(f"wrote {safe(path)}")
    typer.echo("Grafana shows it as 'Koan jobs': import the file, or put it into a folder that it provisions from, such as")
    typer.echo("the one that RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR names for the boards of Ray itself.")


def merge_into(path: Path) -> None:
    """Add our panels to a board that Ray has written.

    Raises:
        ConfigurationError: The file is none of Grafana's boards, or cannot be read or written.
    """
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        msg = f"--merge: {path}: cannot be read as a board: {error}"
        raise ConfigurationError(msg) from None
    if not isinstance(found, dict) or not isinstance(found.get("panels"), list):
        msg = f"--merge: {path}: is no board of Grafana: it has no panels; Ray calls its own {grafana.RAYS_FILE}"
        raise ConfigurationError(msg)
    _replace(path, json.dumps(grafana.merged(found), indent=4))
    typer.echo(f"added the row {grafana.ROW_TITLE!r} to {safe(path)}; Grafana shows it within half a minute")


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        msg = f"{path}: cannot be written: {error.strerror}"
        raise ConfigurationError(msg) from None
