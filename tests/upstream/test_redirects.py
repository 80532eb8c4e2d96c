"""Tests of redirects with a scripted agent."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.defer import Deferred

from dockerproxy.errors import CaptivePortalSuspected, UpstreamBroken
from dockerproxy.http.headers import Headers
from dockerproxy.net.dial import AddressCheck
from dockerproxy.oci.names import Host
from dockerproxy.upstream.bytes_body import BytesBody
from dockerproxy.upstream.redirects import MAX_REDIRECTS, Followed, follow

TOKEN = "https://auth.example/token?service=a"
LOGIN = Headers([("authorization", "Basic bWU6c2VjcmV0"), ("content-type", "application/x-www-form-urlencoded")])


class ScriptedAgent:
    """Redirects the URLs in `locations` (status and Location), and responds to all others with 200."""

    def __init__(self, locations: dict[str, tuple[int, str]]) -> None:
        self._locations = locations
        self.requests: list[tuple[str, str, str | None, bytes | None]] = []
        self.checks: list[Any] = []

    async def request(
        self, method: str, url: str, headers: Headers = LOGIN, body: Any = None, *, address_check: Any = None
    ) -> ScriptedRedirect:
        form = None if body is None else body._content
        self.requests.append((method, url, headers.get("authorization"), form))
        self.checks.append(address_check)
        return ScriptedRedirect(*self._locations.get(url, (200, "")))


class ScriptedRedirect:
    def __init__(self, status: int, location: str) -> None:
        self.status = status
        self.headers = Headers([("location", location)] if location else [])

    async def discard(self) -> None: ...


def check_for(host: Host) -> AddressCheck | None:
    """Return a check that is none: the test only looks whether it is used."""
    return lambda address: None


def run(agent: ScriptedAgent, form: bytes | None = None, url: str = TOKEN) -> Followed:
    """Follow the redirects of a request with a login. Return where they lead."""
    method, body = ("GET", None) if form is None else ("POST", BytesBody(form))
    results: list[Any] = []
    Deferred.fromCoroutine(follow(agent, method, url, LOGIN, body, check_for)).addBoth(results.append)
    if not isinstance(results[0], tuple):
        results[0].raiseException()
    response, followed = results[0]
    assert response.status == 200 or "location" not in response.headers
    return followed  # type: ignore[no-any-return]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    ("url", "location", "target", "with_login"),
    [
        (TOKEN, "/token/?service=a", "https://auth.example/token/?service=a", True),
        (TOKEN, "t", "https://auth.example/t", True),
        (TOKEN, "//auth.example/t", "https://auth.example/t", True),
        (TOKEN, "https://auth.example:443/t", "https://auth.example:443/t", True),
        ("http://auth.example/t", "https://auth.example/t", "https://auth.example/t", True),
        ("http://auth.example:8080/t", "https://auth.example/t", "https://auth.example/t", False),
        (TOKEN, "https://auth.example:444/t", "https://auth.example:444/t", False),
        (TOKEN, "https://other.example/t", "https://other.example/t", False),
        (TOKEN, "https://x.auth.example/t", "https://x.auth.example/t", False),
    ],
)
def test_a_login_stays_with_its_host(status: int, url: str, location: str, target: str, with_login: bool) -> None:
    agent = ScriptedAgent({url: (status, location)})
    followed = run(agent, url=url)
    login = LOGIN.get("authorization")
    assert agent.requests == [("GET", url, login, None), ("GET", target, login if with_login else None, None)]
    assert followed.with_login is with_login
    assert target.startswith(followed.server.origin) or ":443/" in target
    assert all(check is not None for check in agent.checks)


def test_a_login_does_not_come_back() -> None:
    agent = ScriptedAgent({TOKEN: (302, "https://other.example/"), "https://other.example/": (302, TOKEN + "&b")})
    assert not run(agent).with_login
    assert [login for _, _, login, _ in agent.requests] == [LOGIN.get("authorization"), None, None]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_form_stays_with_its_host(status: int) -> None:
    agent = ScriptedAgent({TOKEN: (status, "/t")})
    keeps_form = status in (307, 308)
    assert run(agent, b"password=x").with_login is keeps_form
    last = agent.requests[-1]
    assert (last[0], last[3]) == (("POST", b"password=x") if keeps_form else ("GET", None))
    elsewhere = ScriptedAgent({TOKEN: (status, "https://other.example/")})
    if keeps_form:
        with pytest.raises(UpstreamBroken, match="may be a login"):
            run(elsewhere, b"password=x")
        assert len(elsewhere.requests) == 1
    else:
        assert not run(elsewhere, b"password=x").with_login
        assert elsewhere.requests[-1] == ("GET", "https://other.example/", None, None)


def test_loops_and_long_chains_end() -> None:
    loop = ScriptedAgent({TOKEN: (302, "/a"), "https://auth.example/a": (302, TOKEN)})
    chain = ScriptedAgent(
        {TOKEN: (302, "/1"), **{f"https://auth.example/{number}": (302, f"/{number + 1}") for number in range(1, 20)}}
    )
    for agent, requests in ((loop, 2), (chain, MAX_REDIRECTS + 1)):
        with pytest.raises(UpstreamBroken, match="loop"):
            run(agent)
        assert len(agent.requests) == requests


@pytest.mark.parametrize("location", ["http://auth.example/token", "http://other.example/"])
def test_tls_is_not_left(location: str) -> None:
    agent = ScriptedAgent({TOKEN: (302, location)})
    with pytest.raises(CaptivePortalSuspected, match="plain HTTP"):
        run(agent)
    assert len(agent.requests) == 1


@pytest.mark.parametrize("location", ["ftp://auth.example/", "https://u:p@auth.example/", "//[", "https://a b/"])
def test_malformed_locations(location: str) -> None:
    with pytest.raises(UpstreamBroken):
        run(ScriptedAgent({TOKEN: (302, location)}))


@pytest.mark.parametrize(("status", "location"), [(200, "/x"), (304, "/x"), (401, "/x"), (302, "")])
def test_other_responses_are_final(status: int, location: str) -> None:
    agent = ScriptedAgent({TOKEN: (status, location)})
    results: list[Any] = []
    Deferred.fromCoroutine(follow(agent, "GET", TOKEN, LOGIN, None, check_for)).addBoth(results.append)
    assert results[0][0].status == status
    assert len(agent.requests) == 1
