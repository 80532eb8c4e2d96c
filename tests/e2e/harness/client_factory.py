"""Creates clients of the daemon, and stops them after the test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from tests.e2e.harness.clients import Buildah, Containerd, Docker, Podman, Skopeo
from tests.e2e.harness.daemon import TwistdDaemon
from tests.e2e.harness.process import BackgroundProcess

EngineT = TypeVar("EngineT", Docker, Containerd)


_UNREACHABLE_PROXY = {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
"""The environment of clients that can reach servers on this machine only, such as a mirror."""


class ClientFactory:
    """Creates clients. Each has empty storage of its own, like a new machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes = ProcessGroup()
        self._folder_count = 0

    def skopeo(self, daemon: TwistdDaemon) -> Skopeo:
        return Skopeo(self._new_folder("skopeo"), daemon.client_environment)

    def podman(self, daemon: TwistdDaemon) -> Podman:
        return Podman(self._new_folder("p"), daemon.client_environment)

    def skopeo_without_proxy(self) -> Skopeo:
        """Return a skopeo that reaches only what is on this machine. The test configures mirrors."""
        return Skopeo(self._new_folder("skopeo"), _UNREACHABLE_PROXY)

    def podman_without_proxy(self) -> Podman:
        """Return a podman that reaches only what is on this machine. The test configures mirrors."""
        return Podman(self._new_folder("p"), _UNREACHABLE_PROXY)

    def buildah_without_proxy(self) -> Buildah:
        """Return a buildah that reaches only what is on this machine. The test configures mirrors."""
        return Buildah(self._new_folder("b"), _UNREACHABLE_PROXY)

    def partial_podman(self, daemon: TwistdDaemon) -> Podman:
        """Return a podman that downloads only the missing parts of a zstd:chunked layer."""
        return Podman(self._new_folder("p"), daemon.client_environment, partial_images=True)

    def docker(self, daemon: TwistdDaemon) -> Docker:
        """Start a dockerd that uses the daemon as its proxy."""
        return self._start(Docker(self._new_folder("docker"), daemon.client_environment, insecure=["plain.test:8080"]))

    def docker_with_mirror(self, daemon: TwistdDaemon) -> Docker:
        """Start a dockerd that uses the daemon as its mirror of Docker Hub, and cannot reach any other server."""
        return self.docker_with_mirrors([daemon.url])

    def docker_with_mirrors(self, mirrors: Sequence[str], insecure: Sequence[str] = ()) -> Docker:
        """Start a dockerd with these settings of daemon.json, which cannot reach another server."""
        return self._start(Docker(self._new_folder("docker"), _UNREACHABLE_PROXY, mirrors=mirrors, insecure=insecure))

    def docker_with(self, environment: Mapping[str, str]) -> Docker:
        """Start a dockerd that reaches other servers as `environment` says."""
        return self._start(Docker(self._new_folder("docker"), environment))

    def containerd(self, daemon: TwistdDaemon | None = None) -> Containerd:
        """Start a containerd, with `daemon` as its proxy if given. Otherwise the test configures mirrors."""
        return self._start(Containerd(self._new_folder("containerd"), daemon.client_environment if daemon else None))

    def stop(self) -> None:
        self._processes.stop()

    def _new_folder(self, prefix: str) -> Path:
        self._folder_count += 1
        return self._folder / f"{prefix}-{self._folder_count}"

    def _start(self, engine: EngineT) -> EngineT:
        self._processes.add(engine)
        engine.start()
        return engine


class ProcessGroup:
    """The processes that were started for a test or a module, which are stopped together."""

    def __init__(self) -> None:
        self.members: list[BackgroundProcess] = []

    def add(self, process: BackgroundProcess) -> None:
        self.members.append(process)

    def stop(self) -> None:
        """Send SIGTERM to all processes before waiting for any, because dockerd takes a second to end."""
        for process in reversed(self.members):
            if process.running:
                process.terminate()
        for process in reversed(self.members):
            process.stop()
