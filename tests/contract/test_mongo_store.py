"""MongoStore on a real server, with both drivers."""

from __future__ import annotations

import asyncio

import pytest
from pydantic_core import from_json
from pymongo import MongoClient, monitoring

import koan_ray as koan
from koan_ray import ambient, testing
from koan_ray.domain.archival import ArchivalPolicy
from koan_ray.domain.ids import new_id
from koan_ray.domain.query import parse_query
from koan_ray.domain.records import FAILED, STREAMS, VALUES, Checkpoint, ItemCounts, Part, Residence
from koan_ray.domain.status import ExecutionStatus, JobStatus, Reason
from koan_ray.errors import ConfigurationError, RecordCorruptError, StoreUnavailableError
from koan_ray.ports import Change, LoopClock
from koan_ray.stores import mongo_filters
from koan_ray.stores.mongo import MongoStore
from koan_ray.testing import DocumentStoreContract
from koan_ray.testing.contracts import AT, assert_same, audited, batch, execution, job, part
from tests.servers import EXTERNAL, MongoServer, free_port

EVERY_SLOT = range(256)


@pytest.fixture(params=["pymongo", "motor"])
def driver(request):
    return request.param


@pytest.fixture
async def another(mongo_url, driver):
    """Open one more client of the test's database."""
    opened = []

    async def open_another(**options):
        store = MongoStore(mongo_url, driver=driver, **options)
        await store.open()
        opened.append(store)
        return store

    yield open_another
    for store in opened:
        await store.close()


@pytest.fixture
async def store(another):
    return await another()


@pytest.fixture
def db(mongo_url):
    """The database, by a plain synchronous client."""
    with MongoClient(mongo_url, tz_aware=True) as client:
        yield client.get_default_database()


@pytest.fixture
def add_field(db):
    async def add(job_id, name, value):
        if value is not None:
            db.jobs.update_one({"_id": job_id}, {"$set": {name: value}})
        return db.jobs.find_one({"_id": job_id})[name]

    return add


async def everything(batches):
    return [item async for batch in batches for item in batch]


class BigLetter(koan.Job[str, str]):
    async def execute(self, context, progress, cancellation) -> str:
        return context * 3


class Counts(koan.Job[int, int]):
    """Items, one a checkpoint; each third is dead."""

    retry = koan.RetryPolicy(max_attempts=1)

    async def execute(self, context, progress, cancellation) -> int:
        order = ambient.attempt.get().order
        done = order.checkpoint or Checkpoint(0, b"[[0,0]]", context, 0, 0, 0, AT)
        for n in range(done.sequence, context):
            if n == 4 and self.metadata.get("breaks") and done.sequence == n and order.checkpoint is None:
                raise koan.NonRetryable("as asked")
            is_dead = n % 3 == 2
            stream, seq = (FAILED, done.failed) if is_dead else (VALUES, done.processed)
            done = done._replace(
                sequence=n + 1, body=b"[[0,%d]]" % (n + 1), failed=done.failed + is_dead,
                processed=done.processed + (not is_dead),
            )  # fmt: skip
            made = Part(self.id, stream, seq, b'[{"index":%d}]' % n, 1)
            assert await ambient.engine().checkpoint(self.id, order.execution_id, done, [made])
        return context


class TestMongo(DocumentStoreContract):
    async def test_a_job_over_items_goes_on_is_archived_and_comes_back(self, mongo_url, driver, db):
        """With its checkpoint and its parts, through a whole engine."""

        async def produced(job_id):
            return {
                s: [i["index"] for p in await ambient.engine().parts(job_id, s) for i in from_json(p.body)] for s in STREAMS
            }

        policy = ArchivalPolicy("soon", older_than_s=0.0)
        settings = {"archives": False, "archival_policies": (policy,), "lease_ttl_s": 5.0}
        clock = LoopClock(asyncio.get_running_loop())
        connect = lambda: MongoStore(mongo_url, driver=driver, source="default")  # noqa: E731
        async with testing.engine(sources={"default": connect}, clock=clock, **settings) as engine:
            old = await Counts.start(9).persist(partition="hot").with_metadata(breaks=True).run()
            with pytest.raises(koan.JobFailedError, match="as asked"):
                await old.wait()
            one = await koan.Jobs.retry(old.id, resume=True)
            assert await one.wait() == 9
            whole = {VALUES: [0, 1, 3, 4, 6, 7], FAILED: [2, 5, 8]}
            assert await produced(one.id) == whole
            assert await produced(old.id) == {VALUES: [0, 1, 3], FAILED: [2]}
            assert db["jobs.hot"].find_one({"_id": one.id})["items"]["state"] == [[0, 9]]
            assert (await engine.coordinator.archive(False))["soon"]["moved"] == 2
            assert (db["items.hot"].count_documents({}), db["items.archive"].count_documents({})) == (0, 13)
            assert await produced(one.id) == whole
            await koan.Jobs.restore(one.id)
            assert (db["items.hot"].count_documents({}), db["items.archive"].count_documents({})) == (9, 4)
            assert await produced(one.id) == whole
            assert (await koan.Jobs.get(one.id))._view.items == ItemCounts(9, 6, 0, 3)

    async def test_documents_that_cannot_be_read_do_not_hide_those_after_them(self, store, db):
        """The archivist goes on behind a whole page of them."""
        records = [job(status=JobStatus.COMPLETED, completed_at=AT + n) for n in range(6)]
        await store.apply([Change(record, 0) for record in records])
        db.jobs.update_many({"_id": {"$in": [record.id for record in records[:5]]}}, {"$unset": {"terms": ""}})
        found = await store.settled_before("", [JobStatus.COMPLETED], AT + 9, 2)
        assert [record.id for record in found] == [records[5].id]
        after = AT + 5, records[5].id
        assert await store.settled_before("", [JobStatus.COMPLETED], AT + 9, 2, after=after) == []

    # --- the archivist ---------------------------------------------------------------------------------------------------

    async def test_a_job_goes_to_the_archive_and_comes_back(self, mongo_url, driver, db):
        """With its executions and its large contents, through a whole engine."""

        def connect():
            return MongoStore(mongo_url, driver=driver, source="default", inline_limit=1000)

        policy = ArchivalPolicy("soon", older_than_s=0.0)
        settings = {"archives": False, "archival_policies": (policy,), "lease_ttl_s": 5.0}
        clock = LoopClock(asyncio.get_running_loop())
        async with testing.engine(sources={"default": connect}, clock=clock, **settings) as engine:
            job = await BigLetter.start("x" * 2000).persist(partition="hot").audit().run()
            assert await job.wait() == "x" * 6000
            tried = [e.id for e in await job.executions()]
            assert (await engine.coordinator.archive(True))["soon"]["due"] == 1
            for _ in range(2):
                assert (await engine.coordinator.archive(False))["soon"]["moved"] == 1
                assert (db["jobs.hot"].count_documents({}), db["jobs.archive"].count_documents({})) == (0, 1)
                assert (db["executions.hot"].count_documents({}), db["executions.archive"].count_documents({})) == (0, 1)
                assert (db["blobs.hot.files"].count_documents({}), db["blobs.archive.files"].count_documents({})) == (0, 2)
                assert (await koan.Jobs.get(job.id)).result == "x" * 6000
                assert [e.id for e in await job.executions()] == tried
                assert [found.id for found in await koan.Jobs.query(partition="*")] == [job.id]
                await koan.Jobs.restore(job.id)
                assert (db["jobs.hot"].count_documents({}), db["jobs.archive"].count_documents({})) == (1, 0)
                assert (db["executions.hot"].count_documents({}), db["executions.archive"].count_documents({})) == (1, 0)
                assert (await koan.Jobs.get(job.id)).result == "x" * 6000

    # --- payloads ----------------------------------------------------------------------------------------------------

    async def test_large_contents_are_kept_elsewhere_and_go_with_their_job(self, another, db):
        store = await another(inline_limit=1000)
        big, small = b'"' + b"x" * 600_000 + b'"', b'"y"'
        record = audited(context=big, partition="hot")
        assert await store.apply([Change(record, 0)]) == []
        assert await store.apply([Change(record, 0)]) == []  # again: the same content under the same name
        assert "context" not in db["jobs.hot"].find_one()
        done = record.evolve(rev=2, status=JobStatus.COMPLETED, completed_at=AT, result=big[:5000] + b'"')
        await store.apply([Change(done, 1)])
        assert_same(await store.get(record.id), done)
        page = await store.query(parse_query({"partition": "hot"}))
        assert page.jobs[0].context == big
        assert db["blobs.hot.files"].count_documents({}) == 2
        await store.put_copy(done, [], "archive")
        assert await store.delete_if(done, "hot") is True
        assert db["blobs.hot.files"].count_documents({}) == db["blobs.hot.chunks"].count_documents({}) == 0
        assert_same((await store.get_copy(record.id, "archive"))[0], done.evolve(particulars=done.particulars._replace(
            residence=Residence(None, "archive", audit=True))))  # fmt: skip
        assert await store.remove(record.id) is True
        assert db["blobs.archive.chunks"].count_documents({}) == 0
        await store.apply([Change(job(context=small), 0)])
        assert db["blobs.files"].count_documents({}) == 0

    async def test_a_refused_insert_does_not_touch_the_content_of_the_job_that_is_there_and_leaves_none(self, another, db):
        store = await another(inline_limit=10)
        first = job(context=b'"' + b"a" * 100 + b'"')
        second = Change(first.evolve(context=b'"' + b"b" * 100 + b'"'), 0)
        await store.apply([Change(first, 0)])
        assert await store.apply([second]) == [second]
        assert (await store.get(first.id)).context == first.context
        assert (db["blobs.files"].count_documents({}), db["blobs.chunks"].count_documents({})) == (1, 1)
        same = Change(first.evolve(created_at=first.created_at + 1), 0)
        assert await store.apply([same]) == [same]
        assert (await store.get(first.id)).context == first.context

    async def test_pieces_of_an_interrupted_upload_are_replaced(self, another, db):
        store = await another(inline_limit=10)
        record = job(context=b'"' + b"a" * 600_000 + b'"')
        await store.apply([Change(record, 0)])
        db["blobs.files"].delete_many({})  # as if it had been interrupted before its last write
        db.jobs.delete_many({})
        await store.apply([Change(record, 0)])
        assert (await store.get(record.id)).context == record.context

    async def test_a_document_that_is_too_large_is_refused_alone(self, store):
        good, other, giant = job(), job(), job(metadata={"x": "y" * 17_000_000})
        refused = Change(giant, 0)
        assert await store.apply([Change(good, 0), refused, Change(other, 0)]) == [refused]
        assert await store.get(good.id) is not None
        assert await store.get(other.id) is not None
        assert await store.get(giant.id) is None
        assert store.excess(good) is None
        size, limit = store.excess(giant)
        assert size > 17_000_000 > limit

    async def test_executions_that_an_interrupted_move_left_are_deleted_and_no_others(self, store, db):
        records = [audited(partition="hot", status=JobStatus.COMPLETED, completed_at=AT) for _ in range(3)]
        await store.apply([Change(record, 0, (execution(record),)) for record in records])
        moved, staying, unnoted = records
        assert await store.finish_moves() == 0
        await store.note_moves("hot", [unnoted.id])
        await store.note_moves("hot", [moved.id, staying.id])  # in place of those before
        db["jobs.hot"].delete_many({"_id": {"$in": [moved.id, unnoted.id]}})
        assert await store.finish_moves() == 1
        left = {found["job_id"] for found in db["executions.hot"].find()}
        assert left == {staying.id, unnoted.id}
        assert await store.finish_moves() == 0
        await store.note_moves("hot", [unnoted.id])
        assert await store.finish_moves() == 1

    async def test_a_removal_deletes_executions_first_so_that_an_interrupted_one_can_be_made_again(self, store, db):
        record = audited(partition="hot", status=JobStatus.COMPLETED, completed_at=AT)
        await store.apply([Change(record, 0, (execution(record),))])
        order = []
        database = store._db
        for name in ("jobs", "executions"):
            collection_of = getattr(database, name)
            setattr(
                database, name, lambda partition, n=name, of=collection_of: (order.append((n, partition)), of(partition))[1]
            )
        assert await store.remove(record.id) is True
        hot = [name for name, partition in order if partition == "hot"]
        assert hot.index("executions") < hot.index("jobs")
        assert db["executions.hot"].count_documents({}) == 0

    # --- damage ------------------------------------------------------------------------------------------------------

    async def test_documents_that_cannot_be_read_are_skipped_and_told(self, another, db):
        told = {}
        store = await another(on_corrupt=lambda job_id, error: told.update({job_id: error.field}))
        good, later, broken, ancient = (job() for _ in range(4))
        await store.apply([Change(record, 0) for record in (good, later, broken, ancient)])
        db.jobs.update_one({"_id": later.id}, {"$set": {"schema_version": 2}})
        db.jobs.update_one({"_id": broken.id}, {"$unset": {"terms": ""}})
        db.jobs.update_one({"_id": ancient.id}, {"$set": {"created_at": "yesterday"}})
        expected = {later.id: "schema_version", broken.id: "terms", ancient.id: "created_at"}
        assert [r.id for r in await everything(store.unfinished(EVERY_SLOT, 0))] == [good.id]
        assert told == expected
        told.clear()
        assert [r.id for r in (await store.query(parse_query({}))).jobs] == [good.id]
        # What has no instant is not found by a range of instants, which some servers are asked for.
        assert {ancient.id: "created_at", **told} == expected
        for job_id, field in expected.items():
            with pytest.raises(RecordCorruptError, match=field):
                await store.get(job_id)
        assert await store.claim(EVERY_SLOT, 9) == 3
        assert db.jobs.find_one({"_id": later.id}, {"term": 1})["term"] == 0

    async def test_a_damaged_execution_is_skipped_at_a_start(self, another, db):
        told = []
        store = await another(on_corrupt=lambda record_id, error: told.append(record_id))
        record = audited()
        first, second = execution(record), execution(record, attempt=2)
        await store.apply([Change(record, 0, (first, second))])
        db.executions.update_one({"_id": first.id}, {"$set": {"attempt": "one"}})
        assert [e.id for e in await everything(store.open_executions(EVERY_SLOT))] == [second.id]
        assert told == [first.id]

    # --- queries -----------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        "order", ["created_at", "-created_at", "completed_at", "-completed_at", "started_at", "-started_at"]
    )
    async def test_pages_join_without_gap_or_double(self, store, order):
        records = [
            job(
                at=AT + (n % 5) / 3000, started_at=AT + (n % 3) / 3000 if n % 4 else None,
                status=JobStatus.COMPLETED if n % 2 else JobStatus.RUNNING,
                completed_at=AT + (n % 7) / 3000 if n % 2 else None,
            )
            for n in range(60)
        ]  # fmt: skip
        await store.apply([Change(record, 0) for record in records])
        for more in ({}, {"status": ["completed", "running"]}):
            query = parse_query({"order_by": order, **more})
            stored = [await store.get(record.id) for record in records]
            expected = [r.id for r in sorted(stored, key=query.sort_key, reverse=query.descending)]
            seen, cursor = [], None
            while True:
                page = await store.query(parse_query({"order_by": order, "limit": 7, "cursor": cursor, **more}))
                seen += [record.id for record in page.jobs]
                cursor = page.cursor
                if cursor is None:
                    break
            assert seen == expected

    async def test_bounds_agree_with_the_records_read_back(self, store):
        records = [job(at=AT + n / 10_000) for n in range(50)]
        await store.apply([Change(record, 0) for record in records])
        stored = [await store.get(record.id) for record in records]
        for bound in (AT + 0.0004, AT + 0.0005, AT + 0.001, stored[30].created_at):
            for name in ("created_after", "created_before"):
                query = parse_query({name: bound})
                assert {r.id for r in (await store.query(query)).jobs} == {r.id for r in stored if query.matches(r)}

    @pytest.mark.parametrize(
        "sought", [1, "1", 1.5, None, [1, 2], {"a": 1, "b": 2}, "$x", "a.b", [], {}, ["$x"], {"$ne": 1}, {"$gt": ""}]
    )
    async def test_metadata_is_compared_as_the_reference_does(self, store, sought):
        values = [1, "1", 1.5, None, [1, 2], [1], {"b": 2, "a": 1}, {"a": 1}, "$x", "a.b", [], {}, [[1, 2]], [None], ["$x"]]
        records = [job(metadata={"k": value}) for value in values] + [job(metadata={"other": 1}), job()]
        await store.apply([Change(record, 0) for record in records])
        query = parse_query({"metadata": {"k": sought}})
        expected = {r.id for r in records if query.matches(r)}
        assert {r.id for r in (await store.query(query)).jobs} == expected
        assert await store.count(query) == len(expected)

    async def test_text_is_found_as_written_and_not_as_a_pattern(self, store):
        record = job(name="a+b (c) [d].*", description="Größe", at=AT)
        await store.apply([Change(record, 0), Change(job(name="aab"), 0)])
        for text, n in (("A+B (C)", 1), (".*", 1), ("größe", 1), ("a.b", 0), ("^a", 0), ("$", 0), ("|", 0)):
            assert await store.count(parse_query({"text": text})) == n, text

    async def test_an_outline_is_the_query_without_payloads(self, store):
        big = b'"' + b"x" * 300_000 + b'"'  # kept outside of its document
        records = [job(at=AT + n, name=f"n{n}", context=big, result=big, metadata={"k": n}) for n in range(5)]
        records.append(job(at=AT + 9, context=b'{"a": 1}'))
        await store.apply([Change(record, 0) for record in records])
        for filters in ({"limit": 3}, {"order_by": "created_at", "limit": 6}, {"metadata": {"k": 2}}, {"name": "n4"}):
            query = parse_query(filters)
            page, outline = await store.query(query), await store.outline(query)
            assert [record.id for record in outline.jobs] == [record.id for record in page.jobs]
            assert outline.cursor == page.cursor
            assert {(record.context, record.result) for record in outline.jobs} == {(b"null", None)}
            for found, expected in zip(outline.jobs, page.jobs, strict=True):
                assert_same(found, expected.evolve(context=b"null", result=None))

    async def test_counting_stops_at_its_limit(self, store):
        await store.apply([Change(job(metadata={"k": n % 2, "list": [n % 2]}), 0) for n in range(30)])
        await store.apply([Change(audited(partition="other"), 0) for _ in range(5)])
        for filters, n in (
            ({}, 35),
            ({"metadata": {"k": 1}}, 15),
            ({"metadata": {"list": [1]}}, 15),
            ({"partition": ""}, 30),
        ):
            query = parse_query(filters)
            assert await store.count(query) == n
            for at_most in (1, 10, n, n + 1, 1000):
                assert await store.count_up_to(query, at_most) == min(n, at_most)

    # --- indexes -----------------------------------------------------------------------------------------------------

    async def test_every_query_walks_an_index(self, mongo_url, store):
        """Every find, count, update and delete that the store sends to MongoDB is explained by the server, as sent."""
        sent = []

        class Listener(monitoring.CommandListener):
            def started(self, event):
                if event.command_name in {"find", "aggregate", "update", "delete"}:
                    sent.extend(asked_by(event.command_name, dict(event.command)))

            def succeeded(self, event):
                pass

            failed = succeeded

        listener = Listener()
        monitoring.register(listener)
        watched = MongoStore(mongo_url)
        try:
            await watched.open()
            watched._db.connection.follows_hints = True
            records = [job(correlation_id="c", parent_job_id=job().id, name="n", metadata={"k": 1}) for _ in range(20)]
            await watched.apply([Change(record, 0) for record in records])
            sent.clear()
            await exercise(watched)
        finally:
            monitoring._LISTENERS.command_listeners.remove(listener)
            await watched.close()
        assert len(sent) > 60
        assert {"items", "jobs", "executions"} <= {command.get("find") for command in sent}
        with MongoClient(mongo_url) as client:
            plans = [(command, plan_of(client.get_default_database(), command)) for command in sent]
        scanned = [command for command, plan in plans if "COLLSCAN" in plan or not ("IXSCAN" in plan or "IDHACK" in plan)]
        assert scanned == []

    async def test_jobs_over_items_are_found_in_an_index_that_holds_nothing_else(self, mongo_url, another, db):
        """In the order of a page, and so that the index of other jobs is not even looked at; also what is there already."""
        await another()
        db.jobs.drop_index("over_items")
        reader = await another(read_only=True)  # of a database that an earlier version has made
        plain, over_items = [job(at=AT + n) for n in range(20)], [batch(at=AT + n) for n in range(0, 20, 4)]
        await reader.apply([Change(record, 0) for record in (*plain, *over_items)])
        explicit = job(at=AT + 30)
        await reader.apply([Change(explicit, 0)])
        db.jobs.update_one({"_id": explicit.id}, {"$set": {"terms.spec.lead": False}})
        query = parse_query({"has_items": True, "limit": 3})
        expected = [record.id for record in reversed(over_items)]
        assert [record.id for record in (await reader.query(query)).jobs] == expected[:3]
        store = await another()
        page = await store.query(query)
        assert [record.id for record in page.jobs] == expected[:3]
        rest = await store.query(parse_query({"has_items": True, "limit": 3, "cursor": page.cursor}))
        assert [record.id for record in rest.jobs] == expected[3:]
        others = await store.query(parse_query({"has_items": False}))
        assert {record.id for record in others.jobs} == {record.id for record in (*plain, explicit)}
        (step,) = mongo_filters.steps(query)
        with MongoClient(mongo_url) as client:
            command = {"find": "jobs", "filter": step.filter, "sort": dict(step.sort), "hint": step.hint, "limit": 4}
            plan = plan_of(client.get_default_database(), command)
        assert "IXSCAN" in plan
        assert "'over_items'" in plan
        if EXTERNAL:  # the embedded server sorts whatever it has found
            assert "'SORT'" not in plan
        assert db.jobs.index_information()["over_items"]["partialFilterExpression"] == {"terms.spec.lead": True}

    async def test_dead_items_are_documents_and_values_are_text(self, store, db):
        """What people query is queryable, and what there are millions of is not taken apart."""
        record = job()
        dead = b'[{"index":7,"error":{"type":"ValueError"}}]'
        await store.write_parts("hot", [part(record, 0, dead, stream=FAILED), part(record, 0, b"[1,2]")])
        found = db["items.hot"].find_one({"items.error.type": "ValueError"})
        assert (found["job_id"], found["seq"], found["items"][0]["index"]) == (record.id, 0, 7)
        assert db["items.hot"].find_one({"stream": VALUES})["items_json"] == "[1,2]"

    async def test_of_two_that_write_a_part_at_once_the_later_execution_stays(self, another):
        """Whichever of them the server takes first."""
        first, second = await another(), await another()
        for n in range(10):
            late, newer = part("a job", n, b"[1]", fence=1), part("a job", n, b"[2]", fence=2)
            await asyncio.gather(first.write_parts("", [late]), second.write_parts("", [newer]))
            assert await first.read_parts("", "a job", VALUES, n - 1, 1) == [newer]

    async def test_missing_indexes_are_made_at_a_start(self, another, db):
        await another()
        db.jobs.drop_index("status")
        await another()
        assert "status" in db.jobs.index_information()

    @pytest.mark.parametrize("in_the_way", ["keys", "sparse", "another name", "by age of executions", "by age of items"])
    async def test_an_index_in_the_way_is_named(self, mongo_url, driver, db, in_the_way):
        if in_the_way == "keys":
            db.jobs.create_index([("kind", 1)], name="status")
        elif in_the_way == "sparse":
            db.jobs.create_index([("completed_at", 1), ("_id", 1)], name="completed", sparse=True)
        elif in_the_way == "another name":
            db.jobs.create_index([("created_at", 1), ("_id", 1)], name="mine")
        else:
            db[in_the_way.removeprefix("by age of ")].create_index([("started_at", 1)], name="old", expireAfterSeconds=60)
        named = {"keys": "'status'", "sparse": "'completed'", "another name": "'created'"}
        store = MongoStore(mongo_url, source="jobs", driver=driver)
        with pytest.raises(ConfigurationError, match=f"'jobs'.*{named.get(in_the_way, 'old')}"):
            await store.open()

    async def test_a_reader_writes_nothing(self, another, db):
        reader = await another(read_only=True)
        assert await reader.partitions() == [""]
        assert [batch async for batch in reader.scan("")] == []
        assert await reader.executions_in(["nothing"], "") == []
        assert db.list_collection_names() == []

    async def test_a_scan_tells_of_ids_that_are_no_ids(self, another, db):
        told = []
        store = await another(on_corrupt=lambda record_id, error: told.append((record_id, error.field)))
        db.jobs.insert_many([{"_id": 7}, {"_id": "x"}])
        assert [record async for batch in store.scan("") for record in batch] == []
        assert told == [("7", "_id"), ("x", "schema_version")]

    async def test_many_may_open_an_empty_database_at_once(self, mongo_url, driver):
        stores = [MongoStore(mongo_url, driver=driver) for _ in range(4)]
        await asyncio.gather(*(store.open() for store in stores), stores[0].open())
        for store in stores:
            await store.close()


async def exercise(store):
    """Ask for everything that the product asks for."""
    shapes = (
        {}, {"kind": "mail"}, {"kind": ["mail", "report"]}, {"status": "queued"}, {"status": ["queued", "failed"]},
        {"correlation_id": "c"}, {"parent_job_id": "p"}, {"name": "n"}, {"text": "x"}, {"metadata": {"k": 1}},
        {"metadata": {"k": [1]}}, {"created_after": AT - 5, "created_before": AT + 5},
        {"completed_after": AT, "completed_before": AT + 5}, {"status": "failed", "kind": "mail", "created_after": AT},
        {"correlation_id": "c", "status": "queued", "created_after": AT}, {"has_items": True}, {"has_items": False},
        {"has_items": True, "status": "running", "created_after": AT}, {"has_items": True, "completed_after": AT},
    )  # fmt: skip
    for shape in shapes:
        await store.count(parse_query(shape))
        for order in ("created_at", "queued_at", "started_at", "completed_at"):
            for sign in ("", "-"):
                query = parse_query({**shape, "order_by": sign + order, "limit": 5})
                page = await store.query(query)
                if page.cursor:
                    await store.query(parse_query({**shape, "order_by": sign + order, "limit": 5, "cursor": page.cursor}))
                assert len(mongo_filters.steps(query)) == 1
    await everything(store.unfinished(EVERY_SLOT, 0))
    await everything(store.unfinished([1, 2], 0))
    await everything(store.last_settled(EVERY_SLOT, 10))
    await everything(store.last_settled([1, 2], 10))
    await everything(store.open_executions([1, 2]))
    await store.settled_before("", [JobStatus.FAILED, JobStatus.COMPLETED], AT, 5, ["mail"])
    await store.get("nothing")
    await store.executions("nothing")
    await store.claim([1, 2], 5)
    await store.get_copy("nothing", "")
    await everything(store.scan(""))
    for filters in ({}, {"status": "queued"}, {"completed_after": AT}, {"parent_job_id": "p"}, {"text": "a"},
                    {"has_items": True}, {"has_items": False}):  # fmt: skip
        await store.outline(parse_query(filters))
        await store.count_up_to(parse_query(filters), 100)
    await store.statuses(["nothing"], "")
    await store.executions_in(["nothing"], "")
    await store.write_parts("", [part("a job", n, stream=stream) for n in range(3) for stream in STREAMS])
    assert len(await store.read_parts("", "a job", VALUES, 0)) == 2
    await store.drop_parts("", "a job", VALUES, 1, below=1)
    assert await everything(store.jobs_with_parts("")) == ["a job"]
    await store.remove("a job")
    await store.delete_if(job(status=JobStatus.FAILED), "")


def asked_by(name, command):
    """The finds that a command makes: itself, or what its updates and deletes look for without naming a document."""
    if name not in {"update", "delete"}:
        return [command]
    return [{"find": command[name], "filter": each["q"]} for each in command[f"{name}s"] if "_id" not in each["q"]]


def plan_of(db, command):
    wanted = ("find", "filter", "sort", "hint", "limit", "aggregate", "pipeline", "cursor")
    asked = {name: value for name, value in command.items() if name in wanted}
    return str(db.command({"explain": asked, "verbosity": "queryPlanner"}))


# --- outages ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_server(tmp_path):
    """A server that a test may kill."""
    if EXTERNAL:
        pytest.skip("the server is not ours to kill")
    server = MongoServer(tmp_path / "db").start()
    yield server
    server.end()


async def test_nobody_at_the_address_is_told_in_time(driver):
    store = MongoStore(f"mongodb://127.0.0.1:{free_port()}/koan?serverSelectionTimeoutMS=300", source="jobs", driver=driver)
    with pytest.raises(StoreUnavailableError, match="'jobs'"):
        await store.open()


async def test_what_was_acknowledged_survives_the_servers_death(own_server, driver):
    store = MongoStore(own_server.url() + "&serverSelectionTimeoutMS=2000", driver=driver)
    await store.open()
    acknowledged, n_unknown = [], 0
    for round_ in range(2):
        killing = asyncio.get_running_loop().call_later(0.1 + 0.05 * round_, own_server.kill9)
        while True:
            change = Change(audited(), 0)
            begun = execution(change.job)
            try:
                assert await store.apply([change._replace(executions=(begun,))]) == []
            except StoreUnavailableError:
                n_unknown += 1
                break
            acknowledged.append((change.job, begun))
        killing.cancel()
        await asyncio.to_thread(own_server.restart)
        # The writer's way out: apply it again as it is.
        assert await store.apply([change._replace(executions=(begun,))]) == []
        acknowledged.append((change.job, begun))
    assert n_unknown == 2
    for record, begun in acknowledged:
        assert_same(await store.get(record.id), record)
        assert [e.id for e in await store.executions(record.id)] == [begun.id]
    ended = [(begun.close(status=ExecutionStatus.FAILED, reason=Reason.LOST, at=AT), "") for _, begun in acknowledged]
    assert await store.close_executions(ended) == len(ended)
    await store.close()


async def test_a_server_that_is_silent_is_an_outage(own_server, driver):
    store = MongoStore(own_server.url() + "&socketTimeoutMS=300&serverSelectionTimeoutMS=300", driver=driver)
    await store.open()
    record = job()
    own_server.stop()
    with pytest.raises(StoreUnavailableError):
        await store.apply([Change(record, 0)])
    own_server.cont()
    for _ in range(50):
        try:
            assert await store.apply([Change(record, 0)]) == []
            break
        except StoreUnavailableError:
            await asyncio.sleep(0.1)
    assert_same(await store.get(record.id), record)
    await store.close()


async def test_values_are_replaced_and_those_beyond_are_dropped(another, db):
    """What an earlier attempt has written is there once afterwards, as the later one wrote it; other jobs keep theirs."""
    store, mine, other = await another(), new_id(), new_id()
    await store.write_documents("sink", mine, 0, [b'{"n":%d}' % n for n in range(1200)])
    await store.write_documents("sink", other, 0, [b"7"])
    await store.write_documents("sink", mine, 1, [b'{"n":-1}', b"[1,2]"])
    await store.drop_documents("sink", mine, 3)
    found = list(db["sink"].find(sort=[("_id", 1)]))
    assert [each for each in found if each["_id"].startswith(mine)] == [
        {"_id": f"{mine}/000000000000", "n": 0},
        {"_id": f"{mine}/000000000001", "n": -1},
        {"_id": f"{mine}/000000000002", "value": [1, 2]},
    ]
    assert [each["value"] for each in found if each["_id"].startswith(other)] == [7]
    with pytest.raises(ConfigurationError, match="not for values"):
        await store.drop_documents("executions", mine, 0)
