"""A daemon that is killed hundreds of times: its modules are imported once, and each run is a fork of that process."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.e2e.house.hosting import Hosting
from tests.e2e.house.process import listening

# No module here may make the reactor: its descriptors would be shared by all that come of the fork.
_RUNS = """
import os, signal, sys
import dockerproxy.tap
import twisted.internet.epollreactor, twisted.scripts.twistd
assert "twisted.internet.reactor" not in sys.modules

while os.read(0, 1):
    pid = os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)
        sys.argv = ["twistd", "--nodaemon", "--pidfile=", "dockerproxy"]
        twisted.scripts.twistd.run()
        os._exit(0)
    os.write(1, b"%d\\n" % pid)
    os.waitpid(pid, 0)
    os.write(1, b"gone\\n")
"""


class Killed:
    """The daemon that `hosting` would be, never asked to end. A context manager."""

    def __init__(self, hosting: Hosting) -> None:
        self._hosting = hosting
        self._pid = 0
        hosting.folder.mkdir(parents=True, exist_ok=True)
        with hosting.output.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _RUNS],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, env=hosting.environment,
                cwd=hosting.folder,
            )  # fmt: skip

    def __enter__(self) -> Killed:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pid:
            self.kill()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)

    def start(self) -> None:
        """Start it, and wait until it takes connections."""
        assert self._process.stdin is not None
        self._process.stdin.write(b".")
        self._process.stdin.flush()
        self._pid = int(self._read())
        end = time.monotonic() + 20
        while not listening(self._hosting.plain_port):
            assert time.monotonic() < end and Path(f"/proc/{self._pid}/stat").exists(), self._hosting.text[-4000:]
            time.sleep(0.005)

    def kill(self) -> None:
        """End it as it stands, and wait until it is gone."""
        pid, self._pid = self._pid, 0
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        assert self._read() == "gone"

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().decode().strip()
