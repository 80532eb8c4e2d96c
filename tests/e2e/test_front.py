"""The front door: what is intercepted, tunnelled, forwarded, answered by the daemon itself, or turned away."""

from __future__ import annotations

import re
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509

from tests.e2e.house import images, wire
from tests.e2e.house.daemon import Logged, Proxy, RunProxy
from tests.e2e.house.images import EVERY_MANIFEST
from tests.e2e.house.process import eventually, listening, need
from tests.e2e.house.serving import Exchange, Server
from tests.e2e.house.upstreams import FAKE, REGISTRY, Upstreams, address_list

# tunnels


class _Echo:
    """A TLS server that sends back, in upper case, what it is sent; its certificate is its own."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]

    def start(self) -> None:
        threading.Thread(target=self._accept, daemon=True).start()

    def stop(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            with self._context.wrap_socket(client, server_side=True) as connection:
                while data := connection.recv(65536):
                    connection.sendall(data.upper())
        except OSError:
            pass


@pytest.fixture(scope="module")
def echo(upstreams: Upstreams) -> Iterator[_Echo]:
    echo = _Echo(upstreams.authority.leaf("echo.test").server_context())
    echo.start()
    yield echo
    echo.stop()


@pytest.fixture(scope="module")
def open_proxy(upstreams: Upstreams, echo: _Echo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """A daemon whose tunnels may go to this machine."""
    settings = {**upstreams.settings, "TUNNEL_DENY": "none", "TUNNEL_PORTS": f"443 {echo.port}"}
    proxy = Proxy(tmp_path_factory.mktemp("open"), settings)
    with proxy.running_for(lambda: upstreams.secrets):
        yield proxy


def test_other_https_traffic_is_tunnelled_untouched(upstreams: Upstreams, open_proxy: Proxy, echo: _Echo) -> None:
    data = images.noise(3_000_000, "tunnel").lower()
    with _connect(open_proxy, f"127.0.0.1:{echo.port}") as tunnel:
        with upstreams.trust.wrap_socket(tunnel, server_hostname="echo.test") as connection:
            certificate = connection.getpeercert()
            received = b""
            for start in range(0, len(data), 65536):  # in turns: more than one thread must not use a TLS connection
                connection.sendall(data[start : start + 65536])
                while len(received) < min(start + 65536, len(data)):
                    received += connection.recv(65536)
    assert certificate is not None
    assert ("DNS", "echo.test") in certificate["subjectAltName"]
    assert received == data.upper()


def test_a_tunnel_is_logged_when_it_ends(open_proxy: Proxy, echo: _Echo) -> None:
    since = open_proxy.log_end()
    with _connect(open_proxy, f"127.0.0.1:{echo.port}"):
        pass
    line = _logged_connect(open_proxy, since)
    assert (line.status, line.verdict) == (200, "PASS")
    assert line.target.rstrip("/") == f"127.0.0.1:{echo.port}"


REFUSED = {
    "127.0.0.1:443": "TUNNEL_DENY",
    "localhost:443": "TUNNEL_DENY",  # a name that resolves to it
    "[::1]:443": "TUNNEL_DENY",
    "0.0.0.0:443": "TUNNEL_DENY",
    "[::ffff:127.0.0.1]:443": "TUNNEL_DENY",
    "169.254.169.254:443": "TUNNEL_DENY",
    "192.0.2.1:22": "TUNNEL_PORTS",
    "registry-1.docker.io:22": "TUNNEL_PORTS",
}


@pytest.mark.parametrize("target", REFUSED)
def test_a_refused_tunnel_says_which_rule(proxy: Proxy, target: str) -> None:
    since = proxy.log_end()
    answer = wire.raw_answer(proxy.port, f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
    assert answer.status == 403
    assert REFUSED[target].encode() in answer.body
    line = _logged_connect(proxy, since)
    assert line.status == 403
    assert line.target.rstrip("/") in (target, "[::ffff:7f00:1]:443")  # addresses are logged in their shortest form


def test_tunnel_allow(upstreams: Upstreams, run_proxy: RunProxy, echo: _Echo) -> None:
    proxy = run_proxy(TUNNEL_ALLOW="example.com 127.0.0.0/8", TUNNEL_DENY="none", TUNNEL_PORTS=f"443 {echo.port}")
    with _connect(proxy, f"127.0.0.1:{echo.port}"):
        pass
    answer = wire.raw_answer(proxy.port, b"CONNECT 192.0.2.1:443 HTTP/1.1\r\nHost: 192.0.2.1:443\r\n\r\n")
    assert answer.status == 403 and b"TUNNEL_ALLOW" in answer.body


def test_without_ipv6(upstreams: Upstreams, open_proxy: Proxy, run_proxy: RunProxy, echo: _Echo) -> None:
    """An address of IPv6 that could be reached, and is by the other daemon."""
    with socket.create_server(("::1", echo.port), family=socket.AF_INET6):
        target = f"[::1]:{echo.port}"
        with _connect(open_proxy, target):
            pass
        proxy = run_proxy(DISABLE_IPV6="true", TUNNEL_DENY="none", TUNNEL_PORTS=str(echo.port))
        answer = wire.raw_answer(proxy.port, f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
        assert answer.status == 502 and b"DISABLE_IPV6" in answer.body
        with _connect(proxy, f"127.0.0.1:{echo.port}"):
            pass


def test_a_tunnel_to_nowhere(open_proxy: Proxy) -> None:
    for target in ("no-such-name.example.invalid:443", "127.0.0.1:443"):
        answer = wire.raw_answer(open_proxy.port, f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
        assert answer.status in (502, 504)
        assert target.partition(":")[0].encode() in answer.body


def test_strangers_are_turned_away(upstreams: Upstreams, tmp_path: Path) -> None:
    proxy = Proxy(tmp_path, {**upstreams.settings, "ALLOW_CLIENTS": "10.0.0.0/8"})
    proxy.launch()
    try:
        proxy.wait_for(lambda: listening(proxy.port))
        for request in (
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
            b"CONNECT registry-1.docker.io:443 HTTP/1.1\r\nHost: x\r\n\r\n",
            b"GET http://plain.test:8080/v2/ HTTP/1.1\r\nHost: plain.test:8080\r\n\r\n",
        ):
            answer = wire.raw_answer(proxy.port, request)
            assert answer.status == 403 and b"ALLOW_CLIENTS" in answer.body
        proxy.check_log(upstreams.secrets)
    finally:
        proxy.stop()


# interception


def test_every_port_and_name_has_its_leaf(upstreams: Upstreams, proxy: Proxy) -> None:
    serials = set()
    hosts = {"registry-1.docker.io": 443, "auth.docker.io": 443, "registry.test": 5443, "fake.test": 443}
    for host, port in hosts.items():
        certificate = _certificate(proxy, host, port)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert host in names.get_values_for_type(x509.DNSName)
        serials.add(certificate.serial_number)
    assert len(serials) == 4
    again = _certificate(proxy, "fake.test", 443)
    assert again.serial_number in serials  # minted once


def test_a_registry_that_is_an_address(upstreams: Upstreams, run_proxy: RunProxy) -> None:
    image = upstreams.on_plain("by/address", "1", images.small("by-address"))
    addresses = {"127.0.0.5:5000": upstreams.plain.port, "127.0.0.6:5001": upstreams.registry.port}
    proxy = run_proxy(
        REGISTRIES="http://127.0.0.5:5000 127.0.0.6:5001",
        UPSTREAM_ADDRESSES=address_list(addresses),
        VERIFY_SSL="false",
    )
    got = proxy.client.get("http://127.0.0.5:5000/v2/by/address/manifests/1", Accept=EVERY_MANIFEST)
    assert got.body == image.manifest.data
    # http.client checks that the leaf is for the address
    assert proxy.client.get("https://127.0.0.6:5001/v2/").status == 200


def test_the_same_host_at_another_port_is_not_intercepted(upstreams: Upstreams, proxy: Proxy) -> None:
    answer = wire.raw_answer(proxy.port, b"CONNECT registry.test:5444 HTTP/1.1\r\nHost: registry.test:5444\r\n\r\n")
    assert answer.status == 403 and b"TUNNEL_PORTS" in answer.body


def test_a_client_that_does_not_trust_us_is_noted(proxy: Proxy) -> None:
    stranger = wire.Client(proxy.port, ssl.create_default_context())
    with pytest.raises(ssl.SSLCertVerificationError):
        stranger.get(f"{FAKE}/v2/")
    eventually(lambda: "/ca.crt" in proxy.text, "a hint at /ca.crt in the log")


def test_a_body_behind_an_interception_is_not_taken_for_a_request(upstreams: Upstreams, proxy: Proxy) -> None:
    """What follows a refused push's head is its body, whatever it looks like."""
    inner = b"GET /v2/smuggled/manifests/1 HTTP/1.1\r\nHost: fake.test\r\n\r\n"
    answer = proxy.client.ask("POST", f"{FAKE}/v2/x/blobs/uploads/", {}, inner)
    assert answer.status == 405
    assert upstreams.fake.requests == []


# plain HTTP


class _Site(Server):
    """A web server that is no registry."""

    def serve(self, exchange: Exchange) -> None:
        body = b"".join(exchange.body())
        if exchange.path == "/large":
            exchange.answer(200, {"Content-Length": str(3_000_000)}, images.noise(3_000_000, "site"))
        elif exchange.path == "/gone":
            exchange.answer(302, {"Location": "/elsewhere", "X-Own": "kept"})
        else:
            exchange.answer(200, {"Content-Type": "text/plain"}, b"you sent " + body)


@pytest.fixture(scope="module")
def site() -> Iterator[_Site]:
    site = _Site()
    site.start()
    yield site
    site.stop()


def test_plain_http_is_forwarded(open_proxy: Proxy, site: _Site) -> None:
    url = f"http://127.0.0.1:{site.port}"
    hops = {"Proxy-Authorization": "Basic eDp5", "Proxy-Connection": "keep-alive", "Connection": "x-hop", "X-Hop": "1"}
    answer = open_proxy.client.ask("POST", f"{url}/form?q=1", hops | {"X-End": "2"}, b"a=b")
    assert answer.body == b"you sent a=b"
    seen = site.seen("POST", "/form")[-1]
    assert seen.path == "/form?q=1"
    assert seen.headers["host"] == f"127.0.0.1:{site.port}"
    assert seen.headers["x-end"] == "2"
    assert not {"proxy-authorization", "proxy-connection", "x-hop"} & set(seen.headers)
    assert open_proxy.client.get(f"{url}/large").body == images.noise(3_000_000, "site")
    moved = open_proxy.client.get(f"{url}/gone")  # the client's own to follow
    assert (moved.status, moved.headers["location"], moved.headers["x-own"]) == (302, "/elsewhere", "kept")
    assert open_proxy.client.head(f"{url}/large").headers["content-length"] == "3000000"


def test_plain_http_to_this_machine_is_refused(proxy: Proxy, site: _Site) -> None:
    before = len(site.requests)
    for host in ("127.0.0.1", "localhost", "[::1]"):
        request = f"GET http://{host}:{site.port}/ HTTP/1.1\r\nHost: {host}:{site.port}\r\n\r\n"
        answer = wire.raw_answer(proxy.port, request.encode())
        assert answer.status == 403 and b"TUNNEL_DENY" in answer.body, host
    assert len(site.requests) == before


# the daemon's own pages


def test_the_ca_is_there_to_be_fetched(proxy: Proxy) -> None:
    answer = wire.request("GET", proxy.url + "/ca.crt")
    assert answer.status == 200
    certificate = x509.load_pem_x509_certificate(answer.body)
    assert certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert b"PRIVATE" not in answer.body
    assert wire.request("HEAD", proxy.url + "/ca.crt").headers["content-length"] == str(len(answer.body))
    # Whoever has the proxy set for everything asks the proxy for the proxy.
    assert proxy.client.get("http://docker-registry.local:3128/ca.crt").body == answer.body


def test_the_set_up_script(proxy: Proxy, tmp_path: Path) -> None:
    answer = wire.request("GET", proxy.url + "/setup/systemd")
    assert answer.status == 200
    script = answer.body.decode()
    assert f"proxy=http://127.0.0.1:{proxy.port}/\n" in script
    assert "HTTPS_PROXY=" in script and "ca.crt" in script
    file = tmp_path / "setup"
    file.write_text(script)
    assert subprocess.run(["sh", "-n", str(file)], check=False).returncode == 0


def test_the_set_up_script_takes_no_orders_from_the_host_field(proxy: Proxy) -> None:
    for host in ("x;reboot", "$(reboot)", "`reboot`", "x'y", 'x"y', "x y", "a/b", "x\\y"):
        answer = wire.raw_answer(proxy.port, f"GET /setup/systemd HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert answer.status in (400, 404)
        assert b"#!/bin/sh" not in answer.body


def test_health_and_the_page(proxy: Proxy) -> None:
    assert wire.request("GET", proxy.url + "/healthz").status == 200
    page = wire.request("GET", proxy.url + "/")
    assert (page.status, page.headers["content-type"].split(";")[0]) == (200, "text/plain")
    assert wire.request("GET", proxy.url + "/nothing/here").status == 404
    assert wire.request("POST", proxy.url + "/ca.crt").status == 405


# what is no request


GARBAGE = {
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


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_400(proxy: Proxy, name: str) -> None:
    answer = wire.raw_answer(proxy.port, GARBAGE[name])
    assert answer.status in ((400, 505) if name in ("version 9", "http2") else (400,))
    assert b"Traceback" not in answer.body


def test_nothing_behind_garbage_is_answered(proxy: Proxy) -> None:
    """After a request whose end is not known, the connection is over."""
    received = wire.raw(proxy.port, GARBAGE["both framings"] + b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    assert re.findall(rb"HTTP/1\.1 (\d+) ", received) == [b"400"]


def test_a_head_without_end_is_refused(proxy: Proxy) -> None:
    for head in (b"GET /" + b"x" * 200_000, b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 40_000):
        assert wire.raw_answer(proxy.port, head).status in (400, 414, 431)


def test_garbage_within_an_interception_is_400_too(proxy: Proxy) -> None:
    for name in ("zeros", "both framings", "space before colon"):
        with _connect(proxy, "fake.test:443") as tunnel:
            with proxy.context.wrap_socket(tunnel, server_hostname="fake.test") as connection:
                connection.sendall(GARBAGE[name])
                assert connection.recv(65536).startswith(b"HTTP/1.1 400 ")


def test_a_client_that_never_ends_its_head_is_hung_up_on(run_proxy: RunProxy) -> None:
    proxy = run_proxy(CLIENT_HEADER_TIMEOUT="1s", KEEPALIVE_TIMEOUT="1s")
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as slow:
        slow.sendall(b"GET / HTTP/1.1\r\nHost:")
        received = slow.recv(65536)
        assert received == b"" or received.split(b" ")[1] in (b"400", b"408")
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as idle:
        assert idle.recv(65536) == b""


def test_pipelined_requests_are_answered_in_order(proxy: Proxy) -> None:
    one = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    last = b"GET /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    answer = wire.raw(proxy.port, one * 5 + last)
    assert re.findall(rb"HTTP/1\.1 (\d+) ", answer) == [b"200"] * 5 + [b"404"]


def test_old_clients_are_answered(upstreams: Upstreams, proxy: Proxy) -> None:
    answer = wire.raw(proxy.port, b"GET /healthz HTTP/1.0\r\n\r\n")
    assert answer.split(b" ")[1] == b"200"
    layer = upstreams.on_plain("old/client", "1", images.small("old")).layers[0]
    request = f"GET http://plain.test:8080/v2/old/client/blobs/{layer.digest} HTTP/1.0\r\n\r\n"
    for _ in range(2):
        assert wire.raw(proxy.port, request.encode()).endswith(layer.data)


def test_curl_by_every_way(upstreams: Upstreams, proxy: Proxy) -> None:
    need("curl")
    layer = upstreams.on_registry("by/curl", "1", images.small("curl")).layers[0]
    path = f"/v2/by/curl/blobs/{layer.digest}"
    upstreams.on_plain("by/curl", "1", images.small("curl"))
    ways = [
        ["--proxy", proxy.url, "--cacert", str(proxy.ca_file), REGISTRY + path],
        ["--proxy", proxy.url, f"http://plain.test:8080{path}"],
        ["--noproxy", "*", f"{proxy.url}{path}?ns=registry.test:5443"],
    ]
    for way in ways:
        done = subprocess.run(["curl", "-sS", "--fail", *way], capture_output=True, timeout=25, check=False)
        assert done.returncode == 0, (way, done.stderr)
        assert done.stdout == layer.data


def _connect(proxy: Proxy, target: str) -> socket.socket:
    """Return a socket after a CONNECT that succeeded."""
    tunnel = socket.create_connection(("127.0.0.1", proxy.port), timeout=20)
    tunnel.sendall(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        piece = tunnel.recv(1)
        assert piece, head
        head += piece
    assert head.startswith(b"HTTP/1.1 200 "), head
    return tunnel


def _logged_connect(proxy: Proxy, since: int) -> Logged:
    """Return the one CONNECT that the log has since then; its line comes when all is over."""

    def found() -> list[Logged]:
        return [line for line in proxy.logged(since) if line.method == "CONNECT"]

    eventually(found, "the CONNECT in the log")
    [line] = found()
    return line


def _certificate(proxy: Proxy, host: str, port: int) -> x509.Certificate:
    with _connect(proxy, f"{host}:{port}") as tunnel:
        with proxy.context.wrap_socket(tunnel, server_hostname=host) as connection:
            der = connection.getpeercert(binary_form=True)
    assert der is not None
    return x509.load_der_x509_certificate(der)
