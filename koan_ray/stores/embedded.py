"""A document server of our own, for demos and single machines: a child process that speaks MongoDB's protocol.

The server (``secantusd-py``, from the extra ``embedded``) is started, watched and ended as a process of its own and never
imported. Processes that name the same directory share one server: the first starts it and writes ``server.json`` beside the
data, the others join it. Whoever started it ends it; those who joined start one themselves when it is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import psutil
from pymongo import MongoClient, errors

from koan_ray.errors import ConfigurationError, StoreUnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator

DEFAULT_DIRECTORY: Final = Path(".koan") / "store"
_COMMAND: Final = "secantusd-py"
_OPTIONS: Final = "directConnection=true&retryWrites=false"
_STARTS_WITHIN_S: Final = 20.0
_ENDS_WITHIN_S: Final = 5.0
_LOOKS_EVERY_S: Final = 0.25
_BACKOFF_S: Final = (0.0, 0.2, 1.0, 5.0, 15.0)
_STEADY_AFTER_S: Final = 60.0  # a server that has lived this long is restarted without a wait again

# What the child does before it becomes the server: ask the kernel to be killed when the thread that started it ends, unless
# that has happened already. Not a `preexec_fn`, which may deadlock in a process with threads.
_UNTIL_PARENT_DIES: Final = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG, SIGKILL
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


class _Server(NamedTuple):
    """A server process as ``server.json`` tells of it; the time of its start keeps a reused pid from passing for it."""

    pid: int
    port: int
    started_at: float


class DocumentServer:
    """The document server of a directory: started if there is none, joined if there is.

    A server that dies is started again on the same port, after a growing wait; clients see it as an outage.

    Args:
        directory: Where the data lives; created if missing.
        port: Where to listen on loopback; a free port by default, and the same ever after, while nobody else takes it.
    """

    def __init__(self, directory: Path | str = DEFAULT_DIRECTORY, *, port: int | None = None) -> None:
        self._directory = Path(directory)
        self._asked_port = port
        self._server: _Server | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._keeper: threading.Thread | None = None
        self._stopping = threading.Event()

    @property
    def url(self) -> str:
        """The address for a store.

        Raises:
            StoreUnavailableError: The server was not started.
        """
        if self._server is None:
            raise StoreUnavailableError(f"the document server of {self._directory} is not running; call start() first")
        return _url(self._server.port)

    def is_at(self, url: str) -> bool:
        """Tell whether this is the address at which the server of this directory was last."""
        found = self._read()
        return found is not None and url == _url(found.port)

    @property
    def pid(self) -> int | None:
        """The id of the server's process, whoever started it."""
        return None if self._server is None else self._server.pid

    @property
    def is_owner(self) -> bool:
        """Whether the server is a child of this process."""
        return self._process is not None

    async def start(self) -> str:
        """Return the address of a server that answers; a second call changes nothing.

        Raises:
            ConfigurationError: The server is not installed.
            StoreUnavailableError: It does not start; the message names its log.
        """
        if self._keeper is None:
            started: Future[None] = Future()
            self._stopping.clear()
            # The kernel ends the server with the thread that started it (`_UNTIL_PARENT_DIES`), so that thread stays.
            self._keeper = threading.Thread(target=self._keep, args=(started,), name="koan document server", daemon=True)
            self._keeper.start()
            try:
                await asyncio.wrap_future(started)
            except BaseException:
                await self.stop()
                raise
        return self.url

    async def stop(self) -> None:
        """End the server, if this process started it: asked first, then forced."""
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            self._stopping.set()
            await asyncio.to_thread(keeper.join)
        self._server = None

    # --- in a thread of its own --------------------------------------------------------------------------------------

    def _keep(self, started: Future[None]) -> None:
        """Start the server, start it again whenever it is gone, and end it at `stop`."""
        try:
            self._start_or_join()
        except BaseException as error:  # noqa: BLE001 - told to whoever called start()
            started.set_exception(error)
            return
        started.set_result(None)
        failures, since = 0, time.monotonic()
        while not self._stopping.wait(_LOOKS_EVERY_S):
            if self._is_alive():
                failures = 0 if time.monotonic() - since > _STEADY_AFTER_S else failures
                continue
            self._stopping.wait(_BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)])
            failures += 1
            with contextlib.suppress(StoreUnavailableError, OSError):  # its log says why; the next try follows
                self._start_or_join()
            since = time.monotonic()
        self._end()

    def _is_alive(self) -> bool:
        if self._process is not None:
            return self._process.poll() is None
        return self._server is not None and _is_running(self._server)

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            _end(process)  # `server.json` stays: the next server takes the same port, so that addresses stay good

    def _start_or_join(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(self._directory / "server.lock"):
            found = self._read()
            if found is not None and _is_running(found):
                _wait_for_answer(found.port, lambda: _is_running(found))
                self._process, self._server = None, found
            else:
                self._launch(found)

    def _launch(self, before: _Server | None) -> None:
        command = Path(sys.executable).with_name(_COMMAND)
        if not command.exists():
            raise ConfigurationError(
                f"the document server ({_COMMAND}) is not installed; run: pip install 'koan-ray[embedded]', or name a "
                f"MongoDB of your own by its URL"
            )
        # The same port as before, so that clients find the server again.
        known = self._server or before
        port = self._asked_port or (known.port if known is not None and _is_free(known.port) else _free_port())
        arguments = [
            sys.executable, "-S", "-E", "-c", _UNTIL_PARENT_DIES, str(os.getpid()), str(command), "--host", "127.0.0.1",
            "--port", str(port), "--storage-path", str(self._directory / "data"), "--sync-on-commit",
        ]  # fmt: skip
        log_path = self._directory / "server.log"
        with log_path.open("ab") as log:
            process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait_for_answer(port, lambda: process.poll() is None)
        except BaseException as error:
            _end(process)
            if isinstance(error, StoreUnavailableError):
                raise StoreUnavailableError(f"{error}; its log is {log_path}") from None
            raise
        self._process, self._server = process, _Server(process.pid, port, _started_at(process.pid))
        self._write(self._server)

    def _read(self) -> _Server | None:
        try:
            said: Any = json.loads((self._directory / "server.json").read_text(encoding="utf-8"))
            return _Server(int(said["pid"]), int(said["port"]), float(said["started_at"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _write(self, server: _Server) -> None:
        new = self._directory / "server.json.new"
        new.write_text(json.dumps(server._asdict()), encoding="utf-8")
        new.replace(self._directory / "server.json")


def _url(port: int) -> str:
    return f"mongodb://127.0.0.1:{port}/koan?{_OPTIONS}"


def _is_running(server: _Server) -> bool:
    """Tell whether the process lives and is the one that was written down."""
    try:
        process = psutil.Process(server.pid)
        is_same = abs(process.create_time() - server.started_at) < 1.0
        return is_same and process.status() != psutil.STATUS_ZOMBIE and any(_COMMAND in part for part in process.cmdline())
    except psutil.Error:
        return False


def _started_at(pid: int) -> float:
    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:
        return 0.0


def _wait_for_answer(port: int, is_alive: Any) -> None:
    until = time.monotonic() + _STARTS_WITHIN_S
    client: MongoClient[Any] = MongoClient(
        f"mongodb://127.0.0.1:{port}/?{_OPTIONS}", serverSelectionTimeoutMS=100, socketTimeoutMS=1000
    )
    with client:
        while True:
            try:
                client.admin.command("ping")
            except errors.PyMongoError:
                if not is_alive() or time.monotonic() > until:
                    raise StoreUnavailableError(f"the document server on port {port} does not answer") from None
            else:
                return


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_ENDS_WITHIN_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file, so that of two processes that start at once one starts the server and the other joins it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
