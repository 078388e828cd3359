"""A loopback proxy that understands MongoDB's OP_MSG and makes one fault per rule happen between a driver and its server.

::

    proxy = FaultProxy(("127.0.0.1", server.port)).start()
    rule = proxy.rule(writes("update", "jobs"), "drop_after", times=1)
    ...
    assert rule.n_fired == 1  # always: a fault that did not happen proves nothing

What the actions do, and what the driver sees without retryable writes:

=============== ==================================================== ================== ==========================
action          what happens                                         driver's error     the write was made
=============== ==================================================== ================== ==========================
``drop_before`` the request never reaches the server                 AutoReconnect      no
``drop_after``  executed, and the answer is lost                     AutoReconnect      yes
``deliver_late`` the connection is cut, the request runs afterwards   AutoReconnect      after the caller was told
``not_primary`` the server says NotWritablePrimary                   NotPrimaryError    no
``wtimeout``    executed, and the answer has a write concern error   WTimeoutError      yes
a number        executed, and the answer takes so many seconds       NetworkTimeout     yes, unless it times out
=============== ==================================================== ================== ==========================

Clients must use ``directConnection=true``: the hello of a replica set makes a driver connect past the proxy. Answers are
passed on independently of requests, because a streaming hello has many. Only uncompressed OP_MSG is looked into, which is
what PyMongo sends unless a compressor is asked for.
"""

from __future__ import annotations

import asyncio
import struct
import threading

import bson

OP_MSG = 2013
OPTIONS = "directConnection=true&retryWrites=false&heartbeatFrequencyMS=500"
FAULTS = ("drop_before", "drop_after", "deliver_late", "not_primary", "wtimeout")
_NOT_PRIMARY = {"ok": 0.0, "errmsg": "not primary", "code": 10107, "codeName": "NotWritablePrimary"}
_WTIMEOUT = {
    "code": 64, "codeName": "WriteConcernTimeout", "errmsg": "waiting for replication timed out",
    "errInfo": {"wtimeout": True},
}  # fmt: skip


class Rule:
    """One fault; ``n_fired`` counts how often it has happened, ``n_left`` how often it may still."""

    def __init__(self, matches, action, times):
        self.matches, self.action, self.n_left = matches, action, times
        self.n_fired = 0


class Command:
    """A request: its name, what it is about, and its operations, wherever in the message they are."""

    def __init__(self, body, sequences):
        self.body, self.name = body, next(iter(body))
        self.target = body[self.name]
        self.operations = [item for items in sequences.values() for item in items]
        for field in ("documents", "updates", "deletes"):
            self.operations += body.get(field, [])


def writes(name, collection, *, where=lambda command: True):
    """Match a command by name and collection; a partition's collections count as their kind's."""

    def matches(command):
        target = command.target if isinstance(command.target, str) else ""
        return command.name == name and target.partition(".")[0] == collection and where(command)

    return matches


def _is_claim(command):
    return any(operation.get("multi") for operation in command.operations)


def _sets_holder(command):
    return "$set" in command.body["update"]


WRITES = {
    "insert of jobs": writes("insert", "jobs"),
    "update of jobs": writes("update", "jobs", where=lambda command: not _is_claim(command)),
    "executions": writes("update", "executions"),
    "claim of jobs": writes("update", "jobs", where=_is_claim),
    "first lease": writes("insert", "leases"),
    "lease take": writes("findAndModify", "leases", where=_sets_holder),
    "lease beat": writes("findAndModify", "leases", where=lambda command: not _sets_holder(command)),
}


class FaultProxy:
    """Stands before ``upstream`` (host, port) on a port of its own."""

    def __init__(self, upstream, late_s=1.0):
        self.upstream, self.late_s = upstream, late_s
        self.rules, self.log = [], []  # log: (name, target, action) of each fault, in order
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._connections = set()
        self._lock = threading.Lock()

    # --- for tests ---------------------------------------------------------------------------------------------------

    def start(self):
        threading.Thread(target=self._turn, name="fault-proxy", daemon=True).start()
        assert self._ready.wait(5)
        return self

    def end(self):
        self._loop.call_soon_threadsafe(self._stop)
        self._thread_ended.wait(5)

    def url(self, database, **options):
        more = "".join(f"&{name}={value}" for name, value in options.items())
        return f"mongodb://127.0.0.1:{self.port}/{database}?{OPTIONS}{more}"

    def rule(self, matches, action, times=1):
        rule = Rule(matches, action, times)
        with self._lock:
            self.rules.append(rule)
        return rule

    def clear(self):
        with self._lock:
            self.rules.clear()

    # --- on the proxy's thread ---------------------------------------------------------------------------------------

    def _turn(self):
        self._thread_ended = threading.Event()
        asyncio.set_event_loop(self._loop)
        try:
            self._server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
            self.port = self._server.sockets[0].getsockname()[1]
            self._ready.set()
            self._loop.run_forever()
            pending = asyncio.all_tasks(self._loop)
            for task in pending:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
            self._loop.run_until_complete(asyncio.sleep(0))
        finally:
            self._loop.close()
            self._thread_ended.set()

    def _stop(self):
        self._server.close()
        self._loop.stop()

    def _pick(self, command):
        if command is None:
            return None
        with self._lock:
            for rule in self.rules:
                if rule.n_left > 0 and rule.matches(command):
                    rule.n_left -= 1
                    rule.n_fired += 1
                    self.log.append((command.name, command.target, rule.action))
                    return rule.action
        return None

    async def _serve(self, reader, writer):
        try:
            up_reader, up_writer = await asyncio.open_connection(*self.upstream)
        except OSError:
            writer.transport.abort()
            return
        faults = {}  # what happens to the answer, by the id of its request
        pumps = [
            asyncio.ensure_future(self._requests(reader, writer, up_writer, faults)),
            asyncio.ensure_future(self._answers(up_reader, writer, faults)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            for side in (writer, up_writer):
                side.transport.abort()

    async def _requests(self, reader, writer, up_writer, faults):
        while (message := await _read(reader)) is not None:
            request_id, command = _parse(message)
            action = self._pick(command)
            if action == "drop_before":
                return
            if action == "deliver_late":
                self._later(message)
                return
            if action == "not_primary":
                writer.write(_answer(request_id, _NOT_PRIMARY))
                await writer.drain()
                continue
            if action is not None:
                faults[request_id] = action
            up_writer.write(message)
            await up_writer.drain()

    async def _answers(self, up_reader, writer, faults):
        while (message := await _read(up_reader)) is not None:
            request_id = struct.unpack("<i", message[8:12])[0]
            action = faults.pop(request_id, None)
            if action == "drop_after":
                return
            if action == "wtimeout":
                body = _parse(message)[1].body
                if body.get("ok"):
                    body["writeConcernError"] = _WTIMEOUT
                message = _answer(request_id, body)
            elif isinstance(action, (int, float)):
                await asyncio.sleep(action)
            writer.write(message)
            await writer.drain()

    def _later(self, message):
        async def deliver():
            await asyncio.sleep(self.late_s)
            reader, writer = await asyncio.open_connection(*self.upstream)
            writer.write(message)
            await writer.drain()
            await _read(reader)
            writer.close()

        task = self._loop.create_task(deliver())
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)


async def _read(reader):
    """Return a whole message, None at the end of the stream."""
    try:
        head = await reader.readexactly(4)
        return head + await reader.readexactly(struct.unpack("<i", head)[0] - 4)
    except (asyncio.IncompleteReadError, OSError):
        return None


def _parse(message):
    """Return the id of a message, and its command if it is one."""
    _, request_id, _, opcode = struct.unpack("<iiii", message[:16])
    if opcode != OP_MSG:
        return request_id, None
    flags = struct.unpack("<I", message[16:20])[0]
    at, end = 20, len(message) - (4 if flags & 1 else 0)
    body, sequences = None, {}
    while at < end:
        section, size = message[at], struct.unpack("<i", message[at + 1 : at + 5])[0]
        part = message[at + 1 : at + 1 + size]
        if section == 0:
            body = bson.decode(part)
        else:
            name, _, documents = part[4:].partition(b"\0")
            sequences[name.decode()] = bson.decode_all(documents)
        at += 1 + size
    return request_id, None if not body else Command(body, sequences)


def _answer(request_id, body):
    content = struct.pack("<I", 0) + b"\0" + bson.encode(body)
    return struct.pack("<iiii", 16 + len(content), 1, request_id, OP_MSG) + content
