"""The handlers of a port, and the requests of web pages that it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from dockerproxy.http.cross_origin import CrossOriginProtection
from dockerproxy.http.request import Request, respond_text_error
from dockerproxy.http.security_fields import security_fields
from dockerproxy.proxy.host_rule import HostRule
from dockerproxy.proxy.router import BrowserProtection, Router

UI = "https://ui.example"
PATHS = ("/", "/ca.crt", "/setup", "/setup/systemd", "/healthz", "/metrics", "/v2", "/v2/", "/v2/a/manifests/1")
FOR_ANY_HOST = {"/ca.crt", "/setup", "/setup/systemd", "/healthz"}
PUBLIC = FOR_ANY_HOST | {"/"}


@pytest.fixture
def connect(connect_client: Any) -> Any:
    """Return a function that connects a client to a router."""

    async def respond(request: Request) -> None:
        request.respond(200, [], f"{request.host} {request.path}".encode())

    protection = BrowserProtection(HostRule(frozenset({"own.example"})), CrossOriginProtection([UI]))
    pages = {path: respond for path in PATHS if not path.startswith("/v2")}

    def make(secure: bool = False) -> Any:
        router = Router(respond, pages, protection, respond_text_error)
        return connect_client(router.handle, secure=secure)

    make.protection = protection  # type: ignore[attr-defined]
    return make


@pytest.mark.parametrize("path", PATHS)
def test_hosts(connect: Any, path: str) -> None:
    for host in ("own.example", "OWN.example.:3128", "10.0.0.1", "localhost:80"):
        assert connect().fetch("GET", path, [("Host", host)]).body == f"{host} {path}".encode()
    expected = 200 if path in FOR_ANY_HOST else 421
    assert connect().fetch("GET", path, [("Host", "evil.example")]).status == expected
    assert connect(secure=True).fetch("GET", path, [("Host", "evil.example")]).status == 200  # the certificate decides


@pytest.mark.parametrize("path", [*PATHS, "/v2/../healthz", "/v2/x?/healthz", "//healthz", "/healthz/", "/Healthz"])
def test_pages_of_other_sites(connect: Any, path: str) -> None:
    fields = [("Host", "own.example"), ("Origin", "http://evil.example")]
    assert connect().fetch("GET", path, fields).status == (200 if path in PUBLIC else 403)
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        assert connect().fetch(method, path, fields).status == 403


def test_a_request_without_a_host_is_from_no_browser(connect: Any) -> None:
    client = connect()
    client.send(b"GET /v2/ HTTP/1.0\r\n\r\n")
    assert client.read_response().body == b" /v2/"


@pytest.mark.parametrize("host", ["user:secret@own.example", "user:secret@10.0.0.1", "a b", "own.example:x"])
def test_a_malformed_host_is_not_ours_and_not_logged(connect: Any, host: str) -> None:
    for secure in (False, True):
        client = connect(secure)
        assert client.fetch("GET", "/v2/", [("Host", host)]).status == (200 if secure else 421)
        assert client.fetch("GET", "/healthz", [("Host", host)]).status == 200
        assert [request.host for request in client.finished_requests] == ["", ""]


def test_a_preflight_of_an_allowed_page_reaches_no_handler(connect: Any) -> None:
    fields = [("Host", "own.example"), ("Origin", UI), ("Access-Control-Request-Method", "DELETE")]
    response = connect().fetch("OPTIONS", "/v2/a/manifests/1", fields)
    assert (response.status, response.body) == (204, b"")
    assert connect().fetch("OPTIONS", "/v2/a/manifests/1", fields[:2]).body == b"own.example /v2/a/manifests/1"


def test_a_new_rule_applies_to_later_requests(connect: Any) -> None:
    client = connect()
    assert client.fetch("GET", "/", [("Host", "new.example")]).status == 421
    connect.protection.host_rule = HostRule(frozenset({"new.example"}))
    assert client.fetch("GET", "/", [("Host", "new.example")]).status == 200


def test_a_page_may_have_a_policy_of_its_own(connect_client: Any) -> None:
    async def page(request: Request) -> None:
        request.security_fields = security_fields("default-src 'self'")
        request.respond(200, [("Content-Type", "text/html")])

    router = Router(page, {"/": page}, BrowserProtection(HostRule(), CrossOriginProtection()), respond_text_error)
    response = connect_client(router.handle).fetch("GET", "/", [("Host", "localhost")])
    assert response.fields("Content-Security-Policy") == ["default-src 'self'"]
    assert response.headers["X-Content-Type-Options"] == "nosniff"
