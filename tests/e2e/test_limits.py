"""Limits of room: the least recently used go first, what is too large passes, a full disk stops nobody."""

from __future__ import annotations

import http.client
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.house import images
from tests.e2e.house.daemon import Proxy, RunProxy
from tests.e2e.house.fake_registry import chunked, gated
from tests.e2e.house.images import EVERY_MANIFEST
from tests.e2e.house.process import eventually, need
from tests.e2e.house.upstreams import FAKE, Upstreams
from tests.e2e.house.wire import request

MIB = 1 << 20


def test_the_least_recently_used_go(upstreams: Upstreams, run_proxy: RunProxy) -> None:
    proxy = run_proxy(CACHE_MAX_SIZE="10m")
    urls = [_blob(upstreams, "lru", 3 * MIB, str(number)) for number in range(4)]
    for url in urls[:3]:
        assert proxy.client.get(url).verdict == "MISS"
    assert proxy.client.get(urls[0]).verdict == "HIT"  # used again: 1 is the oldest now
    assert proxy.client.get(urls[3]).verdict == "MISS"
    eventually(lambda: _held(proxy) <= 10 * MIB, "less than the limit on disk")
    assert [proxy.client.get(urls[number]).verdict for number in (0, 2, 3)] == ["HIT"] * 3
    assert proxy.client.get(urls[1]).verdict == "MISS"
    eventually(lambda: _held(proxy) <= 10 * MIB, "less than the limit on disk")


def test_the_limit_holds_over_a_restart(upstreams: Upstreams, run_proxy: RunProxy) -> None:
    proxy = run_proxy(CACHE_MAX_SIZE="20m")
    for number in range(6):
        proxy.client.get(_blob(upstreams, "restart", 3 * MIB, str(number)))
    proxy.stop()
    proxy.environment["CACHE_MAX_SIZE"] = "10m"
    proxy.start()
    eventually(lambda: _held(proxy) <= 10 * MIB, "less than the new limit on disk")
    for number in range(6):
        url = _blob(upstreams, "restart", 3 * MIB, str(number))
        assert proxy.client.get(url).body == images.noise(3 * MIB, f"restart/{number}")


def test_what_is_larger_than_the_limit_passes_uncached(upstreams: Upstreams, run_proxy: RunProxy) -> None:
    proxy = run_proxy(CACHE_MAX_SIZE="8m")
    small = _blob(upstreams, "limit", MIB, "small")
    proxy.client.get(small)
    url = _blob(upstreams, "limit", 12 * MIB, "large")
    for _ in range(2):
        answer = proxy.client.get(url)
        assert answer.body == images.noise(12 * MIB, "limit/large")
        assert answer.verdict in ("MISS", "PASS")
    part = proxy.client.get(url, Range=f"bytes={11 * MIB}-")
    assert (part.status, part.body) == (206, images.noise(12 * MIB, "limit/large")[11 * MIB :])
    assert _held(proxy) <= 8 * MIB
    assert proxy.client.get(small).verdict == "HIT"  # nothing was thrown out for it


def test_what_is_being_read_is_not_evicted(upstreams: Upstreams, run_proxy: RunProxy) -> None:
    proxy = run_proxy(CACHE_MAX_SIZE="8m")
    url = _blob(upstreams, "reading", 6 * MIB, "open")
    proxy.client.get(url)
    with proxy.client.open("GET", url) as response:
        beginning = response.read(1000)
        for number in range(3):
            other = proxy.client.get(_blob(upstreams, "reading", 5 * MIB, str(number)))
            assert other.body == images.noise(5 * MIB, f"reading/{number}")
        assert beginning + response.read() == images.noise(6 * MIB, "reading/open")


def test_what_is_under_way_is_not_evicted(upstreams: Upstreams, run_proxy: RunProxy) -> None:
    proxy = run_proxy(CACHE_MAX_SIZE="8m")
    url = _blob(upstreams, "arriving", 5 * MIB, "slow")
    gate = threading.Event()
    upstreams.fake.on("GET", url.rpartition("/")[2], gated(2 * MIB, gate), times=1)
    with proxy.client.open("GET", url) as response:
        beginning = response.read(MIB)
        for number in range(4):
            assert proxy.client.get(_blob(upstreams, "arriving", 2 * MIB, str(number))).status == 200
        gate.set()
        assert beginning + response.read() == images.noise(5 * MIB, "arriving/slow")
    assert proxy.client.get(url).verdict == "HIT"


def test_an_evicted_layer_comes_back(upstreams: Upstreams, run_proxy: RunProxy) -> None:
    """A manifest that is cached while its layers are not: they are fetched."""
    proxy = run_proxy(CACHE_MAX_SIZE="4m")
    image = images.small("evicted layer", size=MIB)
    upstreams.fake.put("evicted", "1", image)
    for _ in range(2):
        assert proxy.client.get(f"{FAKE}/v2/evicted/manifests/1", Accept=EVERY_MANIFEST).body == image.manifest.data
        for blob in image.blobs:
            assert proxy.client.get(f"{FAKE}/v2/evicted/blobs/{blob.digest}").body == blob.data
        proxy.client.get(_blob(upstreams, "evicted", 3 * MIB, "other"))


def test_what_nobody_reads_goes(upstreams: Upstreams, run_proxy: RunProxy) -> None:
    proxy = run_proxy(CACHE_INACTIVE="1s")
    url = _blob(upstreams, "inactive", 3 * MIB, "old")
    proxy.client.get(url)
    proxy.stop()
    threading.Event().wait(1.2)
    proxy.start()  # old things are looked for at start, and from time to time
    eventually(lambda: _held(proxy) < MIB, "an empty cache")
    assert proxy.client.get(url).verdict == "MISS"


def test_a_client_that_takes_nothing_is_let_go(upstreams: Upstreams, run_proxy: RunProxy) -> None:
    proxy = run_proxy(SEND_TIMEOUT="1s")
    url = _blob(upstreams, "taking/nothing", 48 * MIB, "large")
    with proxy.client.open("GET", url) as response:
        assert response.read(1000)
        eventually(lambda: any("/taking/nothing/" in line.target for line in proxy.logged()), "the end of the request")
        with pytest.raises((http.client.IncompleteRead, OSError)):
            response.read()
    assert proxy.client.get(url).body == images.noise(48 * MIB, "taking/nothing/large")


def test_memory_is_flat_however_large_the_blob_and_slow_its_readers(upstreams: Upstreams, run_proxy: RunProxy) -> None:
    proxy = run_proxy()
    url = _blob(upstreams, "flat", 128 * MIB, "large")
    with ExitStack() as stack:
        before = proxy.memory
        readers = [stack.enter_context(proxy.client.open("GET", url)) for _ in range(30)]
        for reader in readers:
            assert reader.read(1000)
        assert proxy.client.get(url).status == 200  # it is all here now, and thirty still want nearly all of it
        assert proxy.memory - before < 64 * MIB


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    need("mount", root=True)
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_stops_nobody(upstreams: Upstreams, run_proxy: RunProxy, small_disk: Path) -> None:
    proxy = run_proxy(CACHE_DIR=str(small_disk))
    url = _blob(upstreams, "full", 20 * MIB, "large")
    for _ in range(2):
        assert proxy.client.get(url).body == images.noise(20 * MIB, "full/large")
    image = images.small("full disk", size=3 * MIB, layers=4)
    upstreams.fake.put("full/image", "1", image)
    for _ in range(2):
        assert proxy.client.get(f"{FAKE}/v2/full/image/manifests/1", Accept=EVERY_MANIFEST).body == image.manifest.data
        for blob in image.blobs:
            assert proxy.client.get(f"{FAKE}/v2/full/image/blobs/{blob.digest}").body == blob.data


def test_a_disk_that_fills_up_under_way(upstreams: Upstreams, run_proxy: RunProxy, small_disk: Path) -> None:
    """Its length untold, nobody can see in time that it does not fit."""
    proxy = run_proxy(CACHE_DIR=str(small_disk))
    url = _blob(upstreams, "filling", 20 * MIB, "large")
    upstreams.fake.on("GET", url.rpartition("/")[2], chunked, times=1)
    assert proxy.client.get(url).body == images.noise(20 * MIB, "filling/large")
    assert request("GET", f"{proxy.url}/healthz").status == 200


def _blob(upstreams: Upstreams, name: str, size: int, seed: str) -> str:
    """Return the URL of a blob of so many bytes."""
    digest = upstreams.fake.put_blob(name, images.noise(size, f"{name}/{seed}"))
    return f"{FAKE}/v2/{name}/blobs/{digest}"


def _held(proxy: Proxy) -> int:
    """Return the bytes that the cache's files have."""
    total = 0
    for path in (proxy.state / "cache").rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue  # evicted just now
    return total
