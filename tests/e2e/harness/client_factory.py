"""Clients of the daemon by the dozen, and their end."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from tests.e2e.harness.clients import Containerd, Docker, Podman, Skopeo
from tests.e2e.harness.daemon import TwistdDaemon
from tests.e2e.harness.process import BackgroundProcess

EngineT = TypeVar("EngineT", Docker, Containerd)


class ClientFactory:
    """Makes clients; each is a machine that was never used before."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes = ProcessGroup()
        self._folder_count = 0

    def skopeo(self, daemon: TwistdDaemon) -> Skopeo:
        return Skopeo(self._new_folder("skopeo"), daemon.client_environment)

    def podman(self, daemon: TwistdDaemon) -> Podman:
        return Podman(self._new_folder("p"), daemon.client_environment)

    def docker(self, daemon: TwistdDaemon) -> Docker:
        """A dockerd that has the daemon as its proxy."""
        return self._start(Docker(self._new_folder("docker"), daemon.client_environment, insecure=["plain.test:8080"]))

    def docker_with_mirror(self, daemon: TwistdDaemon) -> Docker:
        """A dockerd that has the daemon as its mirror of Docker Hub, and cannot reach anything else."""
        unreachable_proxy = {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
        return self._start(Docker(self._new_folder("docker"), unreachable_proxy, mirrors=[daemon.url]))

    def containerd(self, daemon: TwistdDaemon | None = None) -> Containerd:
        """A containerd; without a proxy it is to be given mirrors."""
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
    """Everything that was started for a test or a module, to be stopped with it."""

    def __init__(self) -> None:
        self.members: list[BackgroundProcess] = []

    def add(self, process: BackgroundProcess) -> None:
        self.members.append(process)

    def stop(self) -> None:
        """Ask all to end before waiting for any: dockerd takes its second."""
        for process in reversed(self.members):
            if process.running:
                process.terminate()
        for process in reversed(self.members):
            process.stop()
