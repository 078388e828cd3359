"""``python -m benchmarks [p1 p3 …] [--quick]``: measure, print a table, and write RESULTS.md after a whole run."""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path

from benchmarks._harness import Row, machine

MODULES = {
    "p1": "p1_throughput",
    "p2": "p2_single_runs",
    "p3": "p3_latency",
    "p4": "p4_documents",
    "p5": "p5_items",
    "p6": "p6_efficiency",
    "p7": "p7_progress",
    "p8": "p8_million_queued",
    "p9": "p9_restart",
    "p10": "p10_startup",
    "w1": "w1_job_list",
    "w2": "w2_streams",
}


def main(arguments: list[str]) -> int:
    quick = "--quick" in arguments
    chosen = [name for name in arguments if not name.startswith("-")] or list(MODULES)
    unknown = [name for name in chosen if name not in MODULES]
    if unknown:
        print(f"no benchmark {unknown[0]!r}; there are {', '.join(MODULES)}", file=sys.stderr)
        return 2
    rows: list[Row] = []
    for name in chosen:
        print(f"{name} …", flush=True)
        found = importlib.import_module(f"benchmarks.{MODULES[name]}").run(quick)
        for row in found:
            print("   ", line(row), flush=True)
        rows += found
    table = "\n".join([HEADER, *map(line, rows)])
    print("\n" + table)
    if not quick and len(chosen) == len(MODULES):
        text = INTRODUCTION.format(date=time.strftime("%Y-%m-%d"), machine=machine(), table=table)
        (Path(__file__).parent / "RESULTS.md").write_text(text)
    return 0 if all(row.verdict != "MISSED" for row in rows) else 1


HEADER = "| What | Ours | Against | Figure | Must | Aim | Reached |\n|---|---|---|---|---|---|---|"


def line(row: Row) -> str:
    sign = "≤" if row.lower else "≥"
    figure = f"{row.ratio:,.2f}{row.unit}" if row.ratio < 100 else f"{row.ratio:,.0f}{row.unit}"
    limits = " | " if row.must is None or row.aim is None else f"{sign} {row.must:g} | {sign} {row.aim:g}"
    return f"| {row.name} | {row.ours} | {row.reference} | {figure} | {limits} | {row.verdict} |"


INTRODUCTION = """# Results

Written by `make bench` on {date}. Machine: {machine}.

Ours and plain Ray are measured in the same run, in alternating rounds where that makes sense; figures are medians. Absolute
numbers are this machine's; the ratios are what the budgets are about. How each is measured, and where the time goes, is told
in the docstring of its module.

{table}
"""

if __name__ == "__main__":
    # Ray starts threads that may outlive main; the verdict is the exit code.
    sys.exit(main(sys.argv[1:]))
