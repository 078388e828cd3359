"""Parents start children and wait for them. A waiting parent holds no capacity, so trees of any depth finish.

python examples/06_parent_child.py
"""

import asyncio

import koan_ray as koan


class Square(koan.Job[int, int]):
    def execute(self, context, progress, cancellation) -> int:
        return context * context


class SumOfSquares(koan.Job[int, int]):
    async def execute(self, context, progress, cancellation) -> int:
        # A key names a child: should this parent run again, it joins the children that it has started before.
        children = [await self.start_child(Square, n, key=f"square-{n}").run() for n in range(context)]
        results = await asyncio.gather(*[child.wait() for child in children])
        return sum(results)


async def main() -> None:
    job = await SumOfSquares.start(10).run()
    print(f"sum: {await job.wait()}")
    children = await job.get_children(Square)
    print(f"{len(children)} children, the last one of {await children[-1].get_parent(SumOfSquares)!r:.25}...")


if __name__ == "__main__":
    asyncio.run(main())
