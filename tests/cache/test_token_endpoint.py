from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import count
from typing import Any
from urllib.parse import urlencode

import pytest

from dockerproxy.cache.challenges import Realm
from dockerproxy.cache.identity import PUBLIC_TOKEN, TOKEN_LIFETIME
from dockerproxy.cache.token_endpoint import TokenRequest
from dockerproxy.errors import (
    BadRequest,
    DestinationForbidden,
    RegistryError,
    UpstreamBroken,
    UpstreamRefused,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from dockerproxy.oci.credentials import BasicCredentials
from dockerproxy.oci.names import Registry, parse_repository
from dockerproxy.upstream.credentials import ClientCredential
from tests.cache.support.harness import EPOCH, HUB, CacheHarness, result
from tests.cache.support.upstream import Gate, ScriptedResponse, raise_error, respond_with

REALM = Realm(Registry.parse("auth.docker.io"), "/token")
SCOPE = "repository:library/app:pull"
QUERY = f"service=registry.docker.io&scope={SCOPE}"
ALICE = BasicCredentials("alice", "pw:with:colons").authorization
TOKEN = b'{"token":"upstreams","expires_in":300}'
DAY = 86400

FAILURES = [
    raise_error(UpstreamUnreachable("gone")),
    raise_error(UpstreamTimeout("silent")),
    respond_with(500),
    respond_with(503),
    respond_with(429),
    lambda request, data: ScriptedResponse(200, b"no JSON"),
    lambda request, data: ScriptedResponse(200, b"{}"),
]


def respond_with_token(content: bytes = TOKEN) -> Any:
    return lambda request, data: ScriptedResponse(200, content)


def ask(
    harness: CacheHarness, authorization: str | None = None, form: bytes | None = None, realm: Realm = REALM,
    query: str = QUERY, registry: Registry = HUB,
) -> bytes:  # fmt: skip
    return harness.run(harness.token_endpoint.token(registry, realm, TokenRequest(query, authorization, form)))  # type: ignore[no-any-return]


def identity_of(harness: CacheHarness, token: str, name: str = "library/app") -> str:
    """Return the identity of a client that shows `token` for the repository `name`."""
    return harness.identities.for_credential(HUB, parse_repository(name), ClientCredential(f"Bearer {token}"))


def alice(harness: CacheHarness) -> str:
    return harness.identities.for_authorization(str(REALM), ALICE)


def local_identity(harness: CacheHarness, content: bytes) -> str | None:
    """Return the identity in a local token; None for a token from upstream."""
    token = json.loads(content)["token"]
    local_token = harness.identities.read_token(f"Bearer {token}")
    return None if local_token is None else local_token.identity


def encode_form(**fields: str) -> bytes:
    return urlencode(fields).encode()


def script_realm(harness: CacheHarness, responder: Any) -> None:
    harness.upstream.reset()
    for method in ("GET", "POST"):
        harness.upstream.on(method, "^/token", responder)


ANONYMOUS_FORMS = [None, b"", encode_form(grant_type="password", service="x"), b"\xff\xfe=&&&"]


def read_times(content: bytes) -> tuple[float, float]:
    """Return the lifetime of the token, and the time that it counts from."""
    response = json.loads(content)
    return response["expires_in"], datetime.fromisoformat(response["issued_at"]).timestamp()


@pytest.mark.parametrize("body", ANONYMOUS_FORMS)
def test_anonymous_client_gets_upstreams_token(harness: CacheHarness, body: bytes | None) -> None:
    """It is good without this proxy, too, and says here that its client has no login."""
    script_realm(harness, respond_with_token(b'{"access_token":"a","token":"t","expires_in":300}'))
    content = ask(harness, None, body)
    response = json.loads(content)
    assert (response["token"], response["access_token"]) == ("t", "a")
    assert read_times(content) == (300, EPOCH)
    [request] = harness.upstream.requests
    assert (request.method, request.path) == ("GET" if body is None else "POST", f"/token?{QUERY}")
    assert request.headers.get("authorization") is None
    for token in ("t", "a"):
        assert harness.identities.read_token(f"Bearer {token}") == PUBLIC_TOKEN
    harness.reactor.advance(300)
    assert harness.identities.read_token("Bearer t") is None


def test_a_client_does_not_choose_the_token_of_others(harness: CacheHarness) -> None:
    """Servers take the first or the last of several parameters, and those of the query or of the form."""
    numbers = count()
    script_realm(
        harness, lambda request, data: ScriptedResponse(200, b'{"token":"%d","expires_in":3600}' % next(numbers))
    )
    requests = [
        ("service=x&service=y", None), ("service=y&service=x", None), ("service=x", None), ("service=x", b""),
        ("service=x", b"service=y"), ("service=x&service=y", b""), ("", b"service=x&service=y"),
        ("service=x", b"service="), ("service=x&service=", None), ("service=x&service=y&service=x", None),
    ]  # fmt: skip
    for _ in range(2):
        tokens = [json.loads(ask(harness, None, form, query=query))["token"] for query, form in requests]
        assert tokens == [str(number) for number in range(len(requests))]
    assert json.loads(ask(harness, query="account=me&service=x"))["token"] == "2"


def test_a_token_is_handed_out_for_a_few_minutes(harness: CacheHarness) -> None:
    """It may have ended early, because the realm has lost its key. Its clients get a new one soon."""
    script_realm(harness, respond_with_token(b'{"token":"old","expires_in":86400}'))
    assert json.loads(ask(harness))["token"] == "old"
    script_realm(harness, respond_with_token(b'{"token":"new","expires_in":86400}'))
    harness.reactor.advance(299)
    assert json.loads(ask(harness))["token"] == "old"
    harness.reactor.advance(2)
    assert json.loads(ask(harness))["token"] == "new"


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("body", ANONYMOUS_FORMS)
def test_anonymous_client_gets_local_token_during_outage(
    harness: CacheHarness, body: bytes | None, failure: Any
) -> None:
    script_realm(harness, failure)
    content = ask(harness, None, body)
    assert local_identity(harness, content) == "public"
    response = json.loads(content)
    assert response["token"] == response["access_token"]
    assert read_times(content) == (TOKEN_LIFETIME, EPOCH)
    script_realm(harness, respond_with_token())
    assert json.loads(ask(harness, None, body))["token"] == "upstreams"


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_realm_without_anonymous_tokens(harness: CacheHarness, status: int) -> None:
    """Its refusal is the client's answer, unless a login of ours serves the client."""
    script_realm(harness, respond_with(status))
    with pytest.raises(UpstreamRefused) as excinfo:
        ask(harness)
    assert excinfo.value.status == status
    request = TokenRequest(QUERY, None)
    content = harness.run(harness.token_endpoint.token(HUB, REALM, request, serves_all=True))
    assert local_identity(harness, content) == "public"


ELSEWHERE = [f"{QUERY}&password=x", f"{QUERY}&Access_Token=x", f"{QUERY};password=x", f"{QUERY}&client_secret="]


@pytest.mark.parametrize("query", ELSEWHERE)
def test_a_login_beside_a_credential_elsewhere_is_not_confirmed(harness: CacheHarness, query: str) -> None:
    """The realm may have taken the other one, and the login may be guessed."""
    script_realm(harness, respond_with_token())
    assert ask(harness, ALICE, query=query) == TOKEN
    assert not harness.identities.is_bound("Bearer upstreams")
    assert harness.records.get("client", str(REALM.server), alice(harness)) is None


@pytest.mark.parametrize("query", ELSEWHERE)
def test_a_credential_elsewhere_is_the_realms_business(harness: CacheHarness, query: str) -> None:
    """Its token may be more than nobody's, so it is neither bound nor handed out to others."""
    script_realm(harness, respond_with_token())
    for number in (1, 2):
        assert ask(harness, query=query) == TOKEN
        assert len(harness.upstream.requests) == number
    assert harness.identities.read_token("Bearer upstreams") is None


def test_one_request_for_a_fleet(harness: CacheHarness) -> None:
    gate = Gate()
    script_realm(harness, gate.delay(respond_with_token()))
    queries = [
        QUERY, f"scope={SCOPE}&service=registry.docker.io", f"{QUERY}&client_id=docker&account=a&offline_token=true",
        f"{QUERY}&scope={SCOPE}", f"service=registry.docker.io&scope={SCOPE.replace(':', '%3A')}",
    ]  # fmt: skip
    endpoint = harness.token_endpoint
    pending = [harness.start(endpoint.token(HUB, REALM, TokenRequest(query, None))) for query in queries]
    leaving = harness.start(endpoint.token(HUB, REALM, TokenRequest(QUERY, None)))
    leaving.addErrback(lambda _: None)
    leaving.cancel()
    gate.open()
    harness.reactor.run_due_calls()
    assert {json.loads(result(one, harness.reactor))["token"] for one in pending} == {"upstreams"}
    assert len(harness.upstream.requests) == 1
    others = [f"{QUERY}x", f"{QUERY}&service=other", "", "service=registry.docker.io", f"{QUERY}&tenant=blue"]
    for number, query in enumerate(others, 2):
        ask(harness, query=query)
        assert len(harness.upstream.requests) == number
    ask(harness, realm=Realm(REALM.server, REALM.path, "tenant=blue"))
    assert len(harness.upstream.requests) == number + 1


@pytest.mark.parametrize(
    ("lifetime", "handed_out"), [(300, 150), (3600, 300), (130, 65), (100, 40), (61, 1), (60, 0), (20, None)]
)
def test_a_token_that_is_handed_out_has_enough_life(
    harness: CacheHarness, lifetime: int, handed_out: float | None
) -> None:
    """At least half of it, and a minute if it ever had one."""
    script_realm(harness, respond_with_token(b'{"token":"t","expires_in":%d}' % lifetime))
    ask(harness)
    if handed_out is not None:
        harness.reactor.advance(handed_out)
        assert read_times(ask(harness)) == (lifetime - handed_out, EPOCH + handed_out)
        assert len(harness.upstream.requests) == 1
    harness.reactor.advance(1)
    assert read_times(ask(harness))[0] == lifetime
    assert len(harness.upstream.requests) == 2


def test_a_token_whose_life_began_earlier(harness: CacheHarness) -> None:
    issued_at = datetime.fromtimestamp(EPOCH - 200, UTC).isoformat()
    script_realm(harness, respond_with_token(b'{"token":"t","expires_in":300,"issued_at":"%b"}' % issued_at.encode()))
    assert read_times(ask(harness)) == (100, EPOCH)


def test_login_is_forwarded(harness: CacheHarness) -> None:
    script_realm(harness, respond_with_token())
    assert ask(harness, ALICE) == TOKEN
    [request] = harness.upstream.requests
    assert (request.method, request.registry, request.path) == ("GET", REALM.server, f"/token?{QUERY}")
    assert request.headers.all("authorization") == [ALICE]
    assert identity_of(harness, "upstreams") == alice(harness)


@pytest.mark.parametrize("name", ["token", "access_token"])
def test_token_or_access_token(harness: CacheHarness, name: str) -> None:
    script_realm(harness, respond_with_token(json.dumps({name: "t"}).encode()))
    ask(harness, ALICE)
    assert identity_of(harness, "t") == alice(harness)


def test_form_post(harness: CacheHarness) -> None:
    script_realm(harness, respond_with_token())
    body = encode_form(grant_type="password", username="alice", password="pw:with:colons", scope=SCOPE)
    assert ask(harness, None, body) == TOKEN
    [request] = harness.upstream.requests
    assert (request.method, request.headers.get("content-type")) == ("POST", "application/x-www-form-urlencoded")
    assert harness.agent.bodies == [body]
    assert request.headers.get("authorization") is None
    # The identity is the same as for GET with the same login.
    assert identity_of(harness, "upstreams") == alice(harness)


def test_refresh_token(harness: CacheHarness) -> None:
    script_realm(harness, respond_with_token())
    assert ask(harness, None, encode_form(grant_type="refresh_token", refresh_token="r")) == TOKEN
    assert len(harness.upstream.requests) == 1


@pytest.mark.parametrize("body", [b"&".join(b"x=1" for _ in range(60)), encode_form(username="a:b", password="c")])
def test_invalid_form(harness: CacheHarness, body: bytes) -> None:
    with pytest.raises(BadRequest):
        ask(harness, None, body)
    assert harness.upstream.requests == []


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("body", [None, encode_form(username="alice", password="pw:with:colons")])
@pytest.mark.parametrize("restart", [False, True])
def test_known_client_gets_local_token_during_outage(
    make_harness: Callable[..., CacheHarness], failure: Any, body: bytes | None, restart: bool
) -> None:
    harness = make_harness()
    script_realm(harness, respond_with_token())
    ask(harness, ALICE)
    script_realm(harness, failure)
    harness.reactor.advance(DAY - 1)
    if restart:
        harness = make_harness(upstream=harness.upstream)
    authorization = ALICE if body is None else None
    assert local_identity(harness, ask(harness, authorization, body)) == alice(harness)
    harness.reactor.advance(1)
    with pytest.raises(RegistryError):
        ask(harness, authorization, body)


@pytest.mark.parametrize("failure", FAILURES)
def test_unknown_client_gets_error_during_outage(harness: CacheHarness, failure: Any) -> None:
    script_realm(harness, respond_with_token())
    ask(harness, ALICE)
    script_realm(harness, failure)
    for authorization in (BasicCredentials("alice", "guess").authorization, "Basic", "Bearer x", ""):
        with pytest.raises(RegistryError) as excinfo:
            ask(harness, authorization)
        assert excinfo.value.status in (429, 502, 504)
    assert local_identity(harness, ask(harness)) == "public"


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_denial_is_passed_through(harness: CacheHarness, status: int) -> None:
    script_realm(harness, respond_with(status))
    with pytest.raises(UpstreamRefused) as excinfo:
        ask(harness, ALICE)
    assert excinfo.value.status == status and b"UPSTREAM" in excinfo.value.content


@pytest.mark.parametrize("status", [401, 403])
def test_denied_client_is_forgotten(harness: CacheHarness, status: int) -> None:
    script_realm(harness, respond_with_token())
    ask(harness, ALICE)
    script_realm(harness, respond_with(status))
    with pytest.raises(UpstreamRefused):
        ask(harness, ALICE)
    script_realm(harness, raise_error(UpstreamUnreachable("gone")))
    with pytest.raises(UpstreamUnreachable):
        ask(harness, ALICE)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b'"token"',
        b"{}",
        b'{"token":1}',
        b'{"token":""}',
        b"\xff",
        b"[" * 60_000,
        b'{"token":"\\ud800"}',
        b'{"token":"a\\r\\nX-Y: z"}',
        b'{"token":"' + b"x" * 20_000 + b'"}',
    ],
    ids=range(12),
)
def test_invalid_token_response(harness: CacheHarness, content: bytes) -> None:
    script_realm(harness, respond_with_token(content))
    with pytest.raises(UpstreamBroken):
        ask(harness, ALICE)
    script_realm(harness, raise_error(UpstreamUnreachable("gone")))
    with pytest.raises(UpstreamUnreachable):  # because the response did not authenticate the client
        ask(harness, ALICE)


@pytest.mark.parametrize("lifetime", ["1" * 400, "-" + "1" * 400, "1e999", '"x"', "[]", "null"])
def test_odd_lifetime(harness: CacheHarness, lifetime: str) -> None:
    script_realm(harness, respond_with_token(b'{"token":"t","expires_in":%b}' % lifetime.encode()))
    ask(harness, ALICE)
    harness.reactor.advance(59)
    assert identity_of(harness, "t") == alice(harness)


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("service=x", []),
        ("scope=repository:a:pull&scope=repository:b:pull,push", ["a", "b"]),
        ("scope=repository:a:pull%20repository:b:pull", ["a", "b"]),
        ("scope=repository%3Aa%3Apull+repository:b:*", ["a", "b"]),
        ("scope=repository:a:push&scope=registry:catalog:*", []),
    ],
)
@pytest.mark.parametrize("granted", [None, "repository:b:pull", ""])
@pytest.mark.parametrize("posted", [False, True])
def test_token_counts_for_the_scopes_that_were_asked_for_and_granted(
    harness: CacheHarness, query: str, names: list[str], granted: str | None, posted: bool
) -> None:
    document = {"access_token": "t", "expires_in": 5} | ({} if granted is None else {"scope": granted})
    script_realm(harness, respond_with_token(json.dumps(document).encode()))
    form = f"grant_type=password&username=alice&password=pw%3Awith%3Acolons&{query}".encode()
    ask(harness, None, form) if posted else ask(harness, ALICE, query=query)
    counts = [name for name in ("a", "b", "c") if identity_of(harness, "t", name) == alice(harness)]
    assert counts == [name for name in names if granted is None or name in granted]
    harness.reactor.advance(5)
    assert not [name for name in ("a", "b", "c") if identity_of(harness, "t", name) == alice(harness)]


LOGINS = [
    (ALICE, None),
    ("Bearer x", None),
    (None, encode_form(username="alice", password="pw", grant_type="password")),
    (None, encode_form(grant_type="refresh_token", refresh_token="r")),
]


@pytest.mark.parametrize(("authorization", "form"), LOGINS, ids=range(4))
def test_login_never_leaves_tls(harness: CacheHarness, authorization: str | None, form: bytes | None) -> None:
    """A registry with TLS may name a token server without it. Our own login does not go there either."""
    script_realm(harness, respond_with_token())
    other_port = Realm(Registry.parse("http://auth.docker.io:81"), "/token")
    with pytest.raises(UpstreamBroken, match="plain HTTP"):
        ask(harness, authorization, form, realm=other_port)
    assert harness.upstream.requests == []
    plain = Realm(Registry.parse("http://auth.docker.io:80"), "/token")
    assert ask(harness, authorization, form, realm=plain) == TOKEN  # the same host has TLS
    [request] = harness.upstream.requests
    assert str(request.registry) == "auth.docker.io"
    harness.reactor.advance(DAY)  # so that no earlier login counts
    script_realm(harness, raise_error(UpstreamUnreachable("no such port")))
    with pytest.raises(UpstreamBroken, match="plain HTTP"):
        ask(harness, authorization, form, realm=plain)
    script_realm(harness, respond_with_token())
    harness.upstream.clear_requests()
    assert json.loads(ask(harness, None, realm=plain))["token"] == "upstreams"
    ask(harness, authorization, form, realm=plain, registry=Registry.parse("http://plain.example"))
    assert len(harness.upstream.requests) == 2


def test_local_token_counts_for_the_scopes_that_were_asked_for(harness: CacheHarness) -> None:
    script_realm(harness, respond_with_token())
    ask(harness, ALICE)
    script_realm(harness, raise_error(UpstreamUnreachable("gone")))
    content = ask(
        harness, ALICE, query="scope=repository:a:pull&scope=repository:b/c:pull,push&scope=repository:d:push"
    )
    token = harness.identities.read_token(f"Bearer {json.loads(content)['token']}")
    assert token is not None
    identities = [token.identity_at(parse_repository(name)) for name in ("a", "b/c", "d", "b")]
    assert identities == [alice(harness)] * 2 + ["public"] * 2


def test_a_login_at_one_realm_is_none_at_another(harness: CacheHarness) -> None:
    script_realm(harness, respond_with_token())
    ask(harness, ALICE, realm=Realm(Registry.parse("other.example:5000"), "/token"))
    script_realm(harness, raise_error(UpstreamUnreachable("gone")))
    with pytest.raises(UpstreamUnreachable):
        ask(harness, ALICE)


def test_token_response_too_large(harness: CacheHarness) -> None:
    script_realm(harness, respond_with_token(b" " * 65_536 + TOKEN))
    with pytest.raises(UpstreamBroken):
        ask(harness, ALICE)


def test_client_record_is_saved_at_intervals(harness: CacheHarness, tmp_path: Any) -> None:
    script_realm(harness, respond_with_token())
    ask(harness, ALICE)
    [path] = (tmp_path / "records" / "client").rglob("*~.json")
    inode = path.stat().st_ino
    assert "alice" not in str(path) and "pw" not in path.read_text()
    harness.reactor.advance(299)
    ask(harness, ALICE)
    assert path.stat().st_ino == inode
    harness.reactor.advance(10)
    ask(harness, ALICE)
    assert path.stat().st_ino != inode


def test_unwritable_records(harness: CacheHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **more: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("dockerproxy.store.files.Staging.write", fail)
    script_realm(harness, respond_with_token())
    assert ask(harness, ALICE) == TOKEN


def redirect(status: int, location: str) -> Any:
    return lambda request, data: ScriptedResponse(status, b"", {"location": location})


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("posted", [False, True])
@pytest.mark.parametrize("location", ["/token/", "https://auth.docker.io/token/x", "https://other.example/token/"])
def test_token_server_redirects(harness: CacheHarness, status: int, posted: bool, location: str) -> None:
    """The login goes along within the host. A token that is got without it counts as nobody's in particular."""
    harness.upstream.on("GET", "^/token/", respond_with_token())
    harness.upstream.on("POST", "^/token/", respond_with_token())
    for method in ("GET", "POST"):
        harness.upstream.on(method, r"^/token\?", redirect(status, location))
    form = encode_form(grant_type="password", username="alice", password="pw:with:colons", scope=SCOPE)
    is_shown = "other" not in location and (not posted or status in (307, 308))
    if posted and "other" in location and status in (307, 308):
        with pytest.raises(UpstreamBroken):
            ask(harness, None, form)
        return
    assert ask(harness, None, form) == TOKEN if posted else ask(harness, ALICE) == TOKEN
    last = harness.upstream.requests[-1]
    if not posted:
        assert last.headers.get("authorization") == (ALICE if is_shown else None)
    assert len(harness.agent.bodies) == (0 if not posted else 2 if is_shown else 1)
    assert (identity_of(harness, "upstreams") == alice(harness)) is is_shown
    client_record = harness.records.get("client", str(REALM.server), alice(harness))
    assert (client_record is not None) is is_shown


@pytest.mark.parametrize("location", ["/token/", "https://other.example/token/"])
def test_token_server_redirects_clients_without_a_login(harness: CacheHarness, location: str) -> None:
    harness.upstream.on("GET", "^/token/", respond_with_token())
    harness.upstream.on("GET", r"^/token\?", redirect(302, location))
    assert json.loads(ask(harness))["token"] == "upstreams"
    assert harness.identities.read_token("Bearer upstreams") == PUBLIC_TOKEN
    assert harness.agent.address_checks == [None, None]


def test_realm_address_is_checked(make_harness: Callable[..., CacheHarness]) -> None:
    """Upstream chooses the realm, so it could direct requests to this machine.

    Hosts in the settings are not checked, because the administrator chose them.
    """

    def check_address(address: Any) -> None:
        raise DestinationForbidden("127.0.0.1 is not a public address")

    harness = make_harness(address_check=check_address)

    def respond(request: Any, data: Any) -> ScriptedResponse:
        check = harness.agent.address_checks[-1]
        if check is not None:
            check("127.0.0.1")
        return ScriptedResponse(200, TOKEN)

    script_realm(harness, respond)
    assert ask(harness, ALICE) == TOKEN  # auth.docker.io is intercepted
    elsewhere = Realm(Registry.parse("localhost:8080"), "/token")
    with pytest.raises(DestinationForbidden):
        ask(harness, ALICE, realm=elsewhere)
    assert harness.agent.address_checks == [None, check_address]


def test_repr_hides_secrets() -> None:
    text = repr(TokenRequest(QUERY, "Basic c2VjcmV0", b"password=secret"))
    assert "secret" not in text and "c2VjcmV0" not in text
