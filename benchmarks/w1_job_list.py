"""W1: a page of the job list over HTTP, with a million stored documents behind it.

Documents are written straight into the embedded server, in bulk, with the indexes that the product makes. A server (uvicorn)
and a client on loopback; pages of 100 jobs by the filters that a dashboard uses, in random order, each a few times. The
figure is the 95th percentile over all pages that are a range of an index. Pages by kind, which no index is about, are
measured and told as well. The oldest jobs first are left out: for those the embedded server reads and sorts all there are.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import tempfile
import threading
import time
from datetime import UTC, datetime

from benchmarks._harness import Row

BUDGET_S = 0.100
TOKEN = "a-token-for-the-benchmark-0123456789"
STATUSES = (["completed"] * 90) + (["failed"] * 8) + (["cancelled"] * 2)
KINDS = [f"kind-{n}" for n in range(10)]
NO_RANGE = ("of a kind", "failed of a kind")
BULK = 5_000
ROUNDS = 25


def run(quick: bool) -> list[Row]:
    from koan_ray.stores.embedded import DocumentServer

    n = int(os.environ.get("KOAN_RAY_BENCH_DOCUMENTS", "50_000" if quick else "1_000_000"))
    with tempfile.TemporaryDirectory() as directory:
        server = DocumentServer(directory)
        url = asyncio.run(server.start())
        try:
            began = time.perf_counter()
            fill(url, n)
            print(f"    {n:,} documents in {time.perf_counter() - began:,.0f} s", flush=True)
            took = measure(url, n)
        finally:
            asyncio.run(server.stop())
    ranges = {name: values for name, values in took.items() if name not in NO_RANGE}
    everything = [value for values in ranges.values() for value in values]
    slowest = max(ranges, key=lambda name: p95(took[name]))
    for name, values in took.items():
        print(f"    {name:<34} p50 {statistics.median(values) * 1e3:6.1f} ms   p95 {p95(values) * 1e3:6.1f} ms", flush=True)
    return [
        Row(f"W1 page of the job list on an index, {n:,} documents, p95", f"{p95(everything) * 1e3:.1f} ms",
            f"slowest kind of page: {slowest}, {p95(took[slowest]) * 1e3:.1f} ms", p95(everything) / BUDGET_S, 1.0, 0.5,
            " of 100 ms", lower=True)
    ]  # fmt: skip


def p95(values) -> float:
    return sorted(values)[min(len(values) - 1, int(0.95 * len(values)))]


def fill(url: str, n: int) -> None:
    """Write finished jobs of the last thirty days, oldest first."""
    from pymongo import MongoClient

    from koan_ray.domain.ids import new_id
    from koan_ray.domain.lease import slot_of
    from koan_ray.stores.codec import encode_job
    from koan_ray.stores.mongo_schema import JOB_INDEXES
    from koan_ray.testing.contracts import job

    template = encode_job(job(), 1_000_000)
    begin = time.time() - 30 * 86_400
    dice = random.Random(7)
    with MongoClient(url, w=1) as client:
        jobs = client.get_default_database().jobs
        for index in JOB_INDEXES:
            jobs.create_index(list(index.keys), name=index.name, **index.options)
        for start in range(0, n, BULK):
            documents = []
            for place in range(start, min(n, start + BULK)):
                job_id = new_id()
                at = datetime.fromtimestamp(begin + place * (30 * 86_400 / n), UTC).replace(microsecond=0)
                status = dice.choice(STATUSES)
                documents.append({
                    **template, "_id": job_id, "slot": slot_of(job_id), "kind": dice.choice(KINDS), "status": status,
                    "created_at": at, "queued_at": at, "started_at": at, "completed_at": at, "last_modified": at,
                    "context": {"to": f"user{place}@example.com", "body": "x" * 200}, "metadata": {"tenant": place % 100},
                    "correlation_id": f"c{place % (n // 50)}", "attempts": 1,
                    **({"error": {"type": "ValueError", "message": "no"}} if status == "failed" else {}),
                })  # fmt: skip
            jobs.insert_many(documents, ordered=False)


def measure(url: str, n: int) -> dict[str, list[float]]:
    import httpx2
    import uvicorn

    import koan_ray as koan
    from koan_ray import web

    dice = random.Random(11)
    limits = {"requests_per_second": 1e6, "burst": 1_000_000}
    with koan.init(runtime="local", sources={"default": {"url": url}}, web={"audit_file": "", "limits": limits}) as engine:
        app = web.create_app(engine, tokens=[web.token("bench", TOKEN)])
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", access_log=False))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.02)
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {TOKEN}"}) as client:

            def get(**params):
                answer = client.get("/api/jobs", params={"limit": 100, **params})
                assert answer.status_code == 200, answer.text
                return answer.json()

            def day():
                return datetime.fromtimestamp(time.time() - dice.uniform(1, 29) * 86_400, UTC).isoformat()

            def deep():
                return get(created_before=day())["cursor"]

            cursors = [deep() for _ in range(ROUNDS)]
            pages = {
                "newest first": dict,
                "a later page": lambda: {"cursor": dice.choice(cursors)},
                "failed": lambda: {"status": "failed"},
                "cancelled, before a day": lambda: {"status": "cancelled", "created_before": day()},
                "ended last": lambda: {"order_by": "-completed_at"},
                "ended before a day": lambda: {"order_by": "-completed_at", "completed_before": day()},
                "of a kind": lambda: {"kind": dice.choice(KINDS)},
                "failed of a kind": lambda: {"kind": dice.choice(KINDS), "status": "failed"},
                "by correlation": lambda: {"correlation_id": f"c{dice.randrange(n // 50)}"},
            }
            took: dict[str, list[float]] = {name: [] for name in pages}
            for params in pages.values():
                get(**params())
            order = [name for name in pages for _ in range(ROUNDS)]
            dice.shuffle(order)
            for name in order:
                params = pages[name]()
                began = time.perf_counter()
                found = get(**params)
                took[name].append(time.perf_counter() - began)
                assert found["items"], (name, params)
        server.should_exit = True
        thread.join(timeout=10)
    return took
