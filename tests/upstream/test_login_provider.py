"""Logins from helpers and from docker's file: which source, and when a helper is asked."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import capturedLogs

from dockerproxy.oci.credentials import BasicCredentials, IdentityToken, Login
from dockerproxy.oci.docker_hub import DOCKER_HUB
from dockerproxy.oci.host_table import Wildcard
from dockerproxy.oci.names import Host
from dockerproxy.upstream.credential_helper import HelperFailed
from dockerproxy.upstream.docker_config import DockerConfig
from dockerproxy.upstream.login_provider import RENEWAL_INTERVAL, RETRY_INTERVAL, LocalLoginProvider, ProvidedLogin

QUAY, PKG = Host.parse("quay.io"), Host.parse("europe-docker.pkg.dev")
ONE, TWO = BasicCredentials("AWS", "one"), BasicCredentials("AWS", "two")


class Provider:
    """A provider with a scripted helper. With `pending`, its answers wait."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.answer: Login | HelperFailed | None = ONE
        self.runs: list[tuple[str, str]] = []
        self.pending: list[Deferred[None]] | None = None
        self.provider = LocalLoginProvider(self.run_helper, self.clock.seconds)
        self.provider.configure({QUAY: "ecr-login"}, DockerConfig())

    async def run_helper(self, helper: str, server: str) -> Login | None:
        self.runs.append((helper, server))
        if self.pending is not None:
            self.pending.append(Deferred())
            await self.pending[-1]
        if isinstance(self.answer, HelperFailed):
            raise self.answer
        return self.answer

    def start(self, host: Host = QUAY, refused: Login | None = None, client: str = "10.0.0.1") -> list[Any]:
        results: list[Any] = []
        work: Coroutine[Any, Any, ProvidedLogin | None] = self.provider.get_login(host, refused, client)
        Deferred.fromCoroutine(work).addCallback(results.append)
        return results

    def get(self, host: Host = QUAY, refused: Login | None = None) -> Login | None:
        [provided] = self.start(host, refused)
        return None if provided is None else provided.login


@pytest.fixture
def provider() -> Provider:
    return Provider()


def test_a_helper_is_asked_once_and_again_at_an_interval(provider: Provider) -> None:
    for _ in range(5):
        assert provider.get() == ONE
        provider.clock.advance(RENEWAL_INTERVAL / 5)
    provider.answer = TWO
    assert provider.get() == TWO
    assert provider.runs == [("ecr-login", "quay.io")] * 2


def test_a_refused_login_is_renewed_at_once(provider: Provider) -> None:
    assert provider.get() == ONE
    provider.answer = TWO
    assert provider.get(refused=ONE) == TWO
    for _ in range(5):  # a request that was sent with the old one
        assert provider.get(refused=ONE) == TWO
    assert len(provider.runs) == 2
    for _ in range(5):  # the helper has no better one
        assert provider.get(refused=TWO) == TWO
    assert len(provider.runs) == 3
    provider.clock.advance(RETRY_INTERVAL)
    provider.answer = ONE
    assert provider.get(refused=TWO) == ONE


def test_the_last_login_is_kept_while_the_helper_fails(provider: Provider) -> None:
    assert provider.get() == ONE
    provider.answer = HelperFailed("did not answer within 15 s and was killed")
    with capturedLogs() as events:
        for _ in range(3):
            provider.clock.advance(RENEWAL_INTERVAL)
            assert provider.get() == ONE
        assert len(events) == 1
        assert events[0]["problem"] == "did not answer within 15 s and was killed"
        provider.clock.advance(RETRY_INTERVAL)
        provider.answer = TWO
        assert provider.get() == TWO
        assert len(events) == 2


def test_a_helper_that_fails_is_not_asked_for_each_request(provider: Provider) -> None:
    for answer in (HelperFailed("is not in PATH"), None):
        provider.answer = answer
        provider.runs.clear()
        for _ in range(5):
            assert provider.get() is None
        assert len(provider.runs) == 1
        provider.clock.advance(RETRY_INTERVAL)


def test_a_helper_without_the_login_takes_it_away(provider: Provider) -> None:
    assert provider.get() == ONE
    provider.answer = None
    assert provider.get(refused=ONE) is None


def test_requests_share_a_run(provider: Provider) -> None:
    """Also those of the many hosts behind one address."""
    provider.pending = []
    results = [provider.start(client="10.0.0.1") for _ in range(500)]
    assert len(provider.runs) == 1
    provider.pending[0].callback(None)
    assert [provided.login for [provided] in results] == [ONE] * 500


def test_the_number_of_runs_is_bounded(provider: Provider) -> None:
    """A client can name any number of hosts that a wildcard covers."""
    provider.provider.configure({Wildcard("pkg.dev"): "gcloud"}, DockerConfig())
    provider.pending = []
    results = [provider.start(Host.parse(f"h{number}.pkg.dev")) for number in range(100)]
    assert len(provider.runs) == 4  # at the same time
    assert sum(result == [None] for result in results) == 100 - 32  # beyond the share of one client
    other = provider.start(Host.parse("other.pkg.dev"), client="10.0.0.2")
    assert other == []  # it waits for its turn
    while provider.pending:
        provider.pending.pop().callback(None)
    assert other[0].login == ONE
    assert provider.provider.running.used == 0
    for number in range(1000):
        provider.pending = None
        provider.get(Host.parse(f"x{number}.pkg.dev"))
    assert len(provider.provider._covered_logins) == 256


def test_the_order_of_sources(provider: Provider) -> None:
    config = DockerConfig(
        logins={QUAY: TWO, PKG: TWO, DOCKER_HUB.host: IdentityToken("x")}, helpers={QUAY: "pass", PKG: "gcloud"}
    )
    provider.provider.configure({QUAY: "ecr-login"}, config)
    for host, setting in ((QUAY, "CREDENTIAL_HELPERS"), (PKG, "DOCKER_CONFIG_FILE")):
        assert provider.start(host) == [ProvidedLogin(ONE, setting)]
    assert provider.start(DOCKER_HUB.host) == [ProvidedLogin(IdentityToken("x"), "DOCKER_CONFIG_FILE")]
    assert provider.runs == [("ecr-login", "quay.io"), ("gcloud", "europe-docker.pkg.dev")]
    assert provider.get(Host.parse("other.example")) is None
    wildcard = Wildcard.parse("*.pkg.dev")
    provider.provider.configure({}, DockerConfig(logins={wildcard: TWO}, helpers={PKG: "gcloud"}))
    assert provider.start(Host.parse("us-docker.pkg.dev")) == [ProvidedLogin(TWO, "DOCKER_CONFIG_FILE")]
    assert provider.start(PKG) == [ProvidedLogin(ONE, "DOCKER_CONFIG_FILE")]
    provider.provider.configure({}, DockerConfig(helpers={wildcard: "gcr"}))
    assert provider.start(Host.parse("asia-docker.pkg.dev")) == [ProvidedLogin(ONE, "DOCKER_CONFIG_FILE")]
    provider.provider.configure({}, DockerConfig(logins={QUAY: TWO}, default_helper="pass"))
    assert provider.get(DOCKER_HUB.host) == ONE
    assert provider.runs[-1] == ("pass", "https://index.docker.io/v1/")
    assert provider.get(QUAY) == ONE  # docker does not look into auths either
    assert provider.get(Host.parse("registry.test:5000")) == ONE
    assert provider.runs[-1] == ("pass", "registry.test:5000")


def test_after_a_reload_helpers_are_asked_again(provider: Provider) -> None:
    assert provider.get() == ONE
    provider.provider.configure({QUAY: "ecr-login"}, DockerConfig())
    provider.answer = HelperFailed("fails")
    assert provider.get() == ONE
    assert len(provider.runs) == 2
    provider.provider.configure({}, DockerConfig())
    assert provider.get() is None


def test_logins_are_fetched_ahead(provider: Provider) -> None:
    provider.provider.prefetch([QUAY, PKG, DOCKER_HUB.host])
    assert provider.runs == [("ecr-login", "quay.io")]
    assert provider.get() == ONE
    assert len(provider.runs) == 1


def test_hosts_that_clients_name_displace_no_listed_ones(provider: Provider) -> None:
    provider.provider.configure({QUAY: "ecr-login", Wildcard("pkg.dev"): "gcr"}, DockerConfig())
    provider.provider.prefetch([QUAY])
    for number in range(1000):
        provider.get(Host.parse(f"x{number}.pkg.dev"))
    runs = len(provider.runs)
    provider.answer = HelperFailed("fails")
    assert provider.get() == ONE
    assert len(provider.runs) == runs


def test_nobody_waits_for_a_renewal(provider: Provider) -> None:
    assert provider.get() == ONE
    provider.pending = []
    provider.clock.advance(RENEWAL_INTERVAL)
    assert provider.get() == provider.get() == ONE
    assert len(provider.runs) == 2
    provider.answer = TWO
    provider.pending[0].callback(None)
    assert provider.get() == TWO
    provider.provider.configure({QUAY: "ecr-login"}, DockerConfig())
    assert provider.get() == TWO  # after a reload too
