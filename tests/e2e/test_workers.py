"""A daemon of three processes behaves like one: on every connection, after a process is killed, and after a reload."""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import pytest

from bench.servers import is_listening
from dockerproxy.cache.space import BLOB_COST
from tests.e2e.harness import images
from tests.e2e.harness.daemon import CLEAN_EXIT_STATUSES, twistd_argv
from tests.e2e.harness.fake_registry import ResponseBehaviour, pause_after, respond_normally
from tests.e2e.harness.http_client import BufferedResponse, basic_authorization, read_response, request_directly
from tests.e2e.harness.http_server import HTTPExchange
from tests.e2e.harness.images import OCI_MANIFEST, SampleImage, TypedContent, sha256_digest
from tests.e2e.harness.multi_process import WORKERS, MultiProcessDaemon, all_exited, open_file_targets, request_on
from tests.e2e.harness.process import wait_until
from tests.e2e.harness.upstreams import FAKE, HUB, TOKEN_URL, Upstreams

MIB = 1 << 20
HALF_UPLOAD = MIB  # bytes; enough for the daemon to write some of them to the disk

StartMultiProcessDaemon = Callable[..., MultiProcessDaemon]


@pytest.fixture(scope="module")
def daemon(upstreams: Upstreams, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MultiProcessDaemon]:
    """Return a daemon for the tests that do not kill or reconfigure it."""
    multi_process_daemon = MultiProcessDaemon(tmp_path_factory.mktemp("daemon"), upstreams.settings)
    with multi_process_daemon.run_and_check_log(lambda: upstreams.secrets):
        yield multi_process_daemon


@pytest.fixture
def start_daemon(upstreams: Upstreams, tmp_path: Path) -> Iterator[StartMultiProcessDaemon]:
    """Return a function that starts a daemon for one test, which may have ended at the end of the test."""
    daemons: list[MultiProcessDaemon] = []

    def start(*options: str, unset: tuple[str, ...] = (), **settings: str) -> MultiProcessDaemon:
        daemon = MultiProcessDaemon(tmp_path / "daemon", {**upstreams.settings, **settings})
        for name in unset:
            del daemon.environment[name]
        daemon.argv += options
        daemons.append(daemon)
        daemon.start()
        return daemon

    yield start
    for daemon in daemons:
        pids = daemon.serving_pids if daemon.running else []
        daemon.stop()
        assert all_exited(pids)
        daemon.check_log(upstreams.secrets)


class GatedBlob:
    """An upstream blob. Upstream pauses after `gate_at` bytes until `gate` is set."""

    def __init__(self, upstreams: Upstreams, name: str, size: int, gate_at: int, times: int | None = None) -> None:
        self.fake = upstreams.fake
        self.data = images.random_bytes(size, name)
        self.digest = self.fake.put_blob(name, self.data)
        self.url = f"{FAKE}/v2/{name}/blobs/{self.digest}"
        self.path = f"/v2/{name}/blobs/{self.digest}"
        self.gate = threading.Event()
        self.fake.add_rule("GET", self.digest, pause_after(gate_at, self.gate), times=times)

    @property
    def requested_ranges(self) -> list[str | None]:
        """The Range headers of all upstream requests for the blob."""
        return [request.headers.get("range") for request in self.fake.find_requests("GET", self.digest)]

    def start_download(self, connection: http.client.HTTPConnection) -> http.client.HTTPResponse:
        """Request the blob, and read its first MiB."""
        connection.request("GET", self.path)
        response = connection.getresponse()
        assert response.read(MIB) == self.data[:MIB]
        return response


# all processes together


def test_all_processes_serve(daemon: MultiProcessDaemon) -> None:
    assert len(daemon.serving_pids) == WORKERS
    with (
        daemon.connection_to_each_process(FAKE) as connections,
        daemon.hosted_connection_to_each_process() as hosted_connections,
    ):
        for connection in (*connections.values(), *hosted_connections.values()):
            assert request_on(connection, "GET", "/v2/").status == 200


def test_connections_are_balanced(daemon: MultiProcessDaemon) -> None:
    wait_until(lambda: sum(open_connections(daemon)) == 0, "the connections of other tests are closed")
    with ExitStack() as stack:
        pids = []
        for _ in range(4 * WORKERS):
            connection = daemon.client.new_connection(FAKE)
            stack.callback(connection.close)
            pids.append(daemon.connect_and_get_pid(connection))
        assert {pids.count(pid) for pid in daemon.serving_pids} == {4}


@pytest.mark.parametrize(("count", "at_once"), [(42, False), (300, True)], ids=["long connections", "a burst"])
def test_any_number_of_connections_is_balanced(daemon: MultiProcessDaemon, count: int, at_once: bool) -> None:
    """A process that gets more than its share of long downloads leaves a core idle."""
    wait_until(lambda: sum(open_connections(daemon)) == 0, "the connections of other tests are closed")
    with ExitStack() as stack:
        clients = [stack.enter_context(socket.socket()) for _ in range(count)]
        for client in clients:
            client.setblocking(not at_once)
            with suppress(BlockingIOError):
                client.connect(("127.0.0.1", daemon.http_port))
        wait_until(lambda: sum(open_connections(daemon)) == count, "all connections are accepted")
        assert open_connections(daemon) == [count // WORKERS] * WORKERS


def open_connections(daemon: MultiProcessDaemon) -> list[int]:
    """Return how many connections to the hosted registry each process has."""
    report = daemon.run_cli("debug", "--json")
    return [process["clients"]["REGISTRY_HTTP_LISTEN"] for process in json.loads(report.stdout)["processes"]]


def test_metrics_are_aggregated(upstreams: Upstreams, start_daemon: StartMultiProcessDaemon) -> None:
    """Every process reports the sums of all. The counts of a killed worker are kept, and its successor adds to them."""
    daemon = start_daemon()
    blob = upstreams.fake.put_blob("counted/by/all", b"content")
    path = f"/v2/counted/by/all/blobs/{blob}"
    hits = '{kind="blob",registry="fake.test",verdict="HIT"}'

    def scrape_each_process() -> list[dict[str, float]]:
        """Return the metrics that each process reports."""
        metrics = []
        with daemon.hosted_connection_to_each_process() as connections:
            for connection in connections.values():
                response = request_on(connection, "GET", "/metrics")
                assert response.status == 200 and response.headers["content-type"].startswith(
                    "text/plain; version=0.0.4"
                )
                # Requests for /metrics itself change the counters of the daemon's own pages, and use processor time.
                samples = parse_metrics(response.body)
                # The free space of a disk changes by what other programs do.
                changing = ('registry="own"', "process_", "store_free_")
                metrics.append(
                    {name: value for name, value in samples.items() if not any(part in name for part in changing)}
                )
        return metrics

    def count_hits() -> set[float]:
        return {metrics.get(f"dockerproxy_requests_total{hits}", 0) for metrics in scrape_each_process()}

    def request_from_each_process() -> None:
        with daemon.connection_to_each_process(FAKE) as connections:
            for connection in connections.values():
                assert request_on(connection, "GET", path).body == b"content"

    request_from_each_process()
    request_from_each_process()
    wait_until(lambda: count_hits() == {2 * WORKERS - 1}, "all requests are counted")
    scraped: list[dict[str, float]] = []

    def all_report_the_same() -> bool:
        scraped[:] = scrape_each_process()
        # A process reports its new links and records after a few seconds.
        sizes = {metrics.pop("dockerproxy_cache_bytes") % 4096 for metrics in scraped}
        return sizes == {len(b"content")} and scraped == scraped[:1] * WORKERS

    wait_until(all_report_the_same, "all processes report the same")
    first_metrics = scraped[0]
    assert first_metrics['dockerproxy_requests_total{kind="blob",registry="fake.test",verdict="MISS"}'] == 1
    sent = len(b"content") * (2 * WORKERS - 1)
    assert first_metrics['dockerproxy_sent_bytes_total{registry="fake.test",verdict="HIT"}'] == sent
    pids_before = daemon.serving_pids
    os.kill(pids_before[-1], signal.SIGKILL)
    wait_until(lambda: daemon.output_text.count(" serves") == WORKERS, "the worker is replaced")
    assert count_hits() == {2 * WORKERS - 1}
    request_from_each_process()
    wait_until(lambda: count_hits() == {3 * WORKERS - 1}, "all requests are counted, including the new ones")


def test_clients_of_all_processes_share_one_download(upstreams: Upstreams, daemon: MultiProcessDaemon) -> None:
    """Upstream pauses after 4 MiB until all clients have begun."""
    blob = GatedBlob(upstreams, "twenty/of/all", 24 * MIB, 4 * MIB)
    with ExitStack() as stack, ThreadPoolExecutor(20) as pool:
        connections = [daemon.client.new_connection(FAKE) for _ in range(20)]
        pids = []
        for connection in connections:
            stack.callback(connection.close)
            pids.append(daemon.connect_and_get_pid(connection))
        assert min(pids.count(pid) for pid in daemon.serving_pids) >= 5
        responses = list(pool.map(blob.start_download, connections))
        blob.gate.set()
        digests = list(pool.map(lambda response: sha256_digest(blob.data[:MIB] + response.read()), responses))
    assert digests == [blob.digest] * 20
    assert blob.requested_ranges == [None]
    cache_statuses = sorted(response.headers["X-Cache"] for response in responses)
    assert cache_statuses == ["JOINED"] * 19 + ["MISS"]
    with daemon.connection_to_each_process(FAKE) as by_pid:
        assert [request_on(connection, "HEAD", blob.path).cache_status for connection in by_pid.values()] == [
            "HIT"
        ] * WORKERS


def test_simultaneous_requests_share_one_download(upstreams: Upstreams, daemon: MultiProcessDaemon) -> None:
    """The processes agree ten times on the one that downloads the blob."""
    with ExitStack() as stack, ThreadPoolExecutor(20) as pool:
        connections = [daemon.client.new_connection(FAKE) for _ in range(20)]
        for connection in connections:
            stack.callback(connection.close)
            connection.connect()
        for number in range(10):
            data = images.random_bytes(300_000, f"same time {number}")
            digest = upstreams.fake.put_blob("same/time", data)
            path = f"/v2/same/time/blobs/{digest}"
            responses = list(pool.map(lambda connection, path=path: request_on(connection, "GET", path), connections))
            assert {(response.status, sha256_digest(response.body)) for response in responses} == {(200, digest)}
            assert len(upstreams.fake.find_requests("GET", digest)) == 1


def test_debug_report_of_all_processes(upstreams: Upstreams, daemon: MultiProcessDaemon) -> None:
    """It tells of downloads and clients in workers, in the command's output and in the log."""
    blob = GatedBlob(upstreams, "debugged", 4 * MIB, 2 * MIB, times=1)
    pids = daemon.serving_pids
    with daemon.connection_to_each_process(FAKE) as connections:
        response = blob.start_download(connections[pids[1]])
        result = daemon.run_cli("debug", "--json")
        assert result.returncode == 0, result.stderr
        processes = json.loads(result.stdout)["processes"]
        assert [(process["pid"], process["state"]) for process in processes] == [(pid, "serving") for pid in pids]
        [download] = processes[1]["downloads"]
        assert (download["digest"], download["state"], download["size"]) == (blob.digest, "downloading", 4 * MIB)
        assert 0 < download["written"] <= 2 * MIB
        assert all(process["clients"]["PROXY_LISTEN"] >= 1 for process in processes)
        assert all(process["connections"] >= 1 for process in processes[1:])
        text = daemon.run_cli("debug").stdout
        assert f"worker 1 (serving, process ID {pids[1]})" in text
        assert f"download fake.test {blob.digest}: downloading" in text
        daemon.send_signal(signal.SIGUSR2)
        wait_until(lambda: f'"digest": "{blob.digest}"' in daemon.output_text, "the report is in the log")
        blob.gate.set()
        assert response.read() == blob.data[MIB:]


# killed processes


def test_downloading_worker_is_killed(upstreams: Upstreams, start_daemon: StartMultiProcessDaemon) -> None:
    daemon = start_daemon()
    blob = GatedBlob(upstreams, "killed/worker", 12 * MIB, 6 * MIB, times=1)
    pids_before = daemon.serving_pids
    with daemon.connection_to_each_process(FAKE) as connections:
        downloading_pid = pids_before[1]
        responses = {
            pid: blob.start_download(connections[pid]) for pid in (downloading_pid, pids_before[0], pids_before[2])
        }
        assert len(blob.requested_ranges) == 1
        os.kill(downloading_pid, signal.SIGKILL)
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            responses[downloading_pid].read()
        for pid in (pids_before[0], pids_before[2]):
            assert responses[pid].read() == blob.data[MIB:]
    blob.gate.set()
    _, resumed_range = blob.requested_ranges
    assert resumed_range is not None
    assert MIB <= int(resumed_range.removeprefix("bytes=").removesuffix("-")) <= 6 * MIB
    wait_until(lambda: daemon.output_text.count("worker 1 serves") == 2, "the worker is replaced")
    assert downloading_pid not in daemon.serving_pids
    with daemon.connection_to_each_process(FAKE) as by_pid:
        assert [request_on(connection, "HEAD", blob.path).cache_status for connection in by_pid.values()] == [
            "HIT"
        ] * WORKERS


@pytest.mark.parametrize("gate_at", [None, 0, 3 * MIB - 1], ids=["before the response", "no byte yet", "the last byte"])
def test_worker_is_killed_at_the_ends_of_a_download(
    upstreams: Upstreams, start_daemon: StartMultiProcessDaemon, gate_at: int | None
) -> None:
    """The clients of the other processes get the blob, and no lock, partial file or reserved space is left."""
    daemon = start_daemon()
    blob = GatedBlob(
        upstreams, f"killed/at/{str(gate_at).lower()}", 3 * MIB, gate_at or 0, times=0 if gate_at is None else 1
    )
    asked = threading.Event()
    if gate_at is None:
        blob.fake.add_rule("GET", blob.digest, wait_for(blob.gate, asked), times=1)
    pids = daemon.serving_pids
    with daemon.connection_to_each_process(FAKE) as connections, ThreadPoolExecutor(WORKERS) as pool:
        killed = pool.submit(request_on, connections[pids[1]], "GET", blob.path)
        wait_until(lambda: asked.is_set() or blob.requested_ranges, "the worker has sent its request")
        others = [pool.submit(request_on, connections[pid], "GET", blob.path) for pid in (pids[0], pids[2])]
        ingest = daemon.state_folder / "cache" / "ingest"
        wait_until(lambda: len(list(ingest.glob("*/*"))) == 1, "the ingest file exists")
        os.kill(pids[1], signal.SIGKILL)
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            killed.result()
        assert [other.result().body == blob.data for other in others] == [True, True]
    blob.gate.set()
    wait_until(lambda: len(blob.requested_ranges) == 2, "upstream has recorded both requests")
    assert list(ingest.glob("*/*")) == []
    metrics = parse_metrics(request_directly("GET", f"http://{daemon.http_address}/metrics").body)
    assert metrics["dockerproxy_cache_bytes"] == 3 * MIB + BLOB_COST


def parse_metrics(exposition: bytes) -> dict[str, float]:
    """Return the samples by name and labels as written."""
    lines = [line for line in exposition.decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def wait_for(gate: threading.Event, asked: threading.Event) -> ResponseBehaviour:
    """Set `asked`, and respond only after `gate` is set."""

    def respond(exchange: HTTPExchange, content: TypedContent | None) -> None:
        asked.set()
        gate.wait(120)
        respond_normally(exchange, content)

    return respond


@pytest.mark.parametrize("state", ["started", "in a chunk", "after a chunk", "in the last chunk"])
def test_worker_is_killed_during_a_blob_push(start_daemon: StartMultiProcessDaemon, state: str) -> None:
    """Another process goes on with what is on the disk. The upload session's lock does not outlive the worker."""
    daemon = start_daemon()
    data = images.random_bytes(2 * HALF_UPLOAD, state)
    pids = daemon.serving_pids
    with daemon.hosted_connection_to_each_process() as connections:
        doomed, other = connections[pids[1]], connections[pids[2]]
        location = request_on(doomed, "POST", "/v2/killed/push/blobs/uploads/").headers["location"]
        upload = upload_path(location)
        if state == "after a chunk":
            assert request_on(doomed, "PATCH", upload, data[:HALF_UPLOAD]).status == 202
        elif state != "started":
            method, target = (
                ("PATCH", upload) if state == "in a chunk" else ("PUT", f"{upload}?digest={sha256_digest(data)}")
            )
            doomed.putrequest(method, target)
            doomed.putheader("Content-Length", str(len(data)))
            doomed.endheaders()
            doomed.send(data[:HALF_UPLOAD])
            wait_until(lambda: received_bytes(other, upload) > 0, "some of the data is written")
        os.kill(pids[1], signal.SIGKILL)
        if state.startswith("in "):
            with pytest.raises((http.client.HTTPException, ConnectionError)):
                doomed.getresponse()
        wait_until(lambda: " exited (killed by SIGKILL)" in daemon.output_text, "the exit is noticed")
        offset = received_bytes(other, upload)
        assert offset == {"started": 0, "after a chunk": HALF_UPLOAD}.get(state, offset)
        chunk_range = {"Content-Range": f"{offset}-{len(data) - 1}"}
        assert request_on(other, "PATCH", upload, data[offset:], chunk_range).status == 202
        assert request_on(other, "PUT", f"{upload}?digest={sha256_digest(data)}").status == 201
        blob_path = f"/v2/killed/push/blobs/{sha256_digest(data)}"
        assert [request_on(connections[pid], "GET", blob_path).body == data for pid in (pids[0], pids[2])] == [True] * 2
    check_result = daemon.run_cli("check")
    assert check_result.returncode == 0, check_result.stdout + check_result.stderr


def received_bytes(connection: http.client.HTTPConnection, upload: str) -> int:
    """Return how many bytes of an upload are on the disk."""
    last = request_on(connection, "GET", upload).headers["range"].partition("-")[2]
    return int(last) + 1 if last != "0" else 0


def test_worker_is_killed_during_a_manifest_push(start_daemon: StartMultiProcessDaemon) -> None:
    """The lock of the repository is free for others, also if the worker dies while others wait for it."""
    daemon = start_daemon()
    _push_blob(daemon, "killed/manifest", b"{}")
    config = TypedContent("application/vnd.oci.image.config.v1+json", b"{}")
    image, headers = images.build_image_from_blobs(config, []), {"Content-Type": OCI_MANIFEST}
    pids = daemon.serving_pids
    with daemon.hosted_connection_to_each_process() as connections, ThreadPoolExecutor(WORKERS) as pool:

        def push(pid: int, number: int) -> int | None:
            try:
                target = f"/v2/killed/manifest/manifests/{number}"
                return request_on(connections[pid], "PUT", target, image.manifest.data, headers).status
            except (http.client.HTTPException, ConnectionError):
                return None

        def push_all(pid: int) -> list[int | None]:
            return [push(pid, number) for number in range(60)]

        pushes = {pid: pool.submit(push_all, pid) for pid in pids}
        wait_until(lambda: daemon.output_text.count(" PUT ") > 30, "all processes push")
        os.kill(pids[1], signal.SIGKILL)
        assert [pushes[pid].result() for pid in (pids[0], pids[2])] == [[201] * 60] * 2
        assert None in pushes[pids[1]].result()
    check_result = daemon.run_cli("check")
    assert check_result.returncode == 0, check_result.stdout + check_result.stderr


def test_idle_worker_is_killed(start_daemon: StartMultiProcessDaemon) -> None:
    """Clients that connect meanwhile are served by the other processes, and then by the successor too."""
    daemon = start_daemon()
    pids = daemon.serving_pids
    os.kill(pids[1], signal.SIGKILL)
    wait_until(lambda: " exited (killed by SIGKILL)" in daemon.output_text, "the exit is noticed")
    for _ in range(4 * WORKERS):
        assert request_directly("GET", daemon.url + "/healthz").status == 200
    wait_until(lambda: daemon.output_text.count("worker 1 serves") == 2, "the worker is replaced")
    with ExitStack() as stack:
        served = []
        for _ in range(4 * WORKERS):
            connection = daemon.client.new_connection(FAKE)
            stack.callback(connection.close)
            served.append(daemon.connect_and_get_pid(connection))
        assert {served.count(pid) for pid in daemon.serving_pids} == {4}


def test_worker_that_cannot_reload_is_replaced(start_daemon: StartMultiProcessDaemon, tmp_path: Path) -> None:
    """The htpasswd file is damaged after the main process has read it. No process serves the removed user."""
    import bcrypt

    def users(name: str) -> str:
        return f"{name}:{bcrypt.hashpw(b'word', bcrypt.gensalt(4)).decode()}\n"

    env_file, htpasswd, new_htpasswd = tmp_path / "environment", tmp_path / "htpasswd", tmp_path / "new"
    htpasswd.write_text(users("alice"))
    env_file.write_text(f"HTPASSWD_FILE={htpasswd}\n")
    daemon = start_daemon(f"--env-file={env_file}")
    pids = daemon.serving_pids
    bob = {"Authorization": basic_authorization("bob", "word")}
    alice = {"Authorization": basic_authorization("alice", "word")}
    url = f"http://{daemon.http_address}/v2/"
    with daemon.hosted_connection_to_each_process() as connections:

        def has_reloaded(pid: int) -> bool:
            return request_on(connections[pid], "GET", "/v2/", headers=bob).status == 200

        os.kill(pids[1], signal.SIGSTOP)  # so that it reloads after the file is damaged
        new_htpasswd.write_text(users("bob"))
        env_file.write_text(f"HTPASSWD_FILE={new_htpasswd}\n")
        daemon.send_signal(signal.SIGHUP)
        for pid in (pids[0], pids[2]):
            wait_until(partial(has_reloaded, pid), "the other processes have reloaded")
        new_htpasswd.write_text("damaged")
        os.kill(pids[1], signal.SIGCONT)
    wait_until(
        lambda: "worker 1 is restarted, because it could not reload: HTPASSWD_FILE: " in daemon.output_text,
        "the failure is logged",
    )
    wait_until(lambda: "worker 1 cannot start: HTPASSWD_FILE: " in daemon.output_text, "the worker has ended")
    assert request_directly("GET", url, headers=alice).status == 401
    new_htpasswd.write_text(users("bob"))
    wait_until(lambda: daemon.output_text.count("worker 1 serves") == 2, "the worker starts again", timeout=60)
    assert request_directly("GET", url, headers=alice).status == 401


def test_main_process_is_killed(upstreams: Upstreams, start_daemon: StartMultiProcessDaemon) -> None:
    daemon = start_daemon()
    blob = GatedBlob(upstreams, "killed/first", 12 * MIB, 6 * MIB, times=1)
    serving_pids = daemon.serving_pids
    pids = [*serving_pids, daemon.fork_server_pid]
    with daemon.connection_to_each_process(FAKE) as connections:
        responses = [blob.start_download(connections[pid]) for pid in reversed(serving_pids)]  # a worker downloads
        daemon.kill()
        for response in responses:
            with pytest.raises((http.client.IncompleteRead, ConnectionError)):
                response.read()
    wait_until(lambda: all_exited(pids), "the workers and the fork server end with the main process")
    blob.gate.set()
    daemon.start()
    with daemon.connection_to_each_process(FAKE) as connections:
        for connection in connections.values():
            assert request_on(connection, "GET", blob.path).body == blob.data
    _, resumed_range = blob.requested_ranges
    assert resumed_range is not None and resumed_range.startswith("bytes=")
    assert list((daemon.state_folder / "cache" / "staging").iterdir()) == []
    assert daemon.stop() in CLEAN_EXIT_STATUSES


def test_fork_server_is_killed(upstreams: Upstreams, start_daemon: StartMultiProcessDaemon) -> None:
    """The other processes continue. A worker that ends later is not replaced, and the others serve its clients."""
    daemon = start_daemon()
    blob = GatedBlob(upstreams, "killed/fork/server", 12 * MIB, 6 * MIB, times=1)
    with daemon.connection_to_each_process(FAKE) as connections:
        serving_pids, fork_server_pid = list(connections), daemon.fork_server_pid
        responses = [blob.start_download(connection) for connection in connections.values()]
        os.kill(fork_server_pid, signal.SIGKILL)
        wait_until(lambda: "the fork server has exited" in daemon.output_text, "the exit of the fork server is logged")
        blob.gate.set()
        assert [response.read() for response in responses] == [blob.data[MIB:]] * WORKERS
        os.kill(serving_pids[1], signal.SIGKILL)
        wait_until(lambda: "worker 1 exited" in daemon.output_text, "the exit of the worker is logged")
    assert "and is not replaced" in daemon.output_text
    for _ in range(2 * WORKERS):
        assert daemon.client.get(blob.url).body == blob.data
    assert daemon.stop() in CLEAN_EXIT_STATUSES
    assert all_exited([*serving_pids, fork_server_pid])


# sessions


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls_session_is_resumed_by_all_processes(
    start_daemon: StartMultiProcessDaemon, version: ssl.TLSVersion
) -> None:
    """A replaced worker resumes the session too. A session is not resumed for another host."""
    daemon = start_daemon()
    context = ssl.create_default_context(cafile=str(daemon.ca_file))
    context.maximum_version = version

    def connect_with_session(
        stack: ExitStack, host: str, session: ssl.SSLSession | None
    ) -> tuple[int, ssl.SSLSession, bool]:
        """Return the pid of the process, the session, and whether it was resumed. `stack` closes the connection."""
        connection = http.client.HTTPSConnection("127.0.0.1", daemon.port, context=context, timeout=60)
        tcp_socket = socket.create_connection(("127.0.0.1", daemon.port), timeout=60)
        stack.callback(tcp_socket.close)
        tcp_socket.sendall(f"CONNECT {host}:443 HTTP/1.1\r\nHost: {host}:443\r\n\r\n".encode())
        assert tcp_socket.recv(1000).startswith(b"HTTP/1.1 200 ")
        connection.sock = stack.enter_context(context.wrap_socket(tcp_socket, server_hostname=host, session=session))
        assert request_on(connection, "GET", "/v2/").status in (200, 401)
        pid = daemon.pid_serving(connection)
        assert pid is not None and connection.sock.session is not None
        return pid, connection.sock.session, bool(connection.sock.session_reused)

    def connect_to_all(session: ssl.SSLSession) -> dict[int, bool]:
        """Return for each process whether the session was resumed. The next connection goes to one with fewer."""
        by_pid: dict[int, bool] = {}
        deadline = time.monotonic() + 60
        with ExitStack() as stack:
            while len(by_pid) < WORKERS:
                assert time.monotonic() < deadline, f"only {sorted(by_pid)} have got a connection"
                pid, _, resumed = connect_with_session(stack, hostname(FAKE), session)
                by_pid[pid] = resumed
        return by_pid

    context.check_hostname = False
    with ExitStack() as stack:
        _, session, resumed = connect_with_session(stack, hostname(FAKE), None)
    assert not resumed
    assert list(connect_to_all(session).values()) == [True] * WORKERS
    worker = daemon.serving_pids[1]
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: daemon.output_text.count("worker 1 serves") == 2, "the worker is replaced")
    resumed_by = connect_to_all(session)
    assert worker not in resumed_by
    assert list(resumed_by.values()) == [True] * WORKERS
    with ExitStack() as stack:
        assert not connect_with_session(stack, hostname(HUB), session)[2]


# stopping


@pytest.mark.parametrize("signal_all", [False, True], ids=["main process", "all processes"])
@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_stop_lets_transfers_of_all_processes_finish(
    upstreams: Upstreams, start_daemon: StartMultiProcessDaemon, signal_number: signal.Signals, signal_all: bool
) -> None:
    """A terminal sends SIGINT on Ctrl-C to all processes, and systemd sends SIGTERM to all processes."""
    daemon = start_daemon()
    blob = GatedBlob(upstreams, f"finishing/{signal_number.name.lower()}/{signal_all}".lower(), 8 * MIB, 4 * MIB)
    pids = daemon.serving_pids
    with daemon.connection_to_each_process(FAKE) as connections:
        responses = [blob.start_download(connection) for connection in connections.values()]
        for pid in reversed(pids) if signal_all else pids[:1]:
            os.kill(pid, signal_number)
        daemon._terminating = True
        wait_until(lambda: not is_listening(daemon.port), "the daemon stops listening")
        assert daemon.serving_pids == pids
        blob.gate.set()
        for response in responses:
            assert response.read() == blob.data[MIB:]
    assert daemon.stop() in (0, -signal_number)
    assert all_exited(pids)
    assert "rror" not in daemon.output_text.rpartition(f"Received {signal_number.name}")[2]
    assert " exited (" not in daemon.output_text


def test_stop_while_idle_is_immediate(start_daemon: StartMultiProcessDaemon) -> None:
    daemon = start_daemon()
    pids = daemon.serving_pids
    with daemon.connection_to_each_process(FAKE) as connections:
        for connection in connections.values():
            request_on(connection, "GET", "/v2/")
        assert daemon.stop(timeout=5) in CLEAN_EXIT_STATUSES
    assert all_exited(pids)


def test_second_signal_aborts_transfers(upstreams: Upstreams, start_daemon: StartMultiProcessDaemon) -> None:
    daemon = start_daemon()
    blob = GatedBlob(upstreams, "twice", 8 * MIB, 4 * MIB)
    pids = daemon.serving_pids
    with daemon.connection_to_each_process(FAKE) as connections:
        responses = [blob.start_download(connection) for connection in connections.values()]
        daemon.terminate()
        wait_until(lambda: not is_listening(daemon.port), "the daemon stops listening")
        daemon.send_signal(signal.SIGTERM)
        for response in responses:
            with pytest.raises((http.client.IncompleteRead, ConnectionError)):
                response.read()
        assert daemon.stop(timeout=10) in CLEAN_EXIT_STATUSES
    blob.gate.set()
    assert all_exited(pids)


def test_stop_while_workers_start(start_daemon: StartMultiProcessDaemon) -> None:
    daemon = start_daemon()
    daemon.stop()
    daemon.launch()
    wait_until(lambda: is_listening(daemon.port), "the daemon listens")
    pids = daemon.serving_pids
    assert daemon.stop(timeout=10) in CLEAN_EXIT_STATUSES
    wait_until(lambda: all_exited(pids), "the starting workers end as well")


# reload


def test_reload_applies_to_all_processes(
    upstreams: Upstreams, start_daemon: StartMultiProcessDaemon, tmp_path: Path
) -> None:
    file = tmp_path / "environment"
    file.write_text("")
    daemon = start_daemon(f"--env-file={file}", unset=("REGISTRIES",))
    digest = upstreams.fake.put_blob("reloaded", b"content")
    path = f"/v2/reloaded/blobs/{digest}?ns=fake.test"

    def is_served(connection: http.client.HTTPConnection) -> bool:
        return request_on(connection, "GET", path).status == 200

    with daemon.hosted_connection_to_each_process() as connections:
        assert [request_on(connection, "GET", path).status for connection in connections.values()] == [404] * WORKERS
        file.write_text(f"REGISTRIES=fake.test\nCACHE_DIR={tmp_path}/elsewhere\n")
        daemon.send_signal(signal.SIGHUP)
        wait_until(lambda: "reloaded: " in daemon.output_text, "the reload")
        for connection in connections.values():
            wait_until(partial(is_served, connection), "the process serves the new registry")
    worker = daemon.serving_pids[1]
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: daemon.output_text.count("worker 1 serves") == 2, "the worker is replaced")
    with daemon.hosted_connection_to_each_process() as connections:
        assert [request_on(connection, "GET", path).body for connection in connections.values()] == [
            b"content"
        ] * WORKERS
    assert "CACHE_DIR has changed; restart the daemon to apply it" in daemon.output_text
    assert not (tmp_path / "elsewhere").exists()
    file.write_text("REGISTRIES=a/b\n")
    daemon.send_signal(signal.SIGHUP)
    wait_until(lambda: "not reloaded" in daemon.output_text, "the failed reload is logged")
    with daemon.hosted_connection_to_each_process() as connections:
        assert [request_on(connection, "GET", path).status for connection in connections.values()] == [200] * WORKERS


# the hosted registry


def hostname(url: str) -> str:
    return url.partition("//")[2]


def upload_path(location: str) -> str:
    return location.partition("?")[0]


def test_push_alternates_between_processes(daemon: MultiProcessDaemon) -> None:
    data = images.random_bytes(3_000_000, "alternating")
    layer_chunks = [data[start : start + 500_000] for start in range(0, len(data), 500_000)]
    config = TypedContent("application/vnd.oci.image.config.v1+json", b"{}")
    layer = TypedContent("application/vnd.oci.image.layer.v1.tar", data)
    image = images.build_image_from_blobs(config, [layer])
    with daemon.hosted_connection_to_each_process() as connections:
        connection_cycle = iter([*connections.values()] * 20)
        for blob, chunks in ((config, [config.data]), (layer, layer_chunks)):
            upload = upload_path(
                request_on(next(connection_cycle), "POST", "/v2/alternating/blobs/uploads/").headers["location"]
            )
            size = 0
            for chunk in chunks:
                content_range = f"{size}-{size + len(chunk) - 1}"
                response = request_on(next(connection_cycle), "PATCH", upload, chunk, {"Content-Range": content_range})
                size += len(chunk)
                assert (response.status, response.headers["range"]) == (202, f"0-{size - 1}")
                upload = upload_path(response.headers["location"])
            assert request_on(next(connection_cycle), "GET", upload).headers["range"] == f"0-{size - 1}"
            rejection = request_on(
                next(connection_cycle), "PATCH", upload, b"x", {"Content-Range": f"{size + 5}-{size + 5}"}
            )
            assert rejection.status == 416
            assert request_on(next(connection_cycle), "PUT", f"{upload}?digest={blob.digest}").status == 201
            assert request_on(next(connection_cycle), "GET", upload).status == 404
        manifest = image.manifest
        put_response = request_on(
            next(connection_cycle), "PUT", "/v2/alternating/manifests/1", manifest.data, {"Content-Type": OCI_MANIFEST}
        )
        assert put_response.status == 201
        for connection in connections.values():
            assert request_on(connection, "GET", "/v2/alternating/manifests/1").body == manifest.data
            assert request_on(connection, "GET", f"/v2/alternating/blobs/{layer.digest}").body == data


def test_concurrent_upload_writes_are_rejected(daemon: MultiProcessDaemon) -> None:
    with daemon.hosted_connection_to_each_process() as connections:
        first_connection, second_connection, third_connection = connections.values()
        upload = upload_path(request_on(first_connection, "POST", "/v2/busy/blobs/uploads/").headers["location"])
        second_connection.putrequest("PATCH", upload)
        second_connection.putheader("Content-Length", str(2 * HALF_UPLOAD))
        second_connection.endheaders()
        second_connection.send(b"a" * HALF_UPLOAD)
        wait_until(
            lambda: request_on(first_connection, "GET", upload).headers["range"] != "0-0", "some of the data is written"
        )
        assert request_on(third_connection, "PATCH", upload, b"xyz").status not in (200, 202)
        second_connection.send(b"b" * HALF_UPLOAD)
        assert read_response(second_connection.getresponse()).status == 202
        digest = sha256_digest(b"a" * HALF_UPLOAD + b"b" * HALF_UPLOAD)
        assert request_on(third_connection, "PUT", f"{upload}?digest={digest}").status == 201


def test_concurrent_pushes_of_the_same_tag(daemon: MultiProcessDaemon) -> None:
    response = _push_blob(daemon, "contested", b"{}")
    variants = [
        images.build_image_from_blobs(
            TypedContent("application/vnd.oci.image.config.v1+json", b"{}"), [], subject=subject
        )
        for subject in (None, TypedContent(OCI_MANIFEST, b"x"), TypedContent(OCI_MANIFEST, b"y"))
    ]
    assert response.status == 201
    with daemon.hosted_connection_to_each_process() as connections, ThreadPoolExecutor(WORKERS) as pool:

        def push(connection: http.client.HTTPConnection, image: SampleImage) -> list[int]:
            content = image.manifest
            headers = {"Content-Type": OCI_MANIFEST}
            target = "/v2/contested/manifests/1"
            return [request_on(connection, "PUT", target, content.data, headers).status for _ in range(20)]

        statuses = list(pool.map(push, connections.values(), variants))
        assert statuses == [[201] * 20] * WORKERS
        bodies = {
            request_on(connection, "GET", "/v2/contested/manifests/1").body for connection in connections.values()
        }
        assert len(bodies) == 1 and bodies <= {variant.manifest.data for variant in variants}
        for connection in connections.values():
            for variant, subject in zip(variants, (None, sha256_digest(b"x"), sha256_digest(b"y")), strict=True):
                assert (
                    request_on(connection, "GET", f"/v2/contested/manifests/{variant.digest}").body
                    == variant.manifest.data
                )
                if subject is not None:
                    descriptors = request_on(connection, "GET", f"/v2/contested/referrers/{subject}").json["manifests"]
                    assert [descriptor["digest"] for descriptor in descriptors] == [variant.digest]


def test_referrers_are_consistent_across_processes(daemon: MultiProcessDaemon) -> None:
    _push_blob(daemon, "referring", b"{}")
    subject = TypedContent(OCI_MANIFEST, b"the subject")
    config = TypedContent("application/vnd.oci.image.config.v1+json", b"{}")
    referrers = [
        images.build_image_from_blobs(config, [TypedContent(f"application/x.{number}", b"{}")], subject=subject)
        for number in range(9)
    ]
    path = f"/v2/referring/referrers/{subject.digest}"
    expected: set[str] = set()
    with daemon.hosted_connection_to_each_process() as connections:
        connection_list = list(connections.values())

        def check_referrers() -> None:
            for connection in connection_list:
                assert {
                    descriptor["digest"] for descriptor in request_on(connection, "GET", path).json["manifests"]
                } == expected

        for number, image in enumerate(referrers):
            target = f"/v2/referring/manifests/{image.digest}"
            headers = {"Content-Type": OCI_MANIFEST}
            assert (
                request_on(connection_list[number % WORKERS], "PUT", target, image.manifest.data, headers).status == 201
            )
            expected.add(image.digest)
            check_referrers()
        for number, image in enumerate(referrers):
            target = f"/v2/referring/manifests/{image.digest}"
            assert request_on(connection_list[(number + 1) % WORKERS], "DELETE", target).status == 202
            expected.discard(image.digest)
            check_referrers()


def test_cli_removal_applies_to_all_processes(upstreams: Upstreams, daemon: MultiProcessDaemon) -> None:
    image = images.build_small_image("removed")
    push_image(daemon, "removed", "1", image)
    upstreams.fake.put("removed", "1", image)
    blob = f"/v2/removed/blobs/{image.layers[0].digest}"
    headers = {"Accept": images.ACCEPT_MANIFESTS}
    with (
        daemon.hosted_connection_to_each_process() as hosted_connections,
        daemon.connection_to_each_process(FAKE) as proxied_connections,
    ):
        for connection in hosted_connections.values():
            assert request_on(connection, "GET", "/v2/removed/manifests/1").status == 200
        result = daemon.run_cli("rm", "removed:1")
        assert result.returncode == 0, result.stderr
        assert [
            request_on(connection, "GET", "/v2/removed/manifests/1").status
            for connection in hosted_connections.values()
        ] == [404] * 3
        for connection in proxied_connections.values():
            assert request_on(connection, "GET", "/v2/removed/manifests/1", headers=headers).status == 200
        cache_statuses = [
            request_on(connection, "GET", blob).cache_status for connection in proxied_connections.values()
        ]
        assert cache_statuses == ["MISS", "HIT", "HIT"]
        result = daemon.run_cli("rm", f"fake.test/removed@{image.layers[0].digest}", "fake.test/removed:1")
        assert result.returncode == 0, result.stderr
        upstreams.fake.requests.clear()
        cache_statuses = [
            request_on(connection, "GET", blob).cache_status for connection in proxied_connections.values()
        ]
        assert cache_statuses == ["MISS", "HIT", "HIT"]


def test_worker_writes_count_towards_cache_size(upstreams: Upstreams, start_daemon: StartMultiProcessDaemon) -> None:
    daemon = start_daemon(CACHE_MAX_SIZE="10m")
    digests = [
        upstreams.fake.put_blob("crowded", images.random_bytes(3 * MIB, f"crowded {number}")) for number in range(7)
    ]
    with daemon.connection_to_each_process(FAKE) as connections:
        connection_list = list(connections.values())
        for number, digest in enumerate(digests):
            assert request_on(connection_list[number % WORKERS], "GET", f"/v2/crowded/blobs/{digest}").status == 200

        def blobs_present() -> list[bool]:
            folder = daemon.state_folder / "cache/docker/registry/v2/blobs/sha256"
            return [(folder / digest[7:9] / digest[7:] / "data").exists() for digest in digests]

        wait_until(lambda: blobs_present() == [False] * 4 + [True] * 3, "the oldest blobs are evicted")
        status = daemon.run_cli("ls", "--json")
        assert status.returncode == 0, status.stderr


def test_garbage_collection_during_a_push(daemon: MultiProcessDaemon) -> None:
    """Old blobs that a running push uses again are kept. A blob that no push uses is deleted."""
    image = images.build_small_image("collected")
    unreferenced = b"forgotten"
    for content in (*(blob.data for blob in image.blobs), unreferenced):
        assert _push_blob(daemon, "collected", content).status == 201
    blobs = daemon.state_folder / "registry/docker/registry/v2/blobs/sha256"
    for path in blobs.rglob("data"):
        os.utime(path, (time.time() - 7200,) * 2)
    with daemon.hosted_connection_to_each_process() as connections:
        *other_connections, worker_connection = connections.values()
        upload = upload_path(request_on(worker_connection, "POST", "/v2/collected/blobs/uploads/").headers["location"])
        worker_connection.putrequest("PATCH", upload)
        worker_connection.putheader("Content-Length", str(2 * HALF_UPLOAD))
        worker_connection.endheaders()
        worker_connection.send(b"a" * HALF_UPLOAD)
        for blob in image.blobs:
            assert request_on(other_connections[1], "HEAD", f"/v2/collected/blobs/{blob.digest}").status == 200
        result = daemon.run_cli("gc", "--delete-untagged", "--grace", "5m")
        assert result.returncode == 0, result.stderr
        manifest = image.manifest
        for connection in other_connections:
            assert request_on(connection, "GET", f"/v2/collected/blobs/{sha256_digest(unreferenced)}").status == 404
            response = request_on(
                connection, "PUT", "/v2/collected/manifests/1", manifest.data, {"Content-Type": OCI_MANIFEST}
            )
            assert response.status == 201
        worker_connection.send(b"b" * HALF_UPLOAD)
        assert read_response(worker_connection.getresponse()).status == 202
        digest = sha256_digest(b"a" * HALF_UPLOAD + b"b" * HALF_UPLOAD)
        assert request_on(worker_connection, "PUT", f"{upload}?digest={digest}").status == 201
        for blob in image.blobs:
            assert request_on(worker_connection, "GET", f"/v2/collected/blobs/{blob.digest}").body == blob.data


def test_concurrent_pushes_and_garbage_collections(daemon: MultiProcessDaemon) -> None:
    """Images are pushed through all processes and pulled from another one, while garbage is collected all the time."""
    stop = threading.Event()

    def collect() -> int:
        count = 0
        while not stop.is_set():
            result = daemon.run_cli("gc", "--delete-untagged", "--grace", "2m")
            assert result.returncode == 0, result.stderr
            count += 1
        return count

    with daemon.hosted_connection_to_each_process() as connections, ThreadPoolExecutor(WORKERS + 1) as pool:
        connection_list = list(connections.values())
        collector = pool.submit(collect)
        try:
            for number in range(12):
                image = images.build_small_image(f"always {number}", size=1000)
                push_image(daemon, f"always/{number % 4}", str(number), image, connection_list)
                pull_connection = connection_list[number % WORKERS]
                for blob in image.blobs:
                    assert (
                        request_on(pull_connection, "GET", f"/v2/always/{number % 4}/blobs/{blob.digest}").body
                        == blob.data
                    )
        finally:
            stop.set()
        assert collector.result(60) >= 1
    check_result = daemon.run_cli("check")
    assert check_result.returncode == 0, check_result.stdout + check_result.stderr


def test_htpasswd_changes_apply_to_all_processes(start_daemon: StartMultiProcessDaemon, tmp_path: Path) -> None:
    import bcrypt

    def write_htpasswd(*users: str) -> None:
        password_hash = bcrypt.hashpw(b"word", bcrypt.gensalt(4)).decode()
        new_file = tmp_path / "htpasswd.new"
        new_file.write_text("".join(f"{user}:{password_hash}\n" for user in users))
        new_file.rename(tmp_path / "htpasswd")

    def request_statuses(user: str) -> list[int]:
        login = {"Authorization": basic_authorization(user, "word")}
        return [request_on(connection, "GET", "/v2/", headers=login).status for connection in connections.values()]

    write_htpasswd("alice")
    daemon = start_daemon(HTPASSWD_FILE=str(tmp_path / "htpasswd"))
    with daemon.hosted_connection_to_each_process() as connections:
        assert (request_statuses("alice"), request_statuses("bob")) == ([200] * WORKERS, [401] * WORKERS)
        write_htpasswd("bob")
        assert (request_statuses("alice"), request_statuses("bob")) == ([401] * WORKERS, [200] * WORKERS)


def test_token_is_valid_in_all_processes(start_daemon: StartMultiProcessDaemon, tmp_path: Path) -> None:
    import bcrypt

    (tmp_path / "htpasswd").write_text(f"alice:{bcrypt.hashpw(b'word', bcrypt.gensalt(4)).decode()}\n")
    daemon = start_daemon(HTPASSWD_FILE=str(tmp_path / "htpasswd"), ANONYMOUS_PULL="true")
    login = {"Authorization": basic_authorization("alice", "word")}
    with daemon.hosted_connection_to_each_process() as connections:
        for connection in connections.values():
            token = request_on(connection, "GET", "/v2/token", headers=login).json["token"]
            for other_connection in connections.values():
                response = request_on(
                    other_connection, "POST", "/v2/a/blobs/uploads/", headers={"Authorization": f"Bearer {token}"}
                )
                assert response.status == 202


def test_upstream_token_is_known_to_all_processes(upstreams: Upstreams, daemon: MultiProcessDaemon) -> None:
    """Alice gets a token through one process. The others know her access to the cache too, without upstream."""
    image = upstreams.push_to_hub("alice/everywhere", "1", images.build_small_image("everywhere"), owners={"alice"})
    path = f"/v2/alice/everywhere/blobs/{image.layers[0].digest}"
    query = "service=registry.docker.io&scope=repository:alice/everywhere:pull"
    login = {"Authorization": upstreams.basic_authorization("alice")}
    with (
        daemon.connection_to_each_process(TOKEN_URL) as realm_connections,
        daemon.connection_to_each_process(HUB) as connections,
    ):
        realm_connection, registry_connection = list(realm_connections.values())[1], list(connections.values())[1]
        token = request_on(realm_connection, "GET", f"/token?{query}", headers=login).json["token"]
        headers = {"Authorization": f"Bearer {token}"}

        def is_hit(connection: http.client.HTTPConnection) -> bool:
            return request_on(connection, "GET", path, headers=headers).cache_status == "HIT"

        assert request_on(registry_connection, "GET", path, headers=headers).status == 200
        with upstreams.stopped():
            for connection in connections.values():
                wait_until(partial(is_hit, connection), "the process knows her access")


# start and log


def test_systemd_socket_activation(upstreams: Upstreams, start_daemon: StartMultiProcessDaemon, tmp_path: Path) -> None:
    proxy_socket = socket.create_server(("127.0.0.1", 0))
    http_socket = socket.create_server(("127.0.0.1", 0))
    notify_socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notify_socket.bind(str(tmp_path / "notify"))
    notify_socket.settimeout(30)
    daemon = MultiProcessDaemon(tmp_path / "daemon", upstreams.settings)
    daemon.port, daemon.http_port = proxy_socket.getsockname()[1], http_socket.getsockname()[1]
    daemon.environment |= {
        "PROXY_LISTEN": "systemd:domain=INET:name=proxy",
        "REGISTRY_HTTP_LISTEN": "systemd:domain=INET:name=http",
        "LISTEN_FDS": "2",
        "LISTEN_FDNAMES": "proxy:http",
        "NOTIFY_SOCKET": str(tmp_path / "notify"),
    }
    # Far above those that the shell gives to the daemon.
    descriptors = [fcntl.fcntl(passed, fcntl.F_DUPFD, 100) for passed in (proxy_socket, http_socket)]
    script = f'export LISTEN_PID=$$; exec 3<&{descriptors[0]} 4<&{descriptors[1]}; exec "$@"'
    for descriptor in descriptors:
        os.set_inheritable(descriptor, True)
    log = (tmp_path / "daemon/log").open("ab")
    with subprocess.Popen(
        ["bash", "-c", script, "bash", *daemon.argv], env=daemon.environment, cwd=daemon.folder,
        pass_fds=descriptors, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
    ) as process:  # fmt: skip
        try:
            daemon._popen = process
            assert notify_socket.recv(65536).startswith(b"READY=1")
            wait_until(lambda: daemon.output_text.count(" serves") == WORKERS - 1, "all workers serve")
            daemon.ca_file.write_bytes(request_directly("GET", daemon.url + "/ca.crt").body)
            digest = upstreams.fake.put_blob("passed/sockets", b"content")
            with (
                daemon.connection_to_each_process(FAKE) as connections,
                daemon.hosted_connection_to_each_process() as hosted_connections,
            ):
                for connection in connections.values():
                    assert request_on(connection, "GET", f"/v2/passed/sockets/blobs/{digest}").body == b"content"
                for connection in hosted_connections.values():
                    assert request_on(connection, "GET", "/v2/").status == 200
            passed_sockets = {f"socket:[{os.fstat(sock.fileno()).st_ino}]" for sock in (proxy_socket, http_socket)}
            for pid in (daemon.fork_server_pid, *daemon.serving_pids[1:]):
                assert not passed_sockets & open_file_targets(pid)
            pids = daemon.serving_pids
            process.terminate()
            assert notify_socket.recv(65536).startswith(b"STOPPING=1")
            assert process.wait(30) in CLEAN_EXIT_STATUSES
            assert all_exited(pids)
        finally:
            process.kill()
            for sock in (proxy_socket, http_socket, notify_socket):
                sock.close()
    log.close()


def test_json_log_of_all_processes(start_daemon: StartMultiProcessDaemon) -> None:
    daemon = start_daemon(LOG_FORMAT="json")
    with daemon.hosted_connection_to_each_process() as connections:
        for number, connection in enumerate(connections.values()):
            request_on(connection, "GET", f"/v2/log/{number}/tags/list")
        wait_until(lambda: daemon.output_text.count('"path": "/v2/log/') == WORKERS, "all processes have logged")
    lines = [json.loads(line) for line in daemon.output_text.splitlines()]
    paths = [line["path"] for line in lines if line["namespace"] == "dockerproxy.access" and "/log/" in line["path"]]
    assert sorted(paths) == [f"/v2/log/{number}/tags/list" for number in range(WORKERS)]


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_daemonized_with_a_log_file(upstreams: Upstreams, tmp_path: Path, log_format: str) -> None:
    """If twistd runs in the background, the workers log to the same file as the main process."""
    daemon = MultiProcessDaemon(tmp_path / "daemon", {**upstreams.settings, "LOG_FORMAT": log_format})
    log, pid_file = tmp_path / "the.log", tmp_path / "the.pid"
    program = [part for part in twistd_argv() if not part.startswith("--")]
    subprocess.run(
        [*program, f"--logfile={log}", f"--pidfile={pid_file}", "dockerproxy"],
        env=daemon.environment, cwd=daemon.folder, check=True, timeout=60, stdin=subprocess.DEVNULL,
        stdout=(tmp_path / "out").open("wb"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    wait_until(pid_file.exists, "the pid file is written")
    main_pid = int(pid_file.read_text())
    daemon._popen = type("Popen", (), {"pid": main_pid})()
    pids = [main_pid]
    try:
        wait_until(lambda: log.read_text().count(" serves") == WORKERS - 1, "all workers serve")
        pids = daemon.serving_pids
        with daemon.hosted_connection_to_each_process() as connections:
            for number, connection in enumerate(connections.values()):
                assert request_on(connection, "GET", f"/v2/log/{number}/tags/list").status == 404
            wait_until(lambda: log.read_text().count("tags/list") >= WORKERS, "all processes have logged")
    finally:
        os.kill(main_pid, signal.SIGTERM)
        wait_until(lambda: all_exited(pids), "all processes end")
    assert (tmp_path / "out").read_bytes() == b""
    if log_format == "json":
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        access = [line for line in lines if line["namespace"] == "dockerproxy.access" and "/log/" in line["path"]]
        assert sorted(line["path"] for line in access) == [f"/v2/log/{number}/tags/list" for number in range(WORKERS)]
        assert {line["status"] for line in access} == {404}
    else:
        logged_numbers = re.findall(
            r"^\d{4}-\S+ \[dockerproxy\.access#info\] 127\.0\.0\.1 GET \S+/v2/log/(\d)/tags/list 404 ",
            log.read_text(), re.MULTILINE,
        )  # fmt: skip
        assert sorted(logged_numbers) == [str(number) for number in range(WORKERS)]
    assert "Traceback" not in log.read_text()


def test_worker_that_cannot_start_does_not_affect_others(start_daemon: StartMultiProcessDaemon, tmp_path: Path) -> None:
    """If the htpasswd file is damaged, running workers keep the users, and a new worker logs why it cannot start."""
    import bcrypt

    htpasswd = tmp_path / "htpasswd"
    valid_content = f"alice:{bcrypt.hashpw(b'word', bcrypt.gensalt(4)).decode()}\n"
    htpasswd.write_text(valid_content)
    daemon = start_daemon(HTPASSWD_FILE=str(htpasswd))
    htpasswd.write_text("damaged")
    os.kill(daemon.serving_pids[1], signal.SIGKILL)
    wait_until(lambda: "worker 1 cannot start: HTPASSWD_FILE: " in daemon.output_text, "the error is logged")
    assert "Traceback" not in daemon.output_text
    for _ in range(2 * WORKERS):
        assert daemon.client.get(f"{FAKE}/v2/").status == 200
    htpasswd.write_text(valid_content)
    wait_until(lambda: daemon.output_text.count("worker 1 serves") == 2, "the worker starts again", timeout=40)


# helpers


def _push_blob(
    daemon: MultiProcessDaemon, name: str, data: bytes, connections: list[http.client.HTTPConnection] | None = None
) -> BufferedResponse:
    with ExitStack() as stack:
        connection_cycle = iter(
            (connections or list(stack.enter_context(daemon.hosted_connection_to_each_process()).values())) * 2
        )
        upload = upload_path(
            request_on(next(connection_cycle), "POST", f"/v2/{name}/blobs/uploads/").headers["location"]
        )
        assert request_on(next(connection_cycle), "PATCH", upload, data).status == 202
        return request_on(next(connection_cycle), "PUT", f"{upload}?digest={sha256_digest(data)}")


def push_image(
    daemon: MultiProcessDaemon,
    name: str,
    tag: str,
    image: SampleImage,
    connections: list[http.client.HTTPConnection] | None = None,
) -> None:
    for blob in image.blobs:
        _push_blob(daemon, name, blob.data, connections)
    with ExitStack() as stack:
        connection = (connections or list(stack.enter_context(daemon.hosted_connection_to_each_process()).values()))[-1]
        target, headers = f"/v2/{name}/manifests/{tag}", {"Content-Type": OCI_MANIFEST}
        assert request_on(connection, "PUT", target, image.manifest.data, headers).status == 201
