"""Platforms in indexes and configurations, which anybody may have written."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.oci.names import Digest
from dockerproxy.oci.platforms import config_platform, index_platforms, platform_name

A, B = Digest.of(b"a"), Digest.of(b"b")


def index(*entries: Any) -> bytes:
    return json.dumps({"manifests": entries}).encode()


def entry(digest: object, **platform: Any) -> dict[str, Any]:
    return {"digest": str(digest), "platform": platform}


def test_an_index_names_the_platform_of_each_image() -> None:
    content = index(entry(A, os="linux", architecture="amd64"), entry(B, os="linux", architecture="arm", variant="v7"))
    assert index_platforms(content) == {A: "linux/amd64", B: "linux/arm/v7"}


def test_attestations_have_no_platform() -> None:
    assert index_platforms(index(entry(A, os="unknown", architecture="unknown"))) == {}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{",
        b'{"manifests": 7}',
        index(7, None, {}, {"platform": 1}),
        index(entry("no digest", os="linux", architecture="amd64")),
        index(entry(A, os="linux")),
        index(entry(A, os="linux", architecture=["amd64"])),
        index(entry(A, os="linux", architecture="amd64\x1b[2J")),
        index(entry(A, os="linux", architecture="a" * 100)),
    ],
)
def test_malformed_entries_are_left_out(content: bytes) -> None:
    assert index_platforms(content) == {}


def test_the_number_of_platforms_has_a_bound() -> None:
    entries = [entry(Digest.of(b"%d" % number), os="linux", architecture=f"a{number}") for number in range(1000)]
    assert len(index_platforms(index(*entries))) == 100


def test_the_platform_in_a_configuration() -> None:
    assert (
        config_platform(b'{"os": "linux", "architecture": "arm64", "variant": "v8", "rootfs": {}}') == "linux/arm64/v8"
    )
    assert config_platform(b'{"os": "linux", "architecture": "amd64", "variant": ""}') == "linux/amd64"
    assert config_platform(b'{"architecture": "amd64"}') is None
    assert config_platform(b"config") is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["os", "architecture", "variant"]), inner),
)


@given(json_values)
def test_a_platform_is_printable_and_short(value: Any) -> None:
    name = platform_name(value)
    assert name is None or (name.isascii() and name.isprintable() and len(name) < 100 and name.count("/") in (1, 2))
