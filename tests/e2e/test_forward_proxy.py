"""The forward proxy: interception, tunnels, forwarding, the daemon's own pages, and rejected requests."""

from __future__ import annotations

import re
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509

from bench.servers import is_listening
from tests.e2e.harness import http_client, images
from tests.e2e.harness.daemon import AccessLogEntry, StartDaemon, TwistdDaemon
from tests.e2e.harness.http_server import HTTPExchange, StubServer
from tests.e2e.harness.images import ACCEPT_MANIFESTS
from tests.e2e.harness.process import require_programs, wait_until
from tests.e2e.harness.threaded_server import ThreadedServer
from tests.e2e.harness.upstreams import FAKE, REGISTRY, Upstreams, format_upstream_addresses

# tunnels


class EchoTLSServer(ThreadedServer):
    """A TLS server with its own certificate, which sends received data back in upper case."""

    def __init__(self, context: ssl.SSLContext) -> None:
        super().__init__()
        self._context = context

    def serve(self, client: socket.socket) -> None:
        try:
            with self._context.wrap_socket(client, server_side=True) as connection:
                while data := connection.recv(65536):
                    connection.sendall(data.upper())
        except OSError:
            pass


@pytest.fixture(scope="module")
def echo(upstreams: Upstreams) -> Iterator[EchoTLSServer]:
    echo = EchoTLSServer(upstreams.ca.leaf("echo.test").server_context())
    echo.start()
    yield echo
    echo.stop()


@pytest.fixture(scope="module")
def unrestricted_daemon(
    upstreams: Upstreams, echo: EchoTLSServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TwistdDaemon]:
    """Return a daemon with tunnels to this machine permitted."""
    settings = {**upstreams.settings, "TUNNEL_DENY": "none", "TUNNEL_PORTS": f"443 {echo.port}"}
    daemon = TwistdDaemon(tmp_path_factory.mktemp("open"), settings)
    with daemon.run_and_check_log(lambda: upstreams.secrets):
        yield daemon


def test_other_https_traffic_is_tunnelled_unchanged(
    upstreams: Upstreams, unrestricted_daemon: TwistdDaemon, echo: EchoTLSServer
) -> None:
    data = images.random_bytes(3_000_000, "tunnel").lower()
    with open_tunnel(unrestricted_daemon, f"127.0.0.1:{echo.port}") as tunnel:
        with upstreams.client_context.wrap_socket(tunnel, server_hostname="echo.test") as connection:
            certificate = connection.getpeercert()
            received = b""
            for start in range(0, len(data), 65536):  # alternately, because two threads must not use a TLS connection
                connection.sendall(data[start : start + 65536])
                while len(received) < min(start + 65536, len(data)):
                    received += connection.recv(65536)
    assert certificate is not None
    assert ("DNS", "echo.test") in certificate["subjectAltName"]
    assert received == data.upper()


def test_http2_passes_a_tunnel_and_is_not_spoken_to_intercepted_hosts(
    upstreams: Upstreams, start_daemon: StartDaemon
) -> None:
    """docker-registry speaks HTTP/2, as gRPC servers do. An intercepted host falls back to HTTP/1.1."""
    registry = upstreams.registry
    daemon = start_daemon(TUNNEL_DENY="none", TUNNEL_PORTS=f"443 {registry.port}")
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # and empty SETTINGS
    context = ssl.create_default_context(cafile=str(upstreams.ca.ca_file))
    context.load_verify_locations(str(daemon.ca_file))
    for target, offered, selected in (
        (f"127.0.0.1:{registry.port}", ["h2"], "h2"),
        ("registry.test:5443", ["h2", "http/1.1"], "http/1.1"),
        ("registry.test:5443", ["h2"], None),
    ):
        context.set_alpn_protocols(offered)
        with (
            open_tunnel(daemon, target) as tunnel,
            context.wrap_socket(tunnel, server_hostname="registry.test") as connection,
        ):
            assert connection.selected_alpn_protocol() == selected
            connection.sendall(preface)
            answer = connection.recv(65536)
        if selected == "h2":
            assert answer[3] == 4, "SETTINGS, the first frame of a server (RFC 9113, section 3.4)"
        else:
            assert answer.startswith(b"HTTP/1.1 400 this server speaks HTTP/1.1, not HTTP/2; NO_PROXY")


def test_a_tunnel_is_logged_when_it_ends(unrestricted_daemon: TwistdDaemon, echo: EchoTLSServer) -> None:
    log_offset = unrestricted_daemon.log_offset()
    with open_tunnel(unrestricted_daemon, f"127.0.0.1:{echo.port}"):
        pass
    entry = wait_for_connect_log_entry(unrestricted_daemon, log_offset)
    assert (entry.status, entry.cache_status) == (200, "PASS")
    assert entry.target.rstrip("/") == f"127.0.0.1:{echo.port}"


REFUSED_TARGETS = {
    "127.0.0.1:443": "TUNNEL_DENY",
    "localhost:443": "TUNNEL_DENY",  # resolves to a loopback address
    "[::1]:443": "TUNNEL_DENY",
    "0.0.0.0:443": "TUNNEL_DENY",
    "[::ffff:127.0.0.1]:443": "TUNNEL_DENY",
    "169.254.169.254:443": "TUNNEL_DENY",
    "192.0.2.1:22": "TUNNEL_PORTS",
    "registry-1.docker.io:22": "TUNNEL_PORTS",
}


@pytest.mark.parametrize("target", REFUSED_TARGETS)
def test_refused_tunnel_names_the_setting(daemon: TwistdDaemon, target: str) -> None:
    log_offset = daemon.log_offset()
    response = http_client.send_raw_request(daemon.port, connect_request(target))
    assert response.status == 403
    assert REFUSED_TARGETS[target].encode() in response.body
    entry = wait_for_connect_log_entry(daemon, log_offset)
    assert entry.status == 403
    assert entry.target.rstrip("/") in (target, "[::ffff:7f00:1]:443")  # addresses are logged in their shortest form


def test_tunnel_allow(upstreams: Upstreams, start_daemon: StartDaemon, echo: EchoTLSServer) -> None:
    daemon = start_daemon(TUNNEL_ALLOW="example.com 127.0.0.0/8", TUNNEL_DENY="none", TUNNEL_PORTS=f"443 {echo.port}")
    with open_tunnel(daemon, f"127.0.0.1:{echo.port}"):
        pass
    response = http_client.send_raw_request(daemon.port, connect_request("192.0.2.1:443"))
    assert response.status == 403 and b"TUNNEL_ALLOW" in response.body


def test_ipv6_disabled(
    upstreams: Upstreams, unrestricted_daemon: TwistdDaemon, start_daemon: StartDaemon, echo: EchoTLSServer
) -> None:
    """An IPv6 address that the other daemon can reach is refused."""
    with socket.create_server(("::1", echo.port), family=socket.AF_INET6):
        target = f"[::1]:{echo.port}"
        with open_tunnel(unrestricted_daemon, target):
            pass
        daemon = start_daemon(DISABLE_IPV6="true", TUNNEL_DENY="none", TUNNEL_PORTS=str(echo.port))
        response = http_client.send_raw_request(daemon.port, connect_request(target))
        assert response.status == 502 and b"DISABLE_IPV6" in response.body
        with open_tunnel(daemon, f"127.0.0.1:{echo.port}"):
            pass


def test_tunnel_to_unreachable_target(unrestricted_daemon: TwistdDaemon) -> None:
    for target in ("no-such-name.example.invalid:443", "127.0.0.1:443"):
        response = http_client.send_raw_request(unrestricted_daemon.port, connect_request(target))
        assert response.status in (502, 504)
        assert target.partition(":")[0].encode() in response.body


def test_clients_not_allowed_are_rejected(upstreams: Upstreams, tmp_path: Path) -> None:
    daemon = TwistdDaemon(tmp_path, {**upstreams.settings, "ALLOW_CLIENTS": "10.0.0.0/8"})
    daemon.launch()
    try:
        daemon.wait_until_ready(lambda: is_listening(daemon.port))
        for request in (
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
            b"CONNECT registry-1.docker.io:443 HTTP/1.1\r\nHost: x\r\n\r\n",
            b"GET http://plain.test:8080/v2/ HTTP/1.1\r\nHost: plain.test:8080\r\n\r\n",
        ):
            response = http_client.send_raw_request(daemon.port, request)
            assert response.status == 403 and b"ALLOW_CLIENTS" in response.body
        daemon.check_log(upstreams.secrets)
    finally:
        daemon.stop()


# interception


def test_each_host_has_its_leaf(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(WORKERS="1")  # each process mints leaves of its own
    serials = set()
    hosts = {"registry-1.docker.io": 443, "auth.docker.io": 443, "registry.test": 5443, "fake.test": 443}
    for host, port in hosts.items():
        certificate = get_server_certificate(daemon, host, port)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert host in names.get_values_for_type(x509.DNSName)
        serials.add(certificate.serial_number)
    assert len(serials) == 4
    second_certificate = get_server_certificate(daemon, "fake.test", 443)
    assert second_certificate.serial_number in serials  # the leaf is minted once


def test_registry_by_ip_address(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    image = upstreams.push_to_plain("by/address", "1", images.build_small_image("by-address"))
    addresses = {"127.0.0.5:5000": upstreams.plain.port, "127.0.0.6:5001": upstreams.registry.port}
    daemon = start_daemon(
        REGISTRIES="http://127.0.0.5:5000 127.0.0.6:5001",
        UPSTREAM_ADDRESSES=format_upstream_addresses(addresses),
        VERIFY_SSL="false",
    )
    response = daemon.client.get("http://127.0.0.5:5000/v2/by/address/manifests/1", Accept=ACCEPT_MANIFESTS)
    assert response.body == image.manifest.data
    # http.client verifies that the leaf is valid for the address
    assert daemon.client.get("https://127.0.0.6:5001/v2/").status == 200


def test_other_port_is_not_intercepted(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    response = http_client.send_raw_request(daemon.port, connect_request("registry.test:5444"))
    assert response.status == 403 and b"TUNNEL_PORTS" in response.body


def test_untrusting_client_is_logged(daemon: TwistdDaemon) -> None:
    untrusting_client = http_client.ProxyClient(daemon.port, ssl.create_default_context())
    with pytest.raises(ssl.SSLCertVerificationError):
        untrusting_client.get(f"{FAKE}/v2/")
    wait_until(lambda: "/ca.crt" in daemon.output_text, "the log mentions /ca.crt")


def test_request_body_is_not_parsed_as_a_request(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    """The data after the head of a refused push is its body, even if it looks like a request."""
    smuggled_request = b"GET /v2/smuggled/manifests/1 HTTP/1.1\r\nHost: fake.test\r\n\r\n"
    response = daemon.client.request("POST", f"{FAKE}/v2/x/blobs/uploads/", {}, smuggled_request)
    assert response.status == 405
    assert upstreams.fake.requests == []


# plain HTTP


class _WebServer(StubServer):
    """A web server that is not a registry."""

    def handle(self, exchange: HTTPExchange) -> None:
        body = b"".join(exchange.read_body())
        if exchange.path == "/large":
            exchange.respond(200, {"Content-Length": str(3_000_000)}, images.random_bytes(3_000_000, "site"))
        elif exchange.path == "/moved":
            exchange.respond(302, {"Location": "/elsewhere", "X-Own": "kept"})
        else:
            exchange.respond(200, {"Content-Type": "text/plain"}, b"you sent " + body)


@pytest.fixture(scope="module")
def web_server() -> Iterator[_WebServer]:
    server = _WebServer()
    server.start()
    yield server
    server.stop()


def test_plain_http_is_forwarded(unrestricted_daemon: TwistdDaemon, web_server: _WebServer) -> None:
    url = f"http://127.0.0.1:{web_server.port}"
    hop_by_hop_fields = {
        "Proxy-Authorization": "Basic eDp5",
        "Proxy-Connection": "keep-alive",
        "Connection": "x-hop",
        "X-Hop": "1",
    }
    response = unrestricted_daemon.client.request("POST", f"{url}/form?q=1", hop_by_hop_fields | {"X-End": "2"}, b"a=b")
    assert response.body == b"you sent a=b"
    request = web_server.find_requests("POST", "/form")[-1]
    assert request.path == "/form?q=1"
    assert request.headers["host"] == f"127.0.0.1:{web_server.port}"
    assert request.headers["x-end"] == "2"
    assert not {"proxy-authorization", "proxy-connection", "x-hop"} & set(request.headers)
    assert unrestricted_daemon.client.get(f"{url}/large").body == images.random_bytes(3_000_000, "site")
    redirect = unrestricted_daemon.client.get(f"{url}/moved")  # the client, not the proxy, follows redirects
    assert (redirect.status, redirect.headers["location"], redirect.headers["x-own"]) == (302, "/elsewhere", "kept")
    assert unrestricted_daemon.client.head(f"{url}/large").headers["content-length"] == "3000000"


def test_plain_http_to_loopback_is_refused(daemon: TwistdDaemon, web_server: _WebServer) -> None:
    request_count = len(web_server.requests)
    for host in ("127.0.0.1", "localhost", "[::1]"):
        request = f"GET http://{host}:{web_server.port}/ HTTP/1.1\r\nHost: {host}:{web_server.port}\r\n\r\n"
        response = http_client.send_raw_request(daemon.port, request.encode())
        assert response.status == 403 and b"TUNNEL_DENY" in response.body, host
    assert len(web_server.requests) == request_count


# the daemon's built-in pages


def test_ca_certificate_can_be_downloaded(daemon: TwistdDaemon) -> None:
    response = http_client.request_directly("GET", daemon.url + "/ca.crt")
    assert response.status == 200
    certificate = x509.load_pem_x509_certificate(response.body)
    assert certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert b"PRIVATE" not in response.body
    head_response = http_client.request_directly("HEAD", daemon.url + "/ca.crt")
    assert head_response.headers["content-length"] == str(len(response.body))
    # A client that uses the proxy for every host also uses it to reach the proxy itself.
    assert daemon.client.get("http://docker-registry.local:3128/ca.crt").body == response.body


def test_setup_script(daemon: TwistdDaemon, tmp_path: Path) -> None:
    response = http_client.request_directly("GET", daemon.url + "/setup/systemd")
    assert response.status == 200
    script = response.body.decode()
    assert f"proxy=http://127.0.0.1:{daemon.port}/\n" in script
    assert "HTTPS_PROXY=" in script and "ca.crt" in script
    file = tmp_path / "setup"
    file.write_text(script)
    assert subprocess.run(["sh", "-n", str(file)], check=False).returncode == 0


def test_setup_script_rejects_shell_injection(daemon: TwistdDaemon) -> None:
    for host in ("x;reboot", "$(reboot)", "`reboot`", "x'y", 'x"y', "x y", "a/b", "x\\y"):
        request = f"GET /setup/systemd HTTP/1.1\r\nHost: {host}\r\n\r\n"
        response = http_client.send_raw_request(daemon.port, request.encode())
        assert response.status in (400, 404)
        assert b"#!/bin/sh" not in response.body


def test_health_and_index_page(daemon: TwistdDaemon) -> None:
    assert http_client.request_directly("GET", daemon.url + "/healthz").status == 200
    page = http_client.request_directly("GET", daemon.url + "/")
    assert (page.status, page.headers["content-type"].split(";")[0]) == (200, "text/plain")
    assert http_client.request_directly("GET", daemon.url + "/nothing/here").status == 404
    assert http_client.request_directly("POST", daemon.url + "/ca.crt").status == 405


# malformed requests


MALFORMED_REQUESTS = {
    "tls": bytes.fromhex("16030100c8010000c40303") + bytes(200),
    "zeros": bytes(400),
    "ssh": b"SSH-2.0-OpenSSH_9.2p1\r\n\r\n",
    "http2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no version": b"GET /\r\n\r\n",
    "version 9": b"GET / HTTP/9.9\r\nHost: x\r\n\r\n",
    "no host": b"GET /healthz HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /healthz HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "bare newline": b"GET /healthz HTTP/1.1\nHost: x\r\n\r\n",
    "space before colon": b"GET /healthz HTTP/1.1\r\nHost : x\r\n\r\n",
    "folded": b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: a\r\n b\r\n\r\n",
    "both framings": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "negative length": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    "unknown coding": b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n",
    "null in a value": b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: a\0b\r\n\r\n",
    "connect without a port": b"CONNECT registry-1.docker.io HTTP/1.1\r\nHost: x\r\n\r\n",
    "connect to a path": b"CONNECT /v2/ HTTP/1.1\r\nHost: x\r\n\r\n",
    "connect to a login": b"CONNECT user:pw@registry-1.docker.io:443 HTTP/1.1\r\nHost: x\r\n\r\n",
    "port too large": b"CONNECT registry-1.docker.io:99999 HTTP/1.1\r\nHost: x\r\n\r\n",
    "other scheme": b"GET ftp://plain.test/ HTTP/1.1\r\nHost: x\r\n\r\n",
    "login in the url": b"GET http://user:pw@plain.test:8080/ HTTP/1.1\r\nHost: x\r\n\r\n",
}


@pytest.mark.parametrize("name", MALFORMED_REQUESTS)
def test_malformed_request_returns_400(daemon: TwistdDaemon, name: str) -> None:
    response = http_client.send_raw_request(daemon.port, MALFORMED_REQUESTS[name])
    assert response.status in ((400, 505) if name in ("version 9", "http2") else (400,))
    assert b"Traceback" not in response.body


def test_connection_closes_after_malformed_request(daemon: TwistdDaemon) -> None:
    """After a request with ambiguous framing the daemon closes the connection."""
    response_bytes = http_client.send_raw(
        daemon.port, MALFORMED_REQUESTS["both framings"] + b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    )
    assert re.findall(rb"HTTP/1\.1 (\d+) ", response_bytes) == [b"400"]


def test_oversized_head_is_rejected(daemon: TwistdDaemon) -> None:
    for head in (b"GET /" + b"x" * 200_000, b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 40_000):
        assert http_client.send_raw_request(daemon.port, head).status in (400, 414, 431)


def test_malformed_intercepted_request_returns_400(daemon: TwistdDaemon) -> None:
    for name in ("zeros", "both framings", "space before colon"):
        with open_tunnel(daemon, "fake.test:443") as tunnel:
            with daemon.client_context.wrap_socket(tunnel, server_hostname="fake.test") as connection:
                connection.sendall(MALFORMED_REQUESTS[name])
                assert connection.recv(65536).startswith(b"HTTP/1.1 400 ")


def test_header_and_keepalive_timeouts(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(CLIENT_HEADER_TIMEOUT="1s", KEEPALIVE_TIMEOUT="1s")
    with socket.create_connection(("127.0.0.1", daemon.port), timeout=20) as slow_socket:
        slow_socket.sendall(b"GET / HTTP/1.1\r\nHost:")
        received = slow_socket.recv(65536)
        assert received == b"" or received.split(b" ")[1] in (b"400", b"408")
    with socket.create_connection(("127.0.0.1", daemon.port), timeout=20) as idle_socket:
        assert idle_socket.recv(65536) == b""


def test_pipelined_requests(daemon: TwistdDaemon) -> None:
    request = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    last_request = b"GET /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    response = http_client.send_raw(daemon.port, request * 5 + last_request)
    assert re.findall(rb"HTTP/1\.1 (\d+) ", response) == [b"200"] * 5 + [b"404"]


def test_http_1_0_client(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    response = http_client.send_raw(daemon.port, b"GET /healthz HTTP/1.0\r\n\r\n")
    assert response.split(b" ")[1] == b"200"
    layer = upstreams.push_to_plain("old/client", "1", images.build_small_image("old")).layers[0]
    request = f"GET http://plain.test:8080/v2/old/client/blobs/{layer.digest} HTTP/1.0\r\n\r\n"
    for _ in range(2):
        assert http_client.send_raw(daemon.port, request.encode()).endswith(layer.data)


def test_curl_through_proxy_and_mirror(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    require_programs("curl")
    layer = upstreams.push_to_registry("by/curl", "1", images.build_small_image("curl")).layers[0]
    path = f"/v2/by/curl/blobs/{layer.digest}"
    upstreams.push_to_plain("by/curl", "1", images.build_small_image("curl"))
    curl_arguments = [
        ["--proxy", daemon.url, "--cacert", str(daemon.ca_file), REGISTRY + path],
        ["--proxy", daemon.url, f"http://plain.test:8080{path}"],
        ["--noproxy", "*", f"{daemon.url}{path}?ns=registry.test:5443"],
    ]
    for arguments in curl_arguments:
        result = subprocess.run(["curl", "-sS", "--fail", *arguments], capture_output=True, timeout=25, check=False)
        assert result.returncode == 0, (arguments, result.stderr)
        assert result.stdout == layer.data


def connect_request(target: str) -> bytes:
    return f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode()


def open_tunnel(daemon: TwistdDaemon, target: str) -> socket.socket:
    """Return a socket after a successful CONNECT to `target`."""
    tunnel = socket.create_connection(("127.0.0.1", daemon.port), timeout=20)
    tunnel.sendall(connect_request(target))
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = tunnel.recv(1)
        assert byte, head
        head += byte
    assert head.startswith(b"HTTP/1.1 200 "), head
    return tunnel


def wait_for_connect_log_entry(daemon: TwistdDaemon, log_offset: int) -> AccessLogEntry:
    """Return the only CONNECT in the log since `log_offset`. It is logged when the tunnel has ended."""

    def connect_entries() -> list[AccessLogEntry]:
        return [line for line in daemon.access_log(log_offset) if line.method == "CONNECT"]

    wait_until(connect_entries, "the CONNECT is logged")
    [entry] = connect_entries()
    return entry


def get_server_certificate(daemon: TwistdDaemon, host: str, port: int) -> x509.Certificate:
    with open_tunnel(daemon, f"{host}:{port}") as tunnel:
        with daemon.client_context.wrap_socket(tunnel, server_hostname=host) as connection:
            der = connection.getpeercert(binary_form=True)
    assert der is not None
    return x509.load_der_x509_certificate(der)
