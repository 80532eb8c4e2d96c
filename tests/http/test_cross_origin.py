"""Which requests come from pages of other origins, and the CORS fields for those of CORS_ORIGINS."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.http.cross_origin import CrossOriginProtection, is_own_origin, is_preflight, respond_preflight
from dockerproxy.http.request import Request

UI = "https://ui.example.com"
BROWSER = ("User-Agent", "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/140 Safari/537")
OLD_POWERSHELL = ("User-Agent", "Mozilla/5.0 (Windows NT; Windows NT 10.0; en-US) WindowsPowerShell/5.1.22621.4391")
HOST = "docker-registry.local:3128"


@pytest.fixture
def connect(connect_client: Any) -> Any:
    """Return a function that connects a client to a handler behind the protection."""

    def make(*, secure: bool = False, public: bool = False, pull: bool = False) -> Any:
        protection = CrossOriginProtection([UI])

        async def handle(request: Request) -> None:
            request.host = HOST
            protection.check(request, public=public, pull=pull)
            if is_preflight(request):
                await respond_preflight(request)
            else:
                request.respond(200, [], b"ok")

        return connect_client(handle, secure=secure)

    return make


PROGRAMS: list[list[tuple[str, str]]] = [
    [],
    [("User-Agent", "docker/28.3.0 go/go1.24.4 git-commit/265f709 kernel/6.12 os/linux arch/amd64")],
    [("User-Agent", "containerd/2.1.3")],
    [("User-Agent", "curl/8.14.1")],
    [OLD_POWERSHELL],
]
OUR_PAGES = [
    [BROWSER, ("Sec-Fetch-Site", "same-origin")],
    [BROWSER, ("Sec-Fetch-Site", "none")],
    [BROWSER, ("Origin", f"http://{HOST}")],
    [BROWSER, ("Origin", f"https://{HOST}"), ("Sec-Fetch-Site", "same-origin")],  # a server in front terminates TLS
    [BROWSER, ("Referer", f"http://{HOST}/page?x=1")],
    [BROWSER, ("Referer", f"{UI}/")],
]
FOREIGN_PAGES = [
    [("Origin", "http://evil.example")],
    [("Origin", "https://evil.example:3128")],
    [("Origin", "null")],
    [("Origin", "")],
    [("Origin", "chrome-extension://abcdefgh")],
    [("Origin", "http://docker-registry.local:8080")],  # another server of the same machine
    [("Origin", "http://docker-registry.local")],
    [("Origin", f"http://{HOST}.evil.example")],
    [("Origin", f"http://user@{HOST}")],
    [("Origin", f"http://{HOST}/")],
    [("Origin", f"http://{HOST} http://evil.example")],
    [("Origin", f"http://{HOST}"), ("Origin", "http://evil.example")],
    [("Origin", UI), ("Origin", "http://evil.example")],
    [("Origin", f"{UI}.evil.example")],
    [("Origin", f"http://{HOST}"), ("Sec-Fetch-Site", "cross-site")],
    [("Origin", "http://evil.example"), ("Sec-Fetch-Site", "same-origin")],
    [("Sec-Fetch-Site", "cross-site")],
    [("Sec-Fetch-Site", "same-site")],
    [("Sec-Fetch-Site", "")],
    [("Sec-Fetch-Site", "same-origin"), ("Sec-Fetch-Site", "cross-site")],
    [BROWSER, ("Referer", "http://evil.example/")],
    [BROWSER, ("Referer", "http://docker-registry.local:8080/")],
]


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("fields", PROGRAMS)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_programs_may_do_everything(connect: Any, method: str, fields: list[tuple[str, str]], secure: bool) -> None:
    assert connect(secure=secure, pull=True).fetch(method, "/", fields).status == 200


@pytest.mark.parametrize("fields", OUR_PAGES)
@pytest.mark.parametrize("method", ["GET", "PUT", "POST", "DELETE"])
def test_our_own_pages_may_do_everything(connect: Any, method: str, fields: list[tuple[str, str]]) -> None:
    assert connect(pull=True).fetch(method, "/", fields).status == 200


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("fields", FOREIGN_PAGES)
def test_foreign_pages_only_read_what_is_public(connect: Any, fields: list[tuple[str, str]], secure: bool) -> None:
    for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
        response = connect(secure=secure).fetch(method, "/", fields)
        assert response.status == 403
        assert method == "HEAD" or b"CORS_ORIGINS" in response.body
        is_read = method in ("GET", "HEAD")
        public_response = connect(secure=secure, public=True).fetch(method, "/", fields)
        assert public_response.status == (200 if is_read else 403)
        assert not [name for name in public_response.headers if name.lower().startswith("access-control-")]


def test_an_http_page_is_foreign_to_a_tls_request(connect: Any) -> None:
    assert connect(secure=True).fetch("GET", "/", [("Origin", f"http://{HOST}")]).status == 403
    assert connect(secure=True).fetch("GET", "/", [("Origin", f"https://{HOST}")]).status == 200


def test_a_browser_that_does_not_say_who_sent_it_only_reads_and_pulls_nothing(connect: Any) -> None:
    """The page may have suppressed Referer."""
    assert connect().fetch("GET", "/", [BROWSER]).status == 200
    assert connect(pull=True).fetch("GET", "/", [BROWSER]).status == 403
    for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
        assert connect().fetch(method, "/", [BROWSER]).status == 403


def test_an_allowed_origin_gets_the_cors_fields(connect: Any) -> None:
    for method in ("GET", "DELETE"):
        response = connect(pull=True).fetch(method, "/", [BROWSER, ("Origin", UI), ("Sec-Fetch-Site", "cross-site")])
        assert response.status == 200
        assert response.fields("Access-Control-Allow-Origin") == [UI]
        assert response.headers["Access-Control-Allow-Credentials"] == "true"
        assert "Docker-Content-Digest" in response.headers["Access-Control-Expose-Headers"]
        assert response.headers["Vary"] == "Origin"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert connect().fetch("GET", "/").headers["Vary"] == "Origin"  # for a cache between


def test_a_preflight_is_answered_for_an_allowed_origin_only(connect: Any) -> None:
    preflight = [("Access-Control-Request-Method", "DELETE"), ("Access-Control-Request-Headers", "authorization")]
    response = connect().fetch("OPTIONS", "/", [("Origin", UI), *preflight])
    assert (response.status, response.headers["Access-Control-Allow-Origin"]) == (204, UI)
    assert "DELETE" in response.headers["Access-Control-Allow-Methods"]
    assert "Authorization" in response.headers["Access-Control-Allow-Headers"]
    response = connect().fetch("OPTIONS", "/", [("Origin", "http://evil.example"), *preflight])
    assert (response.status, response.headers["Access-Control-Allow-Origin"]) == (403, None)


def test_origins_are_replaced(connect_client: Any) -> None:
    protection = CrossOriginProtection([UI])
    protection.set_cors_origins(["https://other.example"])

    async def handle(request: Request) -> None:
        protection.check(request)
        request.respond(200, [])

    client = connect_client(handle)
    assert client.fetch("GET", "/", [("Origin", UI)]).status == 403
    assert client.fetch("GET", "/", [("Origin", "https://other.example")]).status == 200
    protection.set_cors_origins([])
    assert client.fetch("GET", "/", [("Origin", "https://other.example")]).status == 403
    assert client.fetch("GET", "/").headers["Vary"] is None


@pytest.mark.parametrize(
    ("origin", "host", "secure", "is_own"),
    [
        ("http://a.example", "a.example", False, True),
        ("http://a.example", "A.example.:80", False, True),
        ("http://a.example:80", "a.example", False, True),
        ("https://a.example", "a.example", True, True),
        ("https://a.example", "a.example:443", True, True),
        ("https://a.example:443", "a.example", True, True),
        ("http://[::1]:3128", "[0:0::1]:3128", False, True),
        ("http://10.0.0.1", "10.0.0.1", False, True),
        ("http://a.example:443", "a.example", False, False),
        ("https://a.example", "a.example:80", False, False),
        ("http://a.example", "", False, False),
        ("http://", "", False, False),
        ("ftp://a.example", "a.example", False, False),
        ("HTTP://a.example", "a.example", False, False),  # browsers write it in lower case
        ("http://a.example", "user@a.example", False, False),
    ],
)
def test_own_origins(origin: str, host: str, secure: bool, is_own: bool) -> None:
    assert is_own_origin(origin, host, secure=secure) is is_own


@given(st.text(), st.text(), st.booleans())
def test_any_text_is_compared(origin: str, host: str, secure: bool) -> None:
    assert is_own_origin(origin, host, secure=secure) in (False, True)
    is_own_origin(f"http://{origin}", host, secure=secure)
    assert not is_own_origin(f"http://evil.example/{origin}", "evil.example", secure=secure)
