"""Suites may run in virtual time: ``virtual_time = True`` in the class."""

from __future__ import annotations

import asyncio
import uuid

import pytest

from koan_ray.testing import VirtualLoop
from tests.servers import EXTERNAL, ExternalServer, MongoServer


def pytest_asyncio_loop_factories(config, item):
    is_virtual = getattr(item.cls, "virtual_time", False)
    return {"virtual": VirtualLoop} if is_virtual else {"real": asyncio.new_event_loop}


@pytest.fixture(scope="session")
def mongo_server(tmp_path_factory):
    server = ExternalServer() if EXTERNAL else MongoServer(tmp_path_factory.mktemp("mongo") / "db").start()
    yield server
    server.end()


@pytest.fixture
def mongo_url(mongo_server):
    """A database of its own, gone after the test."""
    from pymongo import MongoClient

    url = mongo_server.url(f"t{uuid.uuid4().hex[:12]}")
    yield url
    with MongoClient(url, serverSelectionTimeoutMS=2000) as client:
        client.drop_database(client.get_default_database().name)
