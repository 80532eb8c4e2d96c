"""Clients of the daemon by the dozen, and their end."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from tests.e2e.house.clients import Containerd, Docker, Podman, Skopeo
from tests.e2e.house.daemon import Proxy
from tests.e2e.house.process import Process

Machine = TypeVar("Machine", Docker, Containerd)


class Machines:
    """Makes clients; each is a machine that was never used before."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running = Running()
        self._count = 0

    def skopeo(self, proxy: Proxy) -> Skopeo:
        return Skopeo(self._place("skopeo"), proxy.client_environment)

    def podman(self, proxy: Proxy) -> Podman:
        return Podman(self._place("p"), proxy.client_environment)

    def docker(self, proxy: Proxy) -> Docker:
        """A dockerd that has the daemon as its proxy."""
        return self._start(Docker(self._place("docker"), proxy.client_environment, insecure=["plain.test:8080"]))

    def mirrored_docker(self, proxy: Proxy) -> Docker:
        """A dockerd that has the daemon as its mirror of Docker Hub, and cannot reach anything else."""
        nowhere = {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
        return self._start(Docker(self._place("docker"), nowhere, mirrors=[proxy.url]))

    def containerd(self, proxy: Proxy | None = None) -> Containerd:
        """A containerd; without a proxy it is to be given mirrors."""
        return self._start(Containerd(self._place("containerd"), proxy.client_environment if proxy else None))

    def stop(self) -> None:
        self._running.stop()

    def _place(self, kind: str) -> Path:
        self._count += 1
        return self._folder / f"{kind}-{self._count}"

    def _start(self, machine: Machine) -> Machine:
        self._running.add(machine)
        machine.start()
        return machine


class Running:
    """Everything that was started for a test or a module, to be stopped with it."""

    def __init__(self) -> None:
        self.processes: list[Process] = []

    def add(self, process: Process) -> None:
        self.processes.append(process)

    def stop(self) -> None:
        """Ask all to end before waiting for any: dockerd takes its second."""
        for process in reversed(self.processes):
            if process.running:
                process.terminate()
        for process in reversed(self.processes):
            process.stop()
