"""Tests for credentials and for the rules about which host receives which login."""

from __future__ import annotations

from pathlib import Path

import pytest
from twisted.logger import capturedLogs, formatEvent

from dockerproxy.oci.credentials import BasicCredentials
from dockerproxy.oci.names import Host, Registry
from dockerproxy.upstream.credentials import Anonymous, ClientCredential, LoginTable, belong_together, login_warnings

HUB, AUTH, QUAY = Registry.parse("registry-1.docker.io"), Host.parse("auth.docker.io"), Registry.parse("quay.io")
ONE, TWO = BasicCredentials("one", "pw1"), BasicCredentials("two", "pw2")


def test_repr_hides_secrets() -> None:
    assert "pw1" not in repr([ONE, ClientCredential("Basic pw1")])
    assert ONE.authorization == "Basic b25lOnB3MQ=="


@pytest.fixture
def suffix_list(tmp_path: Path) -> Path:
    file = tmp_path / "list.dat"
    file.write_text("com\nio\norg\nduckdns.org\nazurecr.io\nco.uk\nuk\n")
    return file


@pytest.mark.parametrize(
    ("realm", "registry", "with_list", "without_list"),
    [
        ("auth.docker.io", "registry-1.docker.io", True, True),
        ("gitlab.com", "registry.gitlab.com", True, True),
        ("docker-auth.elastic.co", "docker.elastic.co", True, True),
        ("quay.io", "quay.io", True, True),
        ("auth.registry.company.com", "registry.company.com", True, True),
        ("gitlab.company.com", "registry.company.com", True, False),
        ("company.com", "registry.company.com", True, False),
        ("auth.company.lan", "registry.company.lan", True, False),
        ("gitlab.lan", "registry.lan", False, False),
        ("quay.io", "ghcr.io", False, False),
        ("victim.duckdns.org", "evil.duckdns.org", False, False),
        ("victim.co.uk", "evil.co.uk", False, False),
        ("victim.azurecr.io", "evil.azurecr.io", False, False),
        ("duckdns.org", "evil.duckdns.org", False, False),
        ("gitlab.com", "registry.gitlab.com.evil.example", False, False),
        ("auth.docker.io", "auth.docker.io.evil.example", False, False),
        ("docker.io", "evil-docker.io", False, False),
        ("quay.io", "io", False, False),
        ("io", "quay.io", False, False),
        ("a.localhost", "localhost", False, False),
        ("10.0.0.1", "10.0.0.1", True, True),
        ("10.0.0.1", "11.0.0.1", False, False),
        ("5.10.0.0.1", "10.0.0.1", False, False),
        ("fd00::1", "fd00::2", False, False),
    ],
)
def test_belong_together(suffix_list: Path, realm: str, registry: str, with_list: bool, without_list: bool) -> None:
    assert belong_together(realm, registry, suffix_list) is with_list
    assert belong_together(realm, registry, suffix_list.with_name("missing")) is without_list


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
    with capturedLogs() as events:
        logins = LoginTable({AUTH: ONE})
        for _ in range(3):
            assert logins.effective_login(evil, AUTH) is None
    [text] = [formatEvent(event) for event in events]
    assert "evil.example names auth.docker.io" in text and "evil.example:USER:PASSWORD" in text and "pw1" not in text
    assert LoginTable({AUTH: ONE, evil.host: TWO}).login_for(TWO, AUTH, evil) is None
    # The administrator configured the same login for both.
    assert LoginTable({AUTH: ONE, evil.host: ONE}).login_for(ONE, AUTH, evil) == ONE


def test_a_login_of_before_a_change_is_sent_only_to_a_registry_that_has_one_of_its_own() -> None:
    """The login of another one may have been that of a server to which it redirects."""
    logins = LoginTable({QUAY.host: ONE, AUTH: ONE})
    assert logins.login_for(TWO, QUAY.host, QUAY) == TWO
    assert logins.login_for(TWO, AUTH, QUAY) is None
    front = Registry.parse("front.example")
    assert logins.login_for(TWO, front.host, front) is None


HUB_NAMES = ["registry-1.docker.io", "index.docker.io", "docker.io", "registry.hub.docker.com"]


@pytest.mark.parametrize("name", HUB_NAMES)
def test_login_for_any_name_of_docker_hub(name: str) -> None:
    logins = LoginTable({QUAY.host: TWO, Host.parse(name): ONE})
    assert logins.effective_login(HUB, None) == logins.effective_login(HUB, AUTH) == ONE
    assert logins.login_for(ONE, AUTH, HUB) == ONE
    assert logins.login_for(ONE, Host("auth.docker.io", 8443), HUB) is None
    assert logins.login_for(ONE, AUTH, QUAY) is None
    assert logins.login_for(ONE, Host.parse("evil.example"), HUB) is None
    assert login_warnings({QUAY.host: TWO, Host.parse(name): ONE}, [HUB, QUAY]) == []


@pytest.mark.parametrize("name", HUB_NAMES)
def test_different_logins_for_names_of_docker_hub(name: str) -> None:
    logins = {Host.parse(name): ONE, AUTH: TWO}
    table = LoginTable(logins)
    login = table.effective_login(HUB, AUTH)
    assert login is not None
    assert table.login_for(login, AUTH, HUB) == TWO
    [warning] = login_warnings(logins, [HUB])
    assert f"different logins for auth.docker.io and {name}" in warning and "pw" not in warning
    assert login_warnings({Host.parse(name): ONE, AUTH: ONE}, [HUB]) == []


def test_different_logins_for_other_names_of_docker_hub() -> None:
    logins = {Host.parse("docker.io"): ONE, Host.parse("index.docker.io"): TWO}
    assert LoginTable(logins).effective_login(HUB, AUTH) == TWO
    [warning] = login_warnings(logins, [HUB])
    assert "The login for index.docker.io is used" in warning


def test_login_for_a_registry_is_used_at_its_known_realm() -> None:
    gitlab, realm = Registry.parse("registry.gitlab.com"), Host.parse("gitlab.com")
    assert LoginTable({gitlab.host: ONE}).login_for(ONE, realm, gitlab) == ONE
    assert LoginTable({gitlab.host: ONE, realm: TWO}).login_for(ONE, realm, gitlab) == TWO
    assert LoginTable({gitlab.host: ONE}).login_for(ONE, AUTH, gitlab) is None


def test_login_for_a_registry_with_another_realm_is_reported_once() -> None:
    logins = LoginTable({QUAY.host: ONE})
    with capturedLogs() as events:
        for _ in range(3):
            assert logins.login_for(ONE, Host.parse("login.example"), QUAY) is None
    [text] = [formatEvent(event) for event in events]
    assert "quay.io names login.example as its token server" in text
    assert "login.example:USER:PASSWORD" in text and "pw1" not in text


def test_unused_logins_are_reported() -> None:
    ghcr, realm = Host.parse("ghcr.io"), Host.parse("login.example")
    [warning] = login_warnings({ghcr: ONE}, [HUB, QUAY])
    assert "entry 1 (ghcr.io) is never used" in warning and "registry-1.docker.io, quay.io" in warning
    [warning] = login_warnings({QUAY.host: ONE, ghcr: TWO}, [HUB, QUAY])
    assert "entry 2 is never used" in warning  # without the host, which may be a part of a password
    assert "ghcr" not in warning
    other_port = Host.parse("quay.io:444")
    for logins in ({QUAY.host: ONE, realm: ONE}, {Host.parse("auth.quay.io"): ONE}, {other_port: ONE, QUAY.host: TWO}):
        assert login_warnings(logins, [HUB, QUAY]) == []


def test_a_login_for_another_port_is_reported() -> None:
    """Nothing else would say so: the registry may have its token server there."""
    registry = Registry.parse("http://registry.lan:5000")
    [warning] = login_warnings({Host.parse("registry.lan"): ONE}, [HUB, registry])
    assert "entry 1 (registry.lan) is for another port than the registry registry.lan:5000" in warning
    assert "Write registry.lan:5000:USER:PASSWORD" in warning
    [warning] = login_warnings({HUB.host: ONE, Host.parse("quay.io:444"): TWO}, [HUB, QUAY])
    assert "entry 2 is for another port than the registry quay.io" in warning and "444" not in warning
