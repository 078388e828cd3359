"""Values of items on a real Ray and a real document server: as documents, and as a dataset of Ray Data."""

from __future__ import annotations

import os

import pytest
from pymongo import MongoClient

import koan_ray as koan
from tests.integration.conftest import end_namespace
from tests.servers import MongoServer

pytestmark = pytest.mark.ray


class Written(koan.FiniteJob[dict, int, int]):
    """Its values go to a collection; where it is told to, it dies in between, the first time."""

    retry = koan.RetryPolicy(max_attempts=2, initial_delay=0.1)
    items = koan.ItemOptions(ordered=True)

    def get_items(self, context):
        return range(context["n"])

    def process_item(self, item, index, progress):
        if self.context.get("plain"):
            return koan.ItemResult.success(item)
        return koan.ItemResult.success({"n": item, **self.context.get("more", {})})

    def build_result(self, summary) -> int:
        n = summary.values.write_documents(self.context["collection"], self.context.get("source"))
        once = self.context.get("dies_once")
        if once and not os.path.exists(once):
            open(once, "w").close()
            os._exit(1)
        return n


class Collected(koan.FiniteJob[dict, int, int]):
    retry = koan.RetryPolicy(max_attempts=1)

    def get_items(self, context):
        return range(context["n"])

    def process_item(self, item, index, progress):
        return koan.ItemResult.success({"n": item, "text": "x" * 10} if item != self.context.get("odd") else item)

    def build_result(self, summary) -> int:
        dataset = summary.values.to_dataset()
        dataset.write_parquet(self.context["folder"])
        return dataset.count()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    started = MongoServer(tmp_path_factory.mktemp("sinks") / "db").start()
    yield started
    started.end()


@pytest.fixture(scope="module", autouse=True)
def engine(cluster, server):
    sections = {"max_actors": 1, "cancel_grace": 0.5, "namespace": "test-sinks"}
    sources = {
        "default": {"url": server.url("sinks")},
        "archive": {"url": server.url("other")},
        "ram": {"url": "memory://"},
    }
    with koan.init(engine=sections, sources=sources) as engine:
        yield engine
        end_namespace("test-sinks")


@pytest.fixture
def client(server):
    with MongoClient(server.url("sinks")) as client:
        yield client


def written(**context):
    job = Written.start(context).run().get(30)
    return job, job.wait().get(60)


def test_each_value_is_a_document_in_the_order_of_the_values(client):
    job, n = written(n=1234, collection="readings")
    assert n == 1234
    found = list(client["sinks"]["readings"].find(sort=[("_id", 1)]))
    assert [(each["_id"], each["n"]) for each in found] == [(f"{job.id}/{n:012d}", n) for n in range(1234)]


def test_values_that_are_no_objects_are_members_and_go_where_they_are_told_to(client):
    job, _ = written(n=3, collection="numbers", source="archive", plain=True)
    found = list(client["other"]["numbers"].find(sort=[("_id", 1)]))
    assert found == [{"_id": f"{job.id}/{n:012d}", "value": n} for n in range(3)]
    assert "numbers" not in client["sinks"].list_collection_names()


def test_a_result_that_is_built_again_writes_nothing_twice(client, tmp_path):
    dies_once = tmp_path / "died"
    job = Written.start({"n": 700, "collection": "again", "dies_once": str(dies_once)}).persist().run().get(30)
    assert job.wait().get(60) == 700
    assert dies_once.exists()
    assert sorted(each["n"] for each in client["sinks"]["again"].find()) == list(range(700))


def test_two_jobs_share_a_collection_and_none_without_values_leaves_anything(client):
    written(n=5, collection="shared")
    written(n=4, collection="shared")
    assert written(n=0, collection="shared")[1] == 0
    assert client["sinks"]["shared"].count_documents({}) == 9


@pytest.mark.parametrize(
    ("context", "told"),
    [
        ({"collection": "jobs"}, "collection 'jobs' is not for values"),
        ({"collection": "leases"}, "collection 'leases' is not for values"),
        ({"collection": "jobs.hot"}, "expected 1 to 64 of a-z"),
        ({"collection": ""}, "expected 1 to 64 of a-z"),
        ({"collection": "Große"}, "expected 1 to 64 of a-z"),
        ({"collection": "fine", "source": "ram"}, "source 'ram' is no document store of this engine.*'archive', 'default'"),
        ({"collection": "fine", "source": "nowhere"}, "source 'nowhere' is no document store of this engine"),
        ({"collection": "bad", "more": {"_id": 3}}, "value 0 has a member '_id'"),
        ({"collection": "bad", "more": {"$set": 3}}, r"value 0 has a member '\$set'"),
        ({"collection": "bad", "more": {"large": 2**70}}, "value 0 cannot be a document"),
    ],
)
def test_what_cannot_be_written_is_told(context, told, client):
    once = type("Once", (Written,), {"retry": koan.RetryPolicy(max_attempts=1)})
    with pytest.raises(koan.JobFailedError, match=told):
        once.start({"n": 2, **context}).run().get(30).wait().get(60)
    assert not {"bad", "fine"} & set(client["sinks"].list_collection_names())


def test_values_become_a_dataset_in_blocks_and_parquet_through_ray_data(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    job = Collected.start({"n": 25_000, "folder": str(tmp_path / "out")}).run().get(30)
    assert job.wait().get(90) == 25_000
    table = parquet.read_table(tmp_path / "out")
    assert sorted(table["n"].to_pylist()) == list(range(25_000))
    assert set(table.column_names) == {"n", "text"}
    assert len(list((tmp_path / "out").glob("*.parquet"))) > 1, "one block only"


def test_no_values_are_an_empty_dataset(tmp_path):
    pytest.importorskip("pyarrow")
    assert Collected.start({"n": 0, "folder": str(tmp_path / "none")}).run().get(30).wait().get(60) == 0


def test_values_that_do_not_fit_the_columns_are_no_dataset(tmp_path):
    pytest.importorskip("pyarrow")
    context = {"n": 10, "odd": 7, "folder": str(tmp_path / "odd")}
    with pytest.raises(koan.JobFailedError, match="to_dataset: a value does not fit the columns"):
        Collected.start(context).run().get(30).wait().get(60)
    assert not (tmp_path / "odd").exists()
