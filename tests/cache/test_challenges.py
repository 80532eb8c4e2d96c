from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred

from dockerproxy.cache.challenges import TOKEN_PATH, Realm
from dockerproxy.errors import (
    RegistryError,
    UpstreamFailing,
    UpstreamRefused,
    UpstreamUnreachable,
)
from dockerproxy.oci.challenge import Challenge
from dockerproxy.oci.names import Registry
from tests.cache.support.harness import HUB, OTHER, CacheHarness, result
from tests.cache.support.upstream import (
    Gate,
    ScriptedResponse,
    captive_portal,
    error_response,
    raise_error,
    replace_with,
    respond_with,
)

BEARER = 'Bearer realm="https://auth.other.example/token",service="other",scope="repository:a:pull,push"'
HOUR = 3600


def respond_with_challenge(*fields: str, status: int = 401, **more: str) -> Any:
    def respond(request: Any, data: Any) -> ScriptedResponse:
        response = ScriptedResponse(status, b"{}", {name.replace("_", "-"): value for name, value in more.items()})
        response.headers._fields += [("www-authenticate", field) for field in fields]
        return response

    return respond


def get_challenges(harness: CacheHarness, registry: Registry = OTHER) -> list[Challenge]:
    return harness.run(harness.challenges.get(registry))  # type: ignore[no-any-return]


def test_challenge_is_fetched_once_an_hour(harness: CacheHarness) -> None:
    harness.upstream.on("GET", "^/v2/$", respond_with_challenge(BEARER, 'Basic realm="x"'))
    for _ in range(3):
        assert [challenge.scheme for challenge in get_challenges(harness)] == ["bearer", "basic"]
    assert len(harness.upstream.requests) == 1
    assert [challenge.scheme for challenge in harness.learned_challenges[OTHER]] == ["bearer", "basic"]
    harness.reactor.advance(HOUR)
    harness.upstream.reset()
    assert get_challenges(harness) == []
    assert harness.learned_challenges[OTHER] == []


def test_concurrent_requests_share_one_fetch(harness: CacheHarness) -> None:
    gate = Gate()
    harness.upstream.on("GET", "^/v2/$", gate.delay(respond_with_challenge(BEARER)))
    deferreds = [harness.start(harness.challenges.get(OTHER)) for _ in range(5)]
    gate.open()
    harness.reactor.run_due_calls()
    assert all(deferred.called for deferred in deferreds)
    assert len(harness.upstream.requests) == 1


@pytest.mark.parametrize("failure", [respond_with(500), respond_with(429)])
def test_cached_challenge_is_used_during_outage(
    harness: CacheHarness, make_harness: Callable[..., CacheHarness], failure: Any
) -> None:
    harness.upstream.on("GET", "^/v2/$", respond_with_challenge(BEARER), times=1)
    get_challenges(harness)
    harness.upstream.on("GET", "^/v2/$", failure)
    harness.reactor.advance(1000 * HOUR)
    restarted = make_harness(upstream=harness.upstream)
    for cache in (harness, restarted):
        assert [challenge.parameters["service"] for challenge in get_challenges(cache)] == ["other"]
    restarted.challenges.restore([OTHER])
    assert [challenge.scheme for challenge in restarted.learned_challenges[OTHER]] == ["bearer"]


def test_absence_of_challenge_is_cached(harness: CacheHarness) -> None:
    assert get_challenges(harness) == []
    harness.upstream.go_down()
    harness.reactor.advance(HOUR)
    assert get_challenges(harness) == []


def test_registry_that_never_responded(harness: CacheHarness) -> None:
    harness.upstream.go_down()
    with pytest.raises(UpstreamUnreachable):
        get_challenges(harness)
    assert harness.challenges.cached(OTHER) == []
    assert harness.challenges.realm(OTHER) is None


def test_docker_hub_challenge_is_built_in(harness: CacheHarness) -> None:
    harness.upstream.go_down()
    [challenge] = get_challenges(harness, HUB)
    assert challenge.parameters == {"realm": "https://auth.docker.io/token", "service": "registry.docker.io"}
    realm = harness.challenges.realm(HUB)
    assert realm == Realm(Registry.parse("auth.docker.io"), "/token")
    assert len(harness.upstream.requests) == 1


@pytest.mark.parametrize("status", [200, 204, 301, 302, 307, 308])
def test_registry_without_authentication(harness: CacheHarness, status: int) -> None:
    """registry.k8s.io redirects requests for /v2/."""
    harness.upstream.on(
        "GET", "^/v2/$", respond_with_challenge(status=status, location="https://elsewhere.example/v2/")
    )
    assert get_challenges(harness) == []


def redirect_to_proper(harness: CacheHarness, status: int, location: str, *fields: str, final: int = 401) -> None:
    """Redirect `/v2/` of the registry to `location`. There are `fields` as the challenge."""

    def respond(request: Any, data: Any) -> ScriptedResponse:
        if request.registry == OTHER and request.path == "/v2/":
            return ScriptedResponse(status, b"", {"location": location})
        return respond_with_challenge(*fields, status=final)(request, data)  # type: ignore[no-any-return]

    harness.upstream.on("GET", "", respond)


PROPER = Registry.parse("proper.example")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_front_has_the_challenge_of_the_registry_proper(
    harness: CacheHarness, make_harness: Callable[..., CacheHarness], status: int
) -> None:
    """docker takes it too: lscr.io and cr.fluentbit.io are such fronts."""
    redirect_to_proper(harness, status, "https://proper.example/v2/", BEARER)
    assert [challenge.parameters["service"] for challenge in get_challenges(harness)] == ["other"]
    assert harness.ping_targets[OTHER] == PROPER
    harness.upstream.go_down()
    harness.reactor.advance(1000 * HOUR)
    restarted = make_harness(upstream=harness.upstream)
    assert len(get_challenges(restarted)) == 1
    restarted.challenges.restore([OTHER])
    assert restarted.ping_targets[OTHER] == PROPER
    harness.upstream.reset()
    assert get_challenges(harness) == [] and harness.ping_targets[OTHER] is None  # it is a front no more


@pytest.mark.parametrize(
    ("location", "fields", "final"),
    [
        ("https://proper.example/v2/", ('Basic realm="x"',), 401),
        ("https://proper.example/v2/", (), 401),
        ("https://proper.example/v2/", (), 200),
        ("https://proper.example/v2/", (), 503),
        ("http://proper.example/v2/", (BEARER,), 401),
        ("HTTP://proper.example/v2/", (BEARER,), 401),
        ("https://other.example:5000/v2/", (BEARER,), 401),  # a loop
        ("ftp://proper.example/", (BEARER,), 401),
        ("", (BEARER,), 401),
    ],
)
def test_front_without_a_challenge(harness: CacheHarness, location: str, fields: tuple[str, ...], final: int) -> None:
    """A request for content shows what it needs."""
    redirect_to_proper(harness, 302, location, *fields, final=final)
    assert get_challenges(harness) == []
    assert harness.ping_targets[OTHER] is None


@pytest.mark.parametrize("location", ["/v2", "https://other.example:5000/x"])
def test_redirect_within_a_registry(harness: CacheHarness, location: str) -> None:
    redirect_to_proper(harness, 302, location, BEARER)
    assert len(get_challenges(harness)) == 1
    assert harness.ping_targets[OTHER] is None


def test_damaged_target(harness: CacheHarness) -> None:
    for target in ("https://a b", 5, "", "ftp://x"):
        harness.records.put({"fields": [BEARER], "checked": harness.now(), "target": target}, "challenge", str(OTHER))
        harness.challenges.restore([OTHER])
        assert harness.ping_targets[OTHER] is None


@pytest.mark.parametrize(("status", "kind"), [(403, UpstreamRefused), (404, UpstreamRefused), (500, UpstreamFailing)])
def test_error_response_is_not_cached(harness: CacheHarness, status: int, kind: type[RegistryError]) -> None:
    harness.upstream.on("GET", "^/v2/$", respond_with(status))
    with pytest.raises(kind):
        get_challenges(harness)
    assert harness.records.get("challenge", str(OTHER)) is None


@pytest.mark.parametrize("media_type", ["text/html", "text/html; charset=utf-8", "Text/HTML"])
def test_html_page(harness: CacheHarness, media_type: str) -> None:
    """A static registry answers /v2/ with a page. So does a captive portal, so that it is asked again next time."""
    harness.upstream.on("GET", "^/v2/$", replace_with(b"<h1>Index</h1>", content_type=media_type), times=2)
    for _ in range(2):
        assert get_challenges(harness) == []
    harness.upstream.go_down()
    assert get_challenges(harness) == []
    harness.upstream.reset()
    harness.upstream.on("GET", "^/v2/$", respond_with_challenge(BEARER))
    assert len(get_challenges(harness)) == 1


@pytest.mark.parametrize(
    "wall",
    [
        captive_portal,
        lambda request, data: ScriptedResponse(302, b"", {"location": "https://login.example/"}),
        lambda request, data: ScriptedResponse(401, b"<html>", {"content-type": "text/html"}),
        lambda request, data: ScriptedResponse(403, b"<html>", {"content-type": "text/html"}),
        lambda request, data: ScriptedResponse(451),
    ],
    ids=["page", "redirect", "401 without a challenge", "403", "451"],
)
def test_a_wall_replaces_no_challenge(harness: CacheHarness, wall: Any) -> None:
    harness.upstream.on("GET", "^/v2/$", respond_with_challenge(BEARER), times=1)
    get_challenges(harness)
    harness.upstream.on("GET", "^/v2/$", wall)
    for _ in range(3):
        harness.reactor.advance(HOUR)
        assert [challenge.scheme for challenge in get_challenges(harness)] == ["bearer"]
    assert len(harness.upstream.requests_matching("GET", "^/v2/$")) == 4


def test_a_registry_that_has_become_open(harness: CacheHarness) -> None:
    harness.upstream.on("GET", "^/v2/$", respond_with_challenge(BEARER), times=1)
    get_challenges(harness)
    harness.reactor.advance(8 * 24 * HOUR)
    harness.upstream.on("GET", "^/v2/$", respond_with(307))
    assert get_challenges(harness) == []


def test_damaged_records_are_fetched_again(harness: CacheHarness) -> None:
    harness.upstream.on("GET", "^/v2/$", respond_with_challenge(BEARER))
    for record in ({}, {"fields": "x", "checked": 1}, {"fields": [], "checked": "now"}):
        harness.records.put(record, "challenge", str(OTHER))
        assert len(get_challenges(harness)) == 1


def test_unwritable_records(harness: CacheHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **more: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("dockerproxy.store.files.Staging.write", fail)
    harness.upstream.on("GET", "^/v2/$", respond_with_challenge(BEARER))
    assert len(get_challenges(harness)) == 1
    assert len(harness.learned_challenges[OTHER]) == 1


def test_ensure_known_fetches_once(harness: CacheHarness) -> None:
    for _ in range(2):
        harness.run(harness.challenges.ensure_known(OTHER))
        harness.run(harness.challenges.ensure_known(HUB))
    assert [request.registry for request in harness.upstream.requests] == [OTHER]


def test_ensure_known_retries_after_outage(harness: CacheHarness) -> None:
    harness.upstream.go_down()
    harness.run(harness.challenges.ensure_known(OTHER))  # no error, because the next request reports it
    harness.upstream.reset()
    harness.run(harness.challenges.ensure_known(OTHER))
    assert len(harness.upstream.requests) == 2


def test_challenge_from_another_process(make_harness: Callable[..., CacheHarness]) -> None:
    one = make_harness(shared=True)
    other = make_harness(shared=True, upstream=one.upstream)
    one.upstream.on("GET", "^/v2/$", respond_with_challenge(BEARER))
    one.run(one.challenges.ensure_known(OTHER))
    other.run(other.challenges.ensure_known(OTHER))
    assert other.learned_challenges[OTHER] == one.learned_challenges[OTHER] != []
    assert len(one.upstream.requests) == 1


def test_cancel_does_not_abort_fetch(harness: CacheHarness) -> None:
    gate = Gate()
    harness.upstream.on("GET", "^/v2/$", gate.delay(respond_with_challenge(BEARER)))
    leaving = Deferred.fromCoroutine(harness.challenges.get(OTHER))
    leaving.addErrback(lambda _: None)
    harness.reactor.run_due_calls()
    leaving.cancel()
    gate.open()
    assert len(harness.challenges.cached(OTHER)) == 1


# rendered challenges


def rendered_challenges(
    harness: CacheHarness, registry: Registry, *fields: str, secure: bool = True, local: bool = False
) -> list[str]:
    fields_with_names = harness.challenges.render_for(registry, fields, secure=secure, local=local)
    assert {name for name, _ in fields_with_names} <= {"WWW-Authenticate"}
    return [value for _, value in fields_with_names]


@pytest.mark.parametrize(
    ("registry", "secure", "realm"),
    [
        (OTHER, True, "https://other.example:5000" + TOKEN_PATH),
        (OTHER, False, "http://other.example:5000" + TOKEN_PATH),
        (HUB, True, "https://registry-1.docker.io" + TOKEN_PATH),
        (Registry.parse("http://plain.example"), False, "http://plain.example" + TOKEN_PATH),
        (Registry.parse("[::1]:5000"), True, "https://[::1]:5000" + TOKEN_PATH),
        (Registry.parse("[::1]"), True, "https://[::1]" + TOKEN_PATH),
        (Registry.parse("10.0.0.1:80"), False, "http://10.0.0.1" + TOKEN_PATH),
    ],
)
@pytest.mark.parametrize("query", ["", "?tenant=blue", "?service=x&scope=repository:y:pull"])
def test_foreign_realm_is_replaced_if_need_be(
    harness: CacheHarness, registry: Registry, secure: bool, realm: str, query: str
) -> None:
    """Otherwise it is upstream's own, because the program that fetches the token need not use the proxy."""
    challenge = BEARER.replace("/token", f"/token{query}")
    assert rendered_challenges(harness, registry, challenge, secure=secure) == [challenge]
    [field] = rendered_challenges(harness, registry, challenge, secure=secure, local=True)
    assert field == f'Bearer realm="{realm}{query}",service="other",scope="repository:a:pull,push"'


@pytest.mark.parametrize(
    ("registry", "realm", "kept"),
    [
        ("other.example", "https://auth.example/token", True),
        ("other.example", "https://auth.example:444/token", False),  # the proxy opens no tunnel to it
        ("other.example", "http://auth.example/token", False),  # a login would leave TLS
        ("http://other.example", "http://auth.example:443/token", True),
        (
            "other.example",
            "https://registry-1.docker.io/token",
            True,
        ),  # a page as any, because that does not confirm it
        ("other.example", "https://registry-1.docker.io:444/token", False),
    ],
)
def test_realm_that_clients_cannot_use_is_replaced(
    harness: CacheHarness, registry: str, realm: str, kept: bool
) -> None:
    [field] = rendered_challenges(harness, Registry.parse(registry), f'Bearer realm="{realm}"')
    assert (TOKEN_PATH not in field) is kept


def count_paths(harness: CacheHarness) -> dict[str, int]:
    return dict(Counter(f"{request.registry}{request.path}" for request in harness.upstream.requests))


@pytest.mark.parametrize("silent", ["nobody", "other.example:5000", "auth.other.example"])
@pytest.mark.parametrize(
    "failure", [respond_with(500), respond_with(429), raise_error(UpstreamUnreachable("gone"))], ids=range(3)
)
def test_whether_a_foreign_realm_can_be_asked(harness: CacheHarness, silent: str, failure: Any) -> None:
    def respond(request: Any, data: Any) -> ScriptedResponse:
        if str(request.registry) == silent:
            return failure(request, data)  # type: ignore[no-any-return]
        return respond_with_challenge(field)(request, data)  # type: ignore[no-any-return]

    field = 'Bearer realm="https://auth.other.example/token?tenant=blue",service="a b"'
    learn(harness, OTHER, "https://auth.other.example/token")
    harness.upstream.on("GET", "", respond)
    for number in (1, 2):
        pending = [harness.start(harness.challenges.can_be_asked(OTHER)) for _ in range(3)]
        assert {result(one, harness.reactor) for one in pending} == {silent == "nobody"}
        assert harness.run(harness.challenges.can_be_asked(OTHER)) is (silent == "nobody")
        paths = count_paths(harness)
        assert paths.pop("other.example:5000/v2/") == number
        assert sum(paths.values()) == (0 if silent == "other.example:5000" else number)
        assert {*paths} <= {"auth.other.example/token?tenant=blue&service=a%20b"}
        harness.reactor.advance(5 if silent == "nobody" else 30)


@pytest.mark.parametrize(
    ("answer", "answers"),
    [
        (lambda request, data: ScriptedResponse(403, b"<html>", {"content-type": "text/html"}), False),
        (lambda request, data: ScriptedResponse(451), False),
        (captive_portal, False),
        (lambda request, data: ScriptedResponse(401, b'{"details":"no"}'), True),
        (lambda request, data: ScriptedResponse(403), True),
    ],
    ids=["403 page", "451", "portal", "401 JSON", "bare 403"],
)
def test_a_wall_before_a_foreign_realm_is_no_answer(harness: CacheHarness, answer: Any, answers: bool) -> None:
    """Clients then get their tokens from this proxy, because they would get the wall's page from the realm."""

    def respond(request: Any, data: Any) -> ScriptedResponse:
        is_realm = request.path.startswith("/token")
        return answer(request, data) if is_realm else respond_with_challenge(field)(request, data)  # type: ignore[no-any-return]

    field = 'Bearer realm="https://auth.other.example/token"'
    learn(harness, OTHER, "https://auth.other.example/token")
    harness.upstream.on("GET", "", respond)
    assert harness.run(harness.challenges.can_be_asked(OTHER)) is answers


def test_a_realm_of_ours_can_always_be_asked(harness: CacheHarness) -> None:
    harness.upstream.go_down()
    assert harness.run(harness.challenges.can_be_asked(HUB))
    assert harness.run(harness.challenges.can_be_asked(OTHER))  # has no realm that is known
    assert harness.upstream.requests == []


def test_a_listed_server_is_asked_whether_the_realm_is_its_own(make_harness: Callable[..., CacheHarness]) -> None:
    """lscr.io names the token server of ghcr.io."""
    front, proper = Registry.parse("lscr.example"), Registry.parse("ghcr.example")
    harness = make_harness(registries=(front, proper))
    field = 'Bearer realm="https://ghcr.example/token",service="ghcr.example"'
    harness.upstream.on("GET", "^/v2/$", respond_with_challenge(field))
    get_challenges(harness, front)
    assert harness.pull_through.registry_for_realm(proper, "/token") is None
    assert harness.run(harness.challenges.can_be_asked(front))
    assert rendered_challenges(harness, front, field) == rendered_challenges(harness, proper, field) == [field]
    for order in ((front, proper), (proper, front)):
        harness.pull_through.registries = order
        assert harness.pull_through.registry_for_realm(proper, "/token") == proper


@pytest.mark.parametrize(
    "field",
    [
        'Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a:pull"',
        'Bearer realm="https://other.example:5000/token"',
        'Bearer realm="https://OTHER.example:5000/v2/token?x=1"',
        'Basic realm="anything, with commas"',
        'Basic realm="a \\"quoted\\" one"',
        "Negotiate dG9rZW4=",
    ],
)
def test_other_challenges_are_unchanged(harness: CacheHarness, field: str) -> None:
    assert rendered_challenges(harness, OTHER, field) == [field]


@pytest.mark.parametrize(
    "realm", ["", "https://", "ftp://x.example/token", "https://user:pw@other.example:5000/token", "nonsense",
              "https://other.example:99999/token", "//other.example:5000/token"]
)  # fmt: skip
def test_invalid_realm_is_replaced(harness: CacheHarness, realm: str) -> None:
    [field] = rendered_challenges(harness, OTHER, f'Bearer realm="{realm}"')
    assert TOKEN_PATH in field


def learn(harness: CacheHarness, registry: Registry, realm: str) -> None:
    challenge = f'Bearer realm="{realm}"'
    harness.records.put({"fields": [challenge], "checked": harness.now()}, "challenge", str(registry))


HOSTS = ["good.test", "evil.test", "auth.good.test", "http://plain.test", "victim.duckdns.org", "evil.duckdns.org"]


@pytest.mark.parametrize(
    ("name", "realm", "of_good", "believed"),
    [
        ("evil.test", "https://good.test/signin", None, False),
        ("evil.test", "https://good.test/signin", "https://good.test/token", False),
        ("evil.test", "https://good.test/token", "https://good.test/token", True),  # lscr.io and ghcr.io
        ("evil.test", "https://auth.good.test/token", None, False),
        ("evil.test", "https://auth.good.test/token", "https://auth.good.test/token", True),
        ("evil.test", "https://auth.good.test/page", "https://auth.good.test/token", False),
        ("good.test", "https://auth.good.test/token", None, True),
        ("good.test", "https://good.test/token", None, True),
        ("good.test", "http://good.test/token", None, False),
        ("good.test", "http://good.test:443/token", None, False),
        ("good.test", "http://plain.test/token", None, False),
        ("http://plain.test", "http://plain.test/token", None, True),
        ("evil.duckdns.org", "https://victim.duckdns.org/token", None, False),
    ],
)
def test_a_registry_is_not_believed_about_hosts_of_others(
    make_harness: Callable[..., CacheHarness], name: str, realm: str, of_good: str | None, believed: bool
) -> None:
    """Otherwise it could name a page of another host as its realm, and the proxy would answer that page."""
    registries = tuple(map(Registry.parse, HOSTS))
    harness, registry = make_harness(registries=registries), Registry.parse(name)
    learn(harness, registry, realm)
    if of_good is not None:
        learn(harness, Registry.parse("good.test"), of_good)
    assert harness.challenges.has_endpoint(registry, Realm.parse(realm) or Realm(registry, "")) is believed
    endpoint = Realm.parse(realm)
    assert endpoint is not None
    for order in (registries, registries[::-1]):
        harness.pull_through.registries = order
        claimed = harness.pull_through.registry_for_realm(endpoint.server, endpoint.path)
        assert (claimed is not None) is believed


def test_several_challenges(harness: CacheHarness) -> None:
    fields = rendered_challenges(harness, OTHER, f'{BEARER}, Basic realm="x"', "Digest")
    assert [field.partition(" ")[0] for field in fields] == ["Bearer", "Basic", "Digest"]


@pytest.mark.parametrize(
    ("url", "realm"),
    [
        ("https://auth.docker.io/token", Realm(Registry.parse("auth.docker.io"), "/token")),
        ("HTTPS://auth.docker.io/token?service=x#y", Realm(Registry.parse("auth.docker.io"), "/token", "service=x")),
        ("https://auth.docker.io/token#x?y", Realm(Registry.parse("auth.docker.io"), "/token")),
        ("http://a.example:5000", Realm(Registry.parse("http://a.example:5000"), "/")),
        ("https://[::1]:5000/x/y", Realm(Registry.parse("[::1]:5000"), "/x/y")),
        ("auth.docker.io/token", None),
        ("https://a b/token", None),
        ("https://0x7f000001/token", None),
        ("", None),
    ],
)
def test_realm_parse(url: str, realm: Realm | None) -> None:
    assert Realm.parse(url) == realm


@pytest.mark.parametrize(
    ("realm", "query", "completed"),
    [
        ("", "", ""),
        ("", "service=a", "service=a"),
        ("tenant=blue", "", "tenant=blue"),
        ("tenant=blue", "service=a", "tenant=blue&service=a"),
        ("tenant=blue", "service=a&tenant=blue", "service=a&tenant=blue"),
        ("tenant=blue+%31", "tenant=blue%201", "tenant=blue%201"),
        ("tenant=blue", "tenant=green", "tenant=blue&tenant=green"),
        ("service=a&scope=x", "service=b", "service=a&scope=x&service=b"),
        ("a&b=&%ff=%zz", "a=", "b=&%ff=%zz&a="),
    ],
)
def test_a_clients_query_has_the_realms_parameters(realm: str, query: str, completed: str) -> None:
    assert Realm(OTHER, "/token", realm).complete(query) == completed


@given(st.text("a=&%2+;b"), st.text("a=&%2+;b"))
def test_completed_query_is_complete(realm: str, query: str) -> None:
    completed = Realm(OTHER, "/token", realm).complete(query)
    assert completed.endswith(query)
    parameters = {*parse_qsl(completed, keep_blank_values=True)}
    assert parameters == {*parse_qsl(f"{realm}&{query}", keep_blank_values=True)}
    assert Realm(OTHER, "/token", realm).complete(completed) == completed


def test_realm_comes_from_challenge(harness: CacheHarness) -> None:
    harness.upstream.on("GET", "^/v2/$", lambda request, data: error_response(401, www_authenticate=BEARER))
    assert harness.challenges.realm(OTHER) is None
    get_challenges(harness)
    assert harness.challenges.realm(OTHER) == Realm(Registry.parse("auth.other.example"), "/token")
