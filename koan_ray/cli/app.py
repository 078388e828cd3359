"""``koan-ray``: the command line. Modules that take time to import are imported by the command that needs them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from koan_ray.cli import signals, streams
from koan_ray.cli.dashboard import dashboard
from koan_ray.cli.exits import HELP, INTERRUPTED, Group
from koan_ray.cli.jobs import jobs
from koan_ray.cli.safe import as_json as _json
from koan_ray.cli.safe import counted, safe

app = typer.Typer(
    name="koan-ray",
    cls=Group,
    help=f"Durable, observable jobs on Ray.\n\n{HELP}",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
archive = typer.Typer(help="Move finished jobs to the archive, and back.", no_args_is_help=True)
app.add_typer(jobs, name="jobs")
app.add_typer(archive, name="archive")
app.add_typer(dashboard, name="dashboard")
Address = Annotated[str, typer.Option(help="Address of the Ray cluster, as in ray.init.")]
Namespace = Annotated[str, typer.Option(help="Namespace of the engine, as in engine.namespace.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> None:
    """Run the command line."""
    streams.prepare()
    try:
        app()
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 0
        signals.leave(code, interrupted=code == INTERRUPTED)
        raise
    finally:
        streams.finish()


def _version(wanted: bool) -> None:
    if wanted:
        from koan_ray import __version__

        typer.echo(f"koan-ray {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    pass


@app.command()
def demo(
    runtime: Annotated[str, typer.Option(help="'ray', or 'local' for this process without Ray.")] = "ray",
    path: Annotated[list[str] | None, typer.Option(help="Directories to count, instead of the installed packages.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Read at most this many files.")] = None,
    memory: Annotated[bool, typer.Option("--memory", help="Keep the jobs in memory only.")] = False,
) -> None:
    """Watch jobs run, fail, retry and finish: a census of the Python files on this machine.

    The jobs are kept as documents in ./.koan, so that the next demo can tell of this one.

    Example: koan-ray demo --limit 2000
    """
    if runtime not in ("ray", "local"):
        msg = f"'{runtime}' is neither 'ray' nor 'local'"
        raise typer.BadParameter(msg, param_hint="--runtime")
    from koan_ray.cli.demo import run

    raise typer.Exit(run(runtime, path, limit, memory=memory))


@app.command()
def dev(
    address: Annotated[
        str | None, typer.Option(help="A Ray cluster to join, as in ray.init; one is started here otherwise.")
    ] = None,
    modules: Annotated[
        list[str] | None,
        typer.Option("--module", help="A module that defines job classes to start from the page; may be repeated."),
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Where the page is; 8267, or any if that is taken.")
    ] = None,
) -> None:
    """Run everything for development, until Ctrl-C: Ray, the engine, a document server in ./.koan, and the dashboard.

    A URL for the source 'default' in the settings is used instead of the document server. Without --module the page offers
    a few sample jobs.

    Example: koan-ray dev --module my_project.jobs
    """
    from koan_ray.cli.dev import run

    raise typer.Exit(run(address, modules=tuple(modules or ()), port=port))


@app.command()
def doctor(
    source: Annotated[str | None, typer.Option(help="The source to look at, instead of all that keep documents.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: one object a line, the last one with the totals.")
    ] = False,
) -> None:
    """Read every stored job and tell what must not be. Changes nothing, needs no Ray; exit code 1 if anything is wrong.

    Example: koan-ray doctor --source default
    """
    from koan_ray.cli.doctor import run

    raise typer.Exit(run(source, machine=as_json))


@app.command()
def serve(
    address: Annotated[str, typer.Option(help="Address of the Ray cluster, as in ray.init.")] = "auto",
    local: Annotated[bool, typer.Option("--local", help="Run the engine in this process, without Ray.")] = False,
    host: Annotated[str | None, typer.Option(help="Where to listen; web.host of the settings by default.")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="web.port of the settings by default; 0 for a free one.")
    ] = None,
    module: Annotated[
        list[str] | None, typer.Option(help="Import this module, so that its jobs can be started; repeatable.")
    ] = None,
    token_file: Annotated[str | None, typer.Option(help="A file with one token for everything, mode 600.")] = None,
    generate_token: Annotated[
        bool, typer.Option("--generate-token", help="Make a token and print it, also where others can reach the address.")
    ] = False,
) -> None:
    """Serve the HTTP API and the dashboard, until Ctrl-C. Without a token in the settings one is made and printed.

    Example: koan-ray serve --module my_project.jobs
    """
    from koan_ray.cli.serve import run

    raise typer.Exit(
        run(
            address,
            local=local,
            host=host,
            port=port,
            modules=module or (),
            token_file=token_file,
            makes_token=generate_token,
        )
    )


@app.command()
def status(address: Address = "auto", namespace: Namespace = "koan", as_json: AsJson = False) -> None:
    """Show jobs, actors and limits of the engine on a cluster.

    Example: koan-ray status --address auto
    """
    from koan_ray.cli.reach import begin_logging
    from koan_ray.runtime.ray.admin import status as ask

    begin_logging()
    found = ask(address, namespace)
    if as_json:
        typer.echo(_json(found, indent=2))
        return
    _print_status(found)


def _print_status(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from koan_ray.cli.present import obstacles
    from koan_ray.domain.archival import SETTLED

    console = Console()
    # The engine counts the chunks of batches there, too, which nobody submitted.
    ended = ", ".join(f"{count:,} {name}" for name, count in found["jobs"].items() if name in SETTLED) or "none"
    console.print(f"queued {found['queued']:,}, waiting {found['waiting']:,}, running {found['running']:,}; ended: {ended}")
    for text in obstacles(found):
        console.print(Text(text, style="yellow"))
    if not found["actors"]:
        console.print("no job actors; they start when a job is due, and end when idle")
        return
    table = Table(title=counted(len(found["actors"]), "job actor"), title_justify="left")
    for name in ("name", "spec", "state", "pid", "running", "parked", "jobs done"):
        table.add_column(name)
    for actor in found["actors"]:
        table.add_row(*(Text(str(actor[name.replace(" ", "_")])) for name in table_names(table)))
    console.print(table)


@archive.command("run")
def archive_run(
    address: Address = "auto",
    namespace: Namespace = "koan",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count what is due and move nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Apply the archival policies now, instead of at the next interval.

    Example: koan-ray archive run --dry-run
    """
    from koan_ray.cli.reach import begin_logging
    from koan_ray.runtime.ray.admin import archive as ask

    begin_logging()
    counts = ask(address, namespace, dry_run=dry_run)
    if as_json:
        typer.echo(_json(counts, indent=2))
        return
    for name, count in counts.items():
        rest = ", ".join(f"{n:,} {what}" for what, n in count.items() if n and what not in ("due", "moved"))
        done = "nothing was moved" if dry_run else f"{count['moved']:,} moved"
        typer.echo(f"{name}: {count['due']:,} due, {done}{', ' + rest if rest else ''}")


@archive.command("restore")
def archive_restore(
    job_id: Annotated[str, typer.Argument(help="Id of the job.")], address: Address = "auto", namespace: Namespace = "koan"
) -> None:
    """Bring a job back from the archive to where it was.

    Example: koan-ray archive restore 0198f0c2-7b7e-7cc2-a1f5-2f1d1e6a9b10
    """
    from koan_ray.cli.reach import begin_logging
    from koan_ray.runtime.ray.admin import restore

    begin_logging()
    found = restore(address, namespace, job_id)
    typer.echo(f"{safe(found.kind)} {found.id} ({found.status}) is out of the archive")


def table_names(table: Any) -> list[str]:
    """Return the column names of a table."""
    return [str(column.header) for column in table.columns]


@app.command()
def down(address: Address = "auto", namespace: Namespace = "koan") -> None:
    """End the engine on a cluster: coordinator, broker and job actors. Jobs in its memory are gone.

    Example: koan-ray down --namespace koan
    """
    from koan_ray.cli.reach import begin_logging
    from koan_ray.runtime.ray.admin import end

    begin_logging()
    typer.echo(f"ended the engine in namespace {namespace!r} with {counted(end(address, namespace), 'job actor')}")
