"""As in a notebook: cells run one after the other inside a loop that is already running.

`await` works at the top of a cell, and so does `.get()`, which blocks the cell and nothing else.

    python examples/10_notebook.py
"""

import asyncio

import koan_ray as koan

CELLS = [
    """
class Double(koan.Job[int, int]):           # a class defined in a cell is shipped to the cluster by value
    def execute(self, context, progress, cancellation) -> int:
        return 2 * context
""",
    """
job = await Double.start(21).run()
print("awaited:", await job.wait())
""",
    """
job = Double.start(4).run().get()            # no await: blocks this cell
print("blocked:", job.wait().get())
""",
    """
class Double(koan.Job[int, int]):           # defined again, as one does: the new one counts from now on
    def execute(self, context, progress, cancellation) -> int:
        return 200 * context
print("redefined:", await (await Double.start(4).run()).wait())
""",
    """
print("shown:", await (await Double.start(5).run()).show_progress())   # a bar in Jupyter, lines where there is none
""",
    """
async for update in job.progress_stream():   # a job that has ended tells its last state
    print("last state:", update.status.value)
""",
]


async def notebook() -> None:
    namespace: dict[str, object] = {"koan": koan, "__name__": "__main__"}
    for source in CELLS:
        code = compile(source, "<cell>", "exec", flags=__import__("ast").PyCF_ALLOW_TOP_LEVEL_AWAIT)
        running = eval(code, namespace)  # what IPython does with a cell
        if running is not None:
            await running


if __name__ == "__main__":
    asyncio.run(notebook())
