"""Concurrent requests for a digest share one download, and are served while it grows, even if others disconnect."""

from __future__ import annotations

import hashlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from attrs import define

from tests.e2e.harness import images
from tests.e2e.harness.daemon import StartDaemon, TwistdDaemon
from tests.e2e.harness.fake_registry import pause_after, throttled
from tests.e2e.harness.http_client import request_directly
from tests.e2e.harness.http_server import next_event
from tests.e2e.harness.images import ACCEPT_MANIFESTS
from tests.e2e.harness.process import wait_until
from tests.e2e.harness.upstreams import FAKE, REGISTRY, Upstreams

MIB = 1 << 20
CLIENTS = 20


@define
class BlobDownloader:
    """A client that reads a blob to its end; times are seconds of the monotonic clock."""

    daemon: TwistdDaemon
    url: str
    first_byte_time: float = 0.0
    first_byte_event: int = 0
    last_byte_time: float = 0.0
    size: int = 0
    digest: str = ""
    cache_status: str | None = None

    def read(self, started: threading.Semaphore) -> None:
        buffer = memoryview(bytearray(256 * 1024))
        checksum = hashlib.sha256()
        with self.daemon.client.stream("GET", self.url) as response:
            assert response.status == 200
            self.cache_status = response.headers["X-Cache"]
            while count := response.readinto(buffer):
                if not self.size:
                    self.first_byte_time, self.first_byte_event = time.monotonic(), next_event()
                    started.release()
                self.size += count
                checksum.update(buffer[:count])
        self.last_byte_time = time.monotonic()
        self.digest = "sha256:" + checksum.hexdigest()


def test_twenty_clients_share_one_download(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    """The upstream pauses after 4 MiB until all clients have begun, and then sends 20 MB/s."""
    data = images.random_bytes(256 * MIB, "shared by twenty")
    digest = upstreams.fake.put_blob("twenty", data)
    gate = threading.Event()
    upstreams.fake.add_rule("GET", digest, throttled(20e6, 4 * MIB, gate))
    downloaders = [BlobDownloader(daemon, f"{FAKE}/v2/twenty/blobs/{digest}") for _ in range(CLIENTS)]
    started = threading.Semaphore(0)
    memory_before = daemon.resident_bytes
    with ThreadPoolExecutor(CLIENTS) as pool:
        futures = [pool.submit(downloader.read, started) for downloader in downloaders]
        for _ in downloaders:
            assert started.acquire(timeout=30), "some clients have no data while the upstream pauses at 4 MiB"
        [upstream_request] = upstreams.fake.find_requests("GET", digest)
        assert upstream_request.sent_bytes <= 5 * MIB and upstream_request.ended_event is None
        gate.set()
        for future in futures:
            future.result(120)
    assert [request.sent_bytes for request in upstreams.fake.find_requests("GET", digest)] == [len(data)]
    assert {(downloader.size, downloader.digest) for downloader in downloaders} == {(len(data), digest)}
    assert sorted(str(downloader.cache_status) for downloader in downloaders) == ["JOINED"] * (CLIENTS - 1) + ["MISS"]
    ended_event = upstream_request.ended_event
    assert ended_event is not None
    assert all(downloader.first_byte_event < ended_event for downloader in downloaders)
    assert daemon.resident_bytes - memory_before < 96 * MIB  # measured: 7 MB; the blob is 256 MiB, once for all or each
    first_byte_times = [downloader.first_byte_time for downloader in downloaders]
    last_byte_times = [downloader.last_byte_time for downloader in downloaders]
    first_byte_spread = max(first_byte_times) - min(first_byte_times)
    last_byte_spread = max(last_byte_times) - min(last_byte_times)
    print(f"first bytes within {first_byte_spread:.2f} s, last bytes within {last_byte_spread:.2f} s")


def test_late_client_receives_everything(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    data = images.random_bytes(6 * MIB, "late")
    digest = upstreams.fake.put_blob("late", data)
    url = f"{FAKE}/v2/late/blobs/{digest}"
    gate = threading.Event()
    upstreams.fake.add_rule("GET", digest, pause_after(4 * MIB, gate))
    with ExitStack() as stack:
        first_response = stack.enter_context(daemon.client.stream("GET", url))
        first_part = first_response.read(3 * MIB)
        late_response = stack.enter_context(daemon.client.stream("GET", url))
        assert late_response.headers["X-Cache"] == "JOINED"
        assert late_response.read(3 * MIB) == first_part == data[: 3 * MIB]
        range_response = stack.enter_context(daemon.client.stream("GET", url, {"Range": "bytes=1000000-1999999"}))
        assert (range_response.status, range_response.read()) == (206, data[1_000_000:2_000_000])
        future_range_response = stack.enter_context(daemon.client.stream("GET", url, {"Range": f"bytes={5 * MIB}-"}))
        gate.set()
        assert future_range_response.read() == data[5 * MIB :]
        assert late_response.read() == first_response.read() == data[3 * MIB :]
    assert len(upstreams.fake.find_requests("GET", digest)) == 1


def test_first_client_disconnects(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    data = images.random_bytes(6 * MIB, "leaving")
    digest = upstreams.fake.put_blob("leaving", data)
    url = f"{FAKE}/v2/leaving/blobs/{digest}"
    gate = threading.Event()
    upstreams.fake.add_rule("GET", digest, pause_after(2 * MIB, gate))
    with ExitStack() as stack:
        with daemon.client.stream("GET", url) as first_response:
            assert first_response.read(MIB) == data[:MIB]
            second_response = stack.enter_context(daemon.client.stream("GET", url))
            assert second_response.read(MIB) == data[:MIB]
        gate.set()
        assert second_response.read() == data[MIB:]
    assert len(upstreams.fake.find_requests("GET", digest)) == 1


def test_download_continues_without_clients(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    data = images.random_bytes(6 * MIB, "deserted")
    digest = upstreams.fake.put_blob("deserted", data)
    url = f"{FAKE}/v2/deserted/blobs/{digest}"
    gate = threading.Event()
    upstreams.fake.add_rule("GET", digest, pause_after(2 * MIB, gate))
    with daemon.client.stream("GET", url) as first_response:
        first_response.read(MIB)
    request_directly("GET", f"{daemon.url}/healthz")  # after its response, the daemon has noticed the disconnect
    gate.set()
    [upstream_request] = upstreams.fake.find_requests("GET", digest)
    wait_until(lambda: upstream_request.ended_event is not None, "the end of the download")
    assert upstream_request.sent_bytes == len(data)
    second_response = daemon.client.get(url)
    assert second_response.body == data
    assert second_response.cache_status in ("HIT", "JOINED")
    assert len(upstreams.fake.find_requests("GET", digest)) == 1


def test_a_slow_client_does_not_slow_the_others(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    data = images.random_bytes(48 * MIB, "slow reader")
    digest = upstreams.fake.put_blob("slow/reader", data)
    url = f"{FAKE}/v2/slow/reader/blobs/{digest}"
    with daemon.client.stream("GET", url) as slow_response:
        assert slow_response.read(1000) == data[:1000]  # and nothing more until the other client is done
        assert daemon.client.get(url).body == data
        assert slow_response.read() == data[1000:]
    assert len(upstreams.fake.find_requests("GET", digest)) == 1


def test_one_download_for_two_repositories(upstreams: Upstreams, daemon: TwistdDaemon) -> None:
    data = images.random_bytes(3 * MIB, "two names")
    digest = upstreams.fake.put_blob("one/name", data)
    upstreams.fake.put_blob("other/name", data)
    gate = threading.Event()
    upstreams.fake.add_rule("GET", digest, pause_after(MIB, gate))
    with ExitStack() as stack:
        first_response = stack.enter_context(daemon.client.stream("GET", f"{FAKE}/v2/one/name/blobs/{digest}"))
        assert first_response.read(1000) == data[:1000]
        second_response = stack.enter_context(daemon.client.stream("GET", f"{FAKE}/v2/other/name/blobs/{digest}"))
        assert second_response.read(1000) == data[:1000]
        gate.set()
        assert first_response.read() == second_response.read() == data[1000:]
    # The other repository is asked for the first byte only.
    requests = [(request.path, request.headers.get("range")) for request in upstreams.fake.find_requests("GET", digest)]
    assert requests == [(f"/v2/one/name/blobs/{digest}", None), (f"/v2/other/name/blobs/{digest}", "bytes=0-0")]


def test_tag_requests_are_collapsed(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    """Ten clients send requests before upstream responds.

    The response to a later request, to another registry, shows that the daemon has received all ten.
    """
    daemon = start_daemon(WORKERS="1")
    image = images.build_small_image("asked once")
    upstreams.fake.put("asked/once", "1", image)
    gate = threading.Event()
    upstreams.fake.add_rule("GET", "/asked/once/manifests/1", pause_after(0, gate))
    connections = [daemon.client.new_connection(FAKE) for _ in range(10)]
    try:
        for connection in connections:
            connection.request("GET", "/v2/asked/once/manifests/1", headers={"Accept": ACCEPT_MANIFESTS})
        assert daemon.client.get(f"{REGISTRY}/v2/").status == 200
        gate.set()
        assert {connection.getresponse().read() for connection in connections} == {image.manifest.data}
    finally:
        gate.set()
        for connection in connections:
            connection.close()
    assert len(upstreams.fake.find_requests("GET", "/asked/once/manifests/1")) == 1
