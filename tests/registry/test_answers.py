"""How errors look to a client."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dockerproxy import errors
from dockerproxy.errors import RegistryError, UpstreamFailing, UpstreamRefused
from dockerproxy.http.request import Request
from dockerproxy.registry.answers import answer_error


def classes() -> list[type[RegistryError]]:
    return [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, RegistryError)]


MADE = [kind("a sentence", headers=[("Retry-After", "7")]) for kind in classes() if kind is not UpstreamRefused]
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
def tell(visit: Any) -> Any:
    def tell(error: RegistryError, *challenge: tuple[str, str], method: str = "GET", verdict: str = "-") -> Any:
        async def handle(request: Request) -> None:
            request.cache_status = verdict
            answer_error(request, error, challenge)

        return visit(handle).ask(method, "/")

    return tell


@pytest.mark.parametrize("error", MADE, ids=lambda error: type(error).__name__)
def test_every_error_is_json_of_the_registrys(tell: Any, error: RegistryError) -> None:
    answer = tell(error, verdict="MISS")
    assert answer.status == error.status
    assert json.loads(answer.body) == {"errors": [{"code": error.code, "message": "a sentence"}]}
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Docker-Distribution-Api-Version"] == "registry/2.0"
    assert answer.headers["Content-Length"] == str(len(answer.body))
    assert answer.headers["Retry-After"] == "7"
    assert answer.fields("X-Cache") == ["MISS"]
    if type(error).__name__ in STATUSES:
        assert (error.status, error.code) == STATUSES[type(error).__name__]


def test_every_class_is_told_in_the_spec_s_terms() -> None:
    assert set(STATUSES) <= {kind.__name__ for kind in classes()}
    for kind in classes():
        assert 400 <= kind.status <= 599
        assert kind.code == kind.code.upper()


def test_an_error_has_no_body_for_head(tell: Any) -> None:
    answer = tell(errors.BlobUnknown("a sentence"), method="HEAD")
    assert (answer.status, answer.body) == (404, b"")
    assert int(answer.headers["Content-Length"]) > 0


def test_a_sentence_is_escaped(tell: Any) -> None:
    answer = tell(errors.NameInvalid('a "name"\r\n\x00é'))
    assert json.loads(answer.body)["errors"][0]["message"] == 'a "name"\r\n\x00é'


def test_a_limit_of_upstreams_is_told_on(tell: Any) -> None:
    fields = [("retry-after", "30"), ("ratelimit-remaining", "0;w=21600")]
    answer = tell(UpstreamFailing("registry-1.docker.io limits the rate of pulls", 429, headers=fields))
    assert (answer.status, answer.headers["Retry-After"]) == (429, "30")
    assert answer.headers["RateLimit-Remaining"] == "0;w=21600"
    assert json.loads(answer.body)["errors"][0]["code"] == "TOOMANYREQUESTS"


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


def test_a_refusal_of_upstreams_is_in_its_own_words(tell: Any) -> None:
    answer = tell(REFUSED, verdict="MISS")
    assert (answer.status, answer.body, answer.whole) == (403, REFUSED.content, True)
    assert answer.fields("Content-Type") == ["application/json; charset=utf-8"]
    assert answer.fields("Content-Length") == [str(len(REFUSED.content))]
    assert answer.fields("X-Request-Id") == ["42"]
    assert answer.fields("X-Cache") == ["MISS"]


def test_nothing_of_upstreams_connection_comes_with_it(tell: Any) -> None:
    answer = tell(REFUSED)
    assert "2001" not in answer.headers["Date"]
    for name in ("Connection", "X-Hop", "Keep-Alive", "Upgrade", "Transfer-Encoding", "Server", "Set-Cookie"):
        assert name not in answer.headers, name
    for name in ("Strict-Transport-Security", "Alt-Svc"):
        assert name not in answer.headers, name


def test_a_challenge_takes_the_place_of_the_errors_own(tell: Any) -> None:
    assert "WWW-Authenticate" not in tell(REFUSED).headers
    ours = [("WWW-Authenticate", 'Bearer realm="https://ours/token"'), ("WWW-Authenticate", "Basic")]
    assert tell(REFUSED, *ours).fields("WWW-Authenticate") == [value for _, value in ours]
    error = errors.Unauthorized("a login, please", headers=[("WWW-Authenticate", "Basic")])
    assert tell(error).fields("WWW-Authenticate") == []
    assert tell(error, *ours[:1]).fields("WWW-Authenticate") == [ours[0][1]]


def test_an_error_may_be_the_answer_to_several(tell: Any) -> None:
    before = REFUSED.headers
    tell(REFUSED, ("WWW-Authenticate", "Basic"))
    assert REFUSED.headers == before


@pytest.mark.parametrize("value", ["a\r\nSet-Cookie: b=c", "a\nb", "a\rb", "a\0b"])
def test_no_field_can_be_brought_in_by_a_value(visit: Any, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dockerproxy.http.channel.log.failure", lambda *_, **__: None)
    for error in (UpstreamRefused(404, b"", [("x-odd", value)]), errors.Denied("no", headers=[("x-odd", value)])):

        async def handle(request: Request, error: RegistryError = error) -> None:
            answer_error(request, error)

        visitor = visit(handle)
        visitor.request("GET", "/")
        assert b"x-odd" not in visitor.received
        assert b"b=c" not in visitor.received
