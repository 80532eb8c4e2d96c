"""The daemon's end, wanted or not: transfers finish, and a power cut leaves nothing half-made that is ever served."""

from __future__ import annotations

import http.client
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.house import images
from tests.e2e.house.daemon import Proxy, RunProxy
from tests.e2e.house.fake_registry import Behaviour, gated, paced
from tests.e2e.house.images import EVERY_MANIFEST, Content
from tests.e2e.house.machines import Machines
from tests.e2e.house.process import eventually, listening
from tests.e2e.house.serving import Exchange
from tests.e2e.house.upstreams import FAKE, Upstreams

MIB = 1 << 20
GOOD_END = (0, -signal.SIGTERM)  # twistd ends itself by the signal that it was sent, when all is done


def test_kill_in_mid_download_and_pull_again(upstreams: Upstreams, run_proxy: RunProxy) -> None:
    """What lies in the ingest file is taken up by Range, not fetched again."""
    proxy = run_proxy()
    data = images.noise(16 * MIB, "killed")
    digest = upstreams.fake.put_blob("killed", data)
    url = f"{FAKE}/v2/killed/blobs/{digest}"
    gate = threading.Event()
    upstreams.fake.on("GET", digest, gated(10 * MIB, gate), times=1)
    with proxy.client.open("GET", url) as response:
        assert response.read(9 * MIB) == data[: 9 * MIB]
        proxy.kill()
    gate.set()
    upstreams.fake.behave()
    proxy.start()
    answer = proxy.client.get(url)
    assert (answer.status, answer.body) == (200, data)
    [again] = upstreams.fake.seen("GET", digest)
    start = int(again.headers["range"].removeprefix("bytes=").removesuffix("-"))
    assert 9 * MIB <= start <= 10 * MIB
    assert proxy.client.get(url).verdict == "HIT"


def test_kill_when_only_the_end_was_missing(upstreams: Upstreams, run_proxy: RunProxy) -> None:
    """All bytes lie in the ingest file, and nothing follows them upstream: a Range from there on is 416."""
    proxy = run_proxy()
    data = images.noise(3 * MIB, "nearly")
    digest = upstreams.fake.put_blob("nearly", data)
    url = f"{FAKE}/v2/nearly/blobs/{digest}"
    gate = threading.Event()
    upstreams.fake.on("GET", digest, _all_but_the_end(gate), times=1)
    with proxy.client.open("GET", url) as response:
        assert response.read(3 * MIB - 1) == data[:-1]
        proxy.kill()
    gate.set()
    proxy.start()
    for verdict in ("MISS", "HIT"):
        answer = proxy.client.get(url)
        assert (answer.status, answer.body, answer.verdict) == (200, data, verdict)


def test_what_was_under_way_is_damaged_meanwhile(upstreams: Upstreams, run_proxy: RunProxy) -> None:
    """A disk that lost what was written last: the digest tells, and the blob is fetched anew."""
    proxy = run_proxy()
    data = images.noise(6 * MIB, "rotten")
    digest = upstreams.fake.put_blob("rotten", data)
    url = f"{FAKE}/v2/rotten/blobs/{digest}"
    gate = threading.Event()
    upstreams.fake.on("GET", digest, gated(4 * MIB, gate), times=1)
    with proxy.client.open("GET", url) as response:
        response.read(3 * MIB)
        proxy.kill()
    gate.set()
    files = [path for path in proxy.state.rglob("*") if path.is_file() and path.stat().st_size >= 3 * MIB]
    assert len(files) == 1
    with files[0].open("r+b") as file:
        file.seek(MIB)
        file.write(bytes(4096))
    proxy.start()
    for _ in range(3):
        try:
            if proxy.client.get(url).body == data:
                break
        except (http.client.IncompleteRead, ConnectionError):
            continue
        raise AssertionError("wrong content was completed")
    else:
        raise AssertionError("the blob never came")


def test_nothing_half_made_is_served_after_many_kills(upstreams: Upstreams, run_proxy: RunProxy) -> None:
    proxy = run_proxy()
    data = images.noise(8 * MIB, "killed often")
    digest = upstreams.fake.put_blob("often", data)
    image = images.small("often", layers=4)
    upstreams.fake.put("often", "1", image)
    upstreams.fake.on("GET", digest, paced(40e6))
    urls = [f"{FAKE}/v2/often/manifests/1", *(f"{FAKE}/v2/often/blobs/{blob.digest}" for blob in image.blobs)]
    urls.append(f"{FAKE}/v2/often/blobs/{digest}")
    expected = [image.manifest.data, *(blob.data for blob in image.blobs), data]
    for amount in (10_000, 2 * MIB, 5 * MIB, 7 * MIB):
        with ThreadPoolExecutor(len(urls)) as pool:
            futures = [pool.submit(_read_some, proxy, url, amount) for url in urls]
            futures[-1].result(30)
            proxy.kill()
            for future in futures:
                future.result(30)
        proxy.start()
    for url, content in zip(urls, expected, strict=True):
        for _ in range(2):
            assert proxy.client.get(url, Accept=EVERY_MANIFEST).body == content


def test_sigterm_lets_transfers_finish(upstreams: Upstreams, run_proxy: RunProxy) -> None:
    proxy = run_proxy()
    data = images.noise(8 * MIB, "finishing")
    digest = upstreams.fake.put_blob("finishing", data)
    gate = threading.Event()
    upstreams.fake.on("GET", digest, gated(4 * MIB, gate))
    with ExitStack() as stack:
        response = stack.enter_context(proxy.client.open("GET", f"{FAKE}/v2/finishing/blobs/{digest}"))
        begun = response.read(2 * MIB)
        proxy.terminate()
        eventually(lambda: not listening(proxy.port), "the end of listening")
        assert proxy.running
        gate.set()
        assert begun + response.read() == data
    assert proxy.stop() in GOOD_END
    proxy.start()
    assert proxy.client.get(f"{FAKE}/v2/finishing/blobs/{digest}").verdict == "HIT"


def test_sigterm_does_not_wait_for_who_does_nothing(upstreams: Upstreams, run_proxy: RunProxy) -> None:
    proxy = run_proxy()
    connections = [proxy.client.connection(FAKE) for _ in range(3)]
    try:
        for connection in connections:
            connection.request("GET", "/v2/")
            connection.getresponse().read()
        assert proxy.stop(timeout=5) in GOOD_END
    finally:
        for connection in connections:
            connection.close()


def test_a_clean_stop_says_nothing_alarming(run_proxy: RunProxy) -> None:
    proxy = run_proxy()
    assert proxy.stop() in GOOD_END
    assert "rror" not in proxy.text.rpartition("Received SIGTERM")[2]


@pytest.mark.parametrize("kill", [False, True], ids=["stopped", "killed"])
def test_docker_pulls_after_a_restart_from_disk(
    upstreams: Upstreams, run_proxy: RunProxy, machines: Machines, kill: bool
) -> None:
    proxy = run_proxy()
    upstreams.on_hub("library/survivor", "1", images.small("survivor", oci=False))
    machines.docker(proxy).do("pull", "survivor:1")
    proxy.restart(kill=kill)
    upstreams.hub.forget()
    machines.docker(proxy).do("pull", "survivor:1")
    assert upstreams.hub.seen("GET", "/blobs/") == []


def test_no_file_is_left_behind(upstreams: Upstreams, run_proxy: RunProxy) -> None:
    """A download that failed for good leaves no ingest file, and no temporary one."""
    proxy = run_proxy()
    digest = upstreams.fake.put_blob("tidy", images.noise(MIB, "tidy"))
    assert proxy.client.get(f"{FAKE}/v2/tidy/blobs/{digest}").status == 200

    def large() -> list[Path]:
        return [path for path in (proxy.state / "cache").rglob("*") if path.is_file() and path.stat().st_size >= MIB]

    assert len(large()) == 1
    proxy.restart(kill=True)
    assert len(large()) == 1


def _read_some(proxy: Proxy, url: str, amount: int) -> None:
    """Read the beginning; the other end may go away in the middle of it."""
    try:
        with proxy.client.open("GET", url, {"Accept": EVERY_MANIFEST}) as response:
            response.read(amount)
    except (http.client.HTTPException, OSError):
        pass


def _all_but_the_end(gate: threading.Event) -> Behaviour:
    """Send the whole in chunks, and wait before the last chunk, the empty one."""

    def behave(exchange: Exchange, content: Content | None) -> None:
        assert content is not None
        exchange.begin(200, {"Content-Type": content.media_type, "Transfer-Encoding": "chunked"})
        exchange.send_chunk(content.data)
        gate.wait(60)

    return behave
