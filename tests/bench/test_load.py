"""The load generator against a small plain HTTP server: its requests, and its checks of the responses."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from bench.endpoints import Endpoint, RunningServer
from bench.generator import LoadGenerator
from bench.servers import BenchError, CoreAssignment

pytestmark = pytest.mark.skipif(
    shutil.which("gcc") is None or not Path("/usr/include/openssl/ssl.h").exists(),
    reason="gcc or libssl-dev is missing",
)


class StubServerProcess:
    """A server process that uses no CPU time."""

    cores = CoreAssignment()

    def cpu_seconds(self) -> float:
        return 0.0


class RecordingHandler(BaseHTTPRequestHandler):
    """Sends a body of the size in the path. Records the paths, and the client ports to count the connections."""

    protocol_version = "HTTP/1.1"
    requested_paths: list[str]
    client_ports: set[int]

    def do_GET(self) -> None:
        self.requested_paths.append(self.path)
        self.client_ports.add(self.client_address[1])
        kind, _, size = self.path[1:].partition("/")
        self.send_response(404 if kind == "missing" else 200)
        self.send_header("Content-Length", size)
        self.end_headers()
        self.wfile.write(bytes(int(size) - (kind == "short")))
        self.close_connection = kind == "short"

    def do_CONNECT(self) -> None:
        self.requested_paths.append(self.path)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> LoadGenerator:
    return LoadGenerator.compile(tmp_path_factory.mktemp("load"))


@pytest.fixture
def running_server() -> Iterator[RunningServer]:
    RecordingHandler.requested_paths, RecordingHandler.client_ports = [], set()
    with ThreadingHTTPServer(("127.0.0.1", 0), RecordingHandler) as server:
        threading.Thread(target=server.serve_forever).start()
        idle: Any = StubServerProcess()
        yield RunningServer(idle, Endpoint("plain", server.server_port, "registry.test", "", through_connect=False))
        server.shutdown()


def test_connections_request_paths_in_turn(generator: LoadGenerator, running_server: RunningServer) -> None:
    result = generator.run_requests(running_server, ["/blob/1000", "/blob/0", "/blob/1000000"], connections=2, count=4)
    assert sorted(RecordingHandler.requested_paths) == sorted(
        ["/blob/1000", "/blob/0", "/blob/1000000", "/blob/1000"] * 2
    )
    assert len(RecordingHandler.client_ports) == 2
    assert (result.count, result.bytes) == (8, 2 * 1_002_000)
    assert 0 < result.first_byte <= result.last_byte <= result.wall
    assert len(result.first_byte_times) == 2


def test_each_request_uses_a_new_connection(generator: LoadGenerator, running_server: RunningServer) -> None:
    result = generator.run_reconnects(running_server, ["/blob/1"], connections=3, seconds=0.1, resume=False)
    assert result.count == len(RecordingHandler.requested_paths) == len(RecordingHandler.client_ports) >= 3
    assert result.resumed == 0


def test_handshakes_go_to_each_host_in_turn(generator: LoadGenerator, running_server: RunningServer) -> None:
    proxied_server = evolve(running_server, endpoint=evolve(running_server.endpoint, through_connect=True))
    result = generator.run_handshakes(proxied_server, ["one.test", "other.test"])
    assert RecordingHandler.requested_paths == ["one.test:443", "other.test:443"]
    assert (result.count, result.bytes) == (2, 0)
    assert 0 < result.first_byte <= result.wall


@pytest.mark.parametrize(
    ("path", "message"),
    [("/missing/5", "the server answered HTTP/1.1 404"), ("/short/100", "the server closed the connection")],
)
def test_unexpected_response_fails(
    generator: LoadGenerator, running_server: RunningServer, path: str, message: str
) -> None:
    with pytest.raises(BenchError, match=message):
        generator.run_requests(running_server, [path], count=1)
