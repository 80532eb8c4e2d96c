"""Facts about a registry from its answer: is it a registry's, and what does its date say about our clock?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from attrs import field, frozen
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock, deferLater

from dockerproxy.doctor.registries import (
    ANSWER_LIMIT,
    EXAMINATION_LIMIT,
    LoginFacts,
    RegistryExaminer,
    RegistryFacts,
    parse_date,
    realm_of,
    registry_facts,
    used_registries,
)
from dockerproxy.doctor.run import NETWORK_LIMIT
from dockerproxy.errors import UpstreamTimeout, UpstreamUnreachable
from dockerproxy.http.headers import Headers
from dockerproxy.oci.challenge import parse_challenges
from dockerproxy.oci.host_table import RegistryWildcard
from dockerproxy.oci.names import Registry
from dockerproxy.upstream.agent import Examination

NOW = 784111777.0  # the example of RFC 9110, section 5.6.7
DATE = "Sun, 06 Nov 1994 08:49:37 GMT"
QUAY = Registry.parse("quay.io")


@frozen
class StubResponse:
    status: int
    headers: Headers


def examine(status: int, content: bytes = b"{}", **fields: str) -> Any:
    response: Any = StubResponse(status, Headers([(name.replace("_", "-"), value) for name, value in fields.items()]))
    return registry_facts(QUAY, Examination(0.0, "A CA", None, response, content), NOW)


@pytest.mark.parametrize(
    ("status", "content", "fields", "problem"),
    [
        (200, b"{}", {}, ""),
        (401, b"", {"www_authenticate": 'Bearer realm="https://quay.io/auth"'}, ""),
        (404, b"not found", {}, ""),
        (503, b"", {}, "with the error 503"),
        (403, b"<html>Blocked</html>", {"content_type": "text/html"}, "something before it refuses (status 403)"),
        (401, b"", {}, "something before it refuses (status 401)"),
        (200, b"<html>Sign in", {"content_type": "text/html; charset=utf-8"}, "with a web page in place"),
    ],
    ids=["open", "challenge", "not-found", "error", "firewall", "no-challenge", "portal"],
)
def test_an_answer_that_is_not_a_registrys_is_a_problem(
    status: int, content: bytes, fields: dict[str, str], problem: str
) -> None:
    facts = examine(status, content, **fields)
    assert facts.problem.startswith(problem)
    assert bool(facts.problem) == bool(problem)


@pytest.mark.parametrize(
    ("fields", "offset"),
    [
        ({"date": DATE}, -0.5), ({"date": DATE, "age": "60"}, None), ({}, None), ({"date": "yesterday"}, None),
        ({"date": "Sun, 06 Nov 1994 10:49:37 GMT"}, -7200.5), ({"date": "Sun, 99 Nov 99999 10:49:37 GMT"}, None),
    ],
    ids=["now", "of-a-cache", "none", "words", "later", "impossible"],
)  # fmt: skip
def test_the_date_field_tells_the_offset_of_our_clock(fields: dict[str, str], offset: float | None) -> None:
    assert examine(200, **fields).offset == offset


def test_an_error_names_the_authority_of_a_rejected_certificate_only() -> None:
    rejected = UpstreamUnreachable("quay.io:443: its certificate was rejected: its CA is not trusted", "tls")
    facts = registry_facts(QUAY, Examination(0.1, "Corp Firewall", rejected), NOW)
    assert facts.error == "its certificate was rejected: its CA is not trusted (it is by Corp Firewall)"
    silent = UpstreamTimeout("quay.io:443: no answer within 8 s")
    assert registry_facts(QUAY, Examination(8.0, "A CA", silent), NOW).error == "no answer within 8 s"


@pytest.mark.parametrize(
    ("challenge", "realm"),
    [
        ('Bearer realm="https://auth.docker.io/token",service="x"', "https://auth.docker.io"),
        ('Basic realm="https://x/"', None), ('Bearer realm="/token"', None), ("Bearer", None),
        ('Bearer realm="https://user@x/"', None), ('Bearer realm="file:///etc/passwd"', None),
    ],
    ids=["bearer", "basic", "relative", "none", "password", "file"],
)  # fmt: skip
def test_the_server_of_a_realm(challenge: str, realm: str | None) -> None:
    found = realm_of(parse_challenges([challenge]))
    assert (None if found is None else found.origin) == realm


def test_dates_of_strangers() -> None:
    assert parse_date(DATE) == NOW
    for text in (None, "", "\0", "9" * 500, "Sun, 06 Nov 1994 99:99:99 GMT"):
        assert parse_date(text) is None


CHALLENGE = 'Bearer realm="https://tokens.test/token",service="x"'


@frozen
class SilentWorld:
    """Registries that answer at once, with a challenge, if they are in `answering`. The others say nothing.

    Neither does the token server that the challenge names.
    """

    clock: Clock = field(factory=Clock)
    answering: tuple[str, ...] = ()
    asked: list[str] = field(factory=list)

    async def examine(self, registry: Registry, limit: float, address_check: object = None) -> Examination:
        self.asked.append(str(registry))
        if str(registry) in self.answering:
            response: Any = StubResponse(401, Headers([("www-authenticate", CHALLENGE)]))
            return Examination(0.0, "A CA", None, response, b"{}")
        await deferLater(self.clock, limit, lambda: None)
        return Examination(limit, "", UpstreamTimeout(f"{registry.host.authority}: no answer"))

    def add_challenges(self, registry: Registry, challenges: object) -> None:
        assert challenges

    async def refusal(self, registry: Registry, login: object) -> str:
        await Deferred()
        raise AssertionError

    def needs_provider(self, registry: Registry) -> bool:
        return False

    def configured_login(self, registry: Registry) -> Any:
        return "alice"

    def setting(self, registry: Registry) -> str:
        return "AUTH_REGISTRIES"

    def run(self, hosts: Sequence[str]) -> tuple[list[RegistryFacts], list[LoginFacts], float]:
        """Examine `hosts`. Return the facts, and the seconds that it took."""
        world: Any = self
        examiner = RegistryExaminer(self.clock, world, world, world, lambda: (), None, lambda: NOW)
        examining = Deferred.fromCoroutine(examiner.examine(map(Registry.parse, hosts)))
        while not examining.called:
            self.clock.advance(0.25)
        registries, logins = examining.result
        return registries, logins, self.clock.seconds()


def test_a_silent_token_server_costs_no_other_finding() -> None:
    world = SilentWorld(answering=("one.test", "two.test"))
    registries, logins, seconds = world.run(("one.test", "two.test", "silent.test"))
    assert [(facts.name, facts.error) for facts in registries] == [
        ("one.test", ""), ("two.test", ""), ("silent.test", "no answer"), ("tokens.test", "no answer"),
    ]  # fmt: skip
    assert [login.unknown for login in logins] == ["no answer within 8 s"] * 2
    assert seconds <= ANSWER_LIMIT + 0.25
    assert world.asked.count("tokens.test") == 1


def test_any_number_of_silent_registries_are_examined_in_time() -> None:
    """There is no network at all."""
    hosts = [f"silent-{number}.test" for number in range(200)]
    registries, _, seconds = SilentWorld(answering=("one.test",)).run([*hosts, "one.test"])
    assert seconds <= EXAMINATION_LIMIT + 0.25 < NETWORK_LIMIT
    assert len(registries) == 201 and all(facts.error for facts in registries)
    assert registries[199].error == "it was not asked, because others took too long"
    assert registries[0].error == registries[100].error == "no answer"


def test_hosts_of_wildcards_are_those_that_were_used() -> None:
    wide, plain = RegistryWildcard.parse("*.pkg.dev"), RegistryWildcard.parse("http://*.internal:5000")
    used = ["b.pkg.dev", "quay.io", "own.pkg.dev", "a.pkg.dev", "x.y.pkg.dev", "one.internal:5000", "two.internal", "~"]
    found = used_registries([wide, plain], [Registry.parse("own.pkg.dev")], used)
    assert {str(wildcard): [registry.origin for registry in registries] for wildcard, registries in found.items()} == {
        "*.pkg.dev": ["https://b.pkg.dev", "https://a.pkg.dev"],
        "*.internal:5000": ["http://one.internal:5000"],
    }
    assert used_registries([], [], used) == {}
