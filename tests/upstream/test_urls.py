"""Tests for splitting URLs and resolving redirects."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.errors import UpstreamBroken
from dockerproxy.oci.names import Host, Registry
from dockerproxy.upstream.urls import resolve_location, split_url


@pytest.mark.parametrize(
    ("url", "origin", "target"),
    [
        ("https://quay.io/v2/", "https://quay.io", "/v2/"),
        ("HTTPS://Quay.IO", "https://quay.io", "/"),
        ("https://quay.io?x=1", "https://quay.io", "/?x=1"),
        ("http://h:5000/a%2Fb//c;d=e/?&x=%20#frag", "http://h:5000", "/a%2Fb//c;d=e/?&x=%20"),
        ("https://[::1]:8443/?", "https://[::1]:8443", "/?"),
        ("https://h:80//x", "https://h:80", "//x"),
    ],
)
def test_split_url(url: str, origin: str, target: str) -> None:
    assert split_url(url) == (Registry.parse(origin), target)


@pytest.mark.parametrize(
    "url",
    ["", "/v2/", "ftp://h/", "https:///x", "https://u:p@h/", "https://h:0/", "https://h\\@i/", "https://h/\r\nX: y",
     "https://h/ä", "https://h/" + "x" * 20000, "file:///etc/passwd", "https://h:443x/"],
)  # fmt: skip
def test_invalid_urls_are_refused(url: str) -> None:
    with pytest.raises(UpstreamBroken) as caught:
        split_url(url)
    assert "/" not in caught.value.message.replace("http or https", "")  # the error contains no part of the URL


@pytest.mark.parametrize(
    ("location", "url"),
    [
        ("https://cdn.example/x?sig=a%2Bb&y", "https://cdn.example/x?sig=a%2Bb&y"),
        ("//cdn.example/x", "https://cdn.example/x"),
        ("/x/../y?z", "https://h:1/y?z"),
        ("c?q", "https://h:1/v2/a/c?q"),
        ("../c", "https://h:1/v2/c"),
        ("?q=2", "https://h:1/v2/a/b?q=2"),
        ("/with space/ä", "https://h:1/with%20space/%E4"),
        ("/next\r\n", "https://h:1/next%0D%0A"),
    ],
)
def test_resolve_location(location: str, url: str) -> None:
    assert resolve_location("https://h:1/v2/a/b?q=1", location) == url


@given(st.text(st.characters(min_codepoint=0, max_codepoint=255), max_size=60))
def test_location_cannot_break_the_request_line(location: str) -> None:
    try:
        _, target = split_url(resolve_location("https://h/v2/", location))
    except UpstreamBroken:
        return
    assert target.startswith("/")
    assert all(33 <= ord(char) <= 126 for char in target)


def test_host_and_port_are_parsed_once() -> None:
    assert split_url("https://registry.example:5000/x")[0].host == Host("registry.example", 5000)
