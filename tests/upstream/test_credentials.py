from __future__ import annotations

import pytest

from dockerproxy.oci.names import Host, Registry
from dockerproxy.upstream.credentials import Anonymous, Configured, Logins, Own, related

HUB, AUTH, QUAY = Registry.parse("registry-1.docker.io"), Host.parse("auth.docker.io"), Registry.parse("quay.io")
ONE, TWO = Configured("one", "pw1"), Configured("two", "pw2")


def test_keys_tell_apart_and_say_nothing() -> None:
    credentials = [
        Anonymous(),
        ONE,
        TWO,
        Configured("one:p", "w1"),
        Own("Basic b25lOnB3MQ=="),
        Own("one\0pw1"),
        Own(""),
    ]
    keys = [credential.key for credential in credentials]
    assert len(set(keys)) == len(keys)
    assert Configured("one", "pw1").key == ONE.key
    assert not any("pw1" in key or "one" in key for key in keys)


def test_nothing_is_shown() -> None:
    assert "pw1" not in repr([ONE, Own("Basic pw1")])
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
def test_related(one: str, other: str, expected: bool) -> None:
    assert related(one, other) is expected
    assert related(other, one) is expected


def test_a_login_goes_to_the_host_that_it_is_for() -> None:
    logins = Logins({QUAY.host: ONE})
    assert logins.shown(ONE, QUAY.host, QUAY) == ONE
    assert logins.shown(ONE, Host("evil.example", 443), QUAY) is None
    assert logins.shown(ONE, Host("quay.io", 8443), QUAY) is None
    assert logins.shown(Anonymous(), QUAY.host, QUAY) is None
    assert logins.shown(Own("Basic x"), QUAY.host, QUAY) is None


def test_the_realm_has_a_login_of_its_own() -> None:
    logins = Logins({AUTH: ONE, HUB.host: TWO})
    assert logins.effective(HUB, AUTH) == TWO
    assert logins.shown(TWO, AUTH, HUB) == ONE
    only = Logins({AUTH: ONE})
    assert only.effective(HUB, AUTH) == ONE
    assert only.effective(HUB, None) is None
    assert only.shown(ONE, AUTH, HUB) == ONE
    assert only.shown(ONE, HUB.host, HUB) is None  # the registry itself is told nothing that is for its realm


def test_a_registry_cannot_borrow_the_realm_of_another() -> None:
    evil = Registry.parse("evil.example")
    assert Logins({AUTH: ONE}).effective(evil, AUTH) is None
    assert Logins({AUTH: ONE, evil.host: TWO}).shown(TWO, AUTH, evil) is None
    assert Logins({AUTH: ONE, evil.host: ONE}).shown(ONE, AUTH, evil) == ONE  # the administrator said they are one


def test_a_login_from_elsewhere_goes_to_the_registry_only() -> None:
    logins = Logins({AUTH: ONE})
    assert logins.shown(TWO, HUB.host, HUB) == TWO
    assert logins.shown(TWO, AUTH, HUB) is None
