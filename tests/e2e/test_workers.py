"""A daemon of three processes, which is to be as one: whoever a client gets to, whoever dies, whatever changes."""

from __future__ import annotations

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
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.house import images
from tests.e2e.house.daemon import twistd
from tests.e2e.house.fake_registry import gated
from tests.e2e.house.images import OCI_MANIFEST, Content, Image, sha256
from tests.e2e.house.process import eventually, listening
from tests.e2e.house.several import WORKERS, Several, ask, gone, open_files
from tests.e2e.house.upstreams import FAKE, HUB, TOKENS, Upstreams
from tests.e2e.house.wire import Answer, read, request

MIB = 1 << 20
HALF = MIB  # bytes of an upload: enough for some of it to be written
GOOD_END = (0, -signal.SIGTERM)

RunSeveral = Callable[..., Several]


@pytest.fixture(scope="module")
def several(upstreams: Upstreams, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Several]:
    """A daemon that none of the tests harms."""
    proxy = Several(tmp_path_factory.mktemp("several"), upstreams.settings)
    with proxy.running_for(lambda: upstreams.secrets):
        yield proxy


@pytest.fixture
def run_several(upstreams: Upstreams, tmp_path: Path) -> Iterator[RunSeveral]:
    """Return a function that starts a daemon for one test, which need not be there at the end."""
    running: list[Several] = []

    def run(*options: str, without: tuple[str, ...] = (), **settings: str) -> Several:
        proxy = Several(tmp_path / "several", {**upstreams.settings, **settings})
        for name in without:
            del proxy.environment[name]
        proxy.argv += options
        running.append(proxy)
        proxy.start()
        return proxy

    yield run
    for proxy in running:
        pids = proxy.processes if proxy.running else []
        proxy.stop()
        assert gone(pids)
        proxy.check_log(upstreams.secrets)


class Blob:
    """A blob upstream, which stops after `gate_at` bytes for as long as the gate is shut."""

    def __init__(self, upstreams: Upstreams, name: str, size: int, gate_at: int, times: int | None = None) -> None:
        self.fake = upstreams.fake
        self.data = images.noise(size, name)
        self.digest = self.fake.put_blob(name, self.data)
        self.url = f"{FAKE}/v2/{name}/blobs/{self.digest}"
        self.path = f"/v2/{name}/blobs/{self.digest}"
        self.gate = threading.Event()
        self.fake.on("GET", self.digest, gated(gate_at, self.gate), times=times)

    @property
    def asked_for(self) -> list[str | None]:
        """The ranges that were asked for."""
        return [seen.headers.get("range") for seen in self.fake.seen("GET", self.digest)]

    def begin(self, connection: http.client.HTTPConnection) -> http.client.HTTPResponse:
        """Ask for it, and read its first MiB."""
        connection.request("GET", self.path)
        response = connection.getresponse()
        assert response.read(MIB) == self.data[:MIB]
        return response


# one daemon to its clients


def test_all_processes_serve(several: Several) -> None:
    assert len(several.processes) == WORKERS
    with several.one_each(FAKE) as connections, several.one_each_hosted() as hosted:
        for connection in (*connections.values(), *hosted.values()):
            assert ask(connection, "GET", "/v2/").status == 200


def test_connections_are_spread_evenly(several: Several) -> None:
    with ExitStack() as stack:
        owners = []
        for _ in range(4 * WORKERS):
            connection = several.client.connection(FAKE)
            stack.callback(connection.close)
            owners.append(several.connect(connection))
        assert {owners.count(pid) for pid in several.processes} == {4}


def test_the_metrics_are_those_of_all(upstreams: Upstreams, run_several: RunSeveral) -> None:
    """Whoever is asked. What one that was killed had counted is not lost, and its successor goes on from there."""
    daemon = run_several()
    blob = upstreams.fake.put_blob("counted/by/all", b"content")
    path = f"/v2/counted/by/all/blobs/{blob}"

    def told() -> list[dict[str, str]]:
        """Return the metrics that each process tells."""
        found = []
        with daemon.one_each_hosted() as connections:
            for connection in connections.values():
                answer = ask(connection, "GET", "/metrics")
                assert answer.status == 200 and answer.headers["content-type"].startswith("text/plain; version=0.0.4")
                lines = [line for line in answer.body.decode().splitlines() if not line.startswith("#")]
                # Without what this counts itself.
                found.append(dict(line.rsplit(" ", 1) for line in lines if 'verdict="-"' not in line))
        return found

    def hits() -> set[int]:
        return {int(each['dockerproxy_requests_total{verdict="HIT",code="2xx"}']) for each in told()}

    def ask_all() -> None:
        with daemon.one_each(FAKE) as connections:
            for connection in connections.values():
                assert ask(connection, "GET", path).body == b"content"

    ask_all()
    ask_all()
    eventually(lambda: hits() == {2 * WORKERS - 1}, "all are counted")
    counted, *others = told()
    assert others == [counted] * (WORKERS - 1)
    assert counted['dockerproxy_requests_total{verdict="MISS",code="2xx"}'] == "1"
    assert counted['dockerproxy_sent_bytes_total{verdict="HIT"}'] == str(len(b"content") * (2 * WORKERS - 1))
    assert int(counted["dockerproxy_cache_bytes"]) == len(b"content")
    before = daemon.processes
    os.kill(before[-1], signal.SIGKILL)
    eventually(lambda: daemon.text.count(" serves") == WORKERS, "another one serves in its place")
    assert hits() == {2 * WORKERS - 1}
    ask_all()
    eventually(lambda: hits() == {3 * WORKERS - 1}, "all are counted on")


def test_twenty_cold_clients_of_all_processes_and_one_download(upstreams: Upstreams, several: Several) -> None:
    """The upstream stops after 4 MiB until all clients have begun."""
    blob = Blob(upstreams, "twenty/of/all", 24 * MIB, 4 * MIB)
    with ExitStack() as stack, ThreadPoolExecutor(20) as pool:
        connections = [several.client.connection(FAKE) for _ in range(20)]
        owners = []
        for connection in connections:
            stack.callback(connection.close)
            owners.append(several.connect(connection))
        assert min(owners.count(pid) for pid in several.processes) >= 5
        responses = list(pool.map(blob.begin, connections))
        blob.gate.set()
        digests = list(pool.map(lambda response: sha256(blob.data[:MIB] + response.read()), responses))
    assert digests == [blob.digest] * 20
    assert blob.asked_for == [None]
    verdicts = sorted(response.headers["X-Cache"] for response in responses)
    assert verdicts == ["JOINED"] * 19 + ["MISS"]
    with several.one_each(FAKE) as each:
        assert [ask(connection, "HEAD", blob.path).verdict for connection in each.values()] == ["HIT"] * WORKERS


def test_twenty_at_the_very_same_time(upstreams: Upstreams, several: Several) -> None:
    """Who fetches it is decided between the processes, several times over."""
    with ExitStack() as stack, ThreadPoolExecutor(20) as pool:
        connections = [several.client.connection(FAKE) for _ in range(20)]
        for connection in connections:
            stack.callback(connection.close)
            connection.connect()
        for number in range(10):
            data = images.noise(300_000, f"same time {number}")
            digest = upstreams.fake.put_blob("same/time", data)
            path = f"/v2/same/time/blobs/{digest}"
            answers = list(pool.map(lambda connection, path=path: ask(connection, "GET", path), connections))
            assert {(answer.status, sha256(answer.body)) for answer in answers} == {(200, digest)}
            assert len(upstreams.fake.seen("GET", digest)) == 1


# who dies


def test_the_worker_that_downloads_is_killed(upstreams: Upstreams, run_several: RunSeveral) -> None:
    proxy = run_several()
    blob = Blob(upstreams, "killed/worker", 12 * MIB, 6 * MIB, times=1)
    before = proxy.processes
    with proxy.one_each(FAKE) as connections:
        leader = before[1]
        responses = {pid: blob.begin(connections[pid]) for pid in (leader, before[0], before[2])}
        assert len(blob.asked_for) == 1
        os.kill(leader, signal.SIGKILL)
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            responses[leader].read()
        for pid in (before[0], before[2]):
            assert responses[pid].read() == blob.data[MIB:]
    blob.gate.set()
    _, resumed = blob.asked_for
    assert resumed is not None
    assert MIB <= int(resumed.removeprefix("bytes=").removesuffix("-")) <= 6 * MIB
    eventually(lambda: proxy.text.count("worker 1 serves") == 2, "the worker is replaced")
    assert leader not in proxy.processes
    with proxy.one_each(FAKE) as each:
        assert [ask(connection, "HEAD", blob.path).verdict for connection in each.values()] == ["HIT"] * WORKERS


def test_the_first_process_is_killed(upstreams: Upstreams, run_several: RunSeveral) -> None:
    proxy = run_several()
    blob = Blob(upstreams, "killed/first", 12 * MIB, 6 * MIB, times=1)
    serving = proxy.processes
    pids = [*serving, proxy.fork_server]
    with proxy.one_each(FAKE) as connections:
        responses = [blob.begin(connections[pid]) for pid in reversed(serving)]  # a worker downloads
        proxy.kill()
        for response in responses:
            with pytest.raises((http.client.IncompleteRead, ConnectionError)):
                response.read()
    eventually(lambda: gone(pids), "the workers end with the first process, as does who started them")
    blob.gate.set()
    proxy.start()
    with proxy.one_each(FAKE) as connections:
        for connection in connections.values():
            assert ask(connection, "GET", blob.path).body == blob.data
    _, resumed = blob.asked_for
    assert resumed is not None and resumed.startswith("bytes=")
    assert list((proxy.state / "cache" / "staging").iterdir()) == []
    assert proxy.stop() in GOOD_END


def test_the_fork_server_is_killed(upstreams: Upstreams, run_several: RunSeveral) -> None:
    """All go on, and who ends then is not replaced; the others have its clients."""
    proxy = run_several()
    blob = Blob(upstreams, "killed/fork/server", 12 * MIB, 6 * MIB, times=1)
    with proxy.one_each(FAKE) as connections:
        serving, fork_server = list(connections), proxy.fork_server
        responses = [blob.begin(connection) for connection in connections.values()]
        os.kill(fork_server, signal.SIGKILL)
        eventually(lambda: "the fork server has ended" in proxy.text, "it is said")
        blob.gate.set()
        assert [response.read() for response in responses] == [blob.data[MIB:]] * WORKERS
        os.kill(serving[1], signal.SIGKILL)
        eventually(lambda: "worker 1 ended" in proxy.text, "it is missed")
    assert "and is not replaced" in proxy.text
    for _ in range(2 * WORKERS):
        assert proxy.client.get(blob.url).body == blob.data
    assert proxy.stop() in GOOD_END
    assert gone([*serving, fork_server])


# sessions


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_tls_session_of_one_process_is_resumed_by_all(run_several: RunSeveral, version: ssl.TLSVersion) -> None:
    """So it is by who replaces a worker; but not for another host."""
    proxy = run_several()
    context = ssl.create_default_context(cafile=str(proxy.ca_file))
    context.maximum_version = version

    def visit(host: str, session: ssl.SSLSession | None) -> tuple[int, ssl.SSLSession, bool]:
        """Return which process it was, the session, and whether it was resumed."""
        connection = http.client.HTTPSConnection("127.0.0.1", proxy.port, context=context, timeout=60)
        plain = socket.create_connection(("127.0.0.1", proxy.port), timeout=60)
        plain.sendall(f"CONNECT {host}:443 HTTP/1.1\r\nHost: {host}:443\r\n\r\n".encode())
        assert plain.recv(1000).startswith(b"HTTP/1.1 200 ")
        with context.wrap_socket(plain, server_hostname=host, session=session) as connection.sock:
            assert ask(connection, "GET", "/v2/").status in (200, 401)
            owner = proxy.owner(connection)
            assert owner is not None and connection.sock.session is not None
            return owner, connection.sock.session, bool(connection.sock.session_reused)

    def visit_all(session: ssl.SSLSession | None) -> dict[int, tuple[ssl.SSLSession, bool]]:
        found: dict[int, tuple[ssl.SSLSession, bool]] = {}
        with ExitStack() as stack:
            for _ in range(4 * WORKERS):
                pid, *rest = visit(hostname(FAKE), session)
                found[pid] = rest[0], rest[1]
                idle = proxy.client.connection(FAKE)  # the next one goes on to another process
                stack.callback(idle.close)
                proxy.connect(idle)
        return found

    context.check_hostname = False
    first = visit(hostname(FAKE), None)
    assert not first[2]
    again = visit_all(first[1])
    assert [resumed for _, resumed in again.values()] == [True] * WORKERS
    worker = proxy.processes[1]
    os.kill(worker, signal.SIGKILL)
    eventually(lambda: proxy.text.count("worker 1 serves") == 2, "the worker is replaced")
    again = visit_all(first[1])
    assert worker not in again
    assert [resumed for _, resumed in again.values()] == [True] * WORKERS
    assert not visit(hostname(HUB), first[1])[2]


# how it stops


@pytest.mark.parametrize("to_all", [False, True], ids=["the first process", "all processes"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_the_transfers_of_all_finish(
    upstreams: Upstreams, run_several: RunSeveral, number: signal.Signals, to_all: bool
) -> None:
    """A terminal's Ctrl-C goes to all processes, as SIGTERM does by systemd."""
    proxy = run_several()
    blob = Blob(upstreams, f"finishing/{number.name.lower()}/{to_all}".lower(), 8 * MIB, 4 * MIB)
    pids = proxy.processes
    with proxy.one_each(FAKE) as connections:
        responses = [blob.begin(connection) for connection in connections.values()]
        for pid in reversed(pids) if to_all else pids[:1]:
            os.kill(pid, number)
        proxy._asked_to_end = True
        eventually(lambda: not listening(proxy.port), "the end of listening")
        assert proxy.processes == pids
        blob.gate.set()
        for response in responses:
            assert response.read() == blob.data[MIB:]
    assert proxy.stop() in (0, -number)
    assert gone(pids)
    assert "rror" not in proxy.text.rpartition(f"Received {number.name}")[2]
    assert " ended (" not in proxy.text


def test_asked_to_stop_with_nothing_to_do_it_ends_at_once(run_several: RunSeveral) -> None:
    proxy = run_several()
    pids = proxy.processes
    with proxy.one_each(FAKE) as connections:
        for connection in connections.values():
            ask(connection, "GET", "/v2/")
        assert proxy.stop(timeout=5) in GOOD_END
    assert gone(pids)


def test_asked_twice_all_break_off(upstreams: Upstreams, run_several: RunSeveral) -> None:
    proxy = run_several()
    blob = Blob(upstreams, "twice", 8 * MIB, 4 * MIB)
    pids = proxy.processes
    with proxy.one_each(FAKE) as connections:
        responses = [blob.begin(connection) for connection in connections.values()]
        proxy.terminate()
        eventually(lambda: not listening(proxy.port), "the end of listening")
        proxy.signal(signal.SIGTERM)
        for response in responses:
            with pytest.raises((http.client.IncompleteRead, ConnectionError)):
                response.read()
        assert proxy.stop(timeout=10) in GOOD_END
    blob.gate.set()
    assert gone(pids)


def test_asked_to_stop_while_the_workers_start(run_several: RunSeveral) -> None:
    proxy = run_several()
    proxy.stop()
    proxy.launch()
    eventually(lambda: listening(proxy.port), "it listens")
    pids = proxy.processes
    assert proxy.stop(timeout=10) in GOOD_END
    eventually(lambda: gone(pids), "who was starting ends as well")


# what changes


def test_a_reload_reaches_all(upstreams: Upstreams, run_several: RunSeveral, tmp_path: Path) -> None:
    file = tmp_path / "environment"
    file.write_text("")
    proxy = run_several(f"--env-file={file}", without=("REGISTRIES",))
    digest = upstreams.fake.put_blob("reloaded", b"content")
    path = f"/v2/reloaded/blobs/{digest}?ns=fake.test"
    with proxy.one_each_hosted() as connections:
        assert [ask(connection, "GET", path).status for connection in connections.values()] == [404] * WORKERS
        file.write_text(f"REGISTRIES=fake.test\nCACHE_DIR={tmp_path}/elsewhere\n")
        proxy.signal(signal.SIGHUP)
        eventually(lambda: "reloaded: " in proxy.text, "the reload")
        for connection in connections.values():
            eventually(lambda one=connection: ask(one, "GET", path).status == 200, "it is served")
    worker = proxy.processes[1]
    os.kill(worker, signal.SIGKILL)
    eventually(lambda: proxy.text.count("worker 1 serves") == 2, "the worker is replaced")
    with proxy.one_each_hosted() as connections:
        assert [ask(connection, "GET", path).body for connection in connections.values()] == [b"content"] * WORKERS
    assert "CACHE_DIR has changed, which takes effect at the next start only" in proxy.text
    assert not (tmp_path / "elsewhere").exists()
    file.write_text("REGISTRIES=a/b\n")
    proxy.signal(signal.SIGHUP)
    eventually(lambda: "not reloaded" in proxy.text, "the reload that cannot be")
    with proxy.one_each_hosted() as connections:
        assert [ask(connection, "GET", path).status for connection in connections.values()] == [200] * WORKERS


# the hosted registry


def hostname(url: str) -> str:
    return url.partition("//")[2]


def session(location: str) -> str:
    return location.partition("?")[0]


def test_a_push_whose_requests_alternate_between_processes(several: Several) -> None:
    data = images.noise(3_000_000, "alternating")
    pieces = [data[start : start + 500_000] for start in range(0, len(data), 500_000)]
    config = Content("application/vnd.oci.image.config.v1+json", b"{}")
    layer = Content("application/vnd.oci.image.layer.v1.tar", data)
    image = images.of_blobs(config, [layer])
    with several.one_each_hosted() as connections:
        turns = iter([*connections.values()] * 20)
        for blob, chunks in ((config, [config.data]), (layer, pieces)):
            where = session(ask(next(turns), "POST", "/v2/alternating/blobs/uploads/").headers["location"])
            size = 0
            for chunk in chunks:
                content_range = f"{size}-{size + len(chunk) - 1}"
                answer = ask(next(turns), "PATCH", where, chunk, {"Content-Range": content_range})
                size += len(chunk)
                assert (answer.status, answer.headers["range"]) == (202, f"0-{size - 1}")
            assert ask(next(turns), "GET", where).headers["range"] == f"0-{size - 1}"
            refused = ask(next(turns), "PATCH", where, b"x", {"Content-Range": f"{size + 5}-{size + 5}"})
            assert refused.status == 416
            assert ask(next(turns), "PUT", f"{where}?digest={blob.digest}").status == 201
            assert ask(next(turns), "GET", where).status == 404
        manifest = image.manifest
        put = ask(next(turns), "PUT", "/v2/alternating/manifests/1", manifest.data, {"Content-Type": OCI_MANIFEST})
        assert put.status == 201
        for connection in connections.values():
            assert ask(connection, "GET", "/v2/alternating/manifests/1").body == manifest.data
            assert ask(connection, "GET", f"/v2/alternating/blobs/{layer.digest}").body == data


def test_one_request_at_a_time_writes_to_an_upload(several: Several) -> None:
    with several.one_each_hosted() as connections:
        one, other, third = connections.values()
        where = session(ask(one, "POST", "/v2/busy/blobs/uploads/").headers["location"])
        other.putrequest("PATCH", where)
        other.putheader("Content-Length", str(2 * HALF))
        other.endheaders()
        other.send(b"a" * HALF)
        eventually(lambda: ask(one, "GET", where).headers["range"] != "0-0", "some of it")
        assert ask(third, "PATCH", where, b"xyz").status not in (200, 202)
        other.send(b"b" * HALF)
        assert read(other.getresponse()).status == 202
        assert ask(third, "PUT", f"{where}?digest={sha256(b'a' * HALF + b'b' * HALF)}").status == 201


def test_two_push_the_same_tag_at_once(several: Several) -> None:
    config = _push_blob(several, "contested", b"{}")
    variants = [
        images.of_blobs(Content("application/vnd.oci.image.config.v1+json", b"{}"), [], subject=subject)
        for subject in (None, Content(OCI_MANIFEST, b"x"), Content(OCI_MANIFEST, b"y"))
    ]
    assert config.status == 201
    with several.one_each_hosted() as connections, ThreadPoolExecutor(WORKERS) as pool:

        def push(connection: http.client.HTTPConnection, image: Image) -> list[int]:
            content = image.manifest
            headers = {"Content-Type": OCI_MANIFEST}
            target = "/v2/contested/manifests/1"
            return [ask(connection, "PUT", target, content.data, headers).status for _ in range(20)]

        statuses = list(pool.map(push, connections.values(), variants))
        assert statuses == [[201] * 20] * WORKERS
        seen = {ask(connection, "GET", "/v2/contested/manifests/1").body for connection in connections.values()}
        assert len(seen) == 1 and seen <= {variant.manifest.data for variant in variants}
        for connection in connections.values():
            for variant, subject in zip(variants, (None, sha256(b"x"), sha256(b"y")), strict=True):
                assert ask(connection, "GET", f"/v2/contested/manifests/{variant.digest}").body == variant.manifest.data
                if subject is not None:
                    listed = ask(connection, "GET", f"/v2/contested/referrers/{subject}").json["manifests"]
                    assert [entry["digest"] for entry in listed] == [variant.digest]


def test_referrers_that_come_and_go_by_other_processes(several: Several) -> None:
    _push_blob(several, "referring", b"{}")
    subject = Content(OCI_MANIFEST, b"the subject")
    config = Content("application/vnd.oci.image.config.v1+json", b"{}")
    referrers = [
        images.of_blobs(config, [Content(f"application/x.{number}", b"{}")], subject=subject) for number in range(9)
    ]
    path = f"/v2/referring/referrers/{subject.digest}"
    expected: set[str] = set()
    with several.one_each_hosted() as connections:
        each = list(connections.values())

        def check() -> None:
            for connection in each:
                assert {entry["digest"] for entry in ask(connection, "GET", path).json["manifests"]} == expected

        for number, image in enumerate(referrers):
            target = f"/v2/referring/manifests/{image.digest}"
            headers = {"Content-Type": OCI_MANIFEST}
            assert ask(each[number % WORKERS], "PUT", target, image.manifest.data, headers).status == 201
            expected.add(image.digest)
            check()
        for number, image in enumerate(referrers):
            target = f"/v2/referring/manifests/{image.digest}"
            assert ask(each[(number + 1) % WORKERS], "DELETE", target).status == 202
            expected.discard(image.digest)
            check()


def test_what_the_command_removes_is_gone_for_all(upstreams: Upstreams, several: Several) -> None:
    image = images.small("removed")
    _push(several, "removed", "1", image)
    upstreams.fake.put("removed", "1", image)
    blob = f"/v2/removed/blobs/{image.layers[0].digest}"
    headers = {"Accept": images.EVERY_MANIFEST}
    with several.one_each_hosted() as hosted, several.one_each(FAKE) as cached:
        for connection in hosted.values():
            assert ask(connection, "GET", "/v2/removed/manifests/1").status == 200
        done = several.command("rm", "removed:1")
        assert done.returncode == 0, done.stderr
        assert [ask(connection, "GET", "/v2/removed/manifests/1").status for connection in hosted.values()] == [404] * 3
        for connection in cached.values():
            assert ask(connection, "GET", "/v2/removed/manifests/1", headers=headers).status == 200
        asked = [ask(connection, "GET", blob).verdict for connection in cached.values()]
        assert asked == ["MISS", "HIT", "HIT"]
        done = several.command("rm", f"fake.test/removed@{image.layers[0].digest}", "fake.test/removed:1")
        assert done.returncode == 0, done.stderr
        upstreams.fake.requests.clear()
        asked = [ask(connection, "GET", blob).verdict for connection in cached.values()]
        assert asked == ["MISS", "HIT", "HIT"]


def test_what_a_worker_wrote_is_counted_and_leaves_the_cache(upstreams: Upstreams, run_several: RunSeveral) -> None:
    proxy = run_several(CACHE_MAX_SIZE="10m")
    digests = [upstreams.fake.put_blob("crowded", images.noise(3 * MIB, f"crowded {number}")) for number in range(7)]
    with proxy.one_each(FAKE) as connections:
        each = list(connections.values())
        for number, digest in enumerate(digests):
            assert ask(each[number % WORKERS], "GET", f"/v2/crowded/blobs/{digest}").status == 200

        def kept() -> list[bool]:
            folder = proxy.state / "cache/docker/registry/v2/blobs/sha256"
            return [(folder / digest[7:9] / digest[7:] / "data").exists() for digest in digests]

        eventually(lambda: kept() == [False] * 4 + [True] * 3, "the oldest leave")
        status = proxy.command("ls", "--json")
        assert status.returncode == 0, status.stderr


def test_garbage_collection_and_a_push_by_another_process(several: Several) -> None:
    """Blobs that were pushed long ago are used by a push again: one is not, and goes."""
    image = images.small("collected")
    forgotten = b"forgotten"
    for content in (*(blob.data for blob in image.blobs), forgotten):
        assert _push_blob(several, "collected", content).status == 201
    blobs = several.state / "registry/docker/registry/v2/blobs/sha256"
    for path in blobs.rglob("data"):
        os.utime(path, (time.time() - 7200,) * 2)
    with several.one_each_hosted() as connections:
        *others, worker = connections.values()
        where = session(ask(worker, "POST", "/v2/collected/blobs/uploads/").headers["location"])
        worker.putrequest("PATCH", where)
        worker.putheader("Content-Length", str(2 * HALF))
        worker.endheaders()
        worker.send(b"a" * HALF)
        for blob in image.blobs:
            assert ask(others[1], "HEAD", f"/v2/collected/blobs/{blob.digest}").status == 200
        done = several.command("gc", "--delete-untagged", "--grace", "5m")
        assert done.returncode == 0, done.stderr
        manifest = image.manifest
        for connection in others:
            assert ask(connection, "GET", f"/v2/collected/blobs/{sha256(forgotten)}").status == 404
            put = ask(connection, "PUT", "/v2/collected/manifests/1", manifest.data, {"Content-Type": OCI_MANIFEST})
            assert put.status == 201
        worker.send(b"b" * HALF)
        assert read(worker.getresponse()).status == 202
        assert ask(worker, "PUT", f"{where}?digest={sha256(b'a' * HALF + b'b' * HALF)}").status == 201
        for blob in image.blobs:
            assert ask(worker, "GET", f"/v2/collected/blobs/{blob.digest}").body == blob.data


def test_pushes_and_collections_all_the_time(several: Several) -> None:
    """Pushes through all processes, each image of which is pulled by another, while collection follows collection."""
    stop = threading.Event()

    def collect() -> int:
        count = 0
        while not stop.is_set():
            done = several.command("gc", "--delete-untagged", "--grace", "2m")
            assert done.returncode == 0, done.stderr
            count += 1
        return count

    with several.one_each_hosted() as connections, ThreadPoolExecutor(WORKERS + 1) as pool:
        each = list(connections.values())
        collecting = pool.submit(collect)
        try:
            for number in range(12):
                image = images.small(f"always {number}", size=1000)
                _push(several, f"always/{number % 4}", str(number), image, each)
                puller = each[number % WORKERS]
                for blob in image.blobs:
                    assert ask(puller, "GET", f"/v2/always/{number % 4}/blobs/{blob.digest}").body == blob.data
        finally:
            stop.set()
        assert collecting.result(60) >= 1
    checked = several.command("check")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_users_are_those_of_the_file_in_all(run_several: RunSeveral, tmp_path: Path) -> None:
    import bcrypt

    def write(*users: str) -> None:
        hashed = bcrypt.hashpw(b"word", bcrypt.gensalt(4)).decode()
        new = tmp_path / "htpasswd.new"
        new.write_text("".join(f"{user}:{hashed}\n" for user in users))
        new.rename(tmp_path / "htpasswd")

    def statuses(user: str) -> list[int]:
        login = {"Authorization": f"Basic {_base64(f'{user}:word')}"}
        return [ask(connection, "GET", "/v2/", headers=login).status for connection in connections.values()]

    write("alice")
    proxy = run_several(HTPASSWD_FILE=str(tmp_path / "htpasswd"))
    with proxy.one_each_hosted() as connections:
        assert (statuses("alice"), statuses("bob")) == ([200] * WORKERS, [401] * WORKERS)
        write("bob")
        assert (statuses("alice"), statuses("bob")) == ([401] * WORKERS, [200] * WORKERS)


def test_a_token_of_one_process_is_good_for_all(run_several: RunSeveral, tmp_path: Path) -> None:
    import bcrypt

    (tmp_path / "htpasswd").write_text(f"alice:{bcrypt.hashpw(b'word', bcrypt.gensalt(4)).decode()}\n")
    proxy = run_several(HTPASSWD_FILE=str(tmp_path / "htpasswd"), ANONYMOUS_PULL="true")
    login = {"Authorization": f"Basic {_base64('alice:word')}"}
    with proxy.one_each_hosted() as connections:
        for connection in connections.values():
            token = ask(connection, "GET", "/v2/token", headers=login).json["token"]
            for other in connections.values():
                pushed = ask(other, "POST", "/v2/a/blobs/uploads/", headers={"Authorization": f"Bearer {token}"})
                assert pushed.status == 202


def test_a_token_of_upstreams_is_its_clients_in_all(upstreams: Upstreams, several: Several) -> None:
    """Alice got it through one process. What she may have of the cache, the others know of her, without upstream."""
    image = upstreams.on_hub("alice/everywhere", "1", images.small("everywhere"), owners={"alice"})
    path = f"/v2/alice/everywhere/blobs/{image.layers[0].digest}"
    query = "service=registry.docker.io&scope=repository:alice/everywhere:pull"
    login = {"Authorization": upstreams.basic_login("alice")}
    with several.one_each(TOKENS) as realms, several.one_each(HUB) as connections:
        realm, getter = list(realms.values())[1], list(connections.values())[1]
        token = {"Authorization": f"Bearer {ask(realm, 'GET', f'/token?{query}', headers=login).json['token']}"}
        assert ask(getter, "GET", path, headers=token).status == 200
        with upstreams.away():
            for connection in connections.values():
                eventually(lambda one=connection: ask(one, "GET", path, headers=token).verdict == "HIT", "it is known")


# how it is started, and its log


def test_sockets_of_systemd(upstreams: Upstreams, run_several: RunSeveral, tmp_path: Path) -> None:
    door = socket.create_server(("127.0.0.1", 0))
    plain = socket.create_server(("127.0.0.1", 0))
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notify.bind(str(tmp_path / "notify"))
    notify.settimeout(30)
    proxy = Several(tmp_path / "several", upstreams.settings)
    proxy.port, proxy.plain_port = door.getsockname()[1], plain.getsockname()[1]
    proxy.environment |= {
        "PROXY_LISTEN": "systemd:domain=INET:name=proxy",
        "REGISTRY_HTTP_LISTEN": "systemd:domain=INET:name=http",
        "LISTEN_FDS": "2",
        "LISTEN_FDNAMES": "proxy:http",
        "NOTIFY_SOCKET": str(tmp_path / "notify"),
    }
    numbers = (door.fileno(), plain.fileno())
    script = f'export LISTEN_PID=$$; exec 23<&{numbers[0]} 24<&{numbers[1]} 3<&23 4<&24; exec "$@"'
    for number in numbers:
        os.set_inheritable(number, True)
    log = (tmp_path / "several/log").open("ab")
    with subprocess.Popen(
        ["bash", "-c", script, "bash", *proxy.argv], env=proxy.environment, cwd=proxy.folder,
        pass_fds=numbers, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
    ) as process:  # fmt: skip
        try:
            proxy._popen = process
            assert notify.recv(65536).startswith(b"READY=1")
            eventually(lambda: proxy.text.count(" serves") == WORKERS - 1, "all workers serve")
            proxy.ca_file.write_bytes(request("GET", proxy.url + "/ca.crt").body)
            digest = upstreams.fake.put_blob("handed/in", b"content")
            with proxy.one_each(FAKE) as connections, proxy.one_each_hosted() as hosted:
                for connection in connections.values():
                    assert ask(connection, "GET", f"/v2/handed/in/blobs/{digest}").body == b"content"
                for connection in hosted.values():
                    assert ask(connection, "GET", "/v2/").status == 200
            handed_in = {f"socket:[{os.fstat(one.fileno()).st_ino}]" for one in (door, plain)}
            for pid in (proxy.fork_server, *proxy.processes[1:]):
                assert not handed_in & open_files(pid)
            pids = proxy.processes
            process.terminate()
            assert notify.recv(65536).startswith(b"STOPPING=1")
            assert process.wait(30) in GOOD_END
            assert gone(pids)
        finally:
            process.kill()
            for one in (door, plain, notify):
                one.close()
    log.close()


def test_a_log_of_json_of_all(run_several: RunSeveral) -> None:
    proxy = run_several(LOG_FORMAT="json")
    with proxy.one_each_hosted() as connections:
        for number, connection in enumerate(connections.values()):
            ask(connection, "GET", f"/v2/log/{number}/tags/list")
        eventually(lambda: proxy.text.count('"path": "/v2/log/') == WORKERS, "the log of all")
    lines = [json.loads(line) for line in proxy.text.splitlines()]
    paths = [line["path"] for line in lines if line["namespace"] == "dockerproxy.access" and "/log/" in line["path"]]
    assert sorted(paths) == [f"/v2/log/{number}/tags/list" for number in range(WORKERS)]


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_as_a_daemon_with_a_log_file(upstreams: Upstreams, tmp_path: Path, log_format: str) -> None:
    """twistd goes to the background, and what workers log goes into the file as what the first process does."""
    proxy = Several(tmp_path / "several", {**upstreams.settings, "LOG_FORMAT": log_format})
    log, pid_file = tmp_path / "the.log", tmp_path / "the.pid"
    program = [part for part in twistd() if not part.startswith("--")]
    subprocess.run(
        [*program, f"--logfile={log}", f"--pidfile={pid_file}", "dockerproxy"],
        env=proxy.environment, cwd=proxy.folder, check=True, timeout=60, stdin=subprocess.DEVNULL,
        stdout=(tmp_path / "out").open("wb"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    eventually(pid_file.exists, "the file with the process's number")
    first = int(pid_file.read_text())
    proxy._popen = type("Popen", (), {"pid": first})()  # type: ignore[assignment]
    pids = [first]
    try:
        eventually(lambda: log.read_text().count(" serves") == WORKERS - 1, "all workers serve")
        pids = proxy.processes
        with proxy.one_each_hosted() as connections:
            for number, connection in enumerate(connections.values()):
                assert ask(connection, "GET", f"/v2/log/{number}/tags/list").status == 404
            eventually(lambda: log.read_text().count("tags/list") >= WORKERS, "the log of all")
    finally:
        os.kill(first, signal.SIGTERM)
        eventually(lambda: gone(pids), "the end")
    assert (tmp_path / "out").read_bytes() == b""
    if log_format == "json":
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        access = [line for line in lines if line["namespace"] == "dockerproxy.access" and "/log/" in line["path"]]
        assert sorted(line["path"] for line in access) == [f"/v2/log/{number}/tags/list" for number in range(WORKERS)]
        assert {line["status"] for line in access} == {404}
    else:
        found = re.findall(
            r"^\d{4}-\S+ \[dockerproxy\.access#info\] 127\.0\.0\.1 GET \S+/v2/log/(\d)/tags/list 404 ",
            log.read_text(), re.MULTILINE,
        )  # fmt: skip
        assert sorted(found) == [str(number) for number in range(WORKERS)]
    assert "Traceback" not in log.read_text()


def test_a_worker_that_cannot_start_harms_nobody(run_several: RunSeveral, tmp_path: Path) -> None:
    """The file of users is damaged later on; who runs keeps them, and who is started anew says why it cannot."""
    import bcrypt

    users = tmp_path / "htpasswd"
    good = f"alice:{bcrypt.hashpw(b'word', bcrypt.gensalt(4)).decode()}\n"
    users.write_text(good)
    proxy = run_several(HTPASSWD_FILE=str(users))
    users.write_text("damaged")
    os.kill(proxy.processes[1], signal.SIGKILL)
    eventually(lambda: "worker 1 cannot start: HTPASSWD_FILE: " in proxy.text, "the trouble is told")
    assert "Traceback" not in proxy.text
    for _ in range(2 * WORKERS):
        assert proxy.client.get(f"{FAKE}/v2/").status == 200
    users.write_text(good)
    eventually(lambda: proxy.text.count("worker 1 serves") == 2, "it starts again", timeout=40)


# helpers


def _push_blob(proxy: Several, name: str, data: bytes, each: list[http.client.HTTPConnection] | None = None) -> Answer:
    with ExitStack() as stack:
        turns = iter((each or list(stack.enter_context(proxy.one_each_hosted()).values())) * 2)
        where = session(ask(next(turns), "POST", f"/v2/{name}/blobs/uploads/").headers["location"])
        assert ask(next(turns), "PATCH", where, data).status == 202
        return ask(next(turns), "PUT", f"{where}?digest={sha256(data)}")


def _push(
    proxy: Several, name: str, tag: str, image: Image, each: list[http.client.HTTPConnection] | None = None
) -> None:
    for blob in image.blobs:
        _push_blob(proxy, name, blob.data, each)
    with ExitStack() as stack:
        one = (each or list(stack.enter_context(proxy.one_each_hosted()).values()))[-1]
        target, headers = f"/v2/{name}/manifests/{tag}", {"Content-Type": OCI_MANIFEST}
        assert ask(one, "PUT", target, image.manifest.data, headers).status == 201


def _base64(text: str) -> str:
    import base64

    return base64.b64encode(text.encode()).decode()
