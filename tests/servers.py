"""Servers for tests: started, killed, paused and restarted by the id of their process, which is also how they end."""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

COMMAND = Path(sys.executable).with_name("secantusd-py")
EXTERNAL = os.environ.get("KOAN_RAY_TEST_MONGO_URI")
OPTIONS = "directConnection=true&retryWrites=false"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class MongoServer:
    """A document server on loopback that keeps its data in ``directory``; the same port over all its restarts."""

    def __init__(self, directory, port=None):
        self.directory, self.port = Path(directory), port or free_port()
        self._process = None
        atexit.register(self.end)

    def url(self, database="koan"):
        return f"mongodb://127.0.0.1:{self.port}/{database}?{OPTIONS}"

    @property
    def pid(self):
        return self._process.pid

    def start(self):
        self.directory.mkdir(parents=True, exist_ok=True)
        command = [str(COMMAND), "--storage-path", str(self.directory), "--port", str(self.port), "--sync-on-commit"]
        with (self.directory.parent / f"{self.directory.name}.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        self._wait()
        return self

    def kill9(self):
        self._process.kill()
        self._process.wait()

    def restart(self):
        self.end()
        self.start()

    def stop(self):
        os.kill(self.pid, signal.SIGSTOP)
        while not all(_is_stopped(task) for task in Path(f"/proc/{self.pid}/task").iterdir()):
            time.sleep(0.005)  # the signal is on its way; a thread of a busy machine may still answer

    def cont(self):
        os.kill(self.pid, signal.SIGCONT)

    def end(self):
        """End it at once, paused or not; nobody needs what it holds, and asking takes two seconds."""
        if self._process is not None and self._process.poll() is None:
            self.kill9()

    def _wait(self, within=20.0):
        from pymongo import MongoClient, errors

        until = time.monotonic() + within
        with MongoClient(self.url(), serverSelectionTimeoutMS=200) as client:
            while True:
                try:
                    client.admin.command("ping")
                    return
                except errors.PyMongoError:
                    if self._process.poll() is not None or time.monotonic() > until:
                        raise


class ExternalServer:
    """Somebody's own server, named by KOAN_RAY_TEST_MONGO_URI; it cannot be killed."""

    def url(self, database="koan"):
        head, _, options = EXTERNAL.partition("?")
        host = head.split("://", 1)[1].split("/", 1)[0]
        return f"{head.split('://', 1)[0]}://{host}/{database}" + (f"?{options}" if options else "")

    def end(self):
        pass


def _is_stopped(task: Path) -> bool:
    return (task / "stat").read_text().rpartition(")")[2].split()[0] == "T"
