"""Room in the cache: a hostile registry and its clients cannot empty the cache, nor keep others' blobs out of it.

The attackers are a hostile registry that announces, drips or never ends what it sends, and clients without a login that
ask for it, leave, or do not read what they asked for.
"""

from __future__ import annotations

import http.client
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.harness.fake_registry import ResponseBehaviour
from tests.e2e.harness.http_server import HTTPExchange
from tests.e2e.harness.images import TypedContent, random_bytes, sha256_digest
from tests.e2e.harness.process import wait_until
from tests.e2e.harness.registry_daemon import RegistryDaemon
from tests.hostile.conftest import EVIL, GOOD, HostileNetwork, StartRegistryDaemon
from tests.hostile.processes import debug, debug_bounds

MIB = 1 << 20

CACHE = {"CACHE_MAX_SIZE": "10m"}


class Cache:
    """A daemon with a cache of 10 MiB that has eight blobs of 1 MiB from the honest registry."""

    def __init__(self, network: HostileNetwork, daemon: RegistryDaemon) -> None:
        self._network = network
        self.daemon = daemon
        self.client = daemon.client
        self.urls = [self.put(MIB, f"popular {number}") for number in range(8)]
        for url in self.urls:
            assert self.client.get(url).cache_status == "MISS"

    def put(self, size: int, seed: str) -> str:
        """Put a blob into the honest registry, and return its URL."""
        return f"{GOOD}/v2/team/app/blobs/{self._network.good.put_blob('team/app', random_bytes(size, seed))}"

    def hits(self, count: int = 8) -> int:
        """Return how many of the first `count` blobs are still in the cache, without downloading those that are not."""
        return sum(self.file(url).exists() for url in self.urls[:count])

    def use_again(self, urls: list[str]) -> None:
        """Request these cached blobs again, and wait until the cache has noted it in their files."""
        for url in urls:
            assert self.client.get(url).cache_status in ("HIT", "JOINED")
        files = [self.file(url) for url in urls]
        wait_until(lambda: all(file.stat().st_mode & stat.S_ISVTX for file in files), "the files show the second uses")

    def file(self, url: str) -> Path:
        """Return the path of the blob's file."""
        digest = url.rpartition(":")[2]
        return self.daemon.state_folder / "cache/docker/registry/v2/blobs/sha256" / digest[:2] / digest / "data"

    def assert_caches(self) -> None:
        """Check that the cache still takes blobs of the honest registry."""
        url = self.put(MIB, "new")
        assert self.client.get(url).cache_status == "MISS"
        assert self.client.get(url).cache_status == "HIT"


@pytest.fixture
def cache(network: HostileNetwork, start_daemon: StartRegistryDaemon) -> Cache:
    return Cache(network, start_daemon(**CACHE))


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Return the event that ends what the hostile registry does."""
    event = threading.Event()
    yield event
    event.set()


def evil_url(number: int = 0) -> str:
    return f"{EVIL}/v2/x/y/blobs/{sha256_digest(b'%d' % number)}"


def announce(size: int, gate: threading.Event) -> ResponseBehaviour:
    """Announce `size` bytes, send 100, and then nothing."""

    def respond(exchange: HTTPExchange, content: TypedContent | None) -> None:
        exchange.send_head(200, {"Content-Length": str(size)})
        exchange.send_body(b"x" * 100)
        gate.wait(60)

    return respond


def send_endlessly(gate: threading.Event, pause: threading.Event | None = None) -> ResponseBehaviour:
    """Send chunks for as long as anybody reads them. After the first ones, wait for `pause`."""

    def respond(exchange: HTTPExchange, content: TypedContent | None) -> None:
        exchange.send_head(200, {"Transfer-Encoding": "chunked"})
        for _ in range(4):
            exchange.send_chunk(b"x" * 65536)
        if pause is not None:
            pause.wait(60)
        while not gate.is_set():
            exchange.send_chunk(b"x" * 65536)

    return respond


@pytest.mark.parametrize("size", [9 * MIB, 7 * MIB], ids=["too large", "large"])
def test_an_announced_size_takes_no_room(
    cache: Cache, network: HostileNetwork, gate: threading.Event, size: int
) -> None:
    network.evil.add_rule("GET", "/blobs/", announce(size, gate))
    with ExitStack() as stack:
        for number in range(12):
            stack.enter_context(cache.client.stream("GET", evil_url(number))).read(10)
        assert cache.hits() == 8
        cache.assert_caches()
        assert cache.hits() >= 6  # the new blob has taken the place of the oldest


def test_an_endless_blob_ends_when_its_client_has_left(
    cache: Cache, network: HostileNetwork, gate: threading.Event
) -> None:
    has_left = threading.Event()
    network.evil.add_rule("GET", "/blobs/", send_endlessly(gate, has_left))
    with cache.client.stream("GET", evil_url()) as response:
        response.read(100_000)
    has_left.set()
    wait_until(lambda: network.evil.requests[-1].ended_event is not None, "the daemon closes the connection")
    assert cache.hits() >= 6
    cache.assert_caches()


def test_an_endless_blob_leaves_a_part_of_the_cache(
    cache: Cache, network: HostileNetwork, gate: threading.Event
) -> None:
    """The client goes on, and gets the rest past the cache."""
    network.evil.add_rule("GET", "/blobs/", send_endlessly(gate))
    with cache.client.stream("GET", evil_url()) as response:
        read = 0
        while read < 24 * MIB:
            read += len(response.read(MIB))
        # It may take three quarters. Evictions free another twentieth, which leaves 2 MiB, less the cost of each blob.
        assert cache.hits() >= 1
        cache.assert_caches()


def test_readers_do_not_keep_blobs_in_the_cache(cache: Cache) -> None:
    with ExitStack() as stack:
        for url in [*cache.urls, *cache.urls]:
            stack.enter_context(cache.client.stream("GET", url)).read(10)
        large = cache.put(6 * MIB, "large")
        assert cache.client.get(large).cache_status == "MISS"
        assert cache.client.get(large).cache_status == "HIT"


def test_reader_of_an_evicted_blob_gets_all_of_it(cache: Cache) -> None:
    with cache.client.stream("GET", cache.urls[0]) as response:
        start = response.read(10)
        for number in range(10):
            cache.client.get(cache.put(MIB, f"newer {number}"))
        assert cache.hits() < 8
        assert start + response.read() == random_bytes(MIB, "popular 0")


def evil_blobs(network: HostileNetwork, count: int) -> list[str]:
    """Put `count` blobs of 1 MiB into the hostile registry, with the right digests, and return their URLs."""
    digests = [network.evil.put_blob("x/y", random_bytes(MIB, f"new {number}")) for number in range(count)]
    return [f"{EVIL}/v2/x/y/blobs/{digest}" for digest in digests]


def test_ever_new_blobs_replace_themselves(cache: Cache, network: HostileNetwork) -> None:
    """A client pulls ten times the cache from its own registry, which sends what it should."""
    cache.use_again(cache.urls[:6])
    for url in evil_blobs(network, 100):
        assert cache.client.get(url).cache_status == "MISS"
    assert cache.hits(6) == 6
    assert [cache.client.get(url).cache_status for url in cache.urls[:6]] == ["HIT"] * 6
    cache.assert_caches()


def test_ever_new_blobs_at_once_have_half_of_the_cache(cache: Cache, network: HostileNetwork) -> None:
    cache.use_again(cache.urls[:6])
    with ThreadPoolExecutor(20) as threads:
        statuses = [response.status for response in threads.map(cache.client.get, evil_blobs(network, 100))]
    assert statuses == [200] * 100
    assert cache.hits() >= 3  # half of the cache, without links, unfinished downloads and what is freed in advance


def test_blobs_that_one_client_requests_twice_have_half_of_the_cache(cache: Cache, network: HostileNetwork) -> None:
    cache.use_again(cache.urls[:6])
    for url in evil_blobs(network, 30):
        cache.client.get(url)
        cache.client.get(url)
    assert cache.hits() >= 3  # half of the cache, without links, unfinished downloads and what is freed in advance
    names = ("bytes of the cache by client", "bytes of the cache by registry")
    by_client, by_registry = (debug_bounds(cache.daemon)[name][0] for name in names)
    assert by_client["share"] == by_registry["share"] == 5 * MIB
    assert 0 < by_registry["clients"]["evil.test"] <= 6 * MIB


def test_new_images_of_a_fleet_replace_the_old_ones(cache: Cache) -> None:
    """Two nodes pull each image, which replaces those used longest ago, whether or not they were used again."""
    cache.use_again(cache.urls)
    urls = [cache.put(MIB, f"new image {number}") for number in range(24)]
    for url in urls:
        cache.client.get(url)
        cache.use_again([url])
    assert cache.hits() == 0
    assert [cache.client.get(url).cache_status for url in urls[-6:]] == ["HIT"] * 6


def test_second_uses_count_after_a_restart(cache: Cache, network: HostileNetwork) -> None:
    cache.use_again(cache.urls[:6])
    cache.daemon.restart()
    for url in evil_blobs(network, 30):
        cache.client.get(url)
    assert cache.hits(6) == 6


def drip(gate: threading.Event) -> ResponseBehaviour:
    """Announce 1 MiB, and send a byte from time to time."""

    def respond(exchange: HTTPExchange, content: TypedContent | None) -> None:
        exchange.send_head(200, {"Content-Length": str(MIB)})
        while not gate.wait(0.5):
            exchange.send_body(b"x")

    return respond


def test_dripping_downloads_leave_room_to_others(cache: Cache, network: HostileNetwork, gate: threading.Event) -> None:
    """Half of their clients stay and half have left."""
    network.evil.add_rule("GET", "/blobs/", drip(gate))
    with ExitStack() as stack:
        for number in range(60):
            clients = stack.enter_context(ExitStack())
            clients.enter_context(cache.client.stream("GET", evil_url(number)))
            if number % 2:
                clients.close()
        cache.assert_caches()
        large = cache.put(2 * MIB, "large")
        assert cache.client.get(large).body == random_bytes(2 * MIB, "large")
        assert sum(len(process["downloads"]) for process in debug(cache.daemon)["processes"]) >= 40
        bounds = debug_bounds(cache.daemon)["downloads by registry"]
        assert sum(bound["clients"].get("evil.test", 0) for bound in bounds) >= 40


def test_no_digest_of_another_leaves_its_bytes(cache: Cache, network: HostileNetwork) -> None:
    """A registry that sends other bytes than the digest's, again and again, fills nothing."""
    network.evil.add_rule("GET", "/blobs/", lambda exchange, content: exchange.respond(200, {}, bytes(MIB)))
    for number in range(20):
        with pytest.raises((http.client.IncompleteRead, OSError)):
            cache.client.get(evil_url(number))
    assert cache.hits() >= 6
    cache.assert_caches()
