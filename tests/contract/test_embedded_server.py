"""The document server that we start ourselves."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys

import psutil
import pytest

from koan_ray.errors import ConfigurationError, StoreUnavailableError
from koan_ray.ports import Change
from koan_ray.stores import embedded
from koan_ray.stores.embedded import DocumentServer
from koan_ray.stores.mongo import MongoStore
from koan_ray.testing.contracts import job


@pytest.fixture
async def started(tmp_path):
    """Make servers of one directory; all end with the test."""
    servers = []

    async def start(**options):
        server = DocumentServer(tmp_path / "store", **options)
        servers.append(server)
        await server.start()
        return server

    yield start
    for server in reversed(servers):
        await server.stop()


def is_gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


async def until(condition, within=20.0):
    for _ in range(int(within / 0.05)):
        if condition():
            return
        await asyncio.sleep(0.05)
    pytest.fail(f"not within {within:g} s")


async def test_what_was_written_is_there_after_a_stop_and_a_start(started):
    server = await started()
    store = MongoStore(server.url)
    await store.open()
    record = job()
    await store.apply([Change(record, 0)])
    await store.close()
    pid, url = server.pid, server.url
    assert await server.start() == url  # a second call changes nothing
    await server.stop()
    assert is_gone(pid)
    with pytest.raises(StoreUnavailableError):
        _ = server.url
    assert (await started()).url == url  # another process would find it at the same address
    store = MongoStore(url)
    await store.open()
    assert await store.get(record.id) is not None
    await store.close()


async def test_two_that_start_at_once_share_one_server(started):
    first, second = await asyncio.gather(started(), started())
    assert first.pid == second.pid
    assert first.url == second.url
    assert [first.is_owner, second.is_owner].count(True) == 1
    guest, owner = (first, second) if second.is_owner else (second, first)
    await guest.stop()
    assert not is_gone(owner.pid)


async def test_a_server_that_dies_is_started_again_on_its_port(started):
    server = await started()
    url, pid = server.url, server.pid
    store = MongoStore(url + "&serverSelectionTimeoutMS=10000")
    await store.open()
    record = job()
    await store.apply([Change(record, 0)])
    os.kill(pid, signal.SIGKILL)
    await until(lambda: server.pid != pid)
    assert server.url == url
    for _ in range(3):
        try:
            assert await store.get(record.id) is not None
            break
        except StoreUnavailableError:
            continue
    await store.close()


async def test_a_guest_takes_over_when_the_owner_is_gone(started):
    owner = await started()
    guest = await started()
    pid, url = owner.pid, owner.url
    await owner.stop()
    await until(lambda: guest.is_owner)
    assert is_gone(pid)
    assert guest.url == url


async def test_the_server_dies_with_the_process_that_started_it(tmp_path):
    script = (
        "import asyncio, sys\n"
        "from koan_ray.stores.embedded import DocumentServer\n"
        "async def main():\n"
        "    server = DocumentServer(sys.argv[1])\n"
        "    await server.start()\n"
        "    print(server.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "store")], stdout=subprocess.PIPE) as process:
        pid = int(await asyncio.to_thread(process.stdout.readline))
        assert not is_gone(pid)
        process.kill()
    await until(lambda: is_gone(pid), within=5)


@pytest.mark.parametrize("said", ["nonsense", '{"pid": 1}', "[]", '{"pid": "x", "port": 1, "started_at": 0}'])
def test_a_file_that_says_nothing_is_no_server(tmp_path, said):
    (tmp_path / "server.json").write_text(said)
    assert DocumentServer(tmp_path)._read() is None


async def test_another_process_with_a_known_pid_is_not_taken_for_the_server(started, tmp_path):
    directory = tmp_path / "store"
    directory.mkdir()
    (directory / "server.json").write_text(json.dumps({"pid": os.getpid(), "port": 1, "started_at": 0}))
    server = await started()
    assert server.is_owner
    assert json.loads((directory / "server.json").read_text())["pid"] == server.pid


async def test_what_to_install_is_said(started, monkeypatch):
    monkeypatch.setattr(embedded, "_COMMAND", "no-such-server")
    with pytest.raises(ConfigurationError, match=r"pip install 'koan-ray\[embedded\]'"):
        await started()
