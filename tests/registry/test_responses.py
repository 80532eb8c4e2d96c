"""Errors as a client receives them, and the fields of the cache status."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dockerproxy import errors
from dockerproxy.errors import HeadRefused, RegistryError, UpstreamFailing, UpstreamRefused
from dockerproxy.http.request import Request
from dockerproxy.registry.responses import cache_status_fields, respond_error


def classes() -> list[type[RegistryError]]:
    return [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, RegistryError)]


ERRORS = [
    kind("a sentence", headers=[("Retry-After", "7")])
    for kind in classes()
    if not issubclass(kind, UpstreamRefused | HeadRefused)
]
STATUSES = {
    "NameInvalid": (400, "NAME_INVALID"),
    "NameUnknown": (404, "NAME_UNKNOWN"),
    "ManifestUnknown": (404, "MANIFEST_UNKNOWN"),
    "BlobUnknown": (404, "BLOB_UNKNOWN"),
    "RangeInvalid": (416, "RANGE_INVALID"),
    "Unauthorized": (401, "UNAUTHORIZED"),
    "Denied": (403, "DENIED"),
    "Unsupported": (405, "UNSUPPORTED"),
    "TooManyRequests": (429, "TOOMANYREQUESTS"),
    "UpstreamUnreachable": (502, "UNAVAILABLE"),
    "UpstreamTimeout": (504, "UNAVAILABLE"),
    "DestinationForbidden": (403, "DENIED"),
}


@pytest.fixture
def render_error(connect_client: Any) -> Any:
    def render(error: RegistryError, *challenge: tuple[str, str], method: str = "GET", cache_status: str = "-") -> Any:
        async def handle(request: Request) -> None:
            request.cache_status = cache_status
            respond_error(request, error, challenge)

        return connect_client(handle).fetch(method, "/")

    return render


@pytest.mark.parametrize("cache_status", ["MISS", "PASS", "STALE"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_every_error_is_rendered_as_registry_json(render_error: Any, error: RegistryError, cache_status: str) -> None:
    """RFC 9211, section 2: a response that this server generates has no Cache-Status, and says so in X-Cache only."""
    response = render_error(error, cache_status=cache_status)
    assert response.status == error.status
    assert json.loads(response.body) == {"errors": [{"code": error.code, "message": "a sentence"}]}
    assert response.headers["Content-Type"] == "application/json"
    assert response.headers["Docker-Distribution-Api-Version"] == "registry/2.0"
    assert response.headers["Content-Length"] == str(len(response.body))
    assert response.headers["Retry-After"] == "7"
    assert response.fields("X-Cache") == [cache_status]
    assert response.fields("Cache-Status") == []
    if type(error).__name__ in STATUSES:
        assert (error.status, error.code) == STATUSES[type(error).__name__]


@pytest.mark.parametrize(
    ("cache_status", "member"),
    [
        ("HIT", "docker-registry-proxy;hit"),
        ("MISS", "docker-registry-proxy;fwd=miss"),
        ("JOINED", "docker-registry-proxy;fwd=miss;collapsed"),
        ("REVALIDATED", "docker-registry-proxy;fwd=stale"),
        ("STALE", "docker-registry-proxy;hit;detail=stale"),
        ("PASS", "docker-registry-proxy;fwd=bypass"),
    ],
)
def test_cache_status_has_two_fields(cache_status: str, member: str) -> None:
    assert [*cache_status_fields(cache_status)] == [("X-Cache", cache_status), ("Cache-Status", member)]


def test_a_response_without_cache_status_has_no_field() -> None:
    assert [*cache_status_fields("-")] == []


@pytest.mark.parametrize(
    ("cache_status", "expected"),
    [
        ("PASS", ["ExampleCache;hit;ttl=30", "docker-registry-proxy;fwd=bypass"]),
        ("MISS", ["docker-registry-proxy;fwd=miss"]),
        ("-", []),
    ],
)
def test_cache_status_of_upstream_describes_one_request(
    render_error: Any, cache_status: str, expected: list[str]
) -> None:
    """RFC 9211, section 2: upstream's members stay in front of ours. If clients share a refusal, they are left out."""
    error = UpstreamRefused(403, b"no", [("cache-status", "ExampleCache;hit;ttl=30")])
    assert render_error(error, cache_status=cache_status).fields("Cache-Status") == expected


def test_every_error_class_has_a_spec_code() -> None:
    assert set(STATUSES) <= {kind.__name__ for kind in classes()}
    for kind in classes():
        assert 400 <= kind.status <= 599
        assert kind.code == kind.code.upper()


def test_an_error_has_no_body_for_head(render_error: Any) -> None:
    response = render_error(errors.BlobUnknown("a sentence"), method="HEAD")
    assert (response.status, response.body) == (404, b"")
    assert int(response.headers["Content-Length"]) > 0


def test_message_is_escaped(render_error: Any) -> None:
    response = render_error(errors.NameInvalid('a "name"\r\n\x00é'))
    assert json.loads(response.body)["errors"][0]["message"] == 'a "name"\r\n\x00é'


def test_upstream_rate_limit_is_forwarded(render_error: Any) -> None:
    fields = [("retry-after", "30"), ("ratelimit-remaining", "0;w=21600")]
    response = render_error(UpstreamFailing("registry-1.docker.io limits the rate of pulls", 429, headers=fields))
    assert (response.status, response.headers["Retry-After"]) == (429, "30")
    assert response.headers["RateLimit-Remaining"] == "0;w=21600"
    assert json.loads(response.body)["errors"][0]["code"] == "TOOMANYREQUESTS"


REFUSED = UpstreamRefused(
    403,
    b'{"errors":[{"code":"DENIED","message":"in its own words"}]}',
    [
        ("content-type", "application/json; charset=utf-8"),
        ("docker-distribution-api-version", "registry/2.0"),
        ("x-request-id", "42"),
        ("content-length", "7"),
        ("transfer-encoding", "chunked"),
        ("connection", "close, X-Hop"),
        ("x-hop", "1"),
        ("keep-alive", "timeout=5"),
        ("upgrade", "h2c"),
        ("date", "Mon, 01 Jan 2001 00:00:00 GMT"),
        ("server", "theirs"),
        ("set-cookie", "session=secret"),
        ("strict-transport-security", "max-age=31536000"),
        ("alt-svc", 'h3=":443"'),
        ("x-cache", "Hit from cloudfront"),
        ("www-authenticate", 'Bearer realm="https://upstream/token"'),
    ],
)


def test_upstream_error_body_is_forwarded(render_error: Any) -> None:
    response = render_error(REFUSED, cache_status="MISS")
    assert (response.status, response.body, response.complete) == (403, REFUSED.content, True)
    assert response.fields("Content-Type") == ["application/json; charset=utf-8"]
    assert response.fields("Content-Length") == [str(len(REFUSED.content))]
    assert response.fields("X-Request-Id") == ["42"]
    assert response.fields("X-Cache") == ["MISS"]


def test_connection_fields_are_not_forwarded(render_error: Any) -> None:
    response = render_error(REFUSED)
    assert "2001" not in response.headers["Date"]
    for name in ("Connection", "X-Hop", "Keep-Alive", "Upgrade", "Transfer-Encoding", "Server", "Set-Cookie"):
        assert name not in response.headers, name
    for name in ("Strict-Transport-Security", "Alt-Svc"):
        assert name not in response.headers, name


def test_challenge_replaces_the_one_of_the_error(render_error: Any) -> None:
    assert "WWW-Authenticate" not in render_error(REFUSED).headers
    challenges = [("WWW-Authenticate", 'Bearer realm="https://ours/token"'), ("WWW-Authenticate", "Basic")]
    assert render_error(REFUSED, *challenges).fields("WWW-Authenticate") == [value for _, value in challenges]
    error = errors.Unauthorized("a login, please", headers=[("WWW-Authenticate", "Basic")])
    assert render_error(error).fields("WWW-Authenticate") == []
    assert render_error(error, *challenges[:1]).fields("WWW-Authenticate") == [challenges[0][1]]


def test_error_is_not_changed_by_rendering(render_error: Any) -> None:
    before = REFUSED.headers
    render_error(REFUSED, ("WWW-Authenticate", "Basic"))
    assert REFUSED.headers == before


@pytest.mark.parametrize("value", ["a\r\nSet-Cookie: b=c", "a\nb", "a\rb", "a\0b"])
def test_no_header_injection(connect_client: Any, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dockerproxy.http.channel.log.failure", lambda *_, **__: None)
    for error in (UpstreamRefused(404, b"", [("x-odd", value)]), errors.Denied("no", headers=[("x-odd", value)])):

        async def handle(request: Request, error: RegistryError = error) -> None:
            respond_error(request, error)

        client = connect_client(handle)
        client.send_request("GET", "/")
        assert b"x-odd" not in client.received
        assert b"b=c" not in client.received
