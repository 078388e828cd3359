"""One document server for the run, a database for each test; a server of its own where the server itself is hurt."""

from __future__ import annotations

import uuid

import pytest

from tests.chaos.bench import EffectLedger, History
from tests.chaos.fault_proxy import FaultProxy
from tests.servers import MongoServer


def pytest_configure(config):
    # PyMongo drops, unclosed, the socket of a connection that its client gave up on while it was made.
    config.addinivalue_line("filterwarnings", r"ignore:unclosed <socket\.socket:ResourceWarning")


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    started = MongoServer(tmp_path_factory.mktemp("chaos") / "db").start()
    yield started
    started.end()


@pytest.fixture
def own_server(tmp_path):
    """A server that a test may kill, pause and starve."""
    started = MongoServer(tmp_path / "db").start()
    yield started
    started.end()


@pytest.fixture
def database():
    """The name of a database that nobody else uses."""
    return f"c{uuid.uuid4().hex[:12]}"


@pytest.fixture
def proxy(server):
    started = FaultProxy(("127.0.0.1", server.port)).start()
    yield started
    started.end()


@pytest.fixture
def ledger(tmp_path):
    return EffectLedger(tmp_path / "effects")


@pytest.fixture
def history():
    return History()
