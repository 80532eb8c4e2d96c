"""Cache limits: least recently used blobs are evicted, too large blobs are not cached, and a full disk is no error."""

from __future__ import annotations

import http.client
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.harness import images
from tests.e2e.harness.daemon import StartDaemon, TwistdDaemon
from tests.e2e.harness.fake_registry import pause_after, respond_chunked
from tests.e2e.harness.http_client import request_directly
from tests.e2e.harness.images import ACCEPT_MANIFESTS
from tests.e2e.harness.process import mount_tmpfs, wait_until
from tests.e2e.harness.upstreams import FAKE, Upstreams

MIB = 1 << 20


def test_least_recently_used_blob_is_evicted(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    daemon = start_daemon(CACHE_MAX_SIZE="10m")
    urls = [put_blob_and_get_url(upstreams, "lru", 3 * MIB, str(number)) for number in range(4)]
    for url in urls[:3]:
        assert daemon.client.get(url).cache_status == "MISS"
    assert daemon.client.get(urls[0]).cache_status == "HIT"  # now blob 1 is the least recently used
    assert daemon.client.get(urls[3]).cache_status == "MISS"
    wait_until(lambda: cache_bytes_on_disk(daemon) <= 10 * MIB, "the cache is within its limit")
    assert [daemon.client.get(urls[number]).cache_status for number in (0, 2, 3)] == ["HIT"] * 3
    assert daemon.client.get(urls[1]).cache_status == "MISS"
    wait_until(lambda: cache_bytes_on_disk(daemon) <= 10 * MIB, "the cache is within its limit")


def test_cache_limit_applies_after_a_restart(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    daemon = start_daemon(CACHE_MAX_SIZE="20m")
    for number in range(6):
        daemon.client.get(put_blob_and_get_url(upstreams, "restart", 3 * MIB, str(number)))
    daemon.stop()
    daemon.environment["CACHE_MAX_SIZE"] = "10m"
    daemon.start()
    wait_until(lambda: cache_bytes_on_disk(daemon) <= 10 * MIB, "the cache is within its new limit")
    for number in range(6):
        url = put_blob_and_get_url(upstreams, "restart", 3 * MIB, str(number))
        assert daemon.client.get(url).body == images.random_bytes(3 * MIB, f"restart/{number}")


def test_blob_larger_than_the_limit_is_not_cached(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    daemon = start_daemon(CACHE_MAX_SIZE="8m")
    small_url = put_blob_and_get_url(upstreams, "limit", MIB, "small")
    daemon.client.get(small_url)
    url = put_blob_and_get_url(upstreams, "limit", 12 * MIB, "large")
    for _ in range(2):
        response = daemon.client.get(url)
        assert response.body == images.random_bytes(12 * MIB, "limit/large")
        assert response.cache_status in ("MISS", "PASS")
    range_response = daemon.client.get(url, Range=f"bytes={11 * MIB}-")
    assert (range_response.status, range_response.body) == (
        206,
        images.random_bytes(12 * MIB, "limit/large")[11 * MIB :],
    )
    assert cache_bytes_on_disk(daemon) <= 8 * MIB
    assert daemon.client.get(small_url).cache_status == "HIT"  # the large blob has evicted nothing


def test_blob_being_read_is_not_evicted(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    daemon = start_daemon(CACHE_MAX_SIZE="8m")
    url = put_blob_and_get_url(upstreams, "reading", 6 * MIB, "open")
    daemon.client.get(url)
    with daemon.client.stream("GET", url) as response:
        first_part = response.read(1000)
        for number in range(3):
            other_response = daemon.client.get(put_blob_and_get_url(upstreams, "reading", 5 * MIB, str(number)))
            assert other_response.body == images.random_bytes(5 * MIB, f"reading/{number}")
        assert first_part + response.read() == images.random_bytes(6 * MIB, "reading/open")


def test_download_in_progress_is_not_evicted(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    daemon = start_daemon(CACHE_MAX_SIZE="8m")
    url = put_blob_and_get_url(upstreams, "arriving", 5 * MIB, "slow")
    gate = threading.Event()
    upstreams.fake.add_rule("GET", url.rpartition("/")[2], pause_after(2 * MIB, gate), times=1)
    with daemon.client.stream("GET", url) as response:
        first_part = response.read(MIB)
        for number in range(4):
            assert daemon.client.get(put_blob_and_get_url(upstreams, "arriving", 2 * MIB, str(number))).status == 200
        gate.set()
        assert first_part + response.read() == images.random_bytes(5 * MIB, "arriving/slow")
    assert daemon.client.get(url).cache_status == "HIT"


def test_evicted_layer_is_fetched_again(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    """If a manifest is cached but its layers were evicted, the daemon fetches the layers again."""
    daemon = start_daemon(CACHE_MAX_SIZE="4m")
    image = images.build_small_image("evicted layer", size=MIB)
    upstreams.fake.put("evicted", "1", image)
    for _ in range(2):
        assert daemon.client.get(f"{FAKE}/v2/evicted/manifests/1", Accept=ACCEPT_MANIFESTS).body == image.manifest.data
        for blob in image.blobs:
            assert daemon.client.get(f"{FAKE}/v2/evicted/blobs/{blob.digest}").body == blob.data
        daemon.client.get(put_blob_and_get_url(upstreams, "evicted", 3 * MIB, "other"))
    misses = [line.because for line in daemon.access_log() if image.layers[0].digest in line.target]
    assert misses[0] == "new" and re.fullmatch(r"evicted \d{4}-\d\d-\d\d \d+[sm]", misses[1])
    daemon.restart()
    layer_url = f"{FAKE}/v2/evicted/blobs/{image.layers[0].digest}"
    assert re.fullmatch(r"evicted .*[sm]", daemon.client.get(layer_url).headers["x-cache-because"])


def test_inactive_blob_is_evicted(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    daemon = start_daemon(CACHE_INACTIVE="1s")
    url = put_blob_and_get_url(upstreams, "inactive", 3 * MIB, "old")
    daemon.client.get(url)
    daemon.stop()
    threading.Event().wait(1.2)
    daemon.start()  # inactive blobs are evicted at the start, and from time to time
    wait_until(lambda: cache_bytes_on_disk(daemon) < MIB, "the cache is empty")
    assert daemon.client.get(url).cache_status == "MISS"


def test_send_timeout_closes_stalled_client(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    daemon = start_daemon(SEND_TIMEOUT="1s")
    url = put_blob_and_get_url(upstreams, "taking/nothing", 48 * MIB, "large")
    with daemon.client.stream("GET", url) as response:
        assert response.read(1000)
        wait_until(
            lambda: any("/taking/nothing/" in line.target for line in daemon.access_log()), "the stalled request ends"
        )
        with pytest.raises((http.client.IncompleteRead, OSError)):
            response.read()
    assert daemon.client.get(url).body == images.random_bytes(48 * MIB, "taking/nothing/large")


def test_memory_stays_flat_with_slow_clients(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    url = put_blob_and_get_url(upstreams, "flat", 128 * MIB, "large")
    with ExitStack() as stack:
        memory_before = daemon.resident_bytes
        slow_responses = [stack.enter_context(daemon.client.stream("GET", url)) for _ in range(30)]
        for slow_response in slow_responses:
            assert slow_response.read(1000)
        assert daemon.client.get(url).status == 200  # the download is complete, and thirty clients still wait for data
        assert daemon.resident_bytes - memory_before < 64 * MIB  # measured: 14 MB; the blob alone is 128 MiB


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return the mount point of a file system of 8 MiB."""
    with mount_tmpfs(tmp_path / "disk", "8m") as folder:
        yield folder


def test_pull_succeeds_on_a_full_disk(upstreams: Upstreams, start_daemon: StartDaemon, small_disk: Path) -> None:
    daemon = start_daemon(CACHE_DIR=str(small_disk))
    url = put_blob_and_get_url(upstreams, "full", 20 * MIB, "large")
    for _ in range(2):
        assert daemon.client.get(url).body == images.random_bytes(20 * MIB, "full/large")
    image = images.build_small_image("full disk", size=3 * MIB, layers=4)
    upstreams.fake.put("full/image", "1", image)
    for _ in range(2):
        assert (
            daemon.client.get(f"{FAKE}/v2/full/image/manifests/1", Accept=ACCEPT_MANIFESTS).body == image.manifest.data
        )
        for blob in image.blobs:
            assert daemon.client.get(f"{FAKE}/v2/full/image/blobs/{blob.digest}").body == blob.data


def test_disk_fills_up_during_a_download(upstreams: Upstreams, start_daemon: StartDaemon, small_disk: Path) -> None:
    """Without a Content-Length, the daemon cannot know in advance that the blob does not fit."""
    daemon = start_daemon(CACHE_DIR=str(small_disk))
    url = put_blob_and_get_url(upstreams, "filling", 20 * MIB, "large")
    upstreams.fake.add_rule("GET", url.rpartition("/")[2], respond_chunked, times=1)
    assert daemon.client.get(url).body == images.random_bytes(20 * MIB, "filling/large")
    assert request_directly("GET", f"{daemon.url}/healthz").status == 200


def put_blob_and_get_url(upstreams: Upstreams, name: str, size: int, seed: str) -> str:
    """Put a random blob of `size` bytes into the fake registry, and return its URL."""
    digest = upstreams.fake.put_blob(name, images.random_bytes(size, f"{name}/{seed}"))
    return f"{FAKE}/v2/{name}/blobs/{digest}"


def cache_bytes_on_disk(daemon: TwistdDaemon) -> int:
    """Return the total size of the cache's files in bytes."""
    total = 0
    for path in (daemon.state_folder / "cache").rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue  # the file was evicted after it was listed
    return total
