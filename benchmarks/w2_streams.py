"""W2: what five hundred readers of live streams cost the jobs.

An engine on Ray, the API as a process of its own, and a third process that reads 500 streams: half of all jobs, half of one
job that waits. Rounds without and with the readers alternate; each runs no-op jobs with ``start_many`` until all results are
here. Everything shares the machine's cores, the readers included, so that the figure is the worst that can be.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

from benchmarks._harness import Row, end_engine, median, start_engine, timed

N_STREAMS = 500
TOKEN = "a-token-for-the-benchmark-0123456789"


def run(quick: bool) -> list[Row]:
    import ray

    import koan_ray as koan

    n, rounds = (20_000, 3) if quick else (20_000, 7)

    @koan.job(kind="w2.noop")
    def noop(x: int) -> int:
        return x

    @koan.job(kind="w2.waits")
    async def waits(x: int, cancellation) -> int:
        await cancellation.wait()
        return x

    engine = start_engine(max_actors=2)
    address = ray.get_runtime_context().gcs_address
    waiting = waits.start(0).run().get()
    without, with_readers = [], []

    def once() -> None:
        for job in noop.start_many(range(n)).run().get():
            job.wait().get()

    once()
    with serving(address, engine.settings.engine.namespace) as base, reading(base, waiting.id) as readers:
        for _ in range(rounds):
            without.append(n / timed(once))
            readers("open")
            with_readers.append(n / timed(once))
            readers("close")
        n_bytes = readers("tell")
    waiting.cancel().get()
    end_engine(engine)
    print(f"    the readers were sent {n_bytes / 1e6:,.0f} MB", flush=True)
    ratio = median(with_readers) / median(without)
    return [
        Row(f"W2 no-op jobs, {N_STREAMS} open streams", f"{median(with_readers):,.0f} jobs/s",
            f"{median(without):,.0f} jobs/s without", ratio, 0.95, 0.99)
    ]  # fmt: skip


@contextlib.contextmanager
def serving(address: str, namespace: str):
    """The API in a process of its own; its address."""
    with tempfile.TemporaryDirectory() as directory:
        token = Path(directory) / "token"
        token.touch(0o600)
        token.write_text(TOKEN)
        command = [
            sys.executable,
            "-m",
            "koan_ray",
            "serve",
            "--address",
            address,
            "--port",
            "0",
            "--token-file",
            str(token),
        ]
        variables = {"KOAN_RAY_ENGINE__NAMESPACE": namespace, "KOAN_RAY_WEB__AUDIT_FILE": "", "PYTHONUNBUFFERED": "1"}
        server = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, **variables}, text=True)
        try:
            line = next(text for text in server.stdout if "answers at" in text)
            yield line.split("answers at ")[1].split(";")[0]
        finally:
            server.terminate()
            server.wait(timeout=20)


@contextlib.contextmanager
def reading(base: str, job_id: str):
    """The readers in a process of their own; tells them what to do and returns what they answer."""
    request = urllib.request.Request(f"{base}/api/jobs/{job_id}", headers={"Authorization": f"Bearer {TOKEN}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert json.load(answer)["id"] == job_id
    command = [sys.executable, "-m", "benchmarks.w2_streams", base.rpartition(":")[2], job_id]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def tell(what: str) -> int:
        process.stdin.write(what + "\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    try:
        yield tell
    finally:
        process.stdin.close()
        process.wait(timeout=20)


async def readers(port: int, job_id: str) -> None:
    """Open and close the streams as told, a line at a time; answers how many are open, or how much was read."""
    loop, n_read, tasks = asyncio.get_running_loop(), 0, []

    async def one(path: str, opened: asyncio.Event) -> None:
        nonlocal n_read
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            head = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {TOKEN}\r\n\r\n"
            writer.write(head.encode())
            status = await reader.readline()
            assert b"200" in status, status
            await reader.read(100)
            opened.set()
            while chunk := await reader.read(65536):
                n_read += len(chunk)
        finally:
            writer.close()

    while line := (await loop.run_in_executor(None, sys.stdin.readline)).strip():
        answer = n_read
        if line == "open":
            for start in range(0, N_STREAMS, 50):  # within what one token may ask at once
                events = [asyncio.Event() for _ in range(50)]
                paths = ["/api/events" if place % 2 else f"/api/jobs/{job_id}/events" for place in range(start, start + 50)]
                tasks += [asyncio.create_task(one(path, event)) for path, event in zip(paths, events, strict=True)]
                await asyncio.gather(*[event.wait() for event in events])
                await asyncio.sleep(1.0)
            answer = len(tasks)
        elif line == "close":
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            tasks = []
            await asyncio.sleep(0.5)
        print(answer, flush=True)


if __name__ == "__main__":
    asyncio.run(readers(int(sys.argv[1]), sys.argv[2]))
