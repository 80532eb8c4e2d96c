"""The attacker runs a registry, evil.test, and is a client of it: its bytes, speed and failures are its own clients'.

He asks for the digest of a blob that clients of good.test are about to pull, and lets evil.test answer as it likes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.client import HTTPException, IncompleteRead

import pytest

from tests.e2e.harness.fake_registry import ResponseBehaviour
from tests.e2e.harness.http_server import HTTPExchange
from tests.e2e.harness.images import TypedContent, random_bytes, sha256_digest
from tests.e2e.harness.process import wait_until
from tests.e2e.harness.registry_daemon import RegistryDaemon
from tests.hostile.conftest import EVIL, GOOD, HostileNetwork, StartRegistryDaemon

DATA = random_bytes(500_000, "a popular layer")
DIGEST = sha256_digest(DATA)
WRONG = b"EVIL" * (len(DATA) // 4) + b"E"
PATH = f"/v2/team/app/blobs/{DIGEST}"
WITHHELD = 1


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Return what evil.test waits for before it continues. It does so at the end of the test."""
    gate = threading.Event()
    yield gate
    gate.set()


@pytest.fixture
def shared(network: HostileNetwork) -> HostileNetwork:
    """Let good.test have the blob. The tests say what evil.test sends."""
    network.good.put_blob("team/app", DATA)
    return network


def send_wrong(count: int, gate: threading.Event | None = None, size: int = len(DATA)) -> ResponseBehaviour:
    """Announce `size` bytes, and send `count` wrong ones. With a `gate`, wait for it, and then send the others."""

    def respond(exchange: HTTPExchange, _: TypedContent | None) -> None:
        fields = {"Content-Length": str(size), "Docker-Content-Digest": DIGEST, "Accept-Ranges": "bytes"}
        exchange.send_head(200, fields)
        exchange.send_body(WRONG[:count])
        if gate is not None:
            gate.wait(60)
            exchange.send_body(WRONG[count:size])
        exchange.close_after_response()

    return respond


def ingest_files(daemon: RegistryDaemon) -> list[str]:
    return [str(path) for path in (daemon.state_folder / "cache" / "ingest").rglob("*") if path.is_file()]


def pull_from_good(daemon: RegistryDaemon, *, times: int = 4) -> None:
    """Pull the blob from good.test, whole and in part, over several connections so that each process gets one."""
    for number in range(times):
        response = daemon.client.get(GOOD + PATH, Range=f"bytes={1000 + number}-1999")
        assert (response.status, response.body) == (206, DATA[1000 + number : 2000])
        response = daemon.client.get(GOOD + PATH)
        assert (response.status, response.body) == (200, DATA)


@pytest.mark.parametrize("count", [0, 1000, len(DATA) - 1], ids=["silent", "slow", "all but the last byte"])
def test_unfinished_download(
    shared: HostileNetwork, start_daemon: StartRegistryDaemon, gate: threading.Event, count: int
) -> None:
    """The attacker's download is in progress. It delays nobody at good.test, and nobody there gets its bytes."""
    shared.evil.add_rule("GET", DIGEST, send_wrong(count, gate))
    daemon = start_daemon()
    with daemon.client.stream("GET", EVIL + PATH) as attackers:
        assert attackers.read(min(count, 10)) == WRONG[: min(count, 10)]
        pull_from_good(daemon)
        gate.set()
        with pytest.raises(HTTPException):
            attackers.read()


def test_silent_download_without_a_client(
    shared: HostileNetwork, start_daemon: StartRegistryDaemon, gate: threading.Event
) -> None:
    """The attacker leaves as soon as evil.test has the request."""
    shared.evil.add_rule("GET", DIGEST, lambda exchange, content: gate.wait(60) and exchange.respond(404))
    daemon = start_daemon()
    connection = daemon.client.new_connection(EVIL)
    connection.request("GET", PATH)
    wait_until(lambda: bool(shared.evil.find_requests("GET", DIGEST)), "evil.test has the request")
    connection.close()
    pull_from_good(daemon)


@pytest.mark.parametrize("count", [len(DATA) - 100, len(DATA)], ids=["broken off", "complete"])
def test_leftovers(shared: HostileNetwork, start_daemon: StartRegistryDaemon, count: int) -> None:
    """The attacker's download has failed. No client of good.test starts with its bytes, after a restart neither."""
    shared.evil.add_rule("GET", DIGEST, send_wrong(count), times=1)
    shared.evil.add_rule("GET", DIGEST, lambda exchange, content: exchange.respond(404))
    daemon = start_daemon()
    with pytest.raises(IncompleteRead) as excinfo:
        daemon.client.get(EVIL + PATH)
    assert len(excinfo.value.partial) <= len(DATA) - WITHHELD
    if count == len(DATA):  # its digest is wrong, and so nobody continues with it
        wait_until(lambda: ingest_files(daemon) == [], "the wrong bytes are dropped")
    else:
        daemon.restart(kill=True)
    offset = daemon.log_offset()
    pull_from_good(daemon)
    assert all(request.headers.get("range") is None for request in shared.good.find_requests("GET", DIGEST))
    assert "good.test" not in "".join(line for line in daemon.output_text[offset:].splitlines() if "does not" in line)


@pytest.mark.parametrize("size", [len(DATA) - 1, len(DATA), len(DATA) + 1])
def test_wrong_content_is_never_completed(shared: HostileNetwork, start_daemon: StartRegistryDaemon, size: int) -> None:
    """A client of evil.test itself gets no complete response, if the length is right, too short or too long."""
    shared.evil.add_rule("GET", DIGEST, send_wrong(size, size=size))
    daemon = start_daemon()
    for _ in range(2):
        with pytest.raises(IncompleteRead):
            daemon.client.get(EVIL + PATH)
    pull_from_good(daemon, times=2)
    assert daemon.client.get(EVIL + PATH).status == 502  # it is asked for parts now, and sends others


def test_wrong_content_after_good_has_sent_it(
    shared: HostileNetwork, start_daemon: StartRegistryDaemon, gate: threading.Event
) -> None:
    """The blob of good.test is stored while evil.test still sends. That does not make evil.test's download right."""
    shared.evil.add_rule("GET", DIGEST, send_wrong(100_000, gate))
    daemon = start_daemon()
    with daemon.client.stream("GET", EVIL + PATH) as attackers:
        assert attackers.read(100_000) == WRONG[:100_000]
        pull_from_good(daemon)
        gate.set()
        with pytest.raises(IncompleteRead):
            attackers.read()
    assert daemon.client.get(EVIL + PATH).status == 502
    assert daemon.client.get(EVIL + PATH.replace("team/app", "team/other")).status == 502
