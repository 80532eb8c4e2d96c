"""Background processes of the tests, and a check for programs that may be missing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    "buildah": "buildah",
    "curl": "curl",
    "gcc": "gcc",
    "mkfs.ext4": "e2fsprogs",
    "bindfs": "bindfs",
    "nginx": "nginx-light",
    "caddy": "caddy",
    "iptables": "iptables",
}


def require_programs(*programs: str, root: bool = False) -> None:
    """Skip the test with a reason if a program, or root's rights, are missing."""
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian package {_DEBIAN_PACKAGES.get(program, program)})")
    if root and os.geteuid() != 0:
        pytest.skip(f"{programs[0] if programs else 'this'} needs root")


def wait_until(condition: Callable[[], object], description: str, timeout: float = 20) -> None:
    """Wait until `condition()` is true; fail after `timeout` seconds. `description` names the condition."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{description}: not within {timeout:g} s")
        time.sleep(0.02)


@contextmanager
def mount_tmpfs(folder: Path, size: str) -> Iterator[Path]:
    """Mount a tmpfs of `size` ("8m") on `folder`, which is created. Skip the test if this is not possible."""
    require_programs("mount", root=True)
    with _mounted(folder, "-t", "tmpfs", "-o", f"size={size}", "tmpfs"):
        yield folder


@contextmanager
def mount_ext4(folder: Path, size: str, inodes: int | None = None, *, journal: bool = False) -> Iterator[Path]:
    """Mount a new ext4 of `size` ("64M") with about `inodes` inodes on `folder`, which is created, or skip the test."""
    require_programs("mkfs.ext4", "mount", root=True)
    image = folder.with_suffix(".img")
    subprocess.run(["truncate", "-s", size, str(image)], check=True)
    options = [] if inodes is None else ["-N", str(inodes)]
    features = "has_journal" if journal else "^has_journal"
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", "-O", features, *options, str(image)], check=True)
    with _mounted(folder, "-o", "loop", str(image)):
        yield folder


@contextmanager
def mount_after_power_cut(folder: Path, copy: Path) -> Iterator[None]:
    """Mount the disk of `mount_ext4` as it would be after a power cut now, on `folder`, above the one that is there.

    The disk is a file: what the kernel has not written to it yet, as nothing has synced it, is not in its copy.
    """
    subprocess.run(["cp", "--sparse=always", str(folder.with_suffix(".img")), str(copy)], check=True)
    with _mounted(folder, "-o", "loop", str(copy)):
        yield


@contextmanager
def mount_fuse(folder: Path, content: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Mount a file system of FUSE on `folder`, which is created. Yield the process that serves it, or skip the test.

    While that process is stopped, every access that is not answered from the kernel's memory hangs. `content` is a
    directory with the files. If it is mounted twice, a lock in one place does not count in the other, as if these were
    two machines.
    """
    require_programs("bindfs", root=True)
    content = content or folder.with_suffix(".content")
    folder.mkdir()
    content.mkdir(exist_ok=True)
    no_cache = "attr_timeout=0,entry_timeout=0,negative_timeout=0"
    with subprocess.Popen(
        ["bindfs", "-f", "-o", no_cache, str(content), str(folder)], stderr=subprocess.PIPE
    ) as server:
        try:
            try:
                wait_until(lambda: server.poll() is not None or os.path.ismount(folder), "bindfs mounts")
            except AssertionError:
                server.kill()
                raise
            if server.poll() is not None:
                assert server.stderr is not None
                pytest.skip(f"bindfs fails here: {server.stderr.read().decode()}")
            yield server
        finally:
            server.send_signal(signal.SIGCONT)
            subprocess.run(["umount", "-l", str(folder)], check=False)
            server.terminate()


@contextmanager
def _mounted(folder: Path, *arguments: str) -> Iterator[None]:
    folder.mkdir(exist_ok=True)
    mount = subprocess.run(["mount", *arguments, str(folder)], capture_output=True, check=False, text=True)
    if mount.returncode:
        pytest.skip(f"mount {' '.join(arguments)} fails here: {mount.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


class BackgroundProcess:
    """A program with its output in a file. It ends with the tests, even if they are killed."""

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
    def output_text(self) -> str:
        """The program's output so far, in all its runs."""
        return self.output_file.read_text(errors="replace") if self.output_file.exists() else ""

    def launch(self) -> None:
        """Start the program without waiting until it is ready."""
        assert not self.running
        self._terminating = False
        with self.output_file.open("ab") as output:
            self._popen = subprocess.Popen(
                self.argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=self.environment, cwd=self.folder
            )

    def wait_until_ready(self, is_ready: Callable[[], object], timeout: float = 20) -> None:
        """Wait until `is_ready()` is true; fail with the program's output if it ends or takes too long."""
        deadline = time.monotonic() + timeout
        while not is_ready():
            if not self.running or time.monotonic() > deadline:
                raise AssertionError(f"{self.argv[-1]} did not start:\n{self.output_text[-4000:]}")
            time.sleep(0.02)

    def stop(self, timeout: float = 30) -> int:
        """Send SIGTERM and return the exit status. Kill the program and fail if it does not end within `timeout`."""
        if self._popen is None:
            return 0
        if not self._terminating:
            self.terminate()
        try:
            return self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(
                f"{self.argv} still ran {timeout} s after SIGTERM:\n{self.output_text[-4000:]}"
            ) from None

    def terminate(self) -> None:
        """Send SIGTERM without waiting for the end."""
        self._terminating = True
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL, and wait for the end."""
        if self._popen is not None and self.running:
            self._popen.kill()
            self._popen.wait()

    def send_signal(self, signal_number: signal.Signals) -> None:
        assert self._popen is not None
        self._popen.send_signal(signal_number)
