"""Hosts and registries by wildcards."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.errors import NameInvalid
from dockerproxy.oci.host_table import HostTable, RegistryMap, RegistryWildcard, Wildcard, parse_host_key
from dockerproxy.oci.names import Host, Registry

PKG = Wildcard("pkg.dev")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("*.pkg.dev", PKG),
        ("*.PKG.dev:443", PKG),
        ("*.pkg.dev.", PKG),
        ("*.pkg.dev:5000", Wildcard("pkg.dev", 5000)),
        ("*.dkr.ecr.eu-west-1.amazonaws.com", Wildcard("dkr.ecr.eu-west-1.amazonaws.com")),
    ],
)
def test_parse_wildcard(text: str, expected: Wildcard) -> None:
    assert Wildcard.parse(text) == parse_host_key(text) == expected
    assert parse_host_key(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    ["*", "*.", "**.pkg.dev", "*.*.pkg.dev", "a*.pkg.dev", "*a.pkg.dev", "a.*.dev", "*.10.0.0.1", "*.[::1]", "*:443",
     "*.pkg.dev:0", "*.pkg.dev/x", "*.pkg.dev:443:1", "*.-", "*..pkg.dev", "http://*.pkg.dev", "*.a b"],
)  # fmt: skip
def test_no_wildcard(text: str) -> None:
    with pytest.raises(NameInvalid):
        parse_host_key(text)


@pytest.mark.parametrize(
    ("host", "is_covered"),
    [
        ("europe-docker.pkg.dev", True),
        ("EUROPE-docker.pkg.dev.", True),
        ("pkg.dev", False),
        ("a.b.pkg.dev", False),
        ("apkg.dev", False),
        ("a.pkg.dev:5000", False),
        ("pkg.dev.evil.example", False),
        ("a.pkg.devil", False),
        ("10.0.0.1", False),
        ("[::1]", False),
    ],
)
def test_a_wildcard_covers_one_label(host: str, is_covered: bool) -> None:
    registries = RegistryMap()
    registries.replace([], [RegistryWildcard(PKG)])
    parsed = Host.parse(host)
    assert (parsed in registries) == (parsed in HostTable({PKG: 1})) == is_covered
    assert (registries.covering(parsed) is not None) == is_covered
    if is_covered:
        assert registries[parsed] == Registry(parsed)


def test_a_listed_registry_wins() -> None:
    local = Registry.parse("http://local.pkg.dev:443")
    registries = RegistryMap()
    registries.replace([(local.host, local)], [RegistryWildcard(PKG)], excluded=["own.pkg.dev"])
    assert registries[local.host] == local
    assert registries.covering(local.host) is None
    assert Host.parse("own.pkg.dev") not in registries
    assert list(registries.values()) == [local]
    registries.replace([], [RegistryWildcard.parse("http://*.pkg.dev:8080")])
    assert local.host not in registries
    assert registries[Host("a.pkg.dev", 8080)] == Registry(Host("a.pkg.dev", 8080), "http")
    assert HostTable({PKG: 1, local.host: 2})[local.host] == 2
    assert HostTable({local.host: 2}).get(Host.parse("a.pkg.dev")) is None


@given(st.text(max_size=30))
def test_any_text_is_a_key_or_an_error(text: str) -> None:
    try:
        key = parse_host_key(text)
    except NameInvalid:
        return
    assert parse_host_key(str(key)) == key
