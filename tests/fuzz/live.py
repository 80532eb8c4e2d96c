"""Mutated connections to all doors of a running daemon, with an upstream that sends mutated responses.

    python -m tests.fuzz.live [--seconds N] [--seed N]

It fails if a response has the status 500, if the log has a traceback, or if a process of the daemon ends. A run with
the same seed sends the same connections.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import socket
import ssl
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from attrs import frozen

from tests.e2e.harness.daemon import CLEAN_EXIT_STATUSES
from tests.e2e.harness.http_client import request_directly
from tests.e2e.harness.registry_daemon import RegistryDaemon
from tests.fuzz.corpus import mutate
from tests.hostile.conftest import HostileNetwork

_ATTACKER = "mutant.test"
_THREADS = 16
_PATIENCE = 0.15  # seconds without a byte after which a connection is given up
_MAX_RESPONSE = 65536
_ERROR = re.compile(rb"HTTP/1\.1 500 |\"event\": \"error\", \"code\": \"INTERNAL\"")
_WORKER_ENDED = re.compile(r"worker \d+ ended|killed by signal")

_DIGEST = b"sha256:" + b"ab" * 32
_MANIFEST = json.dumps({
    "schemaVersion": 2,
    "mediaType": "application/vnd.oci.image.index.v1+json",
    "manifests": [{"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": _DIGEST.decode(), "size": 5}],
}).encode()  # fmt: skip


def _request(method: bytes, path: bytes, fields: bytes = b"", body: bytes = b"", host: bytes = b"localhost") -> bytes:
    return b"%s %s HTTP/1.1\r\nHost: %s\r\n%s\r\n%s" % (method, path, host, fields, body)


def _sized(body: bytes) -> bytes:
    return b"Content-Length: %d\r\n" % len(body)


_CHUNKED = b"Transfer-Encoding: chunked\r\n"
_LOGIN = b"Authorization: Basic YTpi\r\n"
_ACCEPT = b"Accept: application/vnd.oci.image.index.v1+json\r\n"

HOSTED_REQUESTS = [
    _request(b"GET", b"/v2/"),
    _request(b"GET", b"/v2/_catalog?n=5&last=a"),
    _request(b"GET", b"/v2/app/tags/list?n=1"),
    _request(b"POST", b"/v2/app/blobs/uploads/", b"Content-Length: 0\r\n"),
    _request(b"POST", b"/v2/app/blobs/uploads/?digest=" + _DIGEST, _CHUNKED, b"5\r\nhello\r\n0\r\n\r\n"),
    _request(b"PATCH", b"/v2/app/blobs/uploads/x", b"Content-Range: 0-4\r\n" + _sized(b"hello"), b"hello"),
    _request(
        b"PUT",
        b"/v2/app/manifests/v1",
        b"Content-Type: application/vnd.oci.image.index.v1+json\r\n" + _sized(_MANIFEST),
        _MANIFEST,
    ),
    _request(b"GET", b"/v2/app/blobs/" + _DIGEST, b"Range: bytes=1-5\r\n"),
    _request(b"GET", b"/v2/app/referrers/" + _DIGEST + b"?artifactType=a%2Fb"),
    _request(b"DELETE", b"/v2/app/manifests/v1"),
    _request(b"GET", b"/v2/app/manifests/v1?ns=" + _ATTACKER.encode(), _ACCEPT),
    _request(b"GET", b"/metrics") + _request(b"GET", b"/setup") + _request(b"GET", b"/ca.crt"),
    _request(b"OPTIONS", b"/v2/", b"Origin: http://a.test\r\nAccess-Control-Request-Method: PUT\r\n"),
]
PROXY_REQUESTS = [
    *HOSTED_REQUESTS,
    b"CONNECT localhost:443 HTTP/1.1\r\nHost: localhost:443\r\n\r\n\x16\x03\x01\x00\x05hello",
    b"CONNECT mutant.test:443 HTTP/1.1\r\nProxy-Authorization: Basic YTpi\r\n\r\n",
    _request(b"GET", b"http://mutant.test/a?b=c"),
    _request(b"POST", b"http://[::1]:99999/", _CHUNKED, b"1\r\na\r\n0\r\nX: y\r\n\r\n"),
]
UPSTREAM_REQUESTS = [
    _request(b"GET", b"/v2/", host=b"mutant.test"),
    _request(b"GET", b"/v2/app/manifests/latest", _ACCEPT, host=b"mutant.test"),
    _request(b"HEAD", b"/v2/app/manifests/" + _DIGEST, b"Authorization: Bearer x\r\n", host=b"mutant.test"),
    _request(b"GET", b"/v2/app/blobs/" + _DIGEST, _LOGIN, host=b"mutant.test"),
    _request(b"GET", b"/v2/app/blobs/" + _DIGEST, b"Range: bytes=2-\r\n", host=b"mutant.test"),
    _request(b"GET", b"/v2/app/tags/list?n=2", host=b"mutant.test"),
    _request(
        b"GET", b"/token?service=x&scope=repository:app:pull", b"Authorization: Basic YTpi\r\n", host=b"mutant.test"
    ),
    _request(b"POST", b"/token", _sized(b"grant_type=password"), b"grant_type=password", host=b"mutant.test"),
]
CONTROL_REQUESTS = [
    _request(b"GET", b"/v1/status"),
    _request(b"GET", b"/v1/debug"),
    _request(b"GET", b"/v1/repositories?name=app&where=hosted"),
    _request(b"POST", b"/v1/remove", _sized(b'{"names": ["app:v1"]}'), b'{"names": ["app:v1"]}'),
    _request(b"POST", b"/v1/collect", _sized(b'{"grace": 3600}'), b'{"grace": 3600}'),
    _request(b"POST", b"/v1/import", _sized(b'{"directory": "/x"}'), b'{"directory": "/x"}'),
]
RESPONSES = [
    b"HTTP/1.1 200 OK\r\nContent-Type: application/vnd.oci.image.index.v1+json\r\n%s\r\n%s"
    % (_sized(_MANIFEST), _MANIFEST),
    b"HTTP/1.1 200 OK\r\nDocker-Content-Digest: %s\r\nContent-Length: 5\r\n\r\nhello" % _DIGEST,
    b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 2-4/5\r\nContent-Length: 3\r\n\r\nllo",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    b'HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Bearer realm="https://mutant.test/token",service="x"\r\n'
    b"Content-Length: 0\r\n\r\n",
    b'HTTP/1.1 200 OK\r\nContent-Length: 49\r\n\r\n{"token":"abc","expires_in":300,"issued_at":"now"}',
    b"HTTP/1.1 307 Temporary Redirect\r\nLocation: https://mutant.test/v2/x\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 1 Oct 8 0:25\r\nContent-Length: 0\r\n\r\n",
    b'HTTP/1.1 200 OK\r\nContent-Length: 27\r\nLink: </v2/x>; rel="next"\r\n\r\n{"name":"app","tags":["a"]}',
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
]


class MutatingUpstream:
    """A server over TLS that reads a request and sends a mutated response, whichever was asked for."""

    def __init__(self, context: ssl.SSLContext, seed: int) -> None:
        self._context = context
        self._chance = random.Random(f"upstream {seed}")
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port: int = self._listener.getsockname()[1]

    def start(self) -> None:
        threading.Thread(target=self._accept, daemon=True).start()

    def stop(self) -> None:
        # `close` alone does not wake the thread in accept(2).
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                response = _mutate(self._chance, RESPONSES)
                threading.Thread(target=self._respond, args=(connection, response), daemon=True).start()

    def _respond(self, connection: socket.socket, response: bytes) -> None:
        with suppress(OSError), connection:
            connection.settimeout(5)
            with self._context.wrap_socket(connection, server_side=True) as stream:
                received = b""
                while b"\r\n\r\n" not in received and (data := stream.recv(4096)):
                    received += data
                stream.sendall(response)


@frozen
class Door:
    """A way into the daemon: a function that connects, and the requests to mutate."""

    connect: Callable[[RegistryDaemon], socket.socket]
    requests: list[bytes]


def _connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=5)


def _connect_intercepted(daemon: RegistryDaemon) -> socket.socket:
    connection = _connect(daemon.port)
    connection.sendall(b"CONNECT mutant.test:443 HTTP/1.1\r\nHost: mutant.test:443\r\n\r\n")
    received = b""
    while b"\r\n\r\n" not in received and (data := connection.recv(1)):
        received += data
    return daemon.client_context.wrap_socket(connection, server_hostname=_ATTACKER)


def _connect_tls(daemon: RegistryDaemon) -> socket.socket:
    return daemon.client_context.wrap_socket(_connect(daemon.registry_port), server_hostname="docker-registry.local")


def _connect_control(daemon: RegistryDaemon) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(5)
    connection.connect(str(daemon.state_folder / "run/control.sock"))
    return connection


def _client_hello() -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        ssl.create_default_context().wrap_bio(
            incoming, outgoing, server_hostname="docker-registry.local"
        ).do_handshake()
    return outgoing.read()


DOORS = {
    "proxy": Door(lambda daemon: _connect(daemon.port), PROXY_REQUESTS),
    "intercepted": Door(_connect_intercepted, UPSTREAM_REQUESTS),
    "registry": Door(lambda daemon: _connect(daemon.http_port), HOSTED_REQUESTS),
    "registry over TLS": Door(_connect_tls, HOSTED_REQUESTS),
    "TLS handshake": Door(lambda daemon: _connect(daemon.registry_port), [_client_hello()]),
    "control socket": Door(_connect_control, CONTROL_REQUESTS),
}


def _mutate(chance: random.Random, inputs: list[bytes]) -> bytes:
    data = chance.choice(inputs)
    for _ in range(chance.randint(0, 3)):
        data = mutate(data, chance, inputs)
    return data


def attack(daemon: RegistryDaemon, seed: int, number: int) -> bytes:
    """Make the connection `number` of the run `seed`. Return the received bytes. Raise AssertionError for an error."""
    chance = random.Random(f"{seed} {number}")
    name = chance.choice([*DOORS])
    data = _mutate(chance, DOORS[name].requests)
    received = b""
    # Resets, alerts and silence are how most connections end.
    with suppress(OSError), DOORS[name].connect(daemon) as connection:
        connection.settimeout(_PATIENCE)
        cut = chance.randint(0, len(data))
        for part in (data[:cut], data[cut:]):
            connection.sendall(part)
        if name != "control socket" and chance.random() < 0.5 and not isinstance(connection, ssl.SSLSocket):
            connection.shutdown(socket.SHUT_WR)
        while len(received) < _MAX_RESPONSE and (chunk := connection.recv(4096)):
            received += chunk
    assert not _ERROR.search(received), f"{name}, connection {number}: {data!r} was answered with {received[:500]!r}"
    return received


@contextmanager
def fuzzed_daemon(folder: Path, workers: int, seed: int) -> Iterator[RegistryDaemon]:
    """Run a daemon with a mutating upstream. At the end it must be as well as at the start."""
    network = HostileNetwork(folder / "network")
    network.registries.append(_ATTACKER)
    # No connection leaves this machine: Docker Hub is a mutating upstream, too, and no other host is allowed.
    for host in (_ATTACKER, "registry-1.docker.io", "auth.docker.io"):
        upstream = MutatingUpstream(network.ca.leaf(host).server_context(), seed)
        network.add_server(f"{host}:443", upstream)  # type: ignore[arg-type]
    settings = {
        **network.settings,
        "TUNNEL_ALLOW": _ATTACKER,
        "WORKERS": str(workers),
        "ENABLE_MANIFEST_CACHE": "true",
        "CLIENT_HEADER_TIMEOUT": "2s",
        "CLIENT_BODY_TIMEOUT": "2s",
        "PROXY_CONNECT_TIMEOUT": "2s",
        "PROXY_READ_TIMEOUT": "2s",
    }
    daemon = RegistryDaemon(folder / "daemon", settings)
    try:
        daemon.start()
        yield daemon
        assert request_directly("GET", f"{daemon.url}/healthz").status == 200
        assert daemon.stop() in CLEAN_EXIT_STATUSES
        daemon.check_log([])
        ended = _WORKER_ENDED.search(daemon.output_text)
        assert ended is None, ended
    finally:
        daemon.kill()
        network.stop()


def run(daemon: RegistryDaemon, seed: int, *, count: int | None = None, seconds: float = float("inf")) -> int:
    """Make `count` connections, or as many as are possible in `seconds`. Return their number."""
    deadline = time.monotonic() + seconds
    numbers = itertools.count() if count is None else iter(range(count))
    lock, done = threading.Lock(), 0

    def work() -> None:
        nonlocal done
        while time.monotonic() < deadline:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            attack(daemon, seed, number)
            with lock:
                done += 1

    with ThreadPoolExecutor(_THREADS) as pool:
        for result in [pool.submit(work) for _ in range(_THREADS)]:
            result.result()
    return done


def main() -> int:
    """Fuzz a daemon of one process and one of two, and return the exit status."""
    parser = argparse.ArgumentParser("python -m tests.fuzz.live", description="Fuzz a running daemon.")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    for workers in (1, 2):
        with tempfile.TemporaryDirectory() as folder, fuzzed_daemon(Path(folder), workers, options.seed) as daemon:
            number = run(daemon, options.seed, seconds=options.seconds / 2)
            print(f"{number} connections, WORKERS={workers}, seed {options.seed}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
