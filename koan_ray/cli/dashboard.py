"""``koan-ray dashboard``: our page inside Ray's dashboard, and a board for Grafana."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

dashboard = typer.Typer(
    help="Show jobs inside the Ray dashboard, and their metrics in Grafana.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Modules = Annotated[
    Path | None,
    typer.Option(help="Modules of another Ray's dashboard, as .../ray/dashboard/modules.", show_default=False, hidden=True),
]


@dashboard.command()
def install(modules: Modules = None) -> None:
    """Add our page to the Ray of this environment: its dashboard then has it at /koan.

    One small file is written into the Ray installation; it cannot keep Ray's dashboard from starting. To be run where the
    head node's Ray is; a Ray that runs already has to be started anew.

    Example: koan-ray dashboard install
    """
    from koan_ray.cli.safe import safe
    from koan_ray.runtime.ray.dashboard import installation

    state = installation.install(modules or installation.modules_of_ray())
    typer.echo(f"installed in {safe(state.path)}")
    typer.echo("Start Ray anew; the page is at /koan of its dashboard, for example http://127.0.0.1:8265/koan")


@dashboard.command()
def remove(modules: Modules = None) -> None:
    """Take our page out of the Ray of this environment.

    Example: koan-ray dashboard remove
    """
    from koan_ray.runtime.ray.dashboard import installation

    was_there = installation.remove(modules or installation.modules_of_ray())
    typer.echo("removed; a dashboard that runs has the page until it is started anew" if was_there else "was not installed")


@dashboard.command()
def status(modules: Modules = None, as_json: AsJson = False) -> None:
    """Tell whether our page is installed; exit code 1 if it is not, or is of another version.

    Example: koan-ray dashboard status
    """
    from koan_ray.cli.safe import as_json as written
    from koan_ray.cli.safe import safe
    from koan_ray.runtime.ray.dashboard import installation

    state = installation.state(modules or installation.modules_of_ray())
    if as_json:
        typer.echo(written({"path": str(state.path), "installed": state.is_installed, "current": state.is_current}))
    elif not state.is_installed:
        typer.echo(f"not installed in {safe(state.path.parent)}; koan-ray dashboard install adds it")
    else:
        rest = "" if state.is_current else ", by another version: koan-ray dashboard install brings it up to date"
        typer.echo(f"installed in {safe(state.path)}{rest}")
    raise typer.Exit(0 if state.is_installed and state.is_current else 1)


@dashboard.command()
def grafana(
    out: Annotated[Path | None, typer.Option(help="Write here: a file, or a folder that Grafana provisions from.")] = None,
    merge: Annotated[
        Path | None,
        typer.Option(help="Add our panels to this board: the default_grafana_dashboard.json that Ray has written."),
    ] = None,
) -> None:
    """Write a Grafana board over the engine's metrics, or add its panels to Ray's own board.

    Ray's Metrics page shows Ray's default board: with --merge our panels are on that page. Ray writes the board anew
    whenever its dashboard starts, so repeat --merge then.

    Example: koan-ray dashboard grafana > koan.json

    Example: koan-ray dashboard grafana --merge $RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR/default_grafana_dashboard.json
    """
    from koan_ray.cli.boards import merge_into, write

    if merge is not None and out is not None:
        msg = "give either --out or --merge"
        raise typer.BadParameter(msg)
    if merge is not None:
        merge_into(merge)
    else:
        write(out)
