"""A client without a login, or a hostile registry, reaches through the proxy what a firewall keeps from both: the
server's own services.

The server and the client are network namespaces that a cable joins. The server's firewall drops what comes from the
client, but for the daemon's ports.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.harness.daemon import TwistdDaemon
from tests.e2e.harness.process import BackgroundProcess, require_programs, wait_until

ADDRESS, SECOND_ADDRESS, IPV6, BRIDGE, CLIENT = "10.9.8.7", "10.9.8.9", "2001:db8::7", "172.31.0.1", "10.9.8.1"
SERVICE_PORT = 9090
SECRET = "internal metrics"

SETUP = f"""
set -e
ip netns add $server; ip netns add $client
ip link add lan netns $server type veth peer name lan netns $client
on() {{ ip netns exec "$@"; }}
on $server sysctl -qw net.ipv4.ip_nonlocal_bind=1
for name in $server $client; do on $name ip link set lo up; on $name ip link set lan up; done
on $server ip addr add {ADDRESS}/24 dev lan
on $server ip addr add {SECOND_ADDRESS}/24 dev lan
on $server ip -6 addr add {IPV6}/64 dev lan nodad
on $server ip link add bridge0 type bridge
on $server ip addr add {BRIDGE}/24 dev bridge0; on $server ip link set bridge0 up
on $client ip addr add {CLIENT}/24 dev lan
on $client ip -6 addr add 2001:db8::1/64 dev lan nodad
on $client ip route add default via {ADDRESS}
for tables in iptables ip6tables; do
    on $server $tables -A INPUT -i lan -p tcp -m multiport --dports 3128,443,80 -j ACCEPT
    on $server $tables -A INPUT -i lan -p tcp --syn -j REJECT
done
"""


HOSTILE_REGISTRY = f"""
import http.server

class Registry(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if "/token-server/" in self.path:
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Bearer realm="http://{ADDRESS}:{SERVICE_PORT}/",service="x"')
        else:
            self.send_response(307)
            self.send_header("Location", "http://{ADDRESS}:{SERVICE_PORT}/")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

http.server.ThreadingHTTPServer(("{CLIENT}", 5000), Registry).serve_forever()
"""
DIGEST = f"sha256:{'0' * 64}"


class Namespaces:
    """The two machines: `on(machine, …)` is the command line that runs a program there."""

    def __init__(self, folder: Path) -> None:
        self.server, self.client = (f"drp-{os.getpid()}-{name}" for name in ("server", "client"))
        self.folder = folder
        self._hosts = Path("/etc/netns", self.server)

    def __enter__(self) -> Namespaces:
        environment = {**os.environ, "server": self.server, "client": self.client}
        subprocess.run(["sh", "-c", SETUP], env=environment, check=True)
        self._hosts.mkdir(parents=True)  # `ip netns exec` mounts these files on those in /etc
        (self._hosts / "hosts").write_text(f"{ADDRESS} own.test\n{IPV6} own6.test\n{CLIENT} other.test evil.test\n")
        return self

    def __exit__(self, *error: object) -> None:
        for name in (self.server, self.client):
            subprocess.run(["ip", "netns", "del", name], check=False)
        shutil.rmtree(self._hosts, ignore_errors=True)

    def on(self, machine: str, *command: str) -> list[str]:
        return ["ip", "netns", "exec", machine, *command]

    def serve_secret(self, machine: str) -> BackgroundProcess:
        """Start a service on all addresses of `machine`."""
        folder = self.folder / machine
        folder.mkdir()
        (folder / "index.html").write_text(SECRET)
        command = [sys.executable, "-m", "http.server", "--bind", "::", str(SERVICE_PORT)]
        process = BackgroundProcess(self.on(machine, *command), folder / "log", os.environ, folder)
        process.launch()
        return process

    def serve_hostile_registry(self) -> BackgroundProcess:
        """Start a registry on the client that names the server's own service in redirects and as its token server."""
        command = self.on(self.client, sys.executable, "-c", HOSTILE_REGISTRY)
        process = BackgroundProcess(command, self.folder / "hostile registry", os.environ, self.folder)
        process.launch()
        return process

    def curl(self, *arguments: str) -> str:
        """Run curl on the client, and return its output, or its error if it has none."""
        command = self.on(self.client, "curl", "-sSg", "--max-time", "10", *arguments)
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        return result.stdout or result.stderr


class ServerDaemon(TwistdDaemon):
    """A daemon on the server, at the ports of the package."""

    def __init__(self, namespaces: Namespaces, **settings: str) -> None:
        addresses = {
            "PROXY_LISTEN": r"tcp6:3128:interface=\:\:",
            "REGISTRY_LISTEN": r"tcp6:443:interface=\:\:",
            "REGISTRY_HTTP_LISTEN": r"tcp6:80:interface=\:\:",
        }
        super().__init__(namespaces.folder / "daemon", {**addresses, **settings})
        self.argv = namespaces.on(namespaces.server, *self.argv)
        self._namespaces = namespaces

    def start(self) -> None:
        self.launch()
        self.wait_until_ready(self._is_healthy)
        self.ca_file.write_text(self._namespaces.curl(f"http://{ADDRESS}/ca.crt"))

    def _is_healthy(self) -> bool:
        return self._namespaces.curl(f"http://{ADDRESS}/healthz") == "ok\n"


@pytest.fixture(scope="module")
def namespaces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Namespaces]:
    require_programs("ip", "iptables", "ip6tables", "curl", root=True)
    unshare = subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False, text=True)
    if unshare.returncode:
        pytest.skip(f"no network namespace can be made here: {unshare.stderr.strip()}")
    with Namespaces(tmp_path_factory.mktemp("namespaces")) as namespaces:
        services = [namespaces.serve_secret(machine) for machine in (namespaces.server, namespaces.client)]
        services.append(namespaces.serve_hostile_registry())
        wait_until(lambda: SECRET in namespaces.curl(f"http://{CLIENT}:{SERVICE_PORT}/"), "a service on the client")
        wait_until(lambda: "Failed to connect" not in namespaces.curl(f"http://{CLIENT}:5000/"), "the hostile registry")
        yield namespaces
        for service in services:
            service.stop()


@pytest.fixture(params=[1, 2], ids=["one process", "two processes"], scope="module")
def daemon(request: pytest.FixtureRequest, namespaces: Namespaces) -> Iterator[ServerDaemon]:
    settings = {"TUNNEL_PORTS": f"443 {SERVICE_PORT}", "REGISTRIES": "http://evil.test:5000"}
    daemon = ServerDaemon(namespaces, **settings, WORKERS=str(request.param))
    with daemon.run_and_check_log(list):
        yield daemon


Curl = Callable[..., str]


@pytest.fixture
def curl(namespaces: Namespaces, daemon: ServerDaemon) -> Curl:
    """Return a function that sends a request from the client through the proxy."""

    def run(*arguments: str) -> str:
        return namespaces.curl("--proxy", f"http://{ADDRESS}:3128", "--cacert", str(daemon.ca_file), *arguments)

    return run


HOSTS = (
    f"{ADDRESS} {SECOND_ADDRESS} {BRIDGE} [{IPV6}] [::ffff:{ADDRESS}] [64:ff9b::{ADDRESS}] [2002:a09:807::1] "
    "10.9.8.255 own.test own6.test 127.0.0.1 localhost"
).split()


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("tunnel", [False, True], ids=["forward", "tunnel"])
def test_the_firewall_holds_for_the_servers_own_services(curl: Curl, host: str, tunnel: bool) -> None:
    url = f"http://{host}:{SERVICE_PORT}/"
    output = curl("--proxytunnel", url) if tunnel else curl(url)
    assert SECRET not in output
    assert ("response 403" if tunnel else "TUNNEL_DENY (loopback)") in output


def test_the_firewall_refuses_the_client_and_the_proxy_serves_it(namespaces: Namespaces, curl: Curl) -> None:
    """Without this, the test above could pass because nothing works."""
    assert SECRET not in namespaces.curl(f"http://{ADDRESS}:{SERVICE_PORT}/")
    for url in (f"http://{CLIENT}:{SERVICE_PORT}/", f"http://other.test:{SERVICE_PORT}/"):
        assert curl(url) == curl("--proxytunnel", url) == SECRET


@pytest.mark.parametrize("path", [f"redirect/blobs/{DIGEST}", "redirect/manifests/1", "token-server/manifests/1"])
def test_a_hostile_registry_cannot_send_the_proxy_there(
    namespaces: Namespaces, daemon: ServerDaemon, path: str
) -> None:
    service_log = namespaces.folder / namespaces.server / "log"
    before = service_log.read_text()
    output = namespaces.curl(f"http://{ADDRESS}:3128/v2/x/{path}?ns=evil.test:5000")
    assert SECRET not in output
    assert "TUNNEL_DENY (loopback) forbids the address that the upstream refers to" in output
    assert service_log.read_text() == before


@pytest.mark.parametrize(
    "url",
    [
        f"http://{ADDRESS}:3128/healthz",
        f"http://[{IPV6}]:3128/healthz",
        f"http://{ADDRESS}/healthz",
        "http://own.test:3128/healthz",
        f"https://{ADDRESS}/healthz",
        f"https://[{IPV6}]/healthz",
        f"https://{SECOND_ADDRESS}/healthz",
    ],
)
def test_our_own_ports_answer_by_any_address(daemon: ServerDaemon, curl: Curl, url: str) -> None:
    """The daemon answers itself, so that it knows the client: it does not connect to itself."""
    offset = daemon.log_offset()
    assert curl(url) == "ok\n"
    wait_until(lambda: "/healthz" in daemon.output_text[offset:], "a line in the access log")
    clients = {entry.client for entry in daemon.access_log(offset)}
    assert clients == {CLIENT}


def test_a_name_that_leads_here_gets_no_certificate(curl: Curl) -> None:
    """Anyone can let a name of his lead here. With a certificate, our content would be in that name's origin."""
    assert "certificate" in curl("https://own.test/healthz")
