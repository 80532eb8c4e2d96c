"""Which client the fields of a reverse proxy describe."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.errors import BadRequest
from dockerproxy.http.headers import Headers
from dockerproxy.net.addresses import AddressSet
from dockerproxy.proxy.trusted_proxies import ForwardedClient, TrustedProxies

PEER = "127.0.0.1"
TRUSTED = TrustedProxies(AddressSet.parse("loopback 10.0.0.0/24 2001:db8:1::/48"))


def client_of(*fields: tuple[str, str], peer: str = PEER) -> ForwardedClient | None:
    return TRUSTED.client_of(peer, Headers(fields))


def address_in(chain: str) -> str:
    client = client_of(("X-Forwarded-For", chain))
    assert client is not None
    return client.address


@pytest.mark.parametrize(
    ("chain", "address"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("203.0.113.9, 192.0.2.7", "192.0.2.7"),  # what the client claims comes first
        ("10.0.0.9,192.0.2.7", "192.0.2.7"),
        ("192.0.2.7, 10.0.0.1", "192.0.2.7"),
        ("203.0.113.9, 192.0.2.7, 10.0.0.1, 10.0.0.2", "192.0.2.7"),
        ("10.0.0.3, 10.0.0.2", "10.0.0.3"),  # only proxies, so the first of them is a client itself
        ("192.0.2.7:50123", "192.0.2.7"),
        ("[2001:db8::7]:50123", "2001:db8::7"),
        ("[2001:db8::7]", "2001:db8::7"),
        ("2001:DB8::7", "2001:db8::7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("unknown", PEER),
        ("192.0.2.7, unknown, 10.0.0.2", "10.0.0.2"),
        ("192.0.2.7, 10.0.0", PEER),
        ("", PEER),
        (",,", PEER),
        ("a" * 5000, PEER),
        ("127.0.0.1," * 3000 + "10.0.0.2", PEER),
    ],
)
def test_the_client_is_the_last_address_that_is_no_proxy(chain: str, address: str) -> None:
    assert address_in(chain) == address
    by_forwarded = client_of(("Forwarded", ", ".join(f'for="{hop.strip()}"' for hop in chain.split(","))))
    assert by_forwarded is not None
    assert by_forwarded.address == address


def test_repeated_fields_are_one_chain() -> None:
    client = client_of(("X-Forwarded-For", "192.0.2.7"), ("X-Forwarded-For", "10.0.0.2"))
    assert client == ForwardedClient("192.0.2.7")


def test_the_nearest_proxy_says_scheme_and_host() -> None:
    client = client_of(("X-Forwarded-Proto", "https, http"), ("X-Forwarded-Host", "evil.example, reg.example:8443"))
    assert client == ForwardedClient(PEER, "http", "reg.example:8443")
    assert client_of(("X-Forwarded-Proto", " HTTPS ")) == ForwardedClient(PEER, "https")


def test_forwarded_describes_the_hop_of_the_client() -> None:
    """The outer proxy ended the TLS of the client; the inner one was addressed over plain HTTP."""
    text = (
        'for=203.0.113.9;proto=http;host=claimed.example, For="[2001:db8::7]:4711" ; Proto=HTTPS;'
        'host="reg.example:8443";by=10.0.0.1 ,, for=10.0.0.1;proto=http;host=inner'
    )
    assert client_of(("Forwarded", text)) == ForwardedClient("2001:db8::7", "https", "reg.example:8443")
    assert client_of(("Forwarded", "for=_hidden;proto=https")) == ForwardedClient(PEER, "https")
    assert client_of(("Forwarded", 'proto="h\\ttps"')) == ForwardedClient(PEER, "https")


def test_both_families_may_agree() -> None:
    client = client_of(
        ("Forwarded", "for=192.0.2.7;proto=https"), ("X-Forwarded-For", "192.0.2.7"), ("X-Forwarded-Host", "a.example")
    )
    assert client == ForwardedClient("192.0.2.7", "https", "a.example")


def test_no_fields_and_other_peers() -> None:
    assert client_of() is None
    for peer in ("192.0.2.1", "-", "", "10.0.1.1"):
        assert client_of(("X-Forwarded-For", "192.0.2.7"), ("Forwarded", "garbage"), peer=peer) is None
    assert TrustedProxies().client_of(PEER, Headers([("X-Forwarded-For", "192.0.2.7")])) is None


@given(st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=60))
def test_no_text_makes_the_client_one_of_its_claims(claim: str) -> None:
    """A client may send any text: the proxy appends the address that it sees."""
    assert address_in(f"{claim}, 192.0.2.7") == "192.0.2.7"
    try:
        client = client_of(("Forwarded", f"{claim}, for=192.0.2.7;proto=http"))
    except BadRequest:
        return
    assert client == ForwardedClient("192.0.2.7", "http")


@pytest.mark.parametrize("text", ["\t " * 15000 + "?", "a" * 30000, 'a="' + '\\"' * 15000, "a=b;" * 8000, "," * 30000])
def test_a_long_field_costs_linear_time(text: str) -> None:
    started = time.process_time()
    try:
        client_of(("Forwarded", text))
    except BadRequest:
        pass
    assert time.process_time() - started < 1  # quadratic time would take minutes
