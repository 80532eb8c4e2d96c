"""Which names an outsider can have, and which of them are ours."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.errors import MisdirectedRequest
from dockerproxy.net.addresses import HostPattern
from dockerproxy.proxy.host_rule import HostRule

RULE = HostRule(
    frozenset({"registry.example.org", "proxy", "proxy.corp.example.com"}),
    frozenset({"corp.example.com"}),
    (HostPattern.parse("mirror.example.net"), HostPattern.parse("*.wild.example"), HostPattern.parse(".both.example")),
)
LABELS = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)


def accepts(host: str, rule: HostRule = RULE) -> bool:
    try:
        rule.check(host)
    except MisdirectedRequest:
        return False
    return True


OURS = [
    "", "registry.example.org", "Registry.Example.ORG.", "registry.example.org:5443", "proxy.corp.example.com",
    "other.corp.example.com:3128", "a.b.corp.example.com", "localhost", "localhost:80", "x.localhost", "registry",
    "compose_service:3128", "docker-registry.local", "any.local.", "x.lan", "ip-10-0-0-1.eu-west-1.compute.internal",
    "nas.home.arpa", "10.0.0.1", "10.0.0.1:3128", "[::1]", "[fd00::1]:3128", "8.8.8.8", "mirror.example.net",
    "a.wild.example", "both.example", "a.both.example",
]  # fmt: skip
OTHERS = [
    "evil.example", "evil.example:3128", "corp.example.com.evil.example", "evilcorp.example.com", "corp.example.com",
    "example.com", "other.example.org", "x.registry.example.org", "a.mirror.example.net", "wild.example",
    "evil.example.", "10.0.0.1.evil.example", "127.0.0.1.nip.io", "localhost.evil.example", "local.evil.example",
    "home.arpa", "xhome.arpa", "evil-local.com", "user@localhost", "user:password@10.0.0.1", "localhost:x",
    "localhost:0", "localhost:99999", "a b", "localhost, evil.example", "[::1", "[fe80::1%25eth0]", "127.1",
    "0x7f000001", "2130706433", "..", ".local", ".", "xn--.", "bücher.example", "\uff4cocalhost", "localhos\u212a",
    "*", "evil.example/localhost",
]  # fmt: skip


@pytest.mark.parametrize("host", OURS)
def test_our_names(host: str) -> None:
    assert accepts(host)


@pytest.mark.parametrize("host", OTHERS)
def test_names_of_others(host: str) -> None:
    assert not accepts(host)


def test_all_allows_every_name() -> None:
    assert accepts("evil.example", HostRule(allowed=None))


def test_the_sentence_names_the_host_and_the_setting() -> None:
    with pytest.raises(MisdirectedRequest, match=r"^evil\.example is not .*ALLOWED_HOSTS\.$") as caught:
        RULE.check("EVIL.example:3128")
    assert caught.value.status == 421


def test_a_malformed_host_is_not_quoted() -> None:
    with pytest.raises(MisdirectedRequest) as caught:
        RULE.check("user:password@registry.example.org")
    assert "password" not in caught.value.message


@given(st.lists(LABELS, min_size=1, max_size=4), st.sampled_from(["com", "example", "co.uk", "dev", "io"]))
def test_no_name_below_a_public_domain_is_ours(labels: list[str], suffix: str) -> None:
    assert not accepts(".".join([*labels, suffix]), HostRule())


@given(st.lists(LABELS, min_size=1, max_size=3), st.sampled_from(["corp.example.com", "local", "lan", "internal"]))
def test_every_name_below_a_domain_of_ours_is_ours(labels: list[str], suffix: str) -> None:
    assert accepts(".".join([*labels, suffix]))


@given(st.ip_addresses(), st.one_of(st.just(""), st.integers(1, 65535).map(lambda port: f":{port}")))
def test_no_address_is_refused(address: IPv4Address | IPv6Address, port: str) -> None:
    assert accepts(f"{address}{port}" if address.version == 4 else f"[{address}]{port}")


@given(st.text())
def test_any_text_is_judged(host: str) -> None:
    accepts(host)
