"""Registries elsewhere, by interception and as a mirror, over a `Remote` that does what the test says."""

from __future__ import annotations

import json
from typing import Any

import pytest
from attrs import frozen
from twisted.internet.task import Clock

from dockerproxy.errors import (
    BlobUnknown,
    Unauthorized,
    UpstreamBroken,
    UpstreamRefused,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from dockerproxy.oci.contents import ManifestAnswer
from dockerproxy.oci.manifests import EMPTY_INDEX, OCI_INDEX
from dockerproxy.oci.names import Digest, Host, Registry
from dockerproxy.registry.doors import Intercepted, Mirror
from dockerproxy.registry.face import Face

QUAY = Registry.parse("quay.io")
HUB = Registry.parse("registry-1.docker.io")
PORTED = Registry.parse("registry.example:5000")
PLAIN = Registry.parse("http://plain.example:8080")
MIRRORED = {registry.host: registry for registry in (QUAY, HUB, PORTED, PLAIN)} | {Host.parse("docker.io"): HUB}
DIGEST = Digest.of(b"x")

WRITES = [
    ("POST", "/v2/a/b/blobs/uploads/"),
    ("PATCH", "/v2/a/b/blobs/uploads/session"),
    ("PUT", "/v2/a/b/blobs/uploads/session?digest=x"),
    ("PUT", "/v2/a/b/manifests/latest"),
    ("DELETE", "/v2/a/b/manifests/latest"),
    ("DELETE", f"/v2/a/b/blobs/{DIGEST}"),
    ("POST", "/v2/"),
    ("PUT", "/v2/_catalog"),
    ("POST", "/v2/a/b/tags/list"),
    ("DELETE", "/v2/a/b/tags/reference/latest"),
    ("POST", "/v2/some/thing/unknown"),
    ("PROPFIND", "/v2/a/b/manifests/latest"),
]


@frozen
class Page:
    """An index of referrers."""

    content: bytes
    filtered: bool


@pytest.fixture
def intercept(visit: Any, elsewhere: Any) -> Any:
    """Return a function that makes a visitor of a registry that is intercepted."""

    def make(allow_push: bool = False, registry: Registry = QUAY, **options: Any) -> Any:
        clock = Clock()
        door = Intercepted(Face(clock), elsewhere.open, elsewhere, allow_push=allow_push)
        return visit(lambda request: door.answer(registry, request), clock=clock, **{"secure": True, **options})

    return make


@pytest.fixture
def mirror(visit: Any, elsewhere: Any) -> Any:
    """Return a function that makes a visitor of the mirror."""

    def make(**options: Any) -> Any:
        clock = Clock()
        return visit(Mirror(Face(clock), elsewhere.open, MIRRORED, HUB).answer, clock=clock, **options)

    return make


def code(answer: Any) -> str:
    found = json.loads(answer.body)["errors"][0]["code"]
    assert isinstance(found, str)
    return found


# interception: pulling


def test_a_client_meets_the_registry_with_what_it_shows(intercept: Any, elsewhere: Any, text: Any) -> None:
    digest = elsewhere.put(text(b"layer"))
    visitor = intercept()
    assert visitor.ask("GET", f"/v2/a/b/blobs/{digest}").body == b"layer"
    elsewhere.put(text(b"layer"))
    visitor.ask("GET", f"/v2/a/b/blobs/{digest}", [("Authorization", "Bearer client")])
    assert elsewhere.opened == [(QUAY, None), (QUAY, "Bearer client")]
    assert [request.host for request in visitor.logged] == ["quay.io", "quay.io"]


def test_a_manifest_comes_from_the_remote(intercept: Any, elsewhere: Any) -> None:
    elsewhere.manifests["latest"] = ManifestAnswer(DIGEST, OCI_INDEX, 2, b"{}", "HIT")
    answer = intercept().ask("GET", "/v2/a/b/manifests/latest", [("Accept", OCI_INDEX)])
    assert (answer.status, answer.body) == (200, b"{}")
    assert elsewhere.asked == [("a/b", "latest", [OCI_INDEX], False)]


@pytest.mark.parametrize("path", ["/v2/", "/v2"])
def test_the_ping(intercept: Any, elsewhere: Any, path: str) -> None:
    for method in ("GET", "HEAD"):
        answer = intercept().ask(method, path)
        assert (answer.status, answer.headers["Docker-Distribution-Api-Version"]) == (200, "registry/2.0")
        assert answer.body == (b"{}" if method == "GET" else b"")
    elsewhere.pinged = Unauthorized("who are you?")
    answer = intercept().ask("GET", "/v2/")
    assert (answer.status, code(answer)) == (401, "UNAUTHORIZED")
    assert answer.fields("WWW-Authenticate") == ['Bearer remembered,realm="https://ours/token"']
    assert elsewhere.forwarded == []


def test_a_401_carries_the_registrys_challenge_once(intercept: Any, elsewhere: Any) -> None:
    """Its realm is one that leads to us, by the scheme that the client came by."""
    headers = [("www-authenticate", 'Bearer service="s"'), ("www-authenticate", "Basic realm2"), ("x-own", "1")]
    elsewhere.error = UpstreamRefused(401, b"its words", headers)
    for secure, scheme in ((True, "https"), (False, "http"), (True, "https")):  # the same error again and again
        answer = intercept(secure=secure).ask("GET", f"/v2/a/b/blobs/{DIGEST}")
        assert (answer.status, answer.body, answer.headers["X-Own"]) == (401, b"its words", "1")
        assert answer.fields("WWW-Authenticate") == [
            f'Bearer service="s",realm="{scheme}://ours/token"',
            f'Basic realm2,realm="{scheme}://ours/token"',
        ]


def test_other_errors_carry_none(intercept: Any, elsewhere: Any) -> None:
    for error in (BlobUnknown("no"), UpstreamRefused(403, b"", [("www-authenticate", "Basic")])):
        elsewhere.error = error
        assert "WWW-Authenticate" not in intercept().ask("GET", f"/v2/a/b/blobs/{DIGEST}").headers


@pytest.mark.parametrize("error", [UpstreamUnreachable("no such name"), UpstreamTimeout("nothing came")])
def test_an_outage_is_told_as_one(intercept: Any, elsewhere: Any, error: Any) -> None:
    elsewhere.error = elsewhere.answer = error
    for path in (f"/v2/a/b/blobs/{DIGEST}", "/v2/a/b/tags/list", "/elsewhere"):
        answer = intercept().ask("GET", path)
        assert (answer.status, code(answer)) == (error.status, "UNAVAILABLE")
        assert error.message in answer.body.decode()


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v2/UPPER/manifests/latest", 400),
        (f"/v2/a/blobs/{DIGEST}x", 400),
        ("/v2/a/manifests/!", 400),
        ("/v2/a/../b/tags/list", 400),
        ("/v2/%2e%2e/api/users", 400),
        ("/v2/a%2fb/tags/list", 400),
        ("/v2/a/blobs/md5:abc", 400),
    ],
)
def test_a_malformed_name_goes_nowhere(intercept: Any, elsewhere: Any, path: str, status: int) -> None:
    answer = intercept(allow_push=True).ask("GET", path)
    assert answer.status == status
    assert json.loads(answer.body)["errors"]
    assert elsewhere.forwarded == elsewhere.asked == []


@pytest.mark.parametrize(
    "target",
    [
        ".example.com/v2/",
        "@example.com/v2/",
        ":8443/v2/",
        "example.com/v2/",
        "http://example.com/v2/",
        "https://user:password@quay.io/v2/",
        "*",
        "quay.io:443",
        "?x=/v2/",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "CONNECT"])
def test_a_target_that_is_no_path_goes_nowhere(intercept: Any, elsewhere: Any, target: str, method: str) -> None:
    """Behind `https://quay.io` it would make another server's URL: `https://quay.io.example.com/v2/`."""
    visitor = intercept(allow_push=True)
    answer = visitor.ask(method, target)
    assert (answer.status, code(answer)) == (400, "UNSUPPORTED")
    assert elsewhere.forwarded == elsewhere.asked == elsewhere.tokens == []
    assert "password" not in visitor.logged[0].path
    assert b"password" not in visitor.received


# interception: what is passed on


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("/v2/a/b/tags/list?n=10&last=1%2E0%20x", "a/b"),
        ("/v2/_catalog?n=5&last=a%2Fb", None),
        ("/v2/a/b/blobs/uploads/session?x=%7E", "a/b"),
        ("/v2/some/thing/unknown?%41=b+c&&=", None),
        ("/api/v1/user?x=1", None),
        ("/", None),
        ("/v1/_ping", None),
    ],
)
def test_the_rest_is_passed_on_byte_for_byte(intercept: Any, elsewhere: Any, target: str, name: str | None) -> None:
    for method in ("GET", "HEAD"):
        visitor = intercept()
        answer = visitor.ask(method, target)
        assert (answer.status, answer.headers["X-Cache"]) == (200, "PASS")
        assert (elsewhere.forwarded[-1].method, elsewhere.forwarded[-1].path) == (method, target)
        assert elsewhere.forwarded[-1].name == name
        assert visitor.logged[0].verdict == "PASS"
        elsewhere.answer._rest = b"from upstream"
    assert elsewhere.asked == []


def test_what_a_client_says_to_us_is_not_passed_on(intercept: Any, elsewhere: Any) -> None:
    fields = [
        ("Authorization", "Bearer client"),
        ("Proxy-Authorization", "Basic proxy"),
        ("Proxy-Connection", "keep-alive"),
        ("Connection", "keep-alive, X-Hop"),
        ("X-Hop", "1"),
        ("TE", "trailers"),
        ("Upgrade", "h2c"),
        ("Accept-Encoding", "gzip"),
        ("Cookie", "session=1"),
        ("Accept", "application/json"),
        ("User-Agent", "docker/29"),
        ("If-None-Match", '"x"'),
    ]
    intercept().ask("GET", "/v2/a/b/tags/list", fields)
    assert sorted(name for name, _ in elsewhere.forwarded[0].headers) == ["accept", "if-none-match", "user-agent"]
    assert elsewhere.opened == [(QUAY, "Bearer client")]  # which is where its login is dealt with


def test_what_upstream_says_to_us_is_not_passed_back(intercept: Any, elsewhere: Any, answered: Any) -> None:
    fields = [
        ("content-type", "application/json"),
        ("link", '</v2/a/b/tags/list?last=9>; rel="next"'),
        ("connection", "close, x-hop"),
        ("x-hop", "1"),
        ("keep-alive", "timeout=5"),
        ("content-length", "13"),
        ("x-cache", "Hit from cloudfront"),
        ("alt-svc", 'h3=":443"'),
        ("set-cookie", "session=of-our-own-login"),
    ]
    elsewhere.answer = answered(200, fields, b"from upstream")
    answer = intercept().ask("GET", "/v2/a/b/tags/list")
    assert (answer.body, answer.fields("Content-Length")) == (b"from upstream", ["13"])
    assert answer.fields("X-Cache") == ["PASS"]
    assert answer.headers["Link"] == '</v2/a/b/tags/list?last=9>; rel="next"'
    for name in ("Connection", "X-Hop", "Keep-Alive", "Alt-Svc", "Set-Cookie"):
        assert name not in answer.headers, name


def test_cookies_are_for_what_is_no_registry(intercept: Any, elsewhere: Any, answered: Any) -> None:
    """quay.io's web pages are at the same host."""
    elsewhere.answer = answered(200, [("set-cookie", "a=b"), ("set-cookie", "c=d")])
    answer = intercept().ask("GET", "/signin/", [("Cookie", "a=b")])
    assert answer.fields("Set-Cookie") == ["a=b", "c=d"]
    assert elsewhere.forwarded[0].headers.get("cookie") == "a=b"


@pytest.mark.parametrize("status", [200, 204, 302, 304, 404, 416, 429, 500, 503])
def test_whatever_upstream_answers_is_the_answer(intercept: Any, elsewhere: Any, answered: Any, status: int) -> None:
    body = b"" if status in (204, 304) else b"its words"
    elsewhere.answer = answered(status, [("location", "https://elsewhere/x?sig=1")], body)
    visitor = intercept()
    answer = visitor.ask("GET", "/v2/a/b/tags/list")
    assert (answer.status, answer.body, answer.whole) == (status, body, True)
    assert answer.headers["Location"] == "https://elsewhere/x?sig=1"


def test_a_401_that_is_passed_on_leads_to_us_too(intercept: Any, elsewhere: Any, answered: Any) -> None:
    for target in ("/v2/a/b/tags/list", "/api/x"):
        elsewhere.answer = answered(401, [("www-authenticate", 'Bearer realm="https://theirs"'), ("x-own", "1")], b"no")
        answer = intercept().ask("GET", target)
        assert (answer.status, answer.body, answer.headers["X-Own"]) == (401, b"no", "1")
        assert answer.fields("WWW-Authenticate") == ['Bearer realm="https://theirs",realm="https://ours/token"']
        assert answer.fields("X-Cache") == ["PASS"]


def test_a_401_of_many_words_is_still_one(intercept: Any, elsewhere: Any, answered: Any) -> None:
    elsewhere.answer = answered(401, [], b"x" * 100_000)
    answer = intercept().ask("GET", "/v2/a/b/tags/list")
    assert (answer.status, answer.body) == (401, b"")


def test_an_answer_that_breaks_off_is_broken_off(intercept: Any, elsewhere: Any, answered: Any) -> None:
    for length in (100, None):
        elsewhere.answer = answered(200, [], b"half of it", length=length, fails=UpstreamBroken("it broke off"))
        visitor = intercept()
        answer = visitor.ask("GET", "/v2/_catalog")
        assert (answer.body, answer.whole, visitor.transport.aborted) == (b"half of it", False, True)
        assert elsewhere.answer.aborted


def test_a_client_that_leaves_gives_upstreams_answer_up(intercept: Any, elsewhere: Any, answered: Any) -> None:
    elsewhere.answer = answered(200, [], b"x" * 1_000_000, piece=10_000)
    visitor = intercept()
    visitor.transport.room = 100
    visitor.request("GET", "/v2/_catalog")
    assert not elsewhere.answer.aborted
    visitor.disconnect()
    assert elsewhere.answer.aborted


# interception: referrers


def test_referrers(intercept: Any, elsewhere: Any) -> None:
    elsewhere.referred = Page(EMPTY_INDEX, False)
    for method in ("GET", "HEAD"):
        answer = intercept().ask(method, f"/v2/a/b/referrers/{DIGEST}")
        assert (answer.status, answer.headers["Content-Type"]) == (200, OCI_INDEX)
        assert answer.headers["Content-Length"] == str(len(EMPTY_INDEX))
        assert answer.body == (EMPTY_INDEX if method == "GET" else b"")
        assert "OCI-Filters-Applied" not in answer.headers
    assert elsewhere.asked[0] == ("a/b", DIGEST, "", None)


def test_referrers_of_a_type(intercept: Any, elsewhere: Any) -> None:
    elsewhere.referred = Page(EMPTY_INDEX, True)
    query = "artifactType=application%2Fvnd.example%2Bjson&n=5"
    answer = intercept().ask("GET", f"/v2/a/b/referrers/{DIGEST}?{query}")
    assert (answer.status, answer.headers["OCI-Filters-Applied"]) == (200, "artifactType")
    assert elsewhere.asked[0] == ("a/b", DIGEST, query, "application/vnd.example+json")


def test_referrers_that_are_refused(intercept: Any, elsewhere: Any) -> None:
    elsewhere.referred = UpstreamRefused(401, b"no", [("www-authenticate", "Bearer x")])
    answer = intercept().ask("GET", f"/v2/a/b/referrers/{DIGEST}")
    assert (answer.status, answer.fields("WWW-Authenticate")) == (401, ['Bearer x,realm="https://ours/token"'])
    assert intercept().ask("GET", f"/v2/a/b/referrers/{DIGEST}?artifactType=%zz").status == 400


# interception: tokens


def test_tokens_at_the_realms_path(intercept: Any, elsewhere: Any) -> None:
    hub_tokens = Registry.parse("auth.docker.io")
    elsewhere.realms = {("quay.io", "/ours"): QUAY, ("auth.docker.io", "/token"): HUB}
    query = "service=s&scope=repository%3Aa%3Apull&scope=x"
    answer = intercept().ask("GET", f"/ours?{query}", [("Authorization", "Basic eA==")])
    assert (answer.status, answer.body) == (200, b'{"token":"t"}')
    assert (answer.headers["Content-Type"], answer.headers["Cache-Control"]) == ("application/json", "no-store")
    assert intercept(registry=hub_tokens).ask("GET", "/token").status == 200
    form = b"grant_type=password&username=u"
    assert intercept(registry=hub_tokens).ask("POST", "/token", body=form).status == 200
    assert elsewhere.tokens == [(QUAY, query, "Basic eA==", None), (HUB, "", None, None), (HUB, "", None, form)]
    assert elsewhere.forwarded == []


def test_a_form_has_a_bound(intercept: Any, elsewhere: Any) -> None:
    elsewhere.realms = {("quay.io", "/token"): QUAY}
    assert intercept().ask("POST", "/token", body=b"x" * 65_536).status == 200
    answer = intercept().ask("POST", "/token", body=b"x" * 65_537)
    assert (answer.status, code(answer)) == (413, "SIZE_INVALID")
    chunked = [("Transfer-Encoding", "chunked")]
    body = b"8000\r\n" + b"x" * 0x8000 + b"\r\n"
    assert intercept().ask("POST", "/token", chunked, body * 3).status == 413  # and more would come
    assert len(elsewhere.tokens) == 1


def test_a_token_that_is_refused(intercept: Any, elsewhere: Any) -> None:
    elsewhere.realms = {("quay.io", "/token"): QUAY}
    elsewhere.error = UpstreamRefused(401, b'{"details":"incorrect username or password"}', [("content-type", "a/b")])
    answer = intercept().ask("GET", "/token")
    assert (answer.status, answer.body) == (401, elsewhere.error.content)
    elsewhere.error = UpstreamTimeout("auth.docker.io: timed out")
    answer = intercept().ask("GET", "/token")
    assert (answer.status, code(answer)) == (504, "UNAVAILABLE")


# interception: pushing


@pytest.mark.parametrize(("method", "target"), WRITES)
def test_pushing_is_switched_off(intercept: Any, elsewhere: Any, method: str, target: str) -> None:
    visitor = intercept()
    answer = visitor.ask(method, target)
    assert (answer.status, code(answer)) == (405, "UNSUPPORTED")
    assert "ALLOW_PUSH" in answer.body.decode()
    assert elsewhere.forwarded == []


@pytest.mark.parametrize("framing", ["length", "chunked", "expect"])
def test_the_answer_comes_before_the_body(intercept: Any, elsewhere: Any, framing: str) -> None:
    visitor = intercept()
    fields = {
        "length": [("Content-Length", "10000000000")],
        "chunked": [("Transfer-Encoding", "chunked")],
        "expect": [("Content-Length", "10000000000"), ("Expect", "100-continue")],
    }[framing]
    answer = visitor.ask("PATCH", "/v2/a/b/blobs/uploads/session", fields)
    assert (answer.status, answer.whole, answer.headers["Connection"]) == (405, True, "close")
    assert b"100 Continue" not in visitor.received
    visitor.send(b"fffff\r\n" + b"x" * 0xFFFFF)  # it may go on for a while, and is still no next request
    assert visitor.received.count(b"HTTP/1.1 ") == 1
    visitor.run(60)
    assert visitor.transport.closed


@pytest.mark.parametrize(("method", "target"), WRITES)
def test_pushing_is_passed_on(intercept: Any, elsewhere: Any, answered: Any, method: str, target: str) -> None:
    elsewhere.answer = answered(202, [("location", "/v2/a/b/blobs/uploads/2?_state=x"), ("range", "0-9")])
    body = None if method in ("DELETE", "PROPFIND") else b"some bytes"
    answer = intercept(allow_push=True).ask(method, target, [("Content-Type", "application/octet-stream")], body)
    assert (answer.status, answer.headers["Range"], answer.body) == (202, "0-9", b"")
    assert answer.headers["Location"] == "/v2/a/b/blobs/uploads/2?_state=x"
    passed = elsewhere.forwarded[0]
    assert (passed.method, passed.path, passed.body) == (method, target, body)
    assert passed.headers.get("content-type") == "application/octet-stream"
    assert passed.name == ("a/b" if target.startswith("/v2/a/b/") and "reference" not in target else None)


def test_a_push_streams(intercept: Any, elsewhere: Any) -> None:
    visitor = intercept(allow_push=True)
    visitor.request("PATCH", "/v2/a/b/blobs/uploads/session", [("Content-Length", "30")])
    visitor.send(b"0123456789")
    assert b"".join(elsewhere.pieces) == b"0123456789"  # upstream has it before there is more
    visitor.send(b"0123456789")
    assert b"".join(elsewhere.pieces) == b"0123456789" * 2
    assert visitor.received == b""
    visitor.send(b"0123456789")
    assert visitor.answer().status == 200


def test_a_push_that_is_malformed_on_its_way(intercept: Any, elsewhere: Any) -> None:
    visitor = intercept(allow_push=True)
    visitor.request("PATCH", "/v2/a/b/blobs/uploads/session", [("Transfer-Encoding", "chunked")])
    visitor.send(b"5\r\nhello\r\nnot a chunk\r\n")
    answer = visitor.answer()
    assert (answer.status, answer.whole) == (400, True)
    assert elsewhere.forwarded == []


# the mirror


@pytest.mark.parametrize(
    ("query", "registry"),
    [
        ("", HUB),
        ("?ns=docker.io", HUB),
        ("?ns=DOCKER.io", HUB),
        ("?ns=registry-1.docker.io", HUB),
        ("?ns=quay.io", QUAY),
        ("?ns=Quay.IO", QUAY),
        ("?ns=quay.io.", QUAY),
        ("?ns=quay.io:443", QUAY),
        ("?ns=quay%2Eio", QUAY),
        ("?n=5&ns=quay.io&x=y", QUAY),
        ("?ns=quay.io&ns=quay.io", QUAY),
        ("?ns=registry.example:5000", PORTED),
        ("?ns=registry.example%3A5000", PORTED),
        ("?ns=plain.example:8080", PLAIN),
    ],
)
def test_ns_names_a_registry(mirror: Any, elsewhere: Any, text: Any, query: str, registry: Registry) -> None:
    digest = elsewhere.put(text(b"layer"))
    visitor = mirror()
    answer = visitor.ask("GET", f"/v2/a/b/blobs/{digest}{query}")
    assert (answer.status, answer.body) == (200, b"layer")
    assert elsewhere.opened == [(registry, None)]
    assert visitor.logged[0].host == str(registry)


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("?ns=evil.example", 404),
        ("?ns=quay.io:444", 404),
        ("?ns=registry.example", 404),
        ("?ns=169.254.169.254", 404),
        ("?ns=", 400),
        ("?ns=http://quay.io", 400),
        ("?ns=quay.io/x", 400),
        ("?ns=user@quay.io", 400),
        ("?ns=quay.io&ns=docker.io", 400),
        ("?ns=quay.io&n%73=docker.io", 400),
        ("?ns=%zz", 400),
    ],
)
def test_ns_is_looked_up_and_never_dialled(mirror: Any, elsewhere: Any, query: str, status: int) -> None:
    for path in (f"/v2/a/b/blobs/{DIGEST}", "/v2/", "/v2/a/b/tags/list"):
        answer = mirror().ask("GET", path + query)
        assert answer.status == status
        assert json.loads(answer.body)["errors"][0]["message"]
        assert elsewhere.opened == []
    if status == 404:
        assert "REGISTRIES" in answer.body.decode()


def test_what_a_mirrors_client_shows_goes_nowhere(mirror: Any, elsewhere: Any, text: Any) -> None:
    digest = elsewhere.put(text(b"layer"))
    shown = [("Authorization", "Basic secret"), ("Cookie", "session=1"), ("Proxy-Authorization", "Basic secret")]
    visitor = mirror()
    visitor.ask("GET", f"/v2/a/b/blobs/{digest}?ns=quay.io", shown)
    visitor.ask("GET", "/v2/a/b/tags/list?ns=quay.io", shown)
    visitor.ask("GET", "/v2/_catalog", shown)
    assert elsewhere.opened == [(QUAY, None), (QUAY, None), (HUB, None)]
    for passed in elsewhere.forwarded:
        assert [name for name, _ in passed.headers] == []


def test_a_mirror_asks_for_no_login(mirror: Any, elsewhere: Any, answered: Any) -> None:
    challenge = ("www-authenticate", 'Bearer realm="https://theirs"')
    for error in (UpstreamRefused(401, b"no", [challenge]), Unauthorized("no", headers=[challenge])):
        elsewhere.error = elsewhere.referred = error
        elsewhere.answer = answered(401, [challenge], b"no")
        for path in ("blobs/" + str(DIGEST), "manifests/latest", "tags/list", "referrers/" + str(DIGEST)):
            answer = mirror().ask("GET", f"/v2/a/b/{path}?ns=quay.io")
            assert (answer.status, answer.fields("WWW-Authenticate")) == (401, []), path


def test_an_error_for_a_mirrors_client_is_another_clients_too(mirror: Any, intercept: Any, elsewhere: Any) -> None:
    """Clients that wait for the same are answered with one and the same error."""
    elsewhere.error = UpstreamRefused(401, b"no", [("www-authenticate", "Bearer theirs")])
    path = f"/v2/a/b/blobs/{DIGEST}"
    assert mirror().ask("GET", path).status == 401
    answer = intercept().ask("GET", path)
    assert answer.fields("WWW-Authenticate") == ['Bearer theirs,realm="https://ours/token"']


@pytest.mark.parametrize("path", ["/v2/", "/v2", "/v2/?ns=quay.io"])
def test_the_mirrors_ping(mirror: Any, elsewhere: Any, path: str) -> None:
    for method in ("GET", "HEAD"):
        answer = mirror().ask(method, path)
        assert (answer.status, answer.headers["Docker-Distribution-Api-Version"]) == (200, "registry/2.0")
    assert elsewhere.opened == []


def test_heads_at_a_mirror(mirror: Any, elsewhere: Any, text: Any) -> None:
    digest = elsewhere.put(text(b"layer"))
    elsewhere.manifests["latest"] = ManifestAnswer(DIGEST, OCI_INDEX, 2, None, "HIT")
    answer = mirror().ask("HEAD", f"/v2/a/b/blobs/{digest}?ns=quay.io")
    assert (answer.status, answer.headers["Content-Length"]) == (200, "5")
    answer = mirror().ask("HEAD", "/v2/a/b/manifests/latest?ns=quay.io")
    assert (answer.status, answer.headers["Docker-Content-Digest"]) == (200, str(DIGEST))


@pytest.mark.parametrize(
    ("asked", "passed"),
    [
        ("/v2/a/b/tags/list?ns=quay.io", "/v2/a/b/tags/list"),
        ("/v2/a/b/tags/list?n=10&ns=quay.io&last=a%2Fb", "/v2/a/b/tags/list?n=10&last=a%2Fb"),
        ("/v2/_catalog?ns=quay.io&n=1", "/v2/_catalog?n=1"),
        ("/v2/_catalog", "/v2/_catalog"),
    ],
)
def test_lists_through_a_mirror(mirror: Any, elsewhere: Any, asked: str, passed: str) -> None:
    answer = mirror().ask("GET", asked)
    assert (answer.status, answer.body) == (200, b"from upstream")
    assert elsewhere.forwarded[0].path == passed


@pytest.mark.parametrize(
    ("query", "link", "told"),
    [
        ("?ns=quay.io", '</v2/a/tags/list?last=x>; rel="next"', '</v2/a/tags/list?last=x&ns=quay.io>; rel="next"'),
        ("?ns=registry.example:5000", "</v2/a>; rel=next", "</v2/a?ns=registry.example%3A5000>; rel=next"),
        ("", '</v2/a/tags/list?last=x>; rel="next"', '</v2/a/tags/list?last=x>; rel="next"'),
        ("?ns=quay.io", "<https://quay.io/v2/a?last=x>; rel=next", "<https://quay.io/v2/a?last=x>; rel=next"),
    ],
)
def test_the_next_page_is_of_the_same_registry(
    mirror: Any, elsewhere: Any, answered: Any, query: str, link: str, told: str
) -> None:
    elsewhere.answer = answered(200, [("link", link)], b"{}")
    answer = mirror().ask("GET", "/v2/a/b/tags/list" + query)
    assert answer.fields("Link") == [told]


def test_referrers_through_a_mirror(mirror: Any, elsewhere: Any) -> None:
    elsewhere.referred = Page(EMPTY_INDEX, False)
    assert mirror().ask("GET", f"/v2/a/b/referrers/{DIGEST}?artifactType=x&ns=quay.io").status == 200
    assert elsewhere.asked == [("a/b", DIGEST, "artifactType=x", "x")]


@pytest.mark.parametrize(("method", "target"), [write for write in WRITES if "unknown" not in write[1]])
@pytest.mark.parametrize("namespace", ["", "ns=quay.io"])
def test_nothing_is_pushed_to_a_mirror(mirror: Any, elsewhere: Any, method: str, target: str, namespace: str) -> None:
    if "reference" in target:
        return
    visitor = mirror()
    answer = visitor.ask(method, target + ("&" if "?" in target else "?") + namespace, [("Content-Length", "1000000")])
    assert (answer.status, code(answer), answer.headers["Allow"]) == (405, "UNSUPPORTED", "GET, HEAD")
    assert "ALLOW_PUSH" not in answer.body.decode()  # which would not help
    assert elsewhere.forwarded == elsewhere.opened == []


@pytest.mark.parametrize("path", ["/v2/some/thing/unknown", "/v1/_ping", "/v2x/"])
def test_a_mirror_has_nothing_but_the_api(mirror: Any, elsewhere: Any, path: str) -> None:
    for method in ("GET", "POST"):
        answer = mirror().ask(method, path + "?ns=quay.io")
        assert (answer.status, code(answer)) == (404, "NAME_UNKNOWN")
    assert elsewhere.forwarded == []
