"""A daemon that can be started and killed hundreds of times.

One process imports the modules. Each run of the daemon is a fork of it, which saves the imports.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from bench.servers import is_listening
from tests.e2e.harness.registry_daemon import RegistryDaemon

# No imported module may install the reactor, because all forks would share its descriptors.
_FORKER_SOURCE = """
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
    os.write(1, b"exited\\n")
"""


class ForkedDaemon:
    """A daemon with the settings of `daemon`, which is only ever killed. A context manager."""

    def __init__(self, daemon: RegistryDaemon) -> None:
        self._daemon = daemon
        self._child_pid = 0
        daemon.folder.mkdir(parents=True, exist_ok=True)
        with daemon.output_file.open("ab") as output:
            self._forker = subprocess.Popen(
                [sys.executable, "-c", _FORKER_SOURCE],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, env=daemon.environment,
                cwd=daemon.folder,
            )  # fmt: skip

    def __enter__(self) -> ForkedDaemon:
        return self

    def __exit__(self, *_: object) -> None:
        if self._child_pid:
            self.kill()
        assert self._forker.stdin is not None
        self._forker.stdin.close()
        self._forker.wait(10)

    def start(self) -> None:
        """Start the daemon and wait until it accepts connections."""
        assert self._forker.stdin is not None
        self._forker.stdin.write(b".")
        self._forker.stdin.flush()
        self._child_pid = int(self._read_line())
        deadline = time.monotonic() + 20
        while not is_listening(self._daemon.http_port):
            assert time.monotonic() < deadline and Path(f"/proc/{self._child_pid}/stat").exists(), (
                self._daemon.output_text[-4000:]
            )
            time.sleep(0.005)

    def kill(self) -> None:
        """Send SIGKILL, and wait until the process has ended."""
        pid, self._child_pid = self._child_pid, 0
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        assert self._read_line() == "exited"

    def _read_line(self) -> str:
        assert self._forker.stdout is not None
        return self._forker.stdout.readline().decode().strip()
