"""Stops and kills of the daemon: SIGTERM lets transfers finish, and after SIGKILL no partial content is ever served."""

from __future__ import annotations

import http.client
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from bench.servers import is_listening
from tests.e2e.harness import images
from tests.e2e.harness.client_factory import ClientFactory
from tests.e2e.harness.daemon import CLEAN_EXIT_STATUSES, StartDaemon, TwistdDaemon
from tests.e2e.harness.fake_registry import ResponseBehaviour, pause_after, throttled
from tests.e2e.harness.http_server import HTTPExchange
from tests.e2e.harness.images import ACCEPT_MANIFESTS, TypedContent
from tests.e2e.harness.process import wait_until
from tests.e2e.harness.upstreams import FAKE, Upstreams

MIB = 1 << 20


def test_interrupted_download_resumes_after_kill(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    """The download resumes with a Range request after the bytes in the ingest file."""
    daemon = start_daemon()
    data = images.random_bytes(16 * MIB, "killed")
    digest = upstreams.fake.put_blob("killed", data)
    url = f"{FAKE}/v2/killed/blobs/{digest}"
    gate = threading.Event()
    upstreams.fake.add_rule("GET", digest, pause_after(10 * MIB, gate), times=1)
    with daemon.client.stream("GET", url) as response:
        assert response.read(9 * MIB) == data[: 9 * MIB]
        daemon.kill()
    gate.set()
    upstreams.fake.reset_rules()
    daemon.start()
    second_response = daemon.client.get(url)
    assert (second_response.status, second_response.body) == (200, data)
    [upstream_request] = upstreams.fake.find_requests("GET", digest)
    start = int(upstream_request.headers["range"].removeprefix("bytes=").removesuffix("-"))
    assert 9 * MIB - 1 <= start <= 10 * MIB  # it begins with the last byte that is here
    assert daemon.client.get(url).cache_status == "HIT"


def test_kill_before_the_final_chunk(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    """All bytes are in the ingest file, so upstream responds to a Range request after them with 416."""
    daemon = start_daemon()
    data = images.random_bytes(3 * MIB, "nearly")
    digest = upstreams.fake.put_blob("nearly", data)
    url = f"{FAKE}/v2/nearly/blobs/{digest}"
    gate = threading.Event()
    upstreams.fake.add_rule("GET", digest, _omit_final_chunk(gate), times=1)
    with daemon.client.stream("GET", url) as response:
        assert response.read(3 * MIB - 1) == data[:-1]
        daemon.kill()
    gate.set()
    daemon.start()
    for cache_status in ("MISS", "HIT"):
        later_response = daemon.client.get(url)
        assert (later_response.status, later_response.body, later_response.cache_status) == (200, data, cache_status)


def test_corrupted_partial_download_is_fetched_again(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    """If a crash corrupts the ingest file, the digest does not match, and the blob is fetched again."""
    daemon = start_daemon()
    data = images.random_bytes(6 * MIB, "rotten")
    digest = upstreams.fake.put_blob("rotten", data)
    url = f"{FAKE}/v2/rotten/blobs/{digest}"
    gate = threading.Event()
    upstreams.fake.add_rule("GET", digest, pause_after(4 * MIB, gate), times=1)
    with daemon.client.stream("GET", url) as response:
        response.read(3 * MIB)
        daemon.kill()
    gate.set()
    files = [path for path in daemon.state_folder.rglob("*") if path.is_file() and path.stat().st_size >= 3 * MIB]
    assert len(files) == 1
    with files[0].open("r+b") as file:
        file.seek(MIB)
        file.write(bytes(4096))
    daemon.start()
    for _ in range(3):
        try:
            if daemon.client.get(url).body == data:
                break
        except (http.client.IncompleteRead, ConnectionError):
            continue
        raise AssertionError("the daemon completed a response with wrong content")
    else:
        raise AssertionError("no response with the blob was complete")


def test_no_partial_content_is_served_after_many_kills(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    data = images.random_bytes(8 * MIB, "killed often")
    digest = upstreams.fake.put_blob("often", data)
    image = images.build_small_image("often", layers=4)
    upstreams.fake.put("often", "1", image)
    upstreams.fake.add_rule("GET", digest, throttled(40e6))
    urls = [f"{FAKE}/v2/often/manifests/1", *(f"{FAKE}/v2/often/blobs/{blob.digest}" for blob in image.blobs)]
    urls.append(f"{FAKE}/v2/often/blobs/{digest}")
    expected = [image.manifest.data, *(blob.data for blob in image.blobs), data]
    for byte_count in (10_000, 2 * MIB, 5 * MIB, 7 * MIB):
        with ThreadPoolExecutor(len(urls)) as pool:
            futures = [pool.submit(_read_partially, daemon, url, byte_count) for url in urls]
            futures[-1].result(30)
            daemon.kill()
            for future in futures:
                future.result(30)
        daemon.start()
    for url, content in zip(urls, expected, strict=True):
        for _ in range(2):
            assert daemon.client.get(url, Accept=ACCEPT_MANIFESTS).body == content


def test_sigterm_lets_transfers_finish(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    data = images.random_bytes(8 * MIB, "finishing")
    digest = upstreams.fake.put_blob("finishing", data)
    gate = threading.Event()
    upstreams.fake.add_rule("GET", digest, pause_after(4 * MIB, gate))
    with ExitStack() as stack:
        response = stack.enter_context(daemon.client.stream("GET", f"{FAKE}/v2/finishing/blobs/{digest}"))
        first_part = response.read(2 * MIB)
        daemon.terminate()
        wait_until(lambda: not is_listening(daemon.port), "the daemon stops listening")
        assert daemon.running
        gate.set()
        assert first_part + response.read() == data
    assert daemon.stop() in CLEAN_EXIT_STATUSES
    daemon.start()
    assert daemon.client.get(f"{FAKE}/v2/finishing/blobs/{digest}").cache_status == "HIT"


def test_sigterm_does_not_wait_for_idle_connections(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    connections = [daemon.client.new_connection(FAKE) for _ in range(3)]
    try:
        for connection in connections:
            connection.request("GET", "/v2/")
            connection.getresponse().read()
        assert daemon.stop(timeout=5) in CLEAN_EXIT_STATUSES
    finally:
        for connection in connections:
            connection.close()


def test_clean_stop_logs_no_failure(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    assert daemon.stop() in CLEAN_EXIT_STATUSES
    assert "rror" not in daemon.output_text.rpartition("Received SIGTERM")[2]


@pytest.mark.parametrize("kill", [False, True], ids=["stopped", "killed"])
def test_docker_pulls_from_cache_after_a_restart(
    upstreams: Upstreams, start_daemon: StartDaemon, clients: ClientFactory, kill: bool
) -> None:
    daemon = start_daemon()
    upstreams.push_to_hub("library/survivor", "1", images.build_small_image("survivor", oci=False))
    clients.docker(daemon).run_checked("pull", "survivor:1")
    daemon.restart(kill=kill)
    upstreams.hub.clear_log()
    clients.docker(daemon).run_checked("pull", "survivor:1")
    assert upstreams.hub.find_requests("GET", "/blobs/") == []


def test_no_temporary_files_are_left(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    """Neither a complete download nor a restart leaves an ingest file or another temporary file."""
    daemon = start_daemon()
    digest = upstreams.fake.put_blob("tidy", images.random_bytes(MIB, "tidy"))
    assert daemon.client.get(f"{FAKE}/v2/tidy/blobs/{digest}").status == 200

    def large_files() -> list[Path]:
        return [
            path for path in (daemon.state_folder / "cache").rglob("*") if path.is_file() and path.stat().st_size >= MIB
        ]

    assert len(large_files()) == 1
    daemon.restart(kill=True)
    assert len(large_files()) == 1


def _read_partially(daemon: TwistdDaemon, url: str, byte_count: int) -> None:
    """Read the first `byte_count` bytes, and ignore errors if the daemon is killed."""
    try:
        with daemon.client.stream("GET", url, {"Accept": ACCEPT_MANIFESTS}) as response:
            response.read(byte_count)
    except (http.client.HTTPException, OSError):
        pass


def _omit_final_chunk(gate: threading.Event) -> ResponseBehaviour:
    """Send the whole content in chunks, and wait before the last chunk, which is empty."""

    def respond(exchange: HTTPExchange, content: TypedContent | None) -> None:
        assert content is not None
        exchange.send_head(200, {"Content-Type": content.media_type, "Transfer-Encoding": "chunked"})
        exchange.send_chunk(content.data)
        gate.wait(60)

    return respond
