"""One download per digest, however many ask; everyone is served while it grows, and whoever leaves harms nobody."""

from __future__ import annotations

import hashlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from attrs import define

from tests.e2e.house import images
from tests.e2e.house.daemon import Proxy, RunProxy
from tests.e2e.house.fake_registry import gated, paced
from tests.e2e.house.images import EVERY_MANIFEST
from tests.e2e.house.process import eventually
from tests.e2e.house.serving import moment
from tests.e2e.house.upstreams import FAKE, REGISTRY, Upstreams
from tests.e2e.house.wire import request

MIB = 1 << 20
CLIENTS = 20


@define
class Reader:
    """A client that reads a blob to its end; times are seconds of the monotonic clock."""

    proxy: Proxy
    url: str
    first: float = 0.0
    first_moment: int = 0
    last: float = 0.0
    size: int = 0
    digest: str = ""
    verdict: str | None = None

    def read(self, started: threading.Semaphore) -> None:
        buffer = memoryview(bytearray(256 * 1024))
        checksum = hashlib.sha256()
        with self.proxy.client.open("GET", self.url) as response:
            assert response.status == 200
            self.verdict = response.headers["X-Cache"]
            while count := response.readinto(buffer):
                if not self.size:
                    self.first, self.first_moment = time.monotonic(), moment()
                    started.release()
                self.size += count
                checksum.update(buffer[:count])
        self.last = time.monotonic()
        self.digest = "sha256:" + checksum.hexdigest()


def test_twenty_cold_clients_and_one_download(upstreams: Upstreams, proxy: Proxy) -> None:
    """The upstream stops after 4 MiB until all clients have begun, then goes on at 20 MB/s."""
    data = images.noise(256 * MIB, "shared by twenty")
    digest = upstreams.fake.put_blob("twenty", data)
    gate = threading.Event()
    upstreams.fake.on("GET", digest, paced(20e6, 4 * MIB, gate))
    readers = [Reader(proxy, f"{FAKE}/v2/twenty/blobs/{digest}") for _ in range(CLIENTS)]
    started = threading.Semaphore(0)
    memory = proxy.memory
    with ThreadPoolExecutor(CLIENTS) as pool:
        futures = [pool.submit(reader.read, started) for reader in readers]
        for _ in readers:
            assert started.acquire(timeout=30), "not all have their first bytes while the upstream waits at 4 MiB"
        [fetched] = upstreams.fake.seen("GET", digest)
        assert fetched.sent <= 5 * MIB and fetched.ended is None
        gate.set()
        for future in futures:
            future.result(120)
    assert [seen.sent for seen in upstreams.fake.seen("GET", digest)] == [len(data)]
    assert {(reader.size, reader.digest) for reader in readers} == {(len(data), digest)}
    assert sorted(str(reader.verdict) for reader in readers) == ["JOINED"] * (CLIENTS - 1) + ["MISS"]
    assert fetched.ended is not None and all(reader.first_moment < fetched.ended for reader in readers)
    assert proxy.memory - memory < 96 * MIB
    firsts, lasts = sorted(reader.first for reader in readers), sorted(reader.last for reader in readers)
    print(f"first bytes within {firsts[-1] - firsts[0]:.2f} s, last ones within {lasts[-1] - lasts[0]:.2f} s")


def test_a_late_client_has_all_from_the_start(upstreams: Upstreams, proxy: Proxy) -> None:
    data = images.noise(6 * MIB, "late")
    digest = upstreams.fake.put_blob("late", data)
    url = f"{FAKE}/v2/late/blobs/{digest}"
    gate = threading.Event()
    upstreams.fake.on("GET", digest, gated(4 * MIB, gate))
    with ExitStack() as stack:
        first = stack.enter_context(proxy.client.open("GET", url))
        beginning = first.read(3 * MIB)
        late = stack.enter_context(proxy.client.open("GET", url))
        assert late.headers["X-Cache"] == "JOINED"
        assert late.read(3 * MIB) == beginning == data[: 3 * MIB]
        part = stack.enter_context(proxy.client.open("GET", url, {"Range": "bytes=1000000-1999999"}))
        assert (part.status, part.read()) == (206, data[1_000_000:2_000_000])
        behind = stack.enter_context(proxy.client.open("GET", url, {"Range": f"bytes={5 * MIB}-"}))
        gate.set()
        assert behind.read() == data[5 * MIB :]
        assert late.read() == first.read() == data[3 * MIB :]
    assert len(upstreams.fake.seen("GET", digest)) == 1


def test_the_first_client_leaves(upstreams: Upstreams, proxy: Proxy) -> None:
    data = images.noise(6 * MIB, "leaving")
    digest = upstreams.fake.put_blob("leaving", data)
    url = f"{FAKE}/v2/leaving/blobs/{digest}"
    gate = threading.Event()
    upstreams.fake.on("GET", digest, gated(2 * MIB, gate))
    with ExitStack() as stack:
        with proxy.client.open("GET", url) as first:
            assert first.read(MIB) == data[:MIB]
            second = stack.enter_context(proxy.client.open("GET", url))
            assert second.read(MIB) == data[:MIB]
        gate.set()
        assert second.read() == data[MIB:]
    assert len(upstreams.fake.seen("GET", digest)) == 1


def test_everyone_leaves_and_the_download_goes_on(upstreams: Upstreams, proxy: Proxy) -> None:
    data = images.noise(6 * MIB, "deserted")
    digest = upstreams.fake.put_blob("deserted", data)
    url = f"{FAKE}/v2/deserted/blobs/{digest}"
    gate = threading.Event()
    upstreams.fake.on("GET", digest, gated(2 * MIB, gate))
    with proxy.client.open("GET", url) as first:
        first.read(MIB)
    request("GET", f"{proxy.url}/healthz")  # it has seen by now that nobody is left
    gate.set()
    [fetched] = upstreams.fake.seen("GET", digest)
    eventually(lambda: fetched.ended is not None, "the end of the download")
    assert fetched.sent == len(data)
    again = proxy.client.get(url)
    assert again.body == data
    assert again.verdict in ("HIT", "JOINED")
    assert len(upstreams.fake.seen("GET", digest)) == 1


def test_a_slow_client_does_not_slow_the_others(upstreams: Upstreams, proxy: Proxy) -> None:
    data = images.noise(48 * MIB, "slow reader")
    digest = upstreams.fake.put_blob("slow/reader", data)
    url = f"{FAKE}/v2/slow/reader/blobs/{digest}"
    with proxy.client.open("GET", url) as slow:
        assert slow.read(1000) == data[:1000]  # and no more for now
        assert proxy.client.get(url).body == data
        assert slow.read() == data[1000:]
    assert len(upstreams.fake.seen("GET", digest)) == 1


def test_one_download_for_two_repositories(upstreams: Upstreams, proxy: Proxy) -> None:
    data = images.noise(3 * MIB, "two names")
    digest = upstreams.fake.put_blob("one/name", data)
    upstreams.fake.put_blob("other/name", data)
    gate = threading.Event()
    upstreams.fake.on("GET", digest, gated(MIB, gate))
    with ExitStack() as stack:
        one = stack.enter_context(proxy.client.open("GET", f"{FAKE}/v2/one/name/blobs/{digest}"))
        assert one.read(1000) == data[:1000]
        other = stack.enter_context(proxy.client.open("GET", f"{FAKE}/v2/other/name/blobs/{digest}"))
        assert other.read(1000) == data[:1000]
        gate.set()
        assert one.read() == other.read() == data[1000:]
    assert len(upstreams.fake.seen("GET", digest)) == 1
    assert len(upstreams.fake.seen("HEAD", f"/other/name/blobs/{digest}")) == 1


def test_a_tag_is_asked_for_once(upstreams: Upstreams, run_proxy: RunProxy) -> None:
    """Ten clients ask while upstream thinks; a question of later on was answered, so all ten have arrived."""
    proxy = run_proxy(WORKERS="1")
    image = images.small("asked once")
    upstreams.fake.put("asked/once", "1", image)
    gate = threading.Event()
    upstreams.fake.on("GET", "/asked/once/manifests/1", gated(0, gate))
    connections = [proxy.client.connection(FAKE) for _ in range(10)]
    try:
        for connection in connections:
            connection.request("GET", "/v2/asked/once/manifests/1", headers={"Accept": EVERY_MANIFEST})
        assert proxy.client.get(f"{REGISTRY}/v2/").status == 200
        gate.set()
        assert {connection.getresponse().read() for connection in connections} == {image.manifest.data}
    finally:
        gate.set()
        for connection in connections:
            connection.close()
    assert len(upstreams.fake.seen("GET", "/asked/once/manifests/1")) == 1
