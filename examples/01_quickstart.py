"""The smallest useful program: a typed job with a context, progress and a result.

python examples/01_quickstart.py
"""

import asyncio

from pydantic import BaseModel

import koan_ray as koan


class EmailContext(BaseModel):
    to: str
    body: str


class EmailResult(BaseModel):
    sent: bool


class EmailJob(koan.Job[EmailContext, EmailResult]):
    async def execute(self, context, progress, cancellation) -> EmailResult:
        progress.report(0.5, f"Sending email to {context.to} ...")
        await asyncio.sleep(0.1)  # stands for a mail server
        progress.report(1.0, "Email sent")
        return EmailResult(sent=True)


async def main() -> None:
    # The first run() starts a local Ray, or joins the one that RAY_ADDRESS names.
    job = await EmailJob.start(EmailContext(to="user@example.com", body="hi")).run()
    print(f"submitted {job.kind}: {job.status.value}")

    result = await job.wait()
    print(f"{job.status.value}: sent={result.sent}, took {job.duration.total_seconds():.2f} s")

    # A context that does not fit is refused before anything is submitted.
    try:
        EmailJob.start({"to": "user@example.com"})
    except koan.InvalidContextError as error:
        print(f"refused: {error.fields}")


if __name__ == "__main__":
    asyncio.run(main())
