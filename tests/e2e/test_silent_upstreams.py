"""Pulls of cached images while the registry does not answer: one request waits, and only once."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator

import pytest

from tests.e2e.harness import images
from tests.e2e.harness.client_factory import ClientFactory
from tests.e2e.harness.daemon import StartDaemon, TwistdDaemon
from tests.e2e.harness.fake_registry import FakeRegistry
from tests.e2e.harness.http_server import StubServer
from tests.e2e.harness.images import ACCEPT_MANIFESTS
from tests.e2e.harness.process import require_programs, wait_until
from tests.e2e.harness.upstreams import FAKE, Upstreams

CONNECT_TIMEOUT = 2.0
QUIET = "http://quiet.test:8081"


class _Silence(ABC):
    """Takes the place of the server at `port` of 127.0.0.1, which has been stopped if `stops_server` is true."""

    stops_server = True

    def __init__(self, port: int) -> None:
        self._port = port
        self._connections: list[socket.socket] = []

    @abstractmethod
    def begin(self) -> None: ...

    def end(self) -> None:
        for connection in self._connections:
            connection.close()

    def _listen(self, backlog: int) -> socket.socket:
        listener = socket.socket()
        self._connections.append(listener)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self._port))
        listener.listen(backlog)
        listener.setblocking(False)
        return listener


class _SaysNothing(_Silence):
    """The kernel accepts connections, and nobody reads them: neither a TLS handshake nor a response ends."""

    def begin(self) -> None:
        self._listener = self._listen(128)

    def count_connections(self) -> int:
        """Return the number of connections so far."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self._connections.append(self._listener.accept()[0])
        return len(self._connections) - 1


class _FullBacklog(_Silence):
    """The queue of the listening socket is full, so that the kernel drops the packets of new connections."""

    def begin(self) -> None:
        self._listen(0)
        for _ in range(8):
            connection = socket.socket()
            self._connections.append(connection)
            connection.setblocking(False)
            connection.connect_ex(("127.0.0.1", self._port))


class _Firewall(_Silence):
    """A firewall drops all packets, also those of the connections that are open."""

    stops_server = False

    def begin(self) -> None:
        require_programs("iptables")
        self._change("-I")

    def end(self) -> None:
        self._change("-D")

    def _change(self, action: str) -> None:
        for side in ("--dport", "--sport"):
            rule = ["-i", "lo", "-p", "tcp", side, str(self._port), "-j", "DROP"]
            subprocess.run(["iptables", "-w", action, "INPUT", *rule], check=True)


@contextlib.contextmanager
def silent(server: StubServer, kind: type[_Silence]) -> Iterator[_Silence]:
    silence = kind(server.port)
    if kind.stops_server:
        server.stop()
    silence.begin()
    try:
        yield silence
    finally:
        silence.end()
        if kind.stops_server:
            server.start()


@pytest.fixture
def quiet() -> Iterator[FakeRegistry]:
    """Return a registry without TLS, which is the only one of its daemon."""
    server = FakeRegistry()
    server.start()
    yield server
    server.stop()


def start_beside(
    start_daemon: StartDaemon, server: FakeRegistry, workers: int, read_timeout: float = 7.0
) -> TwistdDaemon:
    return start_daemon(
        WORKERS=str(workers),
        PROXY_CONNECT_TIMEOUT=f"{CONNECT_TIMEOUT:g}s",
        PROXY_READ_TIMEOUT=f"{read_timeout:g}s",
        REGISTRIES=QUIET,
        UPSTREAM_ADDRESSES=f"quiet.test:8081=127.0.0.1:{server.port}",
    )


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", [_SaysNothing, _FullBacklog, _Firewall])
def test_pull_of_many_layers(
    quiet: FakeRegistry, start_daemon: StartDaemon, clients: ClientFactory, kind: type[_Silence], workers: int
) -> None:
    """Blobs of another repository have to ask upstream, as all blobs do whose grants have expired."""
    daemon = start_beside(start_daemon, quiet, workers)
    image = images.build_small_image("quiet", layers=8)
    quiet.put("quiet/app", "1", image)
    skopeo, url = clients.skopeo(daemon), f"{QUIET}/v2/quiet/app"
    skopeo.pull("quiet.test:8081/quiet/app:1", plain_http=True)
    with silent(quiet, kind):
        for number in range(12):  # new connections, which the processes get in turn
            response = daemon.client.get(f"{url}/manifests/1", Accept=ACCEPT_MANIFESTS)
            assert (response.status, response.cache_status) == (200, "STALE")
            response = daemon.client.get(f"{url}/manifests/never-{number}", Accept=ACCEPT_MANIFESTS)
            assert response.status == 504
            assert "and again in the background" in response.error_message  # this one has not waited
        skopeo.pull("quiet.test:8081/quiet/app:1", plain_http=True)
        for layer in image.layers:
            response = daemon.client.get(f"{QUIET}/v2/quiet/never/blobs/{layer.digest}")
            assert response.status == 504
            assert "quiet.test:8081: timed out" in response.error_message
            assert "and again in the background" in response.error_message
    wait_until(
        lambda: daemon.client.get(f"{url}/manifests/1", Accept=ACCEPT_MANIFESTS).cache_status == "REVALIDATED",
        "the daemon asks upstream again",
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_pull_while_nobody_finishes_the_handshake(
    upstreams: Upstreams, start_daemon: StartDaemon, clients: ClientFactory, workers: int
) -> None:
    """All requests of all pulls together make one connection, or probe in the background."""
    daemon = start_daemon(WORKERS=str(workers), PROXY_CONNECT_TIMEOUT=f"{CONNECT_TIMEOUT:g}s")
    image = images.build_small_image("silent", oci=False, layers=8)
    upstreams.fake.put("silent/app", "1", image)
    url, name = f"{FAKE}/v2/silent/app", "fake.test/silent/app:1"
    skopeo, docker, containerd = clients.skopeo(daemon), clients.docker(daemon), clients.containerd(daemon)
    skopeo.pull(name)
    docker.run_checked("pull", name)
    docker.remove_all_images()
    containerd.pull(name)
    containerd.remove_all_images()
    started = time.monotonic()
    with silent(upstreams.fake, _SaysNothing) as silence:
        assert isinstance(silence, _SaysNothing)
        response = daemon.client.get(f"{url}/manifests/1", Accept=ACCEPT_MANIFESTS)
        assert (response.status, response.cache_status, response.body) == (200, "STALE", image.manifest.data)
        assert silence.count_connections() == 1
        for _ in range(10):
            assert daemon.client.get(f"{url}/manifests/1", Accept=ACCEPT_MANIFESTS).cache_status == "STALE"
        response = daemon.client.get(f"{url}/manifests/never", Accept=ACCEPT_MANIFESTS)
        assert response.status == 504
        assert "fake.test:443: timed out, not connected after 2 s (tried" in response.error_message
        containerd.pull(name)
        skopeo.pull(name)
        docker.run_checked("pull", name)
        # One request has waited. Each further connection is one in the background, 5 s after the last one failed.
        assert silence.count_connections() <= 2 + (time.monotonic() - started) / 5
    wait_until(
        lambda: daemon.client.get(f"{url}/manifests/1", Accept=ACCEPT_MANIFESTS).cache_status == "REVALIDATED",
        "the daemon asks upstream again",
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_silent_token_server(
    upstreams: Upstreams, start_daemon: StartDaemon, clients: ClientFactory, workers: int
) -> None:
    daemon = start_daemon(WORKERS=str(workers), PROXY_CONNECT_TIMEOUT=f"{CONNECT_TIMEOUT:g}s")
    upstreams.push_to_hub("library/silenttoken", "1", images.build_small_image("silenttoken", layers=8))
    skopeo = clients.skopeo(daemon)
    skopeo.pull("docker.io/library/silenttoken:1")
    daemon.restart()  # drops the tokens, which are only in memory
    started = time.monotonic()
    with silent(upstreams.token_server, _SaysNothing) as silence:
        assert isinstance(silence, _SaysNothing)
        for _ in range(3):
            skopeo.pull("docker.io/library/silenttoken:1")
        # Before the first has found it out, another process may be asked, too.
        assert silence.count_connections() <= 1 + workers + (time.monotonic() - started) / 5
    skopeo.pull("docker.io/library/silenttoken:1")


@pytest.mark.slow
def test_one_path_that_hangs(quiet: FakeRegistry, start_daemon: StartDaemon) -> None:
    """A client that asks for a path that hangs makes nobody else believe that the registry is silent."""
    daemon, gate = start_beside(start_daemon, quiet, 2, read_timeout=12), threading.Event()
    image = images.build_small_image("hanging")
    quiet.put("quiet/app", "1", image)
    quiet.put("quiet/hang", "1", image)
    for method in ("GET", "HEAD"):
        quiet.add_rule(method, "/quiet/hang/", lambda exchange, content: gate.wait(60) and None)
    try:
        response = daemon.client.get(f"{QUIET}/v2/quiet/hang/manifests/1", Accept=ACCEPT_MANIFESTS)
    finally:
        gate.set()
    assert response.status == 504
    assert "in the background" not in response.error_message
    for _ in range(6):
        response = daemon.client.get(f"{QUIET}/v2/quiet/app/manifests/1", Accept=ACCEPT_MANIFESTS)
        assert (response.status, response.cache_status) in ((200, "MISS"), (200, "REVALIDATED"))
    [probe] = [request for request in quiet.find_requests("GET", "/v2/") if request.path == "/v2/"][-1:]
    assert not {"authorization", "accept"} & set(probe.headers)
