"""The daemon's own HTTP endpoints."""

from __future__ import annotations

import shlex
from collections.abc import Awaitable
from functools import partial
from typing import Any

import pytest

from dockerproxy.admin.builtin_endpoints import builtin_endpoints, handle_ready
from dockerproxy.http.cross_origin import CrossOriginProtection
from dockerproxy.http.request import Request, respond_text_error
from dockerproxy.oci.names import Host
from dockerproxy.proxy.host_rule import HostRule
from dockerproxy.proxy.router import BrowserProtection, Router
from dockerproxy.store.write_probe import ProbeResult, StoreState

PEM = b"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"

INVALID_HOSTS = [
    "x;reboot",
    "$(reboot)",
    "`reboot`",
    "x'y",
    'x"y',
    "x y",
    "a/b",
    "x\\y",
    "x|y",
    "x&y",
    "user@x",
    "x:port",
    "x:0",
    "x:70000",
    "x:80:80",
    "[::1",
    "<script>",
    "x%0ay",
    "{url}",
    "",
    "127.1",
]


@pytest.fixture
def connect(connect_client: Any) -> Any:
    """Return a function that connects a client. `name` is the host of an absolute-form target, if it had one."""

    def make(name: str = "", proxy_port: int | None = None, *, secure: bool = False) -> Any:
        async def registry(request: Request) -> None:
            request.respond(200, [], b"registry")

        async def metrics(request: Request) -> None:
            fields = [("Content-Type", "text/plain; version=0.0.4"), ("Cache-Control", "no-store")]
            request.respond(200, fields, b"# HELP")

        async def ready(request: Request) -> None:
            fields = [("Content-Type", "text/plain; charset=utf-8"), ("Cache-Control", "no-store")]
            request.respond(200, fields, b"ready")

        protection = BrowserProtection(HostRule(allowed=None), CrossOriginProtection())
        router = Router(registry, builtin_endpoints(PEM, metrics, ready, proxy_port), protection, respond_text_error)

        def handle(request: Request) -> Awaitable[None]:
            request.host = name
            return router.handle(request)

        return connect_client(handle, secure=secure)

    return make


@pytest.mark.parametrize(
    ("path", "media_type", "content"),
    [
        ("/", "text/plain; charset=utf-8", b"docker-registry-proxy"),
        ("/ca.crt", "application/x-x509-ca-cert", PEM),
        ("/healthz", "text/plain; charset=utf-8", b"ok\n"),
        ("/readyz", "text/plain; charset=utf-8", b"ready"),
        ("/metrics", "text/plain; version=0.0.4", b"# HELP"),
        ("/setup", "text/x-shellscript; charset=utf-8", b"#!/bin/sh\n"),
        ("/setup", "text/x-shellscript; charset=utf-8", b"#!/bin/sh\n"),
        ("/setup/systemd", "text/x-shellscript; charset=utf-8", b"#!/bin/sh\n"),
    ],
)
def test_each_endpoint_serves_its_content(connect: Any, path: str, media_type: str, content: bytes) -> None:
    for target in (path, f"{path}?anything=1"):
        client = connect()
        response = client.fetch("GET", target)
        assert (response.status, response.headers["Content-Type"], response.complete) == (200, media_type, True)
        assert response.body.startswith(content)
        assert response.headers["Cache-Control"] in ("no-store", "no-cache")
        head = client.fetch("HEAD", target)
        assert (head.status, head.body, head.headers["Content-Length"]) == (200, b"", str(len(response.body)))
        assert client.finished_requests[0].host == "proxy.example:3128"


def test_the_certificate_is_the_whole_file(connect: Any) -> None:
    assert connect().fetch("GET", "/ca.crt").body == PEM


@pytest.mark.parametrize("path", ["/v2", "/v2/", "/v2/a/manifests/latest"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE"])
def test_v2_is_passed_to_the_registry(connect: Any, path: str, method: str) -> None:
    assert connect().fetch(method, path).status == 200


@pytest.mark.parametrize(
    "path", ["/nothing", "/v2x", "/v1/", "/ca.crt/", "/CA.CRT", "//", "/%63a.crt", "/setup/", "/setup/../ca.crt"]
)
def test_unknown_paths_get_404(connect: Any, path: str) -> None:
    response = connect().fetch("GET", path)
    assert (response.status, response.headers["Content-Type"]) == (404, "text/plain; charset=utf-8")
    assert b"/ lists" in response.body


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE"])
@pytest.mark.parametrize("path", ["/", "/ca.crt", "/healthz", "/metrics", "/setup/systemd", "/nothing"])
def test_only_get_and_head_are_allowed(connect: Any, method: str, path: str) -> None:
    response = connect().fetch(method, path)
    assert (response.status, response.headers["Allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("docker-registry.local:3128", "docker-registry.local:3128"),
        ("Docker-Registry.LOCAL:3128", "docker-registry.local:3128"),
        ("10.0.0.5:3128", "10.0.0.5:3128"),
        ("[fd00::5]:3128", "[fd00::5]:3128"),
        ("docker-registry.local", "docker-registry.local"),
        ("docker-registry.local:80", "docker-registry.local"),
        ("docker-registry.local:3180", "docker-registry.local:3180"),
    ],
)
def test_the_base_url_is_the_clients_host_field(connect: Any, host: str, address: str) -> None:
    page = connect().fetch("GET", "/", [("Host", host)])
    assert f"http://{address}/setup |" in page.body.decode()
    script = connect().fetch("GET", "/setup/systemd", [("Host", host)]).body.decode()
    # a URL with brackets is quoted for the shell
    assert "proxy=" + shlex.quote(f"http://{Host.parse(host, 80).authority}/") + "\n" in script


def test_an_absolute_target_takes_precedence_over_the_host_field(connect: Any) -> None:
    """RFC 9112, section 3.2.2: a server ignores the Host field if the target is in absolute form."""
    script = connect(name="docker-registry.local:3128").fetch("GET", "/setup/systemd", [("Host", "evil.example")])
    assert b"proxy=http://docker-registry.local:3128/\n" in script.body
    assert b"evil" not in script.body


def test_on_another_listener_the_script_names_the_proxys_port(connect: Any) -> None:
    client = connect(proxy_port=3128)
    script = client.fetch("GET", "/setup", [("Host", "docker-registry.local")]).body
    assert b"proxy=http://docker-registry.local:3128/\n" in script
    page = client.fetch("GET", "/", [("Host", "docker-registry.local")]).body
    assert b"http://docker-registry.local/setup |" in page  # the page's own URL keeps the port of the request


@pytest.mark.parametrize("host", ["docker-registry.local", "docker-registry.local:5443"])
def test_on_a_tls_listener_the_page_names_the_proxys_port(connect: Any, host: str) -> None:
    """A client that reads the page does not trust the certificate yet, so the command must use plain HTTP."""
    page = connect(proxy_port=3128, secure=True).fetch("GET", "/", [("Host", host)]).body
    assert b"curl -fsS http://docker-registry.local:3128/setup |" in page


@pytest.mark.parametrize("host", INVALID_HOSTS)
def test_an_invalid_host_gets_no_script(connect: Any, host: str) -> None:
    response = connect().fetch("GET", "/setup/systemd", [("Host", host)])
    assert (response.status, b"#!" in response.body) == (400, False)
    assert not host or host.encode() not in response.body


@pytest.mark.parametrize("host", INVALID_HOSTS)
def test_the_welcome_page_needs_no_valid_host(connect: Any, host: str) -> None:
    response = connect().fetch("GET", "/", [("Host", host)])
    assert response.status == 200
    assert b"http://THIS-HOST:PORT/setup |" in response.body
    assert not host or host.encode() not in response.body


def test_only_the_script_needs_a_host_field(connect: Any) -> None:
    client = connect()
    client.send(b"GET /healthz HTTP/1.0\r\n\r\n")
    assert client.read_response().body == b"ok\n"
    client = connect()
    client.send(b"GET /setup/systemd HTTP/1.0\r\n\r\n")
    assert client.read_response().status == 400


# /readyz


class _Probe:
    """A probe with a fixed result."""

    def __init__(self, state: StoreState, sentence: str = "") -> None:
        self._result = ProbeResult(state, sentence)

    async def probe(self) -> ProbeResult:
        return self._result


WRITABLE = _Probe(StoreState.WRITABLE)
FULL = _Probe(StoreState.FAILED, "REGISTRY_DIR is full")
HANGS = _Probe(StoreState.HANGS, "CACHE_DIR has not answered for 2 s")


@pytest.mark.parametrize(
    ("probes", "status", "content"),
    [
        ([WRITABLE, WRITABLE], 200, b"ready\n"),
        ([WRITABLE, FULL], 503, b"REGISTRY_DIR is full\n"),
        ([HANGS, WRITABLE], 200, b"ready\nCACHE_DIR has not answered for 2 s\n"),
        ([HANGS, FULL], 503, b"REGISTRY_DIR is full\n"),
        ([WRITABLE], 200, b"ready\n"),
    ],
    ids=["ready", "full", "hangs", "both", "read-only"],
)
def test_readyz_is_503_if_a_store_cannot_be_written(
    connect_client: Any, probes: list[Any], status: int, content: bytes
) -> None:
    response = connect_client(partial(handle_ready, lambda: probes)).fetch("GET", "/readyz")
    assert (response.status, response.body) == (status, content)
    assert response.headers.get("Retry-After") == ("10" if status == 503 else None)
