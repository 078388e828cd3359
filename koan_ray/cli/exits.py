"""Exit codes of all commands, and the one line that a problem of ours becomes."""

from __future__ import annotations

import sys
from typing import Any, Final

import typer
from typer.core import TyperGroup

FAILED: Final = 1  # the job failed or was cancelled, or something was found to be wrong
USAGE: Final = 2  # an option, a filter, a setting or a context cannot be used; nothing was changed
NOT_FOUND: Final = 3  # there is no such job
UNAVAILABLE: Final = 4  # no engine, or a store that does not answer
UNWRITABLE: Final = 5  # what was to be printed cannot be written, for example to a full disk
INTERRUPTED: Final = 130  # Ctrl-C
NO_READER: Final = 141  # the other end of the pipe was closed; as for a program that SIGPIPE has ended

HELP: Final = (
    "Exit codes: 0 done · 1 a job failed or was cancelled, or problems were found · 2 an argument, filter, setting or "
    "context cannot be used · 3 no such job · 4 no engine, or a store does not answer · 5 the output cannot be "
    "written · 130 Ctrl-C · 141 the reader of a pipe has left."
)


def code_of(error: BaseException) -> int:
    """Return the exit code that stands for an error."""
    from koan_ray import errors

    if isinstance(error, errors.JobNotFoundError):
        return USAGE if error.is_no_id else NOT_FOUND
    if isinstance(error, (errors.RuntimeUnavailableError, errors.StoreUnavailableError, TimeoutError)):
        return UNAVAILABLE
    usage = (
        errors.ConfigurationError, errors.InvalidContextError, errors.JobDefinitionError, errors.PayloadTooLargeError,
        errors.UnknownKindError,
    )  # fmt: skip
    return USAGE if isinstance(error, usage) else FAILED


def tell(error: BaseException) -> None:
    """Print a problem on standard error, as safe as everything else."""
    from koan_ray.cli.safe import safe_lines

    told = str(error) or "the engine did not answer in time; is it busy, or its cluster unreachable?"
    typer.echo(f"koan-ray: {safe_lines(told)}", err=True)


class Group(TyperGroup):
    """The root of the commands: a problem of ours becomes a line and an exit code, never a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            if "koan_ray.errors" not in sys.modules:
                raise
            from koan_ray.errors import KoanRayError

            if not isinstance(error, (KoanRayError, TimeoutError)):
                raise
            tell(error)
            raise typer.Exit(code_of(error)) from None
