"""Tests for credentials and for the rules about which host receives which login."""

from __future__ import annotations

import pytest

from dockerproxy.oci.credentials import BasicCredentials
from dockerproxy.oci.names import Host, Registry
from dockerproxy.upstream.credentials import Anonymous, ClientCredential, LoginTable, in_same_domain

HUB, AUTH, QUAY = Registry.parse("registry-1.docker.io"), Host.parse("auth.docker.io"), Registry.parse("quay.io")
ONE, TWO = BasicCredentials("one", "pw1"), BasicCredentials("two", "pw2")


def test_repr_hides_secrets() -> None:
    assert "pw1" not in repr([ONE, ClientCredential("Basic pw1")])
    assert ONE.authorization == "Basic b25lOnB3MQ=="


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("auth.docker.io", "registry-1.docker.io", True),
        ("gitlab.com", "registry.gitlab.com", True),
        ("registry.gitlab.com", "gitlab.com", True),
        ("quay.io", "quay.io", True),
        ("quay.io", "ghcr.io", False),
        ("auth.docker.io", "auth.docker.io.evil.example", False),
        ("docker.io", "evil-docker.io", False),
        ("io", "quay.io", False),
        ("quay.io", "io", False),
        ("10.0.0.1", "10.0.0.1", True),
        ("10.0.0.1", "11.0.0.1", False),
        ("fd00::1", "fd00::2", False),
    ],
)
def test_in_same_domain(one: str, other: str, expected: bool) -> None:
    assert in_same_domain(one, other) is expected
    assert in_same_domain(other, one) is expected


def test_login_is_sent_only_to_its_host() -> None:
    logins = LoginTable({QUAY.host: ONE})
    assert logins.login_for(ONE, QUAY.host, QUAY) == ONE
    assert logins.login_for(ONE, Host("evil.example", 443), QUAY) is None
    assert logins.login_for(ONE, Host("quay.io", 8443), QUAY) is None
    assert logins.login_for(Anonymous(), QUAY.host, QUAY) is None
    assert logins.login_for(ClientCredential("Basic x"), QUAY.host, QUAY) is None


def test_realm_receives_its_own_login() -> None:
    logins = LoginTable({AUTH: ONE, HUB.host: TWO})
    assert logins.effective_login(HUB, AUTH) == TWO
    assert logins.login_for(TWO, AUTH, HUB) == ONE
    only = LoginTable({AUTH: ONE})
    assert only.effective_login(HUB, AUTH) == ONE
    assert only.effective_login(HUB, None) is None
    assert only.login_for(ONE, AUTH, HUB) == ONE
    assert only.login_for(ONE, HUB.host, HUB) is None  # because the login belongs to the realm only


def test_foreign_realm_gets_no_login() -> None:
    evil = Registry.parse("evil.example")
    assert LoginTable({AUTH: ONE}).effective_login(evil, AUTH) is None
    assert LoginTable({AUTH: ONE, evil.host: TWO}).login_for(TWO, AUTH, evil) is None
    # The administrator configured the same login for both.
    assert LoginTable({AUTH: ONE, evil.host: ONE}).login_for(ONE, AUTH, evil) == ONE


def test_unconfigured_login_is_sent_only_to_the_registry() -> None:
    logins = LoginTable({AUTH: ONE})
    assert logins.login_for(TWO, HUB.host, HUB) == TWO
    assert logins.login_for(TWO, AUTH, HUB) is None
