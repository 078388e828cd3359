"""Keep jobs as documents: they outlive this script, are found by what was said about them, and tell of each attempt.

The document server is started in ./.koan and ends with this script. With a MongoDB of your own only the URL is another. Run
it twice: the second run finds the invoices of the first.

    python examples/11_persist.py
"""

import asyncio

import koan_ray as koan
from koan_ray.stores.embedded import DocumentServer


class Invoice(koan.Job[dict[str, int], int]):
    retry = koan.RetryPolicy(max_attempts=3, initial_delay=0.1)

    async def execute(self, context, progress, cancellation) -> int:
        failed_before = any(e.status is koan.ExecutionStatus.FAILED for e in await self.executions())
        if context["amount"] == 13 and not failed_before:
            raise ConnectionError("the bank is closed")
        return context["amount"] * 119 // 100


async def work() -> None:
    print(await koan.Jobs.count(kind="Invoice", source="default"), "invoices from earlier runs")

    jobs = []
    for tenant, amount in ((7, 100), (7, 13), (8, 50)):
        run = Invoice.start({"amount": amount}).persist().audit().with_metadata(tenant=tenant)
        jobs.append(await run.run())  # from here on the job is stored, whatever happens to us
    print("sums:", [await job.wait() for job in jobs])

    page = await koan.Jobs.query(kind="Invoice", metadata={"tenant": 7}, status="completed", limit=2)
    print("tenant 7:", sorted(job.result for job in page))

    for execution in await jobs[1].executions():  # kept because of .audit()
        print(f"attempt {execution.attempt_number}: {execution.status.value} {execution.error_message or ''}")


async def main() -> None:
    server = DocumentServer()
    url = await server.start()
    try:
        # A namespace of its own: the settings of an engine are those of whoever has started it.
        with koan.init(engine={"namespace": "invoices"}, sources={"default": {"url": url}}):
            await work()
    finally:
        await server.stop()


if __name__ == "__main__":
    asyncio.run(main())
