"""Names: valid ones are unchanged by parsing, and invalid ones are refused."""

from __future__ import annotations

import hashlib
import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.errors import DigestInvalid, NameInvalid
from dockerproxy.oci.names import Digest, Host, Registry, parse_reference, parse_repository, parse_tag

components = st.from_regex(r"[a-z0-9]{1,8}(?:(?:\.|_|__|-{1,3})[a-z0-9]{1,8}){0,2}", fullmatch=True)
repositories = st.lists(components, min_size=1, max_size=5).map("/".join).filter(lambda name: len(name) <= 255)
tags = st.from_regex(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}", fullmatch=True)
digests = st.one_of(
    st.from_regex(r"sha256:[0-9a-f]{64}", fullmatch=True),
    st.from_regex(r"sha512:[0-9a-f]{128}", fullmatch=True),
)
labels = st.from_regex(r"[a-z_](?:[a-z0-9_-]{0,10}[a-z0-9_])?", fullmatch=True)
host_names = st.lists(labels, min_size=1, max_size=4).map(".".join)
ports = st.integers(1, 65535)


@given(repositories)
def test_a_valid_repository_name_is_unchanged(name: str) -> None:
    assert parse_repository(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "", "/", "a/", "/a", "a//b", "A", "a/B", "a.", ".a", "a..b", "a._b", "a___b", "-a", "a-", "a_", "..", "a/../b",
        ".", "a b", "a\n", "\na", "a:b", "a@b", "a%2fb", "a\0", "ä", "a/é", "١", "a" * 256, "a?", "a#b",
        "a\\b", "_catalog",
    ],
)  # fmt: skip
def test_invalid_repository(name: str) -> None:
    with pytest.raises(NameInvalid):
        parse_repository(name)


def test_longest_repository() -> None:
    assert parse_repository("a" * 255)


@given(tags)
def test_a_valid_tag_is_unchanged(tag: str) -> None:
    assert parse_tag(tag) == parse_reference(tag) == tag


@pytest.mark.parametrize("tag", ["", ".a", "-a", "a" * 129, "a/b", "a b", "a\n", "é", "a\0", "..", "a+b", "a%41"])
def test_invalid_tag(tag: str) -> None:
    with pytest.raises(NameInvalid):
        parse_tag(tag)
    with pytest.raises(NameInvalid):
        parse_reference(tag)


@given(digests)
def test_digest_round_trip(text: str) -> None:
    digest = Digest.parse(text)
    assert str(digest) == text
    assert parse_reference(text) == digest
    assert digest.hasher().name == digest.algorithm


@given(st.binary(), st.sampled_from(["sha256", "sha512"]))
def test_digest_of_content(content: bytes, algorithm: str) -> None:
    digest = Digest.of(content, algorithm)
    hasher = digest.hasher()
    hasher.update(content)
    assert hasher.hexdigest() == digest.hex == hashlib.new(algorithm, content).hexdigest()
    assert Digest.parse(str(digest)) == digest


@pytest.mark.parametrize(
    "text",
    [
        "", ":", "sha256", "sha256:", ":" + "a" * 64, "sha256:" + "a" * 63, "sha256:" + "a" * 65, "sha256:" + "A" * 64,
        "SHA256:" + "a" * 64, "sha256:" + "g" * 64, "sha256:" + "a" * 63 + "\n", "sha256:" + "a" * 64 + "\n",
        "sha512:" + "a" * 64, "sha256:" + "a" * 128, "md5:" + "a" * 32, "sha256:sha256:" + "a" * 57,
        "sha256:" + "١" * 64, "sha256-" + "a" * 64, " sha256:" + "a" * 64, "sha384:" + "a" * 96,
    ],
)  # fmt: skip
def test_invalid_digest(text: str) -> None:
    with pytest.raises(DigestInvalid):
        Digest.parse(text)


@given(host_names, ports)
def test_host_round_trip(name: str, port: int) -> None:
    host = Host.parse(f"{name}:{port}")
    assert host == Host(name, port)
    assert Host.parse(host.authority) == host
    assert Host.parse(str(host)) == host
    assert not host.is_address


@given(host_names, ports)
def test_default_port_and_case_and_root_dot(name: str, port: int) -> None:
    assert Host.parse(name, port) == Host.parse(name.upper(), port) == Host.parse(name + ".", port) == Host(name, port)


@given(st.ip_addresses(), ports)
def test_address_round_trip(address: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int) -> None:
    text = f"[{address}]" if address.version == 6 else str(address)
    host = Host.parse(f"{text}:{port}")
    assert host == Host(str(address), port)
    assert Host.parse(host.authority) == host
    assert Host.parse(str(host)) == host
    assert Host.parse(text) == Host(str(address), 443)
    assert host.is_address


def test_an_ipv6_address_has_one_form() -> None:
    assert Host.parse("[0:0:0::0:1]:5000") == Host.parse("[::1]:5000") == Host("::1", 5000)
    assert Host.parse("[2001:DB8::A]") == Host("2001:db8::a", 443)


def test_port_in_text_form() -> None:
    assert str(Host.parse("quay.io:443")) == "quay.io"
    assert str(Host.parse("quay.io:5000")) == Host.parse("quay.io:5000").authority == "quay.io:5000"
    assert Host.parse("quay.io").authority == "quay.io:443"
    assert str(Host.parse("[::1]")) == "[::1]"


@pytest.mark.parametrize(
    "text",
    [
        "", ".", "..", ":", ":443", "a:", "a:0", "a:65536", "a:-1", "a:+1", "a: 1", "a:1 ", "a:1:2", "a:٣", "a:000443",
        "a..b", ".a", "-a", "a-", "a.-b", "a b", "a\n", "a\0", "a/b", "a@b", "a%41", "user:pw@a", "ä.example", "a" * 64,
        ".".join(["a" * 60] * 5), "::1", "[::1", "::1]", "[]", "[::1]443", "[::1]:", "[a]", "[1.2.3.4]",
        "[fe80::1%eth0]", "[::1%25lo]", "[::g]", "1.2.3", "1.2.3.4.5", "256.1.1.1", "01.2.3.4", "127.1",
        "2130706433", "0x7f000001",
        "0x7f.0.0.0x1", "a.0x", "a.1", "1.2.3.4.", "*.example", "a,b", "a\u3002b", "doc\u212aer.io", "\u0130.example",
    ],
)  # fmt: skip
def test_invalid_host(text: str) -> None:
    with pytest.raises(NameInvalid):
        Host.parse(text)


@given(st.text())
def test_an_accepted_host_needs_no_escaping(text: str) -> None:
    """An accepted host can be written into a header, a file name or a certificate without escaping."""
    try:
        host = Host.parse(text)
    except NameInvalid:
        return
    assert host.authority.isascii() and host.authority.isprintable()
    assert not set(host.name) & set(" /\\@?#%")
    assert host.name == host.name.lower()


@given(host_names, ports, st.sampled_from(["http", "https"]))
def test_registry_round_trip(name: str, port: int, scheme: str) -> None:
    registry = Registry.parse(f"{scheme}://{name}:{port}")
    assert registry == Registry(Host(name, port), scheme)
    assert Registry.parse(registry.origin) == registry


def test_registry_forms() -> None:
    assert Registry.parse("quay.io") == Registry.parse("https://quay.io:443") == Registry(Host("quay.io", 443), "https")
    assert Registry.parse("http://quay.io") == Registry(Host("quay.io", 80), "http")
    assert Registry.parse("http://[::1]").origin == "http://[::1]"
    assert Registry.parse("https://[::1]:80").origin == "https://[::1]:80"
    assert Registry.parse("http://quay.io:443").origin == "http://quay.io:443"
    assert str(Registry.parse("http://quay.io:5000")) == "quay.io:5000"


@pytest.mark.parametrize(
    "text", ["", "ftp://a", "://a", "HTTP://a", "http://", "https://a/", "https://a?b", "http://u@a", "http://http://a"]
)
def test_invalid_registry(text: str) -> None:
    with pytest.raises(NameInvalid):
        Registry.parse(text)
