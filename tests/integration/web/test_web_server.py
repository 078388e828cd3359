"""The server itself: uvicorn as we run it, against callers that are slow, silent or too many."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.request

import pytest
from websockets.sync.client import connect

from koan_ray.web import patience
from koan_ray.web.serving import Door, server
from tests.integration.web.conftest import TOKENS, subprotocols, until

WEB = {"port": 0}
PATIENCE_S = 1.0


@pytest.fixture(scope="module")
def port(api):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patience, "prompt_protocol", lambda real=patience.prompt_protocol: real(PATIENCE_S))
        serving = server(api.engine, api.engine.settings, Door(api.engine.settings))
    thread = threading.Thread(target=serving.run, daemon=True)
    thread.start()
    until(lambda: serving.started)
    yield serving.servers[0].sockets[0].getsockname()[1]
    serving.should_exit = True
    thread.join(timeout=10)
    assert not thread.is_alive()


def get(port, path="/healthz", **headers):
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def is_closed(connection):
    connection.settimeout(5)
    try:
        return connection.recv(1000) == b""
    except ConnectionResetError:
        return True


def test_who_says_nothing_is_hung_up_on(port):
    for head in (b"", b"GET /healthz HTTP/1.1\r\nHost: loc"):
        with socket.create_connection(("127.0.0.1", port)) as silent:
            silent.sendall(head)
            began = time.monotonic()
            assert is_closed(silent)
            assert time.monotonic() - began < 4 * PATIENCE_S


def test_five_hundred_silent_callers_keep_nobody_out(port):
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(500)]
    try:
        assert get(port) == {"status": "ok"}
        assert get(port, "/api/session", Authorization=f"Bearer {TOKENS['viewer']}")["name"] == "viewer"
        assert is_closed(silent[0])
        assert is_closed(silent[-1])
    finally:
        for connection in silent:
            connection.close()


def test_a_head_that_is_too_long_is_refused(port):
    with socket.create_connection(("127.0.0.1", port)) as caller:
        caller.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 200_000 + b"\r\n\r\n")
        answer = caller.recv(1000)
    assert answer.startswith(b"HTTP/1.1 4") or answer == b""


def test_streams_and_websockets_outlive_the_patience_for_heads(api, port):
    job_id = api.submit("WebIdle")
    address = f"ws://127.0.0.1:{port}/api/jobs/{job_id}/ws"
    with connect(address, subprotocols=subprotocols("viewer")) as following:
        assert following.subprotocol == "koan-ray"
        assert json.loads(following.recv(timeout=5))["event"] == "progress"
        time.sleep(1.5 * PATIENCE_S)
        api.post(f"/api/jobs/{job_id}/cancel")
        while json.loads(following.recv(timeout=5))["data"]["status"] != "cancelled":
            pass
