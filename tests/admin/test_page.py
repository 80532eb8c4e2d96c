"""What the daemon answers in its own name."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from dockerproxy.admin.page import Page
from dockerproxy.errors import RegistryError
from dockerproxy.http.request import Request
from dockerproxy.oci.names import Host
from dockerproxy.proxy.front import answer_plainly

PEM = b"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"

HOSTILE = [
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
def enter(visit: Any) -> Any:
    """Return a function that makes a visitor of the page; `name` is what an absolute-form target named."""

    def make(name: str = "", proxy_port: int | None = None, *, secure: bool = False) -> Any:
        async def registry(request: Request) -> None:
            request.answer(200, [], b"registry")

        async def metrics(request: Request) -> None:
            fields = [("Content-Type", "text/plain; version=0.0.4"), ("Cache-Control", "no-store")]
            request.answer(200, fields, b"# HELP")

        page = Page(PEM, registry, metrics, proxy_port)

        async def handle(request: Request) -> None:
            request.host = name
            try:
                await page.answer(request)
            except RegistryError as error:
                answer_plainly(request, error)

        return visit(handle, secure=secure)

    return make


@pytest.mark.parametrize(
    ("path", "media_type", "content"),
    [
        ("/", "text/plain; charset=utf-8", b"docker-registry-proxy"),
        ("/ca.crt", "application/x-x509-ca-cert", PEM),
        ("/healthz", "text/plain; charset=utf-8", b"ok\n"),
        ("/metrics", "text/plain; version=0.0.4", b"# HELP"),
        ("/setup", "text/x-shellscript; charset=utf-8", b"#!/bin/sh\n"),
        ("/setup", "text/x-shellscript; charset=utf-8", b"#!/bin/sh\n"),
        ("/setup/systemd", "text/x-shellscript; charset=utf-8", b"#!/bin/sh\n"),
    ],
)
def test_what_there_is(enter: Any, path: str, media_type: str, content: bytes) -> None:
    for target in (path, f"{path}?anything=1"):
        visitor = enter()
        answer = visitor.ask("GET", target)
        assert (answer.status, answer.headers["Content-Type"], answer.whole) == (200, media_type, True)
        assert answer.body.startswith(content)
        assert answer.headers["Cache-Control"] in ("no-store", "no-cache")
        head = visitor.ask("HEAD", target)
        assert (head.status, head.body, head.headers["Content-Length"]) == (200, b"", str(len(answer.body)))
        assert visitor.logged[0].host == "proxy.example:3128"


def test_the_certificate_is_the_whole_of_the_file(enter: Any) -> None:
    assert enter().ask("GET", "/ca.crt").body == PEM


@pytest.mark.parametrize("path", ["/v2", "/v2/", "/v2/a/manifests/latest"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE"])
def test_the_registry_answers_for_itself(enter: Any, path: str, method: str) -> None:
    assert enter().ask(method, path).status == 200


@pytest.mark.parametrize(
    "path", ["/nothing", "/v2x", "/v1/", "/ca.crt/", "/CA.CRT", "//", "/%63a.crt", "/setup/", "/setup/../ca.crt"]
)
def test_what_there_is_not(enter: Any, path: str) -> None:
    answer = enter().ask("GET", path)
    assert (answer.status, answer.headers["Content-Type"]) == (404, "text/plain; charset=utf-8")
    assert b"/ tells" in answer.body


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE"])
@pytest.mark.parametrize("path", ["/", "/ca.crt", "/healthz", "/metrics", "/setup/systemd", "/nothing"])
def test_it_can_only_be_read(enter: Any, method: str, path: str) -> None:
    answer = enter().ask(method, path)
    assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD")


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
def test_our_own_address_is_as_the_client_writes_it(enter: Any, host: str, address: str) -> None:
    page = enter().ask("GET", "/", [("Host", host)])
    assert f"http://{address}/setup |" in page.body.decode()
    script = enter().ask("GET", "/setup/systemd", [("Host", host)]).body.decode()
    # which shell quotes, where it has brackets
    assert "proxy=" + shlex.quote(f"http://{Host.parse(host, 80).authority}/") + "\n" in script


def test_of_a_url_its_own_host_counts(enter: Any) -> None:
    """RFC 9112, section 3.2.2: beside a target with a host, the Host field is not looked at."""
    script = enter(name="docker-registry.local:3128").ask("GET", "/setup/systemd", [("Host", "evil.example")])
    assert b"proxy=http://docker-registry.local:3128/\n" in script.body
    assert b"evil" not in script.body


def test_at_another_door_the_script_names_the_proxys_port(enter: Any) -> None:
    visitor = enter(proxy_port=3128)
    script = visitor.ask("GET", "/setup", [("Host", "docker-registry.local")]).body
    assert b"proxy=http://docker-registry.local:3128/\n" in script
    page = visitor.ask("GET", "/", [("Host", "docker-registry.local")]).body
    assert b"http://docker-registry.local/setup |" in page  # the page itself is where it was found


@pytest.mark.parametrize("host", ["docker-registry.local", "docker-registry.local:5443"])
def test_at_a_door_with_tls_the_page_names_the_proxys_too(enter: Any, host: str) -> None:
    """Whose certificate nobody trusts yet who reads it."""
    page = enter(proxy_port=3128, secure=True).ask("GET", "/", [("Host", host)]).body
    assert b"curl -fsS http://docker-registry.local:3128/setup |" in page


@pytest.mark.parametrize("host", HOSTILE)
def test_no_script_is_made_of_a_hostile_host(enter: Any, host: str) -> None:
    answer = enter().ask("GET", "/setup/systemd", [("Host", host)])
    assert (answer.status, b"#!" in answer.body) == (400, False)
    assert not host or host.encode() not in answer.body


@pytest.mark.parametrize("host", HOSTILE)
def test_the_page_is_there_for_everyone(enter: Any, host: str) -> None:
    answer = enter().ask("GET", "/", [("Host", host)])
    assert answer.status == 200
    assert b"http://THIS-HOST:PORT/setup |" in answer.body
    assert not host or host.encode() not in answer.body


def test_a_client_that_does_not_name_us(enter: Any) -> None:
    visitor = enter()
    visitor.send(b"GET /healthz HTTP/1.0\r\n\r\n")
    assert visitor.answer().body == b"ok\n"
    visitor = enter()
    visitor.send(b"GET /setup/systemd HTTP/1.0\r\n\r\n")
    assert visitor.answer().status == 400
