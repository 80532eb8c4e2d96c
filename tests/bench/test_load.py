"""The load generator against a small server of plain HTTP: what it asks for, and what it takes for an answer."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from bench.generator import Generator
from bench.servers import BenchError, Cores
from bench.targets import Serving, Target

pytestmark = pytest.mark.skipif(
    shutil.which("gcc") is None or not Path("/usr/include/openssl/ssl.h").exists(),
    reason="gcc or libssl-dev is missing",
)


class Idle:
    """A server of which nothing is known."""

    cores = Cores()

    def cpu(self) -> float:
        return 0.0


class Handler(BaseHTTPRequestHandler):
    """Sends as many bytes as the path says, and notes the path; the connections are counted by their ports."""

    protocol_version = "HTTP/1.1"
    asked: list[str]
    ports: set[int]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.ports.add(self.client_address[1])
        kind, _, size = self.path[1:].partition("/")
        self.send_response(404 if kind == "missing" else 200)
        self.send_header("Content-Length", size)
        self.end_headers()
        self.wfile.write(bytes(int(size) - (kind == "short")))
        self.close_connection = kind == "short"

    def do_CONNECT(self) -> None:
        self.asked.append(self.path)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    return Generator.compile(tmp_path_factory.mktemp("load"))


@pytest.fixture
def serving() -> Iterator[Serving]:
    Handler.asked, Handler.ports = [], set()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        idle: Any = Idle()
        yield Serving(idle, Target("plain", server.server_port, "registry.test", "", through_connect=False))
        server.shutdown()


def test_each_connection_asks_for_the_paths_in_turn(generator: Generator, serving: Serving) -> None:
    done = generator.ask(serving, ["/blob/1000", "/blob/0", "/blob/1000000"], connections=2, count=4)
    assert sorted(Handler.asked) == sorted(["/blob/1000", "/blob/0", "/blob/1000000", "/blob/1000"] * 2)
    assert len(Handler.ports) == 2
    assert (done.count, done.bytes) == (8, 2 * 1_002_000)
    assert 0 < done.first <= done.whole <= done.wall
    assert len(done.firsts) == 2


def test_visits_are_connections_of_their_own(generator: Generator, serving: Serving) -> None:
    done = generator.visit(serving, ["/blob/1"], connections=3, seconds=0.1, resume=False)
    assert done.count == len(Handler.asked) == len(Handler.ports) >= 3
    assert done.resumed == 0


def test_greetings_go_to_each_host_in_turn(generator: Generator, serving: Serving) -> None:
    through = evolve(serving, target=evolve(serving.target, through_connect=True))
    done = generator.greet(through, ["one.test", "other.test"])
    assert Handler.asked == ["one.test:443", "other.test:443"]
    assert (done.count, done.bytes) == (2, 0)
    assert 0 < done.first <= done.wall


@pytest.mark.parametrize(
    ("path", "why"), [("/missing/5", "the server answered HTTP/1.1 404"), ("/short/100", "the server hung up")]
)
def test_another_answer_fails(generator: Generator, serving: Serving, path: str, why: str) -> None:
    with pytest.raises(BenchError, match=why):
        generator.ask(serving, [path], count=1)
