"""Fixtures of the attacks: an honest and a hostile registry, and the daemon between them and its clients.

Each attack runs against a daemon of one process and one of two, because what one process knows, the other has to learn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.e2e.harness.client_factory import ProcessGroup
from tests.e2e.harness.fake_registry import FakeRegistry
from tests.e2e.harness.http_server import StubServer
from tests.e2e.harness.pki import UpstreamCA
from tests.e2e.harness.registry_daemon import RegistryDaemon
from tests.e2e.harness.upstreams import format_upstream_addresses

GOOD = "https://good.test"
EVIL = "https://evil.test"

StartRegistryDaemon = Callable[..., RegistryDaemon]
"""Starts a daemon: `start_daemon(**settings)`, or `start_daemon(prefix=[...], **settings)`; see the fixture."""


class HostileNetwork:
    """The registries that the daemon is configured for: `good` is honest, `evil` belongs to the attacker."""

    def __init__(self, folder: Path) -> None:
        self.ca = UpstreamCA(folder, "the CA of the hostile network")
        self._servers: dict[str, StubServer] = {}
        self.registries = ["good.test", "evil.test"]
        """The value of REGISTRIES."""
        self.good = self.add_registry("good.test")
        self.evil = self.add_registry("evil.test")

    def add_registry(self, host: str) -> FakeRegistry:
        """Start a registry for `host`, and return it. Only those in `registries` are intercepted."""
        registry = FakeRegistry(self.ca.leaf(host).server_context())
        self.add_server(f"{host}:443", registry)
        return registry

    def add_server(self, address: str, server: StubServer) -> None:
        """Start `server` as the one that the daemon finds at `address`, which is `host:port`."""
        server.start()
        self._servers[address] = server

    @property
    def settings(self) -> dict[str, str]:
        addresses = {address: server.port for address, server in self._servers.items()}
        return {
            "REGISTRIES": " ".join(self.registries),
            "UPSTREAM_ADDRESSES": format_upstream_addresses(addresses),
            "UPSTREAM_CA_FILE": str(self.ca.ca_file),
        }

    def stop(self) -> None:
        for server in self._servers.values():
            server.stop()


@pytest.fixture
def network(tmp_path: Path) -> Iterator[HostileNetwork]:
    network = HostileNetwork(tmp_path / "network")
    yield network
    network.stop()


@pytest.fixture(params=[1, 2], ids=["one process", "two processes"])
def workers(request: pytest.FixtureRequest) -> int:
    """Return the number of serving processes: each attack is tried with one and with two."""
    number: int = request.param
    return number


@pytest.fixture
def start_daemon(network: HostileNetwork, workers: int, tmp_path: Path) -> Iterator[StartRegistryDaemon]:
    """Return a function that starts a daemon with the given settings. At the end its log has no traceback.

    `prefix` is a command that runs the daemon, such as prlimit.
    """
    group = ProcessGroup()

    def start(name: str = "daemon", *, prefix: Sequence[str] = (), **settings: str) -> RegistryDaemon:
        daemon = RegistryDaemon(tmp_path / name, {**network.settings, "WORKERS": str(workers), **settings})
        daemon.argv = [*prefix, *daemon.argv]
        group.add(daemon)
        daemon.start()
        return daemon

    yield start
    group.stop()
    for daemon in group.members:
        assert isinstance(daemon, RegistryDaemon)
        daemon.check_log([])
