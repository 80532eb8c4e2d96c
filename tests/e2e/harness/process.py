"""Programs that run beside the tests, and the tools that this machine may lack."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

_DEBIAN_PACKAGES = {
    "docker-registry": "docker-registry",
    "skopeo": "skopeo",
    "dockerd": "docker.io",
    "docker": "docker.io (docker-cli from Debian 13 on)",
    "containerd": "containerd",
    "ctr": "containerd",
    "podman": "podman",
    "curl": "curl",
    "gcc": "gcc",
}


def require_programs(*programs: str, root: bool = False) -> None:
    """Skip the test, saying why, where a program (or the right to run it) is missing."""
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian package {_DEBIAN_PACKAGES.get(program, program)})")
    if root and os.geteuid() != 0:
        pytest.skip(f"{programs[0] if programs else 'this'} needs root")


def wait_until(condition: Callable[[], object], description: str, timeout: float = 20) -> None:
    """Wait until `condition()` is true; fail with `what` after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{description}: not after {timeout:g} s")
        time.sleep(0.02)


class BackgroundProcess:
    """A program with its output in a file; it ends with the tests, even where these are killed."""

    def __init__(self, argv: Sequence[str], output: Path, environment: Mapping[str, str], folder: Path) -> None:
        parent_death_signal = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []
        self.argv = [*parent_death_signal, *argv]
        self.output_file = output
        self.environment = dict(environment)
        self.folder = folder
        self._popen: subprocess.Popen[bytes] | None = None
        self._terminating = False

    @property
    def pid(self) -> int:
        assert self._popen is not None
        return self._popen.pid

    @property
    def running(self) -> bool:
        return self._popen is not None and self._popen.poll() is None

    @property
    def exit_code(self) -> int | None:
        return None if self._popen is None else self._popen.poll()

    @property
    def output_text(self) -> str:
        """All that the program wrote so far, over all its runs."""
        return self.output_file.read_text(errors="replace") if self.output_file.exists() else ""

    def launch(self) -> None:
        """Start the program, without waiting for it to be of use."""
        assert not self.running
        self._terminating = False
        with self.output_file.open("ab") as output:
            self._popen = subprocess.Popen(
                self.argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=self.environment, cwd=self.folder
            )

    def wait_until_ready(self, is_ready: Callable[[], object], timeout: float = 20) -> None:
        """Wait until the program is `ready`; fail with its output where it ends or takes too long."""
        deadline = time.monotonic() + timeout
        while not is_ready():
            if not self.running or time.monotonic() > deadline:
                raise AssertionError(f"{self.argv[-1]} did not come up:\n{self.output_text[-4000:]}")
            time.sleep(0.02)

    def stop(self, timeout: float = 30) -> int:
        """End the program with SIGTERM and return its exit status; one that stays is killed and the test fails."""
        if self._popen is None:
            return 0
        if not self._terminating:
            self.terminate()
        try:
            return self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.argv} stayed {timeout} s after SIGTERM:\n{self.output_text[-4000:]}") from None

    def terminate(self) -> None:
        """Ask the program to end, and do not wait for it."""
        self._terminating = True
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the program as a power cut would."""
        if self._popen is not None and self.running:
            self._popen.kill()
            self._popen.wait()

    def send_signal(self, signal_number: signal.Signals) -> None:
        assert self._popen is not None
        self._popen.send_signal(signal_number)


def is_listening(port: int) -> bool:
    """Tell whether something accepts connections at `port` of 127.0.0.1."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
