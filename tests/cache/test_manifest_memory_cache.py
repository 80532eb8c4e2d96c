"""Tests of the memory cache of manifests: expiry and limit of size."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.task import Clock

from dockerproxy.cache.manifests import ManifestMemoryCache
from dockerproxy.oci.content import ManifestResponse
from dockerproxy.oci.names import Digest

MAX_TOTAL, OVERHEAD, MAX_MANIFEST_SIZE = 4 * 1024 * 1024, 1024, 256 * 1024


def manifest(content: bytes, media_type: str = "a/b") -> ManifestResponse:
    return ManifestResponse(Digest.of(content), media_type, len(content), content, "HIT")


def test_key_is_repository_and_digest() -> None:
    cache, one = ManifestMemoryCache(Clock().seconds), manifest(b"1")
    cache.add("a", one)
    assert cache.get("a", one.digest) is one
    assert cache.get("b", one.digest) is None
    assert cache.get("a", Digest.of(b"2")) is None


@pytest.mark.parametrize(("seconds", "is_cached"), [(29.9, True), (30, False), (-1, False)])
def test_entries_expire(seconds: float, is_cached: bool) -> None:
    now = [1000.0]
    cache, one = ManifestMemoryCache(lambda: now[0]), manifest(b"1")
    cache.add("a", one)
    now[0] += seconds
    assert (cache.get("a", one.digest) is one) is is_cached
    now[0] = 1000
    assert (cache.get("a", one.digest) is one) is is_cached


def test_adding_again_renews_entry() -> None:
    clock = Clock()
    cache = ManifestMemoryCache(clock.seconds)
    cache.add("a", manifest(b"1"))
    clock.advance(29)
    cache.add("a", manifest(b"1", "c/d"))
    clock.advance(29)
    manifest_found = cache.get("a", Digest.of(b"1"))
    assert manifest_found is not None
    assert manifest_found.media_type == "c/d"


def test_removed_entry() -> None:
    cache, one = ManifestMemoryCache(Clock().seconds), manifest(b"1")
    cache.add("a", one)
    cache.remove("a", one.digest)
    cache.remove("a", one.digest)
    assert cache.get("a", one.digest) is None


@given(
    st.lists(
        st.sampled_from([0, 1000, MAX_MANIFEST_SIZE // 2, MAX_MANIFEST_SIZE - 10, MAX_MANIFEST_SIZE]),
        min_size=20,
        max_size=60,
    )
)
def test_total_size_is_bounded(sizes: list[int]) -> None:
    cache = ManifestMemoryCache(Clock().seconds)
    manifests = [manifest(b"%d," % number + bytes(size)) for number, size in enumerate(sizes)]
    for one in manifests:
        cache.add("a", one)
    remaining, expected = MAX_TOTAL, []
    for one in reversed([one for one in manifests if one.size <= MAX_MANIFEST_SIZE]):
        remaining -= one.size + OVERHEAD
        if remaining < 0:
            break
        expected.append(one.digest)
    assert [one.digest for one in reversed(manifests) if cache.get("a", one.digest) is not None] == expected
