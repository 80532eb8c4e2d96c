"""If the daemon refuses or fails, every client prints its sentence with the cause, and the access log has it too."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.e2e.harness import images
from tests.e2e.harness.client_factory import ClientFactory
from tests.e2e.harness.clients import Containerd, Docker, Podman, Skopeo
from tests.e2e.harness.daemon import TwistdDaemon
from tests.e2e.harness.process import wait_until
from tests.e2e.harness.upstreams import Upstreams

CLIENTS = ("skopeo", "podman", "docker", "containerd")
ELSEWHERE = "elsewhere.example:5000"  # a host that is not intercepted


class Clients:
    """One client of each kind, with `daemon` as their proxy."""

    def __init__(self, folder: Path, daemon: TwistdDaemon) -> None:
        self._factory = ClientFactory(folder)
        self._skopeo: Skopeo = self._factory.skopeo(daemon)
        self._podman: Podman = self._factory.podman(daemon)
        self._docker: Docker = self._factory.docker(daemon)
        self._containerd: Containerd = self._factory.containerd(daemon)

    def pull(self, client: str, image: str) -> CompletedProcess[str]:
        if client == "skopeo":
            return self._skopeo.try_pull(image)
        if client == "podman":
            return self._podman.run("pull", "--quiet", image)
        if client == "docker":
            return self._docker.run("pull", image)
        return self._containerd.try_pull(image)

    def push(self, client: str, source: str, target: str) -> CompletedProcess[str]:
        """Pull the image `source` and push it as `target`."""
        if client == "skopeo":
            return self._skopeo.run("copy", f"docker://{source}", f"docker://{target}")
        assert self.pull(client, source).returncode == 0
        if client == "podman":
            return self._podman.run("push", source, target)
        if client == "docker":
            self._docker.run_checked("tag", source, target)
            return self._docker.run("push", target)
        return self._containerd.try_push(target, source)

    def stop(self) -> None:
        self._factory.stop()


@pytest.fixture(scope="module")
def clients(daemon: TwistdDaemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clients]:
    clients = Clients(tmp_path_factory.mktemp("clients"), daemon)
    try:
        yield clients
    finally:
        clients.stop()


def check_cause(result: CompletedProcess[str], cause: str, daemon: TwistdDaemon, offset: int) -> None:
    """Check that the command failed and printed `cause`, and that a line of the access log ends in it."""
    output = result.stdout + result.stderr
    assert result.returncode != 0
    assert re.search(cause, output), output

    def is_logged() -> bool:
        return any(entry.status >= 400 and re.search(cause, entry.because) for entry in daemon.access_log(offset))

    wait_until(is_logged, f"the access log has {cause}")


@pytest.mark.parametrize(
    ("image", "cause"),
    [
        ("closed.test/app:1", r"closed\.test:443: connection refused"),
        ("no-such-name.invalid/app:1", r"no-such-name\.invalid:443: no such name"),
        ("selfsigned.test/app:1", r"selfsigned\.test:443: .*certificate"),
        (f"{ELSEWHERE}/app:1", r"TUNNEL_PORTS has no entry for port 5000"),
        ("no-such-name.example/app:1", r"no-such-name\.example:443: no such name"),
    ],
    ids=[
        "refused connection",
        "unknown name",
        "self-signed certificate",
        "refused tunnel",
        "tunnel to an unknown name",
    ],
)
@pytest.mark.parametrize("client", CLIENTS)
def test_a_failed_pull(daemon: TwistdDaemon, clients: Clients, client: str, image: str, cause: str) -> None:
    offset = daemon.log_offset()
    check_cause(clients.pull(client, image), cause, daemon, offset)


@pytest.mark.parametrize("client", CLIENTS)
def test_a_refused_push(upstreams: Upstreams, daemon: TwistdDaemon, clients: Clients, client: str) -> None:
    upstreams.push_to_registry("causes/push", "1", images.build_small_image("causes", oci=False))
    offset = daemon.log_offset()
    result = clients.push(client, "registry.test:5443/causes/push:1", "registry.test:5443/causes/pushed:1")
    check_cause(result, r"pushing through this proxy is disabled; its administrator can set ALLOW_PUSH", daemon, offset)


def test_a_refused_client(upstreams: Upstreams, tmp_path: Path) -> None:
    daemon = TwistdDaemon(tmp_path / "daemon", {**upstreams.settings, "ALLOW_CLIENTS": "192.0.2.1"})
    clients = Clients(tmp_path, daemon)
    try:
        daemon.launch()
        daemon.wait_until_ready(lambda: f"listening on 127.0.0.1:{daemon.port} " in daemon.output_text)
        for client in CLIENTS:
            offset = daemon.log_offset()
            result = clients.pull(client, "registry.test:5443/causes/app:1")
            check_cause(result, r"ALLOW_CLIENTS has no entry for your address, 127\.0\.0\.1", daemon, offset)
    finally:
        clients.stop()
        daemon.stop()
