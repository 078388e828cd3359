"""``koan-ray jobs list|show|tree|executions|failed-items``: read and print."""

from __future__ import annotations

import contextlib
import shlex
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.text import Text
from rich.tree import Tree

from koan_ray import ambient
from koan_ray.cli import present
from koan_ray.cli.options import Where
from koan_ray.cli.reach import TIMEOUT_S, reach
from koan_ray.cli.safe import as_json, safe, safe_lines, shown
from koan_ray.client import Jobs
from koan_ray.errors import ConfigurationError, JobNotFoundError
from koan_ray.plain import execution_object, job_object, view_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from koan_ray.jobs import Job
    from koan_ray.listing import JobPage

_MOST_NODES = 1000
_MOST_PARENTS = 1000
_PAGE = 500


@contextlib.contextmanager
def _reading(where: Where) -> Iterator[None]:
    with reach(where, only_reads=True) as remark:
        if remark:
            present.console(stderr=True).print(shown(f"koan-ray: {remark}", "yellow"), soft_wrap=True)
        yield


def show_list(where: Where, filters: dict[str, Any], *, everything: bool, count: bool, machine: bool, quiet: bool) -> None:
    """Print jobs that match, or how many there are."""
    if everything and not (machine or quiet):
        msg = "--all: needs --json or --quiet; a table shows one page, and --cursor leads to the next"
        raise ConfigurationError(msg)
    with _reading(where):
        if count:
            filters = {name: value for name, value in filters.items() if name not in ("limit", "cursor", "order_by")}
            n = Jobs.count(**filters).get(timeout=TIMEOUT_S)
            print(as_json({"count": n}) if machine else n)
        elif everything:
            for job in Jobs.stream(**{**filters, "limit": _PAGE}).blocking():
                _print_one(job, quiet=quiet)
        else:
            _show_page(Jobs.query(**filters).get(timeout=TIMEOUT_S), machine=machine, quiet=quiet)


def _show_page(page: JobPage[Job[Any, Any]], *, machine: bool, quiet: bool) -> None:
    if machine or quiet:
        for job in page:
            _print_one(job, quiet=quiet)
    elif page:
        console = present.console()
        console.print(present.jobs_table(page, console.width))
    hint = present.console(stderr=True)
    if page.cursor is not None:
        hint.print(Text(f"There are more: {_again()} --cursor {page.cursor}", style="dim"), soft_wrap=True)
    elif not page and not machine and not quiet:
        hint.print("No jobs match.", style="dim")


def _again() -> str:
    """Return this command without its cursor, to be typed again."""
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--cursor=")]
    if "--cursor" in arguments:
        at = arguments.index("--cursor")
        del arguments[at : at + 2]
    return safe(shlex.join(["koan-ray", *arguments]))


def _print_one(job: Job[Any, Any], *, quiet: bool) -> None:
    if quiet:
        print(job.id, flush=True)
    else:
        present.print_json(job_object(job))


def show_job(where: Where, job_id: str, *, full: bool, machine: bool) -> None:
    """Print all of one job."""
    with _reading(where):
        job = Jobs.get(job_id).get(timeout=TIMEOUT_S).refresh().get(timeout=TIMEOUT_S)
        executions = Jobs.executions(job_id).get(timeout=TIMEOUT_S)
        if machine:
            tried = [execution_object(one) for one in executions]
            present.print_json({**job_object(job, whole=True), "executions": tried}, indent=2)
            return
        console = present.console()
        console.print(present.job_page(job, executions or None, console.width, full=full))


def show_executions(where: Where, job_id: str, *, trace: bool, machine: bool) -> None:
    """Print the tries of one job."""
    with _reading(where):
        executions = Jobs.executions(job_id).get(timeout=TIMEOUT_S)
        if machine:
            for one in executions:
                present.print_json(execution_object(one))
            return
        console = present.console()
        if not executions:
            present.console(stderr=True).print(
                "No executions are kept: it has not begun, or was persisted without --audit.", style="dim"
            )
            return
        console.print(present.executions_table(executions, console.width))
        for one in executions if trace else []:
            if one.stack_trace:
                console.print(Text(f"\nattempt {one.attempt_number}", style="bold"))
                console.print(Text(safe_lines(one.stack_trace.rstrip())))


def show_failed_items(where: Where, job_id: str, *, trace: bool, machine: bool) -> None:
    """Print the items of one job that have failed for good."""
    with reach(where):
        items = ambient.engine().failed_items(job_id).get(timeout=TIMEOUT_S)
        if machine:
            for one in items:
                present.print_json(asdict(one))
            return
        console = present.console()
        if not items:
            present.console(stderr=True).print("No item of this job has failed for good.", style="dim")
            return
        console.print(present.items_table(items))
        for one in items if trace else []:
            if one.stack_trace:
                console.print(Text(f"\nitem {one.index}", style="bold"))
                console.print(Text(safe_lines(one.stack_trace.rstrip())))


class _Node(NamedTuple):
    job: Job[Any, Any]
    children: list[_Node]
    more: bool = False  # there are children that are not among these


def show_tree(where: Where, job_id: str, *, up: bool, limit: int, machine: bool) -> None:
    """Print a job and everything below it."""
    with _reading(where):
        job = Jobs.get(job_id).get(timeout=TIMEOUT_S)
        root = _grown(_topmost(job) if up else job, limit)
    if machine:
        present.print_json(_node_object(root), indent=2)
        return
    console = present.console()
    console.print(_branch(root, None, job_id))


def _topmost(job: Job[Any, Any]) -> Job[Any, Any]:
    for _ in range(_MOST_PARENTS):
        if job.parent_job_id is None:
            break
        try:
            job = Jobs.get(job.parent_job_id).get(timeout=TIMEOUT_S)
        except JobNotFoundError:  # it was removed, or has expired
            break
    return job


def _grown(job: Job[Any, Any], limit: int) -> _Node:
    """Return a job with what is below it, level by level, so that a limit on all of them cuts off the deepest."""
    root = _Node(job, [])
    level, n_nodes = [root], 1
    while level and n_nodes < _MOST_NODES:
        below: list[_Node] = []
        for node in level:
            n = min(limit, _MOST_NODES - n_nodes)
            if n < 1:
                break
            found = Jobs.query(parent_job_id=node.job.id, order_by="created_at", limit=n).get(timeout=TIMEOUT_S)
            node.children.extend(_Node(child, []) for child in found)
            if found.cursor is not None:
                node.children[-1] = node.children[-1]._replace(more=True)
            n_nodes += len(found)
            below += node.children
        level = below
    return root


def _node_object(node: _Node) -> dict[str, Any]:
    children = [_node_object(child) for child in node.children]
    return {**job_object(node.job), "children": children, "more": bool(node.children and node.children[-1].more)}


def _branch(node: _Node, above: Tree | None, sought: str) -> Tree:
    view = view_of(node.job)
    line = present.status_text(view)
    line.append(f"  {safe(view.kind)}", style="bold" if view.id == sought else "")
    for words, style in ((safe(view.name or ""), "italic"), (present.share(view), ""), (present.took(view), "dim")):
        if words:
            line.append(f"  {words}", style=style)
    line.append(f"  {view.id}", style="dim")
    if view.error is not None and view.status != "completed":
        line.append(f"\n{safe(view.error)[:200]}", style="red")
    tree = Tree(line, guide_style="dim") if above is None else above.add(line)
    for child in node.children:
        _branch(child, tree, sought)
        if child.more:
            tree.add(Text(f"… and more: koan-ray jobs list --parent {view.id}", style="dim"))
    return tree
